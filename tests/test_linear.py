"""grouped_linear: values and gradients against float64, what never reaches them, and JAX's transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import mesh, spec
from tests.cases import assert_same_bytes, bfloat16
from tests.linear import (
    EVERY,
    FEATURES,
    OUTPUTS,
    SIZES,
    TOKENS,
    USED,
    jitted,
    operands,
    value_and_gradients,
)

TAILS = {"zero": 0, "NaN": np.nan, "inf": -np.inf, "largest": 3e38}
EVERY_OPTION = pytest.mark.parametrize("options", EVERY.values(), ids=EVERY)
EITHER = pytest.mark.parametrize("options", [EVERY["fp8"], EVERY["function"]], ids=["fp8", "function"])


def groups(x, sizes=SIZES):
    """The rows of each group, in float64."""
    return [part.astype(np.float64) for part in np.split(x[: sum(sizes)], np.cumsum(sizes)[:-1])]


def columns(x, input_scales, pow_2_scales, dtype=bfloat16):
    """What the quantized operand of each group stands for, by the specification, rounded to a dtype."""
    outs, scales = spec.split(x, input_scales, SIZES, pow_2_scales)
    return [
        (out.T.astype(np.float32) * np.repeat(scale, 128, axis=0)[: out.shape[1]]).astype(dtype).astype(np.float64)
        for out, scale in zip(outs, scales, strict=True)
    ]


def assert_rounded(actual, exact, bits=8):
    """Equal to exact values but for rounding to that many bits, and for float32 accumulation."""
    exact = np.asarray(exact)
    assert actual.shape == exact.shape
    error = np.abs(actual.astype(np.float64) - exact)
    assert (error <= 2.0**-bits * np.abs(exact) + 1e-5 * np.abs(exact).max()).all(), error.max()


def relative(actual, exact):
    return np.linalg.norm(actual.astype(np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
@EVERY_OPTION
def test_values_and_gradients(ffi_device, options, tail):
    """Each is the product of the quantized operands, which the numpy specification gives; a function takes bfloat16."""
    x, w, sizes, dy = operands(tail=tail)
    y, dx, dw = value_and_gradients(x, w, sizes, dy, device=ffi_device, **options)
    assert (y.dtype, dx.dtype, dw.dtype) == (bfloat16, bfloat16, np.float32)
    rounded = w.astype(bfloat16).astype(np.float64)
    exact_y = np.concatenate([a @ b for a, b in zip(groups(x), rounded, strict=True)])
    exact_dx = np.concatenate([a @ b.T for a, b in zip(groups(dy), rounded, strict=True)])
    assert (y[USED:] == 0).all() and (dx[USED:] == 0).all()
    pow_2_scales, fp8_residuals = (options.get(name, False) for name in ("pow_2_scales", "fp8_residuals"))
    if "ragged_dot" in options:
        assert_rounded(y[:USED], exact_y)
        assert_rounded(dx[:USED], exact_dx)
    else:
        weights = jax_tsq.BlockQuantized(*spec.blocks(w, pow_2_scales))
        for actual, a, transpose_w, exact in ((y, x, False, exact_y), (dx, dy, True, exact_dx)):
            rows = jax_tsq.RowQuantized(*spec.rows(a, sizes, pow_2_scales))
            assert relative(actual, spec.matmul(rows, weights, sizes, transpose_w).astype(np.float64)) < 4e-3
            assert 0.034 < relative(actual[:USED], exact) < 0.04

    stored = spec.rows(x[:USED], None, pow_2_scales) if fp8_residuals else (x[:USED], None)
    # The kernel and the portable path of a CPU take operands as they are; that of a GPU rounds them.
    as_they_are = ffi_device.platform == "cpu" or ffi_device.compute_capability == "9.0"
    dtype = np.float32 if as_they_are else bfloat16
    left, right = columns(*stored, pow_2_scales, dtype), columns(dy[:USED], None, pow_2_scales, dtype)
    products = np.stack([a.T @ b for a, b in zip(left, right, strict=True)])
    if as_they_are:
        assert np.linalg.norm(dw - products) < 2e-4 * np.linalg.norm(products)
    else:
        assert_rounded(dw, products, bits=16)
    assert (dw[1] == 0).all()
    exact = np.stack([a.T @ b for a, b in zip(groups(x), groups(dy), strict=True)])
    error = relative(dw, exact)
    # One rounding to e4m3 is 0.026; two are 0.037. Quantizing x twice adds one, unless the scales are powers of two.
    assert (0.04 < error < 0.05) if fp8_residuals and not pow_2_scales else (0.034 < error < 0.04), error


@EVERY_OPTION
def test_rows_past_the_sum_reach_nothing(options):
    """Not a bit of y, dx or dw depends on what they hold."""
    expected = value_and_gradients(*operands(), **options)
    for tail in TAILS.values():
        assert_same_bytes(value_and_gradients(*operands(tail=tail), **options), expected)
    x, w, sizes, dy = operands(tail=np.nan)
    dy[USED:] = 1  # only x is bad
    assert_same_bytes(value_and_gradients(x, w, sizes, dy, **options), expected)


@EITHER
def test_a_nan_stays_in_its_group(options):
    """A NaN inside a group reaches its own row of y and its own group's dw."""
    x, w, sizes, dy = operands()
    clean = value_and_gradients(x, w, sizes, dy, **options)
    x[350, 3] = np.nan  # in group 2
    y, dx, dw = value_and_gradients(x, w, sizes, dy, **options)
    assert np.isnan(y[350].astype(np.float32)).all()
    assert_same_bytes(np.delete(y, 350, 0), np.delete(clean[0], 350, 0))
    assert_same_bytes(dx, clean[1])
    assert np.isnan(dw[2][3]).all() and not np.isnan(np.delete(dw[2], 3, 0)).any()
    assert_same_bytes(np.delete(dw, 2, 0), np.delete(clean[2], 2, 0))


