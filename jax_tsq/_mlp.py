"""moe_mlp: gate and up, SwiGLU, down for all experts, with FP8 inside and all that quantizes fused."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jax_tsq import _accumulate
from jax_tsq._blocks import BlockQuantized
from jax_tsq._core import derivatives, meshes, validate
from jax_tsq._dual import ragged_quantize
from jax_tsq._linear import check_target, placed, quantized, weight_gradient
from jax_tsq._matmul import check_weights, ragged_matmul
from jax_tsq._ragged import RaggedQuantized
from jax_tsq._rows import quantize_rows
from jax_tsq._swiglu import check_limit, check_routing, swiglu_backward_quantize, swiglu_quantize


def moe_mlp(
    x: jax.Array,
    w_gate_up: jax.Array | tuple[jax.Array, jax.Array],
    w_down: jax.Array,
    group_sizes: jax.Array,
    weights: jax.Array | None = None,
    *,
    pow_2_scales: bool = False,
    quantized_weights: tuple[BlockQuantized, BlockQuantized] | None = None,
    limit: float | None = None,
    accumulate: tuple[jax.Array | tuple[jax.Array, jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Runs every group of tokens through the SwiGLU MLP of its own expert; all six products take FP8 operands.

        gate, up = x[t] @ w_gate[e], x[t] @ w_up[e]       for the tokens t of group e
        h        = silu(gate) * up * weights[t]
        y[t]     = h @ w_down[e]                          0 past the sum of the sizes

    It is one differentiable function, so that quantization goes with what reads the data anyway: x and dy are read once
    each by `jax_tsq.ragged_quantize`; SwiGLU is `jax_tsq.swiglu_quantize` and its gradient
    `jax_tsq.swiglu_backward_quantize`, which also gives h again; products are `jax_tsq.ragged_matmul` and
    `jax_tsq.ragged_weight_gradient`. Without a gradient x is quantized along rows alone. Everything that goes in and
    comes out is as wide as without FP8: small gradients are scaled, not lost.

    With routing weights the sum over a token's experts is all that is left to do with y. Their gradient comes with that
    of SwiGLU, so that y is not kept for it.

    Rows past the sum of the sizes reach neither y nor a gradient, whatever they hold. A group without tokens has zero
    weight gradients. Sizes that no kernel takes are computed by the portable paths of those functions.

    Kept for the backward pass are the columns of x in FP8, gates and ups in bfloat16, the expert weights (or
    `quantized_weights`), sizes and routing weights: of a token H + 4 * F bytes. For rematerialization these are named
    `moe_mlp_x` and `moe_mlp_gate_up`; policies such as
    `jax.checkpoint_policies.save_only_these_names("moe_mlp_x", "moe_mlp_gate_up")` save them.

    Inside `jax.shard_map` experts can be split, with the tokens that are routed to them, and so can F, for which gates
    and ups are a pair: y is then a partial sum, to be summed by `jax.lax.psum`, and JAX sums the gradients of x and of
    the routing weights, which all devices share, by itself. Outside of it a split F is gathered.

    Args:
        x: bfloat16 `[M, H]`, tokens sorted by group.
        w_gate_up: `[E, H, 2 * F]` of a floating dtype of 16 bits or more, the weights of gates and then of ups; or the
            pair of both, `[E, H, F]` each. Rounded to bfloat16 before they are quantized.
        w_down: `[E, F, H]`, likewise.
        group_sizes: integers `[E]`, tokens of each group; their sum is at most M. Checked where they are not traced.
        weights: None, or float32 `[M]`, the routing weight of each token.
        pow_2_scales: whether the FP8 scales are powers of two.
        quantized_weights: None, or `(quantize_blocks(w_gate_up), quantize_blocks(w_down))`, made once for several
            calls: microbatches, or forward and backward pass. The values of w_gate_up and w_down are not read then;
            their gradients still go to them. Where those are differentiated, make it of `jax.lax.stop_gradient` of
            them.
        limit: None, or a number from 2**-126 on that gates are clamped to from above, and ups from both sides, as by
            the `swiglu_limit` of gpt-oss. What was clamped has no gradient.
        accumulate: None, or the pair of float32 accumulators shaped as w_gate_up, a pair itself where that is one, and
            as w_down: the sums of other microbatches' gradients. Their values do not reach y. What differentiation
            gives for them is not a derivative but the running sums, accumulator + gradient, in their own memory where
            that can be donated; w_gate_up and w_down have no gradient then. Give an accumulator to one call, once: JAX
            adds what several calls give, and with them the accumulator itself. See `docs/accumulation.md`.

    Returns:
        `[M, H]` bfloat16.

    Raises:
        TypeError: x is not bfloat16, expert weights not floating or float8, group_sizes not integers, weights not
            float32, a flag not a bool, quantized_weights not a pair of `BlockQuantized`, or accumulate not a pair of
            float32 arrays; or it is differentiated in forward mode, which no `jax.custom_vjp` takes.
        ValueError: a shape is wrong, shapes do not fit together, limit is not a finite number above 0, sizes that are
            not traced are negative or sum to more than M, or accumulate is without a dimension over which `jax.vmap`
            maps other operands.
        NotImplementedError: a second derivative is taken, or the gradient of quantized_weights.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x = jax.random.normal(jax.random.key(0), (300, 64), jnp.bfloat16)
        >>> w_gate, w_up = jax.random.normal(jax.random.key(1), (2, 4, 64, 128)) / 8
        >>> w_down = jax.random.normal(jax.random.key(2), (4, 128, 64)) / 11
        >>> sizes, weights = jnp.array([100, 0, 150, 50], jnp.int32), jnp.full(300, 0.5)
        >>> def loss(w_gate, w_up, w_down, weights):
        ...     y = jax_tsq.moe_mlp(x, (w_gate, w_up), w_down, sizes, weights)
        ...     return y.astype(jnp.float32).var()
        >>> gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(w_gate, w_up, w_down, weights)
        >>> tuple(gradient.shape for gradient in gradients)
        ((4, 64, 128), (4, 64, 128), (4, 128, 64), (300,))

    The recipe is that of DeepSeek-V3 (arXiv:2412.19437, section 3.3).
    """
    x, parts, w_down, group_sizes = _check_operands(x, w_gate_up, w_down, group_sizes)
    weights = check_routing(weights, x.shape[0])
    pow_2_scales = validate.check_flag("pow_2_scales", pow_2_scales)
    check_limit(limit)
    quantized_weights = _check_quantized(quantized_weights, parts, w_down)
    sums = _check_accumulate(accumulate, parts, w_down, isinstance(w_gate_up, Sequence))
    # Where manual mesh axes differ between the operands, their gradients are summed by the transpose of this cast. An
    # accumulator must not be, so it is no part of this.
    leaves, tree = jax.tree.flatten((x, parts, w_down, group_sizes, weights, quantized_weights))
    operands = jax.tree.unflatten(tree, meshes.vary_alike(leaves))
    options = _Options(pow_2_scales, limit, *jax.tree.map(jax.typeof, operands[:3]))
    return _mlp(options, *operands, sums)


