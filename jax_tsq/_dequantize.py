"""dequantize: back from FP8 values and scales."""

from collections.abc import Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_tsq import _ragged
from jax_tsq._core import validate
from jax_tsq._core.groups import PaddedGroups
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._ragged import RaggedQuantized
from jax_tsq._rows import RowQuantized
from jax_tsq._split import SplitQuantized


@overload
def dequantize(
    quantized: RaggedQuantized | RowQuantized, scales: None = None, dtype: DTypeLike = jnp.float32
) -> jax.Array: ...
@overload
def dequantize(
    quantized: SplitQuantized, scales: None = None, dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, ...]: ...
@overload
def dequantize(
    quantized: Sequence[jax.Array], scales: Sequence[jax.Array], dtype: DTypeLike = jnp.float32
) -> tuple[jax.Array, ...]: ...
def dequantize(
    quantized: SplitQuantized | RaggedQuantized | RowQuantized | Sequence[jax.Array],
    scales: Sequence[jax.Array] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array | tuple[jax.Array, ...]:
    """Returns what quantized values stand for, tokens first again.

        x[t, k] = values[k, t] * scales[t // 128, k]          (split and ragged results)
        x[m, k] = values[m, k] * scales[m, k // 128]          (row-wise results)

    A block that held an infinity has an infinite scale: its finite elements come back as 0 * inf = NaN. On CPU, XLA
    flushes results below 2**-126 to zero.

    Args:
        quantized: a `SplitQuantized`, `RaggedQuantized` (either layout) or `RowQuantized`, or the `outs` of a split
            result, a sequence of float8_e4m3fn `[K, T_i]`. Batch dimensions in front are kept; those of a flat result
            take `jax.vmap(jax_tsq.dequantize)`.
        scales: the `scales` that belong to a sequence of outs, float32 `[ceil(T_i / 128), K]`; None otherwise.
        dtype: floating dtype of the result.

    Returns:
        For a split result the tuple of `[T_i, K]`, for a ragged result `[P, K]` in padded order, for a row-wise result
        `[M, K]`; all in `dtype`.

    Raises:
        TypeError: quantized is none of these, values or scales have another dtype, or dtype is not a floating dtype.
        ValueError: scales are missing, not wanted, not as many as the values or of another shape; a flat result has
            batch dimensions.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (256, 64), jnp.bfloat16)
        >>> quantized = jax_tsq.fused_transpose_split_quant(x, None, [100, 156])
        >>> y = jnp.concatenate(jax_tsq.dequantize(quantized))
        >>> bool(jnp.max(jnp.abs(y - x)) < 0.07 * jnp.max(jnp.abs(x)))
        True
    """
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a floating dtype; got {dtype!r}.")
    if isinstance(quantized, SplitQuantized | RaggedQuantized | RowQuantized):
        if scales is not None:
            raise ValueError(f"scales must be None: a {type(quantized).__name__} brings its own.")
        match quantized:
            case RaggedQuantized():
                return _columns(_packed_values(quantized), quantized.scales, dtype)
            case RowQuantized():
                values, row_scales = quantized
                tokens, features = values.shape[-2:]
                _check(values, row_scales, "[M, ceil(K / 128)]", (tokens, -(-features // BLOCK)))
                return _scale(values, _spread(row_scales, -1, features), dtype)
            case SplitQuantized():
                quantized, scales = quantized
    if hasattr(quantized, "dtype") or not isinstance(quantized, Sequence):
        raise TypeError(
            "quantized must be a result of jax_tsq, or a sequence of float8_e4m3fn arrays together with scales; got "
            f"{validate.describe(quantized)}. A single expert is [out], [scale]."
        )
    if scales is None or len(scales) != len(quantized):
        raise ValueError(
            f"scales must be a sequence with one array for each of the {len(quantized)} values; got "
            f"{'None' if scales is None else len(scales)}."
        )
    return tuple(_columns(out, scale, dtype) for out, scale in zip(quantized, scales, strict=True))


def _packed_values(quantized: RaggedQuantized) -> jax.Array:
    """The values `[..., K, P]` of either layout."""
    values, (*_, blocks, features) = quantized.values, quantized.scales.shape
    if values.ndim == quantized.scales.ndim:
        return values
    if values.ndim != 1:
        raise ValueError(
            f"quantized must have no batch dimensions in the flat layout; got values {validate.describe(values)}. "
            "Use jax.vmap(jax_tsq.dequantize)."
        )
    sizes = quantized.padded_sizes
    groups = PaddedGroups(sizes, jnp.cumsum(sizes, dtype=jnp.int32) - sizes)
    lines = values.reshape(-1, BLOCK)
    packed_line = _ragged.flat_lines(groups, features, blocks * BLOCK)
    return jnp.zeros_like(lines).at[packed_line].set(lines, mode="drop").reshape(features, -1)


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


def _columns(values: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    if values.ndim < 2:
        raise ValueError(f"values must be [K, T]; got {validate.describe(values)}.")
    features, tokens = values.shape[-2:]
    _check(values, scales, "[ceil(T / 128), K]", (-(-tokens // BLOCK), features))
    return _scale(jnp.swapaxes(values, -1, -2), _spread(scales, -2, values.shape[-1]), dtype)


def _spread(scales: jax.Array, axis: int, size: int) -> jax.Array:
    """Repeats each scale for the elements of its block, the last of which may be shorter."""
    # Not jnp.repeat, which has no rule for Explicit mesh axes.
    axis %= scales.ndim
    if not scales.shape[axis]:
        return scales
    before, after = scales.shape[: axis + 1], scales.shape[axis + 1 :]
    repeated = jnp.broadcast_to(jnp.expand_dims(scales, axis + 1), (*before, BLOCK, *after))
    elements = repeated.reshape(*before[:-1], before[-1] * BLOCK, *after)
    return jax.lax.slice_in_dim(elements, 0, size, axis=axis)


def _scale(values: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    # XLA:CPU takes subnormal scales for 0, though the product with a value may be normal.
    bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
    values = values.astype(jnp.float32)
    subnormal = (values * (bits.astype(jnp.float32) * np.float32(2.0**-85))) * np.float32(2.0**-64)
    is_subnormal = bits < 1 << 23
    return jnp.where(is_subnormal, subnormal, values * scales).astype(dtype)
