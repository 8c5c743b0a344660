"""What happens on a mesh: how the native call gets to where its shards are.

An XLA custom call is opaque to the partitioner, which would gather its operands on every device. So the call is lowered

* as it is on one device and where all mesh axes are manual already (inside `jax.shard_map`);
* inside a `jax.shard_map` over the mesh axes of type Explicit, whose shardings are part of the operands' types;
* inside a `custom_partitioning` on a mesh of type Auto, whose shardings the partitioner finds;
* as it is where `jax.shard_map` left some axes to the partitioner: right, but gathered over those axes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.interpreters.mlir import ShardingContext, SPMDAxisContext
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_tsq._core import dims, ffi, jax_internals, kernels


def require_devices_during_lowering(primitive) -> None:
    """Makes JAX tell a primitive's lowering rule on which devices it will run, as custom_partitioning asks."""
    jax_internals.prim_requires_devices_during_lowering.add(primitive)


def devices(ctx) -> tuple[Any, ...]:
    """The devices that a lowering rule lowers for, or where only an abstract mesh is known all of their kind."""
    context = ctx.module_context.axis_context
    if isinstance(context, SPMDAxisContext) and not isinstance(context.mesh, AbstractMesh):
        return tuple(context.mesh.devices.flat)
    backend = ctx.module_context.backend
    return tuple(getattr(context, "device_assignment", None) or (backend.devices() if backend is not None else ()))


def vary_alike(operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Marks operands as varying over the union of the manual mesh axes that any of them varies over.

    Without it a result would be typed after the first operand alone, and shard_map would let results that differ from
    device to device pass for replicated.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        jax.lax.pcast(x, tuple(union - own), to="varying") if union - own else x
        for x, own in zip(operands, varying, strict=True)
    ]


def mesh_of(avals) -> AbstractMesh:
    """The mesh that operands' types name, empty if none does."""
    return next((a.sharding.mesh for a in avals if not a.sharding.mesh.empty), avals[0].sharding.mesh)


# --- Explicit axes: shardings are part of the types ------------------------------------------------------------------


def _explicit_axes(mesh) -> set:
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}


def on_auto_axes(run: Callable, out_spec: P, *operands) -> Any:
    """Runs a function whose parts have no rule for Explicit mesh axes, with those axes handed to the partitioner."""
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(operands)]
    meshes.append(jax.sharding.get_abstract_mesh())  # which arrays that nobody placed are taken to lie on
    mesh = next((mesh for mesh in meshes if _explicit_axes(mesh)), None)
    if mesh is None:
        return run(*operands)
    used, spec = set(), []
    for entry in out_spec:
        axes = {*dims.axes_of(entry)}
        spec.append(entry if used.isdisjoint(axes) else None)
        used |= axes
    axes = tuple(_explicit_axes(mesh))
    return jax.sharding.auto_axes(run, axes=axes, out_sharding=NamedSharding(mesh, P(*spec)))(*operands)


def _typed_assignment(op, avals, params) -> dict:
    """The axes that the operands' types name."""
    specs = [a.sharding.spec for a in avals]
    specs = [getattr(spec, "partitions", spec) for spec in specs]  # newer JAX wants it so for `reduced` specs
    return dims.assign(op, avals, specs, dict(mesh_of(avals).shape), params)


def result_shardings(op, avals, params) -> list[NamedSharding]:
    """Shardings to put into the results' types."""
    for aval in avals:
        if aval.sharding.spec.unreduced or aval.manual_axis_type.unreduced:
            raise TypeError(
                f"jax_tsq.{op.function} is not linear, so its arguments must not be unreduced; got {aval}. Sum it "
                "first, with jax.sharding.reshard or, inside jax.shard_map, with jax.lax.psum."
            )
    specs = dims.specs_of(dims.result_dims(op, avals, params), _typed_assignment(op, avals, params))
    return [NamedSharding(mesh_of(avals), spec) for spec in specs]


