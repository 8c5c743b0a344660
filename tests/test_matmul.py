"""ragged_matmul: both paths against float64, exact sums, what never reaches the result, and bad input."""

import re

import jax
import numpy as np
import pytest

import jax_tsq
from jax_tsq import BlockQuantized, RowQuantized, ragged_matmul
from jax_tsq._core import ffi, kernels
from tests import layouts, spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn
from tests.conftest import DEVICES, NATIVE

CALLS = r"@jax_tsq\.matmul"
PATHS = {f"portable {platform}": ("portable", device) for platform, device in DEVICES.items()}
if "cuda" in NATIVE and NATIVE["cuda"].compute_capability == "9.0":
    PATHS["native cuda"] = ("native", NATIVE["cuda"])
TRANSPOSE = pytest.mark.parametrize("transpose_w", [False, True], ids=["forward", "transposed"])


class Way:
    """One of the ways that a device computes the operation."""

    def __init__(self, name, monkeypatch):
        self.native, self.device = name.startswith("native"), PATHS[name][1]
        # Elsewhere than on a CPU the portable path rounds operands to bfloat16, before the one rounding of the result.
        self.tolerance = 2e-3 if self.native or self.device.platform == "cpu" else 4e-3
        monkeypatch.setenv(kernels.SETTING, PATHS[name][0])

    def __call__(self, x, w, sizes, transpose_w=False):
        def run(x, w, sizes):  # a new function, so that the setting is read again
            return ragged_matmul(x, w, sizes, transpose_w=transpose_w)

        return np.asarray(jax.jit(run)(*jax.device_put((x, w, np.int32(sizes)), self.device)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    return Way(request.param, monkeypatch)


def operands(tokens, features, outputs, groups, transpose_w=False, pow_2_scales=False, seed=0):
    """Normal data; features are those that are summed over."""
    rng = np.random.default_rng(seed)
    shape = (groups, outputs, features) if transpose_w else (groups, features, outputs)
    x, w = (rng.standard_normal(s).astype(bfloat16) for s in ((tokens, features), shape))
    return RowQuantized(*spec.rows(x, None, pow_2_scales)), BlockQuantized(*spec.blocks(w, pow_2_scales))


def exact(x, w, sizes, transpose_w=False):
    """The formula in float64."""
    rows = x.values.astype(np.float64) * np.repeat(x.scales.astype(np.float64), 128, 1)[:, : x.values.shape[1]]
    _, high, wide = w.values.shape
    scales = np.repeat(np.repeat(w.scales.astype(np.float64), 128, 1)[:, :high], 128, 2)[..., :wide]
    matrices = w.values.astype(np.float64) * scales
    matrices = matrices.swapaxes(1, 2) if transpose_w else matrices
    ends = np.cumsum(spec.taken_rows(sizes, len(rows), False))
    parts = [a @ b for a, b in zip(np.split(rows, ends)[:-1], matrices, strict=True)]
    return np.concatenate([*parts, np.zeros((len(rows) - (ends[-1] if len(ends) else 0), matrices.shape[2]))])


def relative(actual, expected):
    return np.linalg.norm(np.float64(actual) - expected) / max(np.linalg.norm(expected), 1e-300)


def poisoned(x, used):
    """x with NaN in all rows and scales past those that are used."""
    values, scales = x.values.copy(), x.scales.copy()
    values[used:], scales[used:] = np.nan, np.nan
    return RowQuantized(values, scales)


SHAPES = {
    "one row": (1, 16, 8, [1]),
    "whole blocks": (384, 256, 128, [128, 256]),
    "any sizes": (700, 272, 136, [300, 0, 129, 128, 77]),
    "more outputs than features": (200, 48, 520, [3, 190]),
    "as many blocks of outputs as of features": (200, 256, 200, [90, 100]),
    "a whole tail": (130, 64, 64, [0, 0, 0]),
    "many groups": (300, 32, 40, [3 * (i % 2) for i in range(150)]),
    "negative and too large sizes": (500, 64, 72, [-5, 200, -(2**31), 127, 2**31 - 1, 2**31 - 1, 128]),
    "sizes that overflow": (512, 64, 72, [2**31 - 1] * 100),
}


def check(path, shape, transpose_w, **options):
    tokens, features, outputs, sizes = shape
    x, w = operands(tokens, features, outputs, len(sizes), transpose_w, **options)
    used = int(spec.taken_rows(sizes, tokens, False).sum())
    result, expected = path(poisoned(x, used), w, sizes, transpose_w), exact(x, w, sizes, transpose_w)
    assert (result.dtype, result.shape) == (bfloat16, expected.shape)
    assert relative(result, expected) <= path.tolerance
    assert not result[used:].view(np.uint16).any()  # +0
    return result


@TRANSPOSE
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(path, shape, transpose_w):
    """Against float64 of the dequantized operands, with NaN in all rows of no group."""
    check(path, shape, transpose_w)


@TRANSPOSE
@pytest.mark.parametrize(("features", "outputs"), [(5, 3), (130, 12), (24, 200), (16, 129)], ids=str)
def test_sizes_that_the_kernel_does_not_take(device, features, outputs, transpose_w):
    """They are computed all the same, by the portable path."""
    x, w = operands(200, features, outputs, 2, transpose_w)
    run = jax.jit(lambda *arrays: ragged_matmul(*arrays, transpose_w=transpose_w))
    result = run(*jax.device_put((x, w, np.int32([60, 110])), device))
    assert relative(result, exact(x, w, [60, 110], transpose_w)) < 4e-3


@pytest.mark.parametrize("shape", [(0, 16, 8, [0, 0]), (5, 0, 8, [3]), (5, 16, 0, [3]), (5, 16, 8, [])], ids=str)
@TRANSPOSE
def test_empty_arrays(path, shape, transpose_w):
    """No tokens, features or groups: zeros, if anything."""
    tokens, features, outputs, sizes = shape
    result = path(*operands(tokens, features, outputs, len(sizes), transpose_w), sizes, transpose_w)
    assert result.shape == (tokens, outputs) and not result.any()


@TRANSPOSE
def test_exact_sums(path, transpose_w):
    """Small integers with power-of-two scales: every path gives the bytes of the specification."""
    rng, sizes = np.random.default_rng(0), [100, 0, 57, 130]
    tokens, features, outputs = 300, 272, 136
    blocks, columns = -(-features // 128), -(-outputs // 128)
    values = rng.integers(-3, 4, (tokens, features)).astype(float8_e4m3fn)
    scales = np.exp2(rng.integers(-3, 3, (tokens, blocks))).astype(np.float32)
    weights = rng.integers(-3, 4, (4, features, outputs)).astype(float8_e4m3fn)
    weight_scales = np.exp2(rng.integers(-3, 3, (4, blocks, columns))).astype(np.float32)
    if transpose_w:
        weights, weight_scales = (np.ascontiguousarray(a.swapaxes(1, 2)) for a in (weights, weight_scales))
    x = RowQuantized(values, scales)
    w = BlockQuantized(weights, np.ascontiguousarray(weights.swapaxes(1, 2)), weight_scales)
    assert_same_bytes(path(poisoned(x, 287), w, sizes, transpose_w), spec.matmul(x, w, sizes, transpose_w))


@pytest.mark.parametrize("tail", [np.nan, np.inf, -np.inf, 3e38], ids=str)
def test_rows_past_the_sum_reach_nothing(path, tail):
    """Whatever values and scales stand there, and whatever sizes groups have."""
    x, w = operands(300, 256, 64, 3)
    sizes = [100, 0, 131]
    clean, values, scales = path(x, w, sizes), x.values.copy(), x.scales.copy()
    scales[231:] = tail
    assert_same_bytes(path(RowQuantized(values, scales), w, sizes), clean)


def test_a_nan_stays_in_its_row(path):
    """One among the values, and one among the scales."""
    x, w = operands(300, 256, 64, 3)
    sizes = [100, 0, 200]
    clean, values, scales = path(x, w, sizes), x.values.copy(), x.scales.copy()
    values[7, 30], scales[150, 1] = np.nan, np.nan
    result = path(RowQuantized(values, scales), w, sizes)
    assert np.isnan(result[[7, 150]].astype(np.float32)).all()
    assert_same_bytes(np.delete(result, [7, 150], 0), np.delete(clean, [7, 150], 0))


def test_power_of_two_scales(path):
    """With them dequantizing is exact: what is left is the rounding of the result."""
    check(path, SHAPES["any sizes"], False, pow_2_scales=True)


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-60, 2.0**100], ids=str)
def test_extreme_scales(path, scale):
    """Of some rows, with scales of w that keep the products within bfloat16."""
    x, w = operands(200, 256, 64, 2)
    x.scales[::3] = scale
    w.scales[:] *= np.float32(2.0**20 if scale < 1 else 2.0**-20)
    result, expected = path(x, w, [90, 110]), exact(x, w, [90, 110])
    rows = np.arange(200) % 3 == 0
    for part in (rows, ~rows):  # of different magnitudes
        assert relative(result[part], expected[part]) <= path.tolerance


@TRANSPOSE
def test_after_the_quantizers(device, transpose_w):
    """The way that a model calls it, against the bfloat16 product."""
    rng, sizes = np.random.default_rng(0), np.int32([100, 0, 130, 70])
    x = rng.standard_normal((320, 256)).astype(bfloat16)
    w = rng.standard_normal((4, 64, 256) if transpose_w else (4, 256, 64), np.float32)

    @jax.jit
    def run(x, w, sizes):
        rows = jax_tsq.quantize_rows(x, sizes)
        return ragged_matmul(rows, jax_tsq.quantize_blocks(w), sizes, transpose_w=transpose_w)

    matrices = w.astype(np.float64).swapaxes(1, 2) if transpose_w else w.astype(np.float64)
    parts = np.split(x.astype(np.float64), np.cumsum(sizes))
    expected = np.concatenate([*(a @ b for a, b in zip(parts[:-1], matrices, strict=True)), np.zeros((20, 64))])
    assert 0.03 < relative(run(*jax.device_put((x, w, sizes), device)), expected) < 0.04


def test_one_compilation_and_no_transfer(path):
    """20 routings are one compilation, and none copies anything to the host."""
    x, w = operands(400, 64, 72, 4)
    rng, traces = np.random.default_rng(0), []

    @jax.jit
    def run(x, w, sizes):
        traces.append(None)
        return ragged_matmul(x, w, sizes)

    for _ in range(20):
        sizes = np.int32(np.diff(np.sort(rng.integers(0, 400, 4)), prepend=0))
        arguments = jax.device_put((x, w, sizes), path.device)
        with jax.transfer_guard("disallow"):
            result = run(*arguments)
        assert relative(result, exact(x, w, sizes)) <= path.tolerance
    assert len(traces) == 1 and run._cache_size() == 1


X, W = operands(200, 64, 72, 2)
SIZES = np.int32([90, 100])
BAD = [
    ("x array", TypeError, dict(x=X.values), r"^x must be a RowQuantized.*quantize_rows"),
    ("w array", TypeError, dict(w=W.values), r"^w must be a BlockQuantized.*quantize_blocks"),
    ("x values", TypeError, dict(x=X._replace(values=X.values.view(np.uint8))), r"^x\.values must be float8_e4m3fn"),
    ("x scales", TypeError, dict(x=X._replace(scales=X.scales.astype(bfloat16))), r"^x\.scales must be float32"),
    ("w values", TypeError, dict(w=W._replace(values=W.values.astype(bfloat16))), r"^w\.values must be float8"),
    ("w transposed", TypeError, dict(w=W._replace(transposed=None)), r"^w\.transposed must be float8.*None"),
    ("w scales", TypeError, dict(w=W._replace(scales=W.scales.astype(np.float64))), r"^w\.scales must be float32"),
    ("batched x", ValueError, dict(x=X._replace(values=X.values[None])), r"^x\.values must be \[M, K\].*jax\.vmap"),
    ("batched w", ValueError, dict(w=W._replace(values=W.values[None])), r"^w\.values must be \[E, K, N\].*jax\.vmap"),
    ("scales of x", ValueError, dict(x=X._replace(scales=X.scales.T)), r"^x\.scales must be \[200, 1\].*\[1, 200\]"),
    ("scales of w", ValueError, dict(w=W._replace(scales=W.scales[:1])), r"^w\.scales must be \[2, 1, 1\]"),
    (
        "the same side twice",
        ValueError,
        dict(w=W._replace(transposed=W.values)),
        r"^w\.transposed must be \[2, 72, 64\]",
    ),
    (
        "too many tokens",
        ValueError,
        dict(x=X._replace(values=jax.ShapeDtypeStruct((2**31, 64), float8_e4m3fn))),
        r"^x\.values must have at most 2\*\*31 - 128 tokens",
    ),
    ("other features", ValueError, dict(transpose_w=True), r"^x\.values must be \[M, N\].*transpose_w=True"),
    ("other groups", ValueError, dict(group_sizes=np.int32([1, 2, 3])), r"group_sizes \[E\]; got .*\[3\]"),
    ("sizes of floats", TypeError, dict(group_sizes=SIZES.astype(np.float32)), r"^group_sizes must be an integer"),
    ("large sizes", ValueError, dict(group_sizes=np.int32([150, 100])), r"^group_sizes must sum to at most the 200"),
    ("no flag", TypeError, dict(transpose_w=1), r"^transpose_w must be True or False"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, arguments, message):
    """The argument, the rule, and what was got."""
    with pytest.raises(error, match=message):
        ragged_matmul(**{"x": X, "w": W, "group_sizes": SIZES, **arguments})


# --- Programs --------------------------------------------------------------------------------------------------------

CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in ("matmul", "rows", "dual")]


def test_path_that_is_taken(path):
    """A program holds the kernel exactly where the native path is asked for."""
    arguments = jax.device_put((X, W, SIZES), path.device)
    text = jax.jit(lambda *a: ragged_matmul(*a)).lower(*arguments).as_text()
    assert bool(re.search(CALLS, text)) == path.native


@pytest.mark.parametrize(
    ("features", "outputs", "groups", "reason"),
    [
        (64, 72, 2, None),
        (72, 64, 2, "K must be a multiple of 16 .*got 72"),
        (64, 68, 2, "N must be a multiple of 8 .*got 68"),
        (16, 8, 1025, "E must be at most 1024; got 1025"),
    ],
)
def test_rule_for_sizes(features, outputs, groups, reason):
    """What the kernel takes; with transpose_w K and N change places."""
    sizes = kernels.OPERATIONS["jax_tsq.matmul"].kernel.sizes
    shapes = [(200, features), (), (groups, outputs, features), (), (groups,)]
    for transpose_w in (False, True):
        found = sizes(*shapes, transpose_w=transpose_w)
        swapped = reason and (reason.translate(str.maketrans("KN", "NK")) if transpose_w else reason)
        assert (found is None) if swapped is None else re.match(swapped, found)


def exported(monkeypatch, function, *arguments):
    """The program for CUDA with all kernels in it."""
    monkeypatch.setenv(kernels.SETTING, "native")
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=CHECKS)(*arguments)


