"""The FFI targets called directly: right calls work, wrong ones return an error and never crash."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq  # noqa: F401  registers the targets
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn, matrix

Shape = jax.ShapeDtypeStruct
FP8, F32, I32, BF16 = float8_e4m3fn, np.float32, np.int32, bfloat16
COUNTS, FEATURES = [130, 0, 62], 200
TOKENS = sum(COUNTS)

SPLIT_RESULTS = [
    *[Shape((FEATURES, n), FP8) for n in COUNTS],
    *[Shape((-(-n // 128), FEATURES), F32) for n in COUNTS],
]
PADDED = spec.padded_tokens(TOKENS, 3)
RAGGED_RESULTS = [Shape((FEATURES, PADDED), FP8), Shape((PADDED // 128, FEATURES), F32), Shape((3,), I32)]
SIZES = np.int32([100, 0, 30])
X, _ = matrix(0, BF16, COUNTS, FEATURES)
X8, SCALES = matrix(0, FP8, COUNTS, FEATURES)
FLAGS = dict(pow_2_scales=False, aligned=False, flat=False)


def call(device, target, operands, results, **attributes):
    operands = [jax.device_put(operand, device) for operand in operands]
    # Without a side effect XLA drops calls whose results are all empty.
    function = jax.ffi.ffi_call(target, results, has_side_effect=True)
    with jax.default_device(device):
        return jax.block_until_ready(function(*operands, **attributes))


def replaced(items, **changes):
    """A copy of a list with the items at the positions `_<i>` replaced."""
    return [changes.get(f"_{i}", item) for i, item in enumerate(items)]


def test_split(ffi_device):
    """The target as the package calls it: outs, then scales."""
    for operands in [(X,), (X8, SCALES)]:
        results = call(ffi_device, "jax_tsq.split", operands, SPLIT_RESULTS, pow_2_scales=True)
        expected = spec.split(operands[0], operands[1] if len(operands) > 1 else None, COUNTS, True)
        assert_same_bytes((results[:3], results[3:]), expected)


def test_split_batched(ffi_device):
    """Leading batch dimensions."""
    results = [Shape((2, 1, *r.shape), r.dtype) for r in SPLIT_RESULTS]
    actual = call(ffi_device, "jax_tsq.split", [np.stack([[X], [-X]])], results, pow_2_scales=False)
    assert_same_bytes([r[1, 0] for r in actual[:3]], spec.split(-X, None, COUNTS)[0])


def test_ragged(ffi_device):
    """The target as the package calls it: values, scales, padded sizes."""
    results = call(ffi_device, "jax_tsq.ragged", [X8, SIZES, SCALES], RAGGED_RESULTS, **FLAGS)
    assert_same_bytes(results, spec.ragged(X8, SIZES, SCALES))
    expected = spec.ragged(X, SIZES, None, True, True, "flat")
    flat = [Shape(part.shape, part.dtype) for part in expected]
    results = call(ffi_device, "jax_tsq.ragged", [X, SIZES], flat, pow_2_scales=True, aligned=True, flat=True)
    assert_same_bytes(results, expected)


@pytest.mark.parametrize(
    "operands",
    [
        [],
        [X.astype(F32)],
        [X.astype(np.float16)],
        [X.view(np.uint16)],
        [X8.view(np.uint8), SCALES],
        [X[0]],
        [X[0, 0]],
        [X[None]],
        [X[:-1]],
        [X[:, :-1]],
        [X, SCALES],
        [X8],
        [X8, SCALES.astype(BF16)],
        [X8, SCALES.view(I32)],
        [X8, SCALES.T.copy()],
        [X8, SCALES[:-1]],
        [X8, SCALES[:, :1]],
        [X8, SCALES[None]],
        [X8, SCALES.ravel()],
        [X8, SCALES, SCALES],
    ],
    ids=lambda operands: " ".join(f"{o.dtype}{list(o.shape)}" for o in operands) or "none",
)
def test_split_wrong_operands(ffi_device, operands):
    """Operands of other types, shapes and numbers."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(ffi_device, "jax_tsq.split", operands, SPLIT_RESULTS, pow_2_scales=False)


OUT, SCALE = SPLIT_RESULTS[0], SPLIT_RESULTS[3]


