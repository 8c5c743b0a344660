"""ragged_weight_gradient: both paths against float64, what never reaches the result, and JAX's transformations."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq import RaggedQuantized, ragged_weight_gradient
from jax_tsq._core import ffi, kernels
from tests import mesh, spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn
from tests.conftest import DEVICES, NATIVE

CALLS = r"@jax_tsq\.wgrad"
PATHS = {f"portable {platform}": ("portable", device) for platform, device in DEVICES.items()}
if "cuda" in NATIVE and NATIVE["cuda"].compute_capability == "9.0":
    PATHS["native cuda"] = ("native", NATIVE["cuda"])


class Way:
    """One of the ways that a device computes the operation."""

    def __init__(self, name, monkeypatch):
        self.native, self.device = name.startswith("native"), PATHS[name][1]
        self.exact = self.native or self.device.platform == "cpu"  # elsewhere operands are rounded to bfloat16
        self.tolerance = 2e-4 if self.exact else 3e-3
        monkeypatch.setenv(kernels.SETTING, PATHS[name][0])

    def __call__(self, x, dy, dtype=np.float32, batch_dims=0):
        def run(x, dy):  # a new function, so that the setting is read again
            return ragged_weight_gradient(x, dy, dtype=dtype)

        for _ in range(batch_dims):
            run = jax.vmap(run)
        return np.asarray(jax.jit(run)(*jax.device_put((x, dy), self.device)))


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    return Way(request.param, monkeypatch)


def operand(features, tokens, sizes, seed=0, pow_2_scales=False):
    """What ragged_transpose_quant makes of normal data, all blocks of no group poisoned."""
    x = np.random.default_rng(seed).standard_normal((tokens, features)).astype(bfloat16)
    values, scales, _ = spec.ragged(x, [tokens], pow_2_scales=pow_2_scales, aligned=True)
    used = int(spec.taken_rows(sizes, tokens, True).sum())
    values[:, used:], scales[used // 128 :] = np.nan, np.nan
    return RaggedQuantized(values, scales, np.int32(sizes))


def pair(features, outputs, tokens, sizes, **options):
    return operand(features, tokens, sizes, 0, **options), operand(outputs, tokens, sizes, 1, **options)


def exact(x, dy, rounded=False):
    """The formula in float64; with `rounded`, of operands that were rounded to bfloat16."""
    tokens, results, start = x.values.shape[1], [], 0
    for rows in spec.taken_rows(x.padded_sizes, tokens, True):
        total = np.zeros((len(x.values), len(dy.values)))
        for token in range(start, start + rows, 128):
            a, b = (q.values[:, token : token + 128].astype(np.float64) for q in (x, dy))
            sa, sb = (q.scales[token // 128].astype(np.float64) for q in (x, dy))
            if rounded:
                a, b = ((v * s[:, None]).astype(bfloat16).astype(np.float64) for v, s in ((a, sa), (b, sb)))
                total += a @ b.T
            else:
                total += (a @ b.T) * np.outer(sa, sb)
        results.append(total)
        start += rows
    return np.stack(results) if results else np.zeros((0, len(x.values), len(dy.values)))


def relative(actual, expected):
    return np.linalg.norm(np.float64(actual) - expected) / max(np.linalg.norm(expected), 1e-300)


def assert_right(path, x, dy, dtype=np.float32):
    """As near to float64 as each path promises."""
    result = path(x, dy, dtype)
    assert result.dtype == dtype
    expected = exact(x, dy)
    assert result.shape == expected.shape
    rounding = 2e-3 if dtype == bfloat16 else 0
    assert relative(result, expected) < path.tolerance + rounding
    if not path.native:
        assert relative(result, exact(x, dy, rounded=not path.exact)) < max(rounding, 1e-5)
    empty = spec.taken_rows(x.padded_sizes, x.values.shape[1], True) == 0
    assert not result[empty].view(f"u{result.itemsize}").any()  # +0


SHAPES = {
    "one block": (64, 32, 128, [128]),
    "smallest": (4, 8, 128, [128]),
    "a tile": (192, 128, 512, [512]),
    "partial tiles": (196, 136, 1024, [384, 0, 512, 128]),
    "more outputs than features": (72, 520, 768, [128, 640]),
    "a tail": (388, 136, 1280, [256, 0, 384]),
    "empty groups only": (64, 64, 256, [0, 0, 0]),
    "many groups": (36, 40, 128 * 40, [128 * (i % 3 == 0) for i in range(100)]),
    "negative, broken and too large sizes": (64, 72, 1024, [-5, 200, -(2**31), 300, 127, 2**31 - 1, 2**31 - 1, 128]),
    "sizes that overflow": (64, 72, 512, [2**31 - 1] * 300),
}


@pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(path, shape, dtype):
    """Against float64 on the dequantized operands, with NaN in all blocks of no group."""
    assert_right(path, *pair(*shape), dtype)


@pytest.mark.parametrize("shape", [(0, 8, 128, [128]), (8, 0, 128, [128]), (8, 8, 0, [0, 5]), (8, 8, 128, [])], ids=str)
def test_empty_arrays(path, shape):
    """No features, tokens or groups: zeros, if anything."""
    result = path(*pair(*shape))
    assert result.shape == (len(shape[3]), shape[0], shape[1]) and not result.any()


@pytest.mark.parametrize("features", [5, 6, 7, 100])
@pytest.mark.parametrize("outputs", [3, 12, 33])
def test_sizes_that_the_kernel_does_not_take(monkeypatch, features, outputs):
    """They are computed all the same, by the portable path."""
    x, dy = pair(features, outputs, 256, [128, 128])
    for device in DEVICES.values():
        result = jax.jit(lambda x, dy: ragged_weight_gradient(x, dy, dtype=jnp.bfloat16))(
            *jax.device_put((x, dy), device)
        )
        assert relative(result, exact(x, dy)) < 5e-3


def test_bf16_is_rounded_float32(path):
    """One rounding, of the very sums that a float32 result holds; the same bytes from every program."""
    x, dy = pair(260, 136, 1024, [384, 128, 512])
    single, again, half = path(x, dy), path(x, dy), path(x, dy, bfloat16)
    if path.device.platform == "gpu" and not path.native:  # for every program XLA looks for the fastest product anew
        assert relative(again, single) < 1e-6
        np.testing.assert_allclose(half.astype(np.float32), single, rtol=2**-7, atol=1e-5)
    else:
        assert_same_bytes(again, single)
        assert_same_bytes(half, single.astype(bfloat16))


def test_power_of_two_scales(path):
    """With them dequantizing is exact: both paths give the same but for float32's rounding."""
    x, dy = pair(196, 136, 1024, [384, 0, 512], pow_2_scales=True)
    assert relative(path(x, dy), exact(x, dy)) < 2e-4


