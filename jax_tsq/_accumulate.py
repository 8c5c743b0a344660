"""Accumulators of weight gradients through differentiation, whose cotangent is the running sum."""

import jax

from jax_tsq._ragged import RaggedQuantized
from jax_tsq._wgrad import ragged_weight_gradient


def keep(function: str, y: jax.Array, accumulate):
    """What the forward pass keeps of accumulators, an array or a tree of some.

    Refuses accumulators that all examples of a `jax.vmap` share: JAX sums the gradient of what is shared over the
    examples, so that the accumulator would count once for each of them.
    """

    @jax.custom_batching.custom_vmap
    def with_result(y, accumulate):
        return accumulate

    @with_result.def_vmap
    def _(size, is_mapped, y, accumulate):
        if is_mapped[0] and not is_mapped[1]:
            raise ValueError(
                f"accumulate must be mapped by jax.vmap where another operand of jax_tsq.{function} is, because every "
                "example has a sum of its own. Broadcast it along the mapped dimension."
            )
        return with_result(y, accumulate), True

    return jax.tree.map(lambda a: with_result(y, a), accumulate)


def total(x: RaggedQuantized, dy: RaggedQuantized, accumulate: jax.Array) -> jax.Array:
    """`accumulate + dW`, in place where every device that has a term has an accumulator of its own.

    An accumulator that devices share inside `jax.shard_map` gets the sum of their terms.
    """
    varying = [jax.typeof(a).manual_axis_type.varying for a in (x.values, dy.values)]
    shared = frozenset().union(*varying) - jax.typeof(accumulate).manual_axis_type.varying
    if shared:
        return accumulate + jax.lax.psum(ragged_weight_gradient(x, dy), tuple(shared))
    return ragged_weight_gradient(x, dy, accumulate=accumulate)
