"""fused_transpose_split_quant: every implementation against the numpy specification, and its properties by name."""

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
POW_2 = pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])

# Shapes of the generated cases: few, because every shape is a compilation and the data is what varies.
SHAPES = [
    ((), [128, 256], 16),
    ((), [1, 0, 127, 129, 0, 300], 33),
    ((), [5], 200),
    ((), [260, 3], 129),
    ((2,), [130, 0, 64], 31),
    ((2, 3), [40], 7),
]


def from_float(rows):
    """[M, K] bfloat16 of nested lists or a float array."""
    return np.asarray(rows, np.float32).astype(bfloat16)


def split_one(implementation, column, pow_2_scales=False):
    """Bytes of one expert's only column, and its first scale."""
    x = from_float(column)[:, None]
    outs, scales = implementation.split(x, None, [len(x)], pow_2_scales)
    return outs[0][0].view(np.uint8), scales[0][:, 0]


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([bfloat16, float8_e4m3fn]),
    pow_2_scales=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    fp8_kinds=st.sets(st.sampled_from(sorted(FP8_KINDS))),
    scale_kinds=st.sets(st.sampled_from(sorted(SCALE_KINDS))),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_specification(implementation, shape, dtype, pow_2_scales, kinds, fp8_kinds, scale_kinds, seed):
    """Generated cases: any mixture of kinds of blocks, sizes of every sort, batches."""
    batch, counts, features = shape
    of_dtype = kinds if dtype == bfloat16 else fp8_kinds
    seeds = np.random.SeedSequence(seed).spawn(int(np.prod(batch)))
    parts = [matrix(s, dtype, counts, features, sorted(of_dtype), sorted(scale_kinds)) for s in seeds]
    x, input_scales = stacked(parts, batch)
    expected = stacked_results([spec.split(*part, counts, pow_2_scales) for part in parts], batch)
    assert_same_bytes(implementation.split(x, input_scales, counts, pow_2_scales), expected)


def stacked(parts, batch):
    """Inputs of a batch, as arrays with its leading dimensions."""
    x, input_scales = zip(*parts, strict=True)
    scales = None if input_scales[0] is None else np.stack(input_scales).reshape(batch + input_scales[0].shape)
    return np.stack(x).reshape(batch + x[0].shape), scales


def stacked_results(results, batch):
    """Results of the specification, stacked like the inputs."""
    return [
        [np.stack(parts).reshape(batch + parts[0].shape) for parts in zip(*lists, strict=True)]
        for lists in zip(*results, strict=True)
    ]


@DTYPES
@pytest.mark.parametrize(("counts", "features"), LISTED_SIZES, ids=str)
def test_listed_sizes(implementation, counts, features, dtype):
    """Empty sizes, odd ones and large ones."""
    kinds = ["normal", "any", "few NaN"] if dtype == bfloat16 else ["normal", "any"]
    features = features_for(implementation, features)
    x, input_scales = matrix(11, dtype, counts, features, kinds, ["normal"])
    for pow_2_scales in [False, True]:
        actual = implementation.split(x, input_scales, counts, pow_2_scales)
        assert_same_bytes(actual, spec.split(x, input_scales, counts, pow_2_scales))


@POW_2
def test_every_bf16_value(implementation, pow_2_scales):
    """All 65,536 values of bfloat16, alone as block maxima and beside other maxima."""
    maxima = np.uint16([0, 1, 0x7F, 0x80, 0x3E0, 0x3E1, 0x3F80, 0x4040, 0x43E0, 0x7F7F, 0x7F80, 0x7FC0])
    x = np.empty([2 * len(maxima), 65536], np.uint16)
    x[::2] = np.arange(65536, dtype=np.uint16)
    x[1::2] = maxima[:, None]
    x = x.view(bfloat16)
    counts = [2] * len(maxima)
    assert_same_bytes(implementation.split(x, None, counts, pow_2_scales), spec.split(x, None, counts, pow_2_scales))


