"""What is measured: operations, inputs and sizes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_tsq
from jax_tsq import _split

BLOCK = 128


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
FIRST, SMALL = FIVE[0], Size(8192, 2048, 32)
MANY_EXPERTS = [Size(131072, 4096, experts) for experts in (1, 16, 256, 1024, 4096)]
BATCHED = Size(8192, 4096, 16, batch=8)
CPU_SIZE = Size(8192, 4096, 16)


class Case(NamedTuple):
    """One row of the results.

    `target` is the share of the copy limit that the kernels are held to, None where none is set; `reads` the share of
    x's rows that are in use.
    """

    operation: str
    input: str
    counts: str
    size: Size
    function: Callable
    arguments: Callable[[int], tuple]
    target: float | None = None
    reads: float = 1.0


def jagged(tokens: int, experts: int, multiple: int = BLOCK) -> list[int]:
    """Uneven token counts that are multiples of `multiple`."""
    share = np.random.default_rng(tokens + experts).dirichlet(np.full(experts, 4.0))
    ends = np.round(np.cumsum(share) * (tokens // multiple)).astype(int) * multiple
    ends[-1] = tokens
    return np.diff(ends, prepend=0).tolist()


def _tokens(size: Size, input_type: str, seed: int):
    shape = (size.tokens, size.features) if size.batch == 1 else (size.batch, size.tokens, size.features)
    x = jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(seed), shape, jnp.bfloat16)
    if input_type == "bf16":
        return (x,)
    rows = jax.jit(jax_tsq.quantize_rows)(x)
    return rows.values, rows.scales


def _naive(x, _, per_expert, pow_2_scales):
    """What a user writes without this package: right on ordinary values, not to the byte."""
    blocks = x.reshape(-1, BLOCK, x.shape[-1]).astype(jnp.float32)
    amax = jnp.max(jnp.abs(blocks), axis=1, keepdims=True)
    scales = jnp.where(amax > 0, amax, 1) / 448
    values = (blocks / scales).astype(jnp.float8_e4m3fn).reshape(x.shape).T
    ends = np.cumsum(per_expert)
    outs = [values[:, end - n : end] for end, n in zip(ends, per_expert, strict=True)]
    return outs, [scales[(end - n) // BLOCK : end // BLOCK, 0] for end, n in zip(ends, per_expert, strict=True)]


def _reference(x, scales, per_expert, pow_2_scales):
    return _split.reference(x, scales, tokens_per_expert=per_expert, pow_2_scales=pow_2_scales)


WAYS = {"split": jax_tsq.fused_transpose_split_quant, "naive JAX": _naive, "pure JAX, exact": _reference}


def split(size: Size, input_type="bf16", counts="aligned", pow_2_scales=False, target=None, way="split") -> Case:
    per_expert = tuple(jagged(size.tokens, size.experts, BLOCK if counts == "aligned" else 1))

    def run(x, scales=None):
        return WAYS[way](x, scales, per_expert, pow_2_scales)

    name = f"{way}, pow2" if pow_2_scales else way
    function = run if size.batch == 1 else jax.vmap(run)
    return Case(name, input_type, counts, size, function, lambda i: _tokens(size, input_type, i), target)


def ragged(size: Size, input_type="bf16", counts="aligned", target=None, reads=1.0) -> Case:
    sizes = jagged(int(size.tokens * reads), size.experts, BLOCK if counts == "aligned" else 1)

    def run(group_sizes, x, scales=None):
        return jax_tsq.ragged_transpose_quant(x, group_sizes, input_scales=scales, aligned=counts == "aligned")

    def arguments(i):
        return (jnp.asarray(np.roll(sizes, i), jnp.int32), *_tokens(size, input_type, i))

    name = "ragged" if reads == 1 else "ragged, quarter full"
    return Case(name, input_type, counts, size, run, arguments, target, reads)


def on_gpu() -> Iterator[Case]:
    yield from (split(size, target=0.97) for size in FIVE)
    yield split(SMALL, target=0.95)
    yield from (split(size, pow_2_scales=True, target=0.97) for size in FIVE)
    yield from (split(size, "fp8", target=0.93) for size in FIVE)
    yield split(SMALL, "fp8")
    for size in FIVE:
        yield split(size, counts="random", target=0.93 if size == FIRST else 0.85)
    yield split(FIRST, "fp8", counts="random", target=0.72)
    odd = [size._replace(features=size.features - 7) for size in FIVE]
    yield from (split(size, target=0.95) for size in odd)
    yield from (split(size, "fp8", target=0.89) for size in odd)
    yield split(odd[0], counts="random", target=0.80)
    yield from (split(size) for size in MANY_EXPERTS)
    yield split(BATCHED, target=0.97)
    for counts in ("aligned", "random"):
        yield from (ragged(size, counts=counts, target=0.95) for size in FIVE)
        yield ragged(FIRST, "fp8", counts)
        yield from (ragged(size, counts=counts, reads=0.25) for size in FIVE)
    for size in (FIRST, FIVE[-1]):
        yield split(size, way="naive JAX")
        yield split(size, way="pure JAX, exact")


def on_cpu() -> Iterator[Case]:
    for input_type in ("bf16", "fp8"):
        yield split(CPU_SIZE, input_type, target=0.6)
        yield split(CPU_SIZE, input_type, counts="random")
        yield ragged(CPU_SIZE, input_type, counts="random")
        yield split(CPU_SIZE, input_type, way="pure JAX, exact")
    yield split(CPU_SIZE, way="naive JAX")
