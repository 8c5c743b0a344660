"""How an operation becomes a JAX primitive: abstract evaluation, batching, lowering table."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from jax_tsq._core import ffi, meshes

Dims = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Result:
    """Dimension names, sizes and dtype of one result, leading batch dimensions aside."""

    dims: Dims
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Operation:
    """All that JAX has to know of an operation.

    Attributes:
        name: the stem; the FFI target is `jax_tsq.<name>`.
        operands: the dimension names of each operand, optional ones last. Every operand may have more dimensions in
            front, the same for all: batch dimensions.
        results: maps the operands' shapes without batch dimensions, and the parameters, to the results.
        reference: the same in pure JAX, for operands with batch dimensions; returns a sequence of arrays.
        attributes: the parameters that the native code takes, each a bool.
        parallel: maps the parameters to the dimensions that a mesh may split without any communication.
        blocks: maps a dimension that counts blocks of 128 to the dimension that it counts.
        platforms: those that there is native code for.
        takes_kernel: maps the devices that a call is lowered for, the operands' avals and the parameters to whether
            the CUDA code can run; the reference runs otherwise.
        switch: returns the setting that `takes_kernel` goes by beside its arguments.
    """

    name: str
    operands: tuple[Dims, ...]
    results: Callable[..., Sequence[Result]]
    reference: Callable[..., Sequence[jax.Array]]
    attributes: tuple[str, ...]
    parallel: Callable[..., tuple[str, ...]]
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    platforms: tuple[str, ...] = ("cpu", "cuda")
    takes_kernel: Callable[..., bool] = lambda devices, avals, **_: True
    switch: Callable[[], str] = lambda: ""

    @property
    def target(self) -> str:
        return f"jax_tsq.{self.name}"

    def batch_rank(self, *avals) -> int:
        return len(avals[0].shape) - len(self.operands[0])

    def infer(self, *avals, **params) -> Sequence[Result]:
        rank = self.batch_rank(*avals)
        return self.results(*(aval.shape[rank:] for aval in avals), **params)


def define(op: Operation) -> Primitive:
    """Returns the primitive of an operation, with every rule registered."""
    primitive = Primitive(f"jax_tsq_{op.name}")
    primitive.multiple_results = True
    primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
    primitive.def_abstract_eval(functools.partial(_abstract_eval, op))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    ad.primitive_jvps[primitive] = functools.partial(_refuse_to_differentiate, op)
    meshes.require_devices_during_lowering(primitive)

    def row(leaf, platform=None):
        mlir.register_lowering(primitive, functools.partial(meshes.lower, op, primitive, leaf), platform=platform)

    row(functools.partial(_lower_reference, op))
    if "cpu" in op.platforms:
        row(functools.partial(_lower_native, op), "cpu")
    row(functools.partial(_lower_cuda, op), "cuda")
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
    raise NotImplementedError(
        f"{op.target} rounds its input to float8_e4m3fn and has no derivative. Call it inside a jax.custom_vjp whose "
        "backward pass says what the gradient is, as jax_tsq.grouped_linear does, or put jax.lax.stop_gradient around "
        "its arguments."
    )


def _lower_native(op: Operation, ctx, *operands, **params):
    attributes = {name: params[name] for name in op.attributes}
    return jax.ffi.ffi_lowering(op.target)(ctx, *operands, **attributes)


def _lower_reference(op: Operation, ctx, *operands, **params):
    return mlir.lower_fun(functools.partial(op.reference, **params), multiple_results=True)(ctx, *operands)


def _lower_cuda(op: Operation, ctx, *operands, **params):
    native = op.takes_kernel(meshes.devices(ctx), ctx.avals_in, **params)
    if native:
        ffi.check_cuda()
    leaf = _lower_native if native and ffi.HAS_CUDA else _lower_reference
    return leaf(op, ctx, *operands, **params)
