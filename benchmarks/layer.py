"""Measures a linear layer, its products and the expert block beside bfloat16, and checks every result in the same run.

    python -m benchmarks.layer --output benchmarks/results/layer-gpu.json
    python -m benchmarks.layer --only block --output benchmarks/results/block-gpu.json
    python -m benchmarks.report

Times are wall times of turns of many calls, in every round one turn of each program in a new order: short turns, and
sustained ones, long enough for the power limit. The layer is y, dx and dW of x, w and dy. In FP8 it includes all
quantizations, unless it says that w's is given, and dW is float32; in bfloat16 it is the same of a peer's products, dW
in bfloat16. The loop of dots alone knows the sizes of the groups when it is compiled, and gets every group as an array.

A sample of the FP8 products is compared with float64 products of their operands; other results of the layer are
compared with theirs. The block is two layers with SwiGLU between them: y and the gradients of x, of both weights and of
the routing weights. Its results are compared with those of the first of the peers. A run of `--small` sizes takes any
device, others need a GPU of compute capability 9.0.
"""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib import block_programs, layer_programs, machine
from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.layer_programs import Program, Size, memory_of, nbytes
from benchmarks.lib.layer_tables import BLOCK_OPERATIONS, KINDS, OPERATIONS, PRODUCTS, label
from benchmarks.lib.timing import Turn, summary, turns
from benchmarks.wgrad import SIZES as FOUR
from benchmarks.wgrad import Sample

SIZES = [*FOUR, Size(32768, 7168, 2048, 256)]
BLOCK_SIZES = FOUR[1:]
SMALL = [Size(512, 256, 128, 3)]
SAMPLED = 64
ALLOWED = 2e-3  # a result rounded to bfloat16
ALLOWED_FLOAT32 = 2e-4
ALLOWED_AGAIN = 4e-3  # of the layer in FP8 from its products, one of which is rounded
PEERS_ALLOWED = 0.06  # what FP8 costs
BLOCK_ALLOWED = {True: 0.09, False: 0.01}  # from the first peer: ours, after four quantizations on the way, and peers'
MULTIPLIED = {"layer": 3, "block": 9}  # products of M K N
# Peers that take longer than this times the best one's short turns have no sustained ones.
SUSTAINED_WITHIN = {"block": 3.0}
OTHERS_WITHIN = 1.5
FLAGS = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"  # cuBLAS chooses for the dots, as in PyTorch
PENDING = 16 * 10**9  # bytes of results that are not waited for
MEMORY = "0.92"  # 256 experts have 15 GB of weights, and of their gradients


