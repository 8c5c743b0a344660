"""One process of the benchmark on several GPUs: runs parts and writes their results as JSON, a line each."""

import argparse
import faulthandler
import importlib
import json
import time
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from benchmarks.lib import machine


def initialize(args) -> None:
    """Joins the other processes, one device each; alone takes all devices."""
    if args.host_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.host_devices // args.processes)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if args.processes > 1:
        address = f"127.0.0.1:{args.port}"
        jax.distributed.initialize(
            address,
            args.processes,
            args.process,
            local_device_ids=[args.process],
            coordinator_bind_address=address,
            initialization_timeout=60,
            heartbeat_timeout_seconds=20,
            shutdown_timeout_seconds=20,
        )
    expected = args.gpus or args.host_devices
    if len(jax.devices()) != expected:
        raise RuntimeError(f"JAX finds {jax.devices()}, not {expected} devices")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--host-devices", type=int)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--port", type=int)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    initialize(args)
    if args.process == 0:
        (args.folder / "environment.json").write_text(json.dumps(machine.environment()))
    for part in args.parts:
        # Shows where every thread hangs and ends the process; then JAX ends the others.
        faulthandler.dump_traceback_later(args.limit, exit=True)
        start = time.perf_counter()
        result = importlib.import_module(f"benchmarks.multi_gpu.{part}").run(args.small)
        if args.processes > 1:
            multihost_utils.sync_global_devices(part)
        result["seconds"] = round(time.perf_counter() - start, 1)
        faulthandler.cancel_dump_traceback_later()
        with (args.folder / f"{args.process}.jsonl").open("a") as file:
            file.write(json.dumps([part, result]) + "\n")
        print(f"{part}: {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