SCALES = {"zero": 0, "subnormal": 1e-40, "tiny": 2.0**-100, "huge": 2.0**100, "largest": 2.0**119}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_extreme_scales(path, scale):
    """In some rows of x, with scales of dy that keep their products within float32."""
    x, dy = pair(64, 72, 512, [384, 128])
    x.scales[:, ::3] = scale
    dy.scales[:] *= np.float32(2.0**20 if scale < 1 else 4 / scale)
    result, expected = path(x, dy), exact(x, dy)
    rows = np.arange(64) % 3 == 0
    for part in (rows, ~rows):  # of different magnitudes
        if scale == SCALES["subnormal"] and not path.native and part[0]:
            assert np.abs(result[:, part]).max() < 1e-25  # XLA may flush the dequantized operands
            continue
        assert relative(result[:, part], expected[:, part]) < path.tolerance


def test_scales_whose_operands_overflow(path):
    """2**127 times 448 is no float32, but times a small scale of dy it is: the kernel multiplies scales first."""
    x, dy = pair(64, 72, 512, [384, 128])
    x.scales[:, 0], dy.scales[:] = 2.0**127, 2.0**-110
    result, expected = path(x, dy), exact(x, dy)
    assert relative(result[:, 1:], expected[:, 1:]) < path.tolerance
    if path.native:
        assert relative(result[:, 0], expected[:, 0]) < 2e-4
    else:
        assert not np.isfinite(result[:, 0]).any()


