"""Ways to compute the networks of the experts: in bf16, and with products of FP8 operands."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jax_tsq

Linear = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Experts = Callable[[dict, jax.Array, jax.Array, jax.Array], jax.Array]


def bf16_linear(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """The baseline: all three products in bf16, by the fastest kernels that JAX has where this runs."""
    if takes_pallas() and all(features % 128 == 0 for features in w.shape[1:]):
        return _pallas_linear()(x, w.astype(x.dtype), group_sizes)
    return ragged_dot_linear(x, w, group_sizes)


def takes_pallas() -> bool:
    """On one Hopper GPU: over several devices `shard_map` checks what JAX's own kernels do not declare."""
    if jax.default_backend() != "gpu" or jax.sharding.get_abstract_mesh().size > 1:
        return False
    return jax.devices()[0].compute_capability == "9.0"


@functools.cache
def _pallas():
    from benchmarks.lib import peers  # not needed elsewhere

    return peers.pallas()


@functools.cache
def _pallas_linear() -> Linear:
    from benchmarks.lib import peers

    return peers.linear(_pallas())


@jax.checkpoint
def ragged_dot_linear(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """By `jax.lax.ragged_dot` and JAX's own differentiation of it.

    Rows past the sum of the sizes are masked on both sides, because plain `ragged_dot` does not promise to leave them
    alone on every platform. `jax_tsq.grouped_linear` needs no such care. Checkpointing keeps x and w for the backward
    pass, not their masked and rounded copies; no product is computed twice.
    """
    in_use = (jnp.arange(x.shape[0]) < jnp.sum(group_sizes))[:, None]
    return jnp.where(in_use, jax.lax.ragged_dot(jnp.where(in_use, x, 0), w.astype(x.dtype), group_sizes), 0)


@jax.named_scope("swiglu")
@jax.checkpoint
def swiglu(gate_up: jax.Array, weights: jax.Array) -> jax.Array:
    """Gates, then ups, and the routing weight of each row. Keeps its inputs for the backward pass, nothing else."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up * weights[:, None]).astype(gate_up.dtype)


def joined(gate_up: jax.Array) -> jax.Array:
    """`[E, D, 2, F]` as `[E, D, 2 * F]`: gates, then ups, on every device, since a mesh splits the last dimension."""
    return gate_up.reshape(*gate_up.shape[:2], -1)


def by_linear(linear: Linear) -> Experts:
    """The networks of all local experts, of linear layers."""

    def experts(params: dict, x: jax.Array, group_sizes: jax.Array, weights: jax.Array) -> jax.Array:
        h = swiglu(linear(x, joined(params["gate_up"]), group_sizes), weights)
        return linear(h, params["down"], group_sizes)

    return experts


def by_mlp(**options) -> Experts:
    """The same in one call."""

    def experts(params: dict, x: jax.Array, group_sizes: jax.Array, weights: jax.Array) -> jax.Array:
        sums = params.get("accumulate")
        return jax_tsq.moe_mlp(
            x,
            joined(params["gate_up"]),
            params["down"],
            group_sizes,
            weights,
            quantized_weights=params["quantized"],
            accumulate=None if sums is None else (joined(sums["gate_up"]), sums["down"]),
            **options,
        )

    return experts


def quantize(params: dict, **options) -> tuple[jax_tsq.BlockQuantized, jax_tsq.BlockQuantized]:
    """The weights of all local experts, as all products of a step take them."""
    return (
        jax_tsq.quantize_blocks(joined(params["gate_up"]), **options),
        jax_tsq.quantize_blocks(params["down"], **options),
    )


class Mode(NamedTuple):
    """A way to compute the networks of the experts.

    Attributes:
        label: how tables and curves call it.
        experts: the networks; their weights' gradients are added to `params["accumulate"]`, if that is there and there
            is something to quantize.
        quantize: once a step, what the weights are to be for all products; None for those that take them as they are.
        reverse: the passages of each batch: the same training, with sums in another order.
    """

    label: str
    experts: Experts
    quantize: Callable | None = None
    reverse: bool = False


def fp8_weight_gradient(x: jax.Array, w: jax.Array, group_sizes: jax.Array, **options) -> jax.Array:
    """Output and input gradient in bf16, by the kernels of the baseline."""
    product = _pallas().forward if takes_pallas() else jax.lax.ragged_dot
    return jax_tsq.grouped_linear(x, w, group_sizes, ragged_dot=product, **options)


MODES = {
    "bf16": Mode("bf16", by_linear(bf16_linear)),
    "control": Mode("bf16, passages reversed", by_linear(bf16_linear), reverse=True),
    "fp8": Mode("fp8 weight gradient", by_linear(fp8_weight_gradient)),
    "fp8-pow2": Mode(
        "fp8 weight gradient, power of two", by_linear(functools.partial(fp8_weight_gradient, pow_2_scales=True))
    ),
    "fp8-residuals-pow2": Mode(
        "fp8 residuals, power of two",
        by_linear(functools.partial(fp8_weight_gradient, pow_2_scales=True, fp8_residuals=True)),
    ),
    "fp8-products": Mode("fp8, all products", by_linear(jax_tsq.grouped_linear)),
    "fp8-mlp": Mode("fp8, whole block", by_mlp(), quantize),
    "fp8-mlp-pow2": Mode(
        "fp8, whole block, power of two", by_mlp(pow_2_scales=True), functools.partial(quantize, pow_2_scales=True)
    ),
}
