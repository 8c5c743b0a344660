"""One process of a program of several, with 8 host devices in all.

python -m tests.processes.worker PROCESS PROCESSES PORT cases PROGRAM/CASE ... [--other-data]
python -m tests.processes.worker PROCESS PROCESSES PORT steps [--raises]
"""

import argparse
import itertools
import json
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests import mesh

DEVICES = 8
TIMEOUTS = 10  # seconds until a silent process counts as dead, and that one which ends waits for the others


def initialize(process, processes, port):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address,
        processes,
        process,
        coordinator_bind_address=address,
        initialization_timeout=60,
        heartbeat_timeout_seconds=TIMEOUTS,
        shutdown_timeout_seconds=TIMEOUTS,
    )


def negate_data():
    """Makes this process put other tokens on a mesh than it compares with; sizes and scales stay."""
    put = mesh.put
    mesh.put = lambda x, *where: put(x if x.dtype in (np.int32, np.float32) else -x, *where)


def run_cases(names):
    """Prints a line of JSON for each case, with its error."""
    for name in names:
        program, case = name.split("/")
        error = None
        try:
            mesh.load(program).CASES.functions[case]()
        except Exception:
            error = traceback.format_exc()
        print(json.dumps({"case": name, "error": error}), flush=True)


def run_steps(raises):
    """Adds over all devices without end, or until this process raises."""
    m, split = jax.make_mesh((DEVICES,), ("all",), (AxisType.Auto,)), P("all")
    step = jax.jit(jax.shard_map(lambda x: x + jax.lax.psum(x, "all"), mesh=m, in_specs=split, out_specs=split))
    x = jax.jit(lambda: jnp.zeros(DEVICES), out_shardings=NamedSharding(m, split))()
    for i in itertools.count():
        x = step(x).block_until_ready()
        if i == 100:
            print("at work", flush=True)
        if i == 200 and raises:
            raise RuntimeError("this process fails")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("process", type=int)
    parser.add_argument("processes", type=int)
    parser.add_argument("port", type=int)
    parser.add_argument("task", choices=["cases", "steps"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--other-data", action="store_true")
    parser.add_argument("--raises", action="store_true")
    args = parser.parse_args()
    initialize(args.process, args.processes, args.port)
    if args.other_data:
        negate_data()
    if args.task == "cases":
        run_cases(args.names)
    else:
        run_steps(args.raises)


if __name__ == "__main__":
    main()
