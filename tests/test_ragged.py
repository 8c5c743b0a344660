"""ragged_transpose_quant: every implementation against the numpy specification, and its properties by name."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jax_tsq
from tests import spec
from tests.cases import (
    BF16_KINDS,
    FP8_KINDS,
    LISTED_SIZES,
    SCALE_KINDS,
    assert_same_bytes,
    bfloat16,
    features_for,
    float8_e4m3fn,
    matrix,
    normal,
    soil_free_memory,
)

DTYPES = pytest.mark.parametrize("dtype", [bfloat16, float8_e4m3fn], ids=["bf16", "fp8"])
LAYOUTS = pytest.mark.parametrize("layout", ["packed", "flat"])

# (batch, tokens, groups, features), dtype and options of the generated cases: few, because each is a compilation. They
# hold any two options with all their values.
SHAPES = [((), 300, 4, 16), ((), 513, 7, 33), ((), 3, 9, 130), ((2,), 260, 3, 31)]
OPTIONS = [
    dict(pow_2_scales=False, aligned=False, layout="packed"),
    dict(pow_2_scales=True, aligned=True, layout="packed"),
    dict(pow_2_scales=False, aligned=True, layout="flat"),
    dict(pow_2_scales=True, aligned=False, layout="flat"),
]
PROGRAMS = [
    (*shape, dtype, OPTIONS[(i + j + k) % 4])
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate([bfloat16, float8_e4m3fn])
    for k in (0, 2)
]


def sizes_of(draw, tokens, groups, aligned):
    """Group sizes that keep the rules: any sizes, empty ones too, whose sum is at most `tokens`."""
    step = 128 if aligned else 1
    cuts = sorted(draw(st.lists(st.integers(0, tokens // step), min_size=groups, max_size=groups)))
    sizes = np.diff([0, *cuts]) * step
    return draw(st.permutations(sizes.tolist()))


@st.composite
def ragged_cases(draw):
    """Shapes, options, data and group sizes; one case in four breaks the rules for group sizes."""
    batch, tokens, groups, features, dtype, options = draw(st.sampled_from(PROGRAMS))
    any_size = st.one_of(st.integers(-300, tokens + 300), st.sampled_from([-(2**31), 2**31 - 1, 2**30, -1, 0]))

    def sizes():
        if draw(st.integers(0, 3)) == 3:
            return draw(st.lists(any_size, min_size=groups, max_size=groups))
        return sizes_of(draw, tokens, groups, options["aligned"])

    return dict(
        batch=batch,
        tokens=tokens,
        features=features,
        group_sizes=[sizes() for _ in range(int(np.prod(batch)))],
        dtype=dtype,
        options=options,
        kinds=sorted(draw(st.sets(st.sampled_from(sorted(BF16_KINDS))))),
        fp8_kinds=sorted(draw(st.sets(st.sampled_from(sorted(FP8_KINDS))))),
        scale_kinds=sorted(draw(st.sets(st.sampled_from(sorted(SCALE_KINDS))))),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(case=ragged_cases())
def test_equals_specification(implementation, case):
    """Generated cases: mixtures of kinds of blocks, sizes that keep and break the rules, batches."""
    kinds = case["kinds"] if case["dtype"] == bfloat16 else case["fp8_kinds"]
    xs, scales, expected = [], [], []
    for seed, sizes in enumerate(case["group_sizes"], case["seed"]):
        taken = spec.taken_rows(sizes, case["tokens"], case["options"]["aligned"])
        x, input_scales = matrix(
            seed, case["dtype"], taken, case["features"], kinds, case["scale_kinds"], tokens=case["tokens"]
        )
        xs.append(x)
        scales.append(input_scales)
        expected.append(spec.ragged(x, sizes, input_scales, **case["options"]))
    x, group_sizes = np.stack(xs), np.int32(case["group_sizes"])
    input_scales = None if scales[0] is None else np.stack(scales)
    expected = [np.stack(parts) for parts in zip(*expected, strict=True)]
    if not case["batch"]:
        x, group_sizes, expected = x[0], group_sizes[0], [part[0] for part in expected]
        input_scales = None if input_scales is None else input_scales[0]
    assert_same_bytes(implementation.ragged(x, group_sizes, input_scales, **case["options"]), expected)


@DTYPES
@pytest.mark.parametrize(("counts", "features"), LISTED_SIZES, ids=str)
def test_listed_sizes(implementation, counts, features, dtype):
    """Empty sizes, odd ones and large ones, as group sizes, with a few rows to spare."""
    kinds = ["normal", "any", "few NaN"] if dtype == bfloat16 else ["normal", "any"]
    features = features_for(implementation, features)
    x, input_scales = matrix(13, dtype, counts, features, kinds, ["normal"], tokens=sum(counts) + 3)
    actual = implementation.ragged(x, np.int32(counts), input_scales)
    assert_same_bytes(actual, spec.ragged(x, counts, input_scales))


@LAYOUTS
def test_many_groups(implementation, layout):
    """More groups than a block has threads (1,031), most of them small, packed and flat."""
    rng = np.random.default_rng(3)
    sizes = rng.choice([0, 1, 2, 3, 130], p=[0.2, 0.3, 0.3, 0.18, 0.02], size=1031).astype(np.int32)
    x, _ = matrix(3, bfloat16, sizes, 5, ["normal", "few NaN"], tokens=int(sizes.sum()) + 7)
    assert_same_bytes(implementation.ragged(x, sizes, layout=layout), spec.ragged(x, sizes, layout=layout))


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("shape", [(0, 3, 5), (5, 0, 3), (0, 0, 3), (5, 2, 0), (200, 1, 0)], ids=str)
def test_no_tokens_groups_or_features(implementation, shape, aligned):
    """Sizes of 0: results of the right shapes, written where there is anything to write."""
    tokens, groups, features = shape
    x, _ = normal([tokens, features])
    sizes = np.full(groups, 128, np.int32)
    assert_same_bytes(implementation.ragged(x, sizes, aligned=aligned), spec.ragged(x, sizes, aligned=aligned))


def test_huge(implementation):
    """More than 2^31 elements: tokens repeat with a period of 3 blocks, and so do the results, in both layouts."""
    if implementation.name != "native cuda":
        pytest.skip("takes a GPU's memory bandwidth")
    features, repeats = 7168, 782
    assert 3 * 128 * repeats * features > 2**31
    period = jnp.asarray(normal([384, features])[0])
    x = jnp.tile(period, (repeats, 1))
    (small,), (small_scales,) = jax_tsq.fused_transpose_split_quant(period, None, [384])
    # Two groups of equal sizes, so that the flat layout is two contiguous [features, tokens / 2].
    sizes = jnp.full(2, len(x) // 2, jnp.int32)

    @partial(jax.jit, static_argnums=2)
    def repeated(values, small, groups):
        bits, small_bits = (jax.lax.bitcast_convert_type(a, jnp.uint8) for a in (values, small))
        return (bits.reshape(groups, features, repeats // groups, 384) == small_bits[:, None]).all()

    for layout, groups in [("packed", 1), ("flat", 2)]:
        values, scales, _ = jax_tsq.ragged_transpose_quant(x, sizes, aligned=True, layout=layout)
        assert repeated(values, small, groups)
        assert (scales.reshape(repeats, 3, features) == small_scales).all()


@DTYPES
@pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])
def test_split_is_slices(implementation, dtype, pow_2_scales):
    """With counts that are multiples of 128, the split result is the slices of the packed one."""
    counts = [128, 0, 256, 128]
    x, input_scales = matrix(2, dtype, counts, 130)
    values, scales, sizes = implementation.ragged(x, np.int32(counts), input_scales, pow_2_scales, aligned=True)
    assert values.shape == (130, 512) and sizes.tolist() == counts
    ends = np.cumsum(counts)[:-1]
    slices = np.split(values, ends, axis=1), np.split(scales, ends // 128)
    assert_same_bytes(implementation.split(x, input_scales, counts, pow_2_scales), slices)


def test_aligned_bytes_are_independent_of_sizes(implementation):
    """If all groups start on multiples of 128 and fill x, the bytes do not depend on the sizes at all."""
    x, _ = matrix(2, bfloat16, [512], 40)
    first = implementation.ragged(x, np.int32([512, 0, 0, 0]), aligned=True)
    second = implementation.ragged(x, np.int32([128, 0, 256, 128]), aligned=True)
    assert_same_bytes(first[:2], second[:2])


@LAYOUTS
@DTYPES
def test_equals_split_group_by_group(implementation, dtype, layout):
    """Each group holds what fused_transpose_split_quant gives its expert, then zeros up to the padded size."""
    counts = [100, 0, 156, 1, 128, 44]
    x, input_scales = matrix(4, dtype, counts, 33)
    values, scales, sizes = implementation.ragged(x, np.int32(counts), input_scales, layout=layout)
    outs, out_scales = implementation.split(x, input_scales, counts)
    ends = np.cumsum(sizes)[:-1]
    if layout == "flat":
        groups = [part.reshape(33, -1) for part in np.split(values[: 33 * sizes.sum()], 33 * ends)]
    else:
        groups = np.split(values[:, : sizes.sum()], ends, axis=1)
    assert_same_bytes([group[:, :n] for group, n in zip(groups, counts, strict=True)], outs)
    assert not any(group[:, n:].view(np.uint8).any() for group, n in zip(groups, counts, strict=True))
    assert_same_bytes(np.split(scales[: sizes.sum() // 128], ends // 128), out_scales)


@DTYPES
def test_flat_equals_packed(implementation, dtype):
    """The flat layout holds the packed one's groups as contiguous [K, padded_i], zeros after the last; equal scales."""
    counts = np.int32([100, 0, 156, 1])
    x, input_scales = matrix(4, dtype, counts, 33, tokens=300)
    values, scales, sizes = implementation.ragged(x, counts, input_scales)
    groups = np.split(values, np.cumsum(sizes), axis=1)
    flat = implementation.ragged(x, counts, input_scales, layout="flat")
    assert_same_bytes(flat, (np.concatenate([group.ravel() for group in groups]), scales, sizes))


