"""Ways to an expert block, gate and up, SwiGLU and down, ours and of peers, and the operands that they take.

Of a size `features` is the model's width and `outputs` the expert's. Peers get their SwiGLU from XLA: in float32, its
result rounded to bfloat16; of it they keep its operands for the backward pass, as a good implementation does.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.lib import peers
from benchmarks.lib.layer_programs import Program, Size, normal, with_gradients

OPERANDS = ("x", "w_gate_up", "w_down", "weights", "sizes")
RESULTS = ("y", "dx", "dw_gate_up", "dw_down", "dweights")
MOST_RAGGED_DOT_EXPERTS = 8  # its block of 32 takes a fifth of a second


def operands_of(size: Size) -> dict[str, Any]:
    """What does not depend on the sizes of the groups."""

    def weight(seed, fan_in, fan_out):
        key, shape = jax.random.key(seed), (size.experts, fan_in, fan_out)
        return jax.jit(lambda: jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(fan_in**-0.5))()

    w = weight(2, size.features, 2 * size.outputs), weight(3, size.outputs, size.features)
    return {
        "x": normal((size.tokens, size.features), 0),
        "dy": normal((size.tokens, size.features), 1),
        "weights": jax.random.uniform(jax.random.key(4), (size.tokens,)),
        "w_gate_up": w[0],
        "w_down": w[1],
        "w_gate_up_float32": w[0].astype(jnp.float32),
        "w_down_float32": w[1].astype(jnp.float32),
        "quantized_weights": tuple(map(jax.jit(jax_tsq.quantize_blocks), w)),
    }


def with_sizes(operands: dict[str, Any], per_expert: list[int]) -> dict[str, Any]:
    added: dict[str, Any] = {"sizes": jnp.asarray(per_expert, jnp.int32)}
    if len(per_expert) <= peers.MOST_LOOP_EXPERTS:
        for name in ("x", "dy", "weights"):
            added[f"groups_{name}"] = jnp.split(operands[name], np.cumsum(per_expert)[:-1])
        for name in ("w_gate_up", "w_down"):
            added[f"groups_{name}"] = list(operands[name])
    return operands | added


def _ours() -> Iterator[Program]:
    def block(x, w_gate_up, w_down, weights, sizes, quantized_weights=None):
        return jax_tsq.moe_mlp(x, w_gate_up, w_down, sizes, weights, quantized_weights=quantized_weights)

    float32 = ("x", "w_gate_up_float32", "w_down_float32", "weights", "sizes")
    for way, operands in {
        "quantized_weights": (*float32, "quantized_weights"),
        "w_float32": float32,
        "w_bfloat16": OPERANDS,
    }.items():
        yield with_gradients("block", way, block, (*operands, "dy"), RESULTS, ours=True)


def _swiglu(gate_up, weights):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (jax.nn.silu(gate) * up * weights[:, None]).astype(jnp.bfloat16)


swiglu = jax.custom_vjp(_swiglu)
swiglu.defvjp(lambda *operands: (_swiglu(*operands), operands), lambda kept, dh: jax.vjp(_swiglu, *kept)[1](dh))


def of_peer(products: peers.Products) -> Callable:
    """The differentiable block `(x, w_gate_up, w_down, weights, sizes) -> y` of these products."""
    linear = peers.linear(products)

    def block(x, w_gate_up, w_down, weights, sizes):
        h = jax.tree.map(swiglu, linear(x, w_gate_up, sizes), weights)
        return linear(h, w_down, sizes)

    return block


def programs(size: Size, failed: Callable[[str, Exception], None]) -> Iterator[Program]:
    """Peers first, the loop before others; `failed(way, why)` is told of peers that are not there."""
    ways = {"loop": peers.loop, "pallas": peers.pallas}
    if size.experts <= MOST_RAGGED_DOT_EXPERTS:
        ways["ragged_dot"] = peers.ragged_dot
    for way, make in ways.items():
        try:
            block = of_peer(make())
        except Exception as why:
            failed(way, why)
            continue
        names = (*OPERANDS, "dy")
        if way == "loop":
            names = tuple(name if name == "sizes" else f"groups_{name}" for name in names)
        yield with_gradients("block", way, block, names, RESULTS)
    yield from _ours()
