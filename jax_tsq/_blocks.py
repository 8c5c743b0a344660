"""quantize_blocks: weights in FP8, in both orientations, with one scale for 128 x 128 elements."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_tsq._core import numerics, primitive, results, validate
from jax_tsq._core.limits import MOST_PARTS
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result


@results.register
class BlockQuantized(NamedTuple):
    """Weights of all experts: `w[e, k, n] ~= values[e, k, n] * scales[e, k // 128, n // 128]`.

    Attributes:
        values: float8_e4m3fn `[E, K, N]`.
        transposed: float8_e4m3fn `[E, N, K]`, the same values.
        scales: float32 `[E, ceil(K / 128), ceil(N / 128)]` dequantization scales.
    """

    values: jax.Array
    transposed: jax.Array
    scales: jax.Array

    def dequantize(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """`[E, K, N]`, see `jax_tsq.dequantize`."""
        return results.dequantize_blocks(self.values, self.scales, dtype)


def quantize_blocks(w: jax.Array | Sequence[jax.Array], *, pow_2_scales: bool = False) -> BlockQuantized:
    """Quantizes weights to FP8 with one scale for each block of 128 x 128 elements, in both orientations.

    The numerics are those of `jax_tsq.fused_transpose_split_quant` with square blocks, which serve the product with w
    as well as the one with its transpose:

        v      = bfloat16(w), rounded to nearest even
        amax   = max |v| over a block of (up to) 128 x 128 elements of one expert, NaN left out
        q      = 448 / amax (1 if amax is 0), with pow_2_scales rounded down to a power of two
        value  = float8_e4m3fn(v * q), rounded to nearest even, saturating at +-448
        scale  = 1 / q

    Several arrays are quantized as if they were joined along N, but not copied: blocks are those of the joined array.
    Called once a step, the result serves all microbatches.

    Args:
        w: float32 or bfloat16 `[E, K, N]`, experts x features x outputs; or a tuple of up to 16 such arrays
            `[E, K, N_i]` of one dtype, such as gates and ups.
        pow_2_scales: whether scales are powers of two.

    Returns:
        `BlockQuantized(values, transposed, scales)`: float8_e4m3fn `[E, K, N]` and `[E, N, K]`, and float32
        `[E, ceil(K / 128), ceil(N / 128)]`, where N is the sum of all N_i.

    Raises:
        TypeError: w is neither an array nor a sequence of arrays, its dtype another one, or pow_2_scales not a bool.
        ValueError: an array is not three-dimensional, arrays differ in E or K, or there are none or more than 16.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> gate, up = jax.random.normal(jax.random.key(0), (2, 4, 256, 300))
        >>> values, transposed, scales = jax_tsq.quantize_blocks((gate, up))
        >>> values.shape, transposed.shape, scales.shape
        ((4, 256, 600), (4, 600, 256), (4, 2, 5))

    The 128 x 128 weight blocks are those of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    parts = _check_weights(w)
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    return BlockQuantized(*primitive.bind(blocks_p, *parts, pow_2_scales=pow_2_scales))


def _check_weights(w) -> list[jax.Array]:
    rule = "w must be a float32 or bfloat16 array [E, K, N], or a tuple of them"
    parts: list[Any] = list(w) if isinstance(w, list | tuple) else [w]
    if not 1 <= len(parts) <= MOST_PARTS:
        raise ValueError(f"{rule}, from 1 to {MOST_PARTS}; got {len(parts)}. Join some of them by jnp.concatenate.")
    for part in parts:
        if not validate.is_array(part):
            raise TypeError(f"{rule}; got {validate.describe(w)}. Use jnp.asarray.")
        if part.dtype not in (jnp.float32, jnp.bfloat16):
            raise TypeError(f"{rule}; got {validate.describe(part)}. Cast it first, for example to jnp.bfloat16.")
        if len(part.shape) != 3:
            raise ValueError(f"{rule}; got {validate.describe(part)}. Use jax.vmap for batch dimensions.")
    if len({(part.dtype, *part.shape[:2]) for part in parts}) > 1:
        got = ", ".join(map(validate.describe, parts))
        raise ValueError(f"w must be arrays of the same dtype, E and K, which are joined along N; got {got}.")
    return list(map(jnp.asarray, parts))


def _results(*w: tuple[int, ...], **_) -> list[Result]:
    experts, features, _ = w[0]
    outputs = sum(part[2] for part in w)
    return [
        Result(("experts", "features", "outputs"), (experts, features, outputs), FP8),
        Result(("experts", "outputs", "features"), (experts, outputs, features), FP8),
        Result(
            ("experts", "feature_blocks", "output_blocks"),
            (experts, -(-features // BLOCK), -(-outputs // BLOCK)),
            jnp.float32,
        ),
    ]


def reference(*w: jax.Array, pow_2_scales: bool) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""
    bits = jnp.concatenate([numerics.bf16_bits(part) for part in w], axis=-1)
    *front, features, outputs = bits.shape
    rows, columns = -(-features // BLOCK), -(-outputs // BLOCK)
    padding = [(0, 0)] * len(front) + [(0, rows * BLOCK - features), (0, columns * BLOCK - outputs)]
    blocks = jnp.pad(bits, padding).reshape(*front, rows, BLOCK, columns, BLOCK)
    values, scales = numerics.quantize_blocks(blocks, (-3, -1), pow_2_scales)
    values = values.reshape(*front, rows * BLOCK, columns * BLOCK)[..., :features, :outputs]
    return [values, jnp.swapaxes(values, -1, -2), jnp.squeeze(scales, (-3, -1))]


# Arrays that are joined cannot be split along N: a device's parts of them are no contiguous part of the whole.
blocks_p = primitive.define(
    Operation(
        name="blocks",
        function="quantize_blocks",
        operands=(("experts", "features", "outputs"),) * MOST_PARTS,
        results=_results,
        reference=reference,
        parallel=lambda *w, **_: ("experts", "features", *(["outputs"] if len(w) == 1 else [])),
        attributes=("pow_2_scales",),
        blocks={"feature_blocks": "features", "output_blocks": "outputs"},
    )
)
