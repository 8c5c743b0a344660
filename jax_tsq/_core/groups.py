"""The rule for group sizes: which rows a group takes, and where it lies once every group is padded to whole blocks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jax_tsq._core import results
from jax_tsq._core.numerics import BLOCK


@results.register
class PaddedGroups(NamedTuple):
    """Where groups lie in padded order.

    Attributes:
        sizes: int32 `[E]`, rows of each group, a multiple of 128.
        starts: int32 `[E]`, first row of each group, a multiple of 128.
    """

    sizes: jax.Array
    starts: jax.Array


def padded_length(tokens: int, groups: int, aligned: bool) -> int:
    """P, the rows that any sizes of `groups` groups need once every group is padded."""
    if aligned:
        return -(-tokens // BLOCK) * BLOCK
    return (tokens + (BLOCK - 1) * min(groups, tokens)) // BLOCK * BLOCK


class Placement(NamedTuple):
    """Groups before and after padding: rows in use, their first row in x, and where they go."""

    rows: jax.Array
    starts: jax.Array
    padded: PaddedGroups


def place(group_sizes: jax.Array, tokens: int, aligned: bool) -> Placement:
    """Applies the run-time rule for group sizes `[E]`, whatever their values.

    Negative sizes count as 0, `aligned` rounds down to multiples of 128, and no group reaches past row `tokens`.
    """
    sizes = jnp.maximum(group_sizes, 0)
    if aligned:
        sizes = sizes // BLOCK * BLOCK
    sizes = jnp.minimum(sizes, tokens).astype(jnp.uint32)
    # Saturating at `tokens` <= 2**31 keeps a sum of two within 32 bits, and is associative.
    ends = jax.lax.associative_scan(lambda a, b: jnp.minimum(a + b, jnp.uint32(tokens)), sizes)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    rows = (ends - starts).astype(jnp.int32)
    return Placement(rows, starts.astype(jnp.int32), pad(rows))


def pad(rows: jax.Array) -> PaddedGroups:
    """Where groups of so many rows each lie in padded order."""
    sizes = (rows + (BLOCK - 1)) // BLOCK * BLOCK
    return PaddedGroups(sizes, jnp.cumsum(sizes, dtype=jnp.int32) - sizes)


def source_rows(placement: Placement, tokens: int, length: int) -> jax.Array:
    """For each of `length` padded rows the row of x that belongs there, `tokens` where none does: int32 `[length]`."""
    position = jnp.arange(length, dtype=jnp.int32)
    if placement.rows.size == 0:
        return jnp.full_like(position, tokens)
    group = jnp.searchsorted(placement.padded.starts + placement.padded.sizes, position, side="right", method="sort")
    rows, starts, padded = jax.tree.map(lambda a: jnp.take(a, group, mode="fill", fill_value=0), placement)
    within = position - padded.starts
    return jnp.where(within < rows, starts + within, tokens)
