"""The operations under JAX's transformations: same bytes, one native call."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn
from tests.operations import EXAMPLES, Call, Shape

SHAPE = Shape((130, 0, 64), ((100, 0, 57), (0, 0, 0), (3, 150, 41), (128, 64, 2)), features=31, kinds=None)
BATCH = len(SHAPE.sizes)
EVERY = pytest.mark.parametrize("name", EXAMPLES)


def element(tree, *index):
    return jax.tree.map(lambda a: a[index], tree)


def results_of(call, elements):
    """What is right for the operands of each element, stacked."""
    parts = [call.expect(*arrays) for arrays in elements]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def check_one_call(call, function, arguments, expected):
    """The jitted function's bytes, one custom call in its compiled program, and no loop around it."""
    compiled = jax.jit(function).lower(*arguments).compile()
    assert jax_tsq.kernels_used(compiled) == ({call.row.function.__name__: 1} if call.native_calls() else {})
    assert " while(" not in compiled.as_text() or not call.native_calls()
    call.row.assert_same(compiled(*arguments), expected)


# Each example, and every choice of operands of it that are mapped.
MAPPED = [
    (name, mapped)
    for name in EXAMPLES
    for n in range(len(Call(name, SHAPE).operands))
    for mapped in itertools.combinations(Call(name, SHAPE).operands, n + 1)
]


@pytest.mark.parametrize(("name", "mapped"), MAPPED, ids=str)
def test_vmap(name, mapped):
    """Over any of the operands: one native call with a leading batch dimension."""
    call = Call(name, SHAPE, (BATCH,))
    axes = [0 if operand in mapped else None for operand in call.operands]
    arguments = [a if axis == 0 else element(a, 0) for a, axis in zip(call.arrays, axes, strict=True)]

    def of(i):
        return [element(a, i) if axis == 0 else a for a, axis in zip(arguments, axes, strict=True)]

    expected = results_of(call, map(of, range(BATCH)))
    check_one_call(call, jax.vmap(call.one, in_axes=axes), arguments, expected)


@EVERY
def test_nested_vmap(name):
    """Two levels of vmap are two leading batch dimensions of one call."""
    call = Call(name, SHAPE, (2, 3))
    check_one_call(call, call.function, call.arrays, call.expected)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if len(Call(name, SHAPE).operands) > 1])
def test_nested_vmap_over_different_operands(name):
    """The first operand over one axis, the others over another."""
    call = Call(name, SHAPE, (BATCH,))
    (first, *others), rest = call.arrays, [0] * (len(call.arrays) - 1)
    first = element(first, slice(2))
    expected = results_of(call, ([element(first, i), *element(others, j)] for i in range(2) for j in range(BATCH)))
    inner = jax.vmap(call.one, in_axes=(None, *rest))
    outer = jax.vmap(inner, in_axes=(0, *(None for _ in rest)))

    def flattened(*arguments):
        return jax.tree.map(lambda a: a.reshape(2 * BATCH, *a.shape[2:]), outer(*arguments))

    check_one_call(call, flattened, [first, *others], expected)


@EVERY
def test_vmap_over_other_axes(name):
    """Batch axes that do not lead, on the way in and out."""
    call = Call(name, SHAPE, (3,))

    def turned(tree, back=False):
        """Batch axes in second place and last, in turn; one at a time, since each array has its own."""
        leaves, structure = jax.tree.flatten(tree)
        axes = [1 if i % 2 else -1 for i in range(len(leaves))]
        moved = [
            np.moveaxis(a, axis, 0) if back else np.moveaxis(a, 0, axis) for a, axis in zip(leaves, axes, strict=True)
        ]
        return jax.tree.unflatten(structure, moved), jax.tree.unflatten(structure, axes)

    arguments, in_axes = turned(call.arrays)
    _, out_axes = turned(call.expected)
    result = jax.jit(jax.vmap(call.one, in_axes=in_axes, out_axes=out_axes))(*arguments)
    call.assert_right(turned(result, back=True)[0])


@EVERY
def test_jit(name):
    """jit gives the eager bytes; the text of one program holds one call."""
    call = Call(name, SHAPE)
    check_one_call(call, call.function, call.arrays, call.expected)
    call.assert_right(call.function(*call.arrays))


@EVERY
def test_control_flow(name):
    """Inside lax.scan, both branches of lax.cond, and lax.while_loop, with group sizes that change on the way."""
    call = Call(name, SHAPE, (BATCH,))
    arrays = jax.tree.map(jnp.asarray, call.arrays)
    last = BATCH - 1

    @jax.jit
    def programs(flag, arrays):
        _, scanned = jax.lax.scan(lambda carry, operands: (carry, call.one(*operands)), 0, arrays)
        chosen = jax.lax.cond(flag, call.one, lambda *_: call.one(*element(arrays, last)), *element(arrays, 0))

        def body(state):
            return state[0] + 1, call.one(*element(arrays, state[0]))

        return scanned, chosen, jax.lax.while_loop(lambda s: s[0] < BATCH, body, (0, call.one(*element(arrays, 0))))[1]

    for flag, index in [(True, 0), (False, last)]:
        scanned, chosen, looped = programs(flag, arrays)
        call.assert_right(scanned)
        call.row.assert_same(chosen, element(call.expected, index))
        call.row.assert_same(looped, element(call.expected, last))


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.everything_saveable], ids=["nothing", "everything"])
def test_remat(policy):
    """jax.checkpoint around a custom_vjp that quantizes in its backward pass, and one in its forward pass."""
    call = Call("split", SHAPE._replace(kinds=("normal",)))
    (x,) = call.arrays
    w = jnp.ones([SHAPE.features, 8], jnp.bfloat16)

    def quantized(x):
        return jnp.concatenate(jax_tsq.dequantize(call.function(x), dtype=jnp.bfloat16))

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
    exact = x.astype(np.float32).T @ np.ones([SHAPE.tokens, 8], np.float32)
    assert 0 < np.abs(weight_gradient - exact).max() < 0.1 * np.abs(exact).max()


