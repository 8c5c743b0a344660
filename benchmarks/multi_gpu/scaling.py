"""Speed of each device while all work, beside its speed while it works alone: as much data for each in both."""

import functools
import re
import time
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from benchmarks.lib.counts import jagged
from benchmarks.lib.profile import profile
from benchmarks.lib.quantizer import FIRST, Size

SMALL = Size(1024, 512, 4)
CALLS = 50


def split(x, sizes, *, counts):
    return jax_tsq.fused_transpose_split_quant(x, None, counts)


def ragged(x, sizes, *, counts):
    return jax_tsq.ragged_transpose_quant(x, sizes, aligned=True)


class Operation:
    """An operation on tokens of each device's own, as a program for one device and as one for all.

    Both programs bear names, `alone` and `together`, by which a profile tells their kernels.
    """

    def __init__(self, function, size: Size):
        counts = jagged(size.tokens, size.experts)
        function = functools.partial(function, counts=counts)
        mesh, own = jax.make_mesh((jax.device_count(),), ("device",), (AxisType.Auto,)), P("device")

        def alone(x, sizes):
            return function(x, sizes)

        def together(x, sizes):
            return jax.shard_map(function, mesh=mesh, in_specs=own, out_specs=own)(x, sizes)

        def normal():
            key = jax.random.fold_in(jax.random.key(0), jax.lax.axis_index("device"))
            return jax.random.normal(key, (size.tokens, size.features), jnp.bfloat16)

        self.alone, self.together = jax.jit(alone), jax.jit(together)
        sizes = np.concatenate([np.roll(counts, i) for i in range(mesh.size)]).astype(np.int32)
        self.operands = (
            jax.jit(jax.shard_map(normal, mesh=mesh, in_specs=(), out_specs=own))(),
            jax.make_array_from_callback(sizes.shape, NamedSharding(mesh, own), lambda index: sizes[index]),
        )
        results = jax.eval_shape(self.alone, *self.on(jax.local_devices()[0]))
        self.bytes = sum(
            r.size * r.dtype.itemsize for r in jax.tree.leaves((results, *self.on(jax.local_devices()[0])))
        )

    def on(self, device) -> tuple:
        return part(self.operands, device)


def part(arrays, device):
    """What a device of this process holds of arrays."""
    return jax.tree.map(lambda a: next(s.data for s in a.addressable_shards if s.device == device), arrays)


@jax.jit
def same_bits(a, b):
    def same(a, b):
        bits = {1: jnp.uint8, 4: jnp.uint32}[a.dtype.itemsize]
        return jnp.all(jax.lax.bitcast_convert_type(a, bits) == jax.lax.bitcast_convert_type(b, bits))

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.all(jnp.stack([same(a, b) for a, b in pairs if a.size]))  # JAX gives empty results other shapes


def barrier() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("turn")


def turns(operation: Operation, calls: int, repeat) -> None:
    """One device after the other, then all at once; `repeat(name, device, call)` makes the calls."""
    for device in jax.devices():
        if device in jax.local_devices():
            repeat("alone", device, functools.partial(operation.alone, *operation.on(device)))
        barrier()
    repeat("together", None, functools.partial(operation.together, *operation.operands))
    barrier()


def from_profile(operation: Operation, calls: int) -> tuple[dict, float | None]:
    """Device seconds of every call by device and program, and the share of a call in which all devices worked."""

    def repeat(name, device, call):
        result = None
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)

    spans = defaultdict(list)
    for event in profile(lambda: turns(operation, calls, repeat))[0]:
        number = int(re.findall(r"\d+", event.device)[0])
        spans[number, event.module].append((event.start, event.start + event.duration, event.duration))
    numbers = sorted({number for number, module in spans if module == "jit_together"})
    if len(numbers) != jax.local_device_count():
        raise RuntimeError(f"the profile shows GPUs {numbers}, not {jax.local_devices()}")
    calls_of = {}
    for number, device in zip(numbers, jax.local_devices(), strict=True):
        for name in ("alone", "together"):
            events = spans[number, f"jit_{name}"]
            if not events or len(events) % calls:
                raise RuntimeError(f"{len(events)} device events for {calls} calls of {name} on {device}")
            calls_of[device, name] = np.reshape(events, (calls, -1, 3))
    times = {key: events[..., 2].sum(axis=1) * 1e-9 for key, events in calls_of.items()}
    if jax.local_device_count() == 1:  # the clocks of processes cannot be compared
        return times, None
    together = np.stack([events for (_, name), events in calls_of.items() if name == "together"])
    starts, ends = together[:, :, 0, 0], together[:, :, -1, 1]
    overlap = (ends.min(axis=0) - starts.max(axis=0)) / (ends - starts).mean(axis=0)
    return times, float(np.median(np.maximum(overlap, 0)))


def from_clock(operation: Operation, calls: int) -> tuple[dict, None]:
    """Wall seconds of every call by device and program."""
    times = {}

    def repeat(name, device, call):
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
        for owner in [device] if device else jax.local_devices():
            times[owner, name] = np.array(taken)

    turns(operation, calls, repeat)
    return times, None


def run(small: bool) -> dict:
    failures, rows, overlaps = [], [], {}
    for function in (split, ragged):
        name = function.__name__
        operation = Operation(function, SMALL if small else FIRST)
        results = operation.together(*operation.operands)
        for device in jax.local_devices():
            if not same_bits(operation.alone(*operation.on(device)), part(results, device)):
                failures.append(f"{name} on {device}: other bytes than alone")
        del results
        barrier()
        measure = from_profile if jax.default_backend() == "gpu" else from_clock
        times, overlaps[name] = measure(operation, CALLS)
        for device in jax.local_devices():
            alone, together = (float(np.median(times[device, program])) for program in ("alone", "together"))
            rows.append(
                {
                    "operation": name,
                    "device": jax.devices().index(device),
                    "alone_microseconds": alone * 1e6,
                    "together_microseconds": together * 1e6,
                    "together_gigabytes_per_second": operation.bytes / together / 1e9,
                    "speed_together_over_alone": alone / together,
                }
            )
    size = SMALL if small else FIRST
    return {"failures": failures, "rows": rows, "tokens": size.tokens, "features": size.features, "overlap": overlaps}