def _check_operands(x, w_gate_up, w_down, group_sizes):
    """Returns x, the parts of w_gate_up, w_down and group_sizes as JAX arrays."""
    x = validate.check_tokens(x, dtypes=(jnp.bfloat16,))
    group_sizes = validate.check_sizes(group_sizes, x.shape[0])
    groups, width = group_sizes.shape[0], x.shape[1]
    is_pair = isinstance(w_gate_up, Sequence)
    if is_pair and len(w_gate_up) != 2:
        raise ValueError(
            f"w_gate_up must be an array or the pair (w_gate, w_up); got {validate.describe(w_gate_up)}. Pass both "
            "parts, or one array that holds both."
        )
    parts = tuple(_check_floating("w_gate_up", w) for w in (w_gate_up if is_pair else [w_gate_up]))
    w_down = _check_floating("w_down", w_down)
    shapes = {(w.dtype, tuple(w.shape)) for w in parts}
    features = parts[0].shape[-1] if is_pair else parts[0].shape[-1] // 2
    if len(shapes) > 1 or tuple(parts[0].shape) != (groups, width, features if is_pair else 2 * features):
        raise ValueError(
            f"w_gate_up must be [E, H, 2 * F], or a pair of [E, H, F] of one dtype, with E = {groups} groups as in "
            f"group_sizes and H = {width} features as in x; got {validate.describe(w_gate_up)}. If H comes last, pass "
            "jnp.swapaxes(w, 1, 2) of each array."
        )
    if tuple(w_down.shape) != (groups, features, width):
        raise ValueError(
            f"w_down must be [E, F, H], here {[groups, features, width]} for w_gate_up "
            f"{validate.describe(w_gate_up)}; got {validate.describe(w_down)}. If F comes last, pass "
            "jnp.swapaxes(w_down, 1, 2)."
        )
    return x, parts, w_down, group_sizes


