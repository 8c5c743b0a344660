"""float32 products and sums of compiled programs, of which every bit is that of numpy."""

import jax
import numpy as np
import pytest

from jax_tsq._core import ieee
from tests.cases import assert_same_bytes

F32, U32 = np.float32, np.uint32
OPERATIONS = {"multiply": (ieee.multiply, np.multiply), "add": (ieee.add, np.add)}
EVERY = pytest.mark.parametrize("name", OPERATIONS)


def check(name, a, b):
    """Of both signs; all NaNs are one here."""
    function, expected = OPERATIONS[name]
    a, b = (np.concatenate(parts) for parts in ([a, a, -a, -a], [b, -b, b, -b]))
    with np.errstate(all="ignore"):
        expected = expected(a, b)
    actual = np.array(jax.jit(function)(*jax.device_put((a, b), jax.devices("cpu")[0])))
    for result in (actual, expected):
        result[np.isnan(result)] = np.nan
    assert_same_bytes(actual, expected)


def magnitudes(rng, low, high, size):
    """Any bits in a range of biased exponents."""
    return rng.integers(low << 23, high << 23, size=size, dtype=U32).view(F32)


@EVERY
@pytest.mark.parametrize("exponents", [(0, 256), (0, 1), (0, 3), (50, 80), (120, 135), (250, 256)], ids=str)
def test_exponents(name, exponents):
    """Any two operands of some exponents."""
    rng = np.random.default_rng(0)
    check(name, *magnitudes(rng, *exponents, (2, 200_000)))


@EVERY
def test_special(name):
    """Zeros, the smallest and largest of each kind, infinities and NaN beside each other and beside any."""
    rng = np.random.default_rng(1)
    special = U32([0, 1, 2, 0x7FFFFF, 0x800000, 0x800001, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001])
    special = special.view(F32)
    others = np.concatenate([special, magnitudes(rng, 0, 255, 20_000)])
    check(name, *(side.ravel() for side in np.meshgrid(special, others)))


@pytest.mark.parametrize("target", [-126, -127, -130, -140, -148, -149, -150])
def test_subnormal_products(target):
    """Products about a power of two that is subnormal or nearly so, among them halves between two numbers."""
    rng = np.random.default_rng(2)
    exponent = rng.integers(-30, 30, 200_000)
    significands = 1 + rng.integers(2**23, size=(2, 200_000)) / 2**23
    significands[:, ::2] = 1 + rng.integers(2**10, size=(2, 100_000)) / 2**10
    a, b = np.ldexp(significands, [exponent, target - exponent - 1]).astype(F32)
    check("multiply", a, b)


def test_sums_that_cancel():
    """Nearly equal operands of opposite signs, of all magnitudes."""
    rng = np.random.default_rng(3)
    a = magnitudes(rng, 0, 255, 200_000)
    b = (a.view(U32) ^ U32(1) << rng.integers(24, size=a.size, dtype=U32)).view(F32)
    check("add", a, b)


def test_nothing_is_contracted():
    """A product is rounded before it is added, though the processor could do both at once."""
    rng = np.random.default_rng(4)
    a, b, c = rng.standard_normal((3, 100_000)).astype(F32)
    c[::2] = -(a * b)[::2]
    actual = jax.jit(lambda a, b, c: ieee.add(ieee.multiply(a, b), c))(a, b, c)
    assert_same_bytes(actual, a * b + c)
