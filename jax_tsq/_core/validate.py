"""Checks that several operations share. Each error names the argument, the rule, what was got and the fix."""

import operator

import jax
import jax.numpy as jnp
import numpy as np

from jax_tsq._core.numerics import BLOCK, FP8


def describe(value) -> str:
    """What was got, for error messages: dtype and shape of arrays, otherwise type and value."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:200]


def check_flag(name: str, value) -> bool:
    """Returns a bool for a bool or numpy bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, known when tracing; got {describe(value)}.")
    return bool(value)


def check_tokens(x, *, dtypes=(jnp.bfloat16, FP8)) -> jax.Array:
    """Returns x `[M, K]` as a JAX array, of one of the dtypes."""
    names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"x must be an array of dtype {names}; got {describe(x)}. Use jnp.asarray(x, jnp.bfloat16).")
    if x.dtype not in [jnp.dtype(dtype) for dtype in dtypes]:
        raise TypeError(
            f"x must have dtype {names}; got {describe(x)}. Cast it first, for example x.astype(jnp.bfloat16)."
        )
    if len(x.shape) != 2:
        raise ValueError(
            f"x must be two-dimensional, [tokens, features]; got {describe(x)}. Reshape it, or use jax.vmap for "
            "batch dimensions."
        )
    return jnp.asarray(x)


def check_input_scales(input_scales, x: jax.Array) -> jax.Array | None:
    """Returns the scales that go with a float8_e4m3fn x, or None for a bfloat16 x."""
    if x.dtype != FP8:
        if input_scales is not None:
            raise ValueError(
                f"input_scales must be None for a bfloat16 x; got {describe(input_scales)}. They are the row-wise "
                "dequantization scales of a float8_e4m3fn x."
            )
        return None
    shape = (x.shape[0], -(-x.shape[1] // BLOCK))
    rule = f"float32{list(shape)}, one dequantization scale for each token and 128 features of the float8_e4m3fn x"
    if input_scales is None:
        raise ValueError(f"input_scales must be {rule}; got None. jax_tsq.quantize_rows returns both.")
    if not hasattr(input_scales, "dtype") or not hasattr(input_scales, "shape"):
        raise TypeError(f"input_scales must be an array, {rule}; got {describe(input_scales)}.")
    if input_scales.dtype != jnp.float32:
        raise TypeError(f"input_scales must be {rule}; got {describe(input_scales)}. Cast them to float32.")
    if tuple(input_scales.shape) != shape:
        raise ValueError(
            f"input_scales must be {rule}; got {describe(input_scales)}. They are row-wise, [M, ceil(K / 128)]."
        )
    return jnp.asarray(input_scales)


def check_sizes(group_sizes) -> jax.Array:
    """Returns group sizes as an int32 `[E]` array."""
    rule = "group_sizes must be an int32 array with one size for each group"
    if not hasattr(group_sizes, "dtype") or group_sizes.dtype != jnp.int32:
        raise TypeError(f"{rule}; got {describe(group_sizes)}. Use jnp.asarray(group_sizes, jnp.int32).")
    if len(group_sizes.shape) != 1:
        raise ValueError(f"{rule}, one-dimensional; got {describe(group_sizes)}. Use jax.vmap for batch dimensions.")
    return jnp.asarray(group_sizes)


def check_rows(name: str, x) -> jax.Array:
    """Returns an array with at least one dimension."""
    if not hasattr(x, "dtype") or not hasattr(x, "shape"):
        raise TypeError(f"{name} must be an array; got {describe(x)}. Use jnp.asarray.")
    if not x.shape:
        raise ValueError(f"{name} must have rows, [rows, ...]; got {describe(x)}.")
    return jnp.asarray(x)


def check_count(name: str, value) -> int:
    """Returns a non-negative int."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, known when tracing; got {describe(value)}.") from None
    if count < 0:
        raise ValueError(f"{name} must not be negative; got {count}.")
    return count
