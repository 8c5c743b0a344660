"""The specification of SwiGLU against what it stands for."""

import math
from fractions import Fraction

import numpy as np

from tests.cases import assert_same_bytes, bfloat16
from tests.spec import swiglu

F32 = np.float32
GATES = np.arange(2**16, dtype=np.uint16).view(bfloat16)


def rounded(x):
    """A Fraction as the nearest float32."""
    if x == 0:
        return F32(0)
    exponent = math.frexp(float(x))[1] - 24
    return F32(math.ldexp(round(x / Fraction(2) ** exponent), exponent))


def test_fma():
    """One rounding: sums that cancel, and others that are nearly half a last place."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2000)).astype(F32)
    c = (-a.astype(np.float64) * b * rng.choice([1, 1 + 2**-12, 2**-20, 2**25, 3], 2000)).astype(F32)
    exact = [Fraction(x.item()) * Fraction(y.item()) + Fraction(z.item()) for x, y, z in zip(a, b, c, strict=True)]
    assert_same_bytes(swiglu.fma(a, b, c), np.array([rounded(x) for x in exact]))


def test_silu():
    """Rounded to bfloat16, silu is the exactly rounded one for all gates from -86 on; its derivative is as close."""
    with np.errstate(all="ignore"):
        gates = GATES.astype(F32)
        value, derivative = swiglu.silu(gates)
    usual = (gates >= -86) & (gates < np.inf)
    exact = gates[usual].astype(np.longdouble)
    sigmoid = 1 / (1 + np.exp(-exact))
    assert_same_bytes(value[usual].astype(bfloat16), (exact * sigmoid).astype(F32).astype(bfloat16))
    slope = sigmoid * (1 + exact * (1 - sigmoid))
    assert np.max(np.abs(derivative[usual] - slope) / np.abs(slope)) < 1e-5
    assert value[gates == np.inf] == np.inf
    assert np.all(np.abs(value[gates < -86]) < 4e-36) and np.all(np.abs(derivative[gates < -86]) < 4e-36)
    assert np.isnan(value[np.isnan(gates)]).all() and np.isnan(derivative[np.isnan(gates)]).all()


def test_gradients():
    """Against differences of the exact function in float64, with and without a limit."""
    rng = np.random.default_rng(1)
    gate_up = (rng.standard_normal((40, 400)) * 3).astype(bfloat16)
    dh = rng.standard_normal((40, 200)).astype(bfloat16)
    weights = rng.random(40).astype(F32)

    def loss(x, w, limit):
        gate, up = np.split(x, 2, axis=1)
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
        return dh.astype(np.float64) * gate / (1 + np.exp(-gate)) * up * w[:, None]

    x, w, step = gate_up.astype(np.float64), weights.astype(np.float64), 1e-6
    for limit in (None, 2.5):
        do1, dweights, h = swiglu.swiglu_backward(gate_up, dh, weights, limit)
        at = 1e9 if limit is None else limit
        for half in (0, 1):
            move = np.zeros_like(x)
            move[:, half * 200 : half * 200 + 200] = step
            expected = (loss(x + move, w, at) - loss(x - move, w, at)) / (2 * step)
            actual = np.split(do1.astype(np.float64), 2, axis=1)[half]
            # Where a value equals the limit the difference is half the gradient.
            kink = np.abs(np.split(x, 2, axis=1)[half]) == at
            np.testing.assert_allclose(actual[~kink], expected[~kink], rtol=5e-3, atol=1e-6)
        unweighted = loss(x, np.ones(40), at)
        assert dweights is not None
        np.testing.assert_allclose(dweights, unweighted.sum(axis=1), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(h * dh.astype(F32), unweighted * w[:, None], rtol=1e-2, atol=1e-30)
