"""ragged_weight_gradient: dW of every group from FP8 operands, in FP8 where the GPU has a kernel for it."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_tsq._core import portable, primitive, results, validate
from jax_tsq._core.groups import place
from jax_tsq._core.kernels import Kernel
from jax_tsq._core.limits import MOST_PRODUCT_FEATURES, MOST_PRODUCT_GROUPS, MOST_TOKENS
from jax_tsq._core.numerics import BLOCK, FP8
from jax_tsq._core.primitive import Operation, Result
from jax_tsq._ragged import RaggedQuantized

_CONTRACT_TOKENS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def ragged_weight_gradient(
    x: RaggedQuantized,
    dy: RaggedQuantized,
    *,
    dtype: DTypeLike = jnp.float32,
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Multiplies the transposed FP8 operands of every group: the weight gradient of a linear layer of experts.

        dw[e] = sum over the blocks b of 128 tokens of group e of
                (x.values[:, b] @ dy.values[:, b].T) * (x.scales[b][:, None] * dy.scales[b][None, :])

    Sums are taken in float32. A group without tokens gets zeros, and what operands hold past the last group is never
    used. The padded sizes are those of x; they stay on the device, so a new routing costs neither a compilation nor a
    synchronisation.

    With `accumulate`, the sum of other microbatches, the result is

        accumulate[e] + dw[e]

    by one float32 addition of the rounded dw, in the memory of `accumulate` where nobody needs its former content any
    more: as the carry of a `jax.lax.scan`, or donated to `jax.jit`. Elsewhere XLA copies it first. A group without
    tokens leaves its part as it is. The native kernel adds in place of storing, so that dw itself is never in memory.

    On GPUs of compute capability 9.0 a native kernel computes this on the FP8 tensor cores, if K is a multiple of 4, N
    one of 4 (of 8 for a bfloat16 result) and E at most 1,024. Otherwise the operands are dequantized, to float32 on
    CPU and to bfloat16 elsewhere, and multiplied by `jax.lax.ragged_dot_general`. The choice is made when a program is
    lowered, from the devices that it is lowered for; the environment variable `JAX_TSQ_KERNELS` set to `portable` or
    `native` forces it.

    Since a compiled program cannot raise on data, sizes that break the rules are clipped: negative ones count as 0,
    each is rounded down to a multiple of 128, and no group reaches past P. A scale that is not finite makes the row
    (x) or column (dy) of its group not finite. The kernel rounds the product of two scales to float32, so that results
    below 1e-34 lose precision; the portable path overflows where a dequantized operand does.

    Args:
        x: `RaggedQuantized` in the packed layout: values float8_e4m3fn `[K, P]`, scales float32 `[P / 128, K]` and
            padded sizes int32 `[E]`, multiples of 128, as `jax_tsq.ragged_transpose_quant` returns them.
        dy: the same of the output gradient: values `[N, P]`, scales `[P / 128, N]`, and the padded sizes of x.
        dtype: float32 or bfloat16, to which the sums are rounded once.
        accumulate: None, or float32 `[E, K, N]` to which dw is added; `dtype` must be float32 then. Numbers below
            2**-126 may count as 0.

    Returns:
        `[E, K, N]` in `dtype`.

    Raises:
        TypeError: x or dy is not a `RaggedQuantized`, one of their arrays has a wrong dtype, dtype is another one, or
            accumulate, or dtype beside it, is not float32.
        ValueError: values are not two-dimensional, scales or accumulate of a wrong shape, x and dy differ in P, in E or
            in sizes that are not traced, or P exceeds 2**31 - 128.
        NotImplementedError: the call is differentiated. Use it inside a `jax.custom_vjp`.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> sizes = jnp.array([100, 0, 284], jnp.int32)
        >>> x = jax.random.normal(jax.random.key(0), (384, 512), jnp.bfloat16)
        >>> dy = jax.random.normal(jax.random.key(1), (384, 256), jnp.bfloat16)
        >>> dw = jax_tsq.ragged_weight_gradient(
        ...     jax_tsq.ragged_transpose_quant(x, sizes), jax_tsq.ragged_transpose_quant(dy, sizes)
        ... )
        >>> dw.shape, dw.dtype, float(abs(dw[1]).max())
        ((3, 512, 256), dtype('float32'), 0.0)

        Microbatches, summed in one array that a scan carries:

        >>> @jax.jit
        ... def total(x, dy, sizes):
        ...     def step(dw, batch):
        ...         x, dy = (jax_tsq.ragged_transpose_quant(operand, sizes) for operand in batch)
        ...         return jax_tsq.ragged_weight_gradient(x, dy, accumulate=dw), None
        ...     return jax.lax.scan(step, jnp.zeros((3, 512, 256), jnp.float32), (x, dy))[0]
        >>> bool(jnp.array_equal(total(jnp.stack([x, x]), jnp.stack([dy, dy]), sizes), 2 * dw))
        True

    The recipe is that of DeepSeek-V3 (arXiv:2412.19437, sections 3.3.1 and 3.3.2).
    """
    for name, operand in (("x", x), ("dy", dy)):
        _check_operand(name, operand)
    if x.values.shape[1] != dy.values.shape[1] or x.padded_sizes.shape != dy.padded_sizes.shape:
        raise ValueError(
            "x and dy must be quantized by the same group sizes, so with the same P and E; got values "
            f"{list(x.values.shape)} and {list(dy.values.shape)}, padded sizes {list(x.padded_sizes.shape)} and "
            f"{list(dy.padded_sizes.shape)}."
        )
    validate.check_equal_sizes(x.padded_sizes, dy.padded_sizes)
    operands = [x.values, x.scales, dy.values, dy.scales, x.padded_sizes]
    dtype = _check_dtype(dtype)
    if accumulate is not None:
        _check_accumulate(accumulate, dtype, (x.padded_sizes.shape[0], x.values.shape[0], dy.values.shape[0]))
        operands.append(accumulate)
    return primitive.bind(wgrad_p, *map(jnp.asarray, operands), dtype=dtype)[0]


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    with contextlib.suppress(TypeError):
        if (resolved := np.dtype(dtype)) in (jnp.float32, jnp.bfloat16):
            return resolved
    raise TypeError(f"dtype must be float32 or bfloat16; got {dtype!r}.")


