"""Measures ragged_weight_gradient beside what else JAX has for it, and checks every result in the same run.

    python -m benchmarks.wgrad --output benchmarks/results/wgrad-gpu.json
    python -m benchmarks.report

All programs of a size take turns; their device times come from a profile. The competitors multiply bfloat16 operands
into a bfloat16 result. Results are compared with float64 products of the operands that each program multiplies, in a
sample of rows and columns. Needs a GPU of compute capability 9.0.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.lib import machine, peers
from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.layer_programs import Size, normal
from benchmarks.lib.tables import load, markdown, provenance
from benchmarks.lib.timing import Call, device_seconds, named, summary

SAMPLED = 64  # rows and columns of dW that are checked
ALLOWED = {"float32": 2e-4, "bfloat16": 2e-3}
COMPETITORS_ALLOWED = 4e-3  # bfloat16 operands are exact, their result is rounded
PALLAS_CONFIGURATIONS = [(64, 4), (128, 3)]  # block_k and max_concurrent_steps

SIZES = [
    Size(16384, 7168, 2048, 8),
    Size(32768, 7168, 2048, 8),
    Size(32768, 4096, 2048, 32),
    Size(65536, 7168, 2048, 64),
]


class Program(NamedTuple):
    """A way to the weight gradient: `run(x, dy, quantized_x, quantized_dy, sizes)`, of which it uses what it needs."""

    name: str
    run: Callable
    dtype: str = "bfloat16"
    fp8: bool = False


def quantized(x, dy, sizes, aligned: bool):
    return tuple(jax_tsq.ragged_transpose_quant(a, sizes, aligned=aligned) for a in (x, dy))


def ours(aligned: bool) -> Iterator[Program]:
    for dtype in ("float32", "bfloat16"):

        def run(x, dy, quantized_x, quantized_dy, sizes, dtype=dtype):
            return jax_tsq.ragged_weight_gradient(quantized_x, quantized_dy, dtype=dtype)

        def run_all(x, dy, quantized_x, quantized_dy, sizes, dtype=dtype):
            return jax_tsq.ragged_weight_gradient(*quantized(x, dy, sizes, aligned), dtype=dtype)

        yield Program(f"jax_tsq_{dtype}", run, dtype, fp8=True)
        yield Program(f"jax_tsq_{dtype}_with_quantization", run_all, dtype, fp8=True)


def competitors(size: Size, per_expert: list[int]) -> Iterator[Program]:
    def loop(x, dy, quantized_x, quantized_dy, sizes):
        ends = np.cumsum(per_expert)
        return [x[e - n : e].T @ dy[e - n : e] for e, n in zip(ends, per_expert, strict=True)]

    def peer(name: str, products: peers.Products) -> Program:
        return Program(name, lambda x, dy, quantized_x, quantized_dy, sizes: products.weight_gradient(x, dy, sizes))

    if size.experts <= peers.MOST_RAGGED_DOT_EXPERTS:
        yield peer("ragged_dot_general", peers.ragged_dot())
    if all(n % BLOCK == 0 for n in per_expert):  # each size is a compilation
        yield Program("loop_of_dots", loop)
    for block_k, steps in PALLAS_CONFIGURATIONS:
        yield peer(f"pallas_{block_k}_{steps}", peers.pallas(block_k, steps))
    try:
        yield peer("tokamax_triton", peers.tokamax())
    except ImportError as error:
        print(f"without tokamax: {error}", flush=True)


def whole(dw: jax.Array | list[jax.Array]) -> jax.Array:
    return dw if isinstance(dw, jax.Array) else jnp.stack(dw)


class Sample:
    """Random rows and columns of dW in float64, of the operands of either kind."""

    def __init__(self, size: Size, x, dy, quantized_x, quantized_dy, per_expert):
        rng = np.random.default_rng(0)
        self.rows = np.sort(rng.choice(size.features, SAMPLED, replace=False))
        self.columns = np.sort(rng.choice(size.outputs, SAMPLED, replace=False))
        sides = [
            [(a[:, chosen], per_expert), (self._dequantized(q, chosen), np.asarray(q.padded_sizes))]
            for a, q, chosen in ((x, quantized_x, self.rows), (dy, quantized_dy, self.columns))
        ]
        self.bf16, self.fp8 = (
            np.stack([a.T @ b for a, b in zip(self._groups(*left), self._groups(*right), strict=True)])
            for left, right in zip(*sides, strict=True)
        )

    @staticmethod
    def _dequantized(quantized, chosen):
        values = np.asarray(quantized.values[chosen]).astype(np.float64).T
        return values * np.repeat(np.asarray(quantized.scales[:, chosen], np.float64), BLOCK, axis=0)

    @staticmethod
    def _groups(operand, sizes):
        ends = np.cumsum(sizes)
        return [np.asarray(operand[e - n : e]).astype(np.float64) for e, n in zip(ends, sizes, strict=True)]

    def error(self, dw: jax.Array, fp8: bool) -> float:
        expected = self.fp8 if fp8 else self.bf16
        got = np.asarray(dw[:, self.rows][:, :, self.columns]).astype(np.float64)
        return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def measure(size: Size, counts: str, rounds: int) -> dict:
    aligned = counts == "aligned"
    per_expert = jagged(size.tokens, size.experts, BLOCK if aligned else 1)
    sizes = jnp.asarray(per_expert, jnp.int32)
    x, dy = normal((size.tokens, size.features), 0), normal((size.tokens, size.outputs), 1)
    quantized_x, quantized_dy = jax.jit(quantized, static_argnums=3)(x, dy, sizes, aligned)
    sample = Sample(size, x, dy, quantized_x, quantized_dy, per_expert)
    arguments = (x, dy, quantized_x, quantized_dy, sizes)
    calls: list[Call] = []
    programs: dict[str, Program] = {}
    row_of: dict[str, dict] = {}
    for program in [*ours(aligned), *competitors(size, per_expert)]:
        call = named(program.name, program.run, [arguments])
        try:
            dw, again = (whole(call(0)) for _ in range(2))
            error = sample.error(dw, program.fp8)
            same = bool(jnp.array_equal(dw, again))
        except Exception as failure:  # a competitor that does not run here is a result, too
            row_of[program.name] = {"failed": f"{type(failure).__name__}: {failure}"[:300]}
            if program.fp8:
                raise
            continue
        allowed = ALLOWED[program.dtype] if program.fp8 else COMPETITORS_ALLOWED
        row_of[program.name] = {"error": error, "right": error <= allowed, "same_bytes_again": same}
        calls.append(call)
        programs[program.name] = program
        del dw, again
    operations = 2 * size.tokens * size.features * size.outputs
    for name, times in device_seconds(calls, rounds).items():
        row_of[name] |= summary(times)
        row_of[name]["teraflops"] = operations / row_of[name]["microseconds"] / 1e6
    right = {n: r["teraflops"] for n, r in row_of.items() if n in programs and not programs[n].fp8 and r["right"]}
    best = max(right, key=lambda name: right[name])
    row = {**size._asdict(), "counts": counts, "best_competitor": best, "programs": row_of}
    row["times_best_competitor"] = {
        name: row_of[name]["teraflops"] / right[best] for name in programs if programs[name].fp8
    }
    return row


def table(result: dict) -> str:
    """TF/s of each program and the ratio of the kernel's to the best competitor's."""
    ours = [f"jax_tsq_{dtype}{rest}" for dtype in ("float32", "bfloat16") for rest in ("", "_with_quantization")]
    lines = []
    for row in result["rows"]:
        rates = {name: program.get("teraflops") for name, program in row["programs"].items()}
        pallas = max(rate for name, rate in rates.items() if name.startswith("pallas") and rate is not None)
        shown = [*(rates[name] for name in ours), rates.get("loop_of_dots"), pallas, rates.get("ragged_dot_general")]
        size = ", ".join(str(row[key]) for key in Size._fields)
        kind = "multiples of 128" if row["counts"] == "aligned" else row["counts"]
        ratios = [f"{row['times_best_competitor'][name]:.2f}" for name in ours]
        lines.append([size, kind, *("" if rate is None else f"{rate:.0f}" for rate in shown), *ratios])
    head = ["M, K, N, E", "sizes", *["float32", "with quantization", "bfloat16", "with quantization"]]
    head += ["loop of dots", "Pallas", "ragged_dot_general"]
    return markdown([*head, *["times best: float32", "with quantization", "bfloat16", "with quantization"]], lines)


def blocks() -> dict[str, str]:
    """What the docs show."""
    result = load("wgrad-gpu")
    return {"weight gradient provenance": provenance(result), "weight gradient table": table(result)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write, after every size")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each program (default %(default)s)")
    parser.add_argument("--commit", default=machine.commit(), help="recorded in the result")
    args = parser.parse_args()

    result = {
        **machine.environment(),
        **machine.origin("gpu", ["wgrad"], args.commit),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "rows": [],
    }
    print(f"{result['device']}, jax {result['jax']}", flush=True)
    ok = True
    for counts in ("aligned", "random"):
        for size in SIZES:
            row = measure(size, counts, args.rounds)
            result["rows"].append(row)
            print(f"{'x'.join(map(str, size))}, {counts}; best competitor: {row['best_competitor']}")
            for name, r in row["programs"].items():
                if "failed" in r:
                    print(f"  {name:36}{r['failed'][:100]}")
                    continue
                ratio = row["times_best_competitor"].get(name)
                low, high = r["microseconds_10_90"]
                print(
                    f"  {name:36}{r['microseconds']:10.1f} us ({low:.0f} to {high:.0f}){r['teraflops']:8.1f} TF/s"
                    f"  error {r['error']:.1e}{'' if r['right'] else ' WRONG'}"
                    f"{'' if r['same_bytes_again'] else ' BYTES CHANGE'}{f'  {ratio:.2f} x best' if ratio else ''}",
                    flush=True,
                )
                ok &= name not in row["times_best_competitor"] or (r["right"] and r["same_bytes_again"])
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
