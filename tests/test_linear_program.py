"""grouped_linear as a program: what it computes, keeps and takes, and weights that were quantized before."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq._core import ffi, kernels
from tests import layouts
from tests.cases import assert_same_bytes, bfloat16
from tests.conftest import NATIVE
from tests.linear import EVERY, FEATURES, SIZES, TOKENS, operands, value_and_gradients

HOPPER = [device for device in NATIVE.values() if getattr(device, "compute_capability", None) == "9.0"]


def test_quantized_weights():
    """Those of w give the bytes of w itself; w's values are not read, and the gradient goes to w."""
    x, w, sizes, dy = operands(tail=np.nan)
    expected = value_and_gradients(x, w, sizes, dy)

    @jax.jit
    def run(w, values_of_w):
        quantized = jax_tsq.quantize_blocks(values_of_w)
        y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized), x, w)
        return y, *pullback(dy)

    assert_same_bytes(list(map(np.asarray, run(np.full_like(w, np.nan), w))), expected)


def test_quantized_weights_inside_a_loss():
    """Made of w where w is differentiated, with the gradient stopped; and with master weights beside."""
    x, w, sizes, _ = operands(w_dtype=bfloat16)

    def loss(w, master_w, stop=jax.lax.stop_gradient):
        quantized = jax_tsq.quantize_blocks(stop(w))
        y = jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized, master_w=master_w)
        return y.astype(jnp.float32).sum()

    def plain(w):
        return jax_tsq.grouped_linear(x, w, sizes).astype(jnp.float32).sum()

    dw = jax.jit(jax.grad(plain))(w.astype(np.float32))
    assert_same_bytes(jax.jit(jax.grad(loss))(w, None), dw.astype(bfloat16))
    none, got = jax.jit(jax.grad(loss, argnums=(0, 1)))(w, np.zeros(w.shape, np.float32))
    assert_same_bytes(got, dw)
    assert not none.any()
    with pytest.raises(NotImplementedError, match="stop_gradient"):
        jax.grad(partial(loss, stop=lambda a: a))(w, None)


def test_residuals_with_quantized_weights():
    """They are kept in the place of w."""
    x, w, sizes, _ = operands()

    def layer(x, w):
        quantized = jax_tsq.quantize_blocks(jax.lax.stop_gradient(w))
        return jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized)

    kept = kept_by(layer, x, w)
    assert ("float32", w.shape) not in kept and ("float8_e4m3fn", w.shape) in kept


def test_no_gradient_of_quantized_weights():
    """Refused instead of zero, unless it is stopped."""
    x, w, sizes, _ = operands()
    quantized = jax_tsq.quantize_blocks(w)

    def loss(scales, stop=lambda a: a):
        weights = quantized._replace(scales=stop(scales))
        return jax_tsq.grouped_linear(x, w, sizes, quantized_w=weights).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match=r"grouped_linear gives no gradient of quantized_w.*goes to w"):
        jax.grad(loss)(quantized.scales)
    assert not jax.grad(partial(loss, stop=jax.lax.stop_gradient))(quantized.scales).any()


def test_small_gradients_survive():
    """Of 2^-40, which float8 does not hold: the same errors as of gradients of any size."""
    x, w, sizes, dy = operands()
    expected = value_and_gradients(x, w, sizes, dy)
    factor = np.float32(2.0**-40)
    small = value_and_gradients(x, w, sizes, (dy.astype(np.float32) * factor).astype(bfloat16))
    for actual, wanted in zip(small[1:], expected[1:], strict=True):
        assert_same_bytes(actual, (wanted.astype(np.float32) * factor).astype(wanted.dtype))


def quantizations(function, *arguments):
    """How often each quantizer and product stands in a traced program."""
    text = str(jax.make_jaxpr(function)(*arguments))
    names = ("rows", "ragged", "dual", "blocks", "matmul", "wgrad")
    return {name: n for name in names if (n := len(re.findall(rf"\bjax_tsq_{name}\[", text)))}


def test_what_is_computed():
    """Forwards rows alone; with a gradient x and dy are read once each, and twice x under jax.checkpoint."""
    x, w, sizes, _ = operands()

    def loss(x, w):
        return jax_tsq.grouped_linear(x, w, sizes).astype(jnp.float32).sum()

    gradient = partial(jax.jit, inline=True)
    assert quantizations(loss, x, w) == {"rows": 1, "blocks": 1, "matmul": 1}
    both = quantizations(gradient(jax.value_and_grad(loss, argnums=(0, 1))), x, w)
    assert both == {"dual": 2, "blocks": 2, "matmul": 2, "wgrad": 1}
    compiled = jax.jit(jax.grad(lambda x, w: jax.checkpoint(loss)(jnp.tanh(x), w) * 2, argnums=(0, 1))).lower(x, w)
    calls = layouts.calls(compiled.compile())
    if calls:
        assert Counter(calls)["dual"] == 1  # dy's: x has its rows in the forward pass, its columns in the recomputation


def test_program_for_cuda(monkeypatch):
    """Native calls alone, and nothing but them computes or moves data, if weights are quantized before."""
    x, w, sizes, dy = operands(w_dtype=bfloat16)
    monkeypatch.setenv(kernels.SETTING, "native")
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "check_driver", lambda: None)
    checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in kernels.OPERATIONS]

    def run(x, w, sizes, dy, quantized):
        y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized), x, w)
        return y, *pullback(dy)

    quantized = jax.tree.map(np.asarray, jax_tsq.quantize_blocks(w))
    with jax.default_device(jax.devices("cpu")[0]):
        exported = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=checks)
        text = exported(x, w, sizes, dy, quantized).mlir_module()
    assert Counter(re.findall(r"@jax_tsq\.(\w+)\(", text)) == {"dual": 2, "matmul": 2, "wgrad": 1}
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", "constant", "return"}


