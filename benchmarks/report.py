"""Writes the measured tables into the README and the docs, and draws the plot, from the committed results.

    python -m benchmarks.report

Prints which results are of other kernels than those in the tree.
"""

from benchmarks import accumulate, ragged, split, step, wgrad
from benchmarks import blocks as weights
from benchmarks.lib import ROOT, layer, layer_tables
from benchmarks.lib.quantizer import FIVE, Size, label
from benchmarks.lib.tables import RESULTS, kernels_changed, load, markdown, provenances, replaced
from benchmarks.multi_gpu import report as multi_gpu

PLOT = ROOT / "docs" / "images" / "share-of-copy.svg"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
QUANTIZERS = ("split", "ragged")  # in the order of the tables
FUNCTIONS = {
    **layer.LINEAR,
    "blocks": "quantize_blocks",
    **layer.SWIGLU,
    "ragged": "ragged_transpose_quant",
    "split": "fused_transpose_split_quant",
}


def results(platform: str) -> dict[str, dict]:
    return {operation: load(f"{operation}-{platform}") for operation in QUANTIZERS}


def rows(platform: str) -> list[dict]:
    """The rows of all operations, what XLA makes of them last."""
    found = [row for result in results(platform).values() for row in result["rows"]]
    return sorted(found, key=lambda row: "JAX" in row["operation"])


def size_of(row: dict) -> Size:
    return Size(*(row[field] for field in Size._fields))


def column(size: Size) -> Size | None:
    """Which of the five sizes a row belongs to; those with K - 7 features belong to the same column."""
    for candidate in FIVE:
        if size in (candidate, candidate._replace(features=candidate.features - 7)):
            return candidate
    return None


def table_of_five(platform: str) -> str:
    """Share of the copy limit at the five sizes, one line for each operation and kind of input."""
    lines: dict[tuple, dict[Size, float]] = {}
    for row in rows(platform):
        size = size_of(row)
        place = column(size)
        if place is not None:
            key = (row["operation"], row["input"], row["counts"], "K" if size == place else "K - 7")
            lines.setdefault(key, {})[place] = row["share_of_copy"]
    cells = [[*key, *(f"{shares[s]:.3f}" if s in shares else "" for s in FIVE)] for key, shares in lines.items()]
    return markdown(["operation", "input", "counts", "features", *map(label, FIVE)], cells)


def table_of_others(platform: str) -> str:
    """The rows at other sizes, one a line."""
    lines = [
        [
            *(row[field] for field in ("operation", "input", "counts")),
            label(size_of(row)),
            f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.0f}",
            f"{row['share_of_copy']:.3f}",
        ]
        for row in rows(platform)
        if column(size_of(row)) is None
    ]
    return markdown(["operation", "input", "counts", "size", "microseconds", "GB/s", "share of copy"], lines)


def table_of_functions(platform: str) -> str:
    """The least and the largest share of the copy limit of each function: bfloat16 of random sizes, or weights."""
    lines = []
    for stem, function in FUNCTIONS.items():
        shares = [
            row["share_of_copy"]
            for row in load(f"{stem}-{platform}")["rows"]
            if (stem == "blocks" or (row["operation"] == stem and row["counts"] == "random" and row["input"] == "bf16"))
            and row["features"] % 128 == 0
        ]
        lines.append([f"`{function}`", str(len(shares)), f"{min(shares):.3f}", f"{max(shares):.3f}"])
    return markdown(["function", "sizes measured", "smallest share of the copy limit", "largest"], lines)


def blocks() -> dict[str, str]:
    """Every generated block of the pages by its name."""
    return {
        "gpu functions": table_of_functions("gpu"),
        "gpu functions, h200": table_of_functions("h200"),
        "gpu functions provenance": provenances({name: load(f"{name}-gpu") for name in FUNCTIONS}),
        "gpu functions provenance, h200": provenances({name: load(f"{name}-h200") for name in FUNCTIONS}),
        "gpu provenance": provenances(results("gpu")),
        "gpu provenance, h200": provenances(results("h200")),
        "gpu table": table_of_five("gpu"),
        "gpu table, h200": table_of_five("h200"),
        "gpu other": table_of_others("gpu"),
        "cpu provenance": provenances(results("cpu")),
        "cpu table": table_of_others("cpu"),
        **split.blocks(),
        **ragged.blocks(),
        **layer.blocks(),
        **layer.blocks("h200"),
        **weights.blocks(),
        **weights.blocks("h200"),
        **wgrad.blocks(),
        **layer_tables.blocks(),
        **layer_tables.blocks(card="h200"),
        **layer_tables.expert_blocks(),
        **layer_tables.expert_blocks(card="h200"),
        **accumulate.blocks(),
        **step.blocks(),
        **multi_gpu.blocks(),
    }


def filled(page: str) -> str:
    """A page with its generated blocks brought up to date."""
    return replaced(page, blocks())


def draw() -> None:
    """Bars of the first size as a share of the copy limit."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_tsq"
    import matplotlib.pyplot as plt

    shown = [row for row in rows("gpu") if column(size_of(row)) == FIVE[0] and row["operation"] != ragged.QUARTER_FULL]
    names = [
        f"{row['operation']}, {row['input']}, {row['counts']}{'' if size_of(row) == FIVE[0] else ', K - 7'}"
        for row in shown
    ]
    shares = [row["share_of_copy"] for row in shown]
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(shown) + 1), layout="constrained")
    colors = ["#b0b0b0" if "JAX" in name else "#2a6f97" for name in names]
    bars = axes.barh(names, shares, color=colors)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12)
    axes.set_xlabel("share of the copy limit (1 = a device-to-device copy of as many bytes)")
    axes.set_title(f"{label(FIVE[0])} on {load('split-gpu')['device']}", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def print_changes() -> None:
    """A line for each result."""
    for path in sorted(RESULTS.glob("*.json")):
        result = load(path.stem)
        stem = path.stem.rpartition("-")[0]
        several = {
            "multi-gpu": QUANTIZERS,
            "layer": layer_tables.OPERATIONS,
            "block": layer_tables.BLOCK_OPERATIONS,
            "accumulate": layer_tables.BLOCK_OPERATIONS,
            "step": step.OPERATIONS,
        }
        operations = several.get(stem, [stem])
        changed = kernels_changed(result, operations)
        print(f"{path.stem:18}commit {result['commit'][:10]}, kernels changed since: {changed}")


def main() -> None:
    for path in PAGES:
        path.write_text(filled(path.read_text()))
    draw()
    print_changes()


if __name__ == "__main__":
    main()
