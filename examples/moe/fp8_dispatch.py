"""Expert-parallel dispatch of tokens in FP8: quantized once, where they are, and sent as bytes.

A row travels as its values, its scales and its routing weight, half the bytes of bf16; so does the gradient of the
result. Products take rows as they arrive. Operands of the weight gradients are quantized from those rows, which
power-of-two scales make exact but for subnormals. What experts send back, and the gradient of x, is bf16.

From tokens to the sums over their experts all is one `jax.custom_vjp`: float8 is never differentiated.
"""

import jax
import jax.numpy as jnp

import jax_tsq
from examples.moe import layer, modes


def _bytes(floats: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(floats, jnp.uint8).reshape(len(floats), -1)


def send(x: jax.Array, top: int, way: layer.Route, *others: jax.Array) -> tuple[jax_tsq.RowQuantized, jax.Array]:
    """Sends tokens `[T, D]` to `top` experts each, in one message: sorted by expert, quantized rows and the rest.

    Args:
        others: what else there is of each row, float32 `[T * top, any]`.
    """
    rows = jax_tsq.quantize_rows(x, pow_2_scales=True)
    packed = jnp.concatenate([jax.lax.bitcast_convert_type(rows.values, jnp.uint8), _bytes(rows.scales)], axis=1)
    packed = jnp.concatenate([jnp.repeat(packed, top, axis=0), *map(_bytes, others)], axis=1)
    received, features = layer.send(packed, way), x.shape[1]
    values = jax.lax.bitcast_convert_type(received[:, :features], jnp.float8_e4m3fn)
    floats = jax.lax.bitcast_convert_type(received[:, features:].reshape(len(received), -1, 4), jnp.float32)
    blocks = rows.scales.shape[1]
    return jax_tsq.RowQuantized(values, floats[:, :blocks]), floats[:, blocks:]


def columns(rows: jax_tsq.RowQuantized, group_sizes: jax.Array) -> jax_tsq.RaggedQuantized:
    """The operand of a weight gradient, from rows that are quantized already."""
    return jax_tsq.ragged_transpose_quant(rows.values, group_sizes, input_scales=rows.scales, pow_2_scales=True)


def _outputs(top, x, weights, expert_weights, sums, quantized, way):
    return _forward(top, x, weights, expert_weights, sums, quantized, way)[0]


def _forward(top, x, weights, expert_weights, sums, quantized, way):
    """Sums over the experts of each token, float32 `[T, D]`."""
    rows, weights_there = send(x, top, way, weights.reshape(-1, 1))
    gate_up = jax_tsq.ragged_matmul(rows, quantized[0], way.group_sizes)
    h = jax_tsq.swiglu_quantize(gate_up, way.group_sizes, weights_there[:, 0], pow_2_scales=True)
    y = jax_tsq.ragged_matmul(h, quantized[1], way.group_sizes)
    kept = rows, gate_up, weights_there[:, 0], sums, quantized, way
    return layer.combine(layer.send_back(y, way), len(x), way.order, way.inverse), kept


def _backward(top, kept, dout):
    rows, gate_up, weights, sums, quantized, way = kept
    sizes = way.group_sizes
    dy, _ = send(dout.astype(jnp.bfloat16), top, way)
    dh = jax_tsq.ragged_matmul(dy, quantized[1], sizes, transpose_w=True)
    do1, do1_columns, h_columns, dweights = jax_tsq.swiglu_backward_quantize(
        gate_up, dh, sizes, weights, pow_2_scales=True
    )
    dx = jax_tsq.ragged_matmul(do1, quantized[0], sizes, transpose_w=True)
    operands = (columns(rows, sizes), do1_columns), (h_columns, columns(dy, sizes))
    accumulate = (None, None) if sums is None else sums
    dw = tuple(
        jax_tsq.ragged_weight_gradient(*both, accumulate=one) for both, one in zip(operands, accumulate, strict=True)
    )
    dx = layer.combine(layer.send_back(dx, way), len(dout), way.order, way.inverse).astype(jnp.bfloat16)
    dweights = layer.send_back(jnp.asarray(dweights)[:, None], way)[way.inverse].reshape(-1, top)
    return dx, dweights, *((dw, None) if sums is None else (None, dw)), None, None


_experts = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_experts.defvjp(_forward, _backward)


def moe(params: dict, x: jax.Array, chosen: jax.Array, weights: jax.Array, experts: modes.Experts) -> jax.Array:
    """As `layer.moe_all_to_all` with the experts of `fp8-mlp-pow2`, whatever `experts` is."""
    way = layer.route(chosen.reshape(-1), params["down"].shape[0])
    x, weights = (jax.lax.pcast(a, "tensor", to="varying") for a in (x, weights))
    expert_weights, sums = (
        one and (modes.joined(one["gate_up"]), one["down"]) for one in (params, params.get("accumulate"))
    )
    out = _experts(chosen.shape[1], x, weights, expert_weights, sums, params["quantized"], way)
    return jax.lax.psum(out, "tensor")
