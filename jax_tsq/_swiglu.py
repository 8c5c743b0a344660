"""swiglu_quantize and swiglu_backward_quantize: SwiGLU and its gradient, fused with what quantizes them."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from jax_tsq import _dual, _ragged, _rows
from jax_tsq._core import primitive, swiglu, validate
from jax_tsq._core.groups import place
from jax_tsq._core.kernels import Kernel
from jax_tsq._core.limits import MOST_TOKENS
from jax_tsq._core.numerics import BLOCK
from jax_tsq._core.primitive import Operation, Result
from jax_tsq._ragged import RaggedQuantized
from jax_tsq._rows import RowQuantized


def swiglu_quantize(
    gate_up: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array | None = None,
    *,
    pow_2_scales: bool = False,
    limit: float | None = None,
) -> RowQuantized:
    """Quantizes the result of SwiGLU to FP8 with one scale for each token and block of 128 consecutive features.

        h      = bfloat16(silu(gate) * up * weight), with gate, up = gate_up[:, :F], gate_up[:, F:]
        result = quantize_rows(h, group_sizes, pow_2_scales=pow_2_scales)

    byte for byte, without an h in memory. silu(gate) = gate / (1 + exp(-gate)) is one sequence of float32 operations on
    every platform; rounded to bfloat16, it is the exactly rounded one for every gate from -86 on, and below it is
    -4e-36. Products are rounded to float32 from left to right.

    Rows past the sum of the sizes are never read. Traced sizes stay on the device, and those that break the rules are
    clipped, as those of `jax_tsq.quantize_rows` are. Where F is a multiple of 128 native code computes this on CPUs and
    on NVIDIA GPUs; otherwise pure JAX does.

    Args:
        gate_up: bfloat16 `[M, 2 * F]`, tokens sorted by group; gates, then ups.
        group_sizes: `[E]` of any integer dtype, tokens of each group, traced or not; their sum is at most M.
        weights: None, or float32 `[M]`, the routing weight of each token.
        pow_2_scales: whether scales are powers of two.
        limit: None, or a number from 2**-126 on that gates are clamped to from above, and ups from both sides, before
            anything else, as by the `swiglu_limit` of gpt-oss.

    Returns:
        `RowQuantized(values, scales)`: float8_e4m3fn `[M, F]` and float32 `[M, ceil(F / 128)]`. Past the sum of the
        sizes values are 0 and scales 1.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape is wrong, limit not a finite number above 0, M exceeds 2**31 - 128, or sizes that are not
            traced break the rules.
        NotImplementedError: the call is differentiated. `jax_tsq.moe_mlp` has a derivative.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> gate_up = jax.random.normal(jax.random.key(0), (300, 512), jnp.bfloat16)
        >>> h = jax_tsq.swiglu_quantize(gate_up, jnp.array([100, 0, 150], jnp.int32), jnp.full(300, 0.5))
        >>> h.values.shape, h.scales.shape
        ((300, 256), (300, 2))

    SwiGLU is that of Shazeer (arXiv:2002.05202), the scaling recipe that of DeepSeek-V3 (arXiv:2412.19437, section
    3.3).
    """
    options = _options(pow_2_scales, limit)
    operands = _check_operands(gate_up, group_sizes, weights)
    if validate.check_count("gate_up.shape[0]", operands[0].shape[0]) > MOST_TOKENS:
        raise ValueError(
            f"gate_up must have at most 2**31 - {BLOCK} tokens; got {validate.describe(gate_up)}. Split the call."
        )
    return RowQuantized(*primitive.bind(swiglu_p, *operands, **options))


def swiglu_backward_quantize(
    gate_up: jax.Array,
    dh: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array | None = None,
    *,
    pow_2_scales: bool = False,
    aligned: bool = False,
    limit: float | None = None,
) -> tuple[RowQuantized, RaggedQuantized, RaggedQuantized, jax.Array | None]:
    """Quantizes the gradient of SwiGLU to FP8 along features and along tokens, and SwiGLU's result along tokens.

        do1      = bfloat16 gradients of gate_up: dh * weight * up * silu'(gate), then dh * weight * silu(gate)
        h        = bfloat16(silu(gate) * up * weight), as in `jax_tsq.swiglu_quantize`
        dweights = sum over features of dh * silu(gate) * up
        result   = ragged_quantize(do1, group_sizes), ragged_transpose_quant(h, group_sizes), dweights

    byte for byte, from one read of gate_up and dh, with neither do1 nor h in memory. These are the operands of the
    input gradient and of both weight gradients of an MLP. Products are rounded to float32 from left to right. What
    `limit` has clamped has the gradient 0. The sum of dweights has one order, so that it is the same in every run:
    within each block of 128 features neighbours are added, then neighbouring sums and so on, and the blocks' sums in
    their order.

    Rows past the sum of the sizes are never read. Traced sizes that break the rules are clipped, as those of
    `jax_tsq.ragged_quantize` are. Where F is a multiple of 128 native code computes this on CPUs and on NVIDIA GPUs;
    otherwise pure JAX does.

    Args:
        gate_up: bfloat16 `[M, 2 * F]`, tokens sorted by group; gates, then ups.
        dh: bfloat16 `[M, F]`, the gradient of h.
        group_sizes: `[E]` of any integer dtype, tokens of each group, traced or not; their sum is at most M.
        weights: None, or float32 `[M]`, the routing weight of each token.
        pow_2_scales: whether scales are powers of two.
        aligned: promises that all sizes are multiples of 128, which makes P as small as it can be.
        limit: as in `jax_tsq.swiglu_quantize`.

    Returns:
        do1 as `RowQuantized(values, scales)`: float8_e4m3fn `[M, 2 * F]` and float32 `[M, ceil(2 * F / 128)]`, 0 and 1
        past the sum of the sizes; do1 as `RaggedQuantized(values, scales, padded_sizes)`: float8_e4m3fn `[2 * F, P]`,
        float32 `[P / 128, 2 * F]` and int32 `[E]`, with P = `padded_tokens(M, E, aligned=aligned)`; h likewise, with F
        in the place of 2 * F; and float32 `[M]`, the gradient of the weights, 0 past the sum of the sizes, or None
        where there are no weights.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: a shape is wrong, limit not a finite number above 0, P exceeds 2**31 - 128, or sizes that are not
            traced break the rules.
        NotImplementedError: the call is differentiated.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> gate_up = jax.random.normal(jax.random.key(0), (300, 512), jnp.bfloat16)
        >>> dh = jax.random.normal(jax.random.key(1), (300, 256), jnp.bfloat16)
        >>> sizes, weights = jnp.array([100, 0, 150], jnp.int32), jnp.full(300, 0.5)
        >>> do1_rows, do1, h, dweights = jax_tsq.swiglu_backward_quantize(gate_up, dh, sizes, weights)
        >>> do1_rows.values.shape, do1.values.shape, h.values.shape, dweights.shape
        ((300, 512), (512, 640), (256, 640), (300,))

    That h is computed again in the backward pass, and not kept, is the recipe of DeepSeek-V3 (arXiv:2412.19437, section
    3.3.3).
    """
    options = _options(pow_2_scales, limit) | {"aligned": validate.check_flag("aligned", aligned)}
    gate_up, group_sizes, weights = _check_operands(gate_up, group_sizes, weights, aligned=options["aligned"])
    dh = validate.check_tokens(dh, name="dh", dtypes=(jnp.bfloat16,))
    if tuple(dh.shape) != (gate_up.shape[0], gate_up.shape[1] // 2):
        raise ValueError(
            f"dh must be [M, F] for gate_up [M, 2 * F]; got {validate.describe(dh)} and {validate.describe(gate_up)}."
        )
    _ragged.check_length(gate_up, group_sizes, options["aligned"], "gate_up")
    arrays = primitive.bind(dswiglu_p, gate_up, dh, group_sizes, weights, **options)
    padded_sizes = arrays[6]
    columns, h = (RaggedQuantized(*arrays[i : i + 2], padded_sizes=padded_sizes) for i in (2, 4))
    return RowQuantized(*arrays[:2]), columns, h, None if weights is None else arrays[7]


def _options(pow_2_scales, limit) -> dict:
    return {"pow_2_scales": validate.check_flag("pow_2_scales", pow_2_scales), "limit": check_limit(limit)}


def check_limit(limit) -> np.float32:
    """Returns the limit as the primitives take it, infinity for none."""
    smallest = np.finfo(np.float32).smallest_normal
    rule = "limit must be None or a finite number above 0, from 2**-126 on and known when tracing"
    if limit is None:
        return np.float32(swiglu.NO_LIMIT)
    if not isinstance(limit, numbers.Real | np.floating) or isinstance(limit, bool):
        raise TypeError(f"{rule}; got {validate.describe(limit)}. Pass a Python float.")
    try:
        with np.errstate(over="ignore"):
            rounded = np.float32(limit)
    except OverflowError:  # an int beyond float64
        rounded = np.float32(swiglu.NO_LIMIT)
    if not (math.isfinite(rounded) and rounded >= smallest):  # XLA's threads take what is smaller for 0
        raise ValueError(f"{rule}; got {limit!r}. Pass None to clamp nothing.")
    return rounded


def check_routing(weights, tokens: int) -> jax.Array | None:
    """Returns routing weights as a JAX array."""
    if weights is None:
        return None
    rule = f"weights must be float32[{tokens}], one routing weight for each token"
    if not validate.is_array(weights):
        raise TypeError(f"{rule}; got {validate.describe(weights)}. Use jnp.asarray(weights, jnp.float32).")
    if weights.dtype != jnp.float32:
        raise TypeError(f"{rule}; got {validate.describe(weights)}. Cast them by weights.astype(jnp.float32).")
    if tuple(weights.shape) != (tokens,):
        raise ValueError(
            f"{rule}; got {validate.describe(weights)}. Flatten them in the order of the tokens' rows, or use jax.vmap "
            "for batch dimensions."
        )
    return jnp.asarray(weights)


def _check_operands(gate_up, group_sizes, weights, *, aligned: bool = False):
    gate_up = validate.check_tokens(gate_up, name="gate_up", dtypes=(jnp.bfloat16,))
    if gate_up.shape[1] % 2:
        raise ValueError(
            f"gate_up must be [M, 2 * F], gates and then ups; got {validate.describe(gate_up)}. Join them by "
            "jnp.concatenate([gate, up], axis=1)."
        )
    group_sizes = validate.check_sizes(group_sizes, gate_up.shape[0], aligned=aligned)
    return gate_up, group_sizes, check_routing(weights, gate_up.shape[0])


def _sizes_unmet(gate_up, *_, **__) -> str | None:
    """Which condition of the kernels the operands' sizes do not meet, None if they meet all."""
    features = gate_up[1] // 2
    if not isinstance(features, int):
        return "F must be known"
    return f"F must be a multiple of {BLOCK}; got {features}" if features % BLOCK else None


