"""grouped_linear: the linear layer of all experts, all of whose products take FP8 operands."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jax_tsq import _accumulate, _products
from jax_tsq._blocks import BlockQuantized, quantize_blocks
from jax_tsq._core import derivatives, meshes, validate
from jax_tsq._dual import ragged_quantize
from jax_tsq._matmul import check_weights, ragged_matmul
from jax_tsq._products import RaggedDot
from jax_tsq._ragged import RaggedQuantized, ragged_transpose_quant
from jax_tsq._rows import quantize_rows
from jax_tsq._wgrad import ragged_weight_gradient


def grouped_linear(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    pow_2_scales: bool = False,
    fp8_residuals: bool = False,
    ragged_dot: RaggedDot | None = None,
    quantized_w: BlockQuantized | None = None,
    master_w: jax.Array | None = None,
    accumulate: jax.Array | None = None,
) -> jax.Array:
    """Multiplies every group of tokens by its own weights; all three products take FP8 operands.

        y[t]  = x[t] @ w[e]             for the tokens t of group e, 0 past the sum of the sizes
        dx[t] = dy[t] @ w[e].T          0 past the sum
        dw[e] = X_e.T @ dY_e

    y and dx are `jax_tsq.ragged_matmul` of x and dy by `jax_tsq.quantize_rows` and w by `jax_tsq.quantize_blocks`; dw
    is `jax_tsq.ragged_weight_gradient` of X and dY by `jax_tsq.ragged_transpose_quant`. Sums are taken in float32. x
    and dy are read once each, by `jax_tsq.ragged_quantize`, and without a gradient x is quantized along rows alone.
    Everything that goes in and comes out is as wide as without FP8: small gradients are scaled, not lost.

    Rows past the sum of the sizes reach neither y nor a gradient, whatever they hold. A group without tokens has a
    zero weight gradient. Sizes that no kernel takes are computed by the portable paths of those functions.

    Kept for the backward pass are the columns of x in FP8, w (or `quantized_w`) and the sizes; x itself is not. For
    rematerialization, what is kept of x is named `grouped_linear_x`, which policies such as
    `jax.checkpoint_policies.save_only_these_names("grouped_linear_x")` save.

    Args:
        x: bfloat16 `[M, K]`, tokens sorted by group.
        w: `[E, K, N]` of a floating dtype of 16 bits or more, rounded to bfloat16 before it is quantized.
        group_sizes: integers `[E]`, tokens of each group; their sum is at most M. Checked where they are not traced.
        pow_2_scales: whether the FP8 scales are powers of two.
        fp8_residuals: for a function as `ragged_dot`: stores x for the backward pass as row-quantized FP8, half the
            memory, and quantizes that again along tokens. Power-of-two scales make the second step exact for all but
            the smallest elements of a block. Without a function, what is stored is FP8 in any case, quantized once.
        ragged_dot: None, or a function that computes `[M, N]` of a floating dtype from lhs `[M, K]`, rhs `[E, K, N]`
            and group sizes, as `jax.lax.ragged_dot` does; traced for y and for dx when the layer is called. Then y and
            dx are its products of bfloat16 operands, x itself is kept for the backward pass, and only dw is computed in
            FP8. The function may close over arrays, traced or not, but those get no gradient. What it returns past the
            sum of the sizes does not matter.
        quantized_w: None, or what `jax_tsq.quantize_blocks` made of w, once for several calls: microbatches, or forward
            and backward pass. The values of w are not read then; its gradient still goes to w. Where w is
            differentiated, make it of `jax.lax.stop_gradient(w)`.
        master_w: float32 `[E, K, N]` that gets dw in w's place, as float32: master weights, of which w is a bfloat16
            copy, or zeros. Their values are not read, and w has no gradient then. So the sums over microbatches are
            not rounded to bfloat16 one by one.
        accumulate: None, or float32 `[E, K, N]`, the sum of other microbatches' dw. Its values do not reach y. What
            differentiation gives for it is not a derivative but the running sum, `accumulate + dw`, in its own memory
            where that can be donated; w has no gradient then. Give an accumulator to one call, once: JAX adds what
            several calls give, and with them the accumulator itself. See `docs/accumulation.md`.

    Returns:
        `[M, N]` bfloat16.

    Raises:
        TypeError: x is not bfloat16, w not floating or float8, group_sizes not integers, a flag not a bool, ragged_dot
            neither None nor a function, what it returns no floating array, quantized_w not a `BlockQuantized`, or
            master_w or accumulate not float32; or it is differentiated in forward mode, which no `jax.custom_vjp`
            takes.
        ValueError: x is not two-dimensional, w not three-dimensional, group_sizes not one-dimensional, their shapes do
            not fit together, sizes that are not traced are negative or sum to more than M, ragged_dot returns another
            shape or comes with quantized_w, accumulate comes with master_w or without a dimension over which `jax.vmap`
            maps other operands, or quantized_w, master_w or accumulate is not shaped as w.
        NotImplementedError: a second derivative is taken, or the gradient of quantized_w or of a value that ragged_dot
            closes over.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (300, 64), jnp.bfloat16)
        >>> w = jax.random.normal(jax.random.key(1), (4, 64, 32), jnp.float32)
        >>> sizes = jnp.array([100, 0, 150, 50], jnp.int32)
        >>> dw = jax.grad(lambda w: jax_tsq.grouped_linear(x, w, sizes).astype(jnp.float32).sum())(w)
        >>> dw.dtype, dw.shape, float(abs(dw[1]).max())
        (dtype('float32'), (4, 64, 32), 0.0)

        Two microbatches, summed in one array:

        >>> def loss(total, x):
        ...     return jax_tsq.grouped_linear(x, w, sizes, accumulate=total).astype(jnp.float32).sum()
        >>> step = jax.jit(jax.grad(loss), donate_argnums=0)
        >>> total = step(step(jnp.zeros_like(w), x), x)
        >>> bool(jnp.array_equal(total, 2 * dw))
        True

    The recipe is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    x, w, group_sizes = _check_operands(x, w, group_sizes)
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    fp8_residuals = validate.check_flag("fp8_residuals", fp8_residuals)
    quantized_w = _check_quantized(quantized_w, w, ragged_dot)
    target = w if master_w is None else check_target("master_w", master_w, "w", w)
    if accumulate is not None:
        if master_w is not None:
            raise ValueError(
                "master_w must be None with accumulate, because only one of them gets the gradient of w; got "
                f"{validate.describe(master_w)}. Leave one of them out."
            )
        accumulate = check_target("accumulate", accumulate, "w", w)
    # Where manual mesh axes differ between the operands, their gradients are summed by the transpose of this cast. An
    # accumulator must not be, so it is no part of this.
    *operands, target = meshes.vary_alike([x, w, group_sizes, target])
    if ragged_dot is None:
        leaves, tree = jax.tree.flatten(quantized_w)
        x, w, group_sizes, target, *leaves = meshes.vary_alike([*operands, target, *leaves])
        quantized_w = jax.tree.unflatten(tree, leaves)
        options = _Fp8Options(pow_2_scales, jax.typeof(x), jax.typeof(w), jax.typeof(target))
        return _fp8_linear(options, x, w, target, accumulate, group_sizes, quantized_w)
    programs = _products.trace(ragged_dot, *operands)
    constants = [program.constants for program in programs]
    x, w, group_sizes, target, *_ = meshes.vary_alike([*operands, target, *jax.tree.leaves(constants)])
    if x is not operands[0]:  # the results vary over the axes of the constants, too
        programs = _products.trace(ragged_dot, x, w, group_sizes)
    constants = jax.tree.map(derivatives.refuse(_NO_GRADIENT_OF_CONSTANTS, lambda a: a), constants)
    forward, backward = (program.run for program in programs)
    options = _Options(pow_2_scales, fp8_residuals, forward, backward, jax.typeof(x), jax.typeof(target))
    return _grouped_linear(options, x, w, target, accumulate, group_sizes, constants)


