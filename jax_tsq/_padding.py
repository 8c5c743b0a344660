"""Groups in padded rows: every group starts on a multiple of 128 and is padded to one."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import PartitionSpec as P

from jax_tsq._core import meshes, validate
from jax_tsq._core.groups import PaddedGroups, pad, padded_length, place, source_rows


def padded_tokens(tokens: int, groups: int, *, aligned: bool = False) -> int:
    """Returns P, the rows that any group sizes need once every group is padded to a multiple of 128.

        P = (tokens + 127 * min(groups, tokens)) rounded down to a multiple of 128
        P = tokens rounded up to a multiple of 128, if aligned

    At most `min(groups, tokens)` groups are not empty, and each is padded with at most 127 rows.

    Args:
        tokens: M, rows of the array before padding.
        groups: E, number of groups.
        aligned: whether all sizes are multiples of 128 already.

    Returns:
        P, an int.

    Raises:
        TypeError: tokens or groups is not an int, or aligned is not a bool.
        ValueError: tokens or groups is negative.

    Example:
        >>> import jax_tsq
        >>> jax_tsq.padded_tokens(1000, 8), jax_tsq.padded_tokens(1024, 8, aligned=True)
        (1920, 1024)

    The 128 is a block of tokens that share a scale, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    tokens, groups = validate.check_count("tokens", tokens), validate.check_count("groups", groups)
    return padded_length(tokens, groups, validate.check_flag("aligned", aligned))


def pad_group_sizes(group_sizes: jax.Array) -> PaddedGroups:
    """Returns the sizes and starts of groups whose sizes are rounded up to multiples of 128.

        sizes[i] = ceil(group_sizes[i] / 128) * 128
        starts[i] = sizes[0] + ... + sizes[i - 1]

    Args:
        group_sizes: integers `[E]`, traced or not; negative sizes count as 0.

    Returns:
        `PaddedGroups(sizes, starts)`, both int32 `[E]`, in rows.

    Raises:
        TypeError: group_sizes is not an integer array.
        ValueError: group_sizes is not one-dimensional, or a size that is not traced does not fit into int32.

    Example:
        >>> import jax.numpy as jnp, jax_tsq
        >>> sizes, starts = jax_tsq.pad_group_sizes(jnp.array([5, 0, 128, 129], jnp.int32))
        >>> sizes.tolist(), starts.tolist()
        ([128, 0, 128, 256], [0, 128, 128, 256])

    The 128 is a block of tokens that share a scale, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    return pad(jnp.maximum(_gathered(validate.check_sizes(group_sizes)), 0))


def pad_rows(x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Brings rows into the padded order of `jax_tsq.ragged_transpose_quant`, zeros in between. Differentiable.

        y[padded_start[i] + r] = x[start[i] + r]   for r < group_sizes[i], and 0 elsewhere

    Args:
        x: `[M, ...]` of any dtype, rows sorted by group. Rows past the sum of the sizes are not read.
        group_sizes: integers `[E]`, as for `ragged_transpose_quant`: checked where they are not traced.

    Returns:
        `[P, ...]` in x's dtype, P = `padded_tokens(M, E)`; on Explicit mesh axes split as x is, rows only if evenly.

    Raises:
        TypeError: x is not an array or group_sizes is not an integer array.
        ValueError: x has no dimensions, group_sizes is not one-dimensional, or sizes that are not traced are negative
            or sum to more than M.

    Example:
        >>> import jax.numpy as jnp, jax_tsq
        >>> y = jax_tsq.pad_rows(jnp.ones((3, 2)), jnp.array([1, 2], jnp.int32))
        >>> y.shape, y[:, 0].nonzero()[0].tolist()
        ((256, 2), [0, 128, 129])

    The 128 is a block of tokens that share a scale, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    x = validate.check_rows("x", x)
    tokens = x.shape[0]
    group_sizes = validate.check_sizes(group_sizes, tokens)
    length = padded_tokens(tokens, group_sizes.shape[0])

    def run(x, group_sizes):
        index = source_rows(place(group_sizes, tokens, aligned=False), tokens, length)
        return jnp.take(x, index, axis=0, mode="fill", fill_value=0)

    return _move_rows(run, length, x, group_sizes)


def _move_rows(run: Callable, length: int, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Runs a gather of `length` rows. On Explicit mesh axes its result is split as x is, rows only if evenly."""
    sharding = jax.typeof(x).sharding
    rows, *rest = sharding.spec
    axes = rows if isinstance(rows, tuple) else (rows,)
    if rows is not None and length % math.prod(sharding.mesh.shape[axis] for axis in axes):
        rows = None
    return meshes.on_auto_axes(run, P(rows, *rest), x, _gathered(group_sizes))


