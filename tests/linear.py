"""Operands of grouped_linear, the ways to call it, and its results."""

from functools import partial

import jax
import numpy as np

import jax_tsq
from tests.cases import bfloat16

SIZES, TOKENS, FEATURES, OUTPUTS = (300, 0, 129, 128, 77), 700, 208, 96
USED = sum(SIZES)

OPTIONS = {"fp8": {}, "fp8 pow2": dict(pow_2_scales=True)}
FUNCTION = {  # y and dx by a function
    f"function{name}": dict(ragged_dot=jax.lax.ragged_dot, **options)
    for name, options in {
        "": {},
        " pow2": dict(pow_2_scales=True),
        " residuals": dict(fp8_residuals=True),
        " residuals pow2": dict(pow_2_scales=True, fp8_residuals=True),
    }.items()
}
EVERY = OPTIONS | FUNCTION


def operands(seed=0, w_dtype=np.float32, tail=0.0, tokens=TOKENS, sizes=SIZES):
    """x, w, sizes and dy; rows past the sum of the sizes hold `tail`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, FEATURES)).astype(bfloat16)
    dy = (rng.standard_normal((tokens, OUTPUTS)) * 1e-3).astype(bfloat16)
    w = (rng.standard_normal((len(sizes), FEATURES, OUTPUTS)) / 16).astype(w_dtype)
    x[sum(sizes) :], dy[sum(sizes) :] = tail, tail
    return x, w, np.array(sizes, np.int32), dy


@partial(jax.jit, static_argnames=("pow_2_scales", "fp8_residuals", "ragged_dot"))
def jitted(x, w, sizes, dy, **options):
    y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes, **options), x, w)
    return y, *pullback(dy)


def value_and_gradients(*arrays, device=None, **options):
    """y, dx and dw as numpy arrays."""
    return [np.asarray(a) for a in jitted(*jax.device_put(arrays, device), **options)]