@LAYOUTS
@DTYPES
@pytest.mark.parametrize("garbage", [0x7FC0, 0x7F80, 0xFF80, 0x7F7F, 0xABCD], ids=hex)
def test_rows_past_the_sum_are_not_read(implementation, garbage, dtype, layout):
    """NaN, infinities or garbage in the rows past the sum, and in their input scales: the bytes stay equal."""
    sizes = np.int32([100, 0, 57])
    x, input_scales = normal([300, 33], dtype)
    x[157:] = 0
    clean = implementation.ragged(x, sizes, input_scales, layout=layout)
    x[157:] = np.uint16(garbage).view(bfloat16) if dtype == bfloat16 else np.uint8(0x7F).view(float8_e4m3fn)
    if input_scales is not None:
        input_scales[157:] = (np.uint32(garbage) << 16).view(np.float32)
    dirty = implementation.ragged(x, sizes, input_scales, layout=layout)
    assert_same_bytes(dirty, clean)
    assert np.isfinite(dirty[0].astype(np.float32)).all() and np.isfinite(dirty[1]).all()


@pytest.mark.parametrize("features", [33, 128, 257])
def test_one_row_past_the_sum(implementation, features):
    """The first row past the sum is not read, wherever in its block the sum lies."""
    x = np.full([260, features], np.inf, bfloat16)
    for size in [0, 1, 7, 8, 63, 64, 126, 127, 128, 129, 255, 256]:
        x[:size] = 1
        values, scales, _ = implementation.ragged(x, np.int32([size, 0]))
        assert np.isfinite(scales).all()
        assert (values[:, :size].astype(np.float32) == 448).all() and not values[:, size:].view(np.uint8).any()


