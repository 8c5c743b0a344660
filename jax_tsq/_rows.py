"""quantize_rows: FP8 values with one scale for each token and 128 features."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_tsq._core import derivatives, numerics, results, validate
from jax_tsq._core.numerics import BLOCK


@results.register
class RowQuantized(NamedTuple):
    """Row-wise quantized tokens: `x[m, k] ~= values[m, k] * scales[m, k // 128]`.

    Attributes:
        values: float8_e4m3fn `[M, K]`.
        scales: float32 `[M, ceil(K / 128)]` dequantization scales.
    """

    values: jax.Array
    scales: jax.Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """`[M, K]`, see `jax_tsq.dequantize`."""
        return results.dequantize_rows(self.values, self.scales, dtype)


def quantize_rows(x: jax.Array, *, pow_2_scales: bool = False) -> RowQuantized:
    """Quantizes tokens to FP8 with one scale for each token and block of 128 consecutive features.

    The numerics are those of `jax_tsq.fused_transpose_split_quant` with blocks along features:

        amax   = max |x[m, k]| over a block of (up to) 128 features, NaN left out
        q      = 448 / amax (1 if amax is 0), with pow_2_scales rounded down to a power of two
        value  = float8_e4m3fn(x * q), rounded to nearest even, saturating at +-448
        scale  = 1 / q

    It is plain JAX, which XLA fuses with the producer of x. The result feeds `jax_tsq.fused_transpose_split_quant` and
    `jax_tsq.ragged_transpose_quant` as `x` and `input_scales`.

    Args:
        x: bfloat16 `[M, K]`, tokens x features.
        pow_2_scales: whether scales are powers of two.

    Returns:
        `RowQuantized(values, scales)`: float8_e4m3fn `[M, K]` and float32 `[M, ceil(K / 128)]`.

    Raises:
        TypeError: x is not a bfloat16 array or pow_2_scales is not a bool.
        ValueError: x is not two-dimensional.
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
    return derivatives.refuse(_NO_DERIVATIVE, functools.partial(_quantize, pow_2_scales))(x)


_NO_DERIVATIVE = (
    "jax_tsq.quantize_rows rounds its input to float8_e4m3fn and has no derivative. Call it inside a jax.custom_vjp "
    "whose backward pass says what the gradient is, or put jax.lax.stop_gradient around its argument."
)


def _quantize(pow_2_scales: bool, x: jax.Array) -> RowQuantized:
    tokens, features = x.shape
    blocks = -(-features // BLOCK)
    bits = jnp.pad(numerics.bf16_bits(x, None), ((0, 0), (0, blocks * BLOCK - features)))
    values, scales = numerics.quantize_blocks(bits.reshape(tokens, blocks, BLOCK), -1, pow_2_scales)
    return RowQuantized(values.reshape(tokens, blocks * BLOCK)[:, :features], scales[..., 0])
