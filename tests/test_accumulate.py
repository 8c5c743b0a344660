"""Running sums of weight gradients through differentiation: their bytes, and nothing beside the call that adds."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq import _accumulate, _linear, _mlp
from jax_tsq._core import ffi, kernels
from tests import linear, mlp
from tests.cases import assert_same_bytes, bfloat16

# --- The two functions, with their accumulators as a tree of arrays --------------------------------------------------


def linear_loss(sums, x, w, sizes, dy, **options):
    y = jax_tsq.grouped_linear(x, w, sizes, accumulate=sums, **options)
    return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum()


def mlp_loss(sums, x, w, sizes, dy, **options):
    quantized = options.pop("quantized_w", None)
    y = jax_tsq.moe_mlp(x, *w, sizes, quantized_weights=quantized, accumulate=sums, **options)
    return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum()


def linear_operands(dtype=np.float32):
    x, w, sizes, dy = linear.operands(w_dtype=dtype)
    return x, w, sizes, dy


def mlp_operands(dtype=np.float32, pair=False):
    made = mlp.operands(dtype=dtype)
    if pair:
        made = mlp.pair(made)
    return made.x, (made.w_gate_up, made.w_down), made.sizes, made.dy


FUNCTIONS = {
    "linear": (linear_loss, linear_operands, {}),
    "linear pow2": (linear_loss, linear_operands, dict(pow_2_scales=True)),
    "linear bfloat16": (linear_loss, partial(linear_operands, bfloat16), {}),
    "function": (linear_loss, linear_operands, dict(ragged_dot=jax.lax.ragged_dot)),
    "function residuals": (linear_loss, linear_operands, linear.FUNCTION["function residuals pow2"]),
    "mlp": (mlp_loss, mlp_operands, {}),
    "mlp bfloat16": (mlp_loss, partial(mlp_operands, bfloat16), {}),
    "mlp pair": (mlp_loss, partial(mlp_operands, pair=True), dict(limit=0.75)),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
BOTH = pytest.mark.parametrize("name", ["linear", "mlp pair"])


def sums_for(w, seed=5):
    """Accumulators for these weights, with numbers that an addition of zero would change."""
    rng = np.random.default_rng(seed)

    def one(w):
        a = rng.standard_normal(w.shape).astype(np.float32)
        a[:, ::7] = -0.0
        return a

    return jax.tree.map(one, w)


def added(sums, dw, sizes):
    """One float32 addition for groups with tokens."""
    used = (np.asarray(sizes) > 0)[:, None, None]
    return jax.tree.map(lambda a, d: np.where(used, a + np.asarray(d, np.float32), a), sums, dw)


def plain(loss, x, w, sizes, dy, **options):
    """Loss, dx and float32 dw without accumulators; weights of bfloat16 are exact in float32."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float32), w)
    run = jax.jit(jax.value_and_grad(lambda x, w: loss(None, x, w, sizes, dy, **options), (0, 1)))
    value, (dx, dw) = run(x, w)
    return value, dx, dw


# --- Values ----------------------------------------------------------------------------------------------------------


@EVERY
def test_bytes(name):
    """accumulate + dW, to the byte; loss and dx as without; nothing of accumulators reaches the loss."""
    loss, make, options = FUNCTIONS[name]
    x, w, sizes, dy = make()
    value, dx, dw = plain(loss, x, w, sizes, dy, **options)
    sums = sums_for(w)
    run = jax.jit(jax.value_and_grad(partial(loss, **options), (0, 1)))
    got_value, (total, got_dx) = run(sums, x, w, sizes, dy)
    jax.tree.map(assert_same_bytes, (got_value, got_dx), (value, dx))
    jax.tree.map(assert_same_bytes, total, added(sums, dw, sizes))
    nan = jax.tree.map(lambda a: np.full_like(a, np.nan), sums)
    assert_same_bytes(jax.jit(partial(loss, **options))(nan, x, w, sizes, dy), value)


@BOTH
def test_quantized_weights(name):
    """Given, the values of w are not read; the sums are the same."""
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    quantized = jax.tree.map(jax_tsq.quantize_blocks, w) if name == "linear" else [*map(jax_tsq.quantize_blocks, w)]
    *_, dw = plain(loss, x, w, sizes, dy)
    sums, unread = sums_for(w), jax.tree.map(lambda a: np.full_like(a, np.nan), w)
    total = jax.jit(jax.grad(partial(loss, quantized_w=quantized)))(sums, x, unread, sizes, dy)
    jax.tree.map(assert_same_bytes, total, added(sums, dw, sizes))