@LAYOUTS
@DTYPES
def test_padding(implementation, dtype, layout):
    """Outside the groups values are 0 (positive) and scales 1, also when no row is in use."""
    x, input_scales = normal([300, 33], dtype)
    used, used_scales, sizes = implementation.ragged(x, np.int32([3, 0, 130]), input_scales, layout=layout)
    assert sizes.tolist() == [128, 0, 256]
    assert used.size == 33 * 640 and used_scales.shape == (5, 33)
    assert np.count_nonzero(used.view(np.uint8)) <= 133 * 33
    assert (used_scales[3:] == 1).all() and (used_scales[:3] != 1).all()
    values, scales, sizes = implementation.ragged(x, np.int32([0, 0, 0]), input_scales, layout=layout)
    assert not values.view(np.uint8).any() and (scales == 1).all() and not sizes.any()


@LAYOUTS
@pytest.mark.parametrize("sizes", [[0, 0, 0], [5, 0, 130], [128, 128, 0]], ids=str)
def test_every_byte_is_written(implementation, sizes, layout):
    """Results do not depend on what their memory held before."""
    x, _ = normal([300, 33])
    expected = spec.ragged(x, sizes, layout=layout)
    for _ in range(5):
        soil_free_memory(implementation.device, [part.nbytes for part in expected])
        assert_same_bytes(implementation.ragged(x, np.int32(sizes), layout=layout), expected)


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize(
    "sizes",
    [
        [-1, 100, -(2**31), 50],
        [2**31 - 1] * 4,
        [2**31 - 1, 1, -5, 7],
        [2**30, 2**30, 2**30, 2**30],
        [128, 129, 130, 131],
        [300, 1, 1, 1],
        [257, -257, 128, 128],
    ],
    ids=str,
)
def test_invalid_sizes(implementation, sizes, aligned):
    """Sizes that break the rules: the documented result on every platform, nothing out of bounds, no error."""
    x, _ = matrix(9, bfloat16, [300], 33)
    for layout in ["packed", "flat"]:
        expected = spec.ragged(x, sizes, aligned=aligned, layout=layout)
        assert_same_bytes(implementation.ragged(x, np.int32(sizes), aligned=aligned, layout=layout), expected)