@pytest.mark.parametrize(
    "results",
    [
        [],
        SPLIT_RESULTS[:-1],
        SPLIT_RESULTS[:1] + SPLIT_RESULTS[3:4],
        SPLIT_RESULTS[1:2] * 3 + SPLIT_RESULTS[4:5] * 3,
        SPLIT_RESULTS[::-1],
        SPLIT_RESULTS[:3] + SPLIT_RESULTS[:3],
        replaced(SPLIT_RESULTS, _0=Shape(OUT.shape, np.uint8)),
        replaced(SPLIT_RESULTS, _0=Shape(OUT.shape, jnp.float8_e5m2)),
        replaced(SPLIT_RESULTS, _0=Shape(OUT.shape, BF16)),
        replaced(SPLIT_RESULTS, _0=Shape(OUT.shape[::-1], FP8)),
        replaced(SPLIT_RESULTS, _0=Shape((FEATURES, 131), FP8)),
        replaced(SPLIT_RESULTS, _0=Shape((FEATURES - 1, 130), FP8)),
        replaced(SPLIT_RESULTS, _0=Shape((1, *OUT.shape), FP8)),
        replaced(SPLIT_RESULTS, _0=Shape((FEATURES * 130,), FP8)),
        replaced(SPLIT_RESULTS, _0=Shape((), FP8)),
        replaced(SPLIT_RESULTS, _3=Shape(SCALE.shape, BF16)),
        replaced(SPLIT_RESULTS, _3=Shape(SCALE.shape, I32)),
        replaced(SPLIT_RESULTS, _3=Shape(SCALE.shape[::-1], F32)),
        replaced(SPLIT_RESULTS, _3=Shape((1, FEATURES), F32)),
        replaced(SPLIT_RESULTS, _3=Shape((3, FEATURES), F32)),
        replaced(SPLIT_RESULTS, _3=Shape((2, FEATURES - 1), F32)),
        replaced(SPLIT_RESULTS, _3=Shape((1, *SCALE.shape), F32)),
        replaced(SPLIT_RESULTS, _4=Shape((1, FEATURES), F32)),
        replaced(SPLIT_RESULTS, _5=Shape((), F32)),
    ],
    ids=lambda results: " ".join(f"{np.dtype(r.dtype)}{list(r.shape)}" for r in results) or "none",
)
def test_split_wrong_results(ffi_device, results):
    """Results of other types, shapes and numbers."""
    if not results and ffi_device.platform == "gpu":
        pytest.skip("nothing to wait for, so nothing that the error is reported with")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(ffi_device, "jax_tsq.split", [X], results, pow_2_scales=False)


def test_split_wrong_batch(ffi_device):
    """Batch dimensions that differ between operands or results."""
    x, scales = np.stack([X8] * 2), np.stack([SCALES] * 2)
    results = [Shape((2, *r.shape), r.dtype) for r in SPLIT_RESULTS]
    wrong = [
        ([x, scales[:1]], results),
        ([x, np.stack([SCALES] * 3)], results),
        ([x, SCALES], results),
        ([x, scales], SPLIT_RESULTS),
        ([x, scales], [Shape((3, *r.shape), r.dtype) for r in SPLIT_RESULTS]),
        ([x, scales], [*results[:5], Shape((3, *SPLIT_RESULTS[5].shape), F32)]),
        ([x, scales], [Shape((1, 2, *r.shape), r.dtype) for r in SPLIT_RESULTS]),
    ]
    for operands, shapes in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call(ffi_device, "jax_tsq.split", operands, shapes, pow_2_scales=False)


@pytest.mark.parametrize("attributes", [{}, dict(pow_2_scales="yes"), dict(pow_2=True)], ids=str)
def test_wrong_attributes(ffi_device, attributes):
    """Attributes that are missing or of another type."""
    with pytest.raises(jax.errors.JaxRuntimeError):
        call(ffi_device, "jax_tsq.split", [X], SPLIT_RESULTS, **attributes)
    with pytest.raises(jax.errors.JaxRuntimeError):
        call(ffi_device, "jax_tsq.ragged", [X, SIZES], RAGGED_RESULTS, **attributes)