@pytest.mark.parametrize("side", ["x", "dy"])
@pytest.mark.parametrize("scale", [np.inf, np.nan], ids=["inf", "NaN"])
def test_scales_that_are_not_finite(path, scale, side):
    """The row or column of the group is not finite, and nothing else."""
    x, dy = pair(64, 72, 512, [256, 0, 256])
    clean = path(x, dy)
    (x if side == "x" else dy).scales[1, 5] = scale  # in group 0
    result = path(x, dy)
    hit = np.zeros(result.shape, bool)
    hit[(0, 5) if side == "x" else (0, slice(None), 5)] = True
    assert not np.isfinite(result[hit]).any()
    if path.native or path.device.platform == "cpu":
        assert_same_bytes(result[~hit], clean[~hit])


def test_a_nan_value(path):
    """A NaN among the values of x makes its row of its group NaN."""
    x, dy = pair(64, 72, 512, [256, 256])
    x.values[7, 130] = np.nan
    result = path(x, dy)
    assert np.isnan(result[0, 7]).all() and np.isfinite(result[0, 8:]).all()


@pytest.mark.parametrize("batch_dims", [1, 2])
def test_vmap(path, batch_dims):
    """Batches, each with sizes of its own."""
    pairs = [pair(68, 72, 512, sizes) for sizes in ([128, 384], [512, 0], [0, 256])]
    x, dy = jax.tree.map(lambda *leaves: np.stack(leaves), *pairs)
    if batch_dims == 2:
        x, dy = jax.tree.map(lambda leaf: leaf[:, None], (x, dy))
    result = path(x, dy, batch_dims=batch_dims)
    for got, (a, b) in zip(result.reshape(3, 2, 68, 72), pairs, strict=True):
        assert relative(got, exact(a, b)) < path.tolerance


@pytest.mark.parametrize("axes", [(0, None), (None, 1), (1, 0), (-1, 1)], ids=str)
def test_vmap_over_any_axis(path, axes):
    """Operands mapped over other axes than the first, or one of them not at all; results batched where one asks."""
    pairs = [pair(64, 72, 256, sizes) for sizes in ([128, 128], [0, 256])]
    arguments, expected = [], []
    for side, axis in enumerate(axes):
        parts = [operands[side] for operands in pairs]
        arguments.append(parts[0] if axis is None else jax.tree.map(lambda *a, axis=axis: np.stack(a, axis), *parts))
    for x, dy in pairs:
        x, dy = (pairs[0][0] if axes[0] is None else x), (pairs[0][1] if axes[1] is None else dy)
        expected.append(exact(x, dy))
    run = jax.jit(jax.vmap(lambda x, dy: ragged_weight_gradient(x, dy), axes, out_axes=2))
    result = run(*jax.device_put(arguments, path.device))
    assert relative(result, np.stack(expected, 2)) < path.tolerance


def test_one_compilation_and_no_transfer(path):
    """20 routings are one compilation, and none copies anything to the host."""
    x, dy = pair(64, 72, 1024, [1024])
    rng, traces = np.random.default_rng(0), []

    @jax.jit
    def run(x, dy, sizes):
        traces.append(None)
        return ragged_weight_gradient(x._replace(padded_sizes=sizes), dy._replace(padded_sizes=sizes))

    for _ in range(20):
        sizes = np.int32(np.diff(np.sort(rng.integers(0, 9, 4)), prepend=0) * 128)
        arguments = jax.device_put((x, dy, sizes), path.device)
        with jax.transfer_guard("disallow"):
            result = run(*arguments)
        assert relative(result, exact(x._replace(padded_sizes=sizes), dy)) < path.tolerance
    assert len(traces) == 1 and run._cache_size() == 1


