"""Input data with every kind of block, and comparison by bits."""

import jax
import ml_dtypes
import numpy as np

from tests import spec

bfloat16 = ml_dtypes.bfloat16
float8_e4m3fn = ml_dtypes.float8_e4m3fn

# Sizes at the edges of blocks, and one too large for caches whose rows and groups are aligned to nothing:
# (tokens_per_expert, features).
LISTED_SIZES = [
    ([0, 0], 1024),
    ([128, 256], 0),
    ([128], 1),
    ([0, 128, 0, 256], 127),
    ([384, 512, 640], 233),
    ([3072, 128, 6400, 2048], 2162),
    ([1001, 0, 3000, 1154], 1031),
]


def features_for(implementation, features):
    """Fewer where XLA's fusions would take seconds: to them, features are all alike."""
    return min(features, 300) if implementation.name == "reference" else features


def assert_same_bytes(actual, expected):
    """Equal structure, dtypes, shapes and bits, NaNs and signs of zeros included."""
    if isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_bytes(a, e)
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = f"u{expected.dtype.itemsize}"
    a, e = np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits)
    if not np.array_equal(a, e):
        wrong = np.argwhere(a != e)
        first = tuple(wrong[0].tolist())
        raise AssertionError(f"{len(wrong)} of {e.size} differ, first at {first}: got {a[first]:#x}, not {e[first]:#x}")


def _signed(rng, magnitudes):
    return magnitudes.astype(np.uint16) | rng.integers(2, size=magnitudes.shape, dtype=np.uint16) << 15


def _bits(x):
    return x.astype(bfloat16).view(np.uint16)


def _sprinkle(rng, bits, value, share=0.02):
    return np.where(rng.random(bits.shape) < share, value, bits).astype(np.uint16)


def _normal(rng, shape):
    return _bits(rng.standard_normal(shape, np.float32))


# Kinds of blocks, as bits of bfloat16.
BF16_KINDS = {
    "normal": _normal,
    "any finite": lambda rng, shape: _signed(rng, rng.integers(0x7F80, size=shape)),
    "zero": lambda rng, shape: _signed(rng, np.zeros(shape)),
    "subnormal": lambda rng, shape: _signed(rng, rng.integers(0x80, size=shape)),
    "448 / amax overflows": lambda rng, shape: _signed(rng, rng.integers(1, 993, size=shape)),
    "448 / amax about overflows": lambda rng, shape: _signed(rng, rng.integers(980, 1000, size=shape)),
    "largest": lambda rng, shape: _signed(rng, rng.integers(0x7F00, 0x7F80, size=shape)),
    "powers of two": lambda rng, shape: _signed(rng, rng.integers(0xFF, size=shape) << 7),
    "few NaN": lambda rng, shape: _sprinkle(rng, _normal(rng, shape), 0x7FC0),
    "only NaN": lambda rng, shape: _signed(rng, rng.integers(0x7F81, 0x8000, size=shape)),
    "NaN and zero": lambda rng, shape: _sprinkle(rng, _signed(rng, np.zeros(shape)), 0xFFC1, 0.5),
    "few infinities": lambda rng, shape: _sprinkle(rng, _normal(rng, shape), 0xFF80),
    "any": lambda rng, shape: rng.integers(0x10000, size=shape, dtype=np.uint16),
}

# Kinds of fp8 blocks, as bytes, and of the input scales beside them.
FP8_KINDS = {
    "normal": lambda rng, shape: (rng.standard_normal(shape, np.float32) * 64).astype(float8_e4m3fn).view(np.uint8),
    "any": lambda rng, shape: rng.integers(256, size=shape, dtype=np.uint8),
    "zero": lambda rng, shape: rng.integers(2, size=shape, dtype=np.uint8) << 7,
    "subnormal": lambda rng, shape: rng.integers(8, size=shape, dtype=np.uint8),
    "only NaN": lambda rng, shape: np.uint8(0x7F) | rng.integers(2, size=shape, dtype=np.uint8) << 7,
}
SCALE_KINDS = {
    "normal": lambda rng, shape: np.exp(rng.standard_normal(shape, np.float32)),
    "powers of two": lambda rng, shape: np.exp2(rng.integers(-20, 20, size=shape)).astype(np.float32),
    "products subnormal": lambda rng, shape: rng.integers(1, 0x01000000, size=shape, dtype=np.uint32).view(np.float32),
    "products overflow": lambda rng, shape: rng.integers(0x7B000000, 0x7F800000, size=shape, dtype=np.uint32).view(
        np.float32
    ),
    "special": lambda rng, shape: rng.choice(np.float32([0, -0.0, -1.5, np.nan, np.inf, -np.inf]), size=shape),
    "any": lambda rng, shape: rng.integers(2**32, size=shape, dtype=np.uint32).view(np.float32),
}


