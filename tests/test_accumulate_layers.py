"""Running sums of weight gradients in a scan over layers, and weights of all layers that are quantized once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.accumulate import added, compile_native, instructions, sums_for
from tests.cases import assert_same_bytes, bfloat16

LAYERS, EXPERTS = 3, 3


@pytest.fixture
def native_on_cpu(monkeypatch):
    compile_native(monkeypatch)


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


def stack():
    """x, weights of all layers in one array, sizes and dy."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((200, 128)).astype(bfloat16) for _ in range(2))
    w = rng.standard_normal((LAYERS * EXPERTS, 128, 128)).astype(np.float32) / 12
    return x, w, np.array([90, 0, 70], np.int32), dy.astype(np.float32)


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


def test_layers_without_copies(native_on_cpu):
    """In the compiled program the sums of all layers are one array that each layer adds to in its place."""
    x, w, sizes, dy = stack()
    compiled = jax.jit(lambda *a: layers_step(*a), donate_argnums=0).lower(sums_for(w), x, w, sizes, dy).compile()
    found = instructions(compiled, [w.shape, (LAYERS, *w.shape), w[:EXPERTS].shape])
    assert found.pop("custom-call") == 1, found
    assert set(found) <= {"parameter", "get-tuple-element"}, found


def apart(sums, x, w, sizes, dy, quantized=None):
    """Layers by a scan that takes stacked weights `[L, E, K, N]`, quantized ones and sums apart."""

    def network(x, sums):
        def run(x, operands):
            w, quantized, sums = operands
            return x + jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized, accumulate=sums), None

        y, _ = jax.lax.scan(run, x, (w, quantized, sums))
        return (y.astype(jnp.float32) * dy).sum()

    return jax.grad(network, (1, 0))(x, sums)


def quantized_once(sums, x, w, sizes, dy):
    return apart(sums, x, w, sizes, dy, jax.vmap(jax_tsq.quantize_blocks)(w))


def stacked():
    """The same with dimensions for layers."""
    x, w, sizes, dy = stack()
    w = w.reshape(LAYERS, EXPERTS, *w.shape[1:])
    return sums_for(w), x, w, sizes, dy


def test_stacked_sums_are_copied(native_on_cpu):
    """What the recipe avoids: a scan that takes sums apart fills an array, and copies every layer's sums twice."""
    arguments = stacked()
    compiled = jax.jit(lambda *a: apart(*a), donate_argnums=0).lower(*arguments).compile()
    layer = arguments[0].shape[1:]
    assert instructions(compiled, [layer, (1, *layer)])["custom-call"] == 1
    whole = instructions(compiled, [arguments[0].shape])
    assert whole["fusion"] + whole["dynamic-update-slice"] + whole["copy"] >= 3, whole


def test_stacked_weights(native_on_cpu):
    """Weights of all layers are quantized by one call, whose parts a scan takes apart."""
    compiled = jax.jit(lambda *a: quantized_once(*a)).lower(*stacked()).compile()
    assert jax_tsq.kernels_used(compiled)["quantize_blocks"] == 1


def test_stacked_weights_bytes():
    """Quantized in the layers or before them: the same bytes, of sums and of dx."""
    arguments = stacked()
    once, each = (jax.jit(lambda *a, f=f: f(*a))(*arguments) for f in (quantized_once, apart))
    jax.tree.map(assert_same_bytes, once, each)