def test_after_the_quantizer(device):
    """The way that a model calls it: quantize both, multiply; groups of any sizes."""
    rng, sizes = np.random.default_rng(0), np.int32([100, 0, 130, 70])
    x, dy = (rng.standard_normal((320, features)).astype(bfloat16) for features in (256, 128))

    @jax.jit
    def run(x, dy, sizes):
        return ragged_weight_gradient(*(jax_tsq.ragged_transpose_quant(a, sizes) for a in (x, dy)))

    ends = np.cumsum(sizes)
    a, b = x.astype(np.float64), dy.astype(np.float64)
    expected = np.stack([a[e - n : e].T @ b[e - n : e] for e, n in zip(ends, sizes, strict=True)])
    assert relative(run(*jax.device_put((x, dy, sizes), device)), expected) < 0.04


def test_derivatives_are_refused():
    """Forwards and backwards, with what to do instead."""
    x, dy = jax.tree.map(jnp.asarray, pair(64, 72, 128, [128]))

    def run(scales):
        return ragged_weight_gradient(x._replace(scales=scales), dy).sum()

    with pytest.raises(NotImplementedError, match="custom_vjp"):
        jax.grad(run)(x.scales)
    with pytest.raises(NotImplementedError, match="custom_vjp"):
        jax.jvp(run, (x.scales,), (x.scales,))


X, DY = pair(64, 72, 256, [128, 128])
BAD = [
    ("x array", TypeError, dict(x=X.values), r"^x must be a RaggedQuantized.*ragged_transpose_quant"),
    ("dy tuple", TypeError, dict(dy=tuple(DY)), r"^dy must be a RaggedQuantized"),
    (
        "x values dtype",
        TypeError,
        dict(x=X._replace(values=X.values.view(np.uint8))),
        r"^x\.values must be float8_e4m3fn",
    ),
    ("dy scales dtype", TypeError, dict(dy=DY._replace(scales=DY.scales.astype(bfloat16))), r"^dy\.scales .*bfloat16"),
    (
        "sizes dtype",
        TypeError,
        dict(x=X._replace(padded_sizes=np.int64([128, 128]))),
        r"^x\.padded_sizes must be int32; got int64",
    ),
    ("batched sizes", ValueError, dict(x=X._replace(padded_sizes=np.int32([[256]]))), r"^x\.padded_sizes .*jax\.vmap"),
    ("flat", ValueError, dict(x=X._replace(values=X.values.ravel())), r'^x\.values .*layout="packed"'),
    ("batched", ValueError, dict(dy=DY._replace(values=DY.values[None])), r"^dy\.values .*jax\.vmap"),
    ("partial block", ValueError, dict(x=X._replace(values=X.values[:, :200])), r"^x\.values .*multiple of 128"),
    (
        "too many tokens",
        ValueError,
        dict(x=X._replace(values=jax.ShapeDtypeStruct((64, 2**31), float8_e4m3fn))),
        r"^x\.values must have at most 2\*\*31 - 128 tokens.*2147483648",
    ),
    ("scales shape", ValueError, dict(x=X._replace(scales=X.scales.T)), r"^x\.scales must be \[2, 64\].*\[64, 2\]"),
    ("other P", ValueError, dict(dy=operand(72, 384, [128, 128])), r"same P.*\[64, 256\] and \[72, 384\]"),
    ("other E", ValueError, dict(dy=DY._replace(padded_sizes=np.int32([256]))), r"same P and E"),
    ("float16", TypeError, dict(dtype=np.float16), r"^dtype must be float32 or bfloat16.*float16"),
    ("no dtype", TypeError, dict(dtype="fp32"), r"^dtype must be float32 or bfloat16.*fp32"),
]


