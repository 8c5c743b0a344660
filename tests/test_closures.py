"""The function that grouped_linear is given as `ragged_dot`: what it closes over, and what it must return."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.cases import assert_same_bytes, bfloat16

TOKENS, FEATURES, EXPERTS = 24, 8, 4
SIZES = np.int32([3, 0, 9, 8])
SCALE, OFFSET = np.float32(2), np.int32(1)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _operands():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, FEATURES)).astype(bfloat16)
    return x, rng.standard_normal((EXPERTS, FEATURES, FEATURES), np.float32)


X, W = _operands()


def scaled(scale, lhs, rhs, group_sizes, offset=0):
    """A product with a scale, by weights that start at another group."""
    return scale * jax.lax.ragged_dot(lhs, jnp.roll(rhs, offset, axis=0), group_sizes).astype(jnp.float32)


class Layer:
    """A callable with arrays in it."""

    def __init__(self, scale, offset):
        self.scale, self.offset = scale, offset

    def __call__(self, *operands):
        return scaled(self.scale, *operands, offset=self.offset)


CLOSURES = {
    "lambda": lambda scale, offset: lambda *operands: scaled(scale, *operands, offset=offset),
    "partial": lambda scale, offset: functools.partial(scaled, scale, offset=offset),
    "object": Layer,
}


def loss(ragged_dot, x, w):
    return jax_tsq.grouped_linear(x, w, jnp.asarray(SIZES), ragged_dot=ragged_dot).astype(jnp.float32).sum()


def gradients(ragged_dot, x, w):
    return jax.grad(functools.partial(loss, ragged_dot), argnums=(0, 1))(x, w)


def in_scan(make, x, w, scale, offset):
    """Closed over is what the body computes from its carry, and what was traced outside."""

    def body(step, _):
        here = make(scale * 2**step, offset + step.astype(jnp.int32))
        return step - 1, gradients(here, x, w)

    _, stacked = jax.lax.scan(body, jnp.float32(1), None, length=2)
    return [a[1] for a in stacked]


def in_checkpoint(make, x, w, scale, offset):
    layer = jax.checkpoint(lambda x, w: loss(make(scale, offset), x, w))
    return jax.grad(layer, argnums=(0, 1))(x, w)


def in_checkpointed_scan(make, x, w, scale, offset):
    """The layer of a scan is rematerialized, its gradient outside."""

    def total(x, w):
        layer = jax.checkpoint(lambda total, _: (total + loss(make(scale, offset), x, w), None))
        return jax.lax.scan(layer, jnp.float32(0), None, length=1)[0]

    return jax.grad(total, argnums=(0, 1))(x, w)


def gradient_of_jit(make, x, w, scale, offset):
    return jax.grad(jax.jit(lambda x, w: loss(make(scale, offset), x, w)), argnums=(0, 1))(x, w)


def gradient_of_traced(make, x, w, scale, offset):
    """What is closed over is an argument of the function that is differentiated, but not for that argument."""
    function = jax.jit(lambda x, w, scale, offset: loss(make(scale, offset), x, w))
    return jax.grad(function, argnums=(0, 1))(x, w, scale, offset)


def in_vmap(make, x, w, scale, offset):
    """What is closed over is mapped, the operands are not."""
    run = jax.vmap(lambda scale, offset: gradients(make(scale, offset), x, w))
    return [a[1] for a in run(jnp.stack([scale * 3, scale]), jnp.stack([offset - 1, offset]))]


def in_cond(make, x, w, scale, offset):
    return jax.lax.cond(scale > 0, lambda: gradients(make(scale, offset), x, w), lambda: (x, w))


def in_jit(make, x, w, scale, offset):
    return gradients(make(scale, offset), x, w)


TRANSFORMS = [
    in_jit,
    in_scan,
    in_checkpoint,
    in_checkpointed_scan,
    gradient_of_jit,
    gradient_of_traced,
    in_vmap,
    in_cond,
]


@functools.cache
def expected():
    """The gradients with numbers in the place of what is closed over."""
    run = jax.jit(lambda x, w: gradients(lambda *operands: scaled(2, *operands, offset=1), x, w))
    return [np.asarray(a) for a in run(X, W)]


@pytest.mark.parametrize("make", CLOSURES.values(), ids=CLOSURES)
def test_closure(make):
    """Values that are closed over, traced by whatever transformation, act as numbers would."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(*arrays):
        return [transform(make, *arrays) for transform in TRANSFORMS]

    for transform, results in zip(TRANSFORMS, run(X, W, SCALE, OFFSET), strict=True):
        try:
            assert_same_bytes([np.asarray(a) for a in results], expected())
        except AssertionError as error:
            raise AssertionError(transform.__name__) from error


def test_eager_and_leaks():
    """Without jit, with numpy arrays; and under jit nothing is left behind."""
    assert_same_bytes([np.asarray(a) for a in gradients(CLOSURES["lambda"](SCALE, OFFSET), X, W)], expected())
    with jax.checking_leaks():
        jax.jit(functools.partial(gradient_of_jit, CLOSURES["lambda"]))(X, W, SCALE, OFFSET)


def test_gradient_of_what_is_closed_over():
    """There is none: refused instead of zero, unless it is stopped."""

    def run(scale, stop=lambda a: a):
        return loss(CLOSURES["lambda"](stop(scale), OFFSET), X, W)

    for function in (run, jax.jit(run)):
        with pytest.raises(NotImplementedError, match=r"grouped_linear gives no gradient .*stop_gradient"):
            jax.grad(function)(SCALE)
    assert jax.grad(functools.partial(run, stop=jax.lax.stop_gradient))(SCALE) == 0


RESULTS = {
    "of lhs's shape": (ValueError, r"\[24, 6\]; got bfloat16\[24, 8\]", lambda lhs, rhs, sizes: lhs),
    "without rows": (ValueError, r"got bfloat16\[6\]", lambda lhs, rhs, sizes: lhs[0, :6]),
    "integers": (TypeError, r"got int32\[24, 6\]", lambda lhs, rhs, sizes: jnp.zeros((24, rhs.shape[2]), jnp.int32)),
    "a pair": (TypeError, "got tuple", lambda lhs, rhs, sizes: (lhs[:, :6], None)),
    "nothing": (TypeError, "got NoneType", lambda lhs, rhs, sizes: None),
}


@pytest.mark.parametrize(("error", "message", "ragged_dot"), RESULTS.values(), ids=RESULTS)
def test_wrong_results(error, message, ragged_dot):
    """Said when the layer is called, with the shape that it should have been."""
    with pytest.raises(error, match=rf"^ragged_dot must return one floating array \[M, N\].*{message}"):
        jax_tsq.grouped_linear(X, W[..., :6], SIZES, ragged_dot=ragged_dot)


@pytest.mark.parametrize("ragged_dot", ["cublas", 3, jnp.zeros(3)], ids=repr)
def test_no_function(ragged_dot):
    with pytest.raises(TypeError, match=r"^ragged_dot must be None or a function of lhs, rhs and group_sizes.*got "):
        jax_tsq.grouped_linear(X, W, SIZES, ragged_dot=ragged_dot)


def test_its_own_errors():
    """What the function raises arrives as it is."""

    def refusing(lhs, rhs, group_sizes):
        raise ValueError("no tiles for this size")

    with pytest.raises(ValueError, match=r"^no tiles for this size"):
        jax_tsq.grouped_linear(X, W, SIZES, ragged_dot=refusing)
