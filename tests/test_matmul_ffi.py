"""The FFI target jax_tsq.matmul, for CUDA only, called directly: wrong calls return an error and never crash."""

import jax
import numpy as np
import pytest

import jax_tsq  # noqa: F401  registers the targets
from tests.cases import bfloat16, float8_e4m3fn
from tests.conftest import NATIVE

pytestmark = pytest.mark.skipif("cuda" not in NATIVE, reason="no GPU, or built without CUDA")

Shape = jax.ShapeDtypeStruct
FP8, F32, I32, BF16 = float8_e4m3fn, np.float32, np.int32, bfloat16
M, K, N, E = 200, 144, 264, 3  # blocks of K: 2, of N: 3
X, X_SCALES = np.ones((M, K), FP8), np.ones((M, 2), F32)
W, W_SCALES = np.ones((E, N, K), FP8), np.ones((E, 2, 3), F32)
SIZES = np.int32([90, 0, 100])
OPERANDS = [X, X_SCALES, W, W_SCALES, SIZES]
Y = Shape((M, N), BF16)
INVALID = "INVALID_ARGUMENT"


def call(operands, results, transpose_w=False, multiprocessors=0):
    device = NATIVE["cuda"]
    operands = [jax.device_put(operand, device) for operand in operands]
    layouts = [(1, 0) if i == 1 and operand.ndim == 2 else None for i, operand in enumerate(operands)]
    function = jax.ffi.ffi_call("jax_tsq.matmul", results, has_side_effect=True, input_layouts=layouts)
    with jax.default_device(device):
        attributes = {"transpose_w": transpose_w, "multiprocessors": np.int64(multiprocessors)}
        run = jax.jit(lambda *operands: function(*operands, **attributes))
        return jax.block_until_ready(run(*operands))


def replaced(position, operand):
    return [operand if i == position else o for i, o in enumerate(OPERANDS)]


def test_right_call():
    """As the package calls it; on a GPU that the kernel does not run on, an error that says so."""
    if NATIVE["cuda"].compute_capability == "9.0":
        for operands, transpose_w in ((OPERANDS, False), (replaced(3, np.ones((E, 3, 2), F32)), True)):
            (result,) = call(operands, [Y], transpose_w)
            assert (np.asarray(result, F32) == np.where(np.arange(M) < 190, K, 0)[:, None]).all()
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"compute capability 9\.0"):
            call(OPERANDS, [Y])


WRONG_OPERANDS = {
    "too few": OPERANDS[:4],
    "too many": [*OPERANDS, SIZES],
    "another order": [X, W, X_SCALES, W_SCALES, SIZES],
    "x of bytes": replaced(0, X.view(np.uint8)),
    "x of bf16": replaced(0, X.astype(BF16)),
    "x transposed": replaced(0, np.ascontiguousarray(X.T)),
    "x of one dimension": replaced(0, X.ravel()),
    "x of other features": replaced(0, X[:, :128].copy()),
    "x batched": replaced(0, X[None]),
    "bf16 scales of x": replaced(1, X_SCALES.astype(BF16)),
    "scales of x transposed": replaced(1, np.ascontiguousarray(X_SCALES.T)),
    "scales of fewer blocks": replaced(1, X_SCALES[:, :1]),
    "w of bf16": replaced(2, W.astype(BF16)),
    "w the other way round": replaced(2, np.ascontiguousarray(W.swapaxes(1, 2))),
    "w of other groups": replaced(2, W[:2]),
    "w of two dimensions": replaced(2, W[0]),
    "scales of w the other way round": replaced(3, np.ascontiguousarray(W_SCALES.swapaxes(1, 2))),
    "scales of other groups": replaced(3, W_SCALES[:2]),
    "float sizes": replaced(4, SIZES.astype(F32)),
    "other groups": replaced(4, SIZES[:2]),
    "a single size": replaced(4, SIZES[0]),
    "batched sizes": replaced(4, SIZES[None]),
}


@pytest.mark.parametrize("operands", WRONG_OPERANDS.values(), ids=WRONG_OPERANDS)
def test_wrong_operands(operands):
    """Other numbers, orders, types and shapes."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(operands, [Y])


WRONG_RESULTS = {
    "two": [Y, Y],
    "float32": [Shape(Y.shape, F32)],
    "fp8": [Shape(Y.shape, FP8)],
    "transposed": [Shape((N, M), BF16)],
    "one row less": [Shape((M - 1, N), BF16)],
    "one column more": [Shape((M, N + 1), BF16)],
    "flat": [Shape((M * N,), BF16)],
    "batched": [Shape((1, M, N), BF16)],
}


@pytest.mark.parametrize("results", WRONG_RESULTS.values(), ids=WRONG_RESULTS)
def test_wrong_results(results):
    """Other numbers, types and shapes."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(OPERANDS, results)


@pytest.mark.parametrize(("features", "outputs", "groups"), [(136, 264, 3), (144, 260, 3), (144, 264, 1025)], ids=str)
def test_sizes_that_the_kernel_does_not_take(features, outputs, groups):
    """What the lowering never asks for."""
    blocks, output_blocks = -(-features // 128), -(-outputs // 128)
    operands = [
        np.ones((M, features), FP8),
        np.ones((M, blocks), F32),
        np.ones((groups, outputs, features), FP8),
        np.ones((groups, blocks, output_blocks), F32),
        np.zeros(groups, I32),
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match=INVALID):
        call(operands, [Shape((M, outputs), BF16)])


@pytest.mark.parametrize("multiprocessors", [1, 6, 2**31 - 1])
def test_few_multiprocessors(multiprocessors):
    """The same bytes on however many."""
    if NATIVE["cuda"].compute_capability != "9.0":
        pytest.skip("the kernel is for compute capability 9.0")
    results = [np.asarray(call(OPERANDS, [Y], multiprocessors=most)[0]) for most in (0, multiprocessors)]
    assert results[0].tobytes() == results[1].tobytes()


def test_no_multiprocessors():
    """Fewer than none."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{INVALID}.*multiprocessors must be at least 1"):
        call(OPERANDS, [Y], multiprocessors=-1)
