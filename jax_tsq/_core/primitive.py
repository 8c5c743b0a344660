"""How an operation becomes a JAX primitive: abstract evaluation, batching, lowering table."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval, xla

from jax_tsq._core import kernels, meshes
from jax_tsq._core.kernels import Kernel
from jax_tsq._core.numerics import FP8

Dims = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """Dimension names, sizes and dtype of one result, leading batch dimensions aside."""

    dims: Dims
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Part:
    """An operation that computes some results of another one from the same operands.

    Attributes:
        primitive: that of the part.
        results: which of the other operation's results it gives, in order.
        params: maps the other operation's parameters to those of the part.
    """

    primitive: Primitive
    results: tuple[int, ...]
    params: Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Operation:
    """All that JAX has to know of an operation.

    Attributes:
        name: the stem; the FFI target is `jax_tsq.<name>`.
        function: the public function, which messages name.
        operands: the dimension names of each operand, such as ("tokens", "features"), optional operands last. Every
            operand may have more dimensions in front, the same for all: batch dimensions.
        results: maps the operands' shapes without batch dimensions, and the parameters, to the results.
        reference: the same in pure JAX, for operands with batch dimensions; returns a sequence of arrays.
        parallel: maps the operands' shapes without batch dimensions, and the parameters, to the dimensions that a mesh
            may split without any communication.
        attributes: the parameters that the native code takes, each a bool or a numpy scalar.
        blocks: maps a dimension that counts blocks of 128 to the dimension that it counts.
        exchanged: maps the parameters to the numbers of operands whose last two dimensions are the other way round.
        in_place: maps the number of an operand to that of the result that takes its memory, where XLA finds that nobody
            needs it any more.
        column_major: the dimensions of operands and results that the native code takes and gives with the last
            dimension but one contiguous, and not the last one. Shapes do not tell.
        parts: operations that take this one's place where no other results than theirs are used.
        kernel: what the native code asks for; the reference runs where it is not met.
    """

    name: str
    function: str
    operands: tuple[Dims, ...]
    results: Callable[..., Sequence[Result]]
    reference: Callable[..., Sequence[jax.Array]]
    parallel: Callable[..., tuple[str, ...]]
    attributes: tuple[str, ...] = ()
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    exchanged: Callable[..., tuple[int, ...]] = lambda **_: ()
    in_place: Mapping[int, int] = dataclasses.field(default_factory=dict)
    column_major: tuple[Dims, ...] = ()
    parts: tuple[Part, ...] = ()
    kernel: Kernel = dataclasses.field(default_factory=Kernel)

    @property
    def target(self) -> str:
        return f"jax_tsq.{self.name}"

    def batch_rank(self, *avals) -> int:
        return len(avals[0].shape) - len(self.operands[0])

    def operand_dims(self, **params) -> list[Dims]:
        """The dimensions of each operand without batch dimensions."""
        exchanged = self.exchanged(**params)
        return [(*d[:-2], d[-1], d[-2]) if i in exchanged else d for i, d in enumerate(self.operands)]

    def shapes(self, *avals) -> list[tuple[int, ...]]:
        """The operands' shapes without batch dimensions."""
        rank = self.batch_rank(*avals)
        return [aval.shape[rank:] for aval in avals]

    def infer(self, *avals, **params) -> Sequence[Result]:
        return self.results(*self.shapes(*avals), **params)