def _gathered(group_sizes: jax.Array) -> jax.Array:
    """All sizes on every device, if Explicit mesh axes split them."""
    return meshes.on_auto_axes(lambda sizes: sizes, P(None), group_sizes)


def unpad_rows(y: jax.Array, group_sizes: jax.Array, tokens: int) -> jax.Array:
    """Brings rows back from padded order: the inverse of `pad_rows` on the rows in use. Differentiable.

        x[start[i] + r] = y[padded_start[i] + r]   for r < group_sizes[i], and 0 past the sum of the sizes

    Args:
        y: `[P, ...]` of any dtype, P at least what the group sizes need, for example `padded_tokens(tokens, E)`.
        group_sizes: integers `[E]`, the sizes **before** padding; checked where they are not traced.
        tokens: M, rows of the result.

    Returns:
        `[tokens, ...]` in y's dtype; on Explicit mesh axes split as y is, rows only if evenly.

    Raises:
        TypeError: y is not an array, group_sizes is not an integer array or tokens is not an int.
        ValueError: y has no dimensions, group_sizes is not one-dimensional, tokens is negative, or sizes that are not
            traced are negative or sum to more than `tokens`.

    Example:
        >>> import jax.numpy as jnp, jax_tsq
        >>> sizes = jnp.array([1, 2], jnp.int32)
        >>> jax_tsq.unpad_rows(jax_tsq.pad_rows(jnp.array([3, 4, 5, 6]), sizes), sizes, 4).tolist()
        [3, 4, 5, 0]

    The 128 is a block of tokens that share a scale, as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    y, tokens = validate.check_rows("y", y), validate.check_count("tokens", tokens)
    group_sizes = validate.check_sizes(group_sizes, tokens)

    def run(y, group_sizes):
        rows, starts, padded = place(group_sizes, tokens, aligned=False)
        position = jnp.arange(tokens, dtype=jnp.int32)
        group = jnp.searchsorted(starts + rows, position, side="right", method="sort")
        shift = jnp.take(padded.starts - starts, group, mode="fill", fill_value=y.shape[0])
        # An overflowing index would wrap around: rows of no group point just past the end.
        index = jnp.where(group < group_sizes.shape[0], position + shift, y.shape[0])
        return jnp.take(y, index, axis=0, mode="fill", fill_value=0)

    return _move_rows(run, tokens, y, group_sizes)


def check_group_sizes(group_sizes: jax.Array, tokens: int, *, aligned: bool = False) -> None:
    """Raises if group sizes are not what `jax_tsq.ragged_transpose_quant` expects; for debugging.

    Compiled programs cannot raise on data, so there invalid sizes are clipped silently instead. Called with traced
    sizes, inside `jax.jit` for example, this function puts a `jax.debug.callback` into the program, which copies the
    sizes to the host in every run and raises there: the program fails with an error that holds the message, at the
    latest in `jax.effects_barrier()`. Do not leave it in a training loop, least of all on several devices, which may
    wait in vain for the one that failed.

    Args:
        group_sizes: integers `[E]`, traced or not.
        tokens: M, the rows that the groups share.
        aligned: whether the sizes must be multiples of 128.

    Returns:
        None.

    Raises:
        TypeError: group_sizes is not an integer array, tokens is not an int or aligned not a bool.
        ValueError: group_sizes is not one-dimensional, a size is negative or does not fit into int32, the sum exceeds
            `tokens`, or with `aligned` a size is not a multiple of 128.

    Example:
        >>> import jax.numpy as jnp, jax_tsq
        >>> jax_tsq.check_group_sizes(jnp.array([128, 0, 256], jnp.int32), 512, aligned=True)
    """
    tokens, aligned = validate.check_count("tokens", tokens), validate.check_flag("aligned", aligned)
    checked = validate.check_sizes(group_sizes, tokens, aligned=aligned)
    if isinstance(checked, Tracer):
        check = functools.partial(validate.check_known_sizes, tokens=tokens, aligned=aligned)
        jax.debug.callback(lambda sizes: check(np.asarray(sizes)), group_sizes)