needs_cuda_build = pytest.mark.skipif(not ffi.HAS_CUDA, reason="built without CUDA")


@needs_cuda_build
@TRANSPOSE
def test_operands_of_the_kernel(monkeypatch, transpose_w):
    """The scales of x lie column-major, as the quantizer gives them, and nothing is moved before the call."""

    def run(x, w, sizes):
        return ragged_matmul(jax_tsq.quantize_rows(x), w, sizes, transpose_w=transpose_w)

    w = BlockQuantized(*spec.blocks(np.ones((2, 64, 80), bfloat16)))
    x = np.zeros((200, 80 if transpose_w else 64), bfloat16)
    module = exported(monkeypatch, run, x, w, SIZES).mlir_module()
    rows, matmul = (line for line in module.splitlines() if "@jax_tsq." in line)
    assert "stablehlo.transpose" not in module
    assert f"transpose_w = {str(transpose_w).lower()}" in matmul
    column_major, row_major = (f"dense<[{order}]> : tensor<2xindex>" for order in ("0, 1", "1, 0"))
    assert f"result_layouts = [{row_major}, {column_major}]" in rows
    assert f"operand_layouts = [{row_major}, {column_major}, " in matmul


@pytest.mark.skipif("native cuda" not in PATHS, reason="no GPU of compute capability 9.0")
@TRANSPOSE
def test_no_copies_on_a_gpu(transpose_w):
    """Between the quantizer and the product the compiled program moves nothing."""
    x, w = np.zeros((200, 80 if transpose_w else 64), bfloat16), spec.blocks(np.ones((2, 64, 80), bfloat16))

    def run(x, w, sizes):
        return ragged_matmul(jax_tsq.quantize_rows(x), w, sizes, transpose_w=transpose_w)

    compiled = jax.jit(run).lower(*jax.device_put((x, BlockQuantized(*w), SIZES), NATIVE["cuda"])).compile()
    assert layouts.calls(compiled) == ["matmul", "rows"]
    assert not {name for name, _ in layouts.instructions(compiled)} - layouts.FREE, compiled.as_text()


