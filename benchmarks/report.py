"""Writes the measured tables into the README and the docs, and draws the plot, from the committed results.

python benchmarks/report.py
"""

import json
from pathlib import Path

from workloads import FIVE, Size

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOT = ROOT / "docs" / "images" / "share-of-copy.svg"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "weight-gradient.md")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _size(row: dict) -> Size:
    return Size(row["tokens"], row["features"], row["experts"], row["batch"])


def _label(size: Size) -> str:
    batch = "" if size.batch == 1 else f"{size.batch} x "
    return f"{batch}{size.tokens} x {size.features}, E={size.experts}"


def _column(size: Size) -> Size | None:
    """Which of the five sizes a row belongs to; those with K - 7 features belong to the same column."""
    for column in FIVE:
        if size in (column, column._replace(features=column.features - 7)):
            return column
    return None


def gpu_table(result: dict) -> str:
    """Share of the copy limit at the five sizes, one line for each operation and kind of input."""
    lines: dict[tuple, dict[Size, float]] = {}
    for row in result["rows"]:
        size = _size(row)
        column = _column(size)
        if column is not None:
            features = "K" if size == column else "K - 7"
            lines.setdefault((row["operation"], row["input"], row["counts"], features), {})[column] = row[
                "share_of_copy"
            ]
    head = ["operation", "input", "counts", "features", *map(_label, FIVE)]
    text = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for key, shares in lines.items():
        cells = [f"{shares[size]:.3f}" if size in shares else "" for size in FIVE]
        text.append(f"| {' | '.join([*key, *cells])} |")
    return "\n".join(text)


def other_table(result: dict) -> str:
    """The rows at other sizes, one a line."""
    text = [
        "| operation | input | counts | size | microseconds | GB/s | share of copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        size = _size(row)
        if _column(size) is None:
            cells = (row["operation"], row["input"], row["counts"], _label(size), f"{row['microseconds']:.1f}")
            cells += (f"{row['gigabytes_per_second']:.0f}", f"{row['share_of_copy']:.3f}")
            text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def quarter_table(result: dict) -> str:
    """Times of a buffer that is a quarter full, beside those of the full one."""
    rows = {(row["operation"], row["counts"], _size(row)): row for row in result["rows"] if row["input"] == "bf16"}
    text = ["| counts | size | full, us | a quarter full, us | ratio | ratio of bytes |", "|---|---|---|---|---|---|"]
    for (operation, counts, size), row in rows.items():
        if operation == "ragged, quarter full":
            full = rows["ragged", counts, size]
            times = [r["microseconds"] for r in (full, row)]
            moved = [r["microseconds"] * r["gigabytes_per_second"] for r in (full, row)]
            cells = (counts, _label(size), *(f"{t:.1f}" for t in times))
            text.append(f"| {' | '.join(cells)} | {times[1] / times[0]:.3f} | {moved[1] / moved[0]:.3f} |")
    return "\n".join(text)


def inside_jit_table(result: dict) -> str:
    """What one more call adds to a jitted program."""
    text = ["| size | kernel, us | one more call, us | custom calls | other operations |", "|---|---|---|---|---|"]
    for row in result["inside_jit"]:
        size = Size(row["tokens"], row["features"], row["experts"])
        cells = (_label(size), f"{row['kernel_microseconds']:.1f}", f"{row['marginal_microseconds']:.1f}")
        text.append(f"| {' | '.join(cells)} | {row['custom_calls']} | {row['other_operations']} |")
    return "\n".join(text)


def weight_gradient_table(result: dict) -> str:
    """TF/s of each program and the ratio of the kernel's to the best competitor's."""
    text = [
        "| M, K, N, E | sizes | float32 | with quantization | bfloat16 | with quantization | loop of dots | Pallas "
        "| ragged_dot_general | times best: float32 | with quantization | bfloat16 | with quantization |",
        "|---" * 13 + "|",
    ]
    ours = [f"jax_tsq_{dtype}{rest}" for dtype in ("float32", "bfloat16") for rest in ("", "_with_quantization")]
    for row in result["rows"]:
        rates = {name: program.get("teraflops") for name, program in row["programs"].items()}
        pallas = max(rate for name, rate in rates.items() if name.startswith("pallas") and rate is not None)
        cells = [rates[name] for name in ours] + [rates.get("loop_of_dots"), pallas, rates.get("ragged_dot_general")]
        ratios = [f"{row['times_best_competitor'][name]:.2f}" for name in ours]
        size = ", ".join(str(row[key]) for key in ("tokens", "features", "outputs", "experts"))
        kind = "multiples of 128" if row["counts"] == "aligned" else row["counts"]
        shown = ["" if rate is None else f"{rate:.0f}" for rate in cells]
        text.append(f"| {' | '.join([size, kind, *shown, *ratios])} |")
    return "\n".join(text)


def provenance(result: dict) -> str:
    driver = f", driver {result['driver']}" if result["driver"] else ""
    return f"{result['device']}{driver}, jax {result['jax']}, {result['date']}, commit {result['commit'][:10]}."


def blocks() -> dict[str, str]:
    """Every generated block by its name: what stands between `<!-- NAME -->` and `<!-- end NAME -->` in the pages."""
    gpu, cpu, weight_gradient = load("gpu"), load("cpu"), load("weight_gradient")
    return {
        "weight gradient provenance": provenance(weight_gradient),
        "weight gradient table": weight_gradient_table(weight_gradient),
        "gpu provenance": provenance(gpu),
        "gpu table": gpu_table(gpu),
        "gpu other": other_table(gpu),
        "gpu quarter": quarter_table(gpu),
        "gpu inside jit": inside_jit_table(gpu),
        "cpu provenance": provenance(cpu),
        "cpu table": other_table(cpu),
    }


def filled(page: str) -> str:
    """A page with its generated blocks brought up to date."""
    return replaced(page, blocks())


def replaced(page: str, blocks: dict[str, str]) -> str:
    """A page with these blocks between their marks."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}\n{block}\n{end}{after}"
    return page


def draw(result: dict) -> None:
    """Bars of the first size as a share of the copy limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_tsq"
    import matplotlib.pyplot as plt

    rows = [
        row for row in result["rows"] if _column(_size(row)) == FIVE[0] and row["operation"] != "ragged, quarter full"
    ]
    names = [
        f"{row['operation']}, {row['input']}, {row['counts']}{'' if _size(row) == FIVE[0] else ', K - 7'}"
        for row in rows
    ]
    shares = [row["share_of_copy"] for row in rows]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
    colors = ["#b0b0b0" if "JAX" in name else "#2a6f97" for name in names]
    bars = axes.barh(names, shares, color=colors)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of the copy limit (1 = a device-to-device copy of as many bytes)")
    axes.set_title(f"{_label(FIVE[0])} on {result['device']}", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text()))
    draw(load("gpu"))


if __name__ == "__main__":
    main()
