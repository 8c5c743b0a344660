"""quantize_blocks: every implementation writes the bytes of the numpy specification with blocks of 128 x 128."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_tsq
from tests import layouts, spec
from tests.cases import BF16_KINDS, assert_same_bytes, bfloat16, weights

DTYPES = pytest.mark.parametrize("dtype", [bfloat16, np.float32], ids=["bf16", "f32"])
POW_2_SCALES = pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])


# Features, and the outputs of each part: few, because every shape is a compilation.
SHAPES = [
    *[(1, [1]), (300, [130]), (128, [256]), (128, [128, 128])],
    *[(100, [60, 60]), (130, [129, 1, 0, 20]), (130, [7] * 16)],
]


@settings(max_examples=100)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([bfloat16, np.float32]),
    pow_2_scales=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_specification(implementation, shape, dtype, pow_2_scales, kinds, seed):
    """Generated cases: any mixture of kinds of blocks, whole and partial ones, in one array and in several."""
    features, parts = shape
    whole = weights(seed, dtype, 2, features, sum(parts), sorted(kinds))
    split = np.split(whole, np.cumsum(parts)[:-1], axis=2)
    assert_same_bytes(implementation.blocks(split, pow_2_scales), spec.blocks([whole], pow_2_scales))


@DTYPES
@pytest.mark.parametrize(
    "shape", [(0, 3, 3), (2, 0, 3), (2, 3, 0), (0, 0, 0), (1, 1, 1), (3, 257, 129), (1, 640, 515)], ids=str
)
def test_shapes(implementation, shape, dtype):
    """Any E, K and N, from 0 up; `transposed` are the values transposed."""
    w = weights(0, dtype, *shape)
    values, transposed, scales = implementation.blocks([w])
    assert_same_bytes([values, transposed, scales], spec.blocks([w]))
    assert_same_bytes(transposed, values.transpose(0, 2, 1))


@POW_2_SCALES
@DTYPES
def test_every_bf16_value(implementation, dtype, pow_2_scales):
    """All 65,536 values of bfloat16, alone as maxima of blocks and beside 1."""
    values = np.arange(65536, dtype=np.uint16).view(bfloat16).astype(dtype)
    beside = np.ones([1, 256, 257], dtype)
    beside[0, :, :256] = values.reshape(256, 256)
    assert_same_bytes(implementation.blocks([beside], pow_2_scales), spec.blocks([beside], pow_2_scales))
    if implementation.name == "reference":  # which fills each block up to 128 x 128: 4 GB
        values = values[::13]
    alone = np.zeros([len(values), 2, 3], dtype)
    alone[:, 1, 1] = values
    assert_same_bytes(implementation.blocks([alone], pow_2_scales), spec.blocks([alone], pow_2_scales))


@POW_2_SCALES
def test_float32_is_rounded_first(implementation, pow_2_scales):
    """Its bytes are those of the bfloat16 cast: halves between two values, NaN of every kind, overflow, subnormals."""
    rng = np.random.default_rng(0)
    bits = rng.integers(2**32, size=(4, 256, 256), dtype=np.uint32)
    bits[1] = bits[1] & 0xFFFF0000 | 0x8000  # halves
    bits[2] = rng.choice(np.uint32([0x7F7F7FFF, 0x7F7F8000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x8000]), (256, 256))
    bits[3] &= 0x807FFFFF  # subnormals
    w = bits.view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = w.astype(bfloat16)
    expected = spec.blocks([cast], pow_2_scales)
    assert_same_bytes(implementation.blocks([w], pow_2_scales), expected)
    assert_same_bytes(implementation.blocks([cast], pow_2_scales), expected)


@DTYPES
def test_batches(implementation, dtype):
    """Two batch dimensions, of two joined arrays."""
    parts = [
        np.stack([weights(seed, dtype, 3, 130, n) for seed in range(4)]).reshape(2, 2, 3, 130, n) for n in (100, 50)
    ]
    results = implementation.blocks(parts)
    for i in np.ndindex(2, 2):
        assert_same_bytes([leaf[i] for leaf in results], spec.blocks([part[i] for part in parts]))


def test_eval_shape():
    """Shapes and dtypes without running anything, for sizes no memory holds."""
    shapes = jax.eval_shape(jax_tsq.quantize_blocks, jax.ShapeDtypeStruct((256, 7168, 2**20), jnp.float32))
    assert [(leaf.shape, leaf.dtype) for leaf in shapes] == [
        ((256, 7168, 2**20), jnp.float8_e4m3fn),
        ((256, 2**20, 7168), jnp.float8_e4m3fn),
        ((256, 56, 8192), jnp.float32),
    ]


@pytest.mark.parametrize("as_sequence", [tuple, list])
def test_joined_arrays(as_sequence):
    """A tuple is what its concatenation is; one operand of two mapped; nothing is copied."""
    w = weights(2, np.float32, 2, 130, 180)
    parts = as_sequence(np.split(w, [100], axis=2))
    assert_same_bytes(list(jax_tsq.quantize_blocks(parts)), spec.blocks([w]))
    one_mapped = jax.vmap(lambda a, b: jax_tsq.quantize_blocks((a, b)), in_axes=(None, 0))
    values, *_ = one_mapped(parts[0], parts[1][None])
    assert_same_bytes(values[0], spec.blocks([w])[0])
    compiled = jax.jit(lambda *parts: jax_tsq.quantize_blocks(parts)).lower(*parts).compile()
    assert layouts.calls(compiled) == ["blocks"]
    assert {name for name, _ in layouts.instructions(compiled)} <= layouts.FREE, compiled.as_text()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: np.dtype(dtype).name)
def test_dequantize(dtype):
    """float32(value) * scale, rounded; batch dimensions stay."""
    w = weights(3, np.float32, 3, 300, 130, ["normal"])
    result = jax_tsq.quantize_blocks(w)
    spread = np.asarray(result.scales).repeat(128, 1)[:, :300].repeat(128, 2)[:, :, :130]
    expected = (np.asarray(result.values, np.float32) * spread).astype(dtype)
    for actual in (jax_tsq.dequantize(result, dtype=dtype), result.dequantize(dtype)):
        np.testing.assert_array_equal(actual, expected, strict=True)
    batch = jax.tree.map(lambda leaf: leaf[None], result)
    np.testing.assert_array_equal(batch.dequantize(dtype)[0], expected, strict=True)
    assert np.linalg.norm(expected.astype(np.float32) - w) < 0.03 * np.linalg.norm(w)
    with pytest.raises(ValueError, match=r"scales must be \[ceil\(K / 128\), ceil\(N / 128\)\]"):
        result._replace(scales=result.scales[:, :1]).dequantize()
