"""ragged_transpose_quant beside a copy.

python -m benchmarks.ragged --output benchmarks/results/ragged-gpu.json
python -m benchmarks.report
"""

import sys
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.lib import quantizer
from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.quantizer import CPU_SIZE, FIRST, FIVE, Case, Size, label, tokens
from benchmarks.lib.tables import load, markdown

QUARTER_FULL = "ragged, quarter full"


def case(size: Size, input_type="bf16", counts="aligned", target=None, reads=1.0) -> Case:
    sizes = jagged(int(size.tokens * reads), size.experts, BLOCK if counts == "aligned" else 1)

    def run(group_sizes, x, scales=None):
        return jax_tsq.ragged_transpose_quant(x, group_sizes, input_scales=scales, aligned=counts == "aligned")

    def arguments(i):
        return (jnp.asarray(np.roll(sizes, i), jnp.int32), *tokens(size, input_type, i))

    return Case("ragged" if reads == 1 else QUARTER_FULL, input_type, counts, size, run, arguments, target, reads)


def on_gpu() -> Iterator[Case]:
    for counts in ("aligned", "random"):
        yield from (case(size, counts=counts, target=0.95) for size in FIVE)
        yield case(FIRST, "fp8", counts)
        yield from (case(size, counts=counts, reads=0.25) for size in FIVE)


def on_cpu() -> Iterator[Case]:
    for input_type in ("bf16", "fp8"):
        yield case(CPU_SIZE, input_type, counts="random")


def blocks() -> dict[str, str]:
    """Times of a buffer that is a quarter full beside those of the full one, for the docs."""
    rows = {
        (row["operation"], row["counts"], Size(*(row[field] for field in Size._fields))): row
        for row in load("ragged-gpu")["rows"]
        if row["input"] == "bf16"
    }
    lines = []
    for (operation, counts, size), row in rows.items():
        if operation == QUARTER_FULL:
            pair = rows["ragged", counts, size], row
            full, quarter = (r["microseconds"] for r in pair)
            all_bytes, bytes_ = (r["microseconds"] * r["gigabytes_per_second"] for r in pair)
            times = [f"{full:.1f}", f"{quarter:.1f}", f"{quarter / full:.3f}"]
            lines.append([counts, label(size), *times, f"{bytes_ / all_bytes:.3f}"])
    head = ["counts", "size", "full, us", "a quarter full, us", "ratio", "ratio of bytes"]
    return {"gpu quarter": markdown(head, lines)}


if __name__ == "__main__":
    sys.exit(quantizer.main("ragged", {"gpu": on_gpu, "cpu": on_cpu}))
