"""`jax.export` on meshes; each exported program is loaded and run in a process of its own."""

import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import mesh
from tests.mesh import Call, split
from tests.operations import EXAMPLES, OPERATIONS

CASES = mesh.Cases()
CHECKS = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in OPERATIONS]
BOTH = ("e", "t")


def in_another_process(exported, kind, operation, features):
    """The leaves of what a fresh process gets from an exported program, called with data of `Call`."""
    with tempfile.TemporaryDirectory() as directory:
        program, results = pathlib.Path(directory, "program"), pathlib.Path(directory, "results.npz")
        program.write_bytes(exported.serialize())
        command = [sys.executable, "-m", "tests.sharding.exports", "load", program, results, kind, operation, *features]
        subprocess.run(command, cwd=mesh.ROOT, check=True)
        with np.load(results) as leaves:
            return [leaves[f"arr_{i}"] for i in range(len(leaves))]


def load(program, results, kind, operation, *features):
    """Runs an exported program and writes the bits of its results."""
    import jax_tsq  # noqa: F401, registers the targets and the result types

    call = Call(operation)
    exported = jax.export.deserialize(bytearray(pathlib.Path(program).read_bytes()))
    outputs = jax.jit(exported.call)(*call.put(mesh.make_mesh(kind), features=tuple(features)))
    assert type(outputs) is type(call.expected), type(outputs)
    np.savez(results, *(np.asarray(leaf).view(f"u{leaf.dtype.itemsize}") for leaf in jax.tree.leaves(outputs)))


def check_round_trip(exported, kind, operation, features):
    assert exported.nr_devices == len(jax.devices())
    expected = [leaf.view(f"u{leaf.dtype.itemsize}") for leaf in jax.tree.leaves(Call(operation).expected)]
    mesh.assert_same_bytes(in_another_process(exported, kind, operation, features), expected)


@CASES.add(kind=("auto", "explicit"), operation=("split", "ragged_fp8"))  # JAX cannot serialize mixed meshes
def shard_map(kind, operation):
    """A shard_map over all axes."""
    m, call = mesh.make_mesh(kind), Call(operation)
    specs = dict(in_specs=tuple(call.operand_specs(features=BOTH)), out_specs=call.specs(features=BOTH))
    function = jax.jit(jax.shard_map(call.function, mesh=m, check_vma=False, **specs))
    exported = jax.export.export(function, disabled_checks=CHECKS)(*call.put(m, features=BOTH))
    check_round_trip(exported, kind, operation, BOTH)


@CASES.add(operation=("split", "ragged_fp8"))
def explicit(operation):
    """An Explicit mesh."""
    m, call = mesh.make_mesh("explicit"), Call(operation)
    exported = jax.export.export(jax.jit(call.function), disabled_checks=CHECKS)(*call.put(m, features="t"))
    check_round_trip(exported, "explicit", operation, ("t",))


@CASES.add(kind=("explicit", "auto"), operation=[name for name, row in EXAMPLES.items() if row.parallel])
def every_operation(kind, operation):
    """Written and read back in one process, from an Explicit mesh or a shard_map: the same types and bytes."""
    m, call = mesh.make_mesh(kind), Call(operation)
    where = {next(iter(call.row.parallel)): "t"}
    function = call.function
    if kind == "auto":
        specs = dict(in_specs=tuple(call.operand_specs(**where)), out_specs=call.specs(**where))
        function = jax.shard_map(function, mesh=m, check_vma=False, **specs)
    exported = jax.export.export(jax.jit(function), disabled_checks=CHECKS)(*call.put(m, **where))
    call.assert_right(jax.jit(jax.export.deserialize(exported.serialize()).call)(*call.put(m, **where)))


@CASES.add(kind=("auto", "mixed"))
def auto_is_refused(kind):
    """On a mesh with Auto axes JAX refuses, because the partitioner calls back into Python."""
    m, call = mesh.make_mesh(kind), Call("split")
    if m.size > 1:
        with pytest.raises(NotImplementedError, match="host_callbacks"):
            jax.export.export(jax.jit(call.function), disabled_checks=CHECKS)(*call.put(m, features="t"))


@CASES.add(kind=("auto", "explicit"))
def abstract_mesh_is_refused(kind):
    """JAX refuses meshes without devices."""
    m, (x,) = mesh.make_mesh(kind), Call("split").arrays
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(m.abstract_mesh, P(None, "t")))
    if m.size > 1:
        with pytest.raises(ValueError, match="AbstractMesh"):
            jax.export.export(jax.jit(split), disabled_checks=CHECKS, platforms=["cpu"])(shape)


if __name__ == "__main__":
    if sys.argv[1:2] == ["load"]:
        load(*sys.argv[2:])
    else:
        CASES.main()
