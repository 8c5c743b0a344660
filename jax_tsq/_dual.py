"""ragged_quantize: rows and columns from one read."""

import jax
import jax.numpy as jnp

from jax_tsq import _ragged, _rows
from jax_tsq._core import primitive, validate
from jax_tsq._core.primitive import Operation, Part, Result
from jax_tsq._ragged import RaggedQuantized
from jax_tsq._rows import RowQuantized


def ragged_quantize(
    x: jax.Array, group_sizes: jax.Array, *, pow_2_scales: bool = False, aligned: bool = False
) -> tuple[RowQuantized, RaggedQuantized]:
    """Quantizes tokens sorted by group to FP8 along features and along tokens, and reads them once.

        rows, columns = quantize_rows(x, group_sizes), ragged_transpose_quant(x, group_sizes)

    byte for byte: rows stay where they are in x, columns are transposed and every group starts on a multiple of 128.
    Where a compiled program uses only the one or the other, only that is computed; under `jax.checkpoint` a layer thus
    makes rows in its forward pass and columns when it is computed again.

    Rows of x past the sum of the sizes are never read. Traced sizes that break the rules are clipped, as those of
    `jax_tsq.ragged_transpose_quant` are; with `aligned`, sizes that are rounded down leave rows out of both results.
    Sizes that are not traced are checked in any case.

    Args:
        x: bfloat16 `[M, K]`, tokens x features, sorted by group.
        group_sizes: `[E]` of any integer dtype, tokens of each group, traced or not; their sum is at most M.
        pow_2_scales: whether scales are powers of two, those of rows and those of columns.
        aligned: promises that all sizes are multiples of 128, which makes P as small as it can be.

    Returns:
        `RowQuantized(values, scales)`: float8_e4m3fn `[M, K]` and float32 `[M, ceil(K / 128)]`, 0 and 1 past the sum of
        the sizes; and `RaggedQuantized(values, scales, padded_sizes)`: float8_e4m3fn `[K, P]`, float32 `[P / 128, K]`
        and int32 `[E]`, with P = `padded_tokens(M, E, aligned=aligned)`.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: x is not two-dimensional, group_sizes not one-dimensional, P exceeds 2**31 - 128, or sizes that are
            not traced break the rules.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (384, 512), jnp.bfloat16)
        >>> rows, columns = jax.jit(jax_tsq.ragged_quantize)(x, jnp.array([100, 0, 284], jnp.int32))
        >>> rows.values.shape, rows.scales.shape, columns.values.shape, columns.scales.shape
        ((384, 512), (384, 4), (512, 640), (5, 512))

    The scaling recipe is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3): 1 x 128 blocks for the products with the
    weights, 128 x 1 blocks for the weight gradient.
    """
    x = validate.check_tokens(x, dtypes=(jnp.bfloat16,))
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    aligned = validate.check_flag("aligned", aligned)
    group_sizes = validate.check_sizes(group_sizes, x.shape[0], aligned=aligned)
    _ragged.check_length(x, group_sizes, aligned)
    arrays = primitive.bind(dual_p, x, group_sizes, pow_2_scales=pow_2_scales, aligned=aligned)
    return RowQuantized(*arrays[:2]), RaggedQuantized(*arrays[2:])


def infer(*shapes: tuple[int, ...], **options) -> list[Result]:
    """Types of what both parts return, for shapes without batch dimensions."""
    return [*_rows.infer(*shapes), *_ragged.infer(*shapes, flat=False, **options)]


def reference(x, group_sizes, **options) -> list[jax.Array]:
    """The operation in pure JAX, for operands with any batch dimensions in front."""
    return [*_rows.reference(x, group_sizes, **options), *_ragged.reference(x, group_sizes, flat=False, **options)]


dual_p = primitive.define(
    Operation(
        name="dual",
        function="ragged_quantize",
        operands=(("tokens", "features"), ("groups",)),
        results=infer,
        reference=reference,
        parallel=lambda *_, **__: ("features",),
        attributes=("pow_2_scales", "aligned"),
        blocks={"feature_blocks": "features"},
        column_major=(("tokens", "feature_blocks"),),
        parts=(
            Part(_rows.rows_p, results=(0, 1), params=lambda **options: options),
            Part(_ragged.ragged_p, results=(2, 3, 4), params=lambda **options: {"flat": False, **options}),
        ),
    )
)
