"""Helpers for padded groups: pad_group_sizes, pad_rows, unpad_rows, padded_tokens, check_group_sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_tsq
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, matrix, normal

SIZES = [[100, 0, 156, 1], [0, 0, 0, 0], [300, 0, 0, 0], [0, 128, 0, 172]]


def padded(x, sizes):
    """pad_rows in numpy."""
    result = np.zeros((spec.padded_tokens(len(x), len(sizes)), *x.shape[1:]), x.dtype)
    result[spec.padded_rows(sizes)] = x[: sum(sizes)]
    return result


@given(tokens=st.integers(0, 10**12), groups=st.integers(0, 5000), aligned=st.booleans())
def test_padded_tokens(tokens, groups, aligned):
    """M + 127 min(E, M) rounded down to 128; with `aligned` M rounded up; a Python int."""
    result = jax_tsq.padded_tokens(tokens, groups, aligned=aligned)
    assert type(result) is int and result == spec.padded_tokens(tokens, groups, aligned)


def test_padded_tokens_is_tight():
    """Some routing needs all of it: E groups of 1 more than a multiple of 128, or M groups of 1."""
    assert jax_tsq.padded_tokens(3 * 129, 3) == 3 * 256
    assert jax_tsq.padded_tokens(3, 8) == 3 * 128


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_pad_group_sizes(sizes):
    """Sizes rounded up to multiples of 128, and where each group starts in padded rows; int32, also under jit."""
    for function in [jax_tsq.pad_group_sizes, jax.jit(jax_tsq.pad_group_sizes)]:
        result = function(jnp.int32(sizes))
        expected = -(-np.int32(sizes) // 128) * 128
        assert_same_bytes([result.sizes, result.starts], [expected, np.int32([0, *np.cumsum(expected)[:-1]])])
        assert result._fields == ("sizes", "starts")


def test_pad_group_sizes_of_nothing():
    """No groups."""
    result = jax_tsq.pad_group_sizes(jnp.zeros(0, jnp.int32))
    assert result.sizes.shape == result.starts.shape == (0,)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("shape", [(300,), (300, 3), (300, 2, 2)], ids=str)
def test_pad_rows_and_back(sizes, shape):
    """pad_rows puts each group where ragged_transpose_quant does, zeros elsewhere; unpad_rows undoes it."""
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    result = jax.jit(jax_tsq.pad_rows)(x, jnp.int32(sizes))
    np.testing.assert_array_equal(result, padded(x, sizes), strict=True)
    back = jax.jit(jax_tsq.unpad_rows, static_argnums=2)(result, jnp.int32(sizes), 300)
    x[sum(sizes) :] = 0
    np.testing.assert_array_equal(back, x, strict=True)


@pytest.mark.parametrize(
    "dtype", [np.int32, bfloat16, bool, spec.float8_e4m3fn], ids=lambda dtype: np.dtype(dtype).name
)
def test_dtypes(dtype):
    """Rows of any dtype, bit for bit."""
    x = np.random.default_rng(0).integers(0, 2, [300, 3]).astype(dtype)
    result = jax_tsq.pad_rows(jnp.asarray(x), jnp.int32([100, 0, 156, 1]))
    np.testing.assert_array_equal(result, padded(x, [100, 0, 156, 1]), strict=True)


def test_order_of_ragged_transpose_quant():
    """Rows padded first and quantized as aligned groups give the bytes of ragged_transpose_quant."""
    x, _ = matrix(6, bfloat16, [300], 33)
    sizes = jnp.int32([100, 0, 156, 1])
    expected = jax_tsq.ragged_transpose_quant(x, sizes)
    rows = jax_tsq.pad_rows(jnp.asarray(x), sizes)
    assert len(rows) == expected.values.shape[1]
    aligned = jax_tsq.ragged_transpose_quant(rows, jax_tsq.pad_group_sizes(sizes).sizes, aligned=True)
    assert_same_bytes(list(aligned), [np.asarray(part) for part in expected])


def test_rows_past_the_sum_reach_nothing():
    """NaN past the sum, or in padding, reaches neither results nor gradients."""
    sizes = jnp.int32([100, 0, 56])
    x = np.ones([300, 2], np.float32)
    x[156:] = np.nan
    rows = jax_tsq.pad_rows(x, sizes)
    assert np.isfinite(rows).all()
    weights = np.full(rows.shape, np.nan, np.float32)
    weights[spec.padded_rows([100, 0, 56])] = 3
    gradient = jax.grad(lambda x: jnp.where(np.isnan(weights), 0, jax_tsq.pad_rows(x, sizes) * weights).sum())(x)
    np.testing.assert_array_equal(gradient, np.where(np.isnan(x), 0, 3), strict=False)
    back = jax_tsq.unpad_rows(jnp.asarray(weights), sizes, 300)
    assert (back[:156] == 3).all() and (back[156:] == 0).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_differentiable(sizes):
    """Each is the other's transpose, forward and reverse mode."""
    sizes = jnp.int32(sizes)
    x = jnp.asarray(np.random.default_rng(0).standard_normal([300, 3], np.float32))
    y = jnp.asarray(np.random.default_rng(1).standard_normal([jax_tsq.padded_tokens(300, 4), 3], np.float32))

    def pad(x):
        return jax_tsq.pad_rows(x, sizes)

    def unpad(y):
        return jax_tsq.unpad_rows(y, sizes, 300)

    np.testing.assert_array_equal(jax.vjp(pad, x)[1](y)[0], unpad(y), strict=True)
    np.testing.assert_array_equal(jax.vjp(unpad, y)[1](x)[0], pad(x), strict=True)
    np.testing.assert_array_equal(jax.jvp(pad, [x], [2 * x])[1], 2 * pad(x), strict=True)


