"""The operations under JAX's transformations: same bytes, one native call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn, matrix, normal

DTYPES = pytest.mark.parametrize("dtype", [bfloat16, float8_e4m3fn], ids=["bf16", "fp8"])
COUNTS = [130, 0, 64]
TOKENS, FEATURES = sum(COUNTS), 31
SIZES = np.int32([[100, 0, 57], [0, 0, 0], [3, 150, 41], [128, 64, 2]])


def split(x, input_scales=None):
    return jax_tsq.fused_transpose_split_quant(x, input_scales, COUNTS)


def ragged(x, group_sizes, input_scales=None):
    return jax_tsq.ragged_transpose_quant(x, group_sizes, input_scales=input_scales)


def batch(dtype, *shape):
    """x [*shape, M, K] and input_scales, or None."""
    parts = [matrix(seed, dtype, COUNTS, FEATURES) for seed in range(int(np.prod(shape)))]
    x, input_scales = zip(*parts, strict=True)
    x = np.stack(x).reshape(*shape, TOKENS, FEATURES)
    return x, None if input_scales[0] is None else np.stack(input_scales).reshape(*shape, TOKENS, -1)


def check_one_call(function, arguments, expected, name):
    """The jitted function's bytes, one custom call in its compiled program, and no loop."""
    compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    assert text.count(f'custom_call_target="jax_tsq.{name}"') == 1
    assert " while(" not in text
    result = compiled(*arguments)
    for i, one in enumerate(expected):
        assert_same_bytes(jax.tree.map(lambda a, i=i: a[i], result), one)
    return result


@DTYPES
def test_vmap_split(dtype):
    """Over x and input_scales together: one native call with a leading batch dimension."""
    x, input_scales = batch(dtype, 4)
    arguments = (x,) if input_scales is None else (x, input_scales)
    expected = [spec.split(x[i], None if input_scales is None else input_scales[i], COUNTS) for i in range(4)]
    result = check_one_call(jax.vmap(split), arguments, expected, "split")
    assert type(result) is jax_tsq.SplitQuantized


@pytest.mark.parametrize("axes", [(0, None), (None, 0)], ids=["x only", "input_scales only"])
def test_vmap_split_one_operand(axes):
    """Over only one of x and input_scales."""
    x, input_scales = batch(float8_e4m3fn, 3)
    arguments = [a if axis == 0 else a[0] for a, axis in zip((x, input_scales), axes, strict=True)]
    expected = [
        spec.split(*(a[i] if axis == 0 else a[0] for a, axis in zip((x, input_scales), axes, strict=True)), COUNTS)
        for i in range(3)
    ]
    check_one_call(jax.vmap(split, in_axes=axes), arguments, expected, "split")


@DTYPES
def test_nested_vmap_split(dtype):
    """Two levels of vmap are two leading batch dimensions of one call."""
    x, input_scales = batch(dtype, 2, 3)
    arguments = (x,) if input_scales is None else (x, input_scales)

    def flattened(*arguments):
        result = jax.vmap(jax.vmap(split))(*arguments)
        return jax.tree.map(lambda a: a.reshape(6, *a.shape[2:]), result)

    flat = [None if a is None else a.reshape(6, TOKENS, -1) for a in (x, input_scales)]
    expected = [spec.split(flat[0][i], None if flat[1] is None else flat[1][i], COUNTS) for i in range(6)]
    check_one_call(flattened, arguments, expected, "split")


def test_vmap_split_other_axes():
    """Batch axes that do not lead, on the way in and out."""
    x, input_scales = batch(float8_e4m3fn, 3)
    mapped = jax.jit(jax.vmap(split, in_axes=(2, 1), out_axes=jax_tsq.SplitQuantized(1, -1)))
    result = mapped(np.moveaxis(x, 0, 2), np.moveaxis(input_scales, 0, 1))
    for i in range(3):
        outs, scales = spec.split(x[i], input_scales[i], COUNTS)
        assert_same_bytes([out[:, i] for out in result.outs], outs)
        assert_same_bytes([scale[..., i] for scale in result.scales], scales)


# Axes of (x, group_sizes, input_scales).
RAGGED_AXES = [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0), (None, 0, 0), (0, 0, None)]


@pytest.mark.parametrize("axes", RAGGED_AXES, ids=str)
def test_vmap_ragged(axes):
    """Over any of x, group_sizes and input_scales: one native call."""
    x, input_scales = batch(float8_e4m3fn, 4)
    operands = (x, SIZES, input_scales)
    arguments = [a if axis == 0 else a[0] for a, axis in zip(operands, axes, strict=True)]
    expected = [
        spec.ragged(*(a[i] if axis == 0 else a[0] for a, axis in zip(operands, axes, strict=True))) for i in range(4)
    ]
    result = check_one_call(jax.vmap(ragged, in_axes=axes), arguments, expected, "ragged")
    assert type(result) is jax_tsq.RaggedQuantized


