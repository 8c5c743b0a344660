"""Devices other than the first, `jax.pmap`, and callbacks to Python on every device."""

import concurrent.futures

import jax
import jax.numpy as jnp
import mesh
import numpy as np
import pytest
from cases import assert_same_bytes
from jax.sharding import PartitionSpec as P
from mesh import OPERATIONS, Call

CASES = mesh.Cases()
SMALL = 256  # features


def _same(result, expected):
    assert_same_bytes(jax.tree.leaves(result), jax.tree.leaves(expected))


@CASES.add(operation=OPERATIONS)
def committed(operation):
    """Arrays committed to the last device: the call runs there, eager or compiled."""
    call, device = Call(operation, features=SMALL), jax.devices()[-1]
    for function in (call.function, jax.jit(call.function)):
        result = function(*jax.device_put(call.arrays, device))
        assert {d for leaf in jax.tree.leaves(result) for d in leaf.devices()} == {device}
        _same(result, call.expected)


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
    _same(call.function(*call.arrays), call.expected)


@CASES.add(operation=OPERATIONS)
def pmap(operation):
    """One call on each device."""
    call = Call(operation, batch=len(jax.devices()), features=SMALL)
    one = Call(operation, features=SMALL).function
    _same(jax.pmap(one)(*call.arrays), call.expected)


def _through_callbacks(function):
    """Every argument and every result goes through Python."""

    def through(a):
        return jax.pure_callback(lambda a: np.asarray(a), jax.ShapeDtypeStruct(a.shape, a.dtype), a)

    return lambda *arrays: jax.tree.map(through, function(*map(through, arrays)))


@CASES.add(operation=OPERATIONS)
def callbacks(operation):
    """Programs full of callbacks on all devices at once, which share the host's few threads, do not hang."""
    devices = len(jax.devices())
    grid = jax.make_mesh((devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    call = Call(operation, batch=devices, features=SMALL)
    one = _through_callbacks(Call(operation, features=SMALL).function)

    def shard(*arrays):
        def step(carry, _):
            return carry, one(*(a[0] for a in arrays))

        _, results = jax.lax.scan(step, 0, length=4)
        return jax.tree.map(lambda a: a[-1:], results)

    program = jax.jit(jax.shard_map(shard, mesh=grid, in_specs=P("d"), out_specs=P("d"), check_vma=False))
    for _ in range(5):
        _same(program(*call.arrays), call.expected)


@CASES.add()
def callbacks_from_threads():
    """The same from 8 threads, one program and one device each."""
    call = Call("ragged_fp8", features=SMALL)
    program = jax.jit(_through_callbacks(call.function))

    def work(i):
        device = jax.devices()[i % len(jax.devices())]
        for _ in range(10):
            _same(program(*jax.device_put(call.arrays, device)), call.expected)

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