@pytest.mark.parametrize(("error", "arguments", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(error, arguments, message):
    """The argument, the rule, and what was got."""
    with pytest.raises(error, match=message):
        ragged_weight_gradient(**{"x": X, "dy": DY, **arguments})


# --- Which path ------------------------------------------------------------------------------------------------------


def test_path_that_is_taken(path):
    """A program holds the kernel exactly where the native path is asked for."""
    arguments = jax.device_put((X, DY), path.device)
    text = jax.jit(lambda x, dy: ragged_weight_gradient(x, dy)).lower(*arguments).as_text()
    assert bool(re.search(CALLS, text)) == path.native


@pytest.mark.skipif("native cuda" not in PATHS, reason="no GPU of compute capability 9.0")
def test_default_path_on_hopper(monkeypatch):
    """Without the setting the kernel is taken."""
    monkeypatch.delenv(kernels.SETTING, raising=False)
    arguments = jax.device_put((X, DY), NATIVE["cuda"])
    assert re.search(CALLS, jax.jit(lambda x, dy: ragged_weight_gradient(x, dy)).lower(*arguments).as_text())


CHECKS = [jax.export.DisabledSafetyCheck.custom_call("jax_tsq.wgrad")]


@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
def test_export_for_cuda(monkeypatch):
    """From a machine without a suitable GPU: portable, unless the kernel is asked for."""
    with jax.default_device(jax.devices("cpu")[0]):
        for setting in ("auto", "native"):
            monkeypatch.setenv(kernels.SETTING, setting)
            function = jax.jit(lambda x, dy: ragged_weight_gradient(x, dy))
            if setting == "native" and not ffi.HAS_CUDA:
                with pytest.raises(ValueError, match="no CUDA kernels"):
                    jax.export.export(function, platforms=["cuda"], disabled_checks=CHECKS)(X, DY)
                continue
            module = jax.export.export(function, platforms=["cuda"], disabled_checks=CHECKS)(X, DY).mlir_module()
            assert bool(re.search(CALLS, module)) == (setting == "native")


def test_export_round_trip(path):
    """Serialized, loaded and run."""
    platform = "cuda" if path.device.platform == "gpu" else path.device.platform
    with jax.default_device(path.device):
        function = jax.jit(lambda x, dy: ragged_weight_gradient(x, dy))
        exported = jax.export.export(function, platforms=[platform], disabled_checks=CHECKS)(X, DY)
        call = jax.export.deserialize(exported.serialize()).call
        assert_same_bytes(call(*jax.device_put((X, DY), path.device)), path(X, DY))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX cannot export its ragged product of symbolic sizes")
@pytest.mark.filterwarnings("ignore:jax_tsq was built without CUDA")
def test_export_of_symbolic_sizes():
    """Features may be symbolic; such programs take the portable path."""
    k, n = jax.export.symbolic_shape("k, n")
    shapes = [
        RaggedQuantized(
            jax.ShapeDtypeStruct((features, 256), float8_e4m3fn),
            jax.ShapeDtypeStruct((2, features), np.float32),
            jax.ShapeDtypeStruct((2,), np.int32),
        )
        for features in (k, n)
    ]
    function = jax.jit(lambda x, dy: ragged_weight_gradient(x, dy))
    exported = jax.export.export(function, platforms=["cpu", "cuda"], disabled_checks=CHECKS)(*shapes)
    assert not re.search(CALLS, exported.mlir_module())
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert relative(exported.call(*jax.device_put((X, DY), cpu)), exact(X, DY)) < 2e-4


# --- Meshes ----------------------------------------------------------------------------------------------------------


@mesh.parametrize("weight_gradient")
def test_mesh(tmp_path_factory, platform, program, case):
    """8 host devices, and all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)
