"""The tables of the runs on several GPUs, from the committed results."""

from collections.abc import Iterator

from benchmarks.lib.tables import RESULTS, load, markdown, provenance
from benchmarks.multi_gpu import BETWEEN_PROCESSES


def results() -> list[dict]:
    """The committed results, fewest GPUs first."""
    found = [load(stem) for stem in sorted(path.stem for path in RESULTS.glob("multi-gpu-*.json"))]
    return sorted(found, key=lambda result: result["devices"])


def runs(part: str) -> Iterator[tuple[list[str], dict]]:
    """The first cells of a line, GPUs, processes and XLA's flag, and the part's result, for all runs that have it."""
    for result in results():
        for run in result["runs"]:
            if part in run["parts"]:
                flag = "set" if BETWEEN_PROCESSES in run["xla_flags"] else ""
                yield [str(result["devices"]), str(run["processes"]), flag], run["parts"][part]


def table(head: list[str], lines: list[list[str]]) -> str:
    return markdown(["GPUs", "processes", "XLA's flag", *head], lines)


def sharding() -> str:
    lines = []
    for cells, part in runs("sharding"):
        failed = len(part["failures"])
        shape = " x ".join(map(str, part["mesh"].values()))
        lines.append([*cells, shape, str(part["cases"] - failed), str(failed)])
    return table(["mesh", "cases passed", "failed"], lines)


def scaling() -> str:
    lines = []
    for cells, part in runs("scaling"):
        for operation in ("split", "ragged"):
            rows = [row for row in part["rows"] if row["operation"] == operation]
            speeds = [row["speed_together_over_alone"] for row in rows]
            alone, together = (max(row[f"{name}_microseconds"] for row in rows) for name in ("alone", "together"))
            rate = sum(row["together_gigabytes_per_second"] for row in rows)
            overlap = part["overlap"][operation]
            line = [*cells, operation, f"{alone:.1f}", f"{together:.1f}", f"{min(speeds):.3f} to {max(speeds):.3f}"]
            lines.append([*line, f"{rate:.0f}", "" if overlap is None else f"{overlap:.2f}"])
    head = ["operation", "slowest GPU alone, us", "slowest of all at once, us", "speed at once / alone"]
    return table([*head, "GB/s of all", "at the same time"], lines)


def dispatch() -> str:
    lines = []
    for cells, part in runs("dispatch"):
        for row in part["rows"]:
            line = [*cells, str(row["device"]), str(row["rows_in_use"]), str(row["rows_of_nan"])]
            same = "equal" if row["bytes_equal"] else "DIFFERENT"
            lines.append([*line, same, f"{row['weight_gradient_error']:.1e}"])
    return table(["GPU", "rows received", "rows of NaN behind them", "bytes", "error of dW"], lines)


def training() -> str:
    lines = []
    for cells, part in runs("training"):
        line = [
            *cells,
            " x ".join(map(str, part["mesh"])),
            f"{part['losses'][-1]:.4f}",
            f"{part['losses_on_one'][-1]:.4f}",
        ]
        lines.append(
            [
                *line,
                f"{part['largest_difference']:.1e}",
                f"{part['milliseconds']:.1f}",
                f"{part['milliseconds_on_one']:.1f}",
            ]
        )
    compared = min((part["compared"] for _, part in runs("training")), default=0)
    head = [
        "mesh",
        "last loss",
        "on one GPU",
        f"largest relative difference in {compared} steps",
        "ms a step",
        "on one GPU",
    ]
    return table(head, lines)


def wire() -> str:
    lines = []
    for cells, part in runs("wire"):
        times = [f"{part['milliseconds'][name]:.1f}" for name in ("bf16", "fp8")]
        ends = [f"{part['losses'][name][-1]:.4f}" for name in ("bf16", "fp8")]
        lines.append([*cells, " x ".join(map(str, part["mesh"])), *times, *ends, f"{part['largest_difference']:.1e}"])
    compared = min((part["compared"] for _, part in runs("wire")), default=0)
    head = ["mesh", "ms a step, bf16", "fp8", "last loss, bf16", "fp8"]
    return table([*head, f"largest relative difference in {compared} steps"], lines)


def blocks() -> dict[str, str]:
    where = [f"{result['devices']} x {provenance(result)}" for result in results()]
    return {
        "multi provenance": "  \n".join(dict.fromkeys(where)),
        "multi sharding": sharding(),
        "multi scaling": scaling(),
        "multi dispatch": dispatch(),
        "multi training": training(),
        **({"multi wire": wire()} if any(runs("wire")) else {}),
    }
