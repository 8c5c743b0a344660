"""ragged_weight_gradient on meshes: features of x, of dy or of both split without communication."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from jax_tsq._core import meshes
from tests import mesh
from tests.cases import bfloat16

CASES = mesh.Cases()
SIZES, TOKENS, FEATURES, OUTPUTS = np.array([100, 0, 130, 2], np.int32), 256, 512, 256


@functools.cache
def quantized(seed=0, batch=None):
    """x and dy, RaggedQuantized of numpy arrays."""
    rng = np.random.default_rng(seed)
    if batch is not None:
        pairs = [quantized(seed) for seed in range(batch)]
        return jax.tree.map(lambda *parts: np.stack(parts), *pairs)
    operands = (rng.standard_normal((TOKENS, features)).astype(bfloat16) for features in (FEATURES, OUTPUTS))
    return tuple(jax.tree.map(np.asarray, jax_tsq.ragged_transpose_quant(a, SIZES)) for a in operands)


def specs_of(features, batch=()):
    return jax_tsq.RaggedQuantized(P(*batch, features), P(*batch, None, features), P(*batch))


def put(operand, grid, features, batch=()):
    return jax.tree.map(lambda array, spec: mesh.put(array, grid, *spec), operand, specs_of(features, batch))


def assert_close(actual, expected):
    """Equal but for the order of sums."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)


def check(function, arguments, expected, grid, spec, communication=()):
    compiled = jax.jit(function).lower(*arguments).compile()
    assert mesh.collectives(compiled) == sorted(communication if grid.size > 1 else ()), compiled.as_text()
    result = compiled(*arguments)
    assert_close(result, expected)
    assert result.sharding.is_equivalent_to(NamedSharding(grid, spec), result.ndim), result.sharding
    return result


@CASES.add(kind=("explicit", "mixed"))
def unplaced_arrays(kind):
    """Arrays that nobody has put on the mesh that jax.set_mesh names."""
    arguments, run = jax.tree.map(jnp.asarray, quantized()), jax_tsq.ragged_weight_gradient
    expected = jax.jit(run)(*arguments)
    with jax.set_mesh(mesh.make_mesh(kind)):
        assert_close(jax.jit(lambda x, dy: run(x, dy))(*arguments), expected)


@CASES.add(kind=mesh.KINDS)
def forced_native(kind):
    """An error that names the function and says why, from each device's part of sizes that the kernel does not take."""
    x, dy = quantized()
    grid = mesh.make_mesh(kind)
    features = grid.shape["t"]  # one for each device
    x = x._replace(values=x.values[:features], scales=x.scales[:, :features])
    arguments = put(x, grid, "t"), put(dy, grid, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_TSQ_KERNELS", "native")
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"jax_tsq\.ragged_weight_gradient cannot"):
            jax.jit(lambda x, dy: jax_tsq.ragged_weight_gradient(x, dy)).lower(*arguments).compile()


@CASES.add(kind=("explicit",), context=(False, True))
def devices_are_known(kind, context):
    """They decide the path, so lowering for CUDA has to find them, even where only the types know the mesh."""
    (x, dy), grid, found = quantized(), mesh.make_mesh(kind), []
    find = meshes.devices
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(grid) if context else contextlib.nullcontext():
        patch.setattr(meshes, "devices", lambda ctx: found.append(find(ctx)) or found[-1])
        traced = jax.jit(jax_tsq.ragged_weight_gradient).trace(put(x, grid, "e"), put(dy, grid, None))
        traced.lower(lowering_platforms=("cuda",))
    assert found and all(set(devices) == set(grid.devices.flat) for devices in found), found


@CASES.add(kind=mesh.KINDS)
def tokens_in_shard_map(kind):
    """Every device has tokens of its own: sums of its own, and the caller's psum makes them one."""
    grid = mesh.make_mesh(kind)
    pairs = [quantized(seed) for seed in range(grid.size)]
    x, dy = (
        jax_tsq.RaggedQuantized(
            np.concatenate([p.values for p in parts], axis=1),
            np.concatenate([p.scales for p in parts]),
            np.concatenate([p.padded_sizes for p in parts]),
        )
        for parts in zip(*pairs, strict=True)
    )
    specs = jax_tsq.RaggedQuantized(P(None, ("e", "t")), P(("e", "t")), P(("e", "t")))

    def run(x, dy):
        return jax.lax.psum(jax_tsq.ragged_weight_gradient(x, dy), ("e", "t"))

    sharded = jax.shard_map(run, mesh=grid, in_specs=(specs, specs), out_specs=P())
    arguments = [
        jax.tree.map(lambda a, s: mesh.put(a, grid, *s), operand, specs, is_leaf=lambda a: isinstance(a, np.ndarray))
        for operand in (x, dy)
    ]
    expected = sum(np.asarray(jax.jit(jax_tsq.ragged_weight_gradient)(*pair)) for pair in pairs)
    check(sharded, arguments, expected, grid, P(), ["all-reduce"])
    if grid.size > 1:  # sums that differ from device to device do not pass for replicated
        local = jax.shard_map(jax_tsq.ragged_weight_gradient, mesh=grid, in_specs=(specs, specs), out_specs=P())
        try:
            jax.eval_shape(local, *arguments)
        except ValueError:
            return
        raise AssertionError("local sums passed for replicated")


@CASES.add(kind=("auto",), features=("e", None), outputs=("t", None))
@CASES.add(kind=("explicit", "mixed"), features=("e",), outputs=("t",))
def accumulator_in_a_scan(kind, features, outputs):
    """A donated accumulator, split as the result, through a scan over microbatches: no communication and no copy."""
    grid, (x, dy) = mesh.make_mesh(kind), quantized(batch=2)
    accumulate = np.random.default_rng(3).standard_normal((len(SIZES), FEATURES, OUTPUTS)).astype(np.float32)

    def run(accumulate, x, dy):
        def step(total, operands):
            return jax_tsq.ragged_weight_gradient(*operands, accumulate=total), None

        return jax.lax.scan(step, accumulate, (x, dy))[0]

    expected = np.asarray(jax.jit(run)(accumulate, x, dy))
    spec = P(None, features, outputs)
    arguments = [mesh.put(accumulate, grid, *spec), put(x, grid, features, (None,)), put(dy, grid, outputs, (None,))]
    compiled = jax.jit(run, donate_argnums=0).lower(*arguments).compile()
    text = compiled.as_text()
    assert mesh.collectives(compiled) == [], text
    part = arguments[0].addressable_shards[0].data.shape
    assert not re.search(rf"= f32\[{','.join(map(str, part))}\]\S* copy", text), text
    result = compiled(*arguments)
    assert_close(result, expected)
    assert result.sharding.is_equivalent_to(NamedSharding(grid, spec), result.ndim), result.sharding


if __name__ == "__main__":
    CASES.main()
