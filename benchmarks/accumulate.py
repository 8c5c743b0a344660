"""Measures weight gradients added to accumulators, and a step of four microbatches of the expert block.

    python -m benchmarks.accumulate --output benchmarks/results/accumulate-gpu.json
    python -m benchmarks.report

Times are wall times of sustained turns, in every round one turn of each program in a new order. Of the weight gradient
alone: stored, added to an accumulator in place, and stored and added by XLA, in one program that is given the
accumulator's memory. A step is y and all gradients of the block for four microbatches in a `jax.lax.scan`, with float32
accumulators as its donated carry. Ours quantizes the float32 weights once in it; peers cast them to bfloat16 once, and
XLA adds their bfloat16 weight gradients.

Sums by the kernel must have the bytes of XLA's addition; a step's results are compared with those of the first of the
peers. A run of `--small` sizes takes any device, others need a GPU of compute capability 9.0.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.layer import BLOCK_ALLOWED, FLAGS, MEMORY, PENDING, relative, whole
from benchmarks.lib import block_programs, machine, peers
from benchmarks.lib.counts import jagged
from benchmarks.lib.layer_programs import Size, nbytes, normal
from benchmarks.lib.layer_tables import BLOCK_OPERATIONS, label
from benchmarks.lib.tables import RESULTS, load, markdown, provenance
from benchmarks.lib.timing import Turn, summary, turns
from benchmarks.wgrad import SIZES

MICROBATCHES = 4
SMALL = [Size(128, 128, 128, 2)]
STEP = Size(65536, 7168, 2048, 64)  # tokens of one microbatch
PRODUCTS = {"store": "stored", "accumulate": "accumulated", "separate": "stored, then added"}
RESULTS_OF_STEP = ("dw_gate_up", "dw_down", "y", "dx", "dweights")
STEPS = {"accumulate": "accumulated", "separate": "added by XLA"}


class Carried:
    """A program that is given its first operands, and whose first result takes their place."""

    def __init__(self, program: Callable, held: dict[str, Any], *others):
        self.program, self.held, self.others = program, held, others

    def __call__(self):
        first, *rest = self.program(self.held.pop("sums"), *self.others)
        self.held["sums"] = first
        return first, rest


def products(size: Size, length: float, rounds: int) -> dict:
    """Microseconds of the three ways to a weight gradient."""
    sizes = jnp.asarray(jagged(size.tokens, size.experts, 1), jnp.int32)
    quantize = jax.jit(jax_tsq.ragged_transpose_quant)
    x, dy = (quantize(normal((size.tokens, n), i), sizes) for i, n in enumerate((size.features, size.outputs)))

    def store(x, dy):
        return jax_tsq.ragged_weight_gradient(x, dy)

    def accumulate(sums, x, dy):
        return (jax_tsq.ragged_weight_gradient(x, dy, accumulate=sums),)

    def separate(sums, x, dy):
        return (sums + jax_tsq.ragged_weight_gradient(x, dy),)

    stored = jax.jit(store).lower(x, dy).compile()
    dw = stored(x, dy)
    programs = {
        way: jax.jit(run, donate_argnums=0).lower(dw, x, dy).compile()
        for way, run in (("accumulate", accumulate), ("separate", separate))
    }
    one, other = (program(jnp.negative(dw) / 3, x, dy)[0] for program in programs.values())
    right = bool(jnp.array_equal(one, other))
    del one, other
    held = {"sums": dw}
    running = {"store": Turn(lambda: stored(x, dy), ahead=max(1, min(PENDING // nbytes(dw), 32)))}
    running |= {way: Turn(Carried(program, held, x, dy), ahead=None) for way, program in programs.items()}
    del dw
    found = {way: summary(times) for way, times in turns(running, length, rounds).items()}
    taken = {way: record["microseconds"] for way, record in found.items()}
    times = {"store": taken["accumulate"] / taken["store"], "separate": taken["accumulate"] / taken["separate"]}
    return {**size._asdict(), "right": right, "ways": found, "accumulate_times": times}


def over_microbatches(prepare: Callable, gradient: Callable) -> Callable:
    """A step: `prepare(w)` once, then `gradient(sums, x, prepared, weights, sizes, dy)` for every microbatch."""

    def step(sums, xs, w, weights, sizes, dy):
        prepared = prepare(w)

        def microbatch(carry, x):
            return gradient(carry[0], x, prepared, weights, sizes, dy), None

        first = jax.tree.map(lambda a: jnp.zeros_like(a[0]), xs)
        return jax.lax.scan(microbatch, (sums, first, first, jax.tree.map(jnp.zeros_like, weights)), xs)[0]

    return step


def ours(accumulates: bool) -> Callable:
    """Our step, which lets the products add or XLA."""

    def gradient(sums, x, w, weights, sizes, dy):
        masters, quantized = w

        def block(of, x, weights):
            (gate_up, down), sums = (masters, of) if accumulates else (of, None)
            return jax_tsq.moe_mlp(x, gate_up, down, sizes, weights, quantized_weights=quantized, accumulate=sums)

        y, pullback = jax.vjp(block, sums if accumulates else masters, x, weights)
        dw, dx, dweights = pullback(dy)
        return dw if accumulates else jax.tree.map(jnp.add, sums, dw), y, dx, dweights

    return over_microbatches(lambda w: (w, tuple(map(jax_tsq.quantize_blocks, w))), gradient)


def of_peer(made: peers.Products, prepare: Callable = lambda a: a.astype(jnp.bfloat16)) -> Callable:
    block = block_programs.of_peer(made)

    def gradient(sums, x, w, weights, sizes, dy):
        y, pullback = jax.vjp(lambda x, w, weights: block(x, *w, weights, sizes), x, w, weights)
        dx, dw, dweights = pullback(dy)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, dw), y, dx, dweights

    return over_microbatches(functools.partial(jax.tree.map, prepare), gradient)


def steps(size: Size) -> Iterator[tuple[str, Callable]]:
    """Peers first. The loop of dots knows the sizes when it is compiled, and gets every group as an array."""
    if size.experts <= peers.MOST_LOOP_EXPERTS:
        yield "loop", lambda: of_peer(peers.loop(), lambda a: [a[e].astype(jnp.bfloat16) for e in range(len(a))])
    yield "pallas", lambda: of_peer(peers.pallas())
    if size.experts <= block_programs.MOST_RAGGED_DOT_EXPERTS:
        yield "ragged_dot", lambda: of_peer(peers.ragged_dot())
    for way in STEPS:
        yield way, functools.partial(ours, way == "accumulate")


def step(size: Size, length: float, rounds: int) -> dict:
    """Microseconds of a step by every way."""
    per_expert = jagged(size.tokens, size.experts, 1)
    sizes, ends = jnp.asarray(per_expert, jnp.int32), np.cumsum(per_expert)[:-1]

    def weight(seed, fan_in, fan_out):
        shape = (size.experts, fan_in, fan_out)
        return jax.jit(lambda: jax.random.normal(jax.random.key(seed), shape) * fan_in**-0.5)()

    w = weight(2, size.features, 2 * size.outputs), weight(3, size.outputs, size.features)
    xs = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (MICROBATCHES, size.tokens, size.features), jnp.bfloat16)
    )()
    weights = jax.random.uniform(jax.random.key(4), (size.tokens,))
    dy = normal((size.tokens, size.features), 1)
    arrays = (xs, w, weights, sizes, dy)
    groups = (jnp.split(xs, ends, 1), w, jnp.split(weights, ends), sizes, jnp.split(dy, ends))
    zeros = jax.jit(lambda: jax.tree.map(jnp.zeros_like, w))
    zeros_of_groups = jax.jit(lambda: jax.tree.map(lambda a: [jnp.zeros_like(one) for one in a], w))
    records: dict[str, dict] = {}
    running, expected, held, held_of_groups = {}, {}, {}, {}
    for way, make in steps(size):
        others, start, carried = (groups, zeros_of_groups, held_of_groups) if way == "loop" else (arrays, zeros, held)
        try:
            program = jax.jit(make(), donate_argnums=0).lower(jax.eval_shape(start), *others).compile()
            results = program(start(), *others)
            jax.block_until_ready(results)
        except Exception as why:  # a peer that does not run here is a result, too
            if way in STEPS:
                raise
            records[way] = {"right": False, "failed": " ".join(f"{type(why).__name__}: {why}".split())[:200]}
            continue
        named = dict(zip(RESULTS_OF_STEP, (*results[0], *results[1:]), strict=True))
        results = None
        if not expected:
            expected = {name: whole(name, result) for name, result in named.items()}
        error = {name: float(relative(whole(name, named.pop(name)), expected[name])) for name in RESULTS_OF_STEP}
        analysis = program.memory_analysis()
        records[way] = {
            "right": max(error.values()) <= BLOCK_ALLOWED[way in STEPS],
            "error": error,
            "temporary_bytes": None if analysis is None else analysis.temp_size_in_bytes,
        }
        running[way] = Turn(Carried(program, carried, *others), ahead=None)
    expected.clear()
    held["sums"] = zeros()
    if "loop" in running:
        held_of_groups["sums"] = zeros_of_groups()
    for way, times in turns(running, length, rounds).items():
        records[way] |= summary(times)
    taken = {way: record["microseconds"] for way, record in records.items() if record["right"]}
    best = min(time for way, time in taken.items() if way not in STEPS)
    ratios = {way: best / taken[way] for way in STEPS if way in taken}
    return {**size._asdict(), "microbatches": MICROBATCHES, "ways": records, "times_best": ratios}


def table_of_products(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        taken = [f"{row['ways'][way]['microseconds']:.0f}" for way in PRODUCTS]
        lines.append([label(row), *taken, *(f"{row['accumulate_times'][way]:.2f}" for way in ("store", "separate"))])
    return markdown(["M, K, N, E", *PRODUCTS.values(), "accumulated / stored", "accumulated / both"], lines)


def table_of_steps(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        for way, record in row["ways"].items():
            if "failed" in record:
                continue
            ratio = row["times_best"].get(way)
            temporary = record["temporary_bytes"]
            cells = [f"{record['microseconds'] / 1e3:.1f}", "" if ratio is None else f"{ratio:.2f}"]
            cells.append("" if temporary is None else f"{temporary / 1e9:.1f}")
            name = f"FP8, {STEPS[way]}" if way in STEPS else f"bf16, {way}"
            lines.append([f"{row['microbatches']} x {label(row)}", name, *cells])
    return markdown(["microbatches x M, H, F, E", "", "ms a step", "times bf16", "temporaries, GB"], lines)


def blocks(result: dict | None = None) -> dict[str, str]:
    """What the docs show; nothing before the first measurement."""
    if result is None:
        if not (RESULTS / "accumulate-gpu.json").exists():
            return {}
        result = load("accumulate-gpu")
    return {
        "accumulate provenance": provenance(result),
        "accumulate products": table_of_products(result["products"]),
        "accumulate steps": table_of_steps(result["steps"]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="a small size and short turns, to try the program")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    args = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", FLAGS)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY)
    length = 0.0 if args.small else 0.3

    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    result: dict[str, Any] = {
        **machine.environment(),
        **machine.origin(platform, BLOCK_OPERATIONS, args.commit),
        "xla_flags": os.environ["XLA_FLAGS"],
        "small": args.small,
    }
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    result["products"] = [products(size, length, args.rounds) for size in (SMALL if args.small else SIZES)]
    print(table_of_products(result["products"]), flush=True)
    result["steps"] = [step(size, length, args.rounds) for size in (SMALL if args.small else [STEP])]
    print(table_of_steps(result["steps"]), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    wrong = [label(row) for row in result["products"] if not row["right"]]
    wrong += [way for row in result["steps"] for way in STEPS if not row["ways"][way]["right"]]
    print(f"wrong: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
