"""The quantizers of a layer on meshes: rows, rows and columns, weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import layouts, mesh, spec
from tests.cases import bfloat16, weights
from tests.mesh import KINDS, SIZES, check, data, put

CASES = mesh.Cases()
BOTH = ("e", "t")
# What several arrays are joined to is one array.
GATE, UP = (weights(seed, np.float32, 4, 1024, n, ["normal"]) for seed, n in ((0, 512), (1, 256)))


def joined(*parts):
    return jax_tsq.quantize_blocks(parts)


class Operation:
    """A function with data, and the dimensions of its operands and results by letters.

    m tokens, k features, n outputs, e experts, g groups, p padded tokens; b a mapped dimension.
    """

    def __init__(self, function, arrays, expected, operands, results):
        self.function, self.arrays, self.expected = function, arrays, expected
        self.operands, self.results = operands.split(), results.split()

    def batch(self, size):
        """The same for `size` rolled copies of the operands."""
        arrays = [[np.roll(a, i, axis=0) for i in range(size)] for a in self.arrays]
        stacked = [np.stack(copies) for copies in arrays]

        def expected(*operands):
            results = [self.expected(*one) for one in zip(*operands, strict=True)]
            return [np.stack(leaves) for leaves in zip(*results, strict=True)]

        dims = [" ".join("b" + dims for dims in sides) for sides in (self.operands, self.results)]
        return Operation(jax.vmap(self.function), stacked, expected, *dims)

    def put(self, grid, axes):
        return [put(a, grid, *specs(dims, axes)) for a, dims in zip(self.arrays, self.operands, strict=True)]


def specs(dims, axes):
    return P(*(axes.get(dim) for dim in dims))


def columns_only(x, sizes):
    return jax_tsq.ragged_quantize(x, sizes)[1]


X = data()[0]
OPERATIONS = {
    "rows": Operation(jax_tsq.quantize_rows, [X], spec.rows, "mk", "mk mk"),
    "rows_of_groups": Operation(
        jax_tsq.quantize_rows, [X, SIZES], lambda x, sizes: spec.rows(x, False, sizes), "mk g", "mk mk"
    ),
    "dual": Operation(jax_tsq.ragged_quantize, [X, SIZES], spec.dual, "mk g", "mk mk kp pk g"),
    "columns_of_dual": Operation(columns_only, [X, SIZES], spec.ragged, "mk g", "kp pk g"),
    "blocks": Operation(jax_tsq.quantize_blocks, [GATE], lambda w: spec.blocks([w]), "ekn", "ekn enk ekn"),
    "blocks_bf16": Operation(
        jax_tsq.quantize_blocks, [UP.astype(bfloat16)], lambda w: spec.blocks([w]), "ekn", "ekn enk ekn"
    ),
    "joined": Operation(joined, [GATE, UP], lambda *parts: spec.blocks(parts), "ekn ekn", "ekn enk ekn"),
}
TOKENS_FREE, FEATURES = ["rows"], ["rows", "rows_of_groups", "dual", "columns_of_dual"]
WEIGHTS = ["blocks", "blocks_bf16", "joined"]
# Where dimensions lie, and for which operations that costs nothing.
LAYOUTS = {
    "features": (dict(k="t"), [*FEATURES, *WEIGHTS]),
    "features_over_two_axes": (dict(k=BOTH), FEATURES),
    "tokens": (dict(m="t"), TOKENS_FREE),
    "tokens_and_features": (dict(m="e", k="t"), TOKENS_FREE),
    "tokens_over_two_axes": (dict(m=BOTH), TOKENS_FREE),
    "mapped": (dict(b="e"), [*FEATURES, "joined"]),
    "mapped_and_features": (dict(b="e", k="t"), [*FEATURES, "blocks"]),
    "experts": (dict(e="t"), WEIGHTS),
    "experts_and_features": (dict(e="e", k="t"), WEIGHTS),
    "outputs": (dict(n="t"), ["blocks"]),
    "features_and_outputs": (dict(k="t", n="e"), ["blocks", "blocks_bf16"]),
}
SPLIT = {f"{layout}-{operation}": (axes, operation) for layout, (axes, names) in LAYOUTS.items() for operation in names}


@CASES.add(kind=KINDS, case=SPLIT)
def quantizer_stays_split(kind, case):
    """Shards are quantized where they lie, results are split alike; jitted and eager."""
    m, (axes, name) = mesh.make_mesh(kind), SPLIT[case]
    operation = OPERATIONS[name].batch(2) if "b" in axes else OPERATIONS[name]
    results = [specs(dims, axes) for dims in operation.results]
    expected = operation.expected(*operation.arrays)
    check(operation.function, operation.put(m, axes), expected, mesh=m, specs=results, eager=True)


@CASES.add(operation=("rows", "blocks"), result=(0, 1, 2))
def quantizer_output_sharding_only(operation, result):
    """Replicated operands and one result asked for in shards: each device makes its own part."""
    m, operation = mesh.make_mesh("auto"), OPERATIONS[operation]
    if result >= len(operation.results):
        return

    def function(*operands):
        leaves = list(operation.function(*operands))
        sharding = NamedSharding(m, specs(operation.results[result], dict(k="t")))
        leaves[result] = jax.lax.with_sharding_constraint(leaves[result], sharding)
        return leaves

    results = [specs(dims, dict(k="t")) for dims in operation.results]
    check(function, operation.put(m, {}), operation.expected(*operation.arrays), mesh=m, specs=results)


# --- Communication that the mathematics needs ------------------------------------------------------------------------


@CASES.add(kind=KINDS, operation=("rows_of_groups", "dual"))
def tokens_of_groups_split(kind, operation):
    """With group sizes, tokens are gathered: which of them are in use, the sizes of all tell."""
    m, operation = mesh.make_mesh(kind), OPERATIONS[operation]
    expected = operation.expected(*operation.arrays)
    check(operation.function, operation.put(m, dict(m="t")), expected, mesh=m, communication=["all-gather"])


@CASES.add(kind=KINDS)
def joined_outputs_split(kind):
    """Arrays split along the dimension that joins them are gathered along it."""
    m, operation = mesh.make_mesh(kind), OPERATIONS["joined"]
    arguments, expected = operation.put(m, dict(n="t", e="e")), operation.expected(*operation.arrays)
    results = [specs(dims, dict(e="e")) for dims in operation.results]
    communication = ["all-gather"] * 2 if m.shape["t"] > 1 else []
    check(joined, arguments, expected, mesh=m, specs=results, communication=communication)


@CASES.add(kind=KINDS, operation=("rows", "dual", "blocks"))
def quantizer_shards_cut_a_block(kind, operation):
    """Features whose shards are no whole blocks: right bytes, and one gather of what is quantized."""
    m, operation = mesh.make_mesh(kind), OPERATIONS[operation]
    axis = operation.operands[0].index("k")
    arrays = [np.take(operation.arrays[0], range(640), axis), *operation.arrays[1:]]
    cut = Operation(operation.function, arrays, operation.expected, " ".join(operation.operands), "")
    arguments, expected = cut.put(m, dict(k="t")), cut.expected(*arrays)
    compiled = jax.jit(cut.function).lower(*arguments).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    whole = [line for line in moved if "bf16" in line or "f8e4m3" in line or ",640" in line]
    assert len(whole) <= 1 and {*mesh.collectives(compiled)} <= {"all-gather"}, moved
    mesh.assert_same_bytes(jax.tree.leaves(compiled(*arguments)), list(expected))


@CASES.add(kind=KINDS, operation=("rows", "blocks"), features=(1001, 5))
def quantizer_uneven_features(kind, operation, features):
    """Features that the mesh does not divide: right bytes."""
    m, operation = mesh.make_mesh(kind), OPERATIONS[operation]
    array = np.take(operation.arrays[0], range(features), operation.operands[0].index("k"))

    def function(array):
        if kind == "auto":
            sharding = NamedSharding(m, specs(operation.operands[0], dict(k=BOTH)))
            array = jax.lax.with_sharding_constraint(array, sharding)
        return operation.function(array)

    check(function, [put(array, m)], operation.expected(array), mesh=m, communication=None)


# --- Inside shard_map ------------------------------------------------------------------------------------------------


@CASES.add(kind=KINDS, operation=OPERATIONS)
def quantizer_in_shard_map(kind, operation):
    """Each device quantizes what it holds, tokens, groups and outputs of its own."""
    m, operation = mesh.make_mesh(kind), OPERATIONS[operation]
    devices, shared = m.size, operation.operands[0] == "ekn"
    arrays = [np.concatenate([np.roll(a, i, axis=-1) for i in range(devices)], -1) for a in operation.arrays]
    if not shared:  # tokens, groups and with them padded tokens
        arrays = [np.concatenate([np.roll(a, i, axis=0) for i in range(devices)]) for a in operation.arrays]
    axes = dict(n=BOTH) if shared else dict(m=BOTH, g=BOTH, p=BOTH)
    parts = [np.split(a, devices, axis=-1 if shared else 0) for a in arrays]
    results = [operation.expected(*own) for own in zip(*parts, strict=True)]
    # On a mixed mesh JAX itself gathers one-dimensional results over the Auto axes.
    kept = [i for i, dims in enumerate(operation.results) if kind != "mixed" or len(dims) > 1]
    dims, results = [operation.results[i] for i in kept], [[leaves[i] for i in kept] for leaves in results]
    split_at = [next(i for i, dim in enumerate(d) if dim in axes) for d in dims]
    expected = [np.concatenate(leaves, axis) for leaves, axis in zip(zip(*results, strict=True), split_at, strict=True)]

    def function(*operands):
        leaves = jax.tree.leaves(operation.function(*operands))
        return tuple(leaves[i] for i in kept)

    options = dict(
        in_specs=tuple(specs(d, axes) for d in operation.operands), out_specs=tuple(specs(d, axes) for d in dims)
    )
    arguments = [put(a, m, *spec) for a, spec in zip(arrays, options["in_specs"], strict=True)]
    check(jax.shard_map(function, mesh=m, **options), arguments, expected, mesh=m)


DIFFERENCES = {
    "sizes_to_rows": lambda x, sizes: jax_tsq.quantize_rows(x, sizes).values,
    "sizes_to_row_scales": lambda x, sizes: jax_tsq.quantize_rows(x, sizes).scales,
    "sizes_to_dual_rows": lambda x, sizes: jax_tsq.ragged_quantize(x, sizes)[0].scales,
    "sizes_to_dual_columns": lambda x, sizes: jax_tsq.ragged_quantize(x, sizes)[1].values,
    "one_part_of_several": lambda x, sizes: joined(jnp.ones((1, 4, 4)), sizes[None, None] * jnp.ones((1, 4, 4)))[0],
}


@CASES.add(kind=KINDS, difference=DIFFERENCES)
def a_difference_between_devices_is_refused(kind, difference):
    """One operand the same on every device and another not: out_specs=P() is refused, as for a built-in."""
    m = mesh.make_mesh(kind)

    def differing(x, sizes):
        sizes = jax.lax.pcast(sizes, "e", to="varying")
        result = DIFFERENCES[difference](x, sizes)
        assert jax.typeof(result).manual_axis_type.varying == {"e"}, jax.typeof(result)
        return result

    hiding = jax.shard_map(differing, mesh=m, in_specs=(P(), P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(hiding).trace(X, SIZES)


@CASES.add(kind=KINDS, operation=("rows_of_groups", "dual", "joined"))
def quantizer_partially_manual(kind, operation):
    """Some axes manual, features left to JAX: right bytes, at most gathers."""
    m, operation = mesh.make_mesh(kind), OPERATIONS[operation].batch(2)
    mapped = P("e")
    function = jax.shard_map(operation.function, mesh=m, in_specs=mapped, out_specs=mapped, axis_names={"e"})
    arguments = operation.put(m, dict(b="e", k="t"))
    compiled = jax.jit(function).lower(*arguments).compile()
    assert {*mesh.collectives(compiled)} <= {"all-gather"}, compiled.as_text()
    assert mesh.custom_calls(compiled) == 1
    mesh.assert_same_bytes(jax.tree.leaves(compiled(*arguments)), list(operation.expected(*operation.arrays)))


# --- Dead results, and what lies between two calls -------------------------------------------------------------------


@CASES.add(kind=KINDS, part=(0, 1))
def dead_results(kind, part):
    """Only the part that is used runs, on meshes and inside shard_map."""
    m, name = mesh.make_mesh(kind), ("rows", "ragged")[part]
    arguments = [put(X, m, None, "t"), put(SIZES, m)]

    def function(x, sizes):
        return jax_tsq.ragged_quantize(x, sizes)[part]

    features = jax_tsq.RowQuantized(*[P(None, "t")] * 2) if part == 0 else mesh.ragged_specs((), "t")
    mapped = jax.shard_map(function, mesh=m, in_specs=(P(None, "t"), P()), out_specs=features, check_vma=False)
    for program in (function, mapped):
        compiled = jax.jit(program).lower(*arguments).compile()
        assert layouts.calls(compiled) == [name] and not mesh.collectives(compiled), compiled.as_text()


@CASES.add(kind=KINDS)
def dead_results_keep_their_types(kind):
    """Where shards cut blocks, columns alone could stay split: with dead rows they still lie as their types say."""
    m, x = mesh.make_mesh(kind), X[:, :640]
    arguments = [put(x, m, None, "t"), put(SIZES, m)]
    results = check(columns_only, arguments, spec.ragged(x, SIZES), mesh=m, communication=None)
    if kind == "explicit" and m.size > 1:
        compiled = jax.jit(columns_only).lower(*arguments).compile()
        assert layouts.calls(compiled) == ["dual"]
        for leaf, sharding in zip(results, compiled.output_shardings, strict=True):
            assert sharding.is_equivalent_to(NamedSharding(m, jax.typeof(leaf).sharding.spec), leaf.ndim)


@CASES.add(kind=KINDS, axes=((None, "t"), ("e", "t"), (BOTH, None)), way=("mesh", "shard_map"))
def scales_are_not_copied(kind, axes, way):
    """Between two native calls nothing moves: row scales lie as their consumer wants them."""
    m, function = mesh.make_mesh(kind), layouts.quantize_and_consume
    if way == "shard_map":
        function = jax.shard_map(function, mesh=m, in_specs=P(*axes), out_specs=P(*axes))
    layouts.check_no_copies(jax.jit(lambda x: function(x)).lower(put(X, m, *axes)).compile())


@CASES.add(kind=KINDS, way=("mesh", "shard_map"))
def scales_of_dual_are_not_copied(kind, way):
    """The same for rows that come with columns."""
    m, function = mesh.make_mesh(kind), layouts.quantize_both_and_consume
    if way == "shard_map":
        specs = (P(None, "t"), mesh.ragged_specs((), "t"))
        function = jax.shard_map(function, mesh=m, in_specs=(P(None, "t"), P()), out_specs=specs, check_vma=False)
    arguments = [put(X, m, None, "t"), put(SIZES, m)]
    layouts.check_no_copies(jax.jit(lambda *a: function(*a)).lower(*arguments).compile(), "dual")


@CASES.add(kind=("explicit", "auto"), way=("mesh", "shard_map"))
def exported_scales_are_not_copied(kind, way):
    """The same in a program that was written and read back."""
    if (kind, way) == ("auto", "mesh"):  # JAX does not export it
        return
    m, function = mesh.make_mesh(kind), layouts.quantize_and_consume
    if way == "shard_map":
        function = jax.shard_map(function, mesh=m, in_specs=P("e", "t"), out_specs=P("e", "t"))
    exemptions = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in ("rows", "toy")]
    x = put(X, m, "e", "t")
    exported = jax.export.export(jax.jit(lambda x: function(x)), disabled_checks=exemptions)(x)
    loaded = jax.export.deserialize(exported.serialize())
    layouts.check_no_copies(jax.jit(loaded.call).lower(x).compile())


@CASES.add(kind=("explicit", "auto"), operation=("rows_of_groups", "dual", "blocks"))
def quantizer_exports(kind, operation):
    """Written and read back, in a shard_map or on an Explicit mesh: the same types and bytes."""
    m, name, operation = mesh.make_mesh(kind), operation, OPERATIONS[operation]
    function, axes = operation.function, dict(k="t")
    if kind == "auto":
        shape = jax.eval_shape(function, *operation.arrays)
        leaves = [specs(dims, axes) for dims in operation.results]
        options = dict(in_specs=tuple(specs(d, axes) for d in operation.operands), check_vma=False)
        out_specs = jax.tree.unflatten(jax.tree.structure(shape), leaves)
        function = jax.shard_map(function, mesh=m, out_specs=out_specs, **options)
    target = {"rows_of_groups": "rows"}.get(name, name)
    exemptions = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{target}")]
    arguments = operation.put(m, axes)
    exported = jax.export.export(jax.jit(function), disabled_checks=exemptions)(*arguments)
    results = jax.jit(jax.export.deserialize(exported.serialize()).call)(*arguments)
    assert jax.tree.structure(results) == jax.tree.structure(jax.eval_shape(function, *arguments))
    mesh.assert_same_bytes(jax.tree.leaves(results), list(operation.expected(*operation.arrays)))


@CASES.add(kind=KINDS)
def gathers_one_byte_a_weight(kind):
    """Weights split for FSDP are quantized in their shards: what is gathered for the product is FP8 and scales."""
    m = mesh.make_mesh(kind)

    def gathered(w):
        quantized = jax_tsq.quantize_blocks(w)
        whole = NamedSharding(m, P())
        move = jax.sharding.reshard if kind == "explicit" else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda leaf: move(leaf, whole), quantized)

    if kind == "mixed":  # JAX has one function for each type of axes
        gathered = functools.partial(jax.jit(jax_tsq.quantize_blocks, out_shardings=NamedSharding(m, P())))
    argument = put(GATE, m, None, "t")
    compiled = jax.jit(gathered).lower(argument).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    assert m.shape["t"] == 1 or len(moved) == 3, moved
    assert not any("f32[4,1024" in line for line in moved), moved
    mesh.assert_same_bytes(jax.tree.leaves(compiled(argument)), list(spec.blocks([GATE])))


if __name__ == "__main__":
    CASES.main()
