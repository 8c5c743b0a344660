"""quantize_rows: FP8 values with one scale for each token and 128 features."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_tsq._core import numerics, primitive, results, validate
from jax_tsq._core.groups import place
from jax_tsq._core.limits import MOST_TOKENS
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result


@results.register
class RowQuantized(NamedTuple):
    """Row-wise quantized tokens: `x[m, k] ~= values[m, k] * scales[m, k // 128]`.

    Attributes:
        values: float8_e4m3fn `[M, K]`.
        scales: float32 `[M, ceil(K / 128)]` dequantization scales. Inside a compiled program they lie with the tokens
            contiguous, as kernels take them.
    """

    values: jax.Array
    scales: jax.Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """`[M, K]`, see `jax_tsq.dequantize`."""
        return results.dequantize_rows(self.values, self.scales, dtype)


def quantize_rows(x: jax.Array, group_sizes: jax.Array | None = None, *, pow_2_scales: bool = False) -> RowQuantized:
    """Quantizes tokens to FP8 with one scale for each token and block of 128 consecutive features.

    The numerics are those of `jax_tsq.fused_transpose_split_quant` with blocks along features:

        amax   = max |x[m, k]| over a block of (up to) 128 features, NaN left out
        q      = 448 / amax (1 if amax is 0), with pow_2_scales rounded down to a power of two
        value  = float8_e4m3fn(x * q), rounded to nearest even, saturating at +-448
        scale  = 1 / q

    With group sizes, rows past their sum are never read. Traced sizes stay on the device: a new routing costs neither a
    compilation nor a synchronisation. Since a compiled program cannot raise on data, traced sizes that break the rules
    are clipped: negative ones count as 0, and no group reaches past row M. `jax_tsq.check_group_sizes` raises on them.
    Sizes that are not traced are checked in any case, on the host.

    The result feeds `jax_tsq.fused_transpose_split_quant` and `jax_tsq.ragged_transpose_quant` as `x` and
    `input_scales`.

    Args:
        x: bfloat16 `[M, K]`, tokens x features; with group sizes sorted by group.
        group_sizes: None, or `[E]` of any integer dtype, tokens of each group, traced or not; their sum is at most M.
        pow_2_scales: whether scales are powers of two.

    Returns:
        `RowQuantized(values, scales)`: float8_e4m3fn `[M, K]` and float32 `[M, ceil(K / 128)]`. Past the sum of the
        sizes values are 0 and scales 1.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: x is not two-dimensional, group_sizes not one-dimensional, M with sizes exceeds 2**31 - 128, or
            sizes that are not traced break the rules.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (256, 300), jnp.bfloat16)
        >>> rows = jax_tsq.quantize_rows(x)
        >>> rows.values.shape, rows.scales.shape
        ((256, 300), (256, 3))
        >>> jax_tsq.ragged_transpose_quant(
        ...     rows.values, jnp.array([128, 128], jnp.int32), input_scales=rows.scales, aligned=True
        ... ).values.shape
        (300, 256)

    The 1 x 128 activation blocks are those of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    x = validate.check_tokens(x, dtypes=(jnp.bfloat16,))
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    if group_sizes is not None:
        if validate.check_count("x.shape[0]", x.shape[0]) > MOST_TOKENS:
            raise ValueError(f"x must have at most 2**31 - {BLOCK} tokens; got {validate.describe(x)}. Split the call.")
        group_sizes = validate.check_sizes(group_sizes, x.shape[0])
    return RowQuantized(*primitive.bind(rows_p, x, group_sizes, pow_2_scales=pow_2_scales, aligned=False))


def infer(x: tuple[int, ...], *_, **__) -> list[Result]:
    """Types of values and scales, for shapes without batch dimensions."""
    tokens, features = x
    return [
        Result(("tokens", "features"), x, FP8),
        Result(("tokens", "feature_blocks"), (tokens, -(-features // BLOCK)), jnp.float32),
    ]


def reference(x, group_sizes=None, *, pow_2_scales, aligned) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""

    def run(x, group_sizes):
        tokens, features = x.shape
        blocks = -(-features // BLOCK)
        bits = numerics.bf16_bits(x)
        if group_sizes is not None:
            in_use = jnp.arange(tokens) < jnp.sum(place(group_sizes, tokens, aligned).rows)
            bits = jnp.where(in_use[:, None], bits, 0)
        bits = jnp.pad(bits, ((0, 0), (0, blocks * BLOCK - features)))
        values, scales = numerics.quantize_blocks(bits.reshape(tokens, blocks, BLOCK), -1, pow_2_scales)
        return values.reshape(tokens, blocks * BLOCK)[:, :features], scales[..., 0]

    for _ in range(x.ndim - 2):
        run = jax.vmap(run)
    return list(run(x, group_sizes))


rows_p = primitive.define(
    Operation(
        name="rows",
        function="quantize_rows",
        operands=(("tokens", "features"), ("groups",)),
        results=infer,
        reference=reference,
        parallel=lambda *shapes, **_: ("features",) if len(shapes) > 1 else ("tokens", "features"),
        attributes=("pow_2_scales", "aligned"),
        blocks={"feature_blocks": "features"},
        column_major=(("tokens", "feature_blocks"),),
    )
)
