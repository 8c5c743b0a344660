"""float32 arithmetic with one rounding for each operation, whatever XLA does.

XLA:CPU flushes subnormals to zero, and contracts a product and a sum into one operation. Here products are taken of
significands and put together as integers, and small sums are taken of operands that are 2**64 times as large.
"""

import jax
import jax.numpy as jnp
import numpy as np

_SIGN = np.uint32(0x80000000)
_INFINITY = 0x7F800000
_HIDDEN = 0x800000  # the leading bit of a significand, and the smallest normal magnitude
_ONE = 0x3F800000
_LIFT = 64 << 23
_SMALL = 40 << 23  # lifted it is far from overflow, and a sum of larger magnitudes far from subnormal


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def from_bits(bits: jax.Array) -> jax.Array:
    """float32 numbers of uint32 bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _significand_and_exponent(magnitude: jax.Array, units: jax.Array) -> tuple[jax.Array, jax.Array]:
    """24 bits with the leading one, and the biased exponent. `units` are bits of the magnitude in units of 2**-149."""
    is_subnormal = magnitude < _HIDDEN
    exponent = jnp.where(is_subnormal, (units >> 23).astype(jnp.int32) - 149, (magnitude >> 23).astype(jnp.int32))
    return jnp.where(is_subnormal, units, magnitude) & 0x7FFFFF | _HIDDEN, exponent


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    """a * b of float32 arrays."""
    sign = (_bits(a) ^ _bits(b)) & _SIGN
    a, b = _bits(a) & ~_SIGN, _bits(b) & ~_SIGN
    a_units, b_units = _bits(a.astype(jnp.float32)), _bits(b.astype(jnp.float32))
    (a_part, a_exponent), (b_part, b_exponent) = (
        _significand_and_exponent(*operand) for operand in ((a, a_units), (b, b_units))
    )

    product = _bits(from_bits(a_part & 0x7FFFFF | _ONE) * from_bits(b_part & 0x7FFFFF | _ONE))  # in [1, 4)
    exponent = a_exponent + b_exponent - 127
    normal_exponent = exponent + (product >> 23).astype(jnp.int32) - 127
    normal = product & 0x7FFFFF | jnp.maximum(normal_exponent, 0).astype(jnp.uint32) << 23
    normal = jnp.where(normal_exponent > 254, jnp.uint32(_INFINITY), normal)

    # The exact product of the significands is high * 2**24 + low. Two more bits than those of `high`, the second one
    # for whatever is behind the first, decide how it is rounded to units of 2**-149.
    a_high, a_low, b_high, b_low = a_part >> 12, a_part & 0xFFF, b_part >> 12, b_part & 0xFFF
    middle = a_high * b_low + a_low * b_high
    low = a_low * b_low + ((middle & 0xFFF) << 12)
    high = a_high * b_high + (middle >> 12) + (low >> 24)
    exact = high << 2 | (low >> 23 & 1) << 1 | (low & 0x7FFFFF != 0).astype(jnp.uint32)
    shift = jnp.clip(2 - exponent, 2, 29).astype(jnp.uint32)
    subnormal = (exact + ((jnp.uint32(1) << (shift - 1)) - 1) + (exact >> shift & 1)) >> shift

    special = (jnp.minimum(a, b) == 0) | (jnp.maximum(a, b) >= _INFINITY)
    of_special = _bits(from_bits(jnp.where(a < _HIDDEN, a_units, a)) * from_bits(jnp.where(b < _HIDDEN, b_units, b)))
    magnitude = jnp.where(special, of_special, jnp.where(normal_exponent < 1, subnormal, normal))
    return from_bits(magnitude | sign)


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """a + b of float32 arrays."""
    total = _bits(_lifted(a) + _lifted(b))
    magnitude = total & ~_SIGN
    units = (from_bits(magnitude) * np.float32(2.0**85)).astype(jnp.uint32)  # of 2**-149, where less than 2**24 of them
    small = jnp.where(magnitude < _LIFT + _HIDDEN, units, magnitude - _LIFT) | total & _SIGN
    is_small = jnp.maximum(_bits(a) & ~_SIGN, _bits(b) & ~_SIGN) < _SMALL
    return jnp.where(is_small, from_bits(small), a + b)


def _lifted(x: jax.Array) -> jax.Array:
    """A small x * 2**64."""
    magnitude = _bits(x) & ~_SIGN
    of_subnormal = _bits(magnitude.astype(jnp.float32) * np.float32(2.0**-85))
    return from_bits(jnp.where(magnitude < _HIDDEN, of_subnormal, magnitude + _LIFT) | _bits(x) & _SIGN)
