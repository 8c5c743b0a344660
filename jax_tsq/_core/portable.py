"""The portable path of products: JAX's own ragged products of dequantized operands."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp


def multiply(product: Callable[..., jax.Array], operands: tuple[jax.Array, ...], batch: tuple[int, ...]) -> jax.Array:
    """`product(dtype, *operands)` for operands dequantized to that dtype, with any batch dimensions in front of each.

    bfloat16 rounds 16 times finer than the values were quantized, and not at all with power-of-two scales. CPUs
    multiply it no faster than float32.
    """

    def batched(dtype, *operands):
        run = functools.partial(product, dtype)
        if not batch:
            return run(*operands)
        rank = len(batch)  # JAX's ragged product takes one batch dimension, not two
        flat = jax.vmap(run)(*(a.reshape(math.prod(batch), *a.shape[rank:]) for a in operands))
        return flat.reshape(*batch, *flat.shape[1:])

    exact, rounded = (functools.partial(batched, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    return jax.lax.platform_dependent(*operands, cpu=exact, default=rounded)