def _check_operands(x, w, group_sizes) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns x `[M, K]`, w `[E, K, N]` and group sizes `[E]` as JAX arrays."""
    describe = validate.describe
    if [len(a.shape) for a in (x, w) if validate.is_array(a)] == [3, 2]:
        raise ValueError(f"x must be [M, K] and w [E, K, N]; got {describe(x)} and {describe(w)}. Exchange the two.")
    x = validate.check_tokens(x, dtypes=(jnp.bfloat16,))
    group_sizes = validate.check_sizes(group_sizes, x.shape[0])
    if not validate.is_array(w) or not jnp.issubdtype(w.dtype, jnp.floating):
        fix = validate.fix_for("w", w, dtype="jnp.float32", join="jnp.stack")
        raise TypeError(f"w must be an array of a floating dtype; got {describe(w)}. {fix}")
    if jnp.finfo(w.dtype).bits < 16:
        raise TypeError(
            f"w must have a dtype of 16 bits or more, because its gradient gets that dtype, too; got {describe(w)}. "
            "Keep the weights in bfloat16 or float32, and pass w.astype(jnp.bfloat16)."
        )
    shape = (group_sizes.shape[0], x.shape[1])
    if len(w.shape) != 3 or tuple(w.shape[:2]) != shape:
        raise ValueError(
            f"w must be [E, K, N] with E = {shape[0]} groups as in group_sizes and K = {shape[1]} features as in x; "
            f"got {describe(w)}. If K comes last, pass jnp.swapaxes(w, 1, 2)."
        )
    return x, jnp.asarray(w), group_sizes


def check_target(name: str, target, of: str, w: jax.Array) -> jax.Array:
    """Returns what gets the gradient of w, master weights or an accumulator, as a JAX array."""
    rule = f"{name} must be float32{list(w.shape)}, of the shape of {of}, because it gets the gradient of {of}"
    if not validate.is_array(target) or target.dtype != jnp.float32:
        raise TypeError(f"{rule}; got {validate.describe(target)}. Start from jnp.zeros({of}.shape, jnp.float32).")
    if tuple(target.shape) != tuple(w.shape):
        raise ValueError(f"{rule}; got {validate.describe(target)}.")
    return jnp.asarray(target)


def _check_quantized(quantized_w, w: jax.Array, ragged_dot) -> BlockQuantized | None:
    if quantized_w is None:
        return None
    if ragged_dot is not None:
        raise ValueError(
            "quantized_w must be None where ragged_dot is a function, which takes bfloat16 weights. Leave one of them "
            "out."
        )
    check_weights("quantized_w", quantized_w)
    if tuple(quantized_w.values.shape) != tuple(w.shape):
        raise ValueError(
            f"quantized_w must be jax_tsq.quantize_blocks(w), here of {validate.describe(w)}; got values of shape "
            f"{list(quantized_w.values.shape)}."
        )
    return jax.tree.map(derivatives.refuse(_NO_GRADIENT_OF_QUANTIZED, jnp.asarray), quantized_w)


_NO_GRADIENT_OF_QUANTIZED = (
    "jax_tsq.grouped_linear gives no gradient of quantized_w: that of the weights goes to w. Put jax.lax.stop_gradient "
    "around quantized_w."
)
_NO_GRADIENT_OF_CONSTANTS = (
    "jax_tsq.grouped_linear gives no gradient of what its ragged_dot closes over. Put jax.lax.stop_gradient around "
    "that value, or apply it to x or y outside of ragged_dot."
)


def quantized(w, quantized_w: BlockQuantized | None, pow_2_scales: bool) -> BlockQuantized:
    """What products take of w, an array or a tuple of arrays that are joined along N."""
    if quantized_w is not None:
        return quantized_w
    wide = jax.tree.map(lambda a: a if a.dtype in (jnp.float32, jnp.bfloat16) else a.astype(jnp.bfloat16), w)
    return quantize_blocks(wide, pow_2_scales=pow_2_scales)


def weight_gradient(x: RaggedQuantized, dy: RaggedQuantized, target, accumulate=None) -> jax.Array:
    """dW `[E, K, N]` of the type of its target, or the accumulator and dW."""
    if accumulate is not None:
        return placed(_accumulate.total(x, dy, accumulate), jax.typeof(accumulate).sharding.spec)
    dtype = target.dtype if target.dtype == jnp.bfloat16 else jnp.float32
    dw = ragged_weight_gradient(x, dy, dtype=dtype).astype(target.dtype)
    return placed(dw, target.sharding.spec)


def _cotangents(dw, accumulate):
    """Those of the target of dw and of the accumulator: one of them gets it."""
    return (dw, None) if accumulate is None else (None, dw)


def placed(result: jax.Array, spec: P) -> jax.Array:
    """A product on the Explicit mesh axes that its type has to name."""
    return meshes.on_auto_axes(lambda a: a, spec, result)


# --- All products in FP8 ---------------------------------------------------------------------------------------------


class _Fp8Options(NamedTuple):
    """What is known before any value is: `pow_2_scales`, and the types of x, of w and of what gets dw."""

    pow_2_scales: bool
    x: Any
    w: Any
    target: Any


_once = derivatives.refuse(_products.NO_SECOND_DERIVATIVE, lambda a: a)


def _fp8_outputs(options: _Fp8Options, x, w, target, accumulate, group_sizes, quantized_w):
    """y of x and w; only rows of x are quantized."""
    rows = quantize_rows(x, group_sizes, pow_2_scales=options.pow_2_scales)
    return _fp8_product(options, rows, w, group_sizes, quantized_w)


def _fp8_product(options: _Fp8Options, rows, w, group_sizes, quantized_w):
    y = ragged_matmul(rows, quantized(w, quantized_w, options.pow_2_scales), group_sizes)
    return placed(y, P(options.x.sharding.spec[0], options.w.sharding.spec[2]))


def _fp8_forward(options: _Fp8Options, x, w, target, accumulate, group_sizes, quantized_w):
    rows, columns = ragged_quantize(_once(x), group_sizes, pow_2_scales=options.pow_2_scales)
    y = _fp8_product(options, rows, _once(w), group_sizes, quantized_w)
    columns = RaggedQuantized(*(checkpoint_name(a, "grouped_linear_x") for a in columns))
    accumulate = _accumulate.keep("grouped_linear", y, jax.tree.map(_once, accumulate))
    return y, (columns, w if quantized_w is None else None, accumulate, group_sizes, quantized_w)


def _fp8_backward(options: _Fp8Options, residuals, dy):
    x, w, accumulate, group_sizes, quantized_w = residuals
    rows, columns = ragged_quantize(_once(dy), group_sizes, pow_2_scales=options.pow_2_scales)
    dx = ragged_matmul(rows, quantized(w, quantized_w, options.pow_2_scales), group_sizes, transpose_w=True)
    dx = placed(dx, options.x.sharding.spec)
    dw = weight_gradient(x, columns, options.target, accumulate)
    return dx, None, *_cotangents(dw, accumulate), None, None


_fp8_linear = jax.custom_vjp(_fp8_outputs, nondiff_argnums=(0,))
_fp8_linear.defvjp(_fp8_forward, _fp8_backward)


# --- Products of bfloat16 by a function, and the weight gradient in FP8 ----------------------------------------------


class _Options(NamedTuple):
    """What is known before any value is.

    Attributes:
        pow_2_scales, fp8_residuals: as in `grouped_linear`.
        forward, backward: the products for y and for dx.
        x, target: the types of dx and dw.
    """

    pow_2_scales: bool
    fp8_residuals: bool
    forward: Callable[..., jax.Array]
    backward: Callable[..., jax.Array]
    x: Any
    target: Any


def _outputs(options: _Options, x, w, target, accumulate, group_sizes, constants):
    """y of x and w. The target of dw, w again or master weights, is an operand of its own that nobody reads."""
    rows, columns = options.x.sharding.spec[0], jax.typeof(w).sharding.spec[2]
    operands = x, w.astype(x.dtype), group_sizes, *constants[0]
    return _products.multiply(options.forward, *operands, rows=rows, columns=columns)


def _forward(options: _Options, x, w, target, accumulate, group_sizes, constants):
    y = _outputs(options, x, w, target, accumulate, group_sizes, constants)
    kept = (x, None)  # no name makes another array of it: layers that share their input keep it once
    if options.fp8_residuals:
        rows = quantize_rows(x, pow_2_scales=options.pow_2_scales)
        kept = tuple(checkpoint_name(a, "grouped_linear_x") for a in rows)
    accumulate = _accumulate.keep("grouped_linear", y, jax.tree.map(_once, accumulate))
    return y, (*kept, w, accumulate, group_sizes, constants[1])


def _backward(options: _Options, residuals, dy):
    x, input_scales, w, accumulate, group_sizes, constants = residuals
    rows, columns = options.x.sharding.spec
    operands = dy, jnp.swapaxes(w, 1, 2).astype(dy.dtype), group_sizes, *constants
    dx = _products.multiply(options.backward, *operands, rows=rows, columns=columns)
    pow_2_scales = options.pow_2_scales
    quantized_x = ragged_transpose_quant(x, group_sizes, input_scales=input_scales, pow_2_scales=pow_2_scales)
    quantized_dy = ragged_transpose_quant(dy, group_sizes, pow_2_scales=pow_2_scales)
    dw = weight_gradient(quantized_x, quantized_dy, options.target, accumulate)
    return dx, None, *_cotangents(dw, accumulate), None, None


_grouped_linear = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_grouped_linear.defvjp(_forward, _backward)