@BOTH
def test_gradient_of_w(name):
    """Zeros where it is asked for: the sum has it."""
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    none = jax.jit(jax.grad(loss, 2))(sums_for(w), x, w, sizes, dy)
    assert jax.tree.structure(none) == jax.tree.structure(w)
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(none))


@BOTH
def test_checkpoint(name):
    """The same bytes where the forward pass is computed again."""
    loss, make, options = FUNCTIONS[name]
    x, w, sizes, dy = make()
    sums = sums_for(w)
    one, again = (
        jax.jit(jax.grad(f, (0, 1)))(sums, x, w, sizes, dy)
        for f in (partial(loss, **options), jax.checkpoint(partial(loss, **options)))
    )
    jax.tree.map(assert_same_bytes, again, one)


@BOTH
def test_vmap(name):
    """Every example has a sum of its own, whether jax.vmap or jax.grad comes first, and whatever else is mapped."""
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    xs, every = np.stack([x, x[::-1]]), np.stack([sizes, sizes[::-1]])
    sums = jax.tree.map(lambda a, b: np.stack([a, b]), sums_for(w), sums_for(w, 6))
    gradient = jax.jit(jax.vmap(jax.grad(loss), (0, 0, None, 0, None)))(sums, xs, w, every, dy)
    mapped = jax.vmap(loss, (0, 0, None, 0, None))
    of_vmap = jax.jit(jax.grad(lambda *a: mapped(*a).sum()))(sums, xs, w, every, dy)
    only_sums = jax.jit(jax.vmap(jax.grad(loss), (0, None, None, None, None)))(sums, x, w, sizes, dy)
    for i in range(2):
        *_, dw = plain(loss, xs[i], w, every[i], dy)
        expected = added(jax.tree.map(lambda a, i=i: a[i], sums), dw, every[i])
        for got in (gradient, of_vmap):
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), got, _nothing_but(got, i, expected))
        *_, dw = plain(loss, x, w, sizes, dy)
        expected = added(jax.tree.map(lambda a, i=i: a[i], sums), dw, sizes)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4), only_sums, _nothing_but(only_sums, i, expected)
        )


def _nothing_but(results, i, expected):
    """Results with one example's replaced by what is expected of it."""
    return jax.tree.map(lambda a, e: np.concatenate([a[:i], e[None], a[i + 1 :]]), results, expected)


@BOTH
def test_shared_by_examples(name):
    """Refused: JAX would add the accumulator once for each example."""
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    mapped = jax.vmap(loss, (None, 0, None, None, None))
    with pytest.raises(ValueError, match=r"accumulate must be mapped by jax\.vmap where .*(linear|moe_mlp) is.*Broadc"):
        jax.grad(lambda *a: mapped(*a).sum())(sums_for(w), x[None], w, sizes, dy)


@BOTH
def test_no_second_derivative(name):
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    with pytest.raises(NotImplementedError, match=r"jax_tsq\.(grouped_linear|moe_mlp) has no second derivative"):
        jax.grad(lambda sums: jax.tree.leaves(jax.grad(loss)(sums, x, w, sizes, dy))[0].sum())(sums_for(w))


# --- Programs --------------------------------------------------------------------------------------------------------

MICROBATCHES = 4


def step(loss, sums, xs, w, sizes, dy):
    """Microbatches that share weights which are quantized once; the sums are the carry."""
    is_array = isinstance(w, np.ndarray | jax.Array)
    quantized = jax_tsq.quantize_blocks(w) if is_array else tuple(map(jax_tsq.quantize_blocks, w))

    def microbatch(sums, x):
        gradient = jax.value_and_grad(loss, (0, 1))
        value, (sums, dx) = gradient(sums, x, w, sizes, dy, quantized_w=quantized)
        return sums, (value, dx)

    return jax.lax.scan(microbatch, sums, xs)


def arguments_of(name):
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    xs = np.stack([np.roll(x, i, 1) for i in range(MICROBATCHES)])
    return loss, (sums_for(w), xs, w, sizes, dy)