def _check_floating(name: str, w) -> jax.Array:
    rule = f"{name} must be an array of a floating dtype of 16 bits or more, because its gradient gets that dtype, too"
    if not validate.is_array(w):
        raise TypeError(f"{rule}; got {validate.describe(w)}. {validate.fix_for(name, w, join='jnp.stack')}")
    if not jnp.issubdtype(w.dtype, jnp.floating) or jnp.finfo(w.dtype).bits < 16:
        raise TypeError(f"{rule}; got {validate.describe(w)}. Keep the weights in bfloat16 or float32.")
    if len(w.shape) != 3:
        raise ValueError(
            f"{name} must be three-dimensional, experts first; got {validate.describe(w)}. Use jax.vmap for batch "
            "dimensions."
        )
    return jnp.asarray(w)


def _check_quantized(quantized_weights, parts, w_down) -> tuple[BlockQuantized, BlockQuantized] | None:
    if quantized_weights is None:
        return None
    rule = "quantized_weights must be the pair (quantize_blocks(w_gate_up), quantize_blocks(w_down))"
    if isinstance(quantized_weights, BlockQuantized) or not isinstance(quantized_weights, Sequence):
        raise TypeError(f"{rule}; got {validate.describe(quantized_weights)}.")
    if len(quantized_weights) != 2:
        raise ValueError(f"{rule}; got {len(quantized_weights)} of them.")
    groups, width = parts[0].shape[:2]
    shapes = [(groups, width, sum(w.shape[2] for w in parts)), tuple(w_down.shape)]
    for i, (one, shape) in enumerate(zip(quantized_weights, shapes, strict=True)):
        check_weights(f"quantized_weights[{i}]", one)
        if tuple(one.values.shape) != shape:
            raise ValueError(
                f"{rule}, here with values of shapes {list(shapes[0])} and {list(shapes[1])}; got "
                f"{list(one.values.shape)} for quantized_weights[{i}]."
            )
    return jax.tree.map(derivatives.refuse(_NO_GRADIENT_OF_QUANTIZED, jnp.asarray), tuple(quantized_weights))


def _check_accumulate(accumulate, parts, w_down, is_pair: bool) -> tuple[tuple[jax.Array, ...], jax.Array] | None:
    """Returns the accumulators of w_gate_up's parts, and that of w_down."""
    if accumulate is None:
        return None
    rule = "accumulate must be the pair of what gets the gradients of w_gate_up and of w_down"
    if not isinstance(accumulate, Sequence):
        raise TypeError(f"{rule}; got {validate.describe(accumulate)}.")
    if len(accumulate) != 2:
        raise ValueError(f"{rule}; got {len(accumulate)} of them.")
    first, last = accumulate
    if is_pair and (not isinstance(first, Sequence) or len(first) != 2):
        raise ValueError(
            f"accumulate[0] must be a pair, because w_gate_up is one; got {validate.describe(first)}. Pass an "
            "accumulator for gates and one for ups."
        )
    firsts = tuple(
        check_target(f"accumulate[0]{f'[{i}]' if is_pair else ''}", one, "w_gate_up", w)
        for i, (one, w) in enumerate(zip(first if is_pair else [first], parts, strict=True))
    )
    return firsts, check_target("accumulate[1]", last, "w_down", w_down)


_NO_GRADIENT_OF_QUANTIZED = (
    "jax_tsq.moe_mlp gives no gradient of quantized_weights: those of the weights go to w_gate_up and w_down. Put "
    "jax.lax.stop_gradient around quantized_weights."
)
_once = derivatives.refuse(
    "jax_tsq.moe_mlp has no second derivative, because its gradient rounds what it multiplies to float8_e4m3fn. Where "
    "jax.hessian or a gradient of a gradient is needed, write the layer with jax.lax.ragged_dot.",
    lambda a: a,
)


class _Options(NamedTuple):
    """What is known before any value is: options of `moe_mlp`, and types of x, of w_gate_up's parts and of w_down."""

    pow_2_scales: bool
    limit: float | None
    x: Any
    w_gate_up: tuple[Any, ...]
    w_down: Any


