"""Block quantization in pure JAX: the readable specification and the lowering for platforms without native code.

The bytes are exact on XLA:CPU too, which flushes subnormals to zero and rewrites divisions: magnitudes are compared as
the integers that encode them, the scales come from tables that numpy computed, and whatever would be subnormal is
scaled up first or rounded as an integer.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128
"""Tokens (or features) that share one scale."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

FP8 = jnp.float8_e4m3fn

BF16_INFINITY = 0x7F80  # above it lie the NaNs
_BF16_NAN = 0x7FC0
_BF16_SMALLEST_NORMAL = 0x0080
_F32_INFINITY = 0x7F800000
_FP8_NAN = 0x7F


def _scale_tables(pow_2_scales: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bits of the quantization and dequantization scale of a block, indexed by the bfloat16 bits of its amax.

    As integers, since `jax.debug_infs` takes exception to the infinity among them.
    """
    amax = (np.arange(BF16_INFINITY + 1, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        quant_scale = np.float32(FP8_MAX) / amax
        quant_scale[np.isinf(quant_scale)] = np.uint32(0x7F7F0000).view(np.float32)  # largest bfloat16
        quant_scale[0] = 1
        if pow_2_scales:
            quant_scale = (quant_scale.view(np.uint32) & np.uint32(_F32_INFINITY)).view(np.float32)
        return quant_scale.view(np.uint32), (np.float32(1) / quant_scale).view(np.uint32)


_SCALE_TABLES = {pow_2_scales: _scale_tables(pow_2_scales) for pow_2_scales in (False, True)}


def _bits(x: jax.Array, dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, dtype)


def _round_off(n: jax.Array, bits: jax.Array | int) -> jax.Array:
    """n / 2**bits rounded to nearest even, for uint32 n below 2**30 and bits from 1 to 16."""
    bits = jnp.asarray(bits, jnp.uint32)
    return (n + (jnp.uint32(1) << (bits - 1)) - 1 + (n >> bits & 1)) >> bits


def _scaled_bf16_bits(x: jax.Array, input_scales: jax.Array) -> jax.Array:
    """Bits of bfloat16(float32(x) * input_scale) as uint32, x float8_e4m3fn with a scale for every 128 features."""
    scale = jnp.repeat(_bits(input_scales, jnp.uint32), BLOCK, axis=-1)[..., : x.shape[-1]]
    x_bits = _bits(x, jnp.uint8).astype(jnp.uint32)
    sign = (x_bits >> 7 ^ scale >> 31) << 15
    scale = scale & 0x7FFFFFFF

    # The product of magnitudes as a float32, small scales lifted by 2**64 so that nothing is subnormal.
    is_lifted = scale < 100 << 23
    lifted = jnp.where(
        scale < 1 << 23, scale.astype(jnp.float32) * np.float32(2.0**-85), _bits(scale + (64 << 23), jnp.float32)
    )
    factor = jnp.where(is_lifted, lifted, _bits(scale, jnp.float32))
    product = _bits(jnp.abs(x.astype(jnp.float32)) * factor, jnp.uint32)
    is_nan = product > _F32_INFINITY
    is_subnormal = is_lifted & (product < 65 << 23)  # 2**(64 - 126)
    normal = _round_off_normal(product - jnp.where(is_lifted, jnp.uint32(64 << 23), jnp.uint32(0)))

    # Where that is subnormal: the product of the significands in units of 2**-149 (float32), then 2**-133 (bfloat16).
    exponent = jnp.maximum(x_bits >> 3 & 15, 1) + jnp.maximum(scale >> 23, 1)
    significand = ((x_bits & 7) + 8 * (x_bits & 0x78 != 0)) * ((scale & 0x7FFFFF) + 0x800000 * (scale >= 1 << 23))
    significand = significand.astype(jnp.uint32)
    right, left = jnp.clip(11 - exponent.astype(jnp.int32), 1, 9), jnp.clip(exponent.astype(jnp.int32) - 11, 0, 5)
    subnormal = jnp.where(exponent < 11, _round_off(significand, right), significand << left.astype(jnp.uint32))
    magnitude = jnp.where(is_subnormal, _round_off(subnormal, 16), normal)
    return jnp.where(is_nan, jnp.uint32(_BF16_NAN), magnitude) | sign


def _round_off_normal(float_bits: jax.Array) -> jax.Array:
    """float32 bits rounded to bfloat16 bits, which carries into the exponent and up to infinity as it should."""
    return (float_bits + 0x7FFF + (float_bits >> 16 & 1)) >> 16


def _rounded_bf16_bits(x: jax.Array) -> jax.Array:
    """Bits of bfloat16(x) as uint32, x float32."""
    bits = _bits(x, jnp.uint32)
    is_nan = bits & 0x7FFFFFFF > _F32_INFINITY
    return jnp.where(is_nan, jnp.uint32(_BF16_NAN), _round_off_normal(bits))


def bf16_bits(x: jax.Array, input_scales: jax.Array | None = None) -> jax.Array:
    """The values that an operation quantizes, as the bits of bfloat16 numbers in a uint32 array of x's shape.

    Those of a float32 x are its values rounded to bfloat16, those of a float8_e4m3fn x with `input_scales` the products
    of both.
    """
    if input_scales is not None:
        return _scaled_bf16_bits(x, input_scales)
    return _rounded_bf16_bits(x) if x.dtype == jnp.float32 else _bits(x, jnp.uint16).astype(jnp.uint32)


def look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    """table[index], split as index is on a mesh with Explicit axes."""
    sharding = jax.typeof(index).sharding
    is_explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return jnp.asarray(table).at[index].get(out_sharding=sharding if is_explicit else None)


def quantize_blocks(bits: jax.Array, axis: int | tuple[int, ...], pow_2_scales: bool) -> tuple[jax.Array, jax.Array]:
    """Quantizes blocks that each take the whole of one axis or of several.

    Args:
        bits: uint32 array of bfloat16 bits.
        axis: the axis or axes whose elements share a scale.
        pow_2_scales: whether quantization scales are rounded down to powers of two.

    Returns:
        float8_e4m3fn values of the shape of `bits`, and float32 dequantization scales with these axes of size 1.
    """
    magnitude = bits & 0x7FFF
    amax = jnp.max(jnp.where(magnitude > BF16_INFINITY, jnp.uint32(0), magnitude), axis=axis, keepdims=True, initial=0)
    quant_scale, dequant_scale = (_bits(look_up(table, amax), jnp.float32) for table in _SCALE_TABLES[pow_2_scales])

    scaled = _bits(bits << 16, jnp.float32) * quant_scale
    # A subnormal element is magnitude * 2**-133, in two steps that both stay normal.
    tiny = (magnitude.astype(jnp.float32) * (quant_scale * np.float32(2.0**-100))) * np.float32(2.0**-33)
    tiny = jnp.where(bits >> 15 == 1, -tiny, tiny)
    scaled = jnp.where(magnitude < _BF16_SMALLEST_NORMAL, tiny, scaled)
    values = _bits(jnp.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8), jnp.uint8)
    return _bits(jnp.where(jnp.isnan(scaled), jnp.uint8(_FP8_NAN), values), FP8), dequant_scale


def quantize_packed(bits: jax.Array, pow_2_scales: bool) -> tuple[jax.Array, jax.Array]:
    """Quantizes and transposes whole blocks of tokens.

    Args:
        bits: uint32 `[..., P, K]` of bfloat16 bits, P a multiple of 128.
        pow_2_scales: whether quantization scales are rounded down to powers of two.

    Returns:
        float8_e4m3fn values `[..., K, P]` and float32 dequantization scales `[..., P / 128, K]`.
    """
    *batch, tokens, features = bits.shape
    blocks = bits.reshape(*batch, tokens // BLOCK, BLOCK, features)
    values, scales = quantize_blocks(blocks, -2, pow_2_scales)
    return jnp.swapaxes(values.reshape(*batch, tokens, features), -1, -2), jnp.squeeze(scales, -2)
