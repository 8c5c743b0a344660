"""dequantize: back from FP8 values and scales."""

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_tsq._core import results, validate
from jax_tsq._core.numerics import FP8

T = TypeVar("T", covariant=True)


@runtime_checkable
class Quantized(Protocol[T]):
    """A result type, which knows its own way back."""

    def dequantize(self, dtype: DTypeLike) -> T:
        """What the values stand for."""
        ...


@overload
def dequantize(quantized: Quantized[T], scales: None = None, dtype: DTypeLike = jnp.float32) -> T: ...
@overload
def dequantize(
    quantized: Sequence[jax.Array], scales: Sequence[jax.Array], dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, ...]: ...
def dequantize(
    quantized: Quantized[Any] | Sequence[jax.Array],
    scales: Sequence[jax.Array] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Any:
    """Returns what quantized values stand for, tokens first again.

        x[t, k] = values[k, t] * scales[t // 128, k]          (split and ragged results)
        x[m, k] = values[m, k] * scales[m, k // 128]          (row-wise results)
        w[e, k, n] = values[e, k, n] * scales[e, k // 128, n // 128]     (weights)

    Every result has this as a method, too: `result.dequantize(dtype)`. There is a derivative with respect to scales,
    none with respect to values: a gradient in float8_e4m3fn would lose what is small or large.

    A block that held an infinity has an infinite scale: its finite elements come back as 0 * inf = NaN. On CPU, XLA
    flushes results below 2**-126 to zero.

    Args:
        quantized: a `SplitQuantized`, `RaggedQuantized` (either layout), `RowQuantized` or `BlockQuantized`, or the
            `outs` of a split result, a sequence of float8_e4m3fn `[K, T_i]`. Batch dimensions in front are kept; those
            of a flat result take `jax.vmap(jax_tsq.dequantize)`.
        scales: the `scales` that belong to a sequence of outs, float32 `[ceil(T_i / 128), K]`; None otherwise.
        dtype: floating dtype of the result.

    Returns:
        For a split result the tuple of `[T_i, K]`, for a ragged result `[P, K]` in padded order, for a row-wise result
        `[M, K]`, for weights `[E, K, N]`; all in `dtype`.

    Raises:
        TypeError: quantized is none of these, values or scales have another dtype, or dtype is not a floating dtype.
        ValueError: scales are missing, not wanted, not as many as the values or of another shape; a flat result has
            batch dimensions.
        NotImplementedError: the call is differentiated with respect to values.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (256, 64), jnp.bfloat16)
        >>> quantized = jax_tsq.fused_transpose_split_quant(x, None, [100, 156])
        >>> y = jnp.concatenate(jax_tsq.dequantize(quantized))
        >>> bool(jnp.max(jnp.abs(y - x)) < 0.07 * jnp.max(jnp.abs(x)))
        True

    Blocks and scales are those of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    results.check_dtype(dtype)
    if isinstance(quantized, Quantized):
        if scales is not None:
            raise ValueError(f"scales must be None: a {type(quantized).__name__} brings its own.")
        return quantized.dequantize(dtype)
    rule = "quantized must be a result of jax_tsq, or a sequence of float8_e4m3fn arrays together with scales"
    if hasattr(quantized, "dtype") or not isinstance(quantized, Sequence):
        raise TypeError(
            f"{rule}; got {validate.describe(quantized)}. Pass the result itself; a single expert is [out], [scale]."
        )
    if scales is None and any(getattr(part, "dtype", None) != FP8 for part in quantized):
        parts = ", ".join(
            validate.describe(part) if hasattr(part, "dtype") else type(part).__name__ for part in quantized
        )
        raise TypeError(
            f"{rule}; got a {type(quantized).__name__} of {parts}. Pass the result itself, not its parts, or make it "
            "again, for example jax_tsq.RaggedQuantized(*parts)."
        )
    if scales is None or len(scales) != len(quantized):
        raise ValueError(
            f"scales must be a sequence with one array for each of the {len(quantized)} values; got "
            f"{'None' if scales is None else len(scales)}."
        )
    pairs = zip(quantized, scales, strict=True)
    return tuple(results.dequantize_columns(out, scale, dtype) for out, scale in pairs)
