"""The numpy specification against the bytes that the original CUDA kernel wrote, and against the published example."""

from pathlib import Path

import numpy as np
import pytest

from tests import spec

RECORDED = np.load(Path(__file__).parent / "data" / "original_kernel_bytes.npz")
COUNTS = RECORDED["tokens_per_expert"].tolist()


def recorded_input(data, dtype):
    """x and input_scales of one recorded run."""
    x = RECORDED[f"{data}_{dtype}_x"]
    if dtype == "bf16":
        return x.view(spec.bfloat16), None
    return x.view(spec.float8_e4m3fn), RECORDED[f"{data}_{dtype}_input_scales"]


@pytest.mark.parametrize("pow_2_scales", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("data", ["normal", "wild", "edge"])
def test_original_kernel(data, dtype, pow_2_scales):
    """Every byte equals the original kernel's."""
    outs, scales = spec.split(*recorded_input(data, dtype), COUNTS, pow_2_scales)
    run = f"{data}_{dtype}" + ("_pow2" if pow_2_scales else "")
    np.testing.assert_array_equal(np.concatenate([out.ravel() for out in outs]).view(np.uint8), RECORDED[f"{run}_outs"])
    np.testing.assert_array_equal(np.concatenate(scales).view(np.uint32), RECORDED[f"{run}_scales"].view(np.uint32))


def test_published_example():
    """The shapes of the original's API page."""
    outs, scales = spec.split(np.ones([384, 512], spec.bfloat16), None, [128, 128, 128], pow_2_scales=True)
    assert [out.shape for out in outs] == [(512, 128)] * 3
    assert [scale.shape for scale in scales] == [(1, 512)] * 3


def test_scale_overflow():
    """Exactly 992 magnitudes other than zero are too small for 448 / amax; the largest is 1.3165537e-36."""
    magnitudes = np.arange(1, 0x7F80, dtype=np.uint16).view(spec.bfloat16).astype(np.float32)
    overflowed = magnitudes[spec.quant_scale(magnitudes, False) == spec.LARGEST_BF16]
    assert len(overflowed) == 992
    assert f"{overflowed.max():.7e}" == "1.3165537e-36"


def test_nan_is_skipped():
    """NaNs of every payload, quiet and signalling, in every column of vectorised and scalar loops."""
    nan = np.arange(0x7F81, 0x8000, dtype=np.uint16)
    for columns in [1, 3, 16, 37]:
        x = np.empty([128, columns], np.uint16)
        x[:127], x[127] = nan[:, None], 0xFF81
        x[5], x[77] = 0x4000, 0xC040  # 2 and -3
        values, scales = spec.quantize(x.view(spec.bfloat16), True)
        assert (scales == 2**-7).all()
        assert (values[5] == 256).all() and (values[77] == -384).all()
        assert (np.delete(values, [5, 77], axis=0).view(np.uint8) == 0x7F).all()


def test_ragged_layouts():
    """Groups of sizes 1, 0 and 130 written out by hand: where each row goes, in both layouts."""
    x = np.arange(1, 133, dtype=np.float32)[:, None].repeat(2, axis=1).astype(spec.bfloat16)
    x[131] = np.nan  # past the sum
    packed, scales, sizes = spec.ragged(x, [1, 0, 130])
    assert sizes.tolist() == [128, 0, 256]
    assert packed.shape == (2, 512) and scales.shape == (4, 2)
    rows = np.repeat(scales, 128, axis=0).T * packed.astype(np.float32)
    expected = np.zeros(512)
    expected[0], expected[128:258] = 1, np.arange(2, 132)
    np.testing.assert_allclose(rows, [expected, expected], rtol=2**-4)
    assert (scales[3] == 1).all()
    flat, flat_scales, _ = spec.ragged(x, [1, 0, 130], layout="flat")
    np.testing.assert_array_equal(flat[:256].reshape(2, 128).view(np.uint8), packed[:, :128].view(np.uint8))
    np.testing.assert_array_equal(flat[256:768].reshape(2, 256).view(np.uint8), packed[:, 128:384].view(np.uint8))
    assert not flat[768:].view(np.uint8).any()
    np.testing.assert_array_equal(flat_scales, scales)


@pytest.mark.parametrize(
    ("sizes", "aligned", "expected"),
    [
        ([-5, 10, -1], False, [0, 10, 0]),
        ([200, 200, 5], False, [200, 100, 0]),
        ([2**31 - 1, 2**31 - 1, 7], False, [300, 0, 0]),
        ([130, 127, 128], True, [128, 0, 128]),
        ([256, 128], True, [256, 44]),
    ],
)
def test_bad_sizes(sizes, aligned, expected):
    """Negative sizes are 0, broken `aligned` promises lose the rows of their last block, nothing passes row M = 300."""
    assert spec.taken_rows(sizes, 300, aligned).tolist() == expected