@pytest.mark.skipif(not HOPPER, reason="no GPU of compute capability 9.0")
def test_memory_on_a_gpu():
    """Temporaries of forward and backward pass are not above those of JAX's own product in bfloat16."""
    rng, sizes = np.random.default_rng(0), np.int32([3000, 0, 2000, 3100])
    x, dy = (rng.standard_normal((8192, features), np.float32).astype(bfloat16) for features in (1024, 512))
    w = rng.standard_normal((4, 1024, 512), np.float32)

    def temporaries(product):
        def run(x, w, sizes, dy):
            y, pullback = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
            return y, *pullback(dy)

        arrays = jax.device_put((x, w, sizes, dy), HOPPER[0])
        return jax.jit(run).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    def bf16(x, w, sizes):
        return jax.lax.ragged_dot(x, w.astype(x.dtype), sizes)

    fp8, wide = temporaries(jax_tsq.grouped_linear), temporaries(bf16)
    assert fp8 <= wide, (fp8, wide)


PADDED = jax_tsq.padded_tokens(TOKENS, len(SIZES))
COLUMNS = [("float32", (PADDED // 128, FEATURES)), ("float8_e4m3fn", (FEATURES, PADDED))]
ROWS = [("float32", (TOKENS, 2)), ("float8_e4m3fn", (TOKENS, FEATURES))]
KEPT = {"fp8": COLUMNS, "function": [("bfloat16", (TOKENS, FEATURES))], "function residuals": ROWS}


@pytest.mark.parametrize("name", KEPT)
def test_residuals(name):
    """What is kept of x for the backward pass: columns in FP8, with a function x itself or rows in FP8."""
    x, w, sizes, _ = operands()

    def kept(x, w):
        function = partial(jax_tsq.grouped_linear, group_sizes=jnp.asarray(sizes), **EVERY[name])
        return jax.tree.leaves(jax.vjp(function, x, w)[1])

    found = sorted((leaf.dtype.name, leaf.shape) for leaf in jax.eval_shape(kept, x, w) if len(leaf.shape) == 2)
    assert found == KEPT[name]


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("names", [(), ("grouped_linear_x",)], ids=str)
def test_name_for_policies(names, name):
    """A policy for rematerialization saves the FP8 values and scales by their name, and nothing else."""
    x, w, sizes, _ = operands()
    options, padded_sizes = EVERY[name], [("int32", sizes.shape)] if name == "fp8" else []

    @partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))
    def layer(x, w, sizes):
        return jax_tsq.grouped_linear(jnp.tanh(x), jnp.tanh(w), sizes, **options)

    found = kept_by(layer, x, w, sizes)
    made = found - Counter((a.dtype.name, a.shape) for a in (x, w, sizes))
    expected = [*KEPT[name], *padded_sizes] if names and name != "function" else []
    assert sorted(made.elements()) == sorted(expected)


def kept_by(function, *arguments):
    """How many arrays of each dtype and shape the backward pass of a function holds, each array counted once."""
    jaxpr = jax.make_jaxpr(lambda *a: jax.tree.leaves(jax.vjp(function, *a)[1]))(*arguments).jaxpr
    return Counter((v.aval.dtype.name, v.aval.shape) for v in {*jaxpr.outvars})


def test_layers_share_their_input():
    """Two layers on one x, in a scan, with a function: x is kept once."""
    x, w, sizes, _ = operands()
    layers = np.stack([w, w])

    def network(x, layers):
        def block(x, w):
            gate, up = (jax_tsq.grouped_linear(x, a, sizes, ragged_dot=jax.lax.ragged_dot) for a in (w, w + 1))
            return x + (gate * up).sum(), None

        return jax.lax.scan(block, x, layers)[0]

    assert kept_by(network, x, layers)["bfloat16", (2, *x.shape)] == 1


X, W, GROUP_SIZES = (
    jnp.zeros((8, 4), jnp.bfloat16),
    jnp.zeros((2, 4, 3), jnp.float32),
    jnp.zeros(2, jnp.int32),
)
QUANTIZED = jax_tsq.quantize_blocks(W)
BAD_QUANTIZED = {
    "an array": (TypeError, "quantized_w must be a BlockQuantized; got float32", dict(quantized_w=W)),
    "another dtype": (
        TypeError,
        r"quantized_w\.scales must be float32",
        dict(quantized_w=QUANTIZED._replace(scales=QUANTIZED.scales.astype(jnp.bfloat16))),
    ),
    "another shape": (
        ValueError,
        r"quantized_w must be .*quantize_blocks\(w\), here of float32\[2, 4, 3\]; got values of shape \[2, 4, 5\]",
        dict(quantized_w=jax_tsq.quantize_blocks(jnp.zeros((2, 4, 5)))),
    ),
    "with a function": (
        ValueError,
        "quantized_w must be None where ragged_dot is a function",
        dict(quantized_w=QUANTIZED, ragged_dot=jax.lax.ragged_dot),
    ),
}


@pytest.mark.parametrize(("error", "message", "options"), BAD_QUANTIZED.values(), ids=BAD_QUANTIZED)
def test_bad_quantized_weights(error, message, options):
    with pytest.raises(error, match=message):
        jax_tsq.grouped_linear(X, W, GROUP_SIZES, **options)
