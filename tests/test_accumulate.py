"""Running sums of weight gradients through differentiation: their bytes, and nothing beside the call that adds."""

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from jax_tsq._core import ffi, kernels
from tests import mesh
from tests.accumulate import (
    FUNCTIONS,
    MICROBATCHES,
    added,
    arguments_of,
    compile_native,
    instructions,
    plain,
    step,
    sums_for,
)
from tests.cases import assert_same_bytes

EVERY = pytest.mark.parametrize("name", FUNCTIONS)
BOTH = pytest.mark.parametrize("name", ["linear", "mlp pair"])


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
    assert_same_bytes(got_dx, dx)
    np.testing.assert_allclose(got_value, value, rtol=1e-6)  # XLA may sum it in another order
    jax.tree.map(assert_same_bytes, total, added(sums, dw, sizes))
    nan = jax.tree.map(lambda a: np.full_like(a, np.nan), sums)
    np.testing.assert_allclose(jax.jit(partial(loss, **options))(nan, x, w, sizes, dy), value, rtol=1e-6)


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


@BOTH
def test_nothing_but_the_call(monkeypatch, name):
    """No copy, addition or fill of dW's shape in the compiled program: each sum is passed through and added to."""
    compile_native(monkeypatch)
    loss, arguments = arguments_of(name)
    compiled = jax.jit(partial(step, loss), donate_argnums=0).lower(*arguments).compile()
    assert "while" in (compiled.as_text() or "")
    w = arguments[2]
    shapes = {a.shape for a in jax.tree.leaves(w)}
    found = instructions(compiled, shapes)
    assert found.pop("custom-call") == len(jax.tree.leaves(w)), found
    assert set(found) <= {"parameter", "get-tuple-element"}, found
    used = jax_tsq.kernels_used(compiled)
    assert used["quantize_blocks"] == (1 if name == "linear" else 2)  # outside of the loop
    assert used["ragged_weight_gradient"] == len(jax.tree.leaves(w))
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


@mesh.parametrize("accumulate")
def test_mesh(tmp_path_factory, platform, program, case):
    """On one device and on 8 host devices, or all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


# --- Bad input -------------------------------------------------------------------------------------------------------

X, W, D = jnp.zeros((8, 4), jnp.bfloat16), jnp.zeros((2, 4, 6)), jnp.zeros((2, 3, 4))
GROUP_SIZES = jnp.zeros(2, jnp.int32)
BAD_LINEAR = {
    "list": (TypeError, dict(accumulate=[1.0]), r"^accumulate must be float32\[2, 4, 6\].*got list.*jnp\.zeros"),
    "bfloat16": (TypeError, dict(accumulate=W.astype(jnp.bfloat16)), r"^accumulate must be float32.*got bfloat16"),
    "shape": (ValueError, dict(accumulate=W[:1]), r"^accumulate must be float32\[2, 4, 6\].*got float32\[1, 4, 6\]"),
    "two": (ValueError, dict(accumulate=W, master_w=W), "^master_w must be None with accumulate.*Leave one"),
}
BAD_MLP = {
    "array": (TypeError, W, "^accumulate must be the pair .*w_gate_up and of w_down; got float32"),
    "one": (ValueError, (W,), "^accumulate must be the pair .*got 1 of them"),
    "a pair for an array": (TypeError, ((W, W), D), r"^accumulate\[0\] must be float32\[2, 4, 6\].*got tuple of"),
    "exchanged": (ValueError, (D, W), r"^accumulate\[0\] must be .*shape of w_gate_up.*got float32\[2, 3, 4\]"),
    "bfloat16": (TypeError, (W, D.astype(jnp.bfloat16)), r"^accumulate\[1\] must be .*shape of w_down.*got bfloat16"),
}
BAD_PAIR = {
    "an array for a pair": (ValueError, (W, D), r"^accumulate\[0\] must be a pair, because w_gate_up is one"),
    "three": (ValueError, ((W, W, W), D), r"^accumulate\[0\] must be a pair"),
    "ups": (
        ValueError,
        ((W[..., :3], W), D),
        r"^accumulate\[0\]\[1\] must be float32\[2, 4, 3\].*got float32\[2, 4, 6\]",
    ),
}


@pytest.mark.parametrize(("error", "options", "message"), BAD_LINEAR.values(), ids=BAD_LINEAR)
def test_bad_input(error, options, message):
    """The argument, the rule, and what was got."""
    with pytest.raises(error, match=message):
        jax_tsq.grouped_linear(X, W, GROUP_SIZES, **options)


@pytest.mark.parametrize(("error", "sums", "message"), BAD_MLP.values(), ids=BAD_MLP)
def test_bad_input_of_the_block(error, sums, message):
    with pytest.raises(error, match=message):
        jax_tsq.moe_mlp(X, W, D, GROUP_SIZES, accumulate=sums)


@pytest.mark.parametrize(("error", "sums", "message"), BAD_PAIR.values(), ids=BAD_PAIR)
def test_bad_input_for_a_pair(error, sums, message):
    with pytest.raises(error, match=message):
        jax_tsq.moe_mlp(X, (W[..., :3], W[..., :3]), D, GROUP_SIZES, accumulate=sums)
