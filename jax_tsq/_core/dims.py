"""The named dimensions of an operation's arrays: which of them may lie on mesh axes, and on which."""

import math

from jax.sharding import PartitionSpec as P

from jax_tsq._core.numerics import BLOCK


def axes_of(entry) -> tuple:
    """The mesh axes of an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def holds_whole_blocks(size: int, entry, mesh_shape) -> bool:
    """Whether every shard of a dimension, split as an entry of a PartitionSpec says, is made of whole blocks of 128."""
    return size % (BLOCK * math.prod(mesh_shape[axis] for axis in axes_of(entry))) == 0


def batch_dims(op, avals) -> tuple[str, ...]:
    """Names of the batch dimensions."""
    return tuple(f"batch{i}" for i in range(op.batch_rank(*avals)))


def operand_dims(op, avals, params) -> list[tuple[str, ...]]:
    """Dimensions of each operand that is there, batch dimensions included."""
    return [batch_dims(op, avals) + dims for dims in op.operand_dims(**params)[: len(avals)]]


def result_dims(op, avals, params) -> list[tuple[str, ...]]:
    """Dimensions of each result, batch dimensions included."""
    return [batch_dims(op, avals) + result.dims for result in op.infer(*avals, **params)]


def assign(op, avals, specs, mesh_shape, params) -> dict:
    """Chooses the mesh axes of every dimension that can stay split; the others are absent, so replicated.

    The first operand with a split dimension decides. A mesh axis is used once. A dimension counted in blocks of 128 by
    an operand or a result stays split only if every shard holds whole blocks, and its count is split alike.
    """
    operands = operand_dims(op, avals, params)
    arrays = [*operands, *result_dims(op, avals, params)]
    counted = {dim: count for dims in arrays for count, dim in op.blocks.items() if count in dims}
    splittable = _splittable(op, avals, params)
    chosen, used = {}, set()
    for dims, spec, aval in zip(operands, specs, avals, strict=True):
        for dim, entry, size in zip(dims, spec, aval.shape, strict=False):
            axes = axes_of(entry)
            if dim not in splittable or dim in chosen or not axes or used & {*axes}:
                continue
            if dim in counted and not holds_whole_blocks(size, entry, mesh_shape):
                continue
            chosen[dim] = axes
            used |= {*axes}
    return chosen | {count: chosen[dim] for dim, count in counted.items() if dim in chosen}


def _splittable(op, avals, params) -> set[str]:
    """The dimensions that a mesh may split without any communication."""
    return {*batch_dims(op, avals), *op.parallel(*op.shapes(*avals), **params)}


def specs_of(arrays, assignment) -> list[P]:
    """The PartitionSpec of each array, given as its dimensions."""
    return [P(*(assignment.get(dim) for dim in dims)) for dims in arrays]


def sharding_rule(op, avals, params) -> str:
    """Einsum-like rule for Shardy. A dimension that must not be split has a name of its own in every array.

    So has a count of blocks in an operand, whose sharding `assign` chooses; in a result it is split as what it counts.
    """
    shared = _splittable(op, avals, params)

    def side(name, arrays):
        names = [[dim if dim in shared else f"{name}{i}_{dim}" for dim in dims] for i, dims in enumerate(arrays)]
        return ", ".join(map(" ".join, names))

    results = [[op.blocks.get(dim, dim) for dim in dims] for dims in result_dims(op, avals, params)]
    return f"{side('operand', operand_dims(op, avals, params))} -> {side('result', results)}"