def _gate_up(options: _Options, rows, w_gate_up, group_sizes, quantized_weights) -> jax.Array:
    """SwiGLU's operand, bfloat16 `[M, 2 * F]`."""
    w = quantized(w_gate_up, quantized_weights and quantized_weights[0], options.pow_2_scales)
    return ragged_matmul(rows, w, group_sizes)


def _down(options: _Options, gate_up, w_down, group_sizes, weights, quantized_weights) -> jax.Array:
    """y of SwiGLU's operand."""
    h = swiglu_quantize(gate_up, group_sizes, weights, pow_2_scales=options.pow_2_scales, limit=options.limit)
    w = quantized(w_down, quantized_weights and quantized_weights[1], options.pow_2_scales)
    return placed(ragged_matmul(h, w, group_sizes), P(options.x.sharding.spec[0], options.w_down.sharding.spec[2]))


def _outputs(options: _Options, x, w_gate_up, w_down, group_sizes, weights, quantized_weights, accumulate):
    """y; only rows are quantized."""
    rows = quantize_rows(x, group_sizes, pow_2_scales=options.pow_2_scales)
    gate_up = _gate_up(options, rows, w_gate_up, group_sizes, quantized_weights)
    return _down(options, gate_up, w_down, group_sizes, weights, quantized_weights)


def _forward(options: _Options, x, w_gate_up, w_down, group_sizes, weights, quantized_weights, accumulate):
    x, w_gate_up, w_down, weights, accumulate = jax.tree.map(_once, (x, w_gate_up, w_down, weights, accumulate))
    rows, columns = ragged_quantize(x, group_sizes, pow_2_scales=options.pow_2_scales)
    columns = RaggedQuantized(*(checkpoint_name(a, "moe_mlp_x") for a in columns))
    gate_up = _gate_up(options, rows, w_gate_up, group_sizes, quantized_weights)
    gate_up = checkpoint_name(gate_up, "moe_mlp_gate_up")
    y = _down(options, gate_up, w_down, group_sizes, weights, quantized_weights)
    expert_weights = (w_gate_up, w_down) if quantized_weights is None else (None, None)
    accumulate = _accumulate.keep("moe_mlp", y, accumulate)
    return y, (columns, gate_up, *expert_weights, group_sizes, weights, quantized_weights, accumulate)


def _backward(options: _Options, residuals, dy):
    x, gate_up, w_gate_up, w_down, group_sizes, weights, quantized_weights, accumulate = residuals
    pow_2_scales = options.pow_2_scales
    w1, w2 = (
        quantized(w, quantized_weights and quantized_weights[i], pow_2_scales)
        for i, w in enumerate((w_gate_up, w_down))
    )
    rows, dy_columns = ragged_quantize(_once(dy), group_sizes, pow_2_scales=pow_2_scales)
    dh = ragged_matmul(rows, w2, group_sizes, transpose_w=True)
    rows, columns, h, dweights = swiglu_backward_quantize(
        gate_up, dh, group_sizes, weights, pow_2_scales=pow_2_scales, limit=options.limit
    )
    dweights = None if dweights is None else placed(dweights, jax.typeof(weights).sharding.spec)
    dx = placed(ragged_matmul(rows, w1, group_sizes, transpose_w=True), options.x.sharding.spec)
    # Of a pair, operands are sliced and not the gradient, which may be many times as large.
    features = columns.values.shape[0] // len(options.w_gate_up)
    targets = (*options.w_gate_up, options.w_down)
    sums = [None] * len(targets) if accumulate is None else [*accumulate[0], accumulate[1]]
    parts = [(x, _features(columns, i * features, (i + 1) * features)) for i in range(len(options.w_gate_up))]
    *dw_gate_up, dw_down = (
        weight_gradient(*operands, target, one)
        for operands, target, one in zip([*parts, (h, dy_columns)], targets, sums, strict=True)
    )
    dw = tuple(dw_gate_up), dw_down
    if accumulate is None:
        return dx, *dw, None, dweights, None, None
    return dx, None, None, None, dweights, None, dw


def _features(columns: RaggedQuantized, start: int, stop: int) -> RaggedQuantized:
    return columns._replace(values=columns.values[start:stop], scales=columns.scales[:, start:stop])


_mlp = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_mlp.defvjp(_forward, _backward)