def _check_accumulate(accumulate, dtype: np.dtype, shape: tuple) -> None:
    validate.check_part("accumulate", accumulate, jnp.float32)
    if dtype != jnp.float32:
        raise TypeError(f"dtype must be float32 with accumulate, to which float32 sums are added; got {dtype}.")
    if tuple(accumulate.shape) != shape:
        raise ValueError(
            f"accumulate must be [E, K, N], here {list(shape)}; got {validate.describe(accumulate)}. Use jax.vmap for "
            "batch dimensions."
        )


def _check_operand(name: str, operand) -> None:
    if not isinstance(operand, RaggedQuantized):
        raise TypeError(
            f"{name} must be a RaggedQuantized; got {validate.describe(operand)}. jax_tsq.ragged_transpose_quant "
            "returns one."
        )
    values, scales, sizes = operand
    parts = (("values", values, FP8), ("scales", scales, jnp.float32), ("padded_sizes", sizes, jnp.int32))
    for part, array, dtype in parts:
        validate.check_part(f"{name}.{part}", array, dtype)
    if len(values.shape) != 2 or values.shape[1] % BLOCK:
        raise ValueError(
            f"{name}.values must be [features, P] with P a multiple of {BLOCK}; got {validate.describe(values)}. "
            'Quantize with layout="packed", and use jax.vmap for batch dimensions.'
        )
    if values.shape[1] > MOST_TOKENS:
        raise ValueError(
            f"{name}.values must have at most 2**31 - {BLOCK} tokens; got {validate.describe(values)}. Split the call "
            "by groups."
        )
    if len(sizes.shape) != 1:
        raise ValueError(
            f"{name}.padded_sizes must be [E], a size for each group; got {validate.describe(sizes)}. Use jax.vmap for "
            "batch dimensions."
        )
    validate.check_scales(name, values, scales, (values.shape[1] // BLOCK, values.shape[0]))


def _results(x, x_scales, dy, dy_scales, group_sizes, accumulate=None, *, dtype) -> list[Result]:
    shape = (group_sizes[0], x[0], dy[0])
    return [Result(("groups", "features", "outputs"), shape, dtype)]


def reference(x, x_scales, dy, dy_scales, group_sizes, accumulate=None, *, dtype) -> list[jax.Array]:
    """The portable path, for operands with any batch dimensions in front."""
    operands = (x, x_scales, dy, dy_scales, group_sizes)
    batch, tokens = x.shape[:-2], x.shape[-1]
    shape = (*batch, group_sizes.shape[-1], x.shape[-2], dy.shape[-2])
    if 0 in (*shape, tokens):
        return [jnp.zeros(shape, dtype) if accumulate is None else accumulate]
    if accumulate is not None:
        operands += (accumulate,)
    return [portable.multiply(functools.partial(_product, dtype), operands, batch)]


def _product(dtype, operand_dtype, x, x_scales, dy, dy_scales, group_sizes, accumulate=None) -> jax.Array:
    sizes = place(group_sizes, x.shape[1], aligned=True).rows
    in_use = jnp.arange(x.shape[1])[:, None] < jnp.sum(sizes)  # on GPUs XLA multiplies the other rows by 0
    lhs, rhs = (
        jnp.where(in_use, results.dequantize_columns(values, scales, operand_dtype), 0)
        for values, scales in ((x, x_scales), (dy, dy_scales))
    )
    product = jax.lax.ragged_dot_general(lhs, rhs, sizes, _CONTRACT_TOKENS, preferred_element_type=jnp.float32)
    dw = product.astype(dtype)
    return dw if accumulate is None else jnp.where(sizes[:, None, None] > 0, accumulate + dw, accumulate)


def _sizes_unmet(x, x_scales, dy, dy_scales, group_sizes, accumulate=None, *, dtype) -> str | None:
    """Which condition of the kernel the operands' sizes do not meet, None if they meet all."""
    features, outputs, groups = x[0], dy[0], group_sizes[0]
    if not all(isinstance(size, int) for size in (*x, *dy, groups)):
        return "all sizes must be known"
    outputs_multiple = 8 if dtype == jnp.bfloat16 else 4
    if features % 4 or features > MOST_PRODUCT_FEATURES:
        return f"K must be a multiple of 4 and at most {MOST_PRODUCT_FEATURES}; got {features}"
    if outputs % outputs_multiple or outputs > MOST_PRODUCT_FEATURES:
        return f"N must be a multiple of {outputs_multiple} and at most {MOST_PRODUCT_FEATURES}; got {outputs}"
    if groups > MOST_PRODUCT_GROUPS:
        return f"E must be at most {MOST_PRODUCT_GROUPS}; got {groups}"
    return None


wgrad_p = primitive.define(
    Operation(
        name="wgrad",
        function="ragged_weight_gradient",
        operands=(
            ("features", "padded_tokens"),
            ("token_blocks", "features"),
            ("outputs", "padded_tokens"),
            ("token_blocks", "outputs"),
            ("groups",),
            ("groups", "features", "outputs"),
        ),
        results=_results,
        reference=reference,
        in_place={5: 0},
        parallel=lambda *_, **__: ("features", "outputs"),
        kernel=Kernel(platforms=("cuda",), capability="9.0", sizes=_sizes_unmet, persistent=True),
    )
)
