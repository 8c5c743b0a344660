"""Measures operations that quantize beside the device's copy bandwidth and checks their bytes in the same run.

Share of the copy limit = (time of a copy that reads and writes as many bytes) / (time of the kernel). On a GPU both are
device times from a profile, on a CPU wall times. Operation and copy take turns, over rotating buffers that are larger
than the caches; each runs twice in a row and the second time counts, so that neither pays for what the other left to
be written back.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.lib import machine
from benchmarks.lib.timing import device_seconds, named, summary, wall_seconds

CACHES = 400e6  # bytes to rotate through: several times the L2 of any GPU


class Size(NamedTuple):
    tokens: int
    features: int
    experts: int
    batch: int = 1


FIVE = [
    Size(65536, 7168, 32),
    Size(131072, 7168, 256),
    Size(65536, 2048, 64),
    Size(32768, 4096, 128),
    Size(16384, 7168, 8),
]
FIRST = FIVE[0]
CPU_SIZE = Size(8192, 4096, 16)


def label(size: Size) -> str:
    batch = "" if size.batch == 1 else f"{size.batch} x "
    return f"{batch}{size.tokens} x {size.features}, E={size.experts}"


class Case(NamedTuple):
    """One row of the results.

    `target` is the share of the copy limit that the kernels are held to, None where none is set; `reads` the share of
    x's rows that are in use; `exact` whether the specified bytes are claimed.
    """

    operation: str
    input: str
    counts: str
    size: NamedTuple
    function: Callable
    arguments: Callable[[int], tuple]
    target: float | None = None
    reads: float = 1.0
    exact: bool = True


def tokens(size: Size, input_type: str, seed: int) -> tuple:
    """Normal x, and its input scales where it is FP8."""
    shape = (size.tokens, size.features) if size.batch == 1 else (size.batch, size.tokens, size.features)
    x = jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, jnp.bfloat16)
    if input_type == "bf16":
        return (x,)
    rows = jax.jit(jax_tsq.quantize_rows)(x)
    return rows.values, rows.scales


def nbytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def same_bytes(case: Case, run: Callable, arguments) -> bool | None:
    """Whether the CPU kernels, which the tests hold to the specification, give the same bytes.

    None for what does not claim to.
    """
    if not case.exact:
        return None
    here = jax.tree.leaves(run(*arguments))
    there = jax.tree.leaves(run(*jax.device_put(arguments, jax.devices("cpu")[0])))
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(here, there, strict=True))


def measure(case: Case, platform: str, rounds: int) -> dict:
    first = case.arguments(0)
    results = jax.eval_shape(case.function, *first)
    written = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(results))
    moved = int(nbytes(first) * case.reads) + written
    sets = max(2, round(CACHES / moved))
    operation = named("operation", case.function, [first, *(case.arguments(i) for i in range(1, sets))])
    copied = [(jax.random.bits(jax.random.key(i), (moved // 8,), jnp.uint32),) for i in range(sets)]
    seconds = device_seconds if platform == "gpu" else wall_seconds
    times = seconds([operation, named("copy", jnp.copy, copied)], rounds)
    taken, copy = (float(np.median(times[name])) for name in ("operation", "copy"))
    return {
        "operation": case.operation,
        "input": case.input,
        "counts": case.counts,
        **case.size._asdict(),
        **summary(times["operation"]),
        "copy_microseconds": copy * 1e6,
        "gigabytes_per_second": moved / taken / 1e9,
        "share_of_copy": copy / taken,
        "target": case.target,
        "bytes_equal": same_bytes(case, operation.run, first),
    }


def shown(name: str, row: dict) -> str:
    differ = "  BYTES DIFFER" if row["bytes_equal"] is False else ""
    missed = "" if row["target"] is None or row["share_of_copy"] >= row["target"] else f"  below {row['target']}"
    return f"{name:58}{row['microseconds']:10.1f} us{row['share_of_copy']:7.3f} of copy{differ}{missed}"


def main(
    operation: str,
    cases: Mapping[str, Callable[[], Iterable[Case]]],
    more: Callable[[], dict] = dict,
) -> int:
    """Measures an operation's cases on the first device and writes the result; 1 if bytes were wrong.

    Args:
        operation: its stem, by which its kernels are found in `ffi/`.
        cases: the cases on a platform ("gpu", "cpu").
        more: what else belongs into the result of a GPU.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{operation}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each case (default %(default)s)")
    parser.add_argument("--only", default="", help="measure only rows that contain this text")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    args = parser.parse_args()

    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    result: dict[str, Any] = {**machine.environment(), **machine.origin(platform, [operation], args.commit), "rows": []}
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    for case in cases[platform]():
        name = f"{case.operation}, {case.input}, {case.counts}, {'x'.join(map(str, case.size))}"
        if args.only in name:
            result["rows"].append(measure(case, platform, args.rounds))
            print(shown(name, result["rows"][-1]), flush=True)
    if platform == "gpu" and not args.only:
        result |= more()
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["bytes_equal"] is False for row in result["rows"]) else 0
