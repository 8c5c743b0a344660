"""Self-check: what runs natively here, whether its bytes are right, and how fast it is beside a plain copy."""

import argparse
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from jax_tsq import _ragged, _split
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


def _seconds(f, *args, repeats: int) -> float:
    """Median seconds of a call, three calls in flight at a time."""
    jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([f(*args) for _ in range(3)])
        times.append((time.perf_counter() - start) / 3)
    return float(np.median(times))


def _nbytes(tree) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def _same_bytes(a, b) -> bool:
    return all(np.asarray(u).tobytes() == np.asarray(v).tobytes() for u, v in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jax_tsq", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="M, tokens (default %(default)s)")
    parser.add_argument("--features", type=int, default=4096, help="K, features (default %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="E, experts (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds of three calls (default %(default)s)")
    args = parser.parse_args()
    for name in ("tokens", "features", "experts", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(args, name)}")

    device = jax.devices()[0]
    print(f"jax_tsq {version('jax-tsq')}, jax {jax.__version__}, device: {device.device_kind} ({device.platform})")
    for function, path in _paths().items():
        print(f"  {function:28} {path}")

    x = jax.random.normal(jax.random.key(0), (args.tokens, args.features), jnp.bfloat16)
    rows = jax.jit(jax_tsq.quantize_rows)(x)
    counts = _jagged_counts(args.tokens, args.experts)
    share = f"{args.experts} experts of {min(counts)} to {max(counts)} tokens"
    print(f"\n{args.tokens} tokens x {args.features} features, {share}")
    print(f"{'operation':33}{'bytes':>7}{'error':>9}{'ms':>9}{'GB/s':>8}{'of copy':>9}")

    right = True
    cpu = jax.devices("cpu")[0]
    for name, f, operands, reference, restore in _cases(x, rows, counts):
        f = jax.jit(f)
        result = f(*operands)
        present = [operand for operand in operands if operand is not None]
        with jax.default_device(cpu):
            wanted = jax.jit(reference)(*jax.device_put(present, cpu))
        same = _same_bytes(jax.tree.leaves(result), wanted)
        right &= same
        error = jnp.linalg.norm(restore(result) - x.astype(jnp.float32)) / jnp.linalg.norm(x.astype(jnp.float32))
        moved = _nbytes(present) + _nbytes(result)
        seconds = _seconds(f, *operands, repeats=args.repeats)
        copied = jax.random.bits(jax.random.key(1), (moved // 2,), jnp.uint8)
        copy_seconds = _seconds(jax.jit(jnp.copy), copied, repeats=args.repeats)
        print(
            f"{name:33}{'equal' if same else 'DIFFER':>7}{float(error):9.4f}{seconds * 1e3:9.3f}"
            f"{moved / seconds / 1e9:8.1f}{copy_seconds / seconds:9.0%}"
        )
    print(
        "\nbytes: against the pure-JAX reference on CPU. error: relative, after dequantization; fp8 input was quantized"
        "\ntwice. ms: with JAX's dispatch, which costs some microseconds for each of the split results. of copy: time"
        "\nof a copy that reads and writes as many bytes, over the time of the operation."
    )
    if not right:
        print("\nFAILED: native bytes differ from the reference.", file=sys.stderr)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