@BOTH
def test_microbatches(name):
    """Over a scan: the bytes of one addition after the other, in the memory that was donated."""
    loss, (sums, xs, w, sizes, dy) = arguments_of(name)
    expected = sums
    for x in xs:
        *_, dw = plain(loss, x, w, sizes, dy)
        expected = added(expected, dw, sizes)
    on_device = jax.tree.map(lambda a: jnp.negative(-a), sums)  # memory of JAX, not of numpy
    pointers = jax.tree.map(lambda a: a.unsafe_buffer_pointer(), on_device)
    total, (values, dx) = jax.jit(partial(step, loss), donate_argnums=0)(on_device, xs, w, sizes, dy)
    jax.tree.map(assert_same_bytes, total, expected)
    assert values.shape == (MICROBATCHES,) and dx.shape == xs.shape
    assert all(a.is_deleted() for a in jax.tree.leaves(on_device))
    assert jax.tree.map(lambda a: a.unsafe_buffer_pointer(), total) == pointers


def instructions(compiled, shapes):
    """What makes arrays of these shapes, fusions and all that is not in one."""
    found = Counter()
    for computation in re.split(r"\n\n", compiled.as_text()):
        if computation.lstrip().startswith(("%fused_computation", "%wrapped_")):
            continue
        for shape in shapes:
            dims = ",".join(map(str, shape))
            found.update(re.findall(rf"= f32\[{dims}\]\S* ([\w-]+)\(", computation))
    return found


@pytest.fixture
def stand_ins(monkeypatch):
    """Products that make no array of the size of weights: what is left of a program is what lies around them."""

    def product(x, w, group_sizes, *, transpose_w=False):
        x, w = jax.lax.optimization_barrier((x, w))
        columns = w.values.shape[1 if transpose_w else 2]
        return jnp.broadcast_to(x.scales[:, :1], (len(x.values), columns)).astype(jnp.bfloat16)

    def added(x, dy, *, accumulate):
        return accumulate.at[0, 0, 0].add(x.scales.sum() + dy.scales.sum())

    for module in (_linear, _mlp):
        monkeypatch.setattr(module, "ragged_matmul", product)
    monkeypatch.setattr(_accumulate, "ragged_weight_gradient", added)


@BOTH
def test_nothing_but_the_call(stand_ins, name):
    """No copy, addition or fill of dW's shape in the compiled program: each sum is passed through and added to."""
    loss, arguments = arguments_of(name)
    compiled = jax.jit(partial(step, loss), donate_argnums=0).lower(*arguments).compile()
    assert "while" in compiled.as_text()
    w = arguments[2]
    shapes = {a.shape for a in jax.tree.leaves(w)}
    found = instructions(compiled, shapes)
    assert found.pop("fusion", 0) + found.pop("dynamic-update-slice", 0) == len(jax.tree.leaves(w)), found
    assert set(found) <= {"parameter", "get-tuple-element"}, found
    kept = jax.jit(partial(step, loss)).lower(*arguments).compile()
    assert instructions(kept, shapes)["copy"] == len(jax.tree.leaves(w))


@BOTH
def test_program_for_cuda(monkeypatch, name):
    """Weights are quantized once, and nothing but the native call touches what has the size of weights."""
    monkeypatch.setenv(kernels.SETTING, "native")
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "check_driver", lambda: None)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in kernels.OPERATIONS]
    loss, arguments = arguments_of(name)
    with jax.default_device(jax.devices("cpu")[0]):
        exported = jax.export.export(jax.jit(partial(step, loss)), platforms=["cuda"], disabled_checks=checks)
        text = exported(*arguments).mlir_module()
    calls = Counter(re.findall(r"@jax_tsq\.(\w+)\(", text))
    weights = jax.tree.leaves(arguments[2])
    assert (calls["blocks"], calls["wgrad"]) == (1 if name == "linear" else 2, len(weights)), calls
    for shape in {a.shape for a in weights}:
        tensor = rf"tensor<{'x'.join(map(str, shape))}xf32>"
        touching = set(re.findall(rf"stablehlo\.(\w+).*{tensor}", text))
        assert touching <= {"custom_call", "while", "return"} | ({"concatenate"} if name != "linear" else set())


# --- A scan over layers ----------------------------------------------------------------------------------------------

