"""Tables and picture of training runs, from their results."""

from pathlib import Path

import numpy as np

COLORS = {
    "bf16": "#444444",
    "control": "#b0b0b0",
    "fp8": "#2a6f97",
    "fp8-pow2": "#e07a1f",
    "fp8-residuals-pow2": "#5a9a3c",
    "fp8-products": "#9b3d6b",
    "fp8-mlp": "#c23b3b",
    "fp8-mlp-pow2": "#7b5ea7",
}


def windows(result: dict, mode: str, name: str = "losses") -> np.ndarray:
    """Means of ten steps each: `[seeds, windows]`."""
    runs = result["modes"][mode]["runs"]
    return np.array([runs[str(seed)][name] for seed in result["seeds"]])


def difference(result: dict, mode: str) -> np.ndarray:
    """Losses minus those of bf16: `[seeds, windows]`."""
    return windows(result, mode) - windows(result, "bf16")


def last(result: dict) -> int:
    """Windows in the last tenth of the steps."""
    return max(1, result["steps"] // result["window"] // 10)


def summary(result: dict, mode: str) -> dict[str, float]:
    """A mode's losses, and how far from bf16 they are.

    `difference` is a mean over seeds and the last tenth of the steps, `seeds` the largest of one seed there, `largest`
    that of any window; `held_out` likewise; `norm` the largest ratio of the gradients' norms in a window.
    """
    tail = last(result)
    held_out = windows(result, mode, "held_out_loss")
    numbers = {"loss": windows(result, mode)[:, -tail:].mean(), "held_out": held_out.mean()}
    if "bf16" in result["modes"]:
        to_bf16 = difference(result, mode)
        seeds = to_bf16[:, -tail:].mean(axis=1)
        held_out_to_bf16 = held_out - windows(result, "bf16", "held_out_loss")
        norms = [windows(result, name, "gradient_norms") for name in (mode, "bf16")]
        numbers |= {
            "difference": seeds.mean(),
            "seeds": np.abs(seeds).max(),
            "largest": np.abs(to_bf16).max(),
            "held_out_difference": held_out_to_bf16.mean(),
            "held_out_seeds": np.abs(held_out_to_bf16).max(),
            "norm": (norms[0] / norms[1]).max(),
        }
    return {name: float(number) for name, number in numbers.items()}


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- |", "|---|").replace(" --- |", "---|")


def losses_table(result: dict) -> str:
    """Losses beside those of bf16, a line for each mode."""
    steps = last(result) * result["window"]
    head = ["mode", f"loss, last {steps} steps", "difference to bf16", "of one seed, at most", "of 10 steps, at most"]
    head += ["loss of held-out text", "difference", "of one seed, at most", "gradient norm / bf16, at most"]
    lines = []
    for mode, row in result["modes"].items():
        n = summary(result, mode)
        compared = mode != "bf16" and "norm" in n
        cells = [f"{n['difference']:+.4f}", f"{n['seeds']:.4f}", f"{n['largest']:.4f}"] if compared else [""] * 3
        names = ("held_out_seeds", ".4f"), ("norm", ".3f")
        ends = (
            [f"{n['held_out_difference']:+.4f}", *(f"{n[name]:{how}}" for name, how in names)] if compared else [""] * 3
        )
        lines.append([row["label"], f"{n['loss']:.4f}", *cells, f"{n['held_out']:.4f}", *ends])
    return _markdown(head, lines)


def _bytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1024:.0f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def cost_table(result: dict) -> str:
    """Memory, time and compilations, a line for each mode."""
    head = ["mode", "stored by an expert layer", "by the model", "temporary, each device", "ms a step"]
    head += ["compilations", "routings"]
    lines = []
    for row in result["modes"].values():
        runs = list(row["runs"].values())
        stored = [_bytes(row["stored_bytes"][name]) for name in ("expert_layer", "model")]
        times = [run["milliseconds_per_step"] for run in runs if run["milliseconds_per_step"] is not None]
        counts = [str(sum(run[name] for run in runs)) for name in ("compilations", "routings")]
        time = f"{np.median(times):.1f}" if times else ""
        lines.append([row["label"], *stored, _bytes(row["temporary_bytes"]), time, *counts])
    return _markdown(head, lines)


def requantization_table(result: dict) -> str:
    """Shares and errors of quantizing the experts' inputs twice."""
    names = {"power_of_two": "power of two", "any_scale": "any"}
    head = ["scales", "below the smallest normal value", "below the subnormal step", "changed by the second step"]
    head += ["error: rows", "second step alone", "both", "columns directly"]
    lines = []
    for kind, row in sorted(result["requantization"].items()):
        shares = [f"{100 * row[f'share_{key}']:.3f} %" for key in ("below_normal", "below_step", "changed")]
        errors = [f"{100 * row[f'error_{key}']:.3f} %" for key in ("rows", "second", "both", "direct")]
        lines.append([names[kind], *shares, *errors])
    return _markdown(head, lines)


def provenance(result: dict) -> str:
    """What was run, on what."""
    config, (expert, tensor) = result["config"], result["mesh"]
    parameters = 3 * config["layers"] * config["experts"] * config["features"] * config["hidden"]
    seeds, size = ", ".join(map(str, result["seeds"])), result["text"]["training_bytes"] / 1e6
    return (
        f"{config['layers']} layers, top {config['top']} of {config['experts']} experts, {config['features']} features "
        f"and {config['hidden']} hidden ones, {parameters / 1e6:.1f} million parameters in experts; "
        f"{config['batch']} x {config['context']} of {size:.0f} million bytes a step, "
        f"microbatches: {result.get('microbatches', 1)}; {result['steps']} steps, seeds {seeds}; "
        f"mesh {expert} x {tensor} (expert x tensor), dispatch `{result['dispatch']}`; "
        f"{result['device']}, jax {result['jax']}, commit {result['commit'][:10]}."
    )


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    return np.stack([np.convolve(row, np.ones(window) / window, "valid") for row in values])


def draw(result: dict, path: Path) -> None:
    """Loss curves, averaged over seeds, and below them their difference to bf16 with its range over seeds."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "jax_tsq"
    import matplotlib.pyplot as plt

    count = result["steps"] // result["window"]
    window = max(1, count // 20)
    x = result["window"] * np.arange(window, count + 1)
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1], layout="constrained")
    for mode, row in result["modes"].items():
        style = dict(color=COLORS[mode], linewidth=1.2, zorder=1 if mode == "control" else 2)
        upper.plot(x, _smooth(windows(result, mode), window).mean(axis=0), label=row["label"], **style)
        if mode != "bf16" and "bf16" in result["modes"]:
            smooth = _smooth(difference(result, mode), window)
            lower.plot(x, smooth.mean(axis=0), **style)
            lower.fill_between(x, smooth.min(axis=0), smooth.max(axis=0), color=COLORS[mode], alpha=0.15, linewidth=0)
    lower.axhline(0, color="black", linewidth=0.8)
    upper.set_ylabel("loss per byte, nats")
    lower.set_ylabel("difference to bf16")
    seeds, steps = len(result["seeds"]), window * result["window"]
    lower.set_xlabel(f"step (means of {steps} steps and of {seeds} seeds; shaded: range over seeds)")
    upper.legend(frameon=False)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def fill(page: Path, blocks: dict[str, str]) -> None:
    """Brings the blocks between `<!-- NAME -->` and `<!-- end NAME -->` up to date."""
    content = page.read_text()
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in content:
            before, _, rest = content.partition(begin)
            content = f"{before}{begin}\n{block}\n{end}{rest.partition(end)[2]}"
    page.write_text(content)


def blocks(result: dict, stem: str) -> dict[str, str]:
    """Those of a result file in docs/training.md."""
    tables = {"losses": losses_table, "cost": cost_table, "provenance": provenance}
    if "requantization" in result:
        tables["requantization"] = requantization_table
    return {f"{stem} {name}": table(result) for name, table in tables.items()}
