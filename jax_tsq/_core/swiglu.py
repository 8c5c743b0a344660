"""SwiGLU and its gradient in pure JAX, to the byte as native code computes them: ffi/core/swiglu.h words the sequence.

Gates are bfloat16, so silu and its derivative are tables that numpy computes. What follows are products and sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_tsq._core import ieee, numerics
from jax_tsq._core.ieee import from_bits
from jax_tsq._core.numerics import BLOCK

NO_LIMIT = float("inf")

_RANGE = np.float32(86)
_SHIFT = np.float32(1.5 * 2**23)
_LOG2_E, _LN_2 = (np.float32(float.fromhex(text)) for text in ("0x1.715476p+0", "0x1.62e430p-1"))
_POLYNOMIAL = ("0x1.106250p-7", "0x1.572a64p-5", "0x1.5557b0p-3", "0x1.fffdfcp-2", "1", "1")


def _fma(a, b, c) -> np.ndarray:
    """a * b + c in float32, rounded once."""
    product, c = np.float64(a) * np.float64(b), np.float64(c)
    total = product + c
    # Rounded to odd, so that rounding it again to float32 is as good as rounding once.
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = np.asarray(total).view(np.int64)
    step = np.where((total < 0) == (lost < 0), 1, -1)
    return np.where(np.isfinite(total) & (lost != 0) & (bits % 2 == 0), bits + step, bits).view(np.float64).astype("f4")


def _silu(gate: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """silu of float32 gates and its derivative, as bits: `jax.debug_nans` takes exception to the NaNs among them."""
    with np.errstate(all="ignore"):
        low = np.where(gate < -_RANGE, -_RANGE, gate)
        argument = np.where(low < _RANGE, low, _RANGE)
        shifted = _fma(argument, -_LOG2_E, _SHIFT)
        r = _fma(shifted - _SHIFT, -_LN_2, -argument)
        p = np.zeros_like(r)
        for coefficient in _POLYNOMIAL:
            p = _fma(p, r, np.float32(float.fromhex(coefficient)))
        exponential = (p.view(np.uint32) + (shifted.view(np.uint32) << np.uint32(23))).view(np.float32)
        sigmoid = np.float32(1) / (np.float32(1) + exponential)
        silu = low * sigmoid
        return silu.view(np.uint32), _fma(silu, np.float32(1) - sigmoid, sigmoid).view(np.uint32)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """The same of every bfloat16 gate, by its bits."""
    return _silu((np.arange(2**16, dtype=np.uint32) << 16).view(np.float32))


class _Operands(NamedTuple):
    """silu of clamped gates, its derivative, clamped ups, and what was clamped."""

    silu: jax.Array
    slope: jax.Array
    up: jax.Array
    gate_is_clamped: jax.Array | bool
    up_is_clamped: jax.Array | bool


def _operands(gate_up: jax.Array, limit: float) -> _Operands:
    features = gate_up.shape[1] // 2
    bits = numerics.bf16_bits(gate_up)
    gate, up = bits[:, :features], bits[:, features:]
    silu, slope = (numerics.look_up(table, gate) for table in _tables())
    up = up << 16
    if limit == NO_LIMIT:
        return _Operands(from_bits(silu), from_bits(slope), from_bits(up), False, False)
    at_limit = np.float32(limit).view(np.uint32)
    of_limit = _silu(np.array([limit], np.float32))
    # Of numbers with a sign of 0, and of no NaN, bits are in the order of the numbers.
    gate_is_clamped = (gate << 16 > at_limit) & (gate <= numerics.BF16_INFINITY)
    magnitude = up & 0x7FFFFFFF
    up_is_clamped = (magnitude > at_limit) & (magnitude <= numerics.BF16_INFINITY << 16)
    silu, slope = (jnp.where(gate_is_clamped, a[0], b) for a, b in zip(of_limit, (silu, slope), strict=True))
    up = jnp.where(up_is_clamped, up >> 31 << 31 | at_limit, up)
    return _Operands(from_bits(silu), from_bits(slope), from_bits(up), gate_is_clamped, up_is_clamped)


def _rounded(x: jax.Array) -> jax.Array:
    """float32 as bfloat16."""
    bits = numerics.bf16_bits(x).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _weighted(x: jax.Array, weights: jax.Array | None) -> jax.Array:
    return x if weights is None else ieee.multiply(x, jnp.broadcast_to(weights[:, None], x.shape))


def activate(gate_up: jax.Array, weights: jax.Array | None, limit: float) -> jax.Array:
    """h, bfloat16 `[M, F]`, of bfloat16 `[M, 2 * F]` and float32 weights `[M]`."""
    operands = _operands(gate_up, limit)
    return _rounded(_weighted(ieee.multiply(operands.silu, operands.up), weights))


class Gradients(NamedTuple):
    """Of SwiGLU's operands, in bfloat16, and of the weights, in float32; and h again."""

    gate_up: jax.Array
    weights: jax.Array | None
    h: jax.Array


def differentiate(gate_up: jax.Array, dh: jax.Array, weights: jax.Array | None, limit: float) -> Gradients:
    """The gradients for dh, bfloat16 `[M, F]`."""
    silu, slope, up, gate_is_clamped, up_is_clamped = _operands(gate_up, limit)
    dh = from_bits(numerics.bf16_bits(dh) << 16)
    activation, dactivation = ieee.multiply(silu, up), _weighted(dh, weights)
    dgate = jnp.where(gate_is_clamped, 0, ieee.multiply(ieee.multiply(dactivation, up), slope))
    dup = jnp.where(up_is_clamped, 0, ieee.multiply(dactivation, silu))
    dweights = None if weights is None else _sum_features(ieee.multiply(dh, activation))
    return Gradients(
        _rounded(jnp.concatenate([dgate, dup], axis=-1)), dweights, _rounded(_weighted(activation, weights))
    )


def _sum_features(x: jax.Array) -> jax.Array:
    """`[M, F]` -> `[M]`: neighbours of a block, then neighbouring sums and so on; then block after block, from 0 on."""
    tokens, features = x.shape
    blocks = 1 + -(-features // BLOCK)  # the first one is the 0
    sums = jnp.pad(x, ((0, 0), (BLOCK, (blocks - 1) * BLOCK - features))).reshape(tokens, blocks, BLOCK)
    while sums.shape[2] > 1:
        sums = ieee.add(sums[:, :, 0::2], sums[:, :, 1::2])
    sums = jnp.swapaxes(sums[:, :, 0], 0, 1)
    total, _ = jax.lax.scan(lambda total, block: (ieee.add(total, block), None), sums[0], sums[1:])
    return jnp.where(jnp.isnan(total), np.float32(np.nan), total)
