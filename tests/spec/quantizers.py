"""Quantizers: blocks of tokens, of features, or of both share a scale."""

import ml_dtypes
import numpy as np

BLOCK = 128
FP8_MAX = np.float32(448)
LARGEST_BF16 = np.float32(float.fromhex("0x1.FEp127"))
FP8_NAN = 0x7F

bfloat16 = ml_dtypes.bfloat16
float8_e4m3fn = ml_dtypes.float8_e4m3fn


def quant_scale(amax, pow_2_scales):
    """The scale of blocks whose largest magnitudes are `amax` (float32, never NaN)."""
    with np.errstate(divide="ignore", over="ignore"):
        q = np.where(amax == 0, np.float32(1), FP8_MAX / amax)
    q = np.where(np.isinf(q), LARGEST_BF16, q)
    if pow_2_scales:
        q = (q.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # 0 stays 0
    return q


def to_fp8(x):
    """Round float32 to nearest even, saturate, and write every NaN as one byte."""
    values = np.clip(x, -FP8_MAX, FP8_MAX).astype(float8_e4m3fn)
    values.view(np.uint8)[np.isnan(x)] = FP8_NAN
    return values


def quantize(v, pow_2_scales):
    """[T, K] bfloat16 -> values [T, K], scales [ceil(T / 128), K]: blocks of 128 rows, the last one shorter."""
    v = v.astype(np.float32)
    blocks = -(-len(v) // BLOCK)
    padded = np.zeros((blocks * BLOCK, v.shape[1]), np.float32)
    padded[: len(v)] = v
    padded = padded.reshape(blocks, BLOCK, v.shape[1])
    # Not np.fmax, which lets signalling NaNs win.
    amax = np.where(np.isnan(padded), 0, np.abs(padded)).max(axis=1, initial=0)
    q = quant_scale(amax, pow_2_scales)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = to_fp8((padded * q[:, None]).reshape(blocks * BLOCK, v.shape[1])[: len(v)])
        return values, np.float32(1) / q


def load(x, input_scales):
    """[M, K] bfloat16: `x` itself, or float8_e4m3fn `x` times its row-wise 1x128 scales, rounded."""
    if x.dtype == bfloat16:
        return x
    scales = np.repeat(input_scales, BLOCK, axis=1)[:, : x.shape[1]]
    with np.errstate(invalid="ignore", over="ignore"):
        return (x.astype(np.float32) * scales).astype(bfloat16)


def split(x, input_scales, tokens_per_expert, pow_2_scales=False):
    """One ([K, T_i], [ceil(T_i / 128), K]) for each expert, as two lists."""
    ends = np.cumsum(tokens_per_expert, dtype=np.int64)
    parts = np.split(load(x, input_scales), ends[:-1]) if len(ends) else []
    results = [quantize(part, pow_2_scales) for part in parts]
    return [np.ascontiguousarray(values.T) for values, _ in results], [scales for _, scales in results]


def taken_rows(group_sizes, tokens, aligned):
    """Rows that each group gets, whatever the sizes say: negative is 0, `aligned` means whole blocks, M is the end."""
    sizes = np.maximum(np.asarray(group_sizes, np.int64), 0)
    if aligned:
        sizes -= sizes % BLOCK
    ends = np.minimum(np.cumsum(sizes), tokens)
    return np.diff(ends, prepend=0)


def padded_tokens(tokens, groups, aligned=False):
    rows = tokens + BLOCK - 1 if aligned else tokens + (BLOCK - 1) * min(groups, tokens)
    return rows // BLOCK * BLOCK


def ragged(x, group_sizes, input_scales=None, pow_2_scales=False, aligned=False, layout="packed"):
    """Values [K, P] or flat [K * P], scales [P / 128, K], padded sizes int32 [E]."""
    tokens, features = x.shape
    sizes = taken_rows(group_sizes, tokens, aligned)
    padded_sizes = -(-sizes // BLOCK) * BLOCK
    padded = np.zeros((padded_tokens(tokens, len(sizes), aligned), features), bfloat16)
    used = int(sizes.sum())
    padded[padded_rows(sizes)] = load(x[:used], None if input_scales is None else input_scales[:used])
    values, scales = quantize(padded, pow_2_scales)
    if layout == "flat":
        groups = np.split(values, np.cumsum(padded_sizes))  # the last one is what is left
        values = np.concatenate([group.T.ravel() for group in groups])
    else:
        values = np.ascontiguousarray(values.T)
    return values, scales, padded_sizes.astype(np.int32)


def padded_rows(sizes):
    """Where each row in use goes in the padded order."""
    sizes = np.asarray(sizes, np.int64)
    padded_sizes = -(-sizes // BLOCK) * BLOCK
    shift = (np.cumsum(padded_sizes) - padded_sizes) - (np.cumsum(sizes) - sizes)
    return np.arange(sizes.sum()) + np.repeat(shift, sizes)


def rows(x, group_sizes=None, pow_2_scales=False, aligned=False):
    """[M, K] bfloat16 -> values [M, K], scales [M, ceil(K / 128)]: blocks of 128 features. Rows of no group are 0."""
    if group_sizes is not None:
        x = x.copy()
        x[taken_rows(group_sizes, len(x), aligned).sum() :] = 0
    values, scales = quantize(x.T, pow_2_scales)
    return np.ascontiguousarray(values.T), np.ascontiguousarray(scales.T)


def dual(x, group_sizes, pow_2_scales=False, aligned=False):
    """Values and scales of the rows, then values, scales and padded sizes of the columns."""
    columns = ragged(x, group_sizes, None, pow_2_scales, aligned)
    return *rows(x, group_sizes, pow_2_scales, aligned), *columns


def blocks(w, pow_2_scales=False):
    """[E, K, N], or several joined along N -> values, transposed, scales `[E, ceil(K / 128), ceil(N / 128)]`."""
    parts = [w] if isinstance(w, np.ndarray) else w
    with np.errstate(over="ignore", invalid="ignore"):
        v = np.concatenate([part.astype(bfloat16).astype(np.float32) for part in parts], axis=2)
    experts, features, outputs = v.shape
    tall, broad = (max(1, min(BLOCK, size)) for size in (features, outputs))  # of a block
    high, wide = -(-features // tall), -(-outputs // broad)
    padded = np.zeros((experts, high * tall, wide * broad), np.float32)
    padded[:, :features, :outputs] = v
    padded = padded.reshape(experts, high, tall, wide, broad)
    q = quant_scale(np.where(np.isnan(padded), 0, np.abs(padded)).max(axis=(2, 4), initial=0), pow_2_scales)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = to_fp8(padded * q[:, :, None, :, None]).reshape(experts, high * tall, wide * broad)
        values = np.ascontiguousarray(values[:, :features, :outputs])
        return values, np.ascontiguousarray(values.transpose(0, 2, 1)), np.float32(1) / q