def test_export_round_trip(path):
    """Serialized, loaded and run."""
    platform = "cuda" if path.device.platform == "gpu" else path.device.platform
    with jax.default_device(path.device):
        function = jax.jit(lambda *a: ragged_matmul(*a))
        made = jax.export.export(function, platforms=[platform], disabled_checks=CHECKS)(X, W, SIZES)
        call = jax.export.deserialize(made.serialize()).call
        assert_same_bytes(call(*jax.device_put((X, W, SIZES), path.device)), path(X, W, SIZES))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX cannot export its ragged product of symbolic sizes")
@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
def test_export_of_symbolic_sizes():
    """A number of outputs may be symbolic; such programs take the portable path."""
    (n,) = jax.export.symbolic_shape("n")
    w = BlockQuantized(
        jax.ShapeDtypeStruct((2, 64, 128 * n), float8_e4m3fn),
        jax.ShapeDtypeStruct((2, 128 * n, 64), float8_e4m3fn),
        jax.ShapeDtypeStruct((2, 1, n), np.float32),
    )
    x, wide = operands(200, 64, 256, 2)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, SIZES))
    function = jax.jit(lambda *a: ragged_matmul(*a))
    made = jax.export.export(function, platforms=["cpu", "cuda"], disabled_checks=CHECKS)(shapes[0], w, shapes[1])
    assert not re.search(CALLS, made.mlir_module())
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert relative(made.call(*jax.device_put((x, wide, SIZES), cpu)), exact(x, wide, SIZES)) < 2e-3