def _mixed(rng, kinds, names, groups, columns):
    """[len(groups), columns]: every (group of rows, column) draws one of the kinds called `names`."""
    names = list(names)
    shape = (len(groups), columns)
    if len(names) == 1 or 0 in shape:
        return kinds[names[0]](rng, shape)
    choice = rng.integers(len(names), size=(groups.max() + 1, columns))[groups]
    return np.choose(choice, [kinds[name](rng, shape) for name in names])


def matrix(seed, dtype, counts, features, kinds=None, scale_kinds=None, tokens=None):
    """`x` and `input_scales` (None for bf16): each block of each expert is of one kind, drawn from those named.

    Rows from sum(counts) to `tokens` hold bits of the kind "any", their input scales too.
    """
    rng = np.random.default_rng(seed)
    blocks = -(-np.asarray(counts, np.int64) // spec.BLOCK)
    first = np.cumsum(blocks) - blocks
    of_row = [f + np.arange(n) // spec.BLOCK for f, n in zip(first, counts, strict=True)]
    groups = np.concatenate([np.zeros(0, np.int64), *of_row])
    rest = (0 if tokens is None else tokens - len(groups), features)
    if dtype == bfloat16:
        bits = _mixed(rng, BF16_KINDS, kinds or BF16_KINDS, groups, features)
        return np.concatenate([bits, BF16_KINDS["any"](rng, rest)]).view(bfloat16), None
    bits = _mixed(rng, FP8_KINDS, kinds or FP8_KINDS, groups, features)
    x = np.concatenate([bits, FP8_KINDS["any"](rng, rest)]).view(float8_e4m3fn)
    scales = _mixed(rng, SCALE_KINDS, scale_kinds or SCALE_KINDS, groups, -(-features // spec.BLOCK))
    return x, np.concatenate([scales, SCALE_KINDS["any"](rng, (rest[0], scales.shape[1]))])


def weights(seed, dtype, experts, features, outputs, kinds=None):
    """`[experts, features, outputs]` of bfloat16 or float32: each block of 128 x 128 is of one of the kinds named.

    float32 ones have any bits behind those of a bfloat16: halves between two of them in every fourth element.
    """
    rng = np.random.default_rng(seed)
    names = list(kinds or BF16_KINDS)
    shape = (experts, features, outputs)
    blocks = (experts, -(-features // spec.BLOCK), -(-outputs // spec.BLOCK))
    choice = rng.integers(len(names), size=blocks).repeat(spec.BLOCK, 1).repeat(spec.BLOCK, 2)
    bits = np.choose(choice[:, :features, :outputs], [BF16_KINDS[name](rng, shape) for name in names])
    if dtype == bfloat16:
        return bits.view(bfloat16)
    behind = np.where(rng.random(shape) < 0.25, 0x8000, rng.integers(0x10000, size=shape))
    return (bits.astype(np.uint32) << 16 | behind.astype(np.uint32)).view(np.float32)


def normal(shape, dtype=bfloat16, seed=0):
    """Plain data: bf16 of the standard normal distribution, or fp8 with input scales near 1."""
    return matrix(seed, np.dtype(dtype), [shape[0]], shape[1], ["normal"], ["normal"])


def soil_free_memory(device, sizes):
    """Leave bytes that no result holds in freed memory of these sizes, where the next results are likely to lie."""
    for _ in range(3):
        jax.block_until_ready([jax.device_put(np.full(size, 0xAB, np.uint8), device) + np.uint8(0) for size in sizes])
