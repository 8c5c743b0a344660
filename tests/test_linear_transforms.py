"""grouped_linear under vmap: any mix of mapped and unmapped operands, at any axis, on two levels, with any gradient."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.cases import bfloat16

OUTER, INNER, TOKENS, FEATURES, OUTPUTS, EXPERTS = 2, 3, 20, 16, 8, 3
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
# Below, an operand's level is 0 if it is not mapped, 1 if it is by the outer vmap, 2 by the inner one, 3 by both.


def arrays():
    """x, w and sizes for both levels, NaN past the sums, and a cotangent that is not mapped."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(TOKENS - 2, [1 / EXPERTS] * EXPERTS, size=(OUTER, INNER)).astype(np.int32)
    x = rng.standard_normal((OUTER, INNER, TOKENS, FEATURES)).astype(bfloat16)
    x[:, :, -2:] = np.nan
    w = rng.standard_normal((OUTER, INNER, EXPERTS, FEATURES, OUTPUTS), np.float32)
    return x, w, sizes, rng.standard_normal((TOKENS, OUTPUTS)).astype(bfloat16)


X, W, SIZES, DY = arrays()


def value_and_gradients(x, w, sizes):
    y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes), x, w)
    return y, *pullback(jnp.asarray(DY))


@functools.cache
def one(*index):
    """y, dx and dw of one example: index pairs of x, w and sizes."""
    return [np.asarray(a, np.float64) for a in _jitted(*(a[i] for a, i in zip((X, W, SIZES), index, strict=True)))]


_jitted = jax.jit(value_and_gradients)


def expected(levels, outer, inner):
    return one(*((outer * (level & 1), inner * (level >> 1)) for level in levels))


def assert_close(actual, wanted):
    for a, e in zip(actual, wanted, strict=True):
        a = np.asarray(a, np.float64)
        assert a.shape == e.shape and np.linalg.norm(a - e) <= 4e-3 * np.linalg.norm(e)


def mapped_at(levels, arrays):
    """The operands and the axes of both vmaps, for operands that are mapped at these levels."""
    pick = (lambda a: a[0, 0], lambda a: a[:, 0], lambda a: a[0], lambda a: a)
    operands = [pick[level](a) for a, level in zip(arrays, levels, strict=True)]
    return operands, *(tuple(0 if level & bit else None for level in levels) for bit in (1, 2))


AXES = list(itertools.product((None, 0, 1, 2), (None, 0, 1, 2, -1), (None, 0, 1)))[1:]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_any_axis(axes):
    """Every mix of axes is traced, and has the types of the plain call with the mapped dimension in front."""
    operands = [
        jax.ShapeDtypeStruct(a.shape[2:] if axis is None else np.moveaxis(a[0], 0, axis).shape, a.dtype)
        for a, axis in zip((X, W, SIZES), axes, strict=True)
    ]
    results = jax.eval_shape(jax.vmap(value_and_gradients, in_axes=axes), *operands)
    plain = jax.eval_shape(value_and_gradients, *(a[0, 0] for a in (X, W, SIZES)))
    assert [(a.shape, a.dtype) for a in results] == [((INNER, *a.shape), a.dtype) for a in plain]


def test_two_levels():
    """vmap of vmap of gradients, for every mix of operands that are mapped at neither, either or both levels."""
    mixes = [levels for levels in itertools.product(range(4), repeat=3) if levels[0] | levels[1] | levels[2] == 3]

    def everything(*arrays):
        results = {}
        for levels in mixes:
            operands, outer, inner = mapped_at(levels, arrays)
            results[levels] = jax.vmap(jax.vmap(value_and_gradients, inner), outer)(*operands)
        return results

    results = jax.jit(everything, compiler_options=QUICK)(X, W, SIZES)
    assert len(results) == 49
    for levels, result in results.items():
        for i, j in np.ndindex(OUTER, INNER):
            assert_close([a[i, j] for a in result], expected(levels, i, j))


def test_gradient_of_vmap():
    """The gradient of an unmapped operand is the sum over the mapped dimension, wherever it lay."""
    mixes = [levels for levels in itertools.product((0, 2), repeat=3) if any(levels)]
    axes = {0: (None, None, None), 2: (1, 3, 1)}

    def everything(*arrays):
        results = {}
        for levels in mixes:
            operands, *_ = mapped_at(levels, arrays)
            where = [axes[level][i] for i, level in enumerate(levels)]
            x, w, sizes = (a if i is None else jnp.moveaxis(a, 0, i) for a, i in zip(operands, where, strict=True))

            def run(x, w, sizes=sizes, where=where):
                return jax.vmap(jax_tsq.grouped_linear, where)(x, w, sizes)

            y, pullback = jax.vjp(run, x, w)
            dx, dw = pullback(jnp.broadcast_to(jnp.asarray(DY), y.shape))
            gradients = zip((dx, dw), where[:2], strict=True)
            results[levels] = y, *(a if i is None else jnp.moveaxis(a, i, 0) for a, i in gradients)
        return results

    for levels, (y, dx, dw) in jax.jit(everything, compiler_options=QUICK)(X, W, SIZES).items():
        examples = [np.stack(parts) for parts in zip(*(expected(levels, 0, j) for j in range(INNER)), strict=True)]
        wanted = [
            a if mapped else a.sum(axis=0) for a, mapped in zip(examples, (True, levels[0], levels[1]), strict=True)
        ]
        assert_close((y, dx, dw), wanted)


def test_empty_batch():
    """No examples at all."""
    y = jax.vmap(jax_tsq.grouped_linear, (0, None, 0))(X[0, :0], W[0, 0], SIZES[0, :0])
    assert y.shape == (0, TOKENS, OUTPUTS)


@pytest.mark.parametrize("ragged_dot", [None, jax.lax.ragged_dot], ids=["fp8", "function"])
def test_no_second_derivative(ragged_dot):
    """Neither by hessian nor by gradients of gradients: refused by name, as no result would mean anything."""

    def loss(x, w):
        return jax_tsq.grouped_linear(x, w, SIZES[0, 0], ragged_dot=ragged_dot).astype(jnp.float32).sum()

    x, w = jnp.asarray(X[0, 0]), jnp.asarray(W[0, 0])
    gradient = jax.grad(loss, argnums=1)
    y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, SIZES[0, 0], ragged_dot=ragged_dot), x, w)
    for differentiate in (
        lambda: jax.hessian(loss, argnums=1)(x, w),
        lambda: jax.jit(jax.hessian(loss, argnums=0))(x, w),
        lambda: jax.grad(lambda w: gradient(x, w).sum())(w),
        lambda: jax.jvp(gradient, (x, w), (x, w)),
        lambda: jax.jvp(pullback, (y,), (y,)),
    ):
        with pytest.raises(NotImplementedError, match="grouped_linear has no second derivative"):
            differentiate()


@pytest.mark.parametrize("options", [{}, dict(ragged_dot=jax.lax.ragged_dot)], ids=["fp8", "function"])
def test_no_forward_mode(options):
    """As of every custom_vjp, whose name JAX's own error has."""
    x, w = jnp.asarray(X[0, 0]), jnp.asarray(W[0, 0])
    layers = [lambda x: jax_tsq.grouped_linear(x, w, SIZES[0, 0], **options)]
    for layer in [*layers, lambda x: jax_tsq.ragged_dot(x, w.astype(jnp.float32), SIZES[0, 0])]:
        for differentiate in (lambda f: jax.jvp(f, (x,), (x,)), lambda f: jax.jacfwd(f)(x)):
            with pytest.raises(TypeError, match="custom_vjp"):
                differentiate(layer)
