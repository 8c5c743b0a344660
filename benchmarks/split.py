"""fused_transpose_split_quant beside a copy, and beside what XLA makes of the same in JAX.

python -m benchmarks.split --output benchmarks/results/split-gpu.json
python -m benchmarks.report
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from benchmarks.lib import ROOT, quantizer
from benchmarks.lib.counts import BLOCK, jagged
from benchmarks.lib.profile import profile
from benchmarks.lib.quantizer import CPU_SIZE, FIRST, FIVE, Case, Size, label, tokens
from benchmarks.lib.tables import load, markdown
from benchmarks.lib.timing import Call, device_seconds, named
from jax_tsq import _split

SMALL = Size(8192, 2048, 32)
MANY_EXPERTS = [Size(131072, 4096, experts) for experts in (1, 16, 256, 1024, 4096)]
BATCHED = Size(8192, 4096, 16, batch=8)


def naive(x, _, per_expert, pow_2_scales):
    """What a user writes without this package: right on ordinary values, not to the byte."""
    blocks = x.reshape(-1, BLOCK, x.shape[-1]).astype(jnp.float32)
    amax = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    scales = jnp.where(amax > 0, amax, 1) / 448
    values = (blocks / scales).astype(jnp.float8_e4m3fn).reshape(x.shape).T
    ends = np.cumsum(per_expert)
    outs = [values[:, end - n : end] for end, n in zip(ends, per_expert, strict=True)]
    return outs, [scales[(end - n) // BLOCK : end // BLOCK, 0] for end, n in zip(ends, per_expert, strict=True)]


def reference(x, scales, per_expert, pow_2_scales):
    return _split.reference(x, scales, tokens_per_expert=per_expert, pow_2_scales=pow_2_scales)


WAYS = {"split": jax_tsq.fused_transpose_split_quant, "naive JAX": naive, "pure JAX, exact": reference}


def case(size: Size, input_type="bf16", counts="aligned", pow_2_scales=False, target=None, way="split") -> Case:
    per_expert = tuple(jagged(size.tokens, size.experts, BLOCK if counts == "aligned" else 1))

    def run(x, scales=None):
        return WAYS[way](x, scales, per_expert, pow_2_scales)

    name = f"{way}, pow2" if pow_2_scales else way
    function = run if size.batch == 1 else jax.vmap(run)
    arguments = lambda i: tokens(size, input_type, i)  # noqa: E731
    return Case(name, input_type, counts, size, function, arguments, target, exact=way != "naive JAX")


def on_gpu() -> Iterator[Case]:
    yield from (case(size, target=0.97) for size in FIVE)
    yield case(SMALL, target=0.95)
    yield from (case(size, pow_2_scales=True, target=0.97) for size in FIVE)
    yield from (case(size, "fp8", target=0.93) for size in FIVE)
    yield case(SMALL, "fp8")
    for size in FIVE:
        yield case(size, counts="random", target=0.93 if size == FIRST else 0.85)
    yield case(FIRST, "fp8", counts="random", target=0.72)
    odd = [size._replace(features=size.features - 7) for size in FIVE]
    yield from (case(size, target=0.95) for size in odd)
    yield from (case(size, "fp8", target=0.89) for size in odd)
    yield case(odd[0], counts="random", target=0.80)
    yield from (case(size) for size in MANY_EXPERTS)
    yield case(BATCHED, target=0.97)
    for size in (FIRST, FIVE[-1]):
        yield case(size, way="naive JAX")
        yield case(size, way="pure JAX, exact")


def on_cpu() -> Iterator[Case]:
    for input_type in ("bf16", "fp8"):
        yield case(CPU_SIZE, input_type, target=0.6)
        yield case(CPU_SIZE, input_type, counts="random")
        yield case(CPU_SIZE, input_type, way="pure JAX, exact")
    yield case(CPU_SIZE, way="naive JAX")


# --- Inside a jitted program, on a GPU --------------------------------------------------------------------------------


def inside_jit(size: Size) -> dict:
    """Device time that one more call adds to a jitted program, and what else its HLO holds."""
    one = case(size)
    spans = {}
    inputs = [one.arguments(i)[0] for i in range(10)]
    for calls in (2, 10):
        program = named(f"calls{calls}", lambda *xs: [one.function(x) for x in xs], [tuple(inputs[:calls])])
        jax.block_until_ready(program(0))
        times = []
        for _ in range(5):
            events, _ = profile(lambda program=program: program(0))
            times.append(max(e.start + e.duration for e in events) - min(e.start for e in events))
        spans[calls] = float(np.median(times)) / 1e3
    kernel = float(np.median(device_seconds([named("kernel", one.function, [(x,) for x in inputs])], 20)["kernel"]))
    hlo = jax.jit(one.function).lower(inputs[0]).compile().as_text() or ""
    return {
        **size._asdict(),
        "marginal_microseconds": (spans[10] - spans[2]) / 8,
        "kernel_microseconds": kernel * 1e6,
        "custom_calls": len(re.findall(r" custom-call\(.*jax_tsq\.split", hlo)),
        "other_operations": len(re.findall(r"= \w+\[(?!0[\],]|\d+,0\])[^=]* (?:copy|transpose|fusion|convert)\(", hlo)),
    }


GRAPH_LAUNCH = "graph-launch"  # the argument with which this module says whether there was one


def graph_launches() -> bool:
    """Whether a program with a single call is launched as a CUDA graph once XLA may make graphs that small."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_graph_min_graph_size=1"
    command = [sys.executable, "-m", "benchmarks.split", GRAPH_LAUNCH]
    environment = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1] == "True"


def print_graph_launch() -> None:
    one = case(FIVE[-1])
    call = Call("one", jax.jit(one.function), [one.arguments(0)])
    jax.block_until_ready([call(i) for i in range(3)])
    print(any("GraphLaunch" in name for name in profile(lambda: [call(i) for i in range(3)])[1]))


def more() -> dict:
    rows = []
    for size in FIVE:
        rows.append(inside_jit(size))
        print("inside jit", rows[-1], flush=True)
    launched = graph_launches()
    print("launched as a CUDA graph:", launched)
    return {"inside_jit": rows, "graph_launch": launched}


def blocks() -> dict[str, str]:
    """What one more call adds to a jitted program, for the docs."""
    lines = [
        [
            label(Size(row["tokens"], row["features"], row["experts"])),
            *(f"{row[f'{name}_microseconds']:.1f}" for name in ("kernel", "marginal")),
            *(str(row[name]) for name in ("custom_calls", "other_operations")),
        ]
        for row in load("split-gpu")["inside_jit"]
    ]
    head = ["size", "kernel, us", "one more call, us", "custom calls", "other operations"]
    return {"gpu inside jit": markdown(head, lines)}


if __name__ == "__main__":
    if sys.argv[1:] == [GRAPH_LAUNCH]:
        print_graph_launch()
    else:
        sys.exit(quantizer.main("split", {"gpu": on_gpu, "cpu": on_cpu}, more))
