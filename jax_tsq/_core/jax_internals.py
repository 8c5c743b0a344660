"""Every private name of JAX that jax_tsq uses, and nothing else: one that is gone is an error at import."""

import jax

try:
    from jax._src.dispatch import prim_requires_devices_during_lowering
    from jax._src.export._export import deserialization_registry
    from jax._src.sharding_impls import GSPMDSharding, parse_flatten_op_sharding

    gspmd_to_hlo_sharding = GSPMDSharding._to_xla_hlo_sharding
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"This jax ({jax.__version__}) has moved an internal that jax_tsq rests on: {error}. Use a jax version that "
        "the installed jax_tsq lists as tested, or upgrade jax_tsq."
    ) from error

__all__ = [
    "deserialization_registry",
    "gspmd_to_hlo_sharding",
    "parse_flatten_op_sharding",
    "prim_requires_devices_during_lowering",
]
