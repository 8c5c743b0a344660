"""Faults at run time: errors that name the operation, no more; the next call works."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_tsq
from tests.cases import bfloat16
from tests.conftest import NATIVE
from tests.operations import EXAMPLES, Call, Shape

SHAPE = Shape(counts=(172, 128), sizes=((100, 0, 157),), features=130)
CALLS = [Call(name, SHAPE) for name in EXAMPLES]


def next_calls_work(device):
    """Every operation gives what is right."""
    for call in CALLS:
        call.assert_right(call.function(*jax.device_put(call.arrays, device)))


def split_of(shape, counts):
    """A program that quantizes ones of this shape, with batch dimensions in front."""
    function = functools.partial(jax_tsq.fused_transpose_split_quant, input_scales=None, tokens_per_expert=counts)
    for _ in shape[:-2]:
        function = jax.vmap(function)
    return jax.jit(lambda one: function(jnp.broadcast_to(one, shape)))


def ragged_of(shape):
    """The same, in one group."""
    function = jax_tsq.ragged_transpose_quant
    for _ in shape[:-2]:
        function = jax.vmap(function, in_axes=(0, None))
    return jax.jit(lambda one: function(jnp.broadcast_to(one, shape), jnp.int32([shape[-2]])))


@pytest.mark.parametrize(
    "program",
    [
        split_of((1 << 20, 1 << 27), [1 << 20]),
        ragged_of((1 << 20, 1 << 27)),
        jax.jit(lambda one: jax_tsq.quantize_blocks(jnp.broadcast_to(one, (1, 1 << 20, 1 << 27)))),
    ],
    ids=["split", "ragged", "blocks"],
)
def test_out_of_memory(ffi_device, program):
    """More memory than a process can address: JAX's own error.

    Without scales of rows: XLA's compiler for CPUs (jax 0.12.0.1) dies of a copy of so many to the public layout.
    """
    one = jax.device_put(bfloat16(1), ffi_device)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"RESOURCE_EXHAUSTED|[Oo]ut of memory"):
        jax.block_until_ready(program(one))
    next_calls_work(ffi_device)


@pytest.mark.skipif("cuda" not in NATIVE, reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "program", "rule"),
    [
        ("fused_transpose_split_quant", split_of((1, 1 << 31), [1]), r"more than 2\^31 - 129 features"),
        ("fused_transpose_split_quant", split_of((1 << 31, 1, 1), [1]), r"more than 2\^31 - 1 thread blocks"),
        ("ragged_transpose_quant", ragged_of((1 << 31, 0, 1)), r"more than 2\^31 - 1 thread blocks"),
    ],
)
def test_launch_fails(name, program, rule):
    """A launch that cannot be made (15 GB of buffers) is an error with the operation's name and the limit."""
    device = NATIVE["cuda"]
    if (device.memory_stats() or {}).get("bytes_limit", 0) < 20 << 30:
        pytest.skip("needs 20 GB of device memory")
    one = jax.device_put(bfloat16(1), device)
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf"jax_tsq\.{name}: the CUDA kernel could not be .*{rule}"):
        jax.block_until_ready(program(one))
    next_calls_work(device)


def test_handler_refuses(ffi_device):
    """An error of a handler in the middle of a program with other calls, many times in a row."""
    refused = jax.ffi.ffi_call("jax_tsq.split", [jax.ShapeDtypeStruct((130, 299), jnp.float8_e4m3fn)] * 2)

    neighbours = [call for call in CALLS if call.row.is_native(ffi_device)]

    @jax.jit
    def program(x, operands):
        before = [call.function(*arrays) for call, arrays in zip(neighbours, operands, strict=True)]
        return before, refused(x, pow_2_scales=False), jax_tsq.fused_transpose_split_quant(x, None, [300])

    operands = jax.device_put([call.arrays for call in neighbours], ffi_device)
    x = jax.device_put(Call("split", SHAPE).arrays[0], ffi_device)
    for _ in range(20):
        message = r"INVALID_ARGUMENT: .*jax_tsq\.fused_transpose_split_quant: scales\[0\] must be"
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(program(x, operands))
    next_calls_work(ffi_device)