@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_nested_vmap_ragged(layout):
    """x over one axis, group_sizes over another; batch axes that do not lead; both layouts."""
    x, _ = batch(bfloat16, 2)

    def flattened(x, sizes):
        def one(x, sizes):
            return jax_tsq.ragged_transpose_quant(x, sizes, layout=layout)

        over_sizes = jax.vmap(one, in_axes=(None, 1))
        result = jax.vmap(over_sizes, in_axes=(1, None))(x, sizes)
        return jax.tree.map(lambda a: a.reshape(8, *a.shape[2:]), result)

    expected = [spec.ragged(x[i], SIZES[j], layout=layout) for i in range(2) for j in range(4)]
    check_one_call(flattened, (np.moveaxis(x, 0, 1), SIZES.T), expected, "ragged")


def test_jit():
    """jit gives the eager bytes; the text of one program holds one call."""
    x, _ = batch(bfloat16, 1)
    check_one_call(
        lambda x: jax.tree.map(lambda a: a[None], split(x[0])), (x,), [spec.split(x[0], None, COUNTS)], "split"
    )
    assert_same_bytes(split(x[0]), spec.split(x[0], None, COUNTS))


def test_scan():
    """Inside lax.scan, over x and over routings."""
    x, _ = batch(bfloat16, 4)
    _, (outs, scales) = jax.lax.scan(lambda carry, x: (carry, split(x)), 0, x)
    for i in range(4):
        assert_same_bytes(([a[i] for a in outs], [a[i] for a in scales]), spec.split(x[i], None, COUNTS))
    _, results = jax.lax.scan(lambda carry, step: (carry, ragged(*step)), 0, (x, SIZES))
    for i in range(4):
        assert_same_bytes([a[i] for a in results], spec.ragged(x[i], SIZES[i]))


def test_cond():
    """Inside both branches of lax.cond."""
    x, _ = batch(bfloat16, 1)
    function = jax.jit(lambda flag, x: jax.lax.cond(flag, split, lambda x: split(-x), x))
    assert_same_bytes(function(True, x[0]), spec.split(x[0], None, COUNTS))
    assert_same_bytes(function(False, x[0]), spec.split(-x[0], None, COUNTS))


def test_while():
    """In the body of lax.while_loop with traced group sizes that change on the way."""
    x, _ = batch(bfloat16, 1)

    def body(state):
        step, sizes, _ = state
        return step + 1, sizes + 1, ragged(x[0], sizes)

    first = ragged(x[0], SIZES[0])
    _, _, last = jax.jit(lambda: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, jnp.asarray(SIZES[0]), first)))()
    assert_same_bytes(last, spec.ragged(x[0], SIZES[0] + 2))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["nothing", "everything"])
def test_remat(policy):
    """jax.checkpoint around a custom_vjp that quantizes in its backward pass, and one in its forward pass."""
    x, _ = normal([TOKENS, FEATURES])
    w = jnp.ones([FEATURES, 8], jnp.bfloat16)

    def quantized(x):
        return jnp.concatenate(jax_tsq.dequantize(split(x), dtype=jnp.bfloat16))

    @jax.custom_vjp
    def linear(x, w):
        return x @ w

    linear.defvjp(
        lambda x, w: (x @ w, (quantized(x), w)),
        lambda saved, dy: (dy @ saved[1].T, saved[0].T @ quantized(dy)),
    )

    def loss(function):
        return jax.jit(jax.grad(lambda x, w: function(x, w).astype(jnp.float32).sum(), argnums=(0, 1)))(x, w)

    assert_same_bytes(loss(jax.checkpoint(linear, policy=policy)), loss(linear))
    weight_gradient = loss(linear)[1].astype(np.float32)
    exact = x.astype(np.float32).T @ np.ones([TOKENS, 8], np.float32)
    assert 0 < np.abs(weight_gradient - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("function", [split, lambda x: ragged(x, jnp.int32([5]))], ids=["split", "ragged"])
@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, jax.jit, jax.checkpoint], ids=lambda t: t.__name__)
def test_differentiation_raises(transform, function):
    """Differentiating says to use a custom_vjp, under other transformations too."""
    x = jnp.ones([TOKENS, FEATURES], jnp.bfloat16)

    def loss(x):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(x)))

    if transform in (jax.jit, jax.checkpoint):
        loss, transform = transform(loss), jax.grad
    with pytest.raises(NotImplementedError, match="custom_vjp"):
        transform(loss)(x)


def test_stop_gradient():
    """Inside stop_gradient the operation may stand in a differentiated function."""
    x = jnp.ones([TOKENS, FEATURES], jnp.float32)

    def loss(x):
        outs, _ = split(jax.lax.stop_gradient(x).astype(jnp.bfloat16))
        return (x[0, 0] * outs[0][0, 0].astype(jnp.float32)).sum()

    assert jax.grad(loss)(x)[0, 0] == 448


