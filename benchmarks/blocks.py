"""quantize_blocks beside a copy.

python -m benchmarks.blocks --output benchmarks/results/blocks-gpu.json
python -m benchmarks.report
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

import jax_tsq
from benchmarks.lib import quantizer
from benchmarks.lib.quantizer import Case
from benchmarks.lib.tables import load_if_measured, markdown, on_card


class Weights(NamedTuple):
    experts: int
    features: int
    columns: int


LAYERS = [Weights(8, 7168, 4096), Weights(64, 2048, 7168)]


def case(size: Weights, dtype: str, target: float | None = None) -> Case:
    def arguments(i):
        return (jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(i), tuple(size), jnp.dtype(dtype)),)

    return Case("blocks", dtype, "", size, jax_tsq.quantize_blocks, arguments, target)


def on_gpu() -> Iterator[Case]:
    for dtype, target in (("float32", 0.97), ("bfloat16", 0.95)):
        yield from (case(size, dtype, target) for size in LAYERS)


def on_cpu() -> Iterator[Case]:
    for dtype in ("float32", "bfloat16"):
        yield case(Weights(8, 2048, 1024), dtype)


def blocks(card: str = "gpu") -> dict[str, str]:
    """Share of the copy limit, for the docs; nothing before it is measured."""
    result = load_if_measured(f"blocks-{card}")
    if result is None:
        return {}
    lines = [
        [
            "`quantize_blocks`",
            row["input"],
            " x ".join(str(row[field]) for field in Weights._fields),
            f"{row['microseconds']:.1f}",
            f"{row['share_of_copy']:.3f}",
        ]
        for row in result["rows"]
    ]
    return on_card(card, {"gpu weights": markdown(["operation", "weights", "E x K x N", "us", "share of copy"], lines)})


if __name__ == "__main__":
    sys.exit(quantizer.main("blocks", {"gpu": on_gpu, "cpu": on_cpu}))
