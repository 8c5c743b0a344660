"""ragged_dot: the signature of `jax.lax.ragged_dot`, differentiable, with FP8 inside."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_tsq._core import validate
from jax_tsq._linear import grouped_linear


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    precision: "jax.lax.PrecisionLike" = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """Multiplies every group of rows by its own matrix, as `jax.lax.ragged_dot` does, from FP8 operands.

        y[t] = lhs[t] @ rhs[e]          for the rows t of group e, 0 past the sum of the sizes

    This is `jax_tsq.grouped_linear(lhs, rhs, group_sizes)` under the name and the arguments that models call, so that
    one word changes at a call site. All that is said there holds here: both gradients are products of FP8 operands,
    too, and rows past the sum of the sizes reach nothing, whatever they hold.

    FP8 rounds to 4 bits whatever the operands' dtype was: a float32 operand is rounded to bfloat16 first, and the sums
    to bfloat16, also where the result is float32. Gradients have the dtypes of lhs and rhs.

    Args:
        lhs: bfloat16 or float32 `[M, K]`, rows sorted by group.
        rhs: bfloat16 or float32 `[E, K, N]`.
        group_sizes: integers `[E]`, rows of each group; their sum is at most M. Checked where they are not traced.
        precision: None or `jax.lax.Precision.DEFAULT`, since more than FP8 cannot be had.
        preferred_element_type: bfloat16 or float32, the dtype of the result; None for the wider one of the operands'.
        group_offset: None. Other values are for weights of which only some groups are here.

    Returns:
        `[M, N]`.

    Raises:
        TypeError: an operand or preferred_element_type is neither bfloat16 nor float32, or group_sizes not integers; or
            it is differentiated in forward mode, which no `jax.custom_vjp` takes.
        ValueError: shapes do not fit together, sizes that are not traced are negative or sum to more than M, or a
            precision is asked for.
        NotImplementedError: group_offset is not None, or a second derivative is taken.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (300, 64), jnp.bfloat16)
        >>> w = jax.random.normal(jax.random.key(1), (4, 64, 32), jnp.bfloat16)
        >>> sizes = jnp.array([100, 0, 150, 50], jnp.int32)
        >>> y = jax_tsq.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
        >>> exact = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
        >>> y.shape, y.dtype, float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact)) < 0.04
        ((300, 32), dtype('float32'), True)

    The form of the arguments is that of `jax.lax.ragged_dot`; the recipe that of DeepSeek-V3 (arXiv:2412.19437, section
    3.3).
    """
    lhs, rhs = _check("lhs", lhs, "[M, K]"), _check("rhs", rhs, "[E, K, N]")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(
            f"lhs must be [M, K] and rhs [E, K, N] with the same K; got {validate.describe(lhs)} and "
            f"{validate.describe(rhs)}. If rhs is [E, N, K], pass jnp.swapaxes(rhs, 1, 2)."
        )
    _check_precision(precision)
    if group_offset is not None:
        raise NotImplementedError(
            "jax_tsq.ragged_dot takes no group_offset, so it must be None. Bring the rows of the groups that are here "
            "to the front, by jnp.roll(lhs, -start, axis=0), pass the sizes of those groups, and roll the result back."
        )
    dtype = _result_dtype(preferred_element_type, lhs, rhs)
    return grouped_linear(lhs.astype(jnp.bfloat16), rhs, group_sizes).astype(dtype)


_DTYPES = (jnp.bfloat16, jnp.float32)


def _check(name: str, operand, dims: str) -> jax.Array:
    rule = f"{name} must be a bfloat16 or float32 array {dims}"
    if not validate.is_array(operand):
        raise TypeError(f"{rule}; got {validate.describe(operand)}. Use jnp.asarray({name}).")
    if operand.dtype not in _DTYPES:
        raise TypeError(f"{rule}; got {validate.describe(operand)}. Cast it, for example to jnp.bfloat16.")
    if len(operand.shape) != dims.count(",") + 1:
        raise ValueError(f"{rule}; got {validate.describe(operand)}. Use jax.vmap for batch dimensions.")
    return jnp.asarray(operand)


def _check_precision(precision) -> None:
    each = precision if isinstance(precision, tuple) else (precision,)
    with contextlib.suppress(ValueError, TypeError):
        if all(p is None or jax.lax.Precision(p) == jax.lax.Precision.DEFAULT for p in each):
            return
    raise ValueError(
        f"precision must be None or jax.lax.Precision.DEFAULT, because jax_tsq.ragged_dot multiplies FP8; got "
        f"{precision!r}. Use jax.lax.ragged_dot where more is needed."
    )


def _result_dtype(preferred: DTypeLike | None, lhs: jax.Array, rhs: jax.Array) -> np.dtype:
    if preferred is None:
        return jnp.promote_types(lhs.dtype, rhs.dtype)
    with contextlib.suppress(TypeError):
        if (resolved := np.dtype(preferred)) in _DTYPES:
            return resolved
    raise TypeError(f"preferred_element_type must be None, bfloat16 or float32; got {preferred!r}.")