@pytest.mark.parametrize("enable", [False, True])
def test_x64(enable):
    """Under x64 too: same bytes, 32-bit results, int32 group sizes."""
    x, input_scales = batch(float8_e4m3fn, 1)
    with jax.enable_x64(enable):
        assert_same_bytes(jax.jit(split)(x[0], input_scales[0]), spec.split(x[0], input_scales[0], COUNTS))
        result = jax.jit(ragged)(x[0], SIZES[0], input_scales[0])
        assert_same_bytes(result, spec.ragged(x[0], SIZES[0], input_scales[0]))
        assert_same_bytes(
            list(jax_tsq.quantize_rows(jnp.ones([3, 5], jnp.bfloat16))), spec.rows(np.ones([3, 5], bfloat16))
        )
        assert jax_tsq.pad_group_sizes(jnp.asarray(SIZES[0])).starts.dtype == jnp.int32
        assert jax_tsq.dequantize(result).dtype == jnp.float32


@DTYPES
def test_eval_shape(dtype):
    """Shapes and dtypes without running anything, for sizes no memory holds."""
    tokens, features = 2**22, 2**15
    x = jax.ShapeDtypeStruct((tokens, features), dtype)
    input_scales = None if dtype == bfloat16 else jax.ShapeDtypeStruct((tokens, features // 128), jnp.float32)
    counts = [1, 0, tokens - 1]
    result = jax.eval_shape(lambda *a: jax_tsq.fused_transpose_split_quant(*a, counts), x, input_scales)
    assert [(o.shape, o.dtype) for o in result.outs] == [((features, n), float8_e4m3fn) for n in counts]
    assert [(s.shape, s.dtype) for s in result.scales] == [((n, features), np.float32) for n in [1, 0, 2**15]]
    sizes = jax.ShapeDtypeStruct((7,), jnp.int32)
    result = jax.eval_shape(ragged, x, sizes, input_scales)
    padded = spec.padded_tokens(tokens, 7)
    assert [(r.shape, r.dtype) for r in result] == [
        ((features, padded), float8_e4m3fn),
        ((padded // 128, features), np.float32),
        ((7,), np.int32),
    ]
    flat = jax.eval_shape(
        lambda x, s, i: jax_tsq.ragged_transpose_quant(x, s, input_scales=i, layout="flat"), x, sizes, input_scales
    )
    assert flat.values.shape == (features * padded,)


def test_ahead_of_time():
    """Lowered and compiled from shapes alone, then called."""
    x, _ = batch(bfloat16, 1)
    sizes = jax.ShapeDtypeStruct(SIZES[0].shape, jnp.int32)
    compiled = jax.jit(ragged).lower(jax.ShapeDtypeStruct(x[0].shape, x.dtype), sizes).compile()
    for group_sizes in SIZES:
        assert_same_bytes(compiled(x[0], group_sizes), spec.ragged(x[0], group_sizes))


def test_no_host_transfer():
    """A jitted call moves nothing between host and device."""
    x, group_sizes = jax.device_put((batch(bfloat16, 1)[0][0], SIZES[0]))
    function = jax.jit(ragged)
    static = jax.jit(split)
    with jax.transfer_guard("disallow"):
        result, lists = function(x, group_sizes), static(x)
        jax.block_until_ready((result, lists))
    assert_same_bytes(result, spec.ragged(np.asarray(x), SIZES[0]))


def test_no_recompilation():
    """Equal counts of any type are one program; other values of pow_2_scales and of counts are others."""
    x = jnp.ones([6, 3], jnp.bfloat16)
    traces = []

    @jax.jit
    def function(x):
        traces.append(1)
        return jax_tsq.fused_transpose_split_quant(x, None, np.int64([2, 4]), np.True_)

    for _ in range(3):
        function(x)
    assert len(traces) == 1


def test_weight_gradient():
    """dW = X_e^T dY_e by ragged_dot_general on the quantized operands agrees with float32 to FP8 accuracy.

    The scales are applied to the operands' blocks. The routing is what a top-2 router over 8 skewed experts gives.
    """
    rng = np.random.default_rng(0)
    tokens, experts, features, outputs = 1024, 8, 48, 40
    scores = rng.standard_normal([tokens // 2, experts]) + np.linspace(-2, 1, experts)
    chosen = np.sort(np.argsort(-scores)[:, :2].ravel())
    group_sizes = np.bincount(chosen, minlength=experts).astype(np.int32)
    assert len(set(group_sizes.tolist())) > 4 and (group_sizes % 128).any()
    buffer = tokens + 300  # rows past the sum are uninitialised in real models
    x, dy = (rng.standard_normal([buffer, n]).astype(bfloat16) for n in (features, outputs))
    x[tokens:], dy[tokens:] = np.nan, np.inf

    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )

    @jax.jit
    def weight_gradient(x, dy, group_sizes):
        x, dy = ragged(x, group_sizes), ragged(dy, group_sizes)
        return jax.lax.ragged_dot_general(
            jax_tsq.dequantize(x), jax_tsq.dequantize(dy), x.padded_sizes, dimensions, precision="highest"
        )

    actual = np.asarray(weight_gradient(x, dy, group_sizes))
    ends = np.cumsum(group_sizes)
    exact = np.stack(
        [
            x[end - n : end].astype(np.float32).T @ dy[end - n : end].astype(np.float32)
            for end, n in zip(ends, group_sizes, strict=True)
        ]
    )
    assert actual.shape == (experts, features, outputs)
    error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
    assert 0.01 < error < 0.05  # two roundings to 3 mantissa bits, 0.026 each, are 0.037 together