@pytest.mark.parametrize(
    ("tokens", "sizes"),
    [(200, (0, 0, 0)), (0, (0, 0)), (130, (130,)), (1, (0, 1))],
    ids=["no tokens", "M=0", "E=1", "M=1"],
)
@EVERY_OPTION
def test_shapes(tokens, sizes, options):
    """Edge cases of sizes; groups without tokens have gradients of exactly 0."""
    x, w, _, dy = operands(tokens=tokens, sizes=sizes, tail=np.nan)
    y, dx, dw = value_and_gradients(x, w, np.array(sizes, np.int32), dy, **options)
    used = sum(sizes)
    assert (y.shape, dx.shape, dw.shape) == ((tokens, OUTPUTS), x.shape, w.shape)
    assert (y[used:] == 0).all() and (dx[used:] == 0).all()
    for gradient, size in zip(dw, sizes, strict=True):
        assert gradient.any() == (size > 0) and np.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16], ids=lambda dtype: np.dtype(dtype).name)
def test_weight_dtypes(dtype):
    """dw has w's dtype, and is summed in float32 before it is rounded to that."""
    x, w, sizes, dy = operands(w_dtype=dtype)
    wide = w.astype(bfloat16).astype(np.float32)
    y, dx, dw = value_and_gradients(x, w, sizes, dy)
    expected = value_and_gradients(x, wide, sizes, dy)
    assert_same_bytes([y, dx, dw], [*expected[:2], expected[2].astype(dtype)])


def test_master_weights():
    """Master weights get the float32 gradient of bfloat16 weights, which get none; their values do not matter."""
    x, w, sizes, dy = operands(w_dtype=bfloat16)

    @jax.jit
    def gradients(w, master_w):
        y, pullback = jax.vjp(lambda w, m: jax_tsq.grouped_linear(x, w, sizes, master_w=m), w, master_w)
        return y, *pullback(dy)

    expected = value_and_gradients(x, w.astype(np.float32), sizes, dy)
    for master_w in (np.zeros(w.shape, np.float32), np.full(w.shape, np.nan, np.float32)):
        y, none, dw = map(np.asarray, gradients(w, master_w))
        assert_same_bytes([y, dw], [expected[0], expected[2]])
        assert none.dtype == bfloat16 and not none.any()


