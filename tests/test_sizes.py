"""Group sizes: integers of any dtype, checked where their values are known, and in a program for debugging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.cases import assert_same_bytes, bfloat16

TOKENS, FEATURES = 40, 8
SIZES = np.int32([7, 0, 12, 20])
X = np.random.default_rng(0).standard_normal((TOKENS, FEATURES)).astype(bfloat16)
W = np.ones((4, FEATURES, 8), np.float32)
ROWS, BLOCKS = jax_tsq.quantize_rows(X), jax_tsq.quantize_blocks(W)
PADDED = jax_tsq.padded_tokens(TOKENS, 4)

FUNCTIONS = {
    "ragged_transpose_quant": lambda sizes: jax_tsq.ragged_transpose_quant(X, sizes),
    "quantize_rows": lambda sizes: jax_tsq.quantize_rows(X, sizes),
    "ragged_quantize": lambda sizes: jax_tsq.ragged_quantize(X, sizes),
    "grouped_linear": lambda sizes: jax_tsq.grouped_linear(X, W, sizes),
    "ragged_dot": lambda sizes: jax_tsq.ragged_dot(X, W, sizes),
    "ragged_matmul": lambda sizes: jax_tsq.ragged_matmul(ROWS, BLOCKS, sizes),
    "pad_group_sizes": jax_tsq.pad_group_sizes,
    "pad_rows": lambda sizes: jax_tsq.pad_rows(X, sizes),
    "unpad_rows": lambda sizes: jax_tsq.unpad_rows(np.ones((PADDED, 2), np.float32), sizes, TOKENS),
    "check_group_sizes": lambda sizes: jax_tsq.check_group_sizes(sizes, TOKENS),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = ["int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64", ">i4"]


def same(actual, expected):
    assert_same_bytes(jax.tree.leaves(actual), jax.tree.leaves(expected))


@pytest.mark.parametrize("name", ["ragged_transpose_quant", "pad_group_sizes"])
def test_any_integer_dtype(name):
    """The results of int32, from numpy arrays and, as far as JAX has the dtype, from traced and other JAX arrays."""
    function = FUNCTIONS[name]
    expected, jitted = function(SIZES), jax.jit(function)
    for dtype in map(np.dtype, DTYPES):
        same(function(SIZES.astype(dtype)), expected)
        if dtype.itemsize < 8 and dtype.isnative:
            same(function(jnp.asarray(SIZES, dtype)), expected)
            same(jitted(jnp.asarray(SIZES, dtype)), expected)
    with jax.enable_x64(True):
        sizes = jnp.asarray(SIZES, jnp.int64)
        same(function(sizes), expected)
        same(jitted(sizes), expected)


@EVERY
def test_types_of_results(name):
    """What comes out has the types that it has with int32."""
    function = FUNCTIONS[name]
    expected = jax.eval_shape(function, SIZES)
    assert jax.eval_shape(lambda: function(np.bincount(np.repeat(np.arange(4), SIZES)))) == expected
    assert jax.eval_shape(function, SIZES.astype(np.uint32)) == expected
    with jax.enable_x64(True):
        assert jax.eval_shape(function, SIZES.astype(np.int64)) == expected


@EVERY
@pytest.mark.parametrize("value", [2**31, 2**32 + 7, -(2**31) - 1])
def test_what_does_not_fit(name, value):
    """Values beyond int32 are not wrapped around."""
    with pytest.raises(ValueError, match=rf"^group_sizes must fit into int32.*got {value} for group 1"):
        FUNCTIONS[name](np.int64([7, value, 12, 20]))


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_traced_values_are_clipped(dtype):
    """Traced sizes beyond int32 reach to the last row, as the largest int32 would."""
    with jax.enable_x64(dtype == "int64"):
        sizes = jnp.asarray([7, 2**32 - 3], dtype)
        result = jax.jit(jax_tsq.pad_rows)(X, sizes)
    same(result, jax.jit(jax_tsq.pad_rows)(X, np.int32([7, TOKENS - 7])))


BROKEN = {
    "negative": ([7, -1, 12, 20], r"not be negative; got -1 for group 1"),
    "too many": ([7, 0, 12, 22], r"sum to at most the 40 tokens; got a sum of 41.*padded_sizes"),
    "overflowing": ([2**31 - 1] * 4, f"got a sum of {4 * (2**31 - 1)}"),
}


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "pad_group_sizes"])
@pytest.mark.parametrize(("sizes", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_rules(name, sizes, message):
    """An error where the values are known, in a function that is traced, too; none where they are traced."""
    function, sizes = FUNCTIONS[name], np.int32(sizes)
    for call in (lambda: function(sizes), lambda: function(jnp.asarray(sizes)), jax.jit(lambda: function(sizes))):
        with pytest.raises(ValueError, match=rf"^group_sizes must .*{message}"):
            call()
    if name != "check_group_sizes":
        jax.eval_shape(function, sizes)


def test_aligned():
    """The promise that sizes are multiples of 128 is checked."""
    x = np.ones((384, 2), bfloat16)
    with pytest.raises(ValueError, match=r"^group_sizes must be multiples of 128; got 130 for group 2"):
        jax_tsq.ragged_transpose_quant(x, np.int32([128, 0, 130]), aligned=True)


def test_padded_sizes_are_no_group_sizes():
    """What dequantize returns goes back by the sizes before padding, and not by those of the result."""
    quantized = jax_tsq.ragged_transpose_quant(X, SIZES)
    with pytest.raises(ValueError, match=r"sum to at most the 40 tokens; got a sum of 384"):
        jax_tsq.unpad_rows(jax_tsq.dequantize(quantized), quantized.padded_sizes, TOKENS)


def test_operands_of_other_sizes():
    """x and dy that were quantized by other sizes, though P and E are the same."""
    x, dy = (jax_tsq.ragged_transpose_quant(X, np.int32(sizes)) for sizes in ([7, 0, 12, 20], [7, 5, 12, 0]))
    with pytest.raises(ValueError, match=r"^x and dy must be quantized by the same group sizes; got 0 and 128 padded"):
        jax_tsq.ragged_weight_gradient(x, dy)
    jax_tsq.ragged_weight_gradient(x, x._replace(padded_sizes=np.asarray(x.padded_sizes)))
    jax.block_until_ready(jax.jit(jax_tsq.ragged_weight_gradient)(x, dy))


def in_jit(sizes):
    jax_tsq.check_group_sizes(sizes, TOKENS)
    return sizes + 1


IN_PROGRAMS = {
    "jit": in_jit,
    "vmap": lambda sizes: jax.vmap(in_jit)(jnp.stack([sizes, jnp.zeros_like(sizes)])),
    "scan": lambda sizes: jax.lax.scan(lambda n, _: (n, in_jit(sizes)), 0, None, length=2)[1],
}


@pytest.mark.parametrize("function", IN_PROGRAMS.values(), ids=IN_PROGRAMS)
def test_check_in_a_program(function):
    """Called with traced sizes, check_group_sizes lets a program fail that gets broken ones."""
    run = jax.jit(function)
    jax.block_until_ready(run(SIZES))
    jax.effects_barrier()
    with pytest.raises(jax.errors.JaxRuntimeError, match="group_sizes must sum to at most the 40 tokens; got a sum"):
        jax.block_until_ready(run(SIZES + 1))
        jax.effects_barrier()
