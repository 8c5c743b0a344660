"""Devices other than the first, `jax.pmap`, and callbacks to Python on every device."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests import mesh
from tests.mesh import Call
from tests.operations import EXAMPLES, OPERATIONS

CASES = mesh.Cases()
# One example for each way in which native code reads and writes.
WITH_CALLBACKS = [
    n
    for n, row in EXAMPLES.items()
    if "cpu" in row.native and n != "ragged_flat_fp8" and (n in OPERATIONS or "fp8" in n)
]
SMALL = 256  # features


@CASES.add(operation=EXAMPLES)
def committed(operation):
    """Arrays committed to the last device: the call runs there, eager or compiled."""
    call, device = Call(operation, features=SMALL), jax.devices()[-1]
    for function in (call.function, jax.jit(call.function)):
        result = function(*jax.device_put(call.arrays, device))
        assert {d for leaf in jax.tree.leaves(result) for d in leaf.devices()} == {device}
        call.assert_right(result)


@CASES.add(operation=("ragged", "split_fp8"))
def committed_apart(operation):
    """Arrays committed to different devices: JAX's own error, and the next call works."""
    call = Call(operation, features=SMALL)
    if len(jax.devices()) == 1:
        return
    x, *rest = call.arrays
    apart = [jax.device_put(x, jax.devices()[0]), *jax.device_put(rest, jax.devices()[-1])]
    with pytest.raises(ValueError, match="incompatible devices"):
        call.function(*apart)
    call.assert_right(call.function(*call.arrays))


@CASES.add(operation=EXAMPLES)
def pmap(operation):
    """One call on each device."""
    call = Call(operation, (len(jax.devices()),), features=SMALL)
    call.assert_right(jax.pmap(call.one)(*call.arrays))


def _between_callbacks(call):
    """The call with arguments that come from callbacks and results that go to them; returns the results.

    The callbacks do not read what they are given: JAX itself hangs on CPU where all of its threads are in callbacks
    that do, without any call of ours.
    """

    def from_python(a, value):
        return jax.pure_callback(lambda _: value, jax.ShapeDtypeStruct(a.shape, a.dtype), a)

    def run(*arrays):
        results = call.function(*jax.tree.map(from_python, list(arrays), call.arrays))
        zero = jax.pure_callback(lambda *_: np.int32(0), jax.ShapeDtypeStruct((), jnp.int32), *jax.tree.leaves(results))
        return results, zero

    return run


@CASES.add(operation=WITH_CALLBACKS)
def callbacks(operation):
    """Programs full of callbacks on all devices at once, which share the host's few threads, do not hang."""
    devices = len(jax.devices())
    grid = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    call = Call(operation, features=SMALL)

    def shard(*arrays):
        def step(carry, _):
            results, zero = _between_callbacks(call)(*arrays)
            return carry + zero, results

        total, results = jax.lax.scan(step, jnp.int32(0), length=4)
        return jax.tree.map(lambda a: a[-1:], results), total[None]

    program = jax.jit(jax.shard_map(shard, mesh=grid, in_specs=P(), out_specs=P("d"), check_vma=False))
    expected = jax.tree.map(lambda a: np.stack([a] * devices), call.expected)
    for _ in range(5):
        results, total = program(*call.arrays)
        call.row.assert_same(results, expected)
        assert not total.any()


@CASES.add()
def callbacks_from_threads():
    """The same from 8 threads, one program and one device each."""
    call = Call("ragged_fp8", features=SMALL)
    program = jax.jit(_between_callbacks(call))

    def work(i):
        device = jax.devices()[i % len(jax.devices())]
        for _ in range(10):
            call.assert_right(program(*jax.device_put(call.arrays, device))[0])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))


@CASES.add()
def quantizes_in_a_callback():
    """A callback that itself calls the operation, on data of its own."""
    call = Call("split", features=SMALL)
    inner = jax.jit(call.function)
    x = call.arrays[0]

    def callback(a):
        outs, _ = inner(x)
        return np.asarray(outs[0][0, 0].astype(jnp.float32)) + a

    program = jax.jit(lambda a: jax.pure_callback(callback, jax.ShapeDtypeStruct((), jnp.float32), a))
    first = np.float32(call.expected.outs[0][0, 0])
    for i in range(5):
        assert program(jnp.float32(i)) == first + i


if __name__ == "__main__":
    CASES.main()
