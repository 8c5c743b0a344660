"""Self-check: what runs natively here, whether its bytes are right, and how fast it is beside a plain copy."""

import argparse
import functools
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from jax_tsq import _blocks, _dual, _ragged, _rows, _split
from jax_tsq._core import kernels


def _paths() -> dict[str, str]:
    """Which path each operation takes on the devices here, at sizes that suit its kernel, and why."""
    platform = jax.devices()[0].platform.replace("gpu", "cuda")
    chosen = kernels.setting()
    forced = "" if chosen == "auto" else f" ({kernels.SETTING}={chosen})"
    paths = {}
    for op in kernels.OPERATIONS.values():
        reason = kernels.unmet(op, platform, jax.devices())
        if chosen == "portable" or reason is None:
            paths[op.function] = ("portable" if chosen == "portable" else "native") + forced
        else:
            paths[op.function] = f"{'an error' if chosen == 'native' else 'portable'}: {reason}{forced}"
    return paths


def _jagged_counts(tokens: int, experts: int) -> list[int]:
    """Token counts that differ and have partial blocks, as a router makes them."""
    share = np.random.default_rng(0).dirichlet(np.full(experts, 4.0))
    ends = np.round(np.cumsum(share) * tokens).astype(int)
    ends[-1] = tokens
    return np.diff(ends, prepend=0).tolist()


def _cases(x, rows, counts):
    """Name, function, arguments, reference and dequantized result in token order of each case."""
    sizes = jnp.asarray(counts, jnp.int32)
    tokens = x.shape[0]
    for name, operands in (("bf16", (x, None)), ("fp8", rows)):
        for pow_2_scales in (False, True):
            suffix = f"{name}{', power-of-two scales' if pow_2_scales else ''}"
            yield (
                f"split {suffix}",
                lambda x, s, p=pow_2_scales: jax_tsq.fused_transpose_split_quant(x, s, counts, p),
                operands,
                lambda *a, p=pow_2_scales: _split.reference(*a, tokens_per_expert=tuple(counts), pow_2_scales=p),
                lambda result: jnp.concatenate(jax_tsq.dequantize(result)),
            )
        yield (
            f"ragged {name}",
            lambda x, s: jax_tsq.ragged_transpose_quant(x, sizes, input_scales=s),
            operands,
            lambda x, s=None: _ragged.reference(x, sizes, s, pow_2_scales=False, aligned=False, flat=False),
            lambda result: jax_tsq.unpad_rows(jax_tsq.dequantize(result), sizes, tokens),
        )
    yield (
        "rows",
        jax_tsq.quantize_rows,
        (x,),
        lambda x: _rows.reference(x, pow_2_scales=False, aligned=False),
        jax_tsq.dequantize,
    )
    yield (
        "rows and ragged",
        lambda x: jax_tsq.ragged_quantize(x, sizes),
        (x,),
        lambda x: _dual.reference(x, sizes, pow_2_scales=False, aligned=False),
        lambda result: jax_tsq.dequantize(result[0]),
    )
    yield (
        "weights, x as those of an expert",
        jax_tsq.quantize_blocks,
        (x[None],),
        lambda w: _blocks.reference(w, pow_2_scales=False),
        lambda result: jax_tsq.dequantize(result)[0],
    )


def _call(name: str, f: Callable, *arguments) -> Callable:
    """Compiles a call whose XLA module bears its name, by which a profile tells its kernels."""

    def named(*arguments):
        return f(*arguments)

    named.__name__ = name
    call = functools.partial(jax.jit(named), *arguments)
    jax.block_until_ready(call())
    return call


