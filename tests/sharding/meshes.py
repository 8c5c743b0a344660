"""Meshes of every make: batch dimensions on several axes, devices in any order or number, meshes in a context."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_tsq._core import jax_internals
from tests import mesh
from tests.mesh import EXPERTS, KINDS, Call, put, split

CASES = mesh.Cases()


@CASES.add(types=("Auto Auto Auto", "Explicit Explicit Explicit", "Explicit Auto Explicit", "Auto Explicit Explicit"))
def two_batch_dimensions(types):
    """Nested vmap, each batch dimension on an axis of its own."""
    m = mesh.make_cube(types.split())
    Call("ragged", (2, EXPERTS)).check(m, dict(batch=("a", "b"), features="c"), eager=True)


@CASES.add(kind=KINDS, mapped=("x", "group_sizes"))
def one_mapped_operand(kind, mapped):
    """vmap over one of two operands: no communication."""
    m, call, one = mesh.make_mesh(kind), Call("ragged", (EXPERTS,)), Call("ragged")
    axes = [0 if name == mapped else None for name in call.operands]

    def pick(of_call, of_one):
        return [a if axis == 0 else b for axis, a, b in zip(axes, of_call, of_one, strict=True)]

    where = dict(batch=("e",), features="t")
    parts = [one.expect(*pick((a[i] for a in call.arrays), one.arrays)) for i in range(EXPERTS)]
    call.check(
        m,
        where,
        function=jax.vmap(one.function, axes),
        arguments=pick(call.put(m, **where), one.put(m, features="t")),
        expected=jax.tree.map(lambda *leaves: np.stack(leaves), *parts),
    )


@CASES.add(kind=KINDS)
def spmd_axis_name(kind):
    """vmap with the mesh axis of the mapped dimension."""
    call = Call("split", (EXPERTS,))
    function = jax.vmap(call.one, spmd_axis_name="e")
    call.check(mesh.make_mesh(kind), dict(batch=("e",), features="t"), function=function)


@CASES.add(kind=("auto", "explicit"))
def permuted_devices(kind):
    """Devices in another order than JAX lists them."""
    devices = [jax.devices()[i] for i in np.random.default_rng(0).permutation(len(jax.devices()))]
    Call("split").check(mesh.make_mesh(kind, devices), dict(features=("t", "e")))


@CASES.add()
def an_internal_that_fails_is_an_error():
    """What JAX raises on shardings that no PartitionSpec says means "replicated", anything else is no such answer."""
    m, (x,) = mesh.make_mesh("auto"), Call("split").arrays
    if m.size == 1:
        return
    for error in (AttributeError("as if renamed"), TypeError("as if renamed")):
        lowered = jax.jit(lambda x: split(x)).lower(put(x, m, None, "t"))
        message = f"{type(error).__name__}: as if renamed"
        with (
            mock.patch.object(jax_internals, "gspmd_to_hlo_sharding", side_effect=error),
            pytest.raises(jax.errors.JaxRuntimeError, match=message),
        ):
            lowered.compile()


@CASES.add(kind=KINDS)
def some_devices(kind):
    """A mesh of the last half of the devices, or of one."""
    Call("split").check(mesh.make_mesh(kind, jax.devices()[len(jax.devices()) // 2 :]), dict(features="t"))


@CASES.add(kind=("auto", "explicit"))
def axis_of_size_one(kind):
    """Mesh axes of size 1 take part as any other."""
    devices = np.reshape(jax.devices(), (-1, 1))
    m = jax.sharding.Mesh(devices, ("e", "t"), axis_types=mesh.AXIS_TYPES[kind])
    for features in ("t", "e", ("e", "t")):
        Call("split").check(m, dict(features=features))


@CASES.add(kind=KINDS)
def one_axis_in_two_operands(kind):
    """The same mesh axis on x's features and on the group sizes' experts: a conflict, resolved with right bytes."""
    m, call = mesh.make_mesh(kind), Call("ragged", (EXPERTS,))
    x, sizes = call.arrays
    conflicts = [[put(x, m, "t"), put(sizes, m, "t", "e")]]
    if kind == "auto":
        conflicts.append([put(x, m, None, None, "t"), put(sizes, m, "t")])
    for arguments in conflicts:
        call.check(m, arguments=arguments, specs=None, communication=None)


@CASES.add()
def one_function_many_meshes():
    """One jitted function called with one sharding after the other."""
    call, jitted = Call("split"), jax.jit(split)
    for kind in (*KINDS, "auto"):
        for axes in (dict(features="t"), dict(tokens="t"), dict(features=("e", "t")), {}):
            call.assert_right(jitted(*call.put(mesh.make_mesh(kind), **axes)))


@CASES.add(kind=KINDS)
def mesh_in_context(kind):
    """jax.set_mesh around jitted and eager calls, with split and with plain arguments."""
    m, call = mesh.make_mesh(kind), Call("split")
    (x,) = call.arrays
    with jax.set_mesh(m):
        call.check(m, dict(features="t"), arguments=[jax.device_put(x, P(None, "t"))], eager=True)
        for function in (split, jax.jit(split)):
            call.assert_right(function(jnp.asarray(x)))


@CASES.add(axes=(("e", "t"), ("e",)))
def auto_axes(axes):
    """jax.sharding.auto_axes over all or some axes of an Explicit mesh."""
    m, call, where = mesh.make_mesh("explicit"), Call("split"), dict(features="t")
    with jax.set_mesh(m):
        call.check(m, where, function=jax.sharding.auto_axes(split, axes=axes, out_sharding=call.specs(**where)))


@CASES.add()
def explicit_axes():
    """jax.sharding.explicit_axes on an Auto mesh."""
    m = mesh.make_mesh("auto")
    with jax.set_mesh(m):
        function = jax.sharding.explicit_axes(split, in_sharding=(P(None, "t"),))
        Call("split").check(m, dict(features="t"), function=function)


if __name__ == "__main__":
    CASES.main()