LAYERS = 3


def test_layers():
    """The recipe of docs/accumulation.md: one array of all layers' sums, passed through the layers; dW as of a loop."""
    x, w, sizes, dy = stack()
    sums = sums_for(w)

    quantized = jax.jit(jax_tsq.quantize_blocks)(w)

    def unrolled(x, w):
        for i in range(LAYERS):
            x = block(x, None, i, sizes, w, quantized)
        return (x.astype(jnp.float32) * dy).sum()

    dx, dw = jax.jit(jax.grad(unrolled, (0, 1)))(x, w)
    total, got_dx = jax.jit(lambda *a: layers_step(*a))(sums, x, w, sizes, dy)
    assert_same_bytes(got_dx, dx)
    assert_same_bytes(total, added(sums, dw, np.tile(sizes, LAYERS)))
    assert_same_bytes(np.asarray(total)[1::EXPERTS], sums[1::EXPERTS])  # a group without tokens


EXPERTS = 3


def stack():
    """x, weights of all layers in one array, sizes and dy."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((200, 128)).astype(bfloat16) for _ in range(2))
    w = rng.standard_normal((LAYERS * EXPERTS, 128, 128)).astype(np.float32) / 12
    return x, w, np.int32([90, 0, 70]), dy.astype(np.float32)


def block(x, sums, i, sizes, w, quantized):
    """A layer of the stack: its sizes stand where its experts are."""
    every = jax.lax.dynamic_update_slice(jnp.zeros(len(w), jnp.int32), sizes, (i * EXPERTS,))
    return x + jax_tsq.grouped_linear(x, w, every, quantized_w=quantized, accumulate=sums)


@jax.custom_vjp
def layer(x, sums, *others):
    """Passes the sums through; on the way back the layer is computed again, and adds to them."""
    return block(x, None, *others), sums


def backward(kept, cotangents):
    x, *others = kept
    dy, sums = cotangents
    _, pullback = jax.vjp(lambda x, sums: block(x, sums, *others), x, sums)
    return *pullback(dy), *[None] * len(others)


layer.defvjp(lambda x, sums, *others: (layer(x, sums, *others), (x, *others)), backward)


def layers_step(sums, x, w, sizes, dy):
    """One forward and backward pass of a scan over layers; returns the sums and dx."""
    quantized = jax_tsq.quantize_blocks(w)

    def network(x, sums):
        def run(carry, i):
            return layer(*carry, i, sizes, w, quantized), None

        (y, sums), _ = jax.lax.scan(run, (x, sums), jnp.arange(LAYERS))
        return (y.astype(jnp.float32) * dy).sum(), sums

    _, pullback = jax.vjp(network, x, sums)
    dx, sums = pullback((jnp.float32(1), sums))
    return sums, dx


def test_layers_without_copies(stand_ins):
    """In the compiled program the sums of all layers are one array that each layer adds to in its place."""
    x, w, sizes, dy = stack()
    compiled = jax.jit(lambda *a: layers_step(*a), donate_argnums=0).lower(sums_for(w), x, w, sizes, dy).compile()
    found = instructions(compiled, [w.shape, (LAYERS, *w.shape), w[:EXPERTS].shape])
    assert found.pop("fusion", 0) + found.pop("dynamic-update-slice", 0) == 1, found
    assert set(found) <= {"parameter", "get-tuple-element"}, found


def test_layers_with_stacked_sums_copy(stand_ins):
    """What the recipe avoids: sums `[L, E, K, N]` that a scan takes apart are sliced out and written back."""
    x, w, sizes, dy = stack()

    def run(sums, x, w, sizes, dy):
        def network(x, sums):
            def block(x, operands):
                w, sums = operands
                return x + jax_tsq.grouped_linear(x, w, sizes, accumulate=sums), None

            y, _ = jax.lax.scan(block, x, (w, sums))
            return (y.astype(jnp.float32) * dy).sum()

        return jax.grad(network, (0, 1))(x, sums)

    w = w.reshape(LAYERS, EXPERTS, *w.shape[1:])
    compiled = jax.jit(run, donate_argnums=0).lower(sums_for(w), x, w, sizes, dy).compile()
    found = instructions(compiled, [w.shape, w[0].shape])
    assert found["copy"] + found["fusion"] > 1, found