def test_vmap():
    """Over rows, over group sizes, over both."""
    x = np.random.default_rng(0).standard_normal([4, 300, 3], np.float32)
    sizes = np.int32(SIZES)
    both = jax.vmap(jax_tsq.pad_rows)(x, sizes)
    only_sizes = jax.vmap(jax_tsq.pad_rows, in_axes=(None, 0))(x[0], sizes)
    for i, group_sizes in enumerate(SIZES):
        np.testing.assert_array_equal(both[i], padded(x[i], group_sizes))
        np.testing.assert_array_equal(only_sizes[i], padded(x[0], group_sizes))


def test_quantized_in_padded_order():
    """What dequantize returns for a ragged result goes back to the order of x."""
    x, _ = normal([300, 33])
    sizes = jnp.int32([100, 0, 156, 1])
    rows = jax_tsq.dequantize(jax_tsq.ragged_transpose_quant(x, sizes))
    back = jax_tsq.unpad_rows(rows, sizes, 300)
    experts = jax_tsq.dequantize(jax_tsq.fused_transpose_split_quant(x[:257], None, [100, 0, 156, 1]))
    np.testing.assert_array_equal(back[:257], np.concatenate(experts))


@pytest.mark.parametrize(
    ("sizes", "aligned"), [([100, 0, 156], False), ([128, 0, 256], True), ([0, 0], True), ([], False)]
)
def test_check_accepts(sizes, aligned):
    """Valid sizes of any integer array type."""
    for array in [np.array(sizes, np.int32), jnp.array(sizes, jnp.int32)]:
        assert jax_tsq.check_group_sizes(array, 384, aligned=aligned) is None


@pytest.mark.parametrize(
    ("sizes", "aligned", "words"),
    [
        ([5, -3], False, "-3"),
        ([200, 200], False, "400.*384|384.*400"),
        ([2**31 - 1, 2**31 - 1], False, "4294967294"),
        ([128, 130], True, "130"),
    ],
)
def test_check_rejects(sizes, aligned, words):
    """Bad values raise with the value in the message."""
    with pytest.raises(ValueError, match=f"(?s)group_sizes.*({words})"):
        jax_tsq.check_group_sizes(np.int32(sizes), 384, aligned=aligned)
