"""Sizes of an expert's linear layer and of SwiGLU between two, for the operations that quantize operands there."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.quantizer import CPU_SIZE, Case, Size, label, tokens
from benchmarks.lib.tables import load, load_if_measured, markdown, on_card, provenances

LINEAR = {"rows": "quantize_rows", "dual": "ragged_quantize"}
SWIGLU = {"swiglu": "swiglu_quantize", "dswiglu": "swiglu_backward_quantize"}
LAYERS = [Size(32768, 7168, 8), Size(32768, 4096, 32), Size(65536, 7168, 64)]
EXPERTS = [Size(32768, 2048, 8), Size(32768, 4096, 32), Size(65536, 2048, 64)]  # features are those of h


class Shares(NamedTuple):
    """Of the copy limit, that an operation is held to; a quarter full has random sizes."""

    random: float
    aligned: float
    quarter: float | None = None


def x_of(size: Size, seed: int) -> tuple:
    return tokens(size, "bf16", seed)


def swiglu_of(size: Size, seed: int) -> tuple:
    """Gates and ups, and routing weights."""
    weights = jax.jit(jax.random.uniform, static_argnums=1)(jax.random.key(seed), (size.tokens,))
    return *x_of(size._replace(features=2 * size.features), seed), weights


def dswiglu_of(size: Size, seed: int) -> tuple:
    """Gates and ups, routing weights, and the gradient of h."""
    return *swiglu_of(size, seed), *x_of(size, seed + 1000)


def _case(
    operation: str,
    run: Callable,
    operands: Callable,
    size: Size,
    counts: str,
    target: float | None = None,
    reads: float = 1,
) -> Case:
    sizes = jagged(int(size.tokens * reads), size.experts, BLOCK if counts == "aligned" else 1)

    def arguments(i):
        return (jnp.asarray(np.roll(sizes, i), jnp.int32), *operands(size, i))

    name = operation if reads == 1 else f"{operation}, quarter full"
    return Case(name, "bf16", counts, size, run, arguments, target, reads)


def on_gpu(
    operation: str, run: Callable, shares: Shares, operands: Callable = x_of, sizes: Sequence[Size] = LAYERS
) -> Iterator[Case]:
    """Cases of `run(group_sizes, *operands(size, seed))`."""
    for counts, target in (("random", shares.random), ("aligned", shares.aligned)):
        yield from (_case(operation, run, operands, size, counts, target) for size in sizes)
    yield from (_case(operation, run, operands, size, "random", shares.quarter, 0.25) for size in sizes)


def on_cpu(operation: str, run: Callable, operands: Callable = x_of) -> Iterator[Case]:
    yield _case(operation, run, operands, CPU_SIZE, "random")


def _table(functions: dict[str, str], sizes: Iterable[Size], card: str) -> str:
    lines = []
    for name, function in functions.items():
        for size in sizes:
            rows = load(f"{name}-{card}")["rows"]
            rows = [row for row in rows if size == Size(*(row[field] for field in Size._fields))]
            lines.append([f"`{function}`", label(size), *(f"{row['share_of_copy']:.3f}" for row in rows)])
    return markdown(["operation", "size", "random", "aligned", "quarter full, random"], lines)


def blocks(card: str = "gpu") -> dict[str, str]:
    """Share of the copy limit at the sizes of the layers, for the docs; nothing before it is measured."""
    found = {}
    for name, functions, sizes in (("layer", LINEAR, LAYERS), ("swiglu", SWIGLU, EXPERTS)):
        measured = {operation: load_if_measured(f"{operation}-{card}") for operation in functions}
        results = {operation: result for operation, result in measured.items() if result is not None}
        if results.keys() == functions.keys():
            found[f"gpu {name} provenance"] = provenances(results)
            found[f"gpu {name}"] = _table(functions, sizes, card)
    return on_card(card, found)
