"""quantize_rows: pure JAX, the same bytes as the numpy specification with blocks along features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_tsq
from tests import spec
from tests.cases import BF16_KINDS, assert_same_bytes, bfloat16, matrix, normal


def quantize_rows(device, x, pow_2_scales=False):
    return list(jax_tsq.quantize_rows(jax.device_put(x, device), pow_2_scales=pow_2_scales))


@given(
    shape=st.sampled_from([(16, 384), (33, 129), (200, 5), (1, 300)]),
    pow_2_scales=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_specification(device, shape, pow_2_scales, kinds, seed):
    """Hundreds of generated cases: any mixture of kinds of blocks, whole and partial ones."""
    tokens, features = shape
    x = np.ascontiguousarray(matrix(seed, bfloat16, [features], tokens, sorted(kinds))[0].T)
    assert_same_bytes(quantize_rows(device, x, pow_2_scales), spec.rows(x, pow_2_scales))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 128), (2, 2162)], ids=str)
def test_shapes(device, shape):
    """Any M and K, from 0 up."""
    x, _ = normal(shape)
    assert_same_bytes(quantize_rows(device, x), spec.rows(x))


@pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])
def test_every_bf16_value(device, pow_2_scales):
    """All 65,536 values of bfloat16, alone as block maxima and beside 1."""
    x = np.empty([65536, 129], bfloat16)
    x[:] = 0
    x[:, 0] = x[:, 128] = np.arange(65536, dtype=np.uint16).view(bfloat16)
    x[:, 5] = 1
    assert_same_bytes(quantize_rows(device, x, pow_2_scales), spec.rows(x, pow_2_scales))


@pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])
def test_feeds_the_other_operations(implementation, pow_2_scales):
    """Its result is the fp8 input of both operations."""
    x, _ = normal([300, 200])
    values, scales = spec.rows(x, pow_2_scales)
    rows = jax_tsq.quantize_rows(jnp.asarray(x), pow_2_scales=pow_2_scales)
    assert_same_bytes(list(rows), (values, scales))
    actual = implementation.split(*map(np.asarray, rows), [172, 128], pow_2_scales)
    assert_same_bytes(actual, spec.split(values, scales, [172, 128], pow_2_scales))
    actual = implementation.ragged(np.asarray(rows.values), np.int32([172, 100]), np.asarray(rows.scales), pow_2_scales)
    assert_same_bytes(actual, spec.ragged(values, [172, 100], scales, pow_2_scales))


def test_requantization_is_exact():
    """With power-of-two scales, values that stay normal in float8_e4m3fn survive re-quantization without any loss."""
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], [256, 256]) * rng.uniform(1, 8, [256, 256])).astype(bfloat16)
    rows = jax_tsq.quantize_rows(jnp.asarray(x), pow_2_scales=True)
    columns = jax_tsq.fused_transpose_split_quant(rows.values, rows.scales, [256], pow_2_scales=True)
    np.testing.assert_array_equal(jax_tsq.dequantize(columns)[0], jax_tsq.dequantize(rows))


def test_transforms():
    """jit, vmap, eval_shape and a batch of rows give the type and the bytes of the plain call."""
    x, _ = normal([24, 200])
    expected = spec.rows(x)
    x = x.reshape(6, 4, 200)
    mapped = jax.jit(jax.vmap(jax_tsq.quantize_rows))(x)
    assert type(mapped) is jax_tsq.RowQuantized and mapped._fields == ("values", "scales")
    assert_same_bytes((mapped.values.reshape(24, 200), mapped.scales.reshape(24, 2)), expected)
    shapes = jax.eval_shape(jax_tsq.quantize_rows, x[0])
    assert (shapes.values.shape, shapes.values.dtype) == ((4, 200), jnp.float8_e4m3fn)
    assert (shapes.scales.shape, shapes.scales.dtype) == ((4, 2), jnp.float32)


def test_no_derivative():
    """Differentiation is refused, and not zero; around a stopped gradient, everything goes on."""
    x = jnp.asarray(normal([4, 200])[0])

    def loss(x):
        return jax_tsq.dequantize(jax_tsq.quantize_rows(x)).sum() + x.astype(jnp.float32).sum()

    for function in (loss, jax.jit(loss), jax.checkpoint(loss)):
        for differentiate in (jax.grad(function), lambda x, f=function: jax.jvp(f, [x], [x])):
            with pytest.raises(NotImplementedError, match=r"quantize_rows rounds .* no derivative.*stop_gradient"):
                differentiate(x)
    assert (jax.grad(lambda x: loss(jax.lax.stop_gradient(x)) + x.sum())(x) == 1).all()
