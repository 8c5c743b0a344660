"""moe_mlp: values, gradients, what is kept and computed, transformations, meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import layouts, mesh
from tests.cases import assert_same_bytes, bfloat16
from tests.mlp import (
    FEATURES,
    OPTIONS,
    SIZES,
    TOKENS,
    WIDTH,
    composed,
    errors,
    expected,
    jitted,
    operands,
    pair,
    value_and_gradients,
)
from tests.test_bad_input import rejects

USED = sum(SIZES)
# Where tensor cores sum with fewer bits than float32 has, more elements are rounded to a neighbour, and where that is a
# block's maximum, its scale changes and all of the block is rounded anew.
NEIGHBOURS, SUM = (2e-2, 2e-3) if jax.default_backend() == "gpu" else (4e-3, 1e-4)


def exact(x, w_gate_up, w_down, weights, sizes, limit=None):
    """The layer in float32."""
    gate, up = jnp.split(jax.lax.ragged_dot(x.astype(jnp.float32), w_gate_up, sizes), 2, axis=1)
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    h = jax.nn.silu(gate) * up * weights[:, None]
    return jax.lax.ragged_dot(h, w_down, sizes)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_specification(options, dtype):
    """What the specified dataflow gives, but for elements that rounding of sums brings to a neighbour."""
    arrays = operands(dtype=dtype)
    actual = jitted(arrays, **OPTIONS[options])
    assert max(errors(actual, expected(*arrays, **OPTIONS[options]))) < NEIGHBOURS
    assert [a.dtype for a in actual] == [bfloat16, bfloat16, dtype, dtype, np.float32]


@pytest.mark.parametrize(("options", "features"), [("limit", FEATURES), ("", 100)])
def test_equals_its_parts(options, features):
    """The bytes of the public functions, one after the other."""
    arrays = operands(features=features)
    assert_same_bytes(list(jitted(arrays, **OPTIONS[options])), list(composed(arrays, **OPTIONS[options])))


def test_other_sizes():
    """Sizes that no kernel takes."""
    arrays = operands(features=100)
    assert max(errors(jitted(arrays), expected(*arrays))) < NEIGHBOURS


def test_against_float32():
    """The exact layer and its gradients: the error of FP8 and no more, with and without routing weights."""
    x, w_gate_up, w_down, weights, sizes, dy = arrays = operands()
    y, pullback = jax.vjp(partial(exact, sizes=sizes), jnp.asarray(x, jnp.float32), w_gate_up, w_down, weights)
    wanted = y, *pullback(dy.astype(np.float32))
    actual = jitted(arrays)
    assert max(errors([a.astype(np.float32) for a in actual], wanted)) < 0.075
    plain = jitted(arrays._replace(weights=None))
    assert plain[-1] is None
    ones = jitted(arrays._replace(weights=np.ones_like(weights)))
    assert_same_bytes(plain[:-1], ones[:-1])


def test_gradient_of_routing_weights():
    """Near the sum of the quantized dataflow; and near the exact layer's where that is no sum of noise.

    dy like y is what a loss that pulls at y gives. A sum of terms of both signs keeps the error of its terms.
    """
    x, w_gate_up, w_down, weights, sizes, _ = arrays = operands()
    y, pullback = jax.vjp(lambda weights: exact(x, w_gate_up, w_down, weights, sizes), weights)
    arrays = arrays._replace(dy=np.asarray(y.astype(bfloat16)))
    actual = jitted(arrays)[-1]
    assert errors([actual], [expected(*arrays)[-1]])[0] < SUM
    assert errors([actual], pullback(y))[0] < 0.02


@pytest.mark.parametrize("soil", [np.nan, np.inf], ids=str)
def test_rows_past_the_sum(soil):
    """What lies there, in x, dy and routing weights, reaches nothing, and their gradients are 0."""
    clean, soiled = (list(map(np.asarray, jitted(operands(tail=tail)))) for tail in (0.0, soil))
    assert_same_bytes(soiled, clean)
    for i in (0, 1, 4):
        assert not soiled[i][USED:].any()
    assert not soiled[2][1].any() and not soiled[3][1].any()  # the group without tokens


def test_pair_of_weights():
    """Gates and ups apart: the same bytes, and a gradient of the same structure."""
    whole, apart = jitted(operands()), jitted(pair(operands()))
    joined = jnp.concatenate(apart[2], axis=2)
    assert_same_bytes([*apart[:2], joined, *apart[3:]], list(whole))


def test_quantized_weights():
    """Made before: the same bytes. The weights' values are not read, and get the gradients."""
    arrays = operands()

    @jax.jit
    def run(arrays, w_gate_up, w_down):
        quantized = jax_tsq.quantize_blocks(w_gate_up), jax_tsq.quantize_blocks(w_down)
        return value_and_gradients(*arrays, quantized_weights=quantized)

    empty = arrays._replace(w_gate_up=arrays.w_gate_up * np.nan, w_down=arrays.w_down * np.nan)
    assert_same_bytes(list(run(empty, arrays.w_gate_up, arrays.w_down)), list(jitted(arrays)))

    def loss(scales, stop=lambda a: a):
        quantized = list(map(jax_tsq.quantize_blocks, (arrays.w_gate_up, arrays.w_down)))
        quantized[0] = quantized[0]._replace(scales=stop(scales))
        y = jax_tsq.moe_mlp(*arrays[:3], arrays.sizes, quantized_weights=tuple(quantized))
        return y.astype(jnp.float32).sum()

    scales = jax_tsq.quantize_blocks(arrays.w_gate_up).scales
    with pytest.raises(NotImplementedError, match="moe_mlp gives no gradient of quantized_weights"):
        jax.grad(loss)(scales)
    assert not jax.grad(partial(loss, stop=jax.lax.stop_gradient))(scales).any()


