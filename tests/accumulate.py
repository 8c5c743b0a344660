"""Losses of the functions that take accumulators, training steps over microbatches, and what their programs hold."""

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from jax_tsq._core import ffi, kernels
from tests import linear, mlp
from tests.cases import bfloat16


def linear_loss(sums, x, w, sizes, dy, **options):
    y = jax_tsq.grouped_linear(x, w, sizes, accumulate=sums, **options)
    return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum()


def mlp_loss(sums, x, w, sizes, dy, **options):
    quantized = options.pop("quantized_w", None)
    w_gate_up, w_down = w
    y = jax_tsq.moe_mlp(x, w_gate_up, w_down, sizes, quantized_weights=quantized, accumulate=sums, **options)
    return (y.astype(jnp.float32) * dy.astype(jnp.float32)).sum()


def linear_operands(dtype: Any = np.float32):
    x, w, sizes, dy = linear.operands(w_dtype=dtype)
    return x, w, sizes, dy


def mlp_operands(dtype: Any = np.float32, pair=False):
    made = mlp.operands(dtype=dtype)
    if pair:
        made = mlp.pair(made)
    return made.x, (made.w_gate_up, made.w_down), made.sizes, made.dy


FUNCTIONS = {
    "linear": (linear_loss, linear_operands, {}),
    "linear pow2": (linear_loss, linear_operands, dict(pow_2_scales=True)),
    "linear bfloat16": (linear_loss, partial(linear_operands, bfloat16), {}),
    "function": (linear_loss, linear_operands, dict(ragged_dot=jax.lax.ragged_dot)),
    "function residuals": (linear_loss, linear_operands, linear.FUNCTION["function residuals pow2"]),
    "mlp": (mlp_loss, mlp_operands, {}),
    "mlp bfloat16": (mlp_loss, partial(mlp_operands, bfloat16), {}),
    "mlp pair": (mlp_loss, partial(mlp_operands, pair=True), dict(limit=0.75)),
}


def sums_for(w, seed=5):
    """Accumulators for these weights, with numbers that an addition of zero would change."""
    rng = np.random.default_rng(seed)

    def one(w):
        a = rng.standard_normal(w.shape).astype(np.float32)
        a[:, ::7] = -0.0
        return a

    return jax.tree.map(one, w)


def added(sums, dw, sizes):
    """One float32 addition for groups with tokens."""
    used = (np.asarray(sizes) > 0)[:, None, None]
    return jax.tree.map(lambda a, d: np.where(used, a + np.asarray(d, np.float32), a), sums, dw)


def plain(loss, x, w, sizes, dy, **options):
    """Loss, dx and float32 dw without accumulators; weights of bfloat16 are exact in float32."""
    w = jax.tree.map(lambda a: np.asarray(a, np.float32), w)
    run = jax.jit(jax.value_and_grad(lambda x, w: loss(None, x, w, sizes, dy, **options), (0, 1)))
    value, (dx, dw) = run(x, w)
    return value, dx, dw


MICROBATCHES = 4


def step(loss, sums, xs, w, sizes, dy):
    """Microbatches that share weights which are quantized once; the sums are the carry."""
    quantized = tuple(map(jax_tsq.quantize_blocks, w if isinstance(w, tuple) else [w]))
    quantized = quantized if isinstance(w, tuple) else quantized[0]

    def microbatch(sums, x):
        gradient = jax.value_and_grad(loss, (0, 1))
        value, (sums, dx) = gradient(sums, x, w, sizes, dy, quantized_w=quantized)
        return sums, (value, dx)

    return jax.lax.scan(microbatch, sums, xs)


def arguments_of(name):
    loss, make, _ = FUNCTIONS[name]
    x, w, sizes, dy = make()
    xs = np.stack([np.roll(x, i, 1) for i in range(MICROBATCHES)])
    return loss, (sums_for(w), xs, w, sizes, dy)


def instructions(compiled, shapes, inside=("%fused_computation", "%wrapped_")):
    """What makes arrays of these shapes, but in computations whose names start with `inside`: those of fusions.

    On a GPU a call with a part of another call's result is put into a custom fusion, and counted there alone.
    """
    found = Counter()
    for computation in re.split(r"\n\n", compiled.as_text()):
        if computation.lstrip().startswith(inside):
            continue
        for shape in shapes:
            dims = ",".join(map(str, shape))
            found.update(re.findall(rf"= f32\[{dims}\]\S* (?!fusion\(.*kind=kCustom)([\w-]+)\(", computation))
    return found


def compile_native(patch):
    """Makes all calls native, as on a Hopper GPU. Programs are compiled and never run, so any handler will do."""
    known = {(platform, name): handler for platform, name, handler in ffi._native.targets()}
    for target in kernels.OPERATIONS:
        if ("cpu", target) not in known:
            jax.ffi.register_ffi_target(target, known["cpu", "jax_tsq.rows"], platform="cpu")
    patch.setattr(kernels, "takes_native", lambda *_: True)