def _over_explicit_mesh(op, primitive, avals, params):
    mesh, assignment = mesh_of(avals), _typed_assignment(op, avals, params)
    in_specs = dims.specs_of(dims.operand_dims(op, avals, params), assignment)
    out_specs = dims.specs_of(dims.result_dims(op, avals, params), assignment)

    def run(*operands):
        operands = [jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(operands, in_specs, strict=True)]
        return jax.shard_map(
            functools.partial(primitive.bind, **params),
            mesh=mesh,
            in_specs=tuple(in_specs),
            out_specs=out_specs,
            axis_names=_explicit_axes(mesh),
            check_vma=False,
        )(*operands)

    return run


# --- Auto axes: the partitioner propagates shardings -----------------------------------------------------------------


def _require_shardy(op) -> None:
    if not getattr(jax.config, "jax_use_shardy_partitioner"):  # noqa: B009, unknown to type checkers
        raise NotImplementedError(
            f"jax_tsq.{op.function} on several devices needs JAX's Shardy partitioner, but jax_use_shardy_partitioner "
            "is off. Remove that setting, or call the function inside a jax.shard_map over all axes of the mesh."
        )


# What JAX raises on a sharding that no PartitionSpec says, such as one over a part of a mesh axis or a permutation of
# the devices. Anything else is an error.
_NO_SPEC = (AssertionError, KeyError, NotImplementedError, ValueError)


def decode(sharding, mesh) -> P:
    """The spec of a sharding that the partitioner chose; replicated if no spec says it."""
    hlo_sharding = jax_internals.gspmd_to_hlo_sharding(sharding, 0)
    try:
        return jax_internals.parse_flatten_op_sharding(hlo_sharding, mesh)[0]
    except _NO_SPEC:
        return P()


def _over_auto_mesh(op, primitive, avals, params):
    _require_shardy(op)

    def partition(mesh, operand_shapes, result_shapes):
        specs = [decode(s.sharding, mesh) for s in operand_shapes]
        assignment = dims.assign(op, operand_shapes, specs, dict(mesh.shape), params)
        in_shardings, out_shardings = (
            [NamedSharding(mesh, spec) for spec in dims.specs_of(arrays, assignment)]
            for arrays in (dims.operand_dims(op, operand_shapes, params), dims.result_dims(op, operand_shapes, params))
        )
        return mesh, functools.partial(primitive.bind, **params), out_shardings, tuple(in_shardings)

    # custom_partitioning looks the operands up by position in the signature.
    call = custom_partitioning(lambda *operands: primitive.bind(*operands, **params))
    call.def_partition(partition, decode_shardings=False, sharding_rule=dims.sharding_rule(op, avals, params))

    def named(*operands):
        return call(*operands)

    # All that distinguishes programs in a persistent compilation cache whose keys leave the callbacks out.
    values = {name: params[name] for name in op.attributes} | kernels.attributes(op)
    attributes = [f"{name}_{value}" for name, value in values.items()]
    named.__name__ = "_".join([op.name, *attributes, kernels.setting(), *ffi.build()])
    return jax.jit(named)


# --- The way to the native call --------------------------------------------------------------------------------------


def lower(op, primitive, leaf, ctx, *operands, **params):
    """Lowers an operation: on a mesh to itself inside one of the wrappers above, else by `leaf`."""
    context, avals = ctx.module_context.axis_context, ctx.avals_in
    axes = [aval.sharding.mesh for aval in avals]
    explicit = any(_explicit_axes(mesh) for mesh in axes)
    auto = any(AxisType.Auto in mesh.axis_types for mesh in axes)
    partitioned = isinstance(context, ShardingContext) and context.num_devices > 1
    if any(0 in aval.shape for aval in avals):  # nothing to compute, and some versions of XLA crash on empty shards
        return leaf(ctx, *operands, **params)
    if explicit and not (auto and partitioned):
        wrapped = _over_explicit_mesh(op, primitive, avals, params)
    elif partitioned:
        wrapped = _over_auto_mesh(op, primitive, avals, params)
    else:
        if auto and isinstance(context, SPMDAxisContext) and context.mesh.size > 1:
            _require_shardy(op)
        return leaf(ctx, *operands, **params)
    return mlir.lower_fun(wrapped, multiple_results=True)(ctx, *operands)