def _over_batch(run, gate_up, *operands) -> list[jax.Array]:
    """Results of a function for operands without batch dimensions."""
    for _ in range(gate_up.ndim - 2):
        run = jax.vmap(run)
    return list(run(gate_up, *operands))


def infer(gate_up, *_, **__) -> list[Result]:
    """Types of values and scales, for shapes without batch dimensions."""
    return _rows.infer((gate_up[0], gate_up[1] // 2))


def reference(gate_up, group_sizes, weights=None, *, pow_2_scales, limit) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""

    def run(gate_up, group_sizes, weights):
        h = swiglu.activate(gate_up, weights, float(limit))
        return _rows.reference(h, group_sizes, pow_2_scales=pow_2_scales, aligned=False)

    return _over_batch(run, gate_up, group_sizes, weights)


def infer_backward(gate_up, dh, group_sizes, *weights, pow_2_scales, aligned, limit) -> list[Result]:
    """Types of all results, for shapes without batch dimensions. The last one is a workspace."""
    options = {"pow_2_scales": pow_2_scales, "aligned": aligned}

    def named(result: Result) -> Result:
        names = {"features": "gates_and_ups", "feature_blocks": "gate_and_up_blocks"}
        return Result(tuple(names.get(dim, dim) for dim in result.dims), result.shape, result.dtype)

    *do1, padded_sizes = map(named, _dual.infer(gate_up, group_sizes, **options))
    h = _ragged.infer(dh, group_sizes, flat=False, **options)[:2]
    tokens, features = dh
    of_weights = [
        Result(("tokens",), (tokens,), jnp.float32),
        Result(("feature_blocks", "tokens"), (-(-features // BLOCK), tokens), jnp.float32),
    ]
    return [*do1, *h, padded_sizes, *(of_weights if weights else [])]


def reference_backward(gate_up, dh, group_sizes, weights=None, *, limit, **options) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""

    def run(gate_up, dh, group_sizes, weights):
        gradients = swiglu.differentiate(gate_up, dh, weights, float(limit))
        *do1, padded_sizes = _dual.reference(gradients.gate_up, group_sizes, **options)
        h = _ragged.reference(gradients.h, group_sizes, flat=False, **options)[:2]
        if gradients.weights is None:
            return *do1, *h, padded_sizes
        tokens, features = dh.shape
        in_use = jnp.arange(tokens) < jnp.sum(place(group_sizes, tokens, options["aligned"]).rows)
        workspace = jnp.zeros((-(-features // BLOCK), tokens), jnp.float32)
        return *do1, *h, padded_sizes, jnp.where(in_use, gradients.weights, 0), workspace

    return _over_batch(run, gate_up, dh, group_sizes, weights)


# A mesh splits nothing: devices' parts of gates and of ups are no part of both, and groups lie where they lie.
swiglu_p = primitive.define(
    Operation(
        name="swiglu",
        function="swiglu_quantize",
        operands=(("tokens", "gates_and_ups"), ("groups",), ("tokens",)),
        results=infer,
        reference=reference,
        parallel=lambda *_, **__: (),
        attributes=("pow_2_scales", "limit"),
        column_major=(("tokens", "feature_blocks"),),
        kernel=Kernel(sizes=_sizes_unmet),
    )
)
dswiglu_p = primitive.define(
    Operation(
        name="dswiglu",
        function="swiglu_backward_quantize",
        operands=(("tokens", "gates_and_ups"), ("tokens", "features"), ("groups",), ("tokens",)),
        results=infer_backward,
        reference=reference_backward,
        parallel=lambda *_, **__: (),
        attributes=("pow_2_scales", "aligned", "limit"),
        column_major=(("tokens", "gate_and_up_blocks"),),
        kernel=Kernel(sizes=_sizes_unmet),
    )
)
