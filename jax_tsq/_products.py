"""Products of groups by a function like `jax.lax.ragged_dot`, under any vmap and on any mesh."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_tsq._core import meshes

RaggedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def multiply(ragged_dot: RaggedDot, *operands: jax.Array, rows=None, columns=None) -> jax.Array:
    """The products `[..., M, N]` of lhs `[..., M, K]` and rhs `[..., E, K, N]`, 0 past the sum of the sizes.

    Args:
        ragged_dot: the product without batch dimensions.
        operands: lhs, rhs and group_sizes, with the same batch dimensions in front of all.
        rows, columns: the Explicit mesh axes that rows and columns of the result are split over.
    """
    rank = operands[0].ndim - 2
    leading = zip(*(jax.typeof(operand).sharding.spec[:rank] for operand in operands), strict=True)
    batch = [next((axes for axes in entries if axes is not None), None) for entries in leading]

    def one(lhs, rhs, group_sizes):
        product = ragged_dot(lhs, rhs, group_sizes)
        in_use = jnp.arange(product.shape[0]) < jnp.sum(group_sizes)
        return jnp.where(in_use[:, None], product, 0).astype(lhs.dtype)

    def run(*operands):
        if not rank:
            return one(*operands)
        # JAX's ragged product takes one batch dimension, in front of every operand.
        shape = operands[0].shape[:rank]
        products = jax.vmap(one)(*(a.reshape(math.prod(shape), *a.shape[rank:]) for a in operands))
        return products.reshape(*shape, *products.shape[1:])

    @jax.custom_batching.custom_vmap
    def mapped(*operands):
        return meshes.on_auto_axes(run, P(*batch, rows, columns), *operands)

    @mapped.def_vmap
    def _(size, is_mapped, *operands):
        operands = [a if m else jnp.broadcast_to(a, (size, *a.shape)) for a, m in zip(operands, is_mapped, strict=True)]
        return multiply(ragged_dot, *operands, rows=rows, columns=columns), True

    return mapped(*operands)