def _wall_seconds(run: Callable, repeats: int) -> float:
    """Median time that a function takes until it returns, with nothing else in flight."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
        jax.block_until_ready(result)
    return float(np.median(times))


def _device_seconds(calls: Sequence[Callable], repeats: int) -> dict[str, float]:
    """Mean time of the GPU's work in a call, by name; nothing where the profiler does not see the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([call() for call in calls for _ in range(repeats)])
        (path,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    seconds = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the profile reader's own types
        for line in (line for plane in data.planes if plane.name.startswith("/device:GPU") for line in plane.lines):
            for event in line.events if line.name.startswith("Stream") else ():
                module = str(dict(event.stats).get("hlo_module", "")).removeprefix("jit_")
                seconds[module] = seconds.get(module, 0.0) + event.duration_ns * 1e-9 / repeats
    return seconds


class Times(NamedTuple):
    """Seconds of a call's work on the device, of a copy of as many bytes, and of the host until the call returns."""

    work: float | None
    copy: float | None
    host: float | None


def _times(f: Callable, operands, moved: int, repeats: int) -> Times:
    call = _call("operation", f, *operands)
    if jax.devices()[0].platform != "gpu":
        return Times(_wall_seconds(lambda: jax.block_until_ready(call()), repeats), None, None)
    copy = _call("copy", jnp.copy, jax.random.bits(jax.random.key(1), (moved // 8,), jnp.uint32))
    seconds = _device_seconds([call, copy], repeats)
    return Times(seconds.get("operation"), seconds.get("copy"), _wall_seconds(call, repeats))


def _nbytes(tree) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _same_bytes(a, b) -> bool:
    return all(np.asarray(u).tobytes() == np.asarray(v).tobytes() for u, v in zip(a, b, strict=True))


SIZES = {"gpu": (32768, 7168, 32), "others": (8192, 4096, 16)}  # tokens, features, experts that keep a device busy


def _arguments(platform: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m jax_tsq", description=__doc__)
    tokens, features, experts = SIZES.get(platform, SIZES["others"])
    parser.add_argument("--tokens", type=int, default=tokens, help="M, tokens (default here %(default)s)")
    parser.add_argument("--features", type=int, default=features, help="K, features (default here %(default)s)")
    parser.add_argument("--experts", type=int, default=experts, help="E, experts (default here %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls (default %(default)s)")
    args = parser.parse_args()
    for name in ("tokens", "features", "experts", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")
    return args


def main() -> int:
    device = jax.devices()[0]
    args = _arguments(device.platform)
    print(f"jax_tsq {version('jax-tsq')}, jax {jax.__version__}, device: {device.device_kind} ({device.platform})")
    for function, path in _paths().items():
        print(f"  {function:28} {path}")

    x = jax.random.normal(jax.random.key(0), (args.tokens, args.features), jnp.bfloat16)
    rows = jax.jit(jax_tsq.quantize_rows)(x)
    counts = _jagged_counts(args.tokens, args.experts)
    share = f"{args.experts} experts of {min(counts)} to {max(counts)} tokens"
    print(f"\n{args.tokens} tokens x {args.features} features, {share}")
    print(f"{'operation':33}{'bytes':>7}{'error':>9}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'host ms':>9}")

    right = True
    cpu = jax.devices("cpu")[0]
    for name, f, operands, reference, restore in _cases(x, rows, counts):
        result = jax.jit(f)(*operands)
        present = [operand for operand in operands if operand is not None]
        with jax.default_device(cpu):
            wanted = jax.jit(reference)(*jax.device_put(present, cpu))
        same = _same_bytes(jax.tree.leaves(result), wanted)
        right &= same
        error = jnp.linalg.norm(restore(result) - x.astype(jnp.float32)) / jnp.linalg.norm(x.astype(jnp.float32))
        moved = _nbytes(present) + _nbytes(result)
        work, copy, host = _times(f, operands, moved, args.repeats)
        print(
            f"{name:33}{'equal' if same else 'DIFFER':>7}{float(error):9.4f}"
            f"{_cell(work and work * 1e3, '.3f'):>9}{_cell(work and moved / work / 1e9, '.1f'):>8}"
            f"{_cell(work and copy and copy / work, '.0%'):>9}{_cell(host and host * 1e3, '.3f'):>9}"
        )
    print(NOTES)
    if not right:
        print("\nFAILED: native bytes differ from the reference.", file=sys.stderr)
    return 0 if right else 1


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


NOTES = """
bytes    against the pure-JAX reference on CPU
error    relative, after dequantization; fp8 input was quantized twice
ms       on a GPU the time of its kernels, from a profile ("-" where the profiler sees none); elsewhere until the result
         is there. Scales of rows are copied at the end of a program, which counts here and not inside a larger one
of copy  on a GPU the time of a copy that reads and writes as many bytes, over that of the operation
host ms  on a GPU the time until the call returns, while the GPU may still work: it grows with the number of results,
         which is two for each expert of the split operation, and matters where it exceeds the kernels' time"""


if __name__ == "__main__":
    sys.exit(main())
