"""Measures the operations beside the device's copy bandwidth and checks their bytes in the same run.

    python benchmarks/benchmark.py --output benchmarks/results/NAME.json
    python benchmarks/report.py

Share of the copy limit = (time of a copy that reads and writes as many bytes) / (time of the kernel). On a GPU both are
device times from a profile, on a CPU wall times. Operation and copy take turns, over rotating buffers that are larger
than the caches; each runs twice in a row and the second time counts, so that neither pays for what the other left to
be written back.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from commands import command_output
from digest import digest
from timing import Call, device_seconds, named, profile, wall_seconds
from workloads import FIVE, Case, on_cpu, on_gpu, split

CACHES = 400e6  # bytes to rotate through: several times the L2 of any GPU


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def same_bytes(case: Case, run: Callable, arguments) -> bool | None:
    """Whether the CPU kernels, which the tests hold to the specification, give the same bytes.

    None for what does not claim to.
    """
    if case.operation == "naive JAX":
        return None
    cpu = jax.devices("cpu")[0]
    here = jax.tree.leaves(run(*arguments))
    there = jax.tree.leaves(run(*jax.device_put(arguments, cpu)))
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(here, there, strict=True))


def measure(case: Case, on_device: bool, rounds: int) -> dict:
    first = case.arguments(0)
    results = jax.eval_shape(case.function, *first)
    written = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(results))
    moved = int(nbytes(first) * case.reads) + written
    sets = max(2, round(CACHES / moved))
    operation = named("operation", case.function, [first, *(case.arguments(i) for i in range(1, sets))])
    copied = [(jax.random.bits(jax.random.key(i), (moved // 8,), jnp.uint32),) for i in range(sets)]
    seconds = device_seconds if on_device else wall_seconds
    times = seconds([operation, named("copy", jnp.copy, copied)], rounds)
    taken, copy = times["operation"], float(np.median(times["copy"]))
    return {
        "operation": case.operation,
        "input": case.input,
        "counts": case.counts,
        **case.size._asdict(),
        "microseconds": float(np.median(taken)) * 1e6,
        "microseconds_10_90": [float(q) * 1e6 for q in np.quantile(taken, (0.1, 0.9))],
        "copy_microseconds": copy * 1e6,
        "gigabytes_per_second": moved / float(np.median(taken)) / 1e9,
        "share_of_copy": copy / float(np.median(taken)),
        "target": case.target,
        "bytes_equal": same_bytes(case, operation.run, first),
    }


def inside_jit(size) -> dict:
    """Device time that one more call adds to a jitted program, and what else its HLO holds."""
    case = split(size)
    spans = {}
    inputs = [case.arguments(i)[0] for i in range(10)]
    for calls in (2, 10):
        program = named(f"calls{calls}", lambda *xs: [case.function(x) for x in xs], [tuple(inputs[:calls])])
        jax.block_until_ready(program(0))
        times = []
        for _ in range(5):
            events, _ = profile(lambda program=program: program(0))
            times.append(max(e.start + e.duration for e in events) - min(e.start for e in events))
        spans[calls] = float(np.median(times)) / 1e3
    kernel = float(np.median(device_seconds([named("kernel", case.function, [(x,) for x in inputs])], 20)["kernel"]))
    hlo = jax.jit(case.function).lower(inputs[0]).compile().as_text() or ""
    return {
        **size._asdict(),
        "marginal_microseconds": (spans[10] - spans[2]) / 8,
        "kernel_microseconds": kernel * 1e6,
        "custom_calls": len(re.findall(r" custom-call\(.*jax_tsq\.split", hlo)),
        "other_operations": len(re.findall(r"= \w+\[(?!0[\],]|\d+,0\])[^=]* (?:copy|transpose|fusion|convert)\(", hlo)),
    }


def graph_launches() -> bool:
    """Whether a program with a single call is launched as a CUDA graph once XLA may make graphs that small."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
    command = [sys.executable, __file__, "--print-graph-launch"]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1] == "True"


def print_graph_launch() -> None:
    case = split(FIVE[-1])
    call = Call("one", jax.jit(case.function), [case.arguments(0)])
    jax.block_until_ready([call(i) for i in range(3)])
    print(any("GraphLaunch" in name for name in profile(lambda: [call(i) for i in range(3)])[1]))


def cpu_name() -> str:
    return next(
        (line.partition(":")[2].strip() for line in command_output("lscpu").splitlines() if "Model name" in line), ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each case (default %(default)s)")
    parser.add_argument("--only", default="", help="measure only rows that contain this text")
    parser.add_argument("--commit", default=command_output("git", "rev-parse", "HEAD"), help="recorded in the result")
    parser.add_argument("--print-graph-launch", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.print_graph_launch:
        print_graph_launch()
        return 0

    device = jax.devices()[0]
    on_device = device.platform == "gpu"
    platform = "gpu" if on_device else "cpu"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = {
        "device": device.device_kind if on_device else f"{cpu_name()}, {os.cpu_count()} cores",
        "platform": platform,
        "driver": command_output(*query).partition("\n")[0] if on_device else None,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform_version": " ".join(device.client.platform_version.split()),
        "date": datetime.date.today().isoformat(),
        "commit": args.commit,
        "digest": digest(platform),
        "rows": [],
    }
    print(f"{result['device']}, jax {jax.__version__}", flush=True)
    for case in on_gpu() if on_device else on_cpu():
        label = f"{case.operation}, {case.input}, {case.counts}, {'x'.join(map(str, case.size))}"
        if args.only not in label:
            continue
        row = measure(case, on_device, args.rounds)
        result["rows"].append(row)
        missed = "" if row["target"] is None or row["share_of_copy"] >= row["target"] else f"  below {row['target']}"
        print(
            f"{label:58}{row['microseconds']:10.1f} us{row['share_of_copy']:7.3f} of copy"
            f"{'  BYTES DIFFER' if row['bytes_equal'] is False else ''}{missed}",
            flush=True,
        )
    if on_device and not args.only:
        result["inside_jit"] = []
        for size in FIVE:
            row = inside_jit(size)
            result["inside_jit"].append(row)
            print("inside jit", row, flush=True)
        result["graph_launch"] = graph_launches()
        print("launched as a CUDA graph:", result["graph_launch"])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["bytes_equal"] is False for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
