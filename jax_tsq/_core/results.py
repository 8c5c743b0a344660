"""What result types share: how they are made known to JAX, and the way back from FP8."""

import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from jax_tsq._core import jax_internals, validate
from jax_tsq._core.numerics import BLOCK, FP8

T = TypeVar("T")


def register(cls: type[T]) -> type[T]:
    """Class decorator for a NamedTuple that programs return: `jax.export` can write it, by its name.

    A module that is loaded again, as notebooks do, gets the class of the first time, so that results from before are
    still results.
    """
    name = f"jax_tsq.{cls.__name__}"
    known: Any = jax_internals.deserialization_registry.get(name, (None,))[0]
    if known is not None and known._fields == vars(cls)["_fields"]:
        return known
    return jax.export.register_namedtuple_serialization(cls, serialized_name=name)


def check_dtype(dtype: DTypeLike) -> None:
    """Raises unless values can be dequantized to this dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {dtype!r}.")


def dequantize_columns(values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`[..., T, K]` of values `[..., K, T]` and scales `[..., ceil(T / 128), K]`."""
    if values.ndim < 2:
        raise ValueError(f"values must be [K, T]; got {validate.describe(values)}.")
    features, tokens = values.shape[-2:]
    _check(values, scales, "[ceil(T / 128), K]", (-(-tokens // BLOCK), features))
    return multiply(jnp.swapaxes(values, -1, -2), spread(scales, -2, tokens), dtype)


def dequantize_rows(values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`[..., M, K]` of values `[..., M, K]` and scales `[..., M, ceil(K / 128)]`."""
    tokens, features = values.shape[-2:]
    _check(values, scales, "[M, ceil(K / 128)]", (tokens, -(-features // BLOCK)))
    return multiply(values, spread(scales, -1, features), dtype)


def dequantize_blocks(values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`[..., K, N]` of values `[..., K, N]` and scales `[..., ceil(K / 128), ceil(N / 128)]`."""
    if values.ndim < 2:
        raise ValueError(f"values must be [K, N]; got {validate.describe(values)}.")
    rows, columns = values.shape[-2:]
    _check(values, scales, "[ceil(K / 128), ceil(N / 128)]", (-(-rows // BLOCK), -(-columns // BLOCK)))
    return multiply(values, spread(spread(scales, -2, rows), -1, columns), dtype)


def _check(values, scales, rule: str, shape) -> None:
    """Raises unless values are float8_e4m3fn, scales float32, and the scales' last two dimensions as they should be."""
    if values.dtype != FP8 or scales.dtype != jnp.float32:
        raise TypeError(
            f"values must be float8_e4m3fn and scales float32; got {validate.describe(values)} and "
            f"{validate.describe(scales)}."
        )
    expected = (*values.shape[:-2], *shape)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales must be {rule}, here {list(expected)} for values {list(values.shape)}; got {list(scales.shape)}. "
            "Pass the scales that came with the values."
        )


def spread(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats each scale for the elements of its block, the last of which may be shorter."""
    # Not jnp.repeat, which has no rule for Explicit mesh axes.
    axis %= scales.ndim
    if not scales.shape[axis]:
        return scales
    before, after = scales.shape[: axis + 1], scales.shape[axis + 1 :]
    repeated = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), (*before, BLOCK, *after))
    elements = repeated.reshape(*before[:-1], before[-1] * BLOCK, *after)
    return jax.lax.slice_in_dim(elements, 0, size, axis=axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def multiply(values: jax.Array, scales: jax.Array, dtype: DTypeLike) -> jax.Array:
    """values * scales of one shape, in `dtype`. It has a derivative with respect to the scales alone."""
    check_dtype(dtype)
    # XLA:CPU takes subnormal scales for 0, though the product with a value may be normal.
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    values = values.astype(jnp.float32)
    subnormal = (values * (bits.astype(jnp.float32) * np.float32(2.0**-85))) * np.float32(2.0**-64)
    is_subnormal = bits < 1 << 23
    return jnp.where(is_subnormal, subnormal, values * scales).astype(dtype)


@functools.partial(multiply.defjvp, symbolic_zeros=True)
def _multiply_jvp(dtype, primals, tangents):
    (values, scales), (values_tangent, scales_tangent) = primals, tangents
    if not isinstance(values_tangent, SymbolicZero):
        raise NotImplementedError(
            "jax_tsq.dequantize has no derivative with respect to float8_e4m3fn values: in their dtype small gradients "
            "are 0 and large ones NaN. Call it inside a jax.custom_vjp whose backward pass says what the gradient is, "
            "or put jax.lax.stop_gradient around the result that it dequantizes."
        )
    return multiply(values, scales, dtype), (values.astype(jnp.float32) * scales_tangent).astype(dtype)
