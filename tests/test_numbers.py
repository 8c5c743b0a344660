"""Every value there is: of bfloat16 as element and as block maximum, of float8_e4m3fn times awkward input scales.

For both operations, natively and in pure JAX; test_split.py goes through all binades of input scales.
"""

import numpy as np
import pytest

from tests import spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn

POW_2 = pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])

EVERY_BF16 = np.arange(65536, dtype=np.uint16)
MAXIMA = np.uint16([0x3E0, 0x7F7F, 0x7FC0])

# As bits of float32: zeros, subnormals, the smallest normal, ordinary ones, powers of two, the largest, infinities,
# NaNs quiet and signalling; each with both signs.
MAGNITUDES = np.uint32(
    [0, 1, 2, 0x7FFFFF, 0x400000, 0x800000, 0x800001, 0x0D800000, 0x3F800000, 0x3F8CCCCD, 0x3F808000, 0x3F818000]
    + [0x72000000, 0x7A7FFFFF, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF]
)
SCALES = np.concatenate([MAGNITUDES, MAGNITUDES | np.uint32(1 << 31)]).view(np.float32)


def check(implementation, x, scales, counts, pow_2_scales):
    """Both operations, on the same groups."""
    if len(counts) < 10 or implementation.name != "reference":  # which would compile for long
        split = spec.split(x, scales, counts, pow_2_scales)
        assert_same_bytes(implementation.split(x, scales, counts, pow_2_scales), split)
    sizes = np.int32(counts)
    ragged = spec.ragged(x, sizes, scales, pow_2_scales)
    assert_same_bytes(implementation.ragged(x, sizes, scales, pow_2_scales), ragged)


@POW_2
def test_every_bf16(implementation, pow_2_scales):
    """All 65,536 alone in their block, and each beside maxima from zero to NaN."""
    x = np.empty([1 + 2 * len(MAXIMA), 65536], np.uint16)
    x[0] = EVERY_BF16
    x[1::2] = EVERY_BF16
    x[2::2] = MAXIMA[:, None]
    check(implementation, x.view(bfloat16), None, [1] + [2] * len(MAXIMA), pow_2_scales)


@POW_2
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_every_fp8(implementation, together, pow_2_scales):
    """All 256 times awkward scales: each product alone in its block, and those of one value together."""
    values = np.arange(256, dtype=np.uint8).view(float8_e4m3fn)
    x = np.tile(values, (len(SCALES), 1))
    scales = np.repeat(SCALES[:, None], 2, axis=1)
    counts = [len(SCALES)] if together else [1] * len(SCALES)
    check(implementation, x, scales, counts, pow_2_scales)


@pytest.mark.parametrize("scale", [0, 0x3F800000, 0x7F800000, 0x7FC00000, 0xBF800000], ids=hex)
def test_scale_beside_ordinary_ones(implementation, scale):
    """One row with an awkward scale in a block of ordinary ones."""
    x = np.tile(np.arange(256, dtype=np.uint8).view(float8_e4m3fn), (128, 1))
    scales = np.ones([128, 2], np.float32)
    scales[77] = np.uint32(scale).view(np.float32)
    check(implementation, x, scales, [128], False)
