"""Table and picture of a training run, from its results."""

from pathlib import Path

import numpy as np

LAST = 50  # steps that the final numbers are averaged over
COLORS = {
    "bf16": "#444444",
    "fp8": "#2a6f97",
    "fp8-pow2": "#e07a1f",
    "fp8-residuals-pow2": "#5a9a3c",
    "fp8-products": "#9b3d6b",
    "fp8-mlp": "#c23b3b",
    "fp8-mlp-pow2": "#7b5ea7",
    "control": "#b0b0b0",
}


def _losses(result: dict, mode: str) -> np.ndarray:
    """`[seeds, steps]`."""
    return np.array([result["modes"][mode]["losses"][str(seed)] for seed in result["seeds"]])


def difference(result: dict, mode: str) -> np.ndarray:
    """Losses minus those of bf16: `[seeds, steps]`."""
    return _losses(result, mode) - _losses(result, "bf16")


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1024:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def table(result: dict) -> str:
    """One line for each mode."""
    last = min(LAST, result["steps"])
    head = ["mode", f"loss, last {last} steps"]
    compared = "bf16" in result["modes"]
    if compared:
        head += [f"mean difference to bf16, last {last} steps", "largest difference in a step"]
    head += ["stored by an expert layer", "by the model", "temporary, each device", "ms a step"]
    head += ["compilations", "routings"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for mode, row in result["modes"].items():
        cells = [row["label"], f"{_losses(result, mode)[:, -last:].mean():.4f}"]
        if compared and mode == "bf16":
            cells += ["", ""]
        elif compared:
            to_bf16 = difference(result, mode)
            cells += [f"{to_bf16[:, -last:].mean():+.4f}", f"{np.abs(to_bf16).max():.4f}"]
        cells += [_bytes(row["stored_bytes"][name]) for name in ("expert_layer", "model")]
        cells += [_bytes(row["temporary_bytes"]), f"{row['milliseconds_per_step']:.0f}"]
        cells += [str(row["compilations"]), str(row["routings"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def requantization_table(result: dict) -> str:
    """Shares and errors of quantizing the experts' inputs twice."""
    names = {"power_of_two": "power of two", "any_scale": "any"}
    head = ["scales", "below the smallest normal value", "below the subnormal step", "changed by the second step"]
    head += ["error: rows", "second step alone", "both", "columns directly"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for kind, row in result["requantization"].items():
        cells = [
            names[kind],
            *(f"{100 * row[f'share_{key}']:.3f} %" for key in ("below_normal", "below_step", "changed")),
        ]
        cells += [f"{100 * row[f'error_{key}']:.3f} %" for key in ("rows", "second", "both", "direct")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


KINDS = {
    "quantization": "quantization",
    "products": "FP8 products",
    "collectives": "collectives",
    "other": "other",
}  # of kernels, as `measure.profile` tells them apart


def profile_table(result: dict) -> str:
    """Device milliseconds of a step by kind of kernel."""
    head = ["mode", "ms a step on the device", *KINDS.values(), "share of jax_tsq"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in result["modes"].values():
        if row.get("profile"):
            times = row["profile"]
            ours = times["quantization"] + times["products"]
            cells = [
                row["label"],
                *(f"{times[kind]:.3f}" for kind in ("all", *KINDS)),
                f"{100 * ours / times['all']:.1f} %",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def provenance(result: dict) -> str:
    """What was run, on what."""
    config, (expert, tensor) = result["config"], result["mesh"]
    return (
        f"{config['layers']} layers, top {config['top']} of {config['experts']} experts, "
        f"{config['features']} features, {config['hidden']} hidden features, "
        f"{config['batch']} x {config['context']} characters a step; "
        f"{result['steps']} steps, seeds {', '.join(map(str, result['seeds']))}; mesh {expert} x {tensor} "
        f"(expert x tensor), dispatch `{result['dispatch']}`; {result['device']}, jax {result['jax']}."
    )


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    return np.stack([np.convolve(row, np.ones(window) / window, "valid") for row in values])


def draw(result: dict, path: Path) -> None:
    """Loss curves, averaged over seeds, and below them their difference to bf16 with its range over seeds."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_tsq"
    import matplotlib.pyplot as plt

    steps, window = result["steps"], max(1, min(20, result["steps"] // 10))
    x = np.arange(window, steps + 1)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    order = sorted(
        result["modes"].items(), key=lambda item: item[0] == "control", reverse=True
    )  # the control lies below
    for mode, row in order:
        style = dict(color=COLORS[mode], linewidth=1.2, zorder=1 if mode == "control" else 2)
        upper.plot(x, _smooth(_losses(result, mode), window).mean(axis=0), label=row["label"], **style)
        if mode != "bf16" and "bf16" in result["modes"]:
            smooth = _smooth(difference(result, mode), window)
            lower.plot(x, smooth.mean(axis=0), **style)
            lower.fill_between(x, smooth.min(axis=0), smooth.max(axis=0), color=COLORS[mode], alpha=0.15, linewidth=0)
    lower.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("loss per character, nats")
    lower.set_ylabel("difference to bf16")
    lower.set_xlabel(f"step (means of {window} steps and of {len(result['seeds'])} seeds; shaded: range over seeds)")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def fill(page: Path, result: dict) -> None:
    """Brings the blocks between `<!-- training NAME -->` and `<!-- end training NAME -->` up to date."""
    content = page.read_text()
    if any(row.get("profile") for row in result["modes"].values()):
        blocks = {"profile": f"{profile_table(result)}\n\n{provenance(result)}"}
    else:
        blocks = {
            "results": table(result),
            "requantization": requantization_table(result),
            "provenance": provenance(result),
        }
    for name, block in blocks.items():
        begin, end = f"<!-- training {name} -->", f"<!-- end training {name} -->"
        if begin in content:
            before, _, rest = content.partition(begin)
            content = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    page.write_text(content)
