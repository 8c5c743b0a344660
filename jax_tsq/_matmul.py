"""ragged_matmul: rows of every group times the group's weights, in FP8 where the GPU has a kernel for it."""

import jax
import jax.numpy as jnp

from jax_tsq._blocks import BlockQuantized
from jax_tsq._core import portable, primitive, results, validate
from jax_tsq._core.groups import place
from jax_tsq._core.kernels import Kernel
from jax_tsq._core.limits import MOST_PRODUCT_FEATURES, MOST_PRODUCT_GROUPS, MOST_TOKENS
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result
from jax_tsq._rows import RowQuantized


def ragged_matmul(
    x: RowQuantized, w: BlockQuantized, group_sizes: jax.Array, *, transpose_w: bool = False
) -> jax.Array:
    """Multiplies the FP8 rows of every group by the group's FP8 weights, or by their transpose.

        y[t, n] = sum over the blocks b of 128 features of
                  (x.values[t, b] @ w.values[e, b, n]) * (x.scales[t, b] * w.scales[e, b, n // 128])

    for the rows t of group e. Sums are taken in float32 and rounded to bfloat16 once. Rows past the sum of the sizes
    are 0, whatever x holds there, and so are the results of an x without features. This is the forward product of a
    linear layer of experts; with `transpose_w` it is its input gradient, from the same weights.

    Traced sizes stay on the device: a new routing costs neither a compilation nor a synchronisation. Since a compiled
    program cannot raise on data, traced sizes that break the rules are clipped: negative ones count as 0, and no group
    reaches past row M. Sizes that are not traced are checked in any case.

    On GPUs of compute capability 9.0 a native kernel computes this on the FP8 tensor cores, if the features that are
    summed over are a multiple of 16, those of the result one of 8, and E is at most 1,024. Otherwise the operands are
    dequantized, to float32 on CPU and to bfloat16 elsewhere, and multiplied by `jax.lax.ragged_dot`. The choice is made
    when a program is lowered, from the devices that it is lowered for; the environment variable `JAX_TSQ_KERNELS` set
    to `portable` or `native` forces it.

    A scale or a value of x that is not finite makes its row not finite; one of w does so to the rows of its group, and
    on the portable path may do so to those of other groups.

    Args:
        x: `RowQuantized` as `jax_tsq.quantize_rows` or `jax_tsq.ragged_quantize` returns it, sorted by group: values
            float8_e4m3fn `[M, K]`, with `transpose_w` `[M, N]`; scales float32 `[M, ceil(K / 128)]`.
        w: `BlockQuantized` as `jax_tsq.quantize_blocks` returns it: values float8_e4m3fn `[E, K, N]`, transposed
            `[E, N, K]`, scales float32 `[E, ceil(K / 128), ceil(N / 128)]`. Which orientation is read depends on
            `transpose_w`.
        group_sizes: `[E]` of any integer dtype, rows of each group, traced or not; their sum is at most M.
        transpose_w: whether to multiply by the transpose of w.

    Returns:
        bfloat16 `[M, N]`, with `transpose_w` `[M, K]`.

    Raises:
        TypeError: x is not a `RowQuantized` or w not a `BlockQuantized`, an array has a wrong dtype, group_sizes are
            not integers, or transpose_w is not a bool.
        ValueError: shapes do not fit together, M exceeds 2**31 - 128, or sizes that are not traced break the rules.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (300, 512), jnp.bfloat16)
        >>> w = jax_tsq.quantize_blocks(jax.random.normal(jax.random.key(1), (3, 512, 256)))
        >>> sizes = jnp.array([100, 0, 150], jnp.int32)
        >>> y = jax_tsq.ragged_matmul(jax_tsq.quantize_rows(x, sizes), w, sizes)
        >>> dx = jax_tsq.ragged_matmul(jax_tsq.quantize_rows(y, sizes), w, sizes, transpose_w=True)
        >>> y.shape, dx.shape, y.dtype, float(abs(y[250:]).max())
        ((300, 256), (300, 512), dtype(bfloat16), 0.0)

    The recipe is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    transpose_w = validate.check_flag("transpose_w", transpose_w)
    _check_rows(x)
    check_weights("w", w)
    group_sizes = validate.check_sizes(group_sizes, x.values.shape[0])
    side, features = ("N", w.values.shape[2]) if transpose_w else ("K", w.values.shape[1])
    if w.values.shape[0] != group_sizes.shape[0] or x.values.shape[1] != features:
        raise ValueError(
            f"x.values must be [M, {side}], w.values [E, K, N] and group_sizes [E]; got {list(x.values.shape)}, "
            f"{list(w.values.shape)} and {list(group_sizes.shape)} with transpose_w={transpose_w}."
        )
    # Either way the features that are summed over come last.
    values = w.values if transpose_w else w.transposed
    operands = (x.values, x.scales, values, w.scales)
    return primitive.bind(matmul_p, *map(jnp.asarray, operands), group_sizes, transpose_w=transpose_w)[0]


def _check_rows(x) -> None:
    if not isinstance(x, RowQuantized):
        raise TypeError(
            f"x must be a RowQuantized; got {validate.describe(x)}. jax_tsq.quantize_rows and jax_tsq.ragged_quantize "
            "return one."
        )
    validate.check_part("x.values", x.values, FP8)
    validate.check_part("x.scales", x.scales, jnp.float32)
    if len(x.values.shape) != 2:
        raise ValueError(
            f"x.values must be [M, K]; got {validate.describe(x.values)}. Use jax.vmap for batch dimensions."
        )
    tokens, features = x.values.shape
    if validate.check_count("x.values.shape[0]", tokens) > MOST_TOKENS:
        raise ValueError(
            f"x.values must have at most 2**31 - {BLOCK} tokens; got {validate.describe(x.values)}. Split the call."
        )
    validate.check_scales("x", x.values, x.scales, (tokens, -(-features // BLOCK)))


def check_weights(name: str, w) -> None:
    """Raises unless w is a `BlockQuantized` `[E, K, N]` whose parts fit together."""
    if not isinstance(w, BlockQuantized):
        raise TypeError(
            f"{name} must be a BlockQuantized; got {validate.describe(w)}. jax_tsq.quantize_blocks returns one."
        )
    for part, dtype in (("values", FP8), ("transposed", FP8), ("scales", jnp.float32)):
        validate.check_part(f"{name}.{part}", getattr(w, part), dtype)
    if len(w.values.shape) != 3:
        raise ValueError(
            f"{name}.values must be [E, K, N]; got {validate.describe(w.values)}. Use jax.vmap for batch dimensions."
        )
    groups, features, outputs = w.values.shape
    if tuple(w.transposed.shape) != (groups, outputs, features):
        raise ValueError(
            f"{name}.transposed must be {[groups, outputs, features]} for values {list(w.values.shape)}; got "
            f"{list(w.transposed.shape)}. Pass what jax_tsq.quantize_blocks returned."
        )
    validate.check_scales(name, w.values, w.scales, (groups, -(-features // BLOCK), -(-outputs // BLOCK)))


def _results(x, x_scales, w, w_scales, group_sizes, *, transpose_w) -> list[Result]:
    return [Result(("tokens", "outputs"), (x[0], w[1]), jnp.bfloat16)]


def reference(x, x_scales, w, w_scales, group_sizes, *, transpose_w) -> list[jax.Array]:
    """The portable path, for operands with any batch dimensions in front."""
    operands = (x, x_scales, w, jnp.swapaxes(w_scales, -1, -2) if transpose_w else w_scales, group_sizes)
    batch = x.shape[:-2]
    shape = (*batch, x.shape[-2], w.shape[-2])
    if 0 in (*shape, x.shape[-1], group_sizes.shape[-1]):
        return [jnp.zeros(shape, jnp.bfloat16)]
    return [portable.multiply(_product, operands, batch)]


def _product(dtype, x, x_scales, w, w_scales, group_sizes) -> jax.Array:
    """Of w `[E, outputs, features]` and its scales `[E, blocks of features, blocks of outputs]`."""
    sizes = place(group_sizes, x.shape[0], aligned=False).rows
    in_use = (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]
    lhs = results.dequantize_rows(x, x_scales, dtype)
    rhs = results.dequantize_blocks(jnp.swapaxes(w, -1, -2), w_scales, dtype)
    product = jax.lax.ragged_dot(lhs, rhs, sizes, preferred_element_type=jnp.float32)
    return jnp.where(in_use, product, 0).astype(jnp.bfloat16)


def _sizes_unmet(x, x_scales, w, w_scales, group_sizes, *, transpose_w) -> str | None:
    """Which condition of the kernel the operands' sizes do not meet, None if they meet all."""
    groups, outputs, features = w
    if not all(isinstance(size, int) for size in (*x, *w)):
        return "all sizes must be known"
    summed, kept = ("N", "K") if transpose_w else ("K", "N")
    if features % 16 or features > MOST_PRODUCT_FEATURES:
        return f"{summed} must be a multiple of 16 and at most {MOST_PRODUCT_FEATURES}; got {features}"
    if outputs % 8 or outputs > MOST_PRODUCT_FEATURES:
        return f"{kept} must be a multiple of 8 and at most {MOST_PRODUCT_FEATURES}; got {outputs}"
    if groups > MOST_PRODUCT_GROUPS:
        return f"E must be at most {MOST_PRODUCT_GROUPS}; got {groups}"
    return None


# Dimensions by what they are in this product: with transpose_w "outputs" are K, and "features" N.
matmul_p = primitive.define(
    Operation(
        name="matmul",
        function="ragged_matmul",
        operands=(
            ("tokens", "features"),
            ("tokens", "feature_blocks"),
            ("groups", "outputs", "features"),
            ("groups", "feature_blocks", "output_blocks"),
            ("groups",),
        ),
        results=_results,
        reference=reference,
        parallel=lambda *_, **__: ("outputs",),
        attributes=("transpose_w",),
        blocks={"feature_blocks": "features", "output_blocks": "outputs"},
        exchanged=lambda *, transpose_w: (3,) if transpose_w else (),
        column_major=(("tokens", "feature_blocks"),),
        kernel=Kernel(platforms=("cuda",), capability="9.0", sizes=_sizes_unmet, persistent=True),
    )
)
