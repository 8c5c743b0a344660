"""A Mixture-of-Experts layer on a mesh ("expert", "tensor"): dispatch, experts, combine.

Tokens are split over "expert" and so are the experts; the hidden features of every expert are split over "tensor".
Every array below is one device's part: the layer runs inside `jax.shard_map`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from examples.moe.modes import Experts


@jax.custom_vjp
def permute(x: jax.Array, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """`x[order]` for a permutation; the gradient is a gather, too, where JAX would scatter."""
    return x[order]


permute.defvjp(lambda x, order, inverse: (x[order], inverse), lambda inverse, dy: (dy[inverse], None, None))


def sort_by(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stable order of the keys, and its inverse."""
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    return order, jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=jnp.int32), unique_indices=True)


def combine(y: jax.Array, tokens: int, order: jax.Array, inverse: jax.Array) -> jax.Array:
    """Brings sorted rows back to their tokens and adds those of each token: float32 `[tokens, D]`."""
    y = permute(y, inverse, order).reshape(tokens, -1, y.shape[1])
    return jnp.sum(y.astype(jnp.float32), axis=1)


def local(x: jax.Array) -> jax.Array:
    """This device's part, along the "expert" axis, of an array with one row for each of its devices."""
    return jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index("expert"), keepdims=False)


def moe_replicate(params: dict, x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
    """Every device gets all tokens, sorts its experts' to the front and leaves the rest past the sum of the sizes."""
    experts_here, top = params["down"].shape[0], chosen.shape[1]
    x, chosen, weights = (jax.lax.all_gather(a, "expert", tiled=True) for a in (x, chosen, weights))
    expert = chosen.reshape(-1) - experts_here * jax.lax.axis_index("expert")
    expert = jnp.where((expert >= 0) & (expert < experts_here), expert, experts_here)
    order, inverse = sort_by(expert)
    group_sizes = jnp.bincount(expert, length=experts_here + 1)[:experts_here].astype(jnp.int32)
    rows = permute(jnp.repeat(x, top, axis=0), order, inverse)
    y = experts(params, rows, group_sizes, permute(weights.ravel(), order, inverse))
    y = combine(y, x.shape[0], order, inverse)
    return jax.lax.psum(jax.lax.psum_scatter(y, "expert", tiled=True), "tensor")


class Plan(NamedTuple):
    """One side of a `jax.lax.ragged_all_to_all`, an entry for each device of the axis.

    Attributes:
        starts: where the rows for each device start here.
        sizes: how many rows go to each device.
        targets: where they start over there.
    """

    starts: jax.Array
    sizes: jax.Array
    targets: jax.Array


def plans(rows: jax.Array) -> tuple[Plan, Plan]:
    """How rows travel and come back, from `rows[source, destination]`.

    A sender's rows lie in order of destination, a receiver's in order of source.
    """
    sent_from = jnp.cumsum(rows, axis=1, dtype=jnp.int32) - rows
    received_at = jnp.cumsum(rows, axis=0, dtype=jnp.int32) - rows
    there = Plan(local(sent_from), local(rows), local(received_at))
    back = Plan(local(received_at.T), local(rows.T), local(sent_from.T))
    return there, back


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(x: jax.Array, there: Plan, back: Plan, length: int) -> jax.Array:
    """Sends rows to other devices of the axis: `[length, D]`, where rows that nobody sent hold NaN.

    A real model leaves them uninitialised. NaN is the hardest case: one that reached anything would reach the loss. Of
    bytes it is 255, which makes NaN of float8 and of float32.
    """
    nothing = 255 if x.dtype == jnp.uint8 else jnp.nan
    buffer = jax.lax.pcast(jnp.full((length, x.shape[1]), nothing, x.dtype), ("expert", "tensor"), to="varying")
    return jax.lax.ragged_all_to_all(
        x, buffer, there.starts, there.sizes, there.targets, back.sizes, axis_name="expert"
    )


def _exchange_forward(x, there, back, length):
    return exchange(x, there, back, length), (there, back, x.shape[0])


def _exchange_backward(length, residuals, dy):
    there, back, rows = residuals
    # The gradient of rows that were never sent is NaN, too: the linear layers read neither them nor their gradient.
    return exchange(dy, back, there, rows), None, None


exchange.defvjp(_exchange_forward, _exchange_backward)


class Route(NamedTuple):
    """How rows travel to their experts' devices: sorted by expert here, sent, and sorted by expert again there.

    Attributes:
        order, inverse: the sorting here.
        there, back: how sorted rows travel.
        by_expert, by_source: the sorting there, of rows that arrive sorted by source, then expert.
        group_sizes: how many rows each of this device's experts receives.
    """

    order: jax.Array
    inverse: jax.Array
    there: Plan
    back: Plan
    by_expert: jax.Array
    by_source: jax.Array
    group_sizes: jax.Array


def route(expert: jax.Array, experts_here: int) -> Route:
    """The way of this device's rows to the expert of each, with room for the rows of all devices everywhere."""
    devices, length = jax.lax.axis_size("expert"), jax.lax.axis_size("expert") * expert.size
    order, inverse = sort_by(expert)
    counts = jnp.bincount(expert, length=devices * experts_here).astype(jnp.int32)
    counts = jax.lax.all_gather(counts, "expert").reshape(devices, devices, experts_here)  # source, destination, expert
    there, back = plans(counts.sum(axis=2, dtype=jnp.int32))
    sizes = local(counts.swapaxes(0, 1))  # source, expert
    arrived = jnp.repeat(jnp.tile(jnp.arange(experts_here), devices), sizes.ravel(), total_repeat_length=length)
    arrived = jnp.where(jnp.arange(length) < jnp.sum(sizes), arrived, experts_here)
    return Route(order, inverse, there, back, *sort_by(arrived), sizes.sum(axis=0, dtype=jnp.int32))


def send(x: jax.Array, way: Route) -> jax.Array:
    """This device's experts' rows, sorted, NaN behind them."""
    received = exchange(permute(x, way.order, way.inverse), way.there, way.back, way.by_expert.size)
    return permute(received, way.by_expert, way.by_source)


def send_back(y: jax.Array, way: Route) -> jax.Array:
    """Rows of this device's experts to where they came from, sorted as they were sent."""
    return jnp.asarray(exchange(permute(y, way.by_source, way.by_expert), way.back, way.there, way.order.size))


def moe_all_to_all(params: dict, x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: Experts) -> jax.Array:
    """Every device sends its tokens to their experts' devices, into buffers that would hold all tokens of the axis."""
    way = route(chosen.reshape(-1), params["down"].shape[0])
    x, weights = (jax.lax.pcast(a, "tensor", to="varying") for a in (x, weights))
    rows = send(jnp.repeat(x, chosen.shape[1], axis=0), way)
    y = experts(params, rows, way.group_sizes, send(weights.reshape(-1, 1), way)[:, 0])
    return jax.lax.psum(combine(send_back(y, way), x.shape[0], way.order, way.inverse), "tensor")
