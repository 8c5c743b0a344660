"""fused_transpose_split_quant: static token counts, one result for each expert."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from jax_tsq._core import numerics, primitive, results, validate
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result


@results.register
class SplitQuantized(NamedTuple):
    """Per-expert, transposed FP8 operands: `x[tokens of i, k] ~= outs[i][k, t] * scales[i][t // 128, k]`.

    Attributes:
        outs: one float8_e4m3fn array `[K, T_i]` for each expert, tokens contiguous.
        scales: one float32 array `[ceil(T_i / 128), K]` for each expert: dequantization scales, one for each block of
            128 consecutive tokens of the expert (the last may be shorter) and feature.
    """

    outs: tuple[jax.Array, ...]
    scales: tuple[jax.Array, ...]

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> tuple[jax.Array, ...]:
        """`[T_i, K]` for each expert, see `jax_tsq.dequantize`."""
        pairs = zip(self.outs, self.scales, strict=True)
        return tuple(results.dequantize_columns(out, scales, dtype) for out, scales in pairs)


def fused_transpose_split_quant(
    x: jax.Array,
    input_scales: jax.Array | None,
    tokens_per_expert: Sequence[int],
    pow_2_scales: bool = False,
) -> SplitQuantized:
    """Quantizes tokens sorted by expert to FP8 along tokens, transposes them and splits them by expert, in one kernel.

    With `v` the values of x (for FP8 input `v = bfloat16(x * input_scale)`), for every expert, block `b` of 128 of its
    consecutive tokens (the last block may be shorter) and feature `k`:

        amax   = max |v[t, k]| over the block, NaN left out
        q      = 448 / amax (1 if amax is 0), with pow_2_scales rounded down to a power of two
        out    = float8_e4m3fn(v * q), rounded to nearest even, saturating at +-448
        scale  = 1 / q

    A NaN marks only its own element. An infinity turns into NaN, and its block's scale into infinity.

    The counts fix the shapes of the results, so they are static: under `jax.jit` every new routing is a new
    compilation. `jax_tsq.ragged_transpose_quant` takes traced group sizes.

    Args:
        x: `[M, K]` tokens x features, sorted by expert; bfloat16, or float8_e4m3fn together with `input_scales`.
        input_scales: None for bfloat16 x. For float8_e4m3fn x its row-wise dequantization scales, float32
            `[M, ceil(K / 128)]`: one for each token and 128 consecutive features.
        tokens_per_expert: T_i, one int for each expert, not traced; their sum is M. Any counts, 0 included.
        pow_2_scales: whether scales are powers of two. Quantization scales are then rounded down, so nothing saturates.

    Returns:
        `SplitQuantized(outs, scales)`: tuples with one entry for each expert, `outs[i]` float8_e4m3fn `[K, T_i]` and
        `scales[i]` float32 `[ceil(T_i / 128), K]`, the dequantization scales.

    Raises:
        TypeError: x, input_scales, a count or pow_2_scales has a wrong type or dtype, or the counts are traced.
        ValueError: x is not two-dimensional, a count is negative, the counts do not sum to M, or input_scales are
            missing, not wanted or of a wrong shape.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (384, 512), jnp.bfloat16)
        >>> outs, scales = jax_tsq.fused_transpose_split_quant(x, None, [128, 256, 0], pow_2_scales=True)
        >>> outs[1].dtype, outs[1].shape, scales[1].shape
        (dtype(float8_e4m3fn), (512, 256), (2, 512))

    The operation, its numerics and its argument order are those of PaddlePaddle's
    `paddle.incubate.nn.functional.fused_transpose_split_quant`; the scaling recipe is that of DeepSeek-V3
    (arXiv:2412.19437, section 3.3).
    """
    x = validate.check_tokens(x)
    counts = _check_counts(tokens_per_expert, x.shape[0])
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    input_scales = validate.check_input_scales(input_scales, x)
    if not counts:
        return SplitQuantized((), ())
    arrays = primitive.bind(split_p, x, input_scales, tokens_per_expert=counts, pow_2_scales=pow_2_scales)
    return SplitQuantized(tuple(arrays[: len(counts)]), tuple(arrays[len(counts) :]))


def _check_counts(tokens_per_expert, tokens: int) -> tuple[int, ...]:
    rule = "tokens_per_expert must be a sequence of non-negative ints known when tracing"
    is_array = validate.is_array(tokens_per_expert)
    if any(isinstance(x, Tracer) for x in ([tokens_per_expert] if is_array else _entries(tokens_per_expert))):
        raise TypeError(
            f"{rule}, because they fix the shapes of the results; got a traced array. For traced sizes use "
            "jax_tsq.ragged_transpose_quant(x, group_sizes)."
        )
    if is_array:
        if tokens_per_expert.ndim != 1 or not jnp.issubdtype(tokens_per_expert.dtype, jnp.integer):
            raise TypeError(f"{rule}; got {validate.describe(tokens_per_expert)}. Pass one int for each expert.")
        tokens_per_expert = np.asarray(tokens_per_expert).tolist()
    counts = []
    for i, count in enumerate(_entries(tokens_per_expert)):
        try:
            if isinstance(count, bool | np.bool_):
                raise TypeError
            counts.append(operator.index(count))
        except TypeError:
            raise TypeError(f"{rule}; got {validate.describe(count)} for expert {i}. Convert it with int().") from None
        if counts[-1] < 0:
            raise ValueError(f"{rule}; got {counts[-1]} for expert {i}. An unused expert has 0 tokens.")
    if sum(counts) != tokens:
        raise ValueError(
            f"tokens_per_expert must sum to x.shape[0] = {tokens}; got a sum of {sum(counts)} over {len(counts)} "
            "experts. Slice x to the tokens in use, or correct the counts."
        )
    return tuple(counts)


def _entries(tokens_per_expert) -> list:
    if not isinstance(tokens_per_expert, Sequence) or isinstance(tokens_per_expert, str | bytes):
        raise TypeError(
            "tokens_per_expert must be a sequence of non-negative ints, one for each expert; got "
            f"{validate.describe(tokens_per_expert)}. A single expert is [M]."
        )
    return list(tokens_per_expert)


def blocks_of(tokens: int) -> int:
    """Blocks that hold `tokens` tokens of one expert."""
    return -(-tokens // BLOCK)


def _results(x: tuple[int, ...], *_, tokens_per_expert, pow_2_scales) -> list[Result]:
    features = x[1]
    outs = [Result(("features", f"tokens{i}"), (features, t), FP8) for i, t in enumerate(tokens_per_expert)]
    scales = [
        Result((f"token_blocks{i}", "features"), (blocks_of(t), features), jnp.float32)
        for i, t in enumerate(tokens_per_expert)
    ]
    return outs + scales


def reference(x, input_scales=None, *, tokens_per_expert, pow_2_scales) -> list[jax.Array]:
    """The operation in pure JAX, for x and input_scales with any batch dimensions in front."""
    bits = numerics.bf16_bits(x, input_scales)
    blocks = np.array([blocks_of(t) for t in tokens_per_expert])
    ends = np.cumsum(blocks)
    if any(t % BLOCK for t in tokens_per_expert):
        starts = np.cumsum(tokens_per_expert) - tokens_per_expert
        within = np.arange(ends[-1] * BLOCK) - np.repeat((ends - blocks) * BLOCK, blocks * BLOCK)
        row = np.repeat(starts, blocks * BLOCK) + within
        row = np.where(within < np.repeat(tokens_per_expert, blocks * BLOCK), row, x.shape[-2])
        bits = jnp.take(bits, row.astype(np.int32), axis=-2, mode="fill", fill_value=0)
    # In one piece: XLA would otherwise compile the quantization anew for each expert's slice, which takes seconds.
    values, scales = jax.lax.optimization_barrier(numerics.quantize_packed(bits, pow_2_scales))
    outs = [
        values[..., (end - n) * BLOCK : (end - n) * BLOCK + t]
        for end, n, t in zip(ends, blocks, tokens_per_expert, strict=True)
    ]
    return outs + [scales[..., end - n : end, :] for end, n in zip(ends, blocks, strict=True)]


split_p = primitive.define(
    Operation(
        name="split",
        function="fused_transpose_split_quant",
        operands=(("tokens", "features"), ("tokens", "feature_blocks")),
        results=_results,
        reference=reference,
        parallel=lambda *_, **__: ("features",),
        attributes=("pow_2_scales",),
        blocks={"feature_blocks": "features"},
    )
)
