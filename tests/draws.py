"""Operands of the operations, drawn at random for a `tests.operations.Shape` and a seed."""

import numpy as np

from jax_tsq import BlockQuantized, RaggedQuantized, RowQuantized
from tests import cases, spec
from tests.cases import bfloat16


def tokens(shape, seed, dtype=bfloat16):
    return cases.matrix(seed, np.dtype(dtype), shape.counts, shape.features, shape.kinds, shape.kinds)


def grouped_tokens(shape, seed, dtype=bfloat16):
    x, input_scales = tokens(shape, seed, dtype)
    return x, shape.group_sizes(seed), input_scales


def quantized_pair(shape, seed):
    sizes = -(-shape.features // 32) * 4, 32
    shape = shape._replace(kinds=("normal",))
    drawn = [tokens(shape._replace(features=size), 2 * seed + i)[0] for i, size in enumerate(sizes)]
    return tuple(RaggedQuantized(*spec.ragged(x, shape.group_sizes(seed))) for x in drawn)


def quantized_pair_and_sum(shape, seed):
    x, dy = quantized_pair(shape, seed)
    sums = len(x.padded_sizes), len(x.values), len(dy.values)
    return x, dy, np.random.default_rng(seed).standard_normal(sums).astype(np.float32)


def rows_and_weights(shape, seed, transpose_w=False):
    groups, features = shape.group_sizes(seed), -(-shape.features // 16) * 16
    outputs, shape = features // 2, shape._replace(features=features, kinds=("normal",))
    w = cases.weights(seed, bfloat16, len(groups), *(outputs, features)[:: 1 if transpose_w else -1], shape.kinds)
    x = RowQuantized(*spec.rows(tokens(shape, seed)[0]))
    return x, BlockQuantized(*spec.blocks(w)), groups


def weights(shape, seed, dtype=np.float32):
    return (cases.weights(seed, dtype, 4, shape.features // 2, shape.features // 2, shape.kinds),)


def joined_weights(shape, seed):
    (w,) = weights(shape, seed, bfloat16)
    return (tuple(np.split(w, [w.shape[2] * 5 // 8], axis=2)),)


def gates_and_ups(shape, seed):
    """With sizes and routing weights."""
    shape = shape._replace(features=max(128, shape.features // 256 * 128))  # of h
    gate_up, _ = tokens(shape._replace(features=2 * shape.features), 2 * seed)
    return gate_up, shape.group_sizes(seed), np.random.default_rng(seed).random(shape.tokens, np.float32)


def gates_ups_and_gradients(shape, seed):
    gate_up, *others = gates_and_ups(shape, seed)
    dh, _ = tokens(shape._replace(features=gate_up.shape[1] // 2), 2 * seed + 1)
    return gate_up, dh, *others
