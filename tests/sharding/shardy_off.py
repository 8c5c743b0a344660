"""Without the Shardy partitioner, on which older jaxlibs would abort."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from tests import mesh
from tests.mesh import KINDS, check, data, put, split

CASES = mesh.Cases()


def refused(m, function, argument):
    with pytest.raises(
        NotImplementedError, match=r"jax_tsq\.fused_transpose_split_quant .*jax_use_shardy_partitioner.*jax\.shard_map"
    ):
        function(argument)


@CASES.add(kind=("auto", "mixed"), eager=(True, False))
def raises_on_several_devices(kind, eager):
    """A clear error on a mesh with Auto axes."""
    m, (x, _) = mesh.make_mesh(kind), data()
    if m.size > 1:
        refused(m, split if eager else jax.jit(split), put(x, m, None, "t"))


@CASES.add(kind=("auto", "mixed"))
def raises_where_partially_manual(kind):
    """The same inside a shard_map that leaves an axis to the partitioner."""
    m, (x, _) = mesh.make_mesh(kind), data()
    specs = dict(in_specs=P(None, "e"), out_specs=mesh.split_specs(features="e"))
    if m.size > 1:
        refused(m, jax.jit(jax.shard_map(split, mesh=m, axis_names={"e"}, **specs)), put(x, m, None, ("e", "t")))


@CASES.add(kind=("auto", "explicit"))
def shard_map_works(kind):
    """A shard_map over all axes."""
    m, (x, _) = mesh.make_mesh(kind), data()
    specs = mesh.split_specs(features=("e", "t"))
    function = jax.shard_map(split, mesh=m, in_specs=P(None, ("e", "t")), out_specs=specs)
    check(function, [put(x, m, None, ("e", "t"))], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add()
def explicit_works():
    """A mesh whose axes are all Explicit."""
    m, (x, _) = mesh.make_mesh("explicit"), data()
    specs = mesh.split_specs(features="t")
    check(split, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m, specs=specs, eager=True)


@CASES.add(kind=KINDS)
def one_device_works(kind):
    """A mesh of one device."""
    m, (x, _) = mesh.make_mesh(kind, jax.devices()[:1]), data()
    check(split, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m)


if __name__ == "__main__":
    jax.config.update("jax_use_shardy_partitioner", False)
    CASES.main()