@POW_2
def test_every_fp8_value(implementation, pow_2_scales):
    """All 256 values of float8_e4m3fn times input scales of every binade, ties of the rounding to bf16 included."""
    rng = np.random.default_rng(0)
    exponents = np.arange(256, dtype=np.uint32) << 23
    ties = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0x18000, 0x7FFFFF, 0x7F8000])
    mantissas = np.concatenate([ties, rng.integers(2**23, size=24, dtype=np.uint32)])
    scales = (exponents[:, None] | mantissas | rng.integers(2, size=[256, 32], dtype=np.uint32) << 31).reshape(-1, 1)
    scales = scales.view(np.float32)[:, None]
    # A batch of experts of one token: an amax is the element itself, so that the dequantization scale shows every bit
    # of the rounded product. Even entries hold the positive half of the values, odd ones the negative half.
    x = np.tile(np.arange(256, dtype=np.uint8), len(scales) // 2).reshape(len(scales), 1, 128).view(float8_e4m3fn)
    values, dequant_scales = spec.quantize(spec.load(x[:, 0], scales[:, 0]).reshape(1, -1), pow_2_scales)
    expected = [values.reshape(len(scales), 128, 1)], [dequant_scales.reshape(len(scales), 1, 128)]
    assert_same_bytes(implementation.split(x, scales, [1], pow_2_scales), expected)


def test_many_experts(implementation):
    """More experts than one launch takes (1,024), most of them small; fewer where XLA would compile for a minute."""
    rng = np.random.default_rng(3)
    experts = 100 if implementation.name == "reference" else 1031
    counts = rng.choice([0, 1, 2, 3, 130], p=[0.2, 0.3, 0.3, 0.18, 0.02], size=experts).tolist()
    x, _ = matrix(3, bfloat16, counts, 5, ["normal", "few NaN"])
    assert_same_bytes(implementation.split(x, None, counts), spec.split(x, None, counts))


def test_no_experts(implementation):
    """No experts and no tokens: two empty tuples."""
    assert implementation.split(np.zeros([0, 8], bfloat16), None, []) == ((), ())


def test_huge(implementation):
    """More than 2^31 elements: tokens repeat with a period of 3 blocks, and so do the results."""
    if implementation.name != "native cuda":
        pytest.skip("takes a GPU's memory bandwidth")
    features, repeats = 7168, 782
    assert 3 * 128 * repeats * features > 2**31
    period = jnp.asarray(normal([384, features])[0])
    x = jnp.tile(period, (repeats, 1))
    (small,), (small_scales,) = jax_tsq.fused_transpose_split_quant(period, None, [384])
    (out,), (scales,) = jax_tsq.fused_transpose_split_quant(x, None, [len(x)])

    @jax.jit
    def repeated(out, small):
        bits, small_bits = (jax.lax.bitcast_convert_type(a, jnp.uint8) for a in (out, small))
        return (bits.reshape(features, repeats, 384) == small_bits[:, None]).all()

    assert repeated(out, small)
    assert (scales.reshape(repeats, 3, features) == small_scales).all()


@POW_2
def test_never_saturates(implementation, pow_2_scales):
    """No finite element is clipped: amax * quantization scale stays within 448 plus rounding, for every finite amax.

    448 / amax is rounded, so the product may pass 448 by one part in 2^24, never by a step of float8_e4m3fn.
    """
    amax = np.arange(1, 0x7F80, dtype=np.uint16).view(bfloat16)
    outs, scales = implementation.split(amax[None], None, [1], pow_2_scales)
    unclipped = amax.astype(np.float64) / scales[0][0].astype(np.float64)
    assert unclipped.max() <= 448 * (1 + 2**-22)
    assert (outs[0][:, 0].astype(np.float32) <= 448).all()
    normal_scale = scales[0][0] >= np.finfo(np.float32).tiny
    error = outs[0][normal_scale, 0].astype(np.float64) / unclipped[normal_scale] - 1
    assert np.abs(error).max() <= 2**-4


def test_power_of_two_scales(implementation):
    """Scales are powers of two, at least the plain ones and less than twice as large."""
    x, _ = normal([300, 33])
    scales = implementation.split(x, None, [172, 128], True)[1]
    plain = implementation.split(x, None, [172, 128], False)[1]
    for pow_2, any_scale in zip(scales, plain, strict=True):
        assert not (pow_2.view(np.uint32) & 0x7FFFFF).any()
        assert (any_scale <= pow_2).all() and (pow_2 < 2 * any_scale).all()


@POW_2
def test_nan_stays_alone(implementation, pow_2_scales):
    """A NaN, of any sign and payload, becomes the byte 0x7F and changes nothing else."""
    clean, _ = normal([128, 64])
    clean[5] = 0
    dirty = clean.copy()
    dirty.view(np.uint16)[5] = np.resize(np.uint16([0x7F81, 0x7FC0, 0xFFC0, 0xFFFF]), 64)
    expected, scales = implementation.split(clean, None, [128], pow_2_scales)
    expected[0].view(np.uint8)[:, 5] = 0x7F
    assert_same_bytes(implementation.split(dirty, None, [128], pow_2_scales), (expected, scales))


def test_zero_block(implementation):
    """A block of zeros has scale 1 and keeps the signs."""
    values, scales = split_one(implementation, [0.0, -0.0, -0.0, 0.0])
    assert values.tolist() == [0, 0x80, 0x80, 0] and scales.tolist() == [1]


def test_only_nan(implementation):
    """A block of only NaNs has scale 1."""
    values, scales = split_one(implementation, [np.nan, -np.nan, np.nan, np.nan])
    assert values.tolist() == [0x7F] * 4 and scales.tolist() == [1]


@POW_2
def test_infinite_amax(implementation, pow_2_scales):
    """An infinity becomes NaN, its block's scale infinity, and the finite elements zeros with their signs."""
    values, scales = split_one(implementation, [-np.inf, 1, -1, np.nan], pow_2_scales)
    assert values.tolist() == [0x7F, 0, 0x80, 0x7F] and scales.tolist() == [np.inf]


@pytest.mark.parametrize(("pow_2_scales", "quant_scale"), [(False, "0x1.FEp127"), (True, "0x1p127")])
@pytest.mark.parametrize("amax", [2.0**-133, 2.0**-126, 1.3165537e-36])
def test_subnormal_scale(implementation, amax, pow_2_scales, quant_scale):
    """Where 448 / amax overflows, the quantization scale is the largest bfloat16 or 2^127: the scale is subnormal."""
    quant_scale = np.float32(float.fromhex(quant_scale))
    values, scales = split_one(implementation, [amax, -amax], pow_2_scales)
    quantized = np.float32(amax).astype(bfloat16).astype(np.float32) * quant_scale
    assert_same_bytes(scales, np.float32([1 / quant_scale]))
    assert 0 < scales[0] < np.finfo(np.float32).tiny
    assert values.view(float8_e4m3fn).tolist() == [quantized.astype(float8_e4m3fn), -quantized.astype(float8_e4m3fn)]


def test_round_to_nearest_even(implementation):
    """Halfway between two values of float8_e4m3fn, the even one wins: scale 1, elements exact."""
    values, scales = split_one(implementation, [448, 17, 19, 18, -17, 2**-10, 3 * 2**-10, 1.0625, 1.1875])
    assert scales.tolist() == [1]
    assert values.view(float8_e4m3fn).astype(float).tolist() == [448, 16, 20, 18, -16, 0, 2**-8, 1, 1.25]


def test_fp8_product_rounds_to_bf16(implementation):
    """fp8 input is multiplied by its input scale and rounded to bfloat16 before the maximum is taken."""
    x = np.full([1, 1], 1, float8_e4m3fn)
    scale = np.float32([[1 + 3 * 2**-8]])  # halfway between two values of bfloat16: the even one is 1 + 2^-6
    outs, scales = implementation.split(x, scale, [1])
    assert_same_bytes(scales[0], np.float32([[1]]) / (np.float32(448) / np.float32(1 + 2**-6)))
    assert outs[0].astype(np.float32).tolist() == [[448]]


@DTYPES
def test_empty_expert(implementation, dtype):
    """Experts without tokens have entries of the right shapes and change nothing for the others."""
    x, input_scales = normal([200, 130], dtype)
    outs, scales = implementation.split(x, input_scales, [0, 72, 0, 0, 128, 0])
    assert [out.shape[1] for out in outs] == [0, 72, 0, 0, 128, 0]
    assert [scale.shape for scale in scales] == [(n, 130) for n in [0, 1, 0, 0, 1, 0]]
    without = implementation.split(x, input_scales, [72, 128])
    assert_same_bytes(([outs[1], outs[4]], [scales[1], scales[4]]), without)


@DTYPES
def test_partial_block(implementation, dtype):
    """The last block of an expert ends with the expert, as if zeros followed: the next expert's tokens do not count."""
    x, input_scales = normal([300, 130], dtype)
    x[172:] = 448  # would raise the first expert's amax
    outs, scales = implementation.split(x, input_scales, [172, 128])
    first = x[:256].copy()
    first[172:] = 0
    padded, padded_scales = implementation.split(first, None if input_scales is None else input_scales[:256], [256])
    assert_same_bytes((outs[0], scales[0]), (padded[0][:, :172], padded_scales[0]))


@DTYPES
def test_experts_are_independent(implementation, dtype):
    """Each expert's result is what its tokens alone give."""
    x, input_scales = matrix(7, dtype, [100, 156, 44], 33)
    outs, scales = implementation.split(x, input_scales, [100, 156, 44])
    for rows, out, scale in zip(np.split(np.arange(300), [100, 256]), outs, scales, strict=True):
        alone = implementation.split(x[rows], None if input_scales is None else input_scales[rows], [len(rows)])
        assert_same_bytes(([out], [scale]), alone)


@POW_2
def test_equals_rowwise_of_transpose(implementation, pow_2_scales):
    """Quantizing along tokens is quantizing the transpose along features: equal bytes."""
    x, _ = matrix(5, bfloat16, [300], 40)
    outs, scales = implementation.split(x, None, [300], pow_2_scales)
    values, row_scales = spec.rows(np.ascontiguousarray(x.T), None, pow_2_scales)
    assert_same_bytes((outs[0], scales[0].T), (values, row_scales))
    public = jax_tsq.quantize_rows(jnp.asarray(x.T), pow_2_scales=pow_2_scales)
    assert_same_bytes((outs[0], scales[0].T), list(public))


@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,)], ids=str)
@DTYPES
def test_batch(implementation, dtype, shape):
    """Leading batch dimensions, an empty one too: every entry equals its own call."""
    counts = [130, 0, 64]
    parts = [matrix(seed, dtype, counts, 31) for seed in range(int(np.prod(shape)))]
    if not parts:
        x, input_scales = (None if a is None else a[None][:0] for a in matrix(0, dtype, counts, 31))
        outs, scales = implementation.split(x, input_scales, counts)
        assert [out.shape for out in outs] == [(0, 31, n) for n in counts]
        assert [scale.shape for scale in scales] == [(0, n, 31) for n in [2, 0, 1]]
        return
    expected = stacked_results([spec.split(*part, counts) for part in parts], shape)
    assert_same_bytes(implementation.split(*stacked(parts, shape), counts), expected)