def define(op: Operation) -> Primitive:
    """Returns the primitive of an operation, with every rule registered."""
    kernels.OPERATIONS[op.target] = op
    primitive = Primitive(f"jax_tsq_{op.name}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, op))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    ad.primitive_jvps[primitive] = functools.partial(_refuse_to_differentiate, op)
    if op.parts:
        partial_eval.dce_rules[primitive] = functools.partial(_drop_dead_results, op)
    meshes.require_devices_during_lowering(primitive)

    for platform in (None, "cpu", "cuda"):
        leaf = functools.partial(_lower, op, platform or "other platforms")
        mlir.register_lowering(primitive, functools.partial(meshes.lower, op, primitive, leaf), platform=platform)
    return primitive


def bind(primitive: Primitive, *operands: jax.Array | None, **params) -> list[jax.Array]:
    """Binds operands that may be None and that may vary over different manual mesh axes."""
    arrays = [operand for operand in operands if operand is not None]
    return primitive.bind(*meshes.vary_alike(arrays), **params)


def _abstract_eval(op: Operation, *avals, **params):
    rank = op.batch_rank(*avals)
    batch = avals[0].shape[:rank]
    shardings = meshes.result_shardings(op, avals, params)
    return [
        avals[0].update(shape=(*batch, *result.shape), dtype=result.dtype, weak_type=False, sharding=sharding)
        for result, sharding in zip(op.infer(*avals, **params), shardings, strict=True)
    ]


def _batch(primitive: Primitive, operands, axes, **params):
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    operands = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    results = primitive.bind(*operands, **params)
    return results, [0] * len(results)


def _refuse_to_differentiate(op: Operation, primals, tangents, **params):
    rounds = any(result.dtype == FP8 for result in op.infer(*primals, **params))
    raise NotImplementedError(
        f"jax_tsq.{op.function} {'rounds its input to float8_e4m3fn and ' if rounds else ''}has no derivative. Call it "
        "inside a jax.custom_vjp whose backward pass says what the gradient is, as jax_tsq.grouped_linear does, or put "
        "jax.lax.stop_gradient around its arguments."
    )


def _drop_dead_results(op: Operation, used: Sequence[bool], *others) -> tuple[list[bool], Any]:
    """Which operands of an equation are used, and what is left of it, if only some of its results are used."""
    eqn = others[-1]  # the second argument up to JAX 0.11, the third one later
    if not any(used):
        return [False] * len(eqn.invars), None
    for part in op.parts:
        if any(is_used and i not in part.results for i, is_used in enumerate(used)):
            continue
        params = part.params(**eqn.params)
        outvars = [eqn.outvars[i] for i in part.results]
        types, _ = part.primitive.abstract_eval(*(v.aval for v in eqn.invars), **params)
        if types == [v.aval for v in outvars]:  # on an Explicit mesh a part may split more than the whole
            return [True] * len(eqn.invars), eqn.replace(primitive=part.primitive, params=params, outvars=outvars)
    return [True] * len(eqn.invars), eqn


def _layout(op: Operation, dims: Dims, aval) -> tuple[int, ...] | None:
    """The order of an array's dimensions in memory, contiguous ones first; None for row-major."""
    if dims not in op.column_major:
        return None
    *others, rows, columns = range(aval.ndim)
    return (rows, columns, *reversed(others))


def _lower(op: Operation, platform: str, ctx, *operands, **params):
    exporting = ctx.module_context.lowering_parameters.for_export
    # An export may be made for other devices than those here: forced, it holds the kernel whatever they are.
    attributes = {name: params[name] for name in op.attributes} | kernels.attributes(op)
    devices = None if exporting and kernels.setting() == "native" else meshes.devices(ctx)
    if kernels.takes_native(op, platform, devices, ctx.avals_in, params):
        operands_dims = op.operand_dims(**params)
        operand_layouts = [_layout(op, dims, aval) for dims, aval in zip(operands_dims, ctx.avals_in, strict=False)]
        results = op.infer(*ctx.avals_in, **params)
        result_layouts = [_layout(op, r.dims, aval) for r, aval in zip(results, ctx.avals_out, strict=True)]
        call = jax.ffi.ffi_lowering(
            op.target,
            operand_layouts=operand_layouts,
            result_layouts=result_layouts,
            operand_output_aliases={i: result for i, result in op.in_place.items() if i < len(operands)},
        )
        return call(ctx, *operands, **attributes)
    reference = mlir.lower_fun(functools.partial(op.reference, **params), multiple_results=True)
    with jax.sharding.use_abstract_mesh(meshes.mesh_of(ctx.avals_in)):  # not the one that jax.set_mesh has set
        return reference(ctx, *operands)
