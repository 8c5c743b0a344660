"""Checks that several operations share. Each error names the argument, the rule, what was got and the fix."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jax_tsq._core.numerics import BLOCK, FP8


def describe(value) -> str:
    """What was got, for error messages: dtype and shape of arrays, otherwise type and value."""
    if is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple | dict) and any(map(is_array, parts := jax.tree.leaves(value))):
        return f"{type(value).__name__} of {', '.join(map(describe, parts))}"[:200]
    return f"{type(value).__name__} {value!r}"[:200]


def is_array(value) -> bool:
    """Whether a value has a shape and a dtype that is numpy's, as JAX's are; those of other libraries are their own."""
    return hasattr(value, "shape") and isinstance(getattr(value, "dtype", None), np.dtype)


def fix_for(name: str, value, *, join: str, dtype: str | None = None) -> str:
    """How to make an array of a value that is none; `join` is the function that joins several arrays."""
    if isinstance(value, list | tuple) and any(map(is_array, value)):
        return f"Use {join}({name})."
    if hasattr(value, "__dlpack__") and not is_array(value):
        return f"Use jnp.from_dlpack({name})."
    return f"Use jnp.asarray({name}{f', {dtype}' if dtype else ''})."


def check_flag(name: str, value) -> bool:
    """Returns a bool for a bool or numpy bool."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, known when tracing; got {describe(value)}.")
    return bool(value)


def check_tokens(x, *, name: str = "x", dtypes=(jnp.bfloat16, FP8)) -> jax.Array:
    """Returns x `[M, K]` as a JAX array, of one of the dtypes."""
    names = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
    if getattr(x, "_fields", None) == ("values", "scales"):
        fix = (
            "x.values with input_scales=x.scales"
            if FP8 in dtypes
            else f"jax_tsq.dequantize({name}, dtype=jnp.bfloat16)"
        )
        raise TypeError(f"{name} must be an array of dtype {names}; got {describe(x)}. Pass {fix}.")
    if not is_array(x):
        fix = fix_for(name, x, dtype="jnp.bfloat16", join="jnp.concatenate")
        raise TypeError(f"{name} must be an array of dtype {names}; got {describe(x)}. {fix}")
    if x.dtype not in [jnp.dtype(dtype) for dtype in dtypes]:
        fix = f"Cast it first, for example {name}.astype(jnp.bfloat16)."
        if x.dtype == FP8:
            fix = f"Cast it by jax_tsq.dequantize(jax_tsq.RowQuantized({name}, scales), dtype=jnp.bfloat16)."
        elif "float8" in x.dtype.name:
            fix = "Multiply it by its scales in float32, if it has any, and cast the product by .astype(jnp.bfloat16)."
        raise TypeError(f"{name} must have dtype {names}; got {describe(x)}. {fix}")
    if len(x.shape) != 2:
        raise ValueError(
            f"{name} must be two-dimensional, [tokens, features]; got {describe(x)}. Reshape it, or use jax.vmap for "
            "batch dimensions, with in_axes None for operands that have none."
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
    if not is_array(input_scales):
        raise TypeError(f"input_scales must be an array, {rule}; got {describe(input_scales)}.")
    if input_scales.dtype != jnp.float32:
        raise TypeError(f"input_scales must be {rule}; got {describe(input_scales)}. Cast them to float32.")
    if tuple(input_scales.shape) != shape:
        raise ValueError(
            f"input_scales must be {rule}; got {describe(input_scales)}. They are row-wise, [M, ceil(K / 128)]."
        )
    return jnp.asarray(input_scales)


def check_sizes(group_sizes, tokens: int | None = None, *, aligned: bool = False) -> jax.Array:
    """Returns group sizes as an int32 `[E]` array.

    Values that are known when tracing must fit into int32 and, if the number of tokens that groups share is given, keep
    the rules of `check_known_sizes`. Traced values of another dtype are clipped to int32.
    """
    rule = "group_sizes must be an integer array with one size for each group"
    if not is_array(group_sizes) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise TypeError(f"{rule}; got {describe(group_sizes)}. Use jnp.asarray(group_sizes, jnp.int32).")
    if len(group_sizes.shape) != 1:
        raise ValueError(f"{rule}, one-dimensional; got {describe(group_sizes)}. Use jax.vmap for batch dimensions.")
    known, int32, own = known_values(group_sizes), jnp.iinfo(jnp.int32), jnp.iinfo(group_sizes.dtype)
    if known is not None:
        _check_each(f"fit into int32, up to {int32.max}", known, (known < int32.min) | (known > int32.max))
        if tokens is not None:
            check_known_sizes(known, tokens, aligned=aligned)
        if not isinstance(group_sizes, jax.Array):  # JAX would wrap values of 64 bits around
            return jnp.asarray(known.astype(np.int32))
    if own.min < int32.min or own.max > int32.max:
        group_sizes = jnp.clip(group_sizes, max(own.min, int32.min), min(own.max, int32.max))
    return jnp.asarray(group_sizes).astype(jnp.int32)


def known_values(array) -> np.ndarray | None:
    """The values of an array, or None if it is traced or lies on devices of other processes."""
    if isinstance(array, Tracer) or not getattr(array, "is_fully_addressable", True):
        return None
    return np.asarray(jax.device_get(array))  # explicitly, which transfer guards let pass


def check_known_sizes(group_sizes: np.ndarray, tokens: int, *, aligned: bool) -> None:
    """Raises if sizes are negative, sum to more than the tokens or, with `aligned`, are no multiples of 128."""
    _check_each("not be negative", group_sizes, group_sizes < 0)
    if aligned:
        _check_each(f"be multiples of {BLOCK}", group_sizes, group_sizes % BLOCK != 0)
    total = sum(group_sizes.tolist())
    if total > tokens:
        raise ValueError(
            f"group_sizes must sum to at most the {tokens} tokens; got a sum of {total}. They count tokens without "
            "padding, unlike the padded_sizes of a result."
        )


def _check_each(rule: str, group_sizes: np.ndarray, broken: np.ndarray) -> None:
    if broken.any():
        i = int(broken.argmax())
        raise ValueError(f"group_sizes must {rule}; got {group_sizes[i]} for group {i}.")


def check_equal_sizes(first: jax.Array, second: jax.Array) -> None:
    """Raises if the padded sizes of the two operands of a product are known when tracing, and differ."""
    if first is second or (a := known_values(first)) is None or (b := known_values(second)) is None:
        return
    if (a != b).any():
        i = int((a != b).argmax())
        raise ValueError(
            f"x and dy must be quantized by the same group sizes; got {a[i]} and {b[i]} padded tokens for group {i}."
        )


def check_part(name: str, array, dtype) -> None:
    """Raises unless a part of a quantized operand is an array of a dtype."""
    if not is_array(array) or array.dtype != dtype:
        raise TypeError(f"{name} must be {jnp.dtype(dtype)}; got {describe(array)}.")


def check_scales(name: str, values, scales, shape: tuple[int, ...]) -> None:
    """Raises unless the scales of a quantized operand have the shape that goes with its values."""
    if tuple(scales.shape) != shape:
        raise ValueError(
            f"{name}.scales must be {list(shape)} for values {list(values.shape)}; got {list(scales.shape)}. "
            "Pass the scales that came with the values."
        )


def check_rows(name: str, x) -> jax.Array:
    """Returns an array with at least one dimension."""
    if not is_array(x):
        raise TypeError(f"{name} must be an array; got {describe(x)}. {fix_for(name, x, join='jnp.concatenate')}")
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