def test_small_gradients_survive():
    """Of 2^-40, which float8 does not hold."""
    arrays, factor = operands(), np.float32(2.0**-40)
    usual = jitted(arrays)
    small = jitted(arrays._replace(dy=(arrays.dy.astype(np.float32) * factor).astype(bfloat16)))
    for actual, wanted in zip(small[1:], usual[1:], strict=True):
        assert_same_bytes(actual, (wanted.astype(np.float32) * factor).astype(wanted.dtype))


# --- What is computed and kept ---------------------------------------------------------------------------------------


def loss_of(arrays, **options):
    def loss(x, w_gate_up, w_down, weights):
        y = jax_tsq.moe_mlp(x, w_gate_up, w_down, arrays.sizes, weights, **options)
        return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return loss


def quantizations(function, *arguments):
    """How often each operation stands in a traced program."""
    text = str(jax.make_jaxpr(function)(*arguments))
    names = ("rows", "ragged", "dual", "blocks", "swiglu", "dswiglu", "matmul", "wgrad")
    return {name: n for name in names if (n := len(re.findall(rf"\bjax_tsq_{name}\[", text)))}


BACKWARD = {"dswiglu": 1, "wgrad": 2}
SAVED = jax.checkpoint_policies.save_only_these_names("moe_mlp_x", "moe_mlp_gate_up")
COMPUTED = {
    "no gradient": (lambda f: f, {"rows": 1, "swiglu": 1, "blocks": 2, "matmul": 2}),
    "gradient": (lambda f: jax.grad(f, (0, 1, 2, 3)), {"dual": 2, "swiglu": 1, "blocks": 4, "matmul": 4} | BACKWARD),
    "checkpoint": (
        lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2, 3)),
        {"rows": 1, "dual": 2, "swiglu": 2, "blocks": 6, "matmul": 6} | BACKWARD,
    ),
    "policy": (
        lambda f: jax.grad(jax.checkpoint(f, policy=SAVED), (0, 1, 2, 3)),
        {"dual": 2, "swiglu": 2, "blocks": 5, "matmul": 5} | BACKWARD,
    ),
}


@pytest.mark.parametrize("how", COMPUTED)
def test_what_is_computed(how):
    """Forwards rows alone; with a gradient each array is read once; a policy saves the first product."""
    transform, wanted = COMPUTED[how]
    arrays = operands()
    program = jax.jit(transform(loss_of(arrays)), inline=True)
    assert quantizations(program, *arrays[:4]) == wanted


def test_rows_of_no_group_are_not_read():
    """Without a gradient as with one, what quantizes the rows of x takes the sizes, in the layer as in the block."""
    arrays = operands()
    layer = jax.make_jaxpr(jax_tsq.grouped_linear)(arrays.x, arrays.w_gate_up, arrays.sizes)
    for program in (layer, jax.make_jaxpr(loss_of(arrays))(*arrays[:4])):
        (taken,) = re.findall(r"jax_tsq_rows\[[^\]]*\] (.*)", str(program))
        assert len(taken.split()) == 2, taken