def sampled_error(size: Size, operands: dict[str, Any], per_expert: list[int], kind: str, result: jax.Array) -> float:
    """Of one of our products, from a float64 product of its operands in a sample."""
    if kind == "weight_gradient":
        x, dy, columns_x, columns_dy = (operands[name] for name in ("x", "dy", "columns_x", "columns_dy"))
        sample = Sample(size, x, dy, columns_x, columns_dy, per_expert)
        return sample.error(result, fp8=True)
    rng = np.random.default_rng(0)
    q = operands["quantized_w"]
    rows, w, scales = (
        (operands["rows_x"], q.transposed, jnp.swapaxes(q.scales, 1, 2))
        if kind == "forward"
        else (operands["rows_dy"], q.values, q.scales)
    )
    t, n = (np.sort(rng.choice(length, min(SAMPLED, length), replace=False)) for length in result.shape)
    e = np.repeat(np.arange(size.experts), per_expert)[t]

    def dequantized(values, scales):
        scales = np.repeat(np.asarray(scales, np.float64), BLOCK, axis=-1)[..., : values.shape[-1]]
        return np.asarray(values).astype(np.float64) * scales

    lhs = dequantized(rows.values[t], rows.scales[t])
    rhs = dequantized(w[e[:, None], n], scales[e[:, None], n // BLOCK])
    expected = np.einsum("tk,tnk->tn", lhs, rhs)
    got = np.asarray(result[t][:, n]).astype(np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@jax.jit
def relative(a, b):
    a, b = (v.astype(jnp.float32) for v in (a, b))
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def whole(name: str, result) -> jax.Array:
    """One array of what may be a list of the groups' arrays, or a tensor."""
    if isinstance(result, list):
        return jnp.stack(result) if name.startswith("dw_") or name == "dw" else jnp.concatenate(result)
    return result if isinstance(result, jax.Array) else jnp.from_dlpack(result.contiguous())


def turn_of(program: Program, arguments: tuple, compiled: dict[tuple[str, str], Any]) -> Turn:
    """Its turn; `compiled` keeps programs for other sizes of the groups."""
    if program.way == "torch":
        torch = importlib.import_module("torch")
        tensors = tuple(map(torch.from_dlpack, arguments))
        return Turn(lambda: program.run(*tensors), lambda _: torch.cuda.synchronize(), ahead=None)
    key = (program.kind, program.way)
    if key not in compiled or program.way == "loop":
        compiled[key] = jax.jit(program.run).lower(*arguments).compile()
    run = compiled[key]
    result = nbytes(jax.eval_shape(program.run, *arguments))
    return Turn(lambda: run(*arguments), ahead=min(max(1, PENDING // result), 32))


def ratios(records: dict[str, dict], turn: str) -> dict[str, dict[str, float]]:
    """How many times as fast as peers each of our ways is."""
    taken = {way: record[turn]["microseconds"] for way, record in records.items() if turn in record}
    right = {way: taken[way] for way in taken if not records[way]["ours"] and records[way]["right"]}
    traced = [time for way, time in right.items() if way not in ("loop", "torch")]
    found = {}
    for way in taken:
        if records[way]["ours"]:
            found[way] = {"best": min(right.values()) / taken[way]} if right else {}
            found[way] |= {"best_traced": min(traced) / taken[way]} if traced else {}
            found[way] |= {"loop": right["loop"] / taken[way]} if "loop" in right else {}
    return found


def family_of(kinds: tuple[str, ...]):
    """Whose operands and programs these are."""
    return block_programs if "block" in kinds else layer_programs


def measure(size: Size, counts: str, shared: dict[str, Any], compiled: dict, args: argparse.Namespace) -> dict:
    per_expert = jagged(size.tokens, size.experts, BLOCK if counts == "aligned" else 1)
    if counts == "aligned" and size.tokens == size.experts * BLOCK:
        per_expert = [BLOCK] * size.experts
    family = family_of(args.kinds)
    operands = family.with_sizes(shared, per_expert)
    records: dict[str, dict[str, dict]] = {kind: {} for kind in args.kinds}
    running: dict[str, Turn] = {}
    expected: dict[str, jax.Array] = {}

    def failed(way: str, why: Exception, kinds=args.kinds) -> None:
        reason = " ".join(f"{type(why).__name__}: {why}".split())[:200]
        for kind in kinds:
            records[kind][way] = {"ours": False, "right": False, "failed": reason}

    def check(program: Program, results: Any) -> dict:
        if program.ours and program.kind in PRODUCTS:  # against float64; all others against these
            (name,), (result,) = program.results, results
            error = sampled_error(size, operands, per_expert, program.kind, result)
            expected[name] = result  # of dW the one in bfloat16, which comes last
            right = error <= (ALLOWED_FLOAT32 if result.dtype == jnp.float32 else ALLOWED)
            return {"ours": True, "error": {name: error}, "right": right}
        if program.kind == "block" and not expected:
            expected.update({name: whole(name, result) for name, result in zip(program.results, results, strict=True)})
        error = {
            name: float(relative(whole(name, result), expected[name]))
            for name, result in zip(program.results, results, strict=True)
        }
        allowed = ALLOWED_AGAIN if program.ours else PEERS_ALLOWED
        if program.kind == "block":
            allowed = BLOCK_ALLOWED[program.ours]
        return {"ours": program.ours, "error": error, "right": all(e <= allowed for e in error.values())}

    for program in family.programs(size, failed):
        if program.kind not in args.kinds and not (program.ours and program.kind in PRODUCTS):
            continue
        arguments = tuple(operands[name] for name in program.operands)
        try:
            turn = turn_of(program, arguments, compiled)
            results = turn.run()
            turn.wait(results)
            record = check(program, (results,) if program.kind in PRODUCTS else results)
            if program.forward is not None:
                record["memory"] = memory_of(program, arguments, compiled[program.kind, program.way])
        except Exception as why:  # a peer that does not run here is a result, too
            if program.ours:
                raise
            failed(program.way, why, [program.kind])
            continue
        results = None
        if program.kind in args.kinds:
            records[program.kind][program.way] = record
            running[f"{program.kind} {program.way}"] = turn
    expected.clear()

    copy = jax.jit(jnp.copy).lower(operands["x"]).compile()
    running["copy"] = Turn(lambda: copy(operands["x"]))
    records["copy"] = {"": {"ours": True}}
    add_times(records, size, "short", turns(running, args.short, args.rounds))
    if counts in args.sustained:
        chosen = {}
        for name, turn in running.items():
            kind, _, way = name.partition(" ")
            rivals = [r["short"]["microseconds"] for r in records[kind].values() if r["ours"] is False and r["right"]]
            mine = records[kind][way]
            within = SUSTAINED_WITHIN.get(kind, OTHERS_WITHIN)
            near = rivals and mine["short"]["microseconds"] <= within * min(rivals)
            if mine["ours"] or (near and mine["right"]):
                chosen[name] = turn
        add_times(records, size, "sustained", turns(chosen, args.long, args.sustained_rounds))
    (copied,) = records.pop("copy").values()
    moved = 2 * operands["x"].nbytes
    shown = {t: moved / copied[t]["microseconds"] / 1e3 for t in ("short", "sustained") if t in copied}
    times = {kind: {t: ratios(records[kind], t) for t in ("short", "sustained")} for kind in records}
    return {**size._asdict(), "counts": counts, "copy_gigabytes_per_second": shown, **records, "times": times}


def add_times(records: dict[str, dict[str, dict]], size: Size, turn: str, times: dict[str, np.ndarray]) -> None:
    operations = 2 * size.tokens * size.features * size.outputs
    for name, taken in times.items():
        kind, _, way = name.partition(" ")
        found = summary(taken)
        found["teraflops"] = operations * MULTIPLIED.get(kind, 1) / found["microseconds"] / 1e6
        records[kind][way][turn] = found


def show(row: dict) -> bool:
    """Prints a row; returns whether our results were right."""
    print(f"{label(row)}, {row['counts']}; copy {row['copy_gigabytes_per_second']}")
    good = True
    for kind in (kind for kind in (*KINDS, "block") if kind in row):
        for way, record in row[kind].items():
            if "failed" in record:
                print(f"  {kind:16}{way:18}failed: {record['failed'][:90]}")
                continue
            cells = []
            for turn in (turn for turn in ("short", "sustained") if turn in record):
                found = record[turn]
                low, high = found["microseconds_10_90"]
                times = row["times"][kind][turn].get(way, {})
                ratio = " ".join(f"{value:.2f} x {peer}" for peer, value in times.items())
                cells.append(f"{turn} {found['microseconds']:.0f} us ({low:.0f} to {high:.0f}) "
                             f"{found['teraflops']:.0f} TF/s {ratio}")  # fmt: skip
            wrong = "" if record["right"] else "  WRONG"
            print(f"  {kind:16}{way:18}{'; '.join(cells)}; error {max(record['error'].values()):.1e}{wrong}")
            good &= record["right"] or not record["ours"]
    sys.stdout.flush()
    return good


def added(rows: list[dict], row: dict) -> list[dict]:
    """Rows with this one, whose kinds replace those of the row of the same size and counts."""
    key = lambda r: (*(r[field] for field in Size._fields), r["counts"])  # noqa: E731
    found = next((r for r in rows if key(r) == key(row)), None)
    if found is None:
        return [*rows, row]
    times = found["times"] | row["times"]
    return [found | row | {"times": times} if r is found else r for r in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write, after every size")
    parser.add_argument("--add", action="store_true", help="keep what the file has of other sizes and kinds")
    parser.add_argument("--sizes", type=int, nargs="+", help="which ones, from 1 (default: all)")
    parser.add_argument(
        "--counts", nargs="+", choices=("random", "aligned"), help="default: both; random for the block"
    )
    parser.add_argument("--only", choices=("products", "layer", "block"), help="default: products and layer")
    parser.add_argument("--sustained", nargs="*", default=["random"], help="counts with sustained turns, too")
    parser.add_argument("--rounds", type=int, default=10, help="short turns of each program (default %(default)s)")
    parser.add_argument("--sustained-rounds", type=int, default=3, help="sustained turns (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a small size and short turns, to try the program")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    args = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    args.kinds = {"products": PRODUCTS, "layer": ("layer",), "block": ("block",), None: KINDS}[args.only]
    block = args.only == "block"
    args.counts = args.counts or (["random"] if block else ["random", "aligned"])
    args.short, args.long = (0.0, 0.0) if args.small else (0.01, 0.3)
    every = SMALL if args.small else BLOCK_SIZES if block else SIZES

    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    result: dict[str, Any] = {
        **machine.environment(),
        **machine.origin(platform, BLOCK_OPERATIONS if block else OPERATIONS, args.commit),
        "xla_flags": os.environ["XLA_FLAGS"],
        "small": args.small,
    }
    rows: list[dict] = []
    if args.add and args.output.exists():
        before = json.loads(args.output.read_text())
        rows = before.pop("rows")
        if {**before, "date": ""} != {**result, "date": ""}:
            parser.error(f"{args.output} was measured elsewhere, or of other sources")
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    ok = True
    for number in args.sizes or range(1, len(every) + 1):
        size = every[number - 1]
        shared, compiled = family_of(args.kinds).operands_of(size), {}
        for counts in args.counts:
            row = measure(size, counts, shared, compiled, args)
            ok &= show(row)
            rows = added(rows, row)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
        del shared, compiled
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
