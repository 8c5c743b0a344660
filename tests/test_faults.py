"""Faults at run time: errors that name the operation, no more; the next call works."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, normal
from tests.conftest import NATIVE

X, _ = normal([300, 130])
SIZES = np.int32([100, 0, 157])


def next_calls_work(device):
    """Both operations, right to the byte."""
    x, sizes = jax.device_put((X, SIZES), device)
    assert_same_bytes(list(jax_tsq.ragged_transpose_quant(x, sizes)), spec.ragged(X, SIZES))
    split = jax_tsq.fused_transpose_split_quant(x, None, [172, 128])
    assert_same_bytes(split, spec.split(X, None, [172, 128]))


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
    [split_of((1 << 20, 1 << 27), [1 << 20]), ragged_of((1 << 20, 1 << 27))],
    ids=["split", "ragged"],
)
def test_out_of_memory(ffi_device, program):
    """More memory than there is: JAX's own error."""
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
    call = jax.ffi.ffi_call("jax_tsq.split", [jax.ShapeDtypeStruct((130, 299), jnp.float8_e4m3fn)] * 2)

    @jax.jit
    def program(x):
        first = jax_tsq.ragged_transpose_quant(x, jnp.asarray(SIZES))
        return first, call(x, pow_2_scales=False), jax_tsq.fused_transpose_split_quant(x, None, [300])

    x = jax.device_put(X, ffi_device)
    for _ in range(20):
        message = r"INVALID_ARGUMENT: .*jax_tsq\.fused_transpose_split_quant: scales\[0\] must be"
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(program(x))
    next_calls_work(ffi_device)
