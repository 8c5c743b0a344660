"""Expert-parallel dispatch: rows travel to their experts' devices and are quantized where they arrive.

The buffers there have room for all rows of all devices. What nobody sent is NaN and lies behind the rows in use.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from benchmarks.lib.counts import BLOCK
from examples.moe import layer

TOLERANCE = 1e-4  # of weight gradients, relative, in the norm: float32 sums in another order
OWN = P(("expert", "tensor"))


class Size(NamedTuple):
    """Tokens and experts are those of each device."""

    tokens: int = 4096
    features: int = 1024
    outputs: int = 512
    experts: int = 8


SMALL = Size(96, 128, 64, 2)


def data(size: Size, devices: int):
    """Rows of x and dy of all devices, and the expert that each row goes to; some experts get many, some none."""
    rng = np.random.default_rng(0)
    count = size.tokens * devices
    x, dy = (rng.standard_normal((count, n), np.float32).astype(ml_dtypes.bfloat16) for n in size[1:3])
    share = rng.dirichlet(np.full(size.experts * devices, 0.5))
    return x, dy, rng.choice(len(share), count, p=share).astype(np.int32)


def weight_gradient(x, dy, sizes):
    """Both operands, and dW by `grouped_linear`, which makes the same ones."""
    w = jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.float32)
    w = jax.lax.pcast(w, tuple(jax.typeof(x).manual_axis_type.varying), to="varying")  # every device has its own
    _, pullback = jax.vjp(lambda w: jax_tsq.grouped_linear(x, w, sizes), w)
    return jax_tsq.ragged_transpose_quant(x, sizes), jax_tsq.ragged_transpose_quant(dy, sizes), pullback(dy)[0]


def one_device(x, dy, expert, experts: int):
    """All experts on one device."""
    order = np.argsort(expert, kind="stable")
    sizes = np.bincount(expert, minlength=experts).astype(np.int32)
    return jax.tree.map(np.asarray, jax.jit(weight_gradient)(x[order], dy[order], sizes))


def all_devices(x, dy, expert, experts: int):
    """Each device its own experts: the operands, dW, and how many rows of the buffer hold nothing but NaN."""
    mesh = jax.make_mesh((jax.device_count(), 1), ("expert", "tensor"), (AxisType.Auto,) * 2)

    @partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=OWN)
    def run(x, dy, expert):
        way = layer.route(expert, experts)
        x, dy = (layer.send(jax.lax.pcast(a, "tensor", to="varying"), way) for a in (x, dy))
        empty = jnp.sum(jnp.isnan(x).all(axis=1) & jnp.isnan(dy).all(axis=1))
        return weight_gradient(x, dy, way.group_sizes), empty[None], way.group_sizes

    placed = NamedSharding(mesh, P("expert"))
    arrays = (jax.make_array_from_callback(a.shape, placed, lambda index, a=a: a[index]) for a in (x, dy, expert))
    return jax.jit(run)(*arrays)


def same_operand(here: jax_tsq.RaggedQuantized, whole: jax_tsq.RaggedQuantized, experts: slice) -> bool:
    """Whether a device's operand holds the bytes that its experts have on one device."""
    start, stop = (int(whole.padded_sizes[:i].sum()) for i in (experts.start, experts.stop))
    values, scales = whole.values[:, start:stop], whole.scales[start // BLOCK : stop // BLOCK]
    return (
        np.array_equal(here.padded_sizes, whole.padded_sizes[experts])
        and here.values[:, : stop - start].tobytes() == values.tobytes()
        and here.scales[: len(scales)].tobytes() == scales.tobytes()
    )


def compare(size: Size) -> dict:
    failures, rows = [], []
    x, dy, expert = data(size, jax.device_count())
    *operands, gradient = one_device(x, dy, expert, size.experts * jax.device_count())
    results = all_devices(x, dy, expert, size.experts)
    for i, device in enumerate(jax.devices()):
        if device not in jax.local_devices():
            continue

        def part(a, device=device):
            return next(np.asarray(s.data) for s in a.addressable_shards if s.device == device)

        (*here, dw), empty, sizes = jax.tree.map(part, results)
        own = slice(i * size.experts, (i + 1) * size.experts)
        same = all(same_operand(a, b, own) for a, b in zip(here, operands, strict=True))
        error = float(np.linalg.norm(dw - gradient[own]) / np.linalg.norm(gradient[own]))
        rows.append(
            {
                "device": jax.devices().index(device),
                "rows_in_use": int(sizes.sum()),
                "rows_of_nan": int(empty[0]),
                "bytes_equal": same,
                "weight_gradient_error": error,
            }
        )
        if not same or not error < TOLERANCE:
            failures.append(f"dispatch on {device}: {rows[-1]}")
    return {"failures": failures, "rows": rows, **size._asdict()}


def run(small: bool) -> dict:
    if jax.default_backend() != "gpu":
        return {"failures": [], "rows": [], "skipped": "XLA:CPU has no ragged_all_to_all"}
    return compare(SMALL if small else Size())
