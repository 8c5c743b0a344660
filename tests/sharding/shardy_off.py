"""Without the Shardy partitioner, on which older jaxlibs would abort."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests import mesh
from tests.mesh import KINDS, Call, split

CASES = mesh.Cases()


def refused(function, m, **axes):
    with pytest.raises(
        NotImplementedError, match=r"jax_tsq\.fused_transpose_split_quant .*jax_use_shardy_partitioner.*jax\.shard_map"
    ):
        function(*Call("split").put(m, **axes))


@CASES.add(kind=("auto", "mixed"), eager=(True, False))
def raises_on_several_devices(kind, eager):
    """A clear error on a mesh with Auto axes."""
    m = mesh.make_mesh(kind)
    if m.size > 1:
        refused(split if eager else jax.jit(split), m, features="t")


@CASES.add(kind=("auto", "mixed"))
def raises_where_partially_manual(kind):
    """The same inside a shard_map that leaves an axis to the partitioner."""
    m = mesh.make_mesh(kind)
    specs = dict(in_specs=P(None, "e"), out_specs=Call("split").specs(features="e"))
    if m.size > 1:
        function = jax.jit(jax.shard_map(split, mesh=m, axis_names={"e"}, **specs))
        refused(function, m, features=("e", "t"))


@CASES.add(kind=("auto", "explicit"))
def shard_map_works(kind):
    """A shard_map over all axes."""
    m, call, where = mesh.make_mesh(kind), Call("split"), dict(features=("e", "t"))
    specs = call.specs(**where)
    call.check(m, where, function=jax.shard_map(split, mesh=m, in_specs=P(None, ("e", "t")), out_specs=specs))


@CASES.add()
def explicit_works():
    """A mesh whose axes are all Explicit."""
    Call("split").check(mesh.make_mesh("explicit"), dict(features="t"), eager=True)


@CASES.add(kind=KINDS)
def one_device_works(kind):
    """A mesh of one device."""
    Call("split").check(mesh.make_mesh(kind, jax.devices()[:1]), dict(features="t"), specs=None)


if __name__ == "__main__":
    jax.config.update("jax_use_shardy_partitioner", False)
    CASES.main()
