"""Products of groups by a function like `jax.lax.ragged_dot`: what it closes over, vmap and meshes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import jaxpr_as_fun
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jax_tsq._core import derivatives, meshes, validate

RaggedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Program(NamedTuple):
    """A function like `jax.lax.ragged_dot`, traced.

    Attributes:
        run: the same function of lhs, rhs, group_sizes and the constants.
        constants: what the function closes over. Where those are traced, their trace may have ended when a gradient is
            computed, so they have to be operands of whatever calls `run`.
    """

    run: Callable[..., jax.Array]
    constants: list[jax.Array]


def trace(ragged_dot: RaggedDot, x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> list[Program]:
    """The programs for y and for dx."""
    if not callable(ragged_dot):
        raise TypeError(
            "ragged_dot must be None or a function of lhs, rhs and group_sizes, as jax.lax.ragged_dot is; got "
            f"{validate.describe(ragged_dot)}."
        )
    if ragged_dot is jax.lax.ragged_dot:  # which closes over nothing and returns what it has to
        return [Program(ragged_dot, [])] * 2
    programs = []

    def run(*operands):
        programs.append(_program(ragged_dot, *operands))
        return jax.lax.ragged_dot(*operands)  # for its type: nothing of this is computed

    def both(x, w, group_sizes):
        y = multiply(run, x, w.astype(x.dtype), group_sizes)
        return multiply(run, y, jnp.swapaxes(w, 1, 2).astype(x.dtype), group_sizes)

    jax.eval_shape(both, x, w, group_sizes)
    return programs


def _program(ragged_dot: RaggedDot, *operands: jax.Array) -> Program:
    try:
        return _traced(ragged_dot, *operands)
    except ValueError as error:
        # Explicit mesh axes are Auto in here, but not for what ragged_dot closes over, which JAX refuses to mix.
        # Operands without a mesh go with any.
        try:
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return _traced(ragged_dot, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands))
        except Exception:
            raise error from None


def _traced(ragged_dot: RaggedDot, *operands) -> Program:
    # Not ragged_dot itself, whose jaxpr JAX may know from a call in which it closed over other values.
    closed, result = jax.make_jaxpr(lambda *operands: ragged_dot(*operands), return_shape=True)(*operands)
    shape = (operands[0].shape[0], operands[1].shape[2])
    rule = f"ragged_dot must return one floating array [M, N], here {list(shape)}"
    if not isinstance(result, jax.ShapeDtypeStruct) or not jnp.issubdtype(result.dtype, jnp.floating):
        raise TypeError(f"{rule}; got {validate.describe(result)}.")
    if result.shape != shape:
        raise ValueError(f"{rule}; got {validate.describe(result)}.")

    def with_constants(lhs, rhs, group_sizes, *constants):
        return eval_jaxpr(closed.jaxpr, constants, lhs, rhs, group_sizes)

    run = jaxpr_as_fun(jax.make_jaxpr(with_constants)(*operands, *closed.consts))
    return Program(lambda *operands: run(*operands)[0], closed.consts)


NO_SECOND_DERIVATIVE = (
    "jax_tsq.grouped_linear has no second derivative, because its gradient rounds x and dy to float8_e4m3fn. Where "
    "jax.hessian or a gradient of a gradient is needed, use jax.lax.ragged_dot."
)


def multiply(product: Callable[..., jax.Array], *operands: jax.Array, rows=None, columns=None) -> jax.Array:
    """The products `[..., M, N]` of lhs `[..., M, K]` and rhs `[..., E, K, N]`, 0 past the sum of the sizes.

    Args:
        product: the product of operands without batch dimensions.
        operands: lhs, rhs, group_sizes and constants, with the same batch dimensions in front of all.
        rows, columns: the Explicit mesh axes that rows and columns of the result are split over.
    """
    rank = operands[0].ndim - 2
    leading = zip(*(jax.typeof(operand).sharding.spec[:rank] for operand in operands), strict=True)
    batch = [next((axes for axes in entries if axes is not None), None) for entries in leading]

    def one(lhs, rhs, group_sizes, *constants):
        in_use = jnp.arange(lhs.shape[0]) < jnp.sum(group_sizes)
        return jnp.where(in_use[:, None], product(lhs, rhs, group_sizes, *constants), 0).astype(lhs.dtype)

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
        return multiply(product, *operands, rows=rows, columns=columns), True

    return derivatives.refuse(NO_SECOND_DERIVATIVE, mapped)(*operands)
