"""Products of quantized operands, in float64."""

import numpy as np

from tests.spec.quantizers import BLOCK, bfloat16, taken_rows


def wgrad(x, dy, accumulate=None, dtype=np.float32):
    """dW[e] = X[e]^T dY[e] of RaggedQuantized x and dy, in float64 and then rounded: `[E, K, N]`.

    With `accumulate` it is added to that, of which groups without tokens leave their part as it is.
    """
    tokens = x.values.shape[1]
    a, b = (q.values.astype(np.float64) * np.repeat(q.scales, BLOCK, axis=0).T for q in (x, dy))
    rows = taken_rows(x.padded_sizes, tokens, True)
    ends = np.cumsum(rows)
    parts = [u @ v.T for u, v in zip(np.split(a, ends, axis=1), np.split(b, ends, axis=1), strict=True)]
    dw = np.stack(parts[:-1]).astype(dtype)
    return dw if accumulate is None else np.where((rows > 0)[:, None, None], accumulate + dw, accumulate)


def matmul(x, w, group_sizes, transpose_w=False):
    """y[t] = x[t] w[e] of RowQuantized x and BlockQuantized w, in float64 and then rounded: `[M, N]`, or `[M, K]`."""
    rows = x.values.astype(np.float64) * np.repeat(x.scales, BLOCK, axis=1)[:, : x.values.shape[1]]
    _, features, outputs = w.values.shape
    scales = np.repeat(np.repeat(w.scales, BLOCK, axis=1)[:, :features], BLOCK, axis=2)[..., :outputs]
    weights = w.values.astype(np.float64) * scales
    y = np.zeros((len(rows), features if transpose_w else outputs))
    end = 0
    for size, matrix in zip(taken_rows(group_sizes, len(rows), False), weights, strict=True):
        y[end : end + size] = rows[end : end + size] @ (matrix.T if transpose_w else matrix)
        end += size
    return y.astype(bfloat16)
