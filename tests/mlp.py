"""Operands of moe_mlp, its results, and what the specification says of them."""

import functools
from typing import NamedTuple

import jax
import numpy as np

import jax_tsq
from jax_tsq import BlockQuantized, RaggedQuantized, RowQuantized
from tests import spec
from tests.cases import bfloat16

SIZES, TOKENS, WIDTH, FEATURES = (150, 0, 129, 128, 77), 500, 192, 256
OPTIONS = {"": {}, "pow2": dict(pow_2_scales=True), "limit": dict(limit=0.75)}


class Operands(NamedTuple):
    """What `moe_mlp` takes, and dy."""

    x: np.ndarray
    w_gate_up: np.ndarray
    w_down: np.ndarray
    weights: np.ndarray | None
    sizes: np.ndarray
    dy: np.ndarray


def operands(seed=0, dtype=np.float32, tail=0.0, features=FEATURES) -> Operands:
    """Rows past the sum of the sizes hold `tail`, in x, dy and weights."""
    rng = np.random.default_rng(seed)
    x, dy = (rng.standard_normal((TOKENS, WIDTH)).astype(bfloat16) for _ in range(2))
    w_gate_up = (rng.standard_normal((len(SIZES), WIDTH, 2 * features)) / WIDTH**0.5).astype(dtype)
    w_down = (rng.standard_normal((len(SIZES), features, WIDTH)) / features**0.5).astype(dtype)
    weights = rng.random(TOKENS, np.float32)
    for a in (x, dy, weights):
        a[sum(SIZES) :] = tail
    return Operands(x, w_gate_up, w_down, weights, np.int32(SIZES), dy)


def value_and_gradients(x, w_gate_up, w_down, weights, sizes, dy, **options):
    """y, and the gradients of x, of both expert weights and of the routing weights."""

    def run(x, w_gate_up, w_down, weights):
        return jax_tsq.moe_mlp(x, w_gate_up, w_down, sizes, weights, **options)

    y, pullback = jax.vjp(run, x, w_gate_up, w_down, weights)
    return y, *pullback(dy)


@functools.partial(jax.jit, static_argnames=("pow_2_scales", "limit"))
def jitted(operands, **options):
    return value_and_gradients(*operands, **options)


def expected(x, w_gate_up, w_down, weights, sizes, dy, pow_2_scales=False, limit=None):
    """The dataflow in numpy: exact products of quantized operands."""
    w1, w2 = (BlockQuantized(*spec.blocks(w, pow_2_scales)) for w in (w_gate_up, w_down))

    def both(x):
        *parts, sizes_ = spec.dual(x, sizes, pow_2_scales)
        return RowQuantized(*parts[:2]), RaggedQuantized(*parts[2:], sizes_)

    x_rows, x_columns = both(x)
    gate_up = spec.matmul(x_rows, w1, sizes)
    y = spec.matmul(RowQuantized(*spec.swiglu_quantize(gate_up, sizes, weights, pow_2_scales, limit)), w2, sizes)
    dy_rows, dy_columns = both(dy)
    dh = spec.matmul(dy_rows, w2, sizes, transpose_w=True)
    *do1, h_values, h_scales, padded, dweights = spec.swiglu_backward_quantize(
        gate_up, dh, sizes, weights, pow_2_scales, limit=limit
    )
    dx = spec.matmul(RowQuantized(*do1[:2]), w1, sizes, transpose_w=True)
    dw_gate_up = spec.wgrad(x_columns, RaggedQuantized(*do1[2:], padded)).astype(w_gate_up.dtype)
    dw_down = spec.wgrad(RaggedQuantized(h_values, h_scales, padded), dy_columns).astype(w_down.dtype)
    return y, dx, dw_gate_up, dw_down, dweights


@functools.partial(jax.jit, static_argnames=("pow_2_scales", "limit"))
def composed(operands, pow_2_scales=False, limit=None):
    """The dataflow of the public functions."""
    x, w_gate_up, w_down, weights, sizes, dy = operands
    quantize = functools.partial(jax_tsq.ragged_quantize, group_sizes=sizes, pow_2_scales=pow_2_scales)
    options = dict(pow_2_scales=pow_2_scales, limit=limit)
    w1, w2 = (jax_tsq.quantize_blocks(w, pow_2_scales=pow_2_scales) for w in (w_gate_up, w_down))
    (x_rows, x_columns), (dy_rows, dy_columns) = quantize(x), quantize(dy)
    gate_up = jax_tsq.ragged_matmul(x_rows, w1, sizes)
    y = jax_tsq.ragged_matmul(jax_tsq.swiglu_quantize(gate_up, sizes, weights, **options), w2, sizes)
    dh = jax_tsq.ragged_matmul(dy_rows, w2, sizes, transpose_w=True)
    rows, columns, h, dweights = jax_tsq.swiglu_backward_quantize(gate_up, dh, sizes, weights, **options)
    dx = jax_tsq.ragged_matmul(rows, w1, sizes, transpose_w=True)
    dw_gate_up = jax_tsq.ragged_weight_gradient(x_columns, columns, dtype=w_gate_up.dtype)
    return y, dx, dw_gate_up, jax_tsq.ragged_weight_gradient(h, dy_columns, dtype=w_down.dtype), dweights


def errors(actual, wanted):
    """Relative errors of results, with the norm of each whole array."""
    results = []
    for a, e in zip(actual, wanted, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        results.append(np.linalg.norm(a - e) / np.linalg.norm(e))
    return results


def pair(operands: Operands) -> Operands:
    """With gates' and ups' weights apart."""
    return operands._replace(w_gate_up=tuple(np.split(operands.w_gate_up, 2, axis=2)))