def test_calls_of_a_compiled_program():
    """Under jax.checkpoint, where y is not needed: rows of x once, its columns once."""
    arrays = operands()

    def loss(*a):
        return jnp.sum(jax.checkpoint(lambda *a: jax_tsq.moe_mlp(*a[:3], arrays.sizes, a[3]))(*a).astype(jnp.float32))

    calls = layouts.calls(jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays[:4]).compile())
    small = [call for call in calls if call not in ("matmul", "wgrad")]
    assert small in ([], ["blocks"] * 2 + ["dswiglu", "dual", "dual"]), calls


@pytest.mark.parametrize("is_quantized", [False, True])
def test_what_is_kept(is_quantized):
    """Columns of x, gates and ups, sizes, routing weights and the expert weights: no x, no h, no y."""
    arrays = operands()

    def layer(x, w_gate_up, w_down, weights):
        quantized = tuple(jax_tsq.quantize_blocks(jax.lax.stop_gradient(w)) for w in (w_gate_up, w_down))
        options = dict(quantized_weights=quantized) if is_quantized else {}
        return jax_tsq.moe_mlp(x, w_gate_up, w_down, arrays.sizes, weights, **options)

    _, pullback = jax.vjp(jax.jit(layer), *arrays[:4])
    kept = {(str(a.dtype), a.shape) for a in jax.tree.leaves(pullback)}
    width, features = WIDTH, arrays.w_down.shape[1]
    padded = jax_tsq.padded_tokens(TOKENS, len(SIZES))
    of_tokens = {
        ("float8_e4m3fn", (width, padded)),
        ("float32", (padded // 128, width)),
        ("bfloat16", (TOKENS, 2 * features)),
        ("float32", (TOKENS,)),
        ("int32", (len(SIZES),)),
    }
    assert of_tokens <= kept
    of_weights = kept - of_tokens
    dtypes = {dtype for dtype, shape in of_weights if shape[1:] == (width, 2 * features)}
    assert dtypes == ({"float8_e4m3fn"} if is_quantized else {"float32"})
    assert all(shape[0] == len(SIZES) for _, shape in of_weights), of_weights


# --- Transformations -------------------------------------------------------------------------------------------------


def test_vmap():
    """Over everything, and over x and routing weights alone."""
    arrays = [operands(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *arrays)
    results = jax.jit(jax.vmap(value_and_gradients))(*stacked)
    for i, one in enumerate(arrays):
        assert max(errors([a[i] for a in results], jitted(one))) < 4e-3
    shared = stacked._replace(w_gate_up=arrays[0].w_gate_up, w_down=arrays[0].w_down, sizes=arrays[0].sizes)
    axes = (0, None, None, 0, None, 0)
    results = jax.jit(jax.vmap(value_and_gradients, axes))(*shared)
    wanted = jitted(arrays[1]._replace(w_gate_up=arrays[0].w_gate_up, w_down=arrays[0].w_down))
    assert max(errors([a[1] for a in results], wanted)) < 4e-3


def test_scan_over_layers():
    """Gradients through a scan, with and without rematerialization, are those of a loop."""
    layers = [operands(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *[(a.w_gate_up, a.w_down) for a in layers])

    def block(x, w):
        return x + jax_tsq.moe_mlp(x, *w, layers[0].sizes, layers[0].weights), None

    def scanned(wrap, w):
        return jnp.sum(jax.lax.scan(wrap(block), jnp.asarray(layers[0].x), w)[0].astype(jnp.float32))

    def looped(w):
        x = jnp.asarray(layers[0].x)
        for i in range(2):
            x, _ = block(x, jax.tree.map(lambda a, i=i: a[i], w))
        return jnp.sum(x.astype(jnp.float32))

    wanted = jax.jit(jax.grad(looped))(stacked)
    for wrap in (lambda f: f, jax.checkpoint, partial(jax.checkpoint, policy=SAVED)):
        actual = jax.jit(jax.grad(partial(scanned, wrap)))(stacked)
        assert max(errors(jax.tree.leaves(actual), jax.tree.leaves(wanted))) < 4e-3


def test_no_second_derivative():
    """Refused by name."""
    arrays = operands()
    gradient = jax.grad(lambda x: loss_of(arrays)(x, *arrays[1:4]))
    x = jnp.asarray(arrays.x)
    for differentiate in (lambda: jax.jvp(gradient, (x,), (x,)), lambda: jax.grad(lambda x: gradient(x).sum())(x)):
        with pytest.raises(NotImplementedError, match="moe_mlp has no second derivative"):
            differentiate()


def test_no_forward_mode():
    """As of every custom_vjp."""
    x = jnp.asarray(operands().x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: jax_tsq.moe_mlp(x, *operands()[1:3], operands().sizes), (x,), (x,))


@mesh.parametrize("mlp")
def test_mesh(tmp_path_factory, platform, program, case):
    """On one device and on 8 host devices, or all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


# --- Bad input -------------------------------------------------------------------------------------------------------


def call(**changes):
    arrays = operands()
    names = dict(x=arrays.x, w_gate_up=arrays.w_gate_up, w_down=arrays.w_down, group_sizes=arrays.sizes)
    return jax_tsq.moe_mlp(**names | changes)


W1, W2 = operands().w_gate_up, operands().w_down
Q1, Q2 = jax_tsq.quantize_blocks(W1), jax_tsq.quantize_blocks(W2)
BAD = [
    (TypeError, dict(x=operands().x.astype(np.float32)), "^x must have dtype bfloat16"),
    (TypeError, dict(w_gate_up=1.0), "^w_gate_up must be an array of a floating dtype", "float 1.0"),
    (TypeError, dict(w_gate_up=W1.astype(np.int32)), "^w_gate_up must be an array of a floating dtype", "int32"),
    (TypeError, dict(w_down=jnp.asarray(W2, jnp.float8_e4m3fn)), "^w_down must be .* 16 bits", "float8", "bfloat16"),
    (ValueError, dict(w_gate_up=[W1]), r"^w_gate_up must be an array or the pair \(w_gate, w_up\)", "list"),
    (ValueError, dict(w_gate_up=(W1[:, :, :256], W1[:, :, :128])), r"^w_gate_up must be \[E, H, 2 \* F\], or a pair"),
    (ValueError, dict(w_gate_up=(W1[..., :256], W1[..., :256].astype(bfloat16))), "of one dtype", "bfloat16"),
    (ValueError, dict(w_gate_up=W1[:, :, 1:]), r"^w_gate_up must be \[E, H, 2 \* F\]", r"\[5, 192, 511\]"),
    (ValueError, dict(w_gate_up=W1[1:]), r"^w_gate_up must be .* E = 5 groups", r"\[4, 192, 512\]"),
    (ValueError, dict(w_gate_up=W1.swapaxes(1, 2)), "If H comes last, pass .*swapaxes"),
    (ValueError, dict(w_down=W2.swapaxes(1, 2)), r"^w_down must .*If F comes last, pass jnp.swapaxes\(w_down, 1, 2\)"),
    (ValueError, dict(w_gate_up=W1[0]), "^w_gate_up must be three-dimensional", "vmap"),
    (ValueError, dict(w_down=W2[:, 1:]), r"^w_down must be \[E, F, H\], here \[5, 256, 192\]", r"\[5, 255, 192\]"),
    (TypeError, dict(weights=np.ones(TOKENS)), r"^weights must be float32\[500\]", "float64"),
    (TypeError, dict(pow_2_scales=1), "^pow_2_scales must be True or False"),
    (ValueError, dict(limit=0), "^limit must be None or a finite number above 0"),
    (TypeError, dict(quantized_weights=Q1), "^quantized_weights must be the pair"),
    (ValueError, dict(quantized_weights=(Q1,)), "^quantized_weights must be the pair", "got 1"),
    (
        TypeError,
        dict(quantized_weights=(W1, W2)),
        r"^quantized_weights\[0\] must be a BlockQuantized",
        "quantize_blocks",
    ),
    (
        ValueError,
        dict(quantized_weights=(Q2, Q1)),
        "^quantized_weights must be the pair",
        r"\[5, 256, 192\] for .*\[0\]",
    ),
]


@pytest.mark.parametrize(("error", "changes", "words"), [(error, changes, words) for error, changes, *words in BAD])
def test_bad_input(error, changes, words):
    """Each error names the argument, the rule, what was got and the fix."""
    rejects(error, lambda: call(**changes), *words)


def test_traced_limit():
    """A limit is part of the program."""
    rejects(TypeError, lambda: jax.jit(lambda limit: call(limit=limit))(7.0), "^limit must be .* known when tracing")
