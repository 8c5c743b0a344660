"""The products of a linear layer of experts in bfloat16, by what else there is for them."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MOST_RAGGED_DOT_EXPERTS = 32  # beyond it a call takes a tenth of a second
MOST_LOOP_EXPERTS = 64  # each is a product to compile


class Products(NamedTuple):
    """y of `(x, w, sizes)`, dx of `(dy, w, sizes)` and dW of `(x, dy, sizes)`; None where there is no way to it."""

    forward: Callable
    input_gradient: Callable
    weight_gradient: Any


def _dimensions(lhs: int, rhs: int, groups: list[int]) -> jax.lax.RaggedDotDimensionNumbers:
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((lhs,), (rhs,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=groups
    )


def _general(dot: Callable) -> Products:
    """By a function with the arguments of `jax.lax.ragged_dot_general`."""

    def product(*dimensions):
        numbers = _dimensions(*dimensions)

        def run(lhs, rhs, sizes):
            options: dict[str, Any] = dict(ragged_dot_dimension_numbers=numbers, preferred_element_type=jnp.bfloat16)
            return dot(lhs, rhs, group_sizes=sizes, **options)

        return run

    return Products(product(1, 1, [0]), product(1, 2, [0]), product(0, 0, []))


def ragged_dot() -> Products:
    return _general(jax.lax.ragged_dot_general)


def tokamax() -> Products:
    return _general(importlib.import_module("tokamax._src.ops.ragged_dot.triton").TritonRaggedDot())


def pallas(block_k: int = 64, steps: int = 4) -> Products:
    """By the kernels of JAX's own for Hopper.

    Args:
        block_k, steps: `block_k` and `max_concurrent_steps` of the weight gradient.
    """
    package = "jax.experimental.pallas.ops.gpu"
    dot = importlib.import_module(f"{package}.ragged_dot_mgpu").ragged_dot
    transposed = importlib.import_module(f"{package}.transposed_ragged_dot_mgpu").transposed_ragged_dot
    rows = dict(block_m=128, block_n=192, block_k=64, max_concurrent_steps=4, grid_block_n=8)
    columns = dict(block_m=128, block_n=128, block_k=block_k, max_concurrent_steps=steps, grid_block_n=8)
    return Products(
        lambda x, w, sizes: dot(x, w, group_sizes=sizes, **rows),
        lambda dy, w, sizes: dot(dy, w, group_sizes=sizes, transpose_rhs=True, **rows),
        lambda x, dy, sizes: transposed(x, dy, group_sizes=sizes, **columns),
    )


def loop() -> Products:
    """One dot for each group: operands and results are lists of the groups' arrays, sizes those of the arrays."""
    return Products(
        lambda xs, ws, _: [x @ w for x, w in zip(xs, ws, strict=True)],
        lambda dys, ws, _: [dy @ w.T for dy, w in zip(dys, ws, strict=True)],
        lambda xs, dys, _: [x.T @ dy for x, dy in zip(xs, dys, strict=True)],
    )


def torch() -> Products:
    """By `torch._grouped_mm` of torch's tensors."""
    torch = importlib.import_module("torch")

    def product(x, w, sizes):
        return torch._grouped_mm(x, w, offs=sizes.cumsum(0, dtype=torch.int32), out_dtype=torch.bfloat16)

    return Products(product, lambda dy, w, sizes: product(dy, w.transpose(1, 2), sizes), None)


def linear(products: Products) -> Callable:
    """The differentiable layer `(x, w, sizes) -> y` of these products, which keeps its operands."""

    @jax.custom_vjp
    def run(x, w, sizes):
        return products.forward(x, w, sizes)

    def backward(kept, dy):
        x, w, sizes = kept
        return products.input_gradient(dy, w, sizes), products.weight_gradient(x, dy, sizes), None

    run.defvjp(lambda *operands: (run(*operands), operands), backward)
    return run