@pytest.mark.parametrize(
    "operands",
    [
        [],
        [X],
        [SIZES, X],
        [X.astype(F32), SIZES],
        [X, SIZES.astype(np.uint32)],
        [X, SIZES.astype(np.int16)],
        [X, SIZES.astype(F32)],
        [X, SIZES[None]],
        [X, SIZES[0]],
        [X, SIZES[:-1]],
        [X, np.int32([1, 2, 3, 4])],
        [X[None], SIZES],
        [X[0], SIZES],
        [X[:-1], SIZES[:2]],
        [X[:, :-1], SIZES],
        [np.concatenate([X, X, X]), SIZES],
        [X, SIZES, SCALES],
        [X8, SIZES],
        [X8, SCALES, SIZES],
        [X8, SIZES, SCALES.astype(BF16)],
        [X8, SIZES, SCALES[:-1]],
        [X8, SIZES, SCALES[:, :1]],
        [X8, SIZES, SCALES[None]],
        [X8, SIZES, SCALES, SCALES],
    ],
    ids=lambda operands: " ".join(f"{o.dtype}{list(o.shape)}" for o in operands) or "none",
)
def test_ragged_wrong_operands(ffi_device, operands):
    """Operands of other types, shapes, numbers and order."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(ffi_device, "jax_tsq.ragged", operands, RAGGED_RESULTS, **FLAGS)


@pytest.mark.parametrize(
    "results",
    [
        [],
        RAGGED_RESULTS[:2],
        [*RAGGED_RESULTS, RAGGED_RESULTS[2]],
        RAGGED_RESULTS[::-1],
        replaced(RAGGED_RESULTS, _0=Shape((FEATURES, PADDED), np.uint8)),
        replaced(RAGGED_RESULTS, _0=Shape((PADDED, FEATURES), FP8)),
        replaced(RAGGED_RESULTS, _0=Shape((FEATURES - 1, PADDED), FP8)),
        replaced(RAGGED_RESULTS, _0=Shape((FEATURES, PADDED + 1), FP8)),
        replaced(RAGGED_RESULTS, _0=Shape((FEATURES * PADDED,), FP8)),
        replaced(RAGGED_RESULTS, _0=Shape((1, FEATURES, PADDED), FP8)),
        replaced(RAGGED_RESULTS, _0=Shape((), FP8)),
        replaced(
            RAGGED_RESULTS,
            _0=Shape((FEATURES, PADDED - 128), FP8),
            _1=Shape((PADDED // 128 - 1, FEATURES), F32),
        ),
        replaced(RAGGED_RESULTS, _0=Shape((FEATURES, PADDED - 1), FP8)),
        replaced(RAGGED_RESULTS, _1=Shape((PADDED // 128, FEATURES), BF16)),
        replaced(RAGGED_RESULTS, _1=Shape((PADDED // 128 + 1, FEATURES), F32)),
        replaced(RAGGED_RESULTS, _1=Shape((PADDED // 128 - 1, FEATURES), F32)),
        replaced(RAGGED_RESULTS, _1=Shape((FEATURES, PADDED // 128), F32)),
        replaced(RAGGED_RESULTS, _1=Shape((PADDED // 128,), F32)),
        replaced(RAGGED_RESULTS, _2=Shape((3,), F32)),
        replaced(RAGGED_RESULTS, _2=Shape((3,), np.uint32)),
        replaced(RAGGED_RESULTS, _2=Shape((2,), I32)),
        replaced(RAGGED_RESULTS, _2=Shape((4,), I32)),
        replaced(RAGGED_RESULTS, _2=Shape((1, 3), I32)),
        replaced(RAGGED_RESULTS, _2=Shape((), I32)),
    ],
    ids=lambda results: " ".join(f"{np.dtype(r.dtype)}{list(r.shape)}" for r in results) or "none",
)
def test_ragged_wrong_results(ffi_device, results):
    """Results of other types, shapes, numbers and order; too few padded rows for some routing."""
    if not results and ffi_device.platform == "gpu":
        pytest.skip("nothing to wait for, so nothing that the error is reported with")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(ffi_device, "jax_tsq.ragged", [X, SIZES], results, **FLAGS)


def test_ragged_wrong_flat(ffi_device):
    """The flat attribute and the shape of the values do not go together, or hold different amounts."""
    wrong = [
        (RAGGED_RESULTS[0], True),
        (Shape((FEATURES * PADDED,), FP8), False),
        (Shape((FEATURES * PADDED - 1,), FP8), True),
        (Shape((FEATURES * (PADDED + 128),), FP8), True),
        (Shape((FEATURES * (PADDED - 128),), FP8), True),
        (Shape((1, FEATURES * PADDED), FP8), True),
    ]
    for values, flat in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            results = [values, *RAGGED_RESULTS[1:]]
            call(ffi_device, "jax_tsq.ragged", [X, SIZES], results, **{**FLAGS, "flat": flat})


def test_messages_name_the_argument(ffi_device):
    """The error that arrives in Python says which argument is wrong."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="input_scales"):
        call(ffi_device, "jax_tsq.split", [X8, SCALES[:-1]], SPLIT_RESULTS, pow_2_scales=False)
    with pytest.raises(jax.errors.JaxRuntimeError, match="group_sizes"):
        call(ffi_device, "jax_tsq.ragged", [X, SIZES.astype(F32)], RAGGED_RESULTS, **FLAGS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="scales"):
        wrong = replaced(RAGGED_RESULTS, _1=Shape((3, FEATURES), F32))
        call(ffi_device, "jax_tsq.ragged", [X, SIZES], wrong, **FLAGS)
