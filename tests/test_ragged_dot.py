"""ragged_dot: that of JAX at a call site, but for the FP8 error, and errors that say what it does not take."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.cases import assert_same_bytes, bfloat16

SIZES = np.int32([100, 0, 57, 90])
TOKENS, FEATURES, OUTPUTS = 256, 144, 72  # 9 rows of no group
DTYPES = [bfloat16, np.float32]


def operands(lhs_dtype=bfloat16, rhs_dtype=bfloat16):
    rng = np.random.default_rng(0)
    lhs = rng.standard_normal((TOKENS, FEATURES)).astype(lhs_dtype)
    return lhs, rng.standard_normal((len(SIZES), FEATURES, OUTPUTS)).astype(rhs_dtype), SIZES


def model(ragged_dot, lhs, rhs, sizes, dy):
    """A result and both gradients, as a model that calls either function has them."""
    y, pullback = jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes), lhs, rhs)
    return y, *pullback(dy.astype(y.dtype))


def test_signature():
    """What JAX's function takes, in its order and with its defaults, but for where a result lies."""
    ours, theirs = (inspect.signature(f).parameters for f in (jax_tsq.ragged_dot, jax.lax.ragged_dot))
    assert [(p.name, p.default) for p in ours.values()] == [
        (p.name, p.default) for p in theirs.values() if p.name != "out_sharding"
    ]


@pytest.mark.parametrize("lhs_dtype", DTYPES, ids=["bf16", "f32"])
@pytest.mark.parametrize("rhs_dtype", DTYPES, ids=["bf16", "f32"])
def test_one_word(device, lhs_dtype, rhs_dtype):
    """Types are those of JAX's own, and values and gradients its own but for the FP8 error."""
    dy = np.random.default_rng(1).standard_normal((TOKENS, OUTPUTS)).astype(bfloat16)
    arrays = jax.device_put((*operands(lhs_dtype, rhs_dtype), dy), device)
    results, expected = (
        jax.jit(functools.partial(model, function))(*arrays) for function in (jax_tsq.ragged_dot, jax.lax.ragged_dot)
    )
    for actual, wanted in zip(results, expected, strict=True):
        assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
        actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
        assert 0.03 < np.linalg.norm(actual - wanted) / np.linalg.norm(wanted) < 0.045


@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_preferred_element_type(dtype):
    """The result's dtype; the values are those of grouped_linear."""
    lhs, rhs, sizes = operands()
    y = jax.jit(functools.partial(jax_tsq.ragged_dot, preferred_element_type=dtype))(lhs, rhs, sizes)
    expected = jax.jit(jax_tsq.grouped_linear)(lhs, rhs, sizes)
    assert_same_bytes(y, np.asarray(expected).astype(dtype or bfloat16))


def test_float32_is_rounded_first():
    """To bfloat16, and nothing is lost that FP8 would have kept."""
    lhs, rhs, sizes = operands(np.float32, np.float32)
    wide, narrow = (
        jax_tsq.ragged_dot(lhs.astype(d), rhs.astype(d), sizes, preferred_element_type=np.float32) for d in DTYPES[::-1]
    )
    assert_same_bytes(wide, narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "f32"])
def test_gradient_of_weights(dtype):
    """That of grouped_linear: sums of float32 weights are not rounded on their way."""
    lhs, rhs, sizes = operands(rhs_dtype=dtype)
    ours, expected = (
        jax.jit(jax.grad(lambda rhs, f=f: jnp.square(f(lhs, rhs, sizes).astype(jnp.float32)).sum()))
        for f in (jax_tsq.ragged_dot, jax_tsq.grouped_linear)
    )
    assert_same_bytes(ours(rhs), np.asarray(expected(rhs)))


def test_vmap():
    """Over rows and sizes, the matrices shared."""
    lhs, rhs, sizes = operands()
    several, all_sizes = np.stack([lhs, lhs[::-1]]), np.stack([sizes, sizes[::-1]])
    y = jax.jit(jax.vmap(jax_tsq.ragged_dot, (0, None, 0)))(several, rhs, all_sizes)
    for got, a, b in zip(y, several, all_sizes, strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(jax_tsq.ragged_dot(a, rhs, b)), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    "precision",
    [None, "default", jax.lax.Precision.DEFAULT, ("default", None), (jax.lax.Precision.DEFAULT,) * 2],
    ids=str,
)
def test_precision(precision):
    lhs, rhs, sizes = operands()
    assert jax.eval_shape(functools.partial(jax_tsq.ragged_dot, precision=precision), lhs, rhs, sizes).shape


LHS, RHS, _ = operands()
BAD = {
    "lhs of float16": (
        TypeError,
        dict(lhs=LHS.astype(np.float16)),
        "^lhs must be a bfloat16 or float32 .*float16",
    ),
    "lhs of integers": (TypeError, dict(lhs=LHS.astype(np.int32)), "^lhs must be .*int32.*Cast"),
    "lhs a list": (TypeError, dict(lhs=[[1.0]]), r"^lhs must be .*got list.*jnp\.asarray\(lhs\)"),
    "rhs of FP8": (TypeError, dict(rhs=RHS.astype(jnp.float8_e4m3fn)), r"^rhs must be .*\[E, K, N\]; got float8"),
    "batched lhs": (ValueError, dict(lhs=LHS[None]), r"^lhs must be .*\[M, K\]; got .*jax\.vmap"),
    "one matrix": (ValueError, dict(rhs=RHS[0]), r"^rhs must be .*\[E, K, N\]; got"),
    "rhs transposed": (ValueError, dict(rhs=RHS.swapaxes(1, 2)), r"same K.*jnp\.swapaxes\(rhs, 1, 2\)"),
    "other groups": (ValueError, dict(group_sizes=SIZES[:2]), "E = 2 groups as in group_sizes"),
    "sizes of floats": (TypeError, dict(group_sizes=SIZES.astype(np.float32)), "^group_sizes must be an integer"),
    "large sizes": (ValueError, dict(group_sizes=SIZES + 100), "^group_sizes must sum to at most the 256"),
    "precision": (ValueError, dict(precision="highest"), r"^precision must be None or .*jax\.lax\.ragged_dot"),
    "one precision of two": (ValueError, dict(precision=(None, jax.lax.Precision.HIGH)), "^precision must be None"),
    "an algorithm": (ValueError, dict(precision=jax.lax.DotAlgorithmPreset.BF16_BF16_F32), "^precision must be None"),
    "float16 results": (TypeError, dict(preferred_element_type=np.float16), "^preferred_element_type must be None, bf"),
    "no dtype": (TypeError, dict(preferred_element_type="fp8"), "^preferred_element_type must be .*'fp8'"),
    "an offset": (NotImplementedError, dict(group_offset=np.int32([1])), r"takes no group_offset.*jnp\.roll\(lhs"),
}


@pytest.mark.parametrize(("error", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(error, arguments, message):
    """The argument by the name that it has here, the rule, and what to do."""
    with pytest.raises(error, match=message):
        jax_tsq.ragged_dot(**dict(lhs=LHS, rhs=RHS, group_sizes=SIZES) | arguments)
