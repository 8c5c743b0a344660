"""Runs the operations on several GPUs, first from one process for all, then from one process for each.

    python -m benchmarks.multi_gpu --output benchmarks/results/multi-gpu-4.json
    python -m benchmarks.report

Parts: `sharding` (bytes, no communication), `scaling` (each GPU's speed beside its speed alone), `dispatch` (tokens
sent to their experts' GPUs, weight gradients from what arrives), `training` (losses, time of a step), `wire` (the same
of tokens that travel in bf16 and in FP8). Without a GPU it runs on host devices, which shows that it works and nothing
about speed. Ends with 1 if a check failed.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

from benchmarks.lib import machine
from benchmarks.multi_gpu import BETWEEN_PROCESSES
from tests.processes import launch

PARTS = ("sharding", "scaling", "dispatch", "training", "wire")
OPERATIONS = ("split", "ragged")  # whose kernels run
START, GRACE = 90, 20  # seconds to start in; seconds that the others have when a process fails


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name for the GPUs that this process may use."""
    found = machine.command_output("nvidia-smi", "--query-gpu=index", "--format=csv,noheader").split()
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if allowed is None or not found else [name for name in allowed.split(",") if name]


def merged(folder: Path, processes: int) -> dict[str, dict]:
    """The parts that all processes have finished: failures and rows of all, the rest from the first."""
    files = [folder / f"{i}.jsonl" for i in range(processes)]
    if not all(file.exists() for file in files):
        return {}
    results = [dict(map(json.loads, file.read_text().splitlines())) for file in files]
    return {
        part: first | {key: [item for result in results for item in result[part][key]] for key in ("failures", "rows")}
        for part, first in results[0].items()
        if all(part in result for result in results)
    }


def run(args, record: dict) -> dict[str, str]:
    """Runs parts by `record["processes"]` processes, records the result of each, and returns what they ran on.

    A part that ends its processes or takes too long fails; others start anew with the parts after it.
    """
    processes, results = record["processes"], record["parts"]
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if args.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(args.gpus)
    if record["xla_flags"]:
        env["XLA_FLAGS"] = record["xla_flags"]
    options = [f"--{'gpus' if args.gpus else 'host-devices'}={args.devices}", f"--limit={args.limit}"]
    options += [f"--processes={processes}", *(["--small"] if args.small else [])]
    environment, remaining = {}, list(args.parts)
    while remaining:
        with tempfile.TemporaryDirectory() as name:
            worker = [sys.executable, "-m", "benchmarks.multi_gpu.worker", *remaining, *options]
            worker += [f"--folder={name}", f"--port={launch.free_port()}"]
            try:
                ended = launch.run(
                    [[*worker, f"--process={i}"] for i in range(processes)],
                    timeout=START + args.limit * len(remaining),
                    grace=GRACE,
                    env=env,
                    show=True,
                )
            finally:
                results |= merged(Path(name), processes)
            if (Path(name) / "environment.json").exists():
                environment = json.loads((Path(name) / "environment.json").read_text())
        remaining = [part for part in remaining if part not in results]
        if remaining:
            how = [f"process {i} ended with {end.status}: ...{end.output[-1500:]}" for i, end in enumerate(ended)]
            print(f"{remaining[0]}: FAILED", flush=True)
            results[remaining.pop(0)] = {"failures": how, "rows": []}
    return environment


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--devices", type=int, help="use the first so many GPUs (all by default), or host devices (4)")
    parser.add_argument("--processes", nargs="+", choices=["one", "each"], default=["one", "each"])
    parser.add_argument(
        "--flags", default=BETWEEN_PROCESSES, help="XLA flags for one process for each GPU (%(default)s)"
    )
    parser.add_argument("--small", action="store_true", help="sizes for host devices")
    parser.add_argument("--limit", type=int, default=180, help="seconds for each part (default %(default)s)")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    found = visible_gpus()
    args.devices = args.devices or len(found) or 4
    args.gpus = found[: args.devices]
    if args.gpus and len(args.gpus) < args.devices:
        parser.error(f"--devices {args.devices}, but there are {len(found)} GPUs")
    return args


def main() -> int:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the workers end, too
    result = {
        "devices": args.devices,
        **machine.origin("gpu" if args.gpus else "cpu", OPERATIONS, args.commit),
        "small": args.small,
        "runs": [],
    }
    for processes in dict.fromkeys({"one": 1, "each": args.devices}[name] for name in args.processes):
        print(f"=== {args.devices} {'GPUs' if args.gpus else 'host devices'}, {processes} process(es)", flush=True)
        flags = [os.environ.get("XLA_FLAGS", ""), args.flags if args.gpus and processes > 1 else ""]
        result["runs"].append({"processes": processes, "xla_flags": " ".join(filter(None, flags)), "parts": {}})
        try:
            result |= run(args, result["runs"][-1])
        finally:
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    failures = [failure for run in result["runs"] for part in run["parts"].values() for failure in part["failures"]]
    print(f"{len(failures)} failures", *failures, sep="\n", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
