"""What an expert layer sends between devices, read from the program that XLA gets for a GPU.

python -m examples.moe.wire            prints the table of docs/dispatch.md, and brings it up to date
"""

import re
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp

from examples.moe import model, report

PAGE = Path(__file__).parents[2] / "docs" / "dispatch.md"
BYTES = {"u8": 1, "bf16": 2, "f32": 4, "s32": 4}
CONFIG = model.SIZES["step"]._replace(layers=1)
MESH = (4, 1)


def program(dispatch: str) -> str:
    """HLO of a step, before XLA compiles it for CUDA; no GPU is needed."""
    trainer = model.Trainer(CONFIG, model.make_mesh(MESH), model.FP8_DISPATCH_MODE, dispatch)
    abstract = trainer.state, trainer.text, jax.random.key(0), jax.ShapeDtypeStruct((), jnp.int32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jax_tsq was built without CUDA")  # pure JAX sends the same
        lowered = trainer.jitted.trace(*abstract, count=1).lower(lowering_platforms=("cuda",))
    return lowered.as_text(dialect="hlo")


def messages(hlo: str) -> list[tuple[str, int, int]]:
    """Of every ragged all-to-all: the dtype, the rows that a device has to send, and the bytes of a row."""
    shapes = {name: (dtype, dims) for name, dtype, dims in re.findall(r"([\w.-]+) = (\w+)\[([\d,]*)\]", hlo)}
    found = []
    for operand in re.findall(r"= \S+ ragged-all-to-all\(%?([\w.-]+)", hlo):
        dtype, dims = shapes[operand]
        rows, width = map(int, dims.split(","))
        found.append((dtype, rows, width * BYTES[dtype]))
    return found


def table() -> str:
    """Bytes of a token's row for each of its experts, of one layer forwards and backwards."""
    lines, totals = [], []
    for dispatch in ("all_to_all", "fp8_all_to_all"):
        sent = messages(program(dispatch))
        own = min(rows for _, rows, _ in sent)  # devices send what is theirs to experts, and back what they got
        cells = []
        for to_experts in (True, False):
            widths = [f"{width} ({dtype})" for dtype, rows, width in sent if (rows == own) == to_experts]
            cells.append(" + ".join(widths))
        totals.append(sum(width for _, _, width in sent))
        lines.append(f"| `{dispatch}` | {' | '.join(cells)} | {totals[-1]} |")
    head = "| dispatch | to the experts, a message each | sent back | all bytes |\n|---|---|---|---|"
    note = f"A row has {CONFIG.features} features. Of all bytes bf16 sends {totals[0] / totals[1]:.2f} times as many."
    return "\n".join([head, *lines, "", note])


def main() -> None:
    jax.config.update("jax_num_cpu_devices", MESH[0] * MESH[1])
    print(table())
    report.fill(PAGE, {"wire table": table()})


if __name__ == "__main__":
    main()
