"""SwiGLU in numpy, as its specification words it: one sequence of float32 operations, so that every byte is decided.

Of every gate the sigmoid is

    low = -86 where gate < -86, else gate          a NaN stays
    c   = low where low < 86, else 86              a NaN does not
    t   = fma(c, -log2(e), 1.5 * 2**23)            its low bits count powers of two
    r   = fma(t - 1.5 * 2**23, -ln(2), -c)
    p   = 1 + r (1 + r (c2 + r (c3 + r (c4 + r c5))))   an fma each
    e   = p, with the low bits of t added to its exponent
    sigmoid = 1 / (1 + e)

and then, every operation rounded to float32 by itself where no fma is named,

    silu  = low * sigmoid
    dsilu = fma(silu, 1 - sigmoid, sigmoid)
    h     = bfloat16(silu * up * weight)
    dgate = bfloat16(dh * weight * up * dsilu)
    dup   = bfloat16(dh * weight * silu)
    dweight = sum over features of dh * (silu * up)

with products from left to right, and without the factor `weight` where there are no weights. The sum is that of a
balanced tree over each block of 128 features, blocks in their order, from 0 on; any NaN is 0x7FC00000. A `limit` clamps
gate from above and up from both sides; the gradient of what was clamped is +0.
"""

import numpy as np

from tests.spec import quantizers

LOWEST = np.float32(-86)
HIGHEST = np.float32(86)
SHIFT = np.float32(3 << 22)
LOG2_E = np.float32(float.fromhex("0x1.715476p+0"))
LN_2 = np.float32(float.fromhex("0x1.62e430p-1"))
COEFFICIENTS = ["0x1.106250p-7", "0x1.572a64p-5", "0x1.5557b0p-3", "0x1.fffdfcp-2", "1", "1"]  # of p, the last first


def fma(a, b, c):
    """a * b + c, rounded once: float32."""
    product = np.float64(a) * np.float64(b)  # exact
    c = np.float64(c)
    total = product + c
    # What the addition has lost, and rounding to odd: what float64 rounds then does not change what float32 rounds.
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = np.atleast_1d(total).view(np.int64)
    with np.errstate(invalid="ignore"):
        step = np.where(np.signbit(total) == (lost < 0), 1, -1)
        inexact = np.isfinite(total) & (lost != 0) & (bits.reshape(np.shape(total)) % 2 == 0)
    odd = (bits.reshape(np.shape(total)) + np.where(inexact, step, 0)).view(np.float64)
    return odd.astype(np.float32)


def sigmoid(gate):
    """The argument that the gate is taken for, and its sigmoid."""
    gate = np.asarray(gate, np.float32)
    low = np.where(gate < LOWEST, LOWEST, gate)
    c = np.where(low < HIGHEST, low, HIGHEST)
    t = fma(c, -LOG2_E, SHIFT)
    r = fma(t - SHIFT, -LN_2, -c)
    p = np.float32(0)
    for coefficient in COEFFICIENTS:
        p = fma(p, r, np.float32(float.fromhex(coefficient)))
    e = (p.view(np.uint32) + (t.view(np.uint32) << np.uint32(23))).view(np.float32)
    return low, np.float32(1) / (np.float32(1) + e)


def silu(gate):
    """silu and its derivative."""
    low, s = sigmoid(gate)
    result = low * s
    return result, fma(result, np.float32(1) - s, s)


def _operands(gate_up, limit):
    features = gate_up.shape[1] // 2
    gate, up = gate_up[:, :features].astype(np.float32), gate_up[:, features:].astype(np.float32)
    high_gate, high_up = np.zeros(gate.shape, bool), np.zeros(up.shape, bool)
    if limit is not None:
        limit = np.float32(limit)
        high_gate, high_up = gate > limit, np.abs(up) > limit
        gate, up = np.where(high_gate, limit, gate), np.where(high_up, np.copysign(limit, up), up)
    return gate, up, high_gate, high_up


def _rounded(x):
    return x.astype(quantizers.bfloat16)


def swiglu(gate_up, weights=None, limit=None):
    """`[M, 2F]` bfloat16, gates and then ups, and float32 `[M]` -> h, bfloat16 `[M, F]`."""
    with np.errstate(all="ignore"):
        gate, up, _, _ = _operands(gate_up, limit)
        h = silu(gate)[0] * up
        return _rounded(h if weights is None else h * weights[:, None])


def swiglu_backward(gate_up, dh, weights=None, limit=None):
    """The same and dh, bfloat16 `[M, F]` -> gradients of `gate_up`, bfloat16, and of the weights, float32; and h."""
    with np.errstate(all="ignore"):
        gate, up, high_gate, high_up = _operands(gate_up, limit)
        s, ds = silu(gate)
        dh = dh.astype(np.float32)
        activation = s * up
        dact = dh if weights is None else dh * weights[:, None]
        dgate = np.where(high_gate, np.float32(0), dact * up * ds)
        dup = np.where(high_up, np.float32(0), dact * s)
        do1 = _rounded(np.concatenate([dgate, dup], axis=1))
        h = _rounded(activation if weights is None else activation * weights[:, None])
        dweights = None if weights is None else sum_features(dh * activation)
        return do1, dweights, h


def sum_features(x):
    """`[M, F]` -> `[M]`: within each block neighbours, then neighbouring sums, and so on; then block after block."""
    blocks = -(-x.shape[1] // quantizers.BLOCK)
    padded = np.zeros((len(x), blocks * quantizers.BLOCK), np.float32)
    padded[:, : x.shape[1]] = x
    sums = padded.reshape(len(x), blocks, quantizers.BLOCK)
    while sums.shape[2] > 1:
        sums = sums[:, :, 0::2] + sums[:, :, 1::2]
    total = np.zeros(len(x), np.float32)
    for block in range(blocks):
        total = total + sums[:, block, 0]
    return np.where(np.isnan(total), np.float32(np.nan), total)


def _taken(group_sizes, tokens, aligned=False):
    return np.arange(tokens) < quantizers.taken_rows(group_sizes, tokens, aligned).sum()


def swiglu_quantize(gate_up, group_sizes, weights=None, pow_2_scales=False, limit=None):
    """Values and scales of the rows of h."""
    return quantizers.rows(swiglu(gate_up, weights, limit), group_sizes, pow_2_scales)


def swiglu_backward_quantize(gate_up, dh, group_sizes, weights=None, pow_2_scales=False, aligned=False, limit=None):
    """Rows of do1, values and scales; columns of do1; columns of h; padded sizes; gradients of the weights or None."""
    do1, dweights, h = swiglu_backward(gate_up, dh, weights, limit)
    *do1_parts, padded_sizes = quantizers.dual(do1, group_sizes, pow_2_scales, aligned)
    h_values, h_scales, _ = quantizers.ragged(h, group_sizes, None, pow_2_scales, aligned)
    if dweights is not None:
        dweights = np.where(_taken(group_sizes, len(do1), aligned), dweights, np.float32(0))
    return *do1_parts, h_values, h_scales, padded_sizes, dweights