def differentiable(call):
    """A function of one floating operand, the last, that returns everything; and that operand."""
    leaves, tree = jax.tree.flatten(call.arrays)
    at = max(i for i, leaf in enumerate(leaves) if leaf.dtype in (bfloat16, np.float32))

    def function(a):
        return call.function(*jax.tree.unflatten(tree, [*leaves[:at], a, *leaves[at + 1 :]]))

    return function, jnp.asarray(leaves[at])


def forward_mode(function):
    """Like `jax.jacfwd`, along one direction, since operands are large."""
    return lambda a: jax.vmap(lambda tangent: jax.jvp(function, (a,), (tangent,))[1])(a[None])


@EVERY
@pytest.mark.parametrize("transform", [jax.grad, forward_mode, jax.jit, jax.checkpoint], ids=lambda t: t.__name__)
def test_differentiation_raises(transform, name):
    """Differentiating says to use a custom_vjp, under other transformations too."""
    function, a = differentiable(Call(name, SHAPE))

    def loss(a):
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(function(a)))

    if transform in (jax.jit, jax.checkpoint):
        loss, transform = transform(loss), jax.grad
    message = rf"^jax_tsq\.{EXAMPLES[name].function.__name__} .*no derivative.*custom_vjp.*stop_gradient"
    with pytest.raises(NotImplementedError, match=message):
        transform(loss)(a)


@EVERY
def test_stop_gradient(name):
    """Inside stop_gradient the operation may stand in a differentiated function."""
    function, a = differentiable(Call(name, SHAPE._replace(kinds=("normal",))))

    def loss(a):
        largest = jax.tree.leaves(function(jax.lax.stop_gradient(a)))[0].astype(jnp.float32).max()
        return (a.ravel()[0] * largest).astype(jnp.float32)

    largest = jax.tree.leaves(function(a))[0].astype(jnp.float32).max().astype(a.dtype)
    assert jax.grad(loss)(a).ravel()[0] == largest != 0


@EVERY
def test_x64(name):
    """Under x64 too: same bytes, 32-bit results, int32 group sizes."""
    call = Call(name, SHAPE)
    with jax.enable_x64(True):
        call.assert_right(jax.jit(lambda *a: call.function(*a))(*call.arrays))
        if name == "ragged":
            assert jax_tsq.pad_group_sizes(jnp.asarray(SHAPE.group_sizes(0))).starts.dtype == jnp.int32
            assert jax_tsq.dequantize(call.expected).dtype == jnp.float32


@EVERY
def test_eval_shape(name):
    """Shapes and dtypes without running anything."""
    call = Call(name, SHAPE)
    result = jax.eval_shape(call.function, *call.arrays)
    described = lambda tree: jax.tree.map(lambda a: (a.shape, np.dtype(a.dtype)), tree)  # noqa: E731
    assert described(result) == described(call.expected)


@pytest.mark.parametrize("dtype", [bfloat16, float8_e4m3fn], ids=["bf16", "fp8"])
def test_eval_shape_of_large_arrays(dtype):
    """For sizes no memory holds, too."""
    tokens, features = 2**22, 2**15
    x = jax.ShapeDtypeStruct((tokens, features), dtype)
    input_scales = None if dtype == bfloat16 else jax.ShapeDtypeStruct((tokens, features // 128), jnp.float32)
    counts = [1, 0, tokens - 1]
    result = jax.eval_shape(lambda *a: jax_tsq.fused_transpose_split_quant(*a, counts), x, input_scales)
    assert [(o.shape, o.dtype) for o in result.outs] == [((features, n), float8_e4m3fn) for n in counts]
    assert [(s.shape, s.dtype) for s in result.scales] == [((n, features), np.float32) for n in [1, 0, 2**15]]
    sizes = jax.ShapeDtypeStruct((7,), jnp.int32)
    ragged = lambda x, s, i, **o: jax_tsq.ragged_transpose_quant(x, s, input_scales=i, **o)  # noqa: E731
    result = jax.eval_shape(ragged, x, sizes, input_scales)
    padded = spec.padded_tokens(tokens, 7)
    assert [(r.shape, r.dtype) for r in result] == [
        ((features, padded), float8_e4m3fn),
        ((padded // 128, features), np.float32),
        ((7,), np.int32),
    ]
    flat = jax.eval_shape(functools.partial(ragged, layout="flat"), x, sizes, input_scales)
    assert flat.values.shape == (features * padded,)


@EVERY
def test_ahead_of_time(name):
    """Lowered and compiled from shapes alone, then called with one routing after the other."""
    call = Call(name, SHAPE, (BATCH,))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), call.arrays)
    compiled = jax.jit(call.one).lower(*shapes).compile()
    for i in range(BATCH):
        call.row.assert_same(compiled(*element(call.arrays, i)), element(call.expected, i))


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
        x, dy = (jax_tsq.ragged_transpose_quant(a, group_sizes) for a in (x, dy))
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
