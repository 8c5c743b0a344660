"""Measures a training step on one GPU, where its time goes, and its memory: in bf16 and with FP8.

    python -m benchmarks.step --output benchmarks/results/step-gpu.json
    python -m benchmarks.report

The model is that of `examples/train_moe.py` in a size whose experts' products are most of a step in bf16. A step is one
compiled program; its wall time is that of turns of steps, its device time by kind is from a profile of others.
The first losses of all modes are compared in the same run. With `--size small` it takes any device, and profiles none.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np

from benchmarks.lib import machine
from benchmarks.lib.profile import Event, profile
from benchmarks.lib.tables import RESULTS, load, markdown, provenance
from examples.moe import model, modes

MODES = ("bf16", "fp8", "fp8-mlp")
OPERATIONS = ("rows", "ragged", "dual", "blocks", "swiglu", "dswiglu", "matmul", "wgrad")  # whose kernels run
BLOCK = ("products", "swiglu", "quantization")  # kinds of the experts' networks
KINDS = (*BLOCK, "dispatch", "attention", "collectives", "optimizer", "rest")
TURNS, STEPS, PROFILED = 5, 4, 4  # steps of a turn, and of the profile
WARM = 3  # steps before any that is measured; their losses are compared
ALLOWED = 0.02  # relative difference of those
# Inside a CUDA graph a profile does not name the operation that a kernel belongs to.
FLAGS = "--xla_gpu_enable_command_buffer="


def names(compiled: jax.stages.Compiled) -> dict[str, str]:
    """Where in the model each operation of a compiled program comes from."""
    pattern = r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{[^}\n]*?op_name="([^"]*)"'
    return dict(re.findall(pattern, compiled.as_text() or "", re.MULTILINE))


def kind(kernel: str, scope: str) -> str:
    """Of a kernel by its name, if it is jax_tsq's or NCCL's, otherwise by the scope that it comes from."""
    if "jax_tsq" in kernel:
        if "sm90" in kernel:
            return "products"
        return "swiglu" if re.search("wiglu|SumBlocks", kernel) else "quantization"
    if "nccl" in kernel.lower() or "ragged_all_to_all" in kernel.lower():
        return "collectives"
    if "experts" in scope:
        if re.search("ragged_dot|mosaic|dot_general", kernel + scope):  # Pallas' kernels by their name alone
            return "products"
        return "swiglu" if "swiglu" in scope else "quantization"
    return next((name for name in ("attention", "dispatch", "optimizer") if name in scope), "rest")


def by_kind(events: list[Event], scopes: dict[str, str], steps: int) -> tuple[dict[str, float], list]:
    """Device milliseconds of a step by kind, and the operations that take most, with theirs."""
    totals: defaultdict[str, float] = defaultdict(float)
    operations: defaultdict[tuple, float] = defaultdict(float)
    for event in events:
        scope = scopes.get(event.operation, "")
        what = kind(event.kernel, scope)
        totals[what] += event.duration / 1e6 / steps
        operations[what, event.kernel[:80], scope[-100:]] += event.duration / 1e6 / steps
    largest = sorted(operations, key=lambda key: -operations[key])[:30]
    return {name: totals[name] for name in KINDS}, [[*key, operations[key]] for key in largest]


def measure(mode: str, config: model.Config, profiled: bool) -> dict:
    trainer = model.Trainer(config, model.make_mesh((1, 1)), mode, "replicate")
    key = jax.random.key(0)
    begin = time.perf_counter()
    compiled = trainer.compiled(1)
    row: dict = {"label": modes.MODES[mode].label, "compile_seconds": time.perf_counter() - begin}
    state, number, losses = trainer.init(key), 0, []

    def steps(count: int):
        nonlocal state, number
        for _ in range(count):
            state, metrics = trainer.steps(state, key, number, 1)
            losses.append(metrics.losses)
            number += 1
        return jax.block_until_ready(state)

    steps(WARM)
    row["losses"] = [float(loss[0]) for loss in losses]
    times = []
    for _ in range(TURNS):
        begin = time.perf_counter()
        steps(STEPS)
        times.append(1e3 * (time.perf_counter() - begin) / STEPS)
    row["milliseconds"], row["milliseconds_10_90"] = float(np.median(times)), np.quantile(times, (0.1, 0.9)).tolist()
    memory = compiled.memory_analysis()
    if memory is not None:
        row["temporary_bytes"], row["argument_bytes"] = memory.temp_size_in_bytes, memory.argument_size_in_bytes
    if profiled:
        row["kinds"], row["operations"] = by_kind(profile(lambda: steps(PROFILED))[0], names(compiled), PROFILED)
    return row


def compare(result: dict) -> list[str]:
    """What is wrong with the losses."""
    first = np.array(result["modes"][MODES[0]]["losses"])
    failures = []
    for mode, row in result["modes"].items():
        error = np.abs(np.array(row["losses"]) / first - 1).max()
        if not error < ALLOWED:
            failures.append(f"{mode}: losses {row['losses']}, in bf16 {first.tolist()}")
    return failures


def block_time(row: dict) -> float:
    return sum(row["kinds"][name] for name in BLOCK)


def blocks() -> dict[str, str]:
    """The tables of docs/training.md, of the committed result, if there is one."""
    if not (RESULTS / "step-gpu.json").exists():
        return {}
    result = load("step-gpu")
    bf16 = result["modes"]["bf16"]
    lines = []
    for row in result["modes"].values():
        total = sum(row["kinds"].values())
        cells = [row["label"], f"{row['milliseconds']:.2f}", f"{total:.2f}"]
        cells += [f"{row['kinds'][name]:.2f}" for name in KINDS]
        cells += [f"{100 * block_time(row) / total:.0f} %", f"{block_time(bf16) / block_time(row):.2f}"]
        cells += [f"{bf16['milliseconds'] / row['milliseconds']:.2f}", f"{row['temporary_bytes'] / 2**30:.2f} GiB"]
        lines.append(cells)
    head = ["mode", "ms a step", "on the device", *KINDS, "experts' networks", "times bf16", "step, times bf16"]
    config = ", ".join(f"{name} {value}" for name, value in result["config"].items())
    return {
        "step table": markdown([*head, "temporary"], lines),
        "step provenance": f"{config}.  \n{provenance(result)}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=model.SIZES, default="step")
    parser.add_argument("--modes", nargs="+", choices=modes.MODES, default=list(MODES), help="bf16 first")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    platform = jax.default_backend()
    config = model.SIZES[args.size]
    result = {
        **machine.environment(),
        **machine.origin(platform, OPERATIONS, args.commit),
        "flags": FLAGS,
        "config": config._asdict(),
        "modes": {},
    }
    for mode in args.modes:
        result["modes"][mode] = measure(mode, config, platform == "gpu")
        print(mode, json.dumps(result["modes"][mode]), flush=True)
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    failures = compare(result)
    print(f"{len(failures)} failures", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