def test_every_byte_is_written(implementation):
    """Results do not depend on what their memory held before."""
    x, _ = matrix(1, bfloat16, [130, 126], 257)
    expected = spec.split(x, None, [130, 126])
    for _ in range(5):
        soil_free_memory(implementation.device, [part.nbytes for parts in expected for part in parts])
        assert_same_bytes(implementation.split(x, None, [130, 126]), expected)


@POW_2
def test_signalling_nan(implementation, pow_2_scales):
    """Signalling NaNs (quiet bit clear) are skipped too, wherever in the block: C's fmax lets them win."""
    patterns = np.uint16([0x7F81, 0xFF81, 0x7FBF, 0xFFA0])
    x, _ = normal([128, 130])
    rows = np.random.default_rng(0).integers(128, size=[3, 130])
    for row in rows:
        x.view(np.uint16)[row, np.arange(130)] = np.resize(patterns, 130)
    x.view(np.uint16)[127, ::3] = 0x7F81
    x.view(np.uint16)[0, ::5] = 0xFF81
    actual = implementation.split(x, None, [128], pow_2_scales)
    assert_same_bytes(actual, spec.split(x, None, [128], pow_2_scales))


def test_result_type():
    """A NamedTuple of tuples, and a pytree that keeps its type."""
    result = jax_tsq.fused_transpose_split_quant(jnp.ones([4, 2], jnp.bfloat16), None, [1, 3])
    assert type(result) is jax_tsq.SplitQuantized and result._fields == ("outs", "scales")
    assert type(result.outs) is tuple and type(result.scales) is tuple
    outs, scales = result
    assert outs is result.outs and scales is result.scales
    assert type(jax.tree.map(lambda a: a, result)) is jax_tsq.SplitQuantized
    assert len(jax.tree.leaves(result)) == 4


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array, lambda counts: [np.int64(n) for n in counts]])
def test_kinds_of_counts(kind):
    """Counts may be a list or tuple of ints, numpy integers, a numpy array or a concrete JAX array."""
    x = jnp.ones([300, 3], jnp.bfloat16)
    expected = jax_tsq.fused_transpose_split_quant(x, None, [172, 128])
    assert_same_bytes(jax_tsq.fused_transpose_split_quant(x, None, kind([172, 128])), expected)


def test_numpy_inputs():
    """numpy arrays and numpy's bool are taken as they are."""
    x, input_scales = normal([8, 5], float8_e4m3fn)
    result = jax_tsq.fused_transpose_split_quant(x, input_scales, [8], np.True_)
    assert_same_bytes(result, spec.split(x, input_scales, [8], True))
