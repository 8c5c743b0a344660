"""quantize_rows: every implementation writes the bytes of the numpy specification with blocks along features."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_tsq
from tests import layouts, spec
from tests.cases import BF16_KINDS, assert_same_bytes, bfloat16, matrix, normal

POW_2_SCALES = pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])
MOST = 2**31 - 1
# Sizes for 33 rows: none, in use and not, empty groups, and every way to break the rules.
SIZES = [None, [33, 0, 0, 0], [0, 20, 0, 5], [7, 0, 0, 0], [-5, 10, 0, 0], [30, 0, 30, 1], [10, MOST, -1, MOST]]


def by_rows(seed, tokens, features, kinds=None):
    """Tokens of which each block of features is of one kind."""
    return np.ascontiguousarray(matrix(seed, bfloat16, [features], tokens, kinds)[0].T)


@given(
    features=st.sampled_from([384, 129, 5, 300]),
    group_sizes=st.sampled_from(SIZES),
    pow_2_scales=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_specification(implementation, features, group_sizes, pow_2_scales, kinds, seed):
    """Generated cases: any mixture of kinds of blocks, whole and partial ones, any sizes."""
    x = by_rows(seed, 33, features, sorted(kinds))
    group_sizes = None if group_sizes is None else np.int32(group_sizes)
    actual = implementation.rows(x, group_sizes, pow_2_scales)
    assert_same_bytes(actual, spec.rows(x, group_sizes, pow_2_scales))


@pytest.mark.parametrize("sized", [False, True], ids=["", "sizes"])
@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 128), (200, 127), (2, 2162), (515, 640)], ids=str
)
def test_shapes(implementation, shape, sized):
    """Any M and K, from 0 up."""
    x, sizes = normal(shape)[0], np.int32([shape[0] // 2, 0, shape[0] // 3]) if sized else None
    assert_same_bytes(implementation.rows(x, sizes), spec.rows(x, sizes))


@pytest.mark.parametrize("sizes", [[], [1] * 40, [7] * 1030], ids=len)
def test_numbers_of_groups(implementation, sizes):
    """No group, and more than there are threads in a block."""
    x, sizes = normal([300, 5])[0], np.int32(sizes)
    assert_same_bytes(implementation.rows(x, sizes), spec.rows(x, sizes))


@POW_2_SCALES
def test_every_bf16_value(implementation, pow_2_scales):
    """All 65,536 values of bfloat16, alone as block maxima and beside 1."""
    x = np.empty([65536, 129], bfloat16)
    x[:] = 0
    x[:, 0] = x[:, 128] = np.arange(65536, dtype=np.uint16).view(bfloat16)
    x[:, 5] = 1
    assert_same_bytes(implementation.rows(x, None, pow_2_scales), spec.rows(x, None, pow_2_scales))


@pytest.mark.parametrize("soil", [np.nan, np.inf], ids=str)
def test_rows_past_the_sum(implementation, soil):
    """What lies there reaches no byte of the result."""
    x, sizes = by_rows(0, 300, 200, ["normal"]), np.int32([100, 3, 0, 50])
    expected = spec.rows(x, sizes)
    x[153:] = soil
    values, scales = implementation.rows(x, sizes)
    assert_same_bytes([values, scales], expected)
    assert not values[153:].view(np.uint8).any() and (scales[153:] == 1).all()


@pytest.mark.parametrize("mapped", ["x", "sizes", "both"])
def test_batches(implementation, mapped):
    """Batch dimensions of both operands, of one alone under vmap, and two of them."""
    x = np.stack([by_rows(seed, 40, 130) for seed in range(6)])
    sizes = np.int32([[40, 0], [7, 8], [0, 0], [-1, 39], [50, 50], [1, 1]])
    if mapped == "both":
        expected = [spec.rows(*one) for one in zip(x, sizes, strict=True)]
        values, scales = implementation.rows(x.reshape(2, 3, 40, 130), sizes.reshape(2, 3, 2))
        for i, one in enumerate(expected):
            assert_same_bytes([values.reshape(6, 40, 130)[i], scales.reshape(6, 40, 2)[i]], one)
    else:
        x, sizes, axes = (x, sizes[1], (0, None)) if mapped == "x" else (x[0], sizes, (None, 0))
        result = jax.jit(jax.vmap(jax_tsq.quantize_rows, axes))(x, sizes)
        for i in range(6):
            one = spec.rows(x[i] if mapped == "x" else x, sizes if mapped == "x" else sizes[i])
            assert_same_bytes([leaf[i] for leaf in result], one)


@POW_2_SCALES
def test_feeds_the_other_operations(implementation, pow_2_scales):
    """Its result is the fp8 input of both operations."""
    x, _ = normal([300, 200])
    values, scales = spec.rows(x, None, pow_2_scales)
    rows = implementation.rows(x, None, pow_2_scales)
    assert_same_bytes(rows, (values, scales))
    actual = implementation.split(*rows, [172, 128], pow_2_scales)
    assert_same_bytes(actual, spec.split(values, scales, [172, 128], pow_2_scales))
    actual = implementation.ragged(rows[0], np.int32([172, 100]), rows[1], pow_2_scales)
    assert_same_bytes(actual, spec.ragged(values, [172, 100], scales, pow_2_scales))


def test_requantization_is_exact():
    """With power-of-two scales, values that stay normal in float8_e4m3fn survive re-quantization without any loss."""
    rng = np.random.default_rng(0)
    x = (rng.choice([-1, 1], [256, 256]) * rng.uniform(1, 8, [256, 256])).astype(bfloat16)
    rows = jax_tsq.quantize_rows(jnp.asarray(x), pow_2_scales=True)
    columns = jax_tsq.fused_transpose_split_quant(rows.values, rows.scales, [256], pow_2_scales=True)
    np.testing.assert_array_equal(jax_tsq.dequantize(columns)[0], jax_tsq.dequantize(rows))


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_scales_go_from_call_to_call_without_a_copy(batch):
    """They lie as the consumer wants them, under vmap too."""
    x = jax.ShapeDtypeStruct((*batch, 384, 1024), jnp.bfloat16)
    function = functools.reduce(lambda f, _: jax.vmap(f), batch, layouts.quantize_and_consume)
    layouts.check_no_copies(jax.jit(function).lower(x).compile())


def test_scales_stay_as_they_lie_in_a_loop():
    """As the carry of a loop, they are not turned around."""
    x = jax.ShapeDtypeStruct((384, 1024), jnp.bfloat16)
    compiled = jax.jit(layouts.consume_in_a_loop).lower(x).compile()
    assert layouts.calls(compiled) == ["rows", "rows", "toy"]
    scales = [result for _, result in layouts.instructions(compiled) if result.startswith("f32[384,8]")]
    assert scales and all("{0,1}" in result for result in scales), compiled.as_text()


def test_exported_scales_are_not_copied():
    """A program that was written and read back."""
    x = jax.ShapeDtypeStruct((384, 1024), jnp.bfloat16)
    exemptions = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in ("rows", "toy")]
    exported = jax.export.export(jax.jit(layouts.quantize_and_consume), disabled_checks=exemptions)(x)
    loaded = jax.export.deserialize(exported.serialize())
    layouts.check_no_copies(jax.jit(loaded.call).lower(x).compile())
