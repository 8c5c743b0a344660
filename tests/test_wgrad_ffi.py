"""The FFI target jax_tsq.wgrad, for CUDA only, called directly: wrong calls return an error and never crash."""

import jax
import numpy as np
import pytest

import jax_tsq  # noqa: F401  registers the targets
from tests.cases import bfloat16, float8_e4m3fn
from tests.conftest import NATIVE

pytestmark = pytest.mark.skipif("cuda" not in NATIVE, reason="no GPU, or built without CUDA")

Shape = jax.ShapeDtypeStruct
FP8, F32, I32, BF16 = float8_e4m3fn, np.float32, np.int32, bfloat16
K, N, P, E = 64, 72, 256, 3
X, X_SCALES = np.ones((K, P), FP8), np.ones((P // 128, K), F32)
DY, DY_SCALES = np.ones((N, P), FP8), np.ones((P // 128, N), F32)
SIZES = np.int32([128, 0, 128])
OPERANDS = [X, X_SCALES, DY, DY_SCALES, SIZES]
ACCUMULATOR = np.arange(E * K * N, dtype=F32).reshape(E, K, N)
DW = Shape((E, K, N), F32)
INVALID = "INVALID_ARGUMENT"


def call(operands, results, multiprocessors=0, **options):
    device = NATIVE["cuda"]
    operands = [jax.device_put(operand, device) for operand in operands]
    function = jax.ffi.ffi_call("jax_tsq.wgrad", results, has_side_effect=True, **options)
    with jax.default_device(device):
        run = jax.jit(lambda *operands: function(*operands, multiprocessors=np.int64(multiprocessors)))
        return jax.block_until_ready(run(*operands))


def replaced(position, operand):
    return [operand if i == position else o for i, o in enumerate(OPERANDS)]


def test_right_call():
    """As the package calls it; on a GPU that the kernel does not run on, an error that says so."""
    if NATIVE["cuda"].compute_capability == "9.0":
        (result,) = call(OPERANDS, [DW])
        assert (np.asarray(result) == np.array([128, 0, 128])[:, None, None]).all()
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"compute capability 9\.0"):
            call(OPERANDS, [DW])


@pytest.mark.parametrize("aliases", [{}, {5: 0}], ids=["own memory", "in place"])
def test_accumulator(aliases):
    """What dW is added to, in memory that is the result's or not; the group without tokens keeps it."""
    if NATIVE["cuda"].compute_capability != "9.0":
        pytest.skip("the kernel is for compute capability 9.0")
    (result,) = call([*OPERANDS, ACCUMULATOR], [DW], input_output_aliases=aliases)
    assert (np.asarray(result) == ACCUMULATOR + np.array([128, 0, 128], F32)[:, None, None]).all()


WRONG_OPERANDS = {
    "too few": OPERANDS[:4],
    "too many": [*OPERANDS, ACCUMULATOR, ACCUMULATOR],
    "an accumulator of integers": [*OPERANDS, ACCUMULATOR.astype(I32)],
    "a bf16 accumulator": [*OPERANDS, ACCUMULATOR.astype(BF16)],
    "an accumulator of one group": [*OPERANDS, ACCUMULATOR[0]],
    "an accumulator of fewer groups": [*OPERANDS, ACCUMULATOR[:2]],
    "an accumulator transposed": [*OPERANDS, np.ascontiguousarray(ACCUMULATOR.swapaxes(1, 2))],
    "another order": [X, DY, X_SCALES, DY_SCALES, SIZES],
    "x of bytes": replaced(0, X.view(np.uint8)),
    "x transposed": replaced(0, np.ascontiguousarray(X.T)),
    "x of one dimension": replaced(0, X.ravel()),
    "x of other tokens": replaced(0, X[:, :128].copy()),
    "x batched": replaced(0, X[None]),
    "bf16 scales of x": replaced(1, X_SCALES.astype(BF16)),
    "scales of x transposed": replaced(1, np.ascontiguousarray(X_SCALES.T)),
    "scales of fewer blocks": replaced(1, X_SCALES[:1]),
    "dy of bf16": replaced(2, DY.astype(BF16)),
    "dy of other tokens": replaced(2, np.ones((N, P + 128), FP8)),
    "scales of other features": replaced(3, X_SCALES),
    "float sizes": replaced(4, SIZES.astype(F32)),
    "other groups": replaced(4, SIZES[:2]),
    "a single size": replaced(4, SIZES[0]),
    "batched sizes": replaced(4, SIZES[None]),
}


@pytest.mark.parametrize("operands", WRONG_OPERANDS.values(), ids=WRONG_OPERANDS)
def test_wrong_operands(operands):
    """Other numbers, orders, types and shapes."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(operands, [DW])


WRONG_RESULTS = {
    "two": [DW, DW],
    "float16": [Shape(DW.shape, np.float16)],
    "fp8": [Shape(DW.shape, FP8)],
    "transposed": [Shape((E, N, K), F32)],
    "one group less": [Shape((E - 1, K, N), F32)],
    "one column more": [Shape((E, K, N + 1), F32)],
    "flat": [Shape((E * K * N,), F32)],
    "batched": [Shape((1, *DW.shape), F32)],
}


@pytest.mark.parametrize("results", WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_wrong_results(results):
    """Other numbers, types and shapes."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(OPERANDS, results)


def test_wrong_result_of_an_accumulator():
    """bfloat16 sums, whether what they are added to is float32 or not."""
    for accumulator in (ACCUMULATOR, ACCUMULATOR.astype(BF16)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
            call([*OPERANDS, accumulator], [Shape(DW.shape, BF16)])


@pytest.mark.parametrize(
    ("features", "outputs", "tokens", "groups", "dtype"),
    [
        (66, 72, 256, 3, F32),
        (64, 70, 256, 3, F32),
        (64, 68, 256, 3, BF16),
        (64, 72, 192, 3, F32),
        (64, 72, 256, 1025, F32),
    ],
    ids=str,
)
def test_sizes_that_the_kernel_does_not_take(features, outputs, tokens, groups, dtype):
    """What the lowering never asks for."""
    blocks = tokens // 128
    operands = [
        np.ones((features, tokens), FP8),
        np.ones((blocks, features), F32),
        np.ones((outputs, tokens), FP8),
        np.ones((blocks, outputs), F32),
        np.zeros(groups, I32),
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(operands, [Shape((groups, features, outputs), dtype)])


@pytest.mark.parametrize("multiprocessors", [1, 6, 2**31 - 1])
def test_few_multiprocessors(multiprocessors):
    """The same bytes on however many."""
    if NATIVE["cuda"].compute_capability != "9.0":
        pytest.skip("the kernel is for compute capability 9.0")
    results = [np.asarray(call(OPERANDS, [DW], multiprocessors=most)[0]) for most in (0, multiprocessors)]
    assert results[0].tobytes() == results[1].tobytes()


def test_no_multiprocessors():
    """Fewer than none."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{INVALID}.*multiprocessors must be at least 1"):
        call(OPERANDS, [DW], multiprocessors=-1)
