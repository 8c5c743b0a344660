"""Ways to the products of a linear layer and to the layer, ours and of peers, and the operands that they take."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

import jax_tsq
from benchmarks.lib import peers


class Size(NamedTuple):
    tokens: int
    features: int
    outputs: int
    experts: int


class Program(NamedTuple):
    """A way to some of y, dx and dW, `results`, of the operands of these names."""

    kind: str
    way: str
    run: Callable
    operands: tuple[str, ...]
    results: tuple[str, ...]
    ours: bool = False
    forward: Any = None  # of all operands but the last one, for what it keeps; None for a product


@functools.partial(jax.jit, static_argnums=(0,))
def normal(shape: tuple[int, int], seed):
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def nbytes(tree) -> int:
    """Of arrays or of their types."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def operands_of(size: Size) -> dict[str, Any]:
    """What does not depend on the sizes of the groups."""
    shape = (size.experts, size.features, size.outputs)
    w = jax.jit(lambda: jax.random.normal(jax.random.key(2), shape, jnp.bfloat16))()
    return {
        "x": normal((size.tokens, size.features), 0),
        "dy": normal((size.tokens, size.outputs), 1),
        "w": w,
        "w_float32": w.astype(jnp.float32),
        "quantized_w": jax.jit(jax_tsq.quantize_blocks)(w),
    }


def with_sizes(operands: dict[str, Any], per_expert: list[int]) -> dict[str, Any]:
    sizes = jnp.asarray(per_expert, jnp.int32)
    added: dict[str, Any] = {"sizes": sizes}
    for name in ("x", "dy"):
        rows, added[f"columns_{name}"] = jax.jit(jax_tsq.ragged_quantize)(operands[name], sizes)
        column_major = Format(Layout((1, 0)), rows.scales.sharding)  # as they lie inside a program
        added[f"rows_{name}"] = rows._replace(scales=jax.device_put(rows.scales, column_major))
        if len(per_expert) <= peers.MOST_LOOP_EXPERTS:
            added[f"groups_{name}"] = jnp.split(operands[name], np.cumsum(per_expert)[:-1])
    if len(per_expert) <= peers.MOST_LOOP_EXPERTS:
        added["groups_w"] = list(operands["w"])
    return operands | added


def our_products() -> Iterator[Program]:
    def product(transpose_w):
        return lambda rows, w, sizes: jax_tsq.ragged_matmul(rows, w, sizes, transpose_w=transpose_w)

    def weight_gradient(dtype):
        return lambda x, dy: jax_tsq.ragged_weight_gradient(x, dy, dtype=dtype)

    both = ("columns_x", "columns_dy")
    yield Program("forward", "jax_tsq", product(False), ("rows_x", "quantized_w", "sizes"), ("y",), True)
    yield Program("input_gradient", "jax_tsq", product(True), ("rows_dy", "quantized_w", "sizes"), ("dx",), True)
    yield Program("weight_gradient", "jax_tsq", weight_gradient(jnp.float32), both, ("dw",), True)
    yield Program("weight_gradient", "jax_tsq_bfloat16", weight_gradient(jnp.bfloat16), both, ("dw",), True)


def with_gradients(
    kind: str, way: str, forward: Callable, operands: tuple[str, ...], results: tuple[str, ...], ours: bool = False
) -> Program:
    """Forward and backward of `forward(*operands)` without the last operand, the gradient of its result.

    As many of the first operands have gradients as there are results but one.
    """
    wrt = len(results) - 1

    def run(*operands):
        *first, dy = operands
        y, gradients = jax.vjp(lambda *of: forward(*of, *first[wrt:]), *first[:wrt])
        return y, *gradients(dy)

    return Program(kind, way, run, operands, results, ours, forward)


def layer(way: str, linear: Callable, operands: tuple[str, ...], ours: bool = False) -> Program:
    """Forward and backward of `linear(x, w, ...)`."""
    return with_gradients("layer", way, linear, operands, ("y", "dx", "dw"), ours)


def our_layers() -> Iterator[Program]:
    def given(x, w, sizes, quantized_w):
        return jax_tsq.grouped_linear(x, w, sizes, quantized_w=quantized_w)

    def bfloat16(x, master_w, sizes, w):
        return jax_tsq.grouped_linear(x, w, sizes, master_w=master_w)

    operands = ("x", "w_float32", "sizes")
    yield layer("quantized_w", given, (*operands, "quantized_w", "dy"), True)
    yield layer("w_float32", jax_tsq.grouped_linear, (*operands, "dy"), True)
    yield layer("w_bfloat16", bfloat16, (*operands, "w", "dy"), True)


def of_peers(size: Size, failed: Callable[[str, Exception], None]) -> Iterator[Program]:
    """The products and the layer of every peer; `failed(way, why)` is told of those that are not there."""
    ways = {"pallas": peers.pallas, "tokamax": peers.tokamax, "torch": peers.torch}
    if size.experts <= peers.MOST_LOOP_EXPERTS:
        ways["loop"] = peers.loop
    if size.experts <= peers.MOST_RAGGED_DOT_EXPERTS:
        ways["ragged_dot"] = peers.ragged_dot
    for way, make in ways.items():
        try:
            products = make()
        except Exception as why:
            failed(way, why)
            continue
        x, dy, w = ("groups_x", "groups_dy", "groups_w") if way == "loop" else ("x", "dy", "w")
        yield Program("forward", way, products.forward, (x, w, "sizes"), ("y",))
        yield Program("input_gradient", way, products.input_gradient, (dy, w, "sizes"), ("dx",))
        if products.weight_gradient is not None:
            yield Program("weight_gradient", way, products.weight_gradient, (x, dy, "sizes"), ("dw",))
            yield layer(way, peers.linear(products), (x, w, "sizes", dy))


def programs(size: Size, failed: Callable[[str, Exception], None]) -> Iterator[Program]:
    """Our products first, with which all others are compared; `failed` as in `of_peers`."""
    yield from our_products()
    yield from our_layers()
    yield from of_peers(size, failed)


def memory_of(program: Program, arguments: tuple, compiled) -> dict:
    """Bytes of the temporaries of a program with gradients, and what it keeps for the backward pass.

    What it keeps for a token is all but the weights, which have three dimensions or are operands: groups' arrays.
    """
    wrt = len(program.results) - 1
    first = arguments[:-1]

    def kept(*first):
        return jax.vjp(lambda *of: program.forward(*of, *first[wrt:]), *first[:wrt])[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, *first))
    weights = {leaf.shape for leaf in jax.tree.leaves(first[1:wrt]) if leaf.ndim > 1}
    arrays: dict[str, int] = {}
    for leaf in leaves:
        name = f"{leaf.dtype.name} {list(leaf.shape)}"
        arrays[name] = arrays.get(name, 0) + nbytes(leaf)
    tokens = sum(leaf.shape[0] for leaf in jax.tree.leaves(arguments[0]))
    of_tokens = [leaf for leaf in leaves if leaf.ndim < 3 and leaf.shape not in weights]
    analysis = compiled.memory_analysis()
    return {
        "temporary_bytes": None if analysis is None else analysis.temp_size_in_bytes,
        "kept_bytes": sum(arrays.values()),
        "kept_bytes_per_token": nbytes(of_tokens) / tokens,
        "kept": arrays if len(arrays) < 12 else {},  # not those of every group
    }