def test_one_compilation():
    """20 random routings under one jit: one compilation, right bytes."""
    traces = []

    @jax.jit
    def quantize(x, group_sizes):
        traces.append(1)
        return jax_tsq.ragged_transpose_quant(x, group_sizes)

    rng = np.random.default_rng(0)
    x, _ = normal([500, 33])
    for _ in range(20):
        sizes = rng.multinomial(rng.integers(501), rng.dirichlet(np.ones(6))).astype(np.int32)
        assert_same_bytes(quantize(x, sizes), spec.ragged(x, sizes))
    assert len(traces) == 1 and quantize._cache_size() == 1


def test_result_type():
    """A NamedTuple whose sizes are the padded ones, and a pytree that keeps its type."""
    result = jax_tsq.ragged_transpose_quant(jnp.ones([4, 2], jnp.bfloat16), jnp.int32([1, 3]))
    assert type(result) is jax_tsq.RaggedQuantized and result._fields == ("values", "scales", "padded_sizes")
    assert result.padded_sizes.dtype == jnp.int32 and result.padded_sizes.tolist() == [128, 128]
    assert type(jax.tree.map(lambda a: a, result)) is jax_tsq.RaggedQuantized


def test_numpy_inputs():
    """numpy arrays and numpy's bool are taken as they are."""
    x, input_scales = normal([300, 5], float8_e4m3fn)
    sizes = np.int32([256])
    result = jax_tsq.ragged_transpose_quant(
        x, sizes, input_scales=input_scales, pow_2_scales=np.True_, aligned=np.True_
    )
    assert_same_bytes(result, spec.ragged(x, sizes, input_scales, True, True))