def test_microbatches():
    """Sums over microbatches are those of float32 gradients, which bfloat16 ones miss by their rounding."""
    x, w, sizes, _ = operands(w_dtype=bfloat16)
    scales = np.float32([1, 1e-3, 1e-3, 1e-3, 1e-3])

    def loss(master_w, w, scale):
        return scale * jax_tsq.grouped_linear(x, w, sizes, master_w=master_w).astype(jnp.float32).sum()

    def total(master_w, w):
        return jax.lax.scan(lambda sum_, scale: (sum_ + jax.grad(loss)(master_w, w, scale), None), master_w, scales)[0]

    zeros = np.zeros(w.shape, np.float32)
    parts = np.stack([jax.jit(jax.grad(loss))(zeros, w, scale) for scale in scales])
    np.testing.assert_allclose(jax.jit(total)(zeros, w), parts.sum(axis=0), rtol=1e-5, atol=1e-5 * np.abs(parts).max())
    assert np.abs(parts.astype(bfloat16).sum(axis=0).astype(np.float64) - parts.sum(axis=0)).max() > 1e-3


_CALLS = []


def _nan_tail(lhs, rhs, group_sizes):
    """A ragged_dot that leaves NaN past the sum of the sizes, and in float32."""
    _CALLS.append((lhs.shape, rhs.shape, rhs.dtype))
    y = jax.lax.ragged_dot(lhs, rhs, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where((jnp.arange(len(y)) < jnp.sum(group_sizes))[:, None], y, jnp.nan)


def test_custom_ragged_dot():
    """Computes y and dx, each once, from bf16 operands; what it returns past the sum of the sizes does not matter."""
    _CALLS.clear()
    arrays = operands(tail=np.nan)
    results = value_and_gradients(*arrays, ragged_dot=_nan_tail)
    assert [
        ((TOKENS, FEATURES), (len(SIZES), FEATURES, OUTPUTS), jnp.bfloat16),
        ((TOKENS, OUTPUTS), (len(SIZES), OUTPUTS, FEATURES), jnp.bfloat16),
    ] == _CALLS
    for actual, expected in zip(results, value_and_gradients(*arrays, ragged_dot=jax.lax.ragged_dot), strict=True):
        assert actual.dtype == expected.dtype
        assert_rounded(actual, expected.astype(np.float64), bits=7)


def test_traced_sizes_compile_once():
    """A new routing is not a new compilation."""
    x, w, _, dy = operands()
    run = jax.jit(lambda sizes: jitted(x, w, sizes, dy))
    for seed in range(4):
        sizes = np.random.default_rng(seed).multinomial(TOKENS - 20 * seed, [0.2] * 5).astype(np.int32)
        assert_same_bytes(list(map(np.asarray, run(sizes))), value_and_gradients(x, w, sizes, dy))
    assert run._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("options", [EVERY[name] for name in ("fp8 pow2", "function residuals pow2")])
def test_remat_and_scan(options):
    """A checkpointed layer in a scan gives the gradients of a plain loop."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 128)).astype(bfloat16)
    w = (rng.standard_normal((3, 4, 128, 128)) / 11).astype(np.float32)
    sizes = np.array([[100, 0, 28, 100], [256, 0, 0, 0], [1, 2, 3, 4]], np.int32)

    def layer(x, w, sizes):
        return jax.nn.silu(jax_tsq.grouped_linear(x, w, sizes, **options))

    def scanned(x, w):
        step = jax.checkpoint(lambda x, parts: (layer(x, *parts), None))
        return jax.lax.scan(step, x, (w, sizes))[0].astype(jnp.float32).sum()

    def looped(x, w):
        for i in range(3):
            x = layer(x, w[i], sizes[i])
        return x.astype(jnp.float32).sum()

    results, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, w) for f in (scanned, looped))
    for actual, wanted in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert_rounded(np.asarray(actual), np.asarray(wanted, np.float64), bits=7)
    assert (np.asarray(results[1][1])[1, 1:] == 0).all()


def test_x64():
    """With 64-bit types enabled the same bytes; float64 weights get a float64 gradient."""
    arrays = operands(tail=np.nan)
    expected = value_and_gradients(*arrays)
    with jax.enable_x64(True):
        assert_same_bytes(value_and_gradients(*arrays), expected)
        x, w, sizes, dy = arrays
        y, dx, dw = value_and_gradients(x, w.astype(np.float64), sizes, dy)
    assert_same_bytes([y, dx], expected[:2])
    assert dw.dtype == np.float64
    assert_same_bytes(dw, expected[2].astype(np.float64))


X, W, GROUP_SIZES = (
    jnp.zeros((8, 4), jnp.bfloat16),
    jnp.zeros((2, 4, 3), jnp.float32),
    jnp.zeros(2, jnp.int32),
)
BAD_INPUT = {
    "x is float32": (TypeError, "x must have dtype bfloat16; got float32", (X.astype(jnp.float32), W, GROUP_SIZES)),
    "x is fp8": (TypeError, "x must have dtype bfloat16; got float8", (X.astype(jnp.float8_e4m3fn), W, GROUP_SIZES)),
    "x is a list": (TypeError, "x must be an array of dtype bfloat16", ([1.0], W, GROUP_SIZES)),
    "x has 3 dimensions": (ValueError, "x must be two-dimensional", (X[None], W, GROUP_SIZES)),
    "w is int32": (
        TypeError,
        "w must be an array of a floating dtype; got int32",
        (X, W.astype(jnp.int32), GROUP_SIZES),
    ),
    "w is float8_e4m3fn": (
        TypeError,
        r"w must have a dtype of 16 bits or more.*got float8_e4m3fn.*w.astype\(jnp.bfloat16\)",
        (X, W.astype(jnp.float8_e4m3fn), GROUP_SIZES),
    ),
    "w is float8_e5m2": (TypeError, "got float8_e5m2", (X, W.astype(jnp.float8_e5m2), GROUP_SIZES)),
    "w is a list": (TypeError, "w must be an array of a floating dtype; got list", (X, [1.0], GROUP_SIZES)),
    "w has 2 dimensions": (ValueError, r"w must be \[E, K, N\]", (X, W[0], GROUP_SIZES)),
    "w has other groups": (ValueError, "E = 3 groups", (X, W, jnp.zeros(3, jnp.int32))),
    "w is transposed": (ValueError, r"If K comes last, pass jnp.swapaxes\(w, 1, 2\)", (X, W[:, :3], GROUP_SIZES)),
    "w has other features": (ValueError, "K = 4 features", (X, W[:, :2], GROUP_SIZES)),
    "sizes are floats": (TypeError, "group_sizes must be an integer array", (X, W, jnp.zeros(2))),
    "sizes are a tuple": (TypeError, "group_sizes must be an integer array", (X, W, (4, 4))),
    "sizes have 2 dimensions": (ValueError, "one-dimensional", (X, W, GROUP_SIZES[None])),
}


@pytest.mark.parametrize(("error", "message", "arguments"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(error, message, arguments):
    """Each error names the argument and the rule."""
    with pytest.raises(error, match=message):
        jax_tsq.grouped_linear(*arguments)


@pytest.mark.parametrize(("master_w", "error"), [(W.astype(jnp.bfloat16), TypeError), (W[:1], ValueError)])
def test_bad_master_weights(master_w, error):
    with pytest.raises(error, match=r"master_w must be float32\[2, 4, 3\].*got "):
        jax_tsq.grouped_linear(X, W, GROUP_SIZES, master_w=master_w)


@pytest.mark.parametrize("flag", ["pow_2_scales", "fp8_residuals"])
def test_flags_are_bools(flag):
    with pytest.raises(TypeError, match=f"{flag} must be True or False"):
        jax_tsq.grouped_linear(X, W, GROUP_SIZES, **{flag: 1})  # pyright: ignore[reportArgumentType]


@mesh.parametrize("linear")
def test_mesh(tmp_path_factory, platform, program, case):
    """8 host devices, and all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)
