"""Sizes of an expert's linear layer, for the operations that quantize its operands."""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np

from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.quantizer import CPU_SIZE, Case, Size, label, tokens
from benchmarks.lib.tables import load, markdown

FUNCTIONS = {"rows": "quantize_rows", "dual": "ragged_quantize"}
LAYERS = [Size(32768, 7168, 8), Size(32768, 4096, 32), Size(65536, 7168, 64)]


def _case(operation: str, run: Callable, size: Size, counts: str, target: float | None, reads: float) -> Case:
    sizes = jagged(int(size.tokens * reads), size.experts, BLOCK if counts == "aligned" else 1)

    def arguments(i):
        return (jnp.asarray(np.roll(sizes, i), jnp.int32), *tokens(size, "bf16", i))

    name = operation if reads == 1 else f"{operation}, quarter full"
    return Case(name, "bf16", counts, size, run, arguments, target, reads)


def on_gpu(operation: str, run: Callable, random: float, aligned: float) -> Iterator[Case]:
    """Cases of `run(group_sizes, x)`, with the shares of the copy limit that random and aligned sizes are held to."""
    for counts, target in (("random", random), ("aligned", aligned)):
        yield from (_case(operation, run, size, counts, target, 1) for size in LAYERS)
    yield from (_case(operation, run, size, "random", None, 0.25) for size in LAYERS)


def on_cpu(operation: str, run: Callable) -> Iterator[Case]:
    yield _case(operation, run, CPU_SIZE, "random", None, 1)


def blocks() -> dict[str, str]:
    """Share of the copy limit at the layer's sizes, for the docs."""
    lines = []
    for name, function in FUNCTIONS.items():
        for size in LAYERS:
            rows = [row for row in load(f"{name}-gpu")["rows"] if size == Size(*(row[field] for field in Size._fields))]
            lines.append([f"`{function}`", label(size), *(f"{row['share_of_copy']:.3f}" for row in rows)])
    return {"gpu layer": markdown(["operation", "size", "random", "aligned", "quarter full, random"], lines)}
