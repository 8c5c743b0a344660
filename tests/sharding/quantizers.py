"""The quantizers of a layer on meshes: rows, rows and columns, weights."""

import functools

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import layouts, mesh
from tests.mesh import KINDS, Call

CASES = mesh.Cases()
BOTH = ("e", "t")
(X,) = Call("rows").arrays


@CASES.add(kind=KINDS)
def joined_outputs_split(kind):
    """Arrays split along the dimension that joins them are gathered along it."""
    m, call = mesh.make_mesh(kind), Call("blocks_joined")
    communication = ["all-gather"] * 2 if m.shape["t"] > 1 else []
    call.check(m, dict(groups="e"), arguments=call.put(m, outputs="t", groups="e"), communication=communication)


@CASES.add(kind=KINDS)
def joined_outputs_in_shard_map(kind):
    """With outputs split inside shard_map, each device joins its own parts of the arrays."""
    m, call = mesh.make_mesh(kind), Call("blocks_joined")
    parts = [np.split(w, m.size, axis=2) for w in call.arrays[0]]
    results = [call.expect(own) for own in zip(*parts, strict=True)]
    expected = [np.concatenate(leaves, axis) for *leaves, axis in zip(*results, (2, 1, 2), strict=True)]
    specs = dict(in_specs=tuple(call.operand_specs(outputs=BOTH)), out_specs=call.specs(outputs=BOTH))
    function = jax.shard_map(call.function, mesh=m, **specs)
    mesh.check(function, call.put(m, outputs=BOTH), expected, mesh=m, specs=specs["out_specs"])


@CASES.add(kind=KINDS, operation=("rows", "dual", "blocks"))
def quantizer_shards_cut_a_block(kind, operation):
    """Features whose shards are no whole blocks: right bytes, and one gather of what is quantized."""
    m, call = mesh.make_mesh(kind), Call(operation, features=640)
    arguments = call.put(m, features="t")
    compiled = jax.jit(call.function).lower(*arguments).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    whole = [line for line in moved if "bf16" in line or "f8e4m3" in line or ",640" in line or ",320" in line]
    assert len(whole) <= 1 and {*mesh.collectives(compiled)} <= {"all-gather"}, moved
    call.assert_right(compiled(*arguments))


# --- Dead results, and what lies between two calls -------------------------------------------------------------------


@CASES.add(kind=KINDS, part=(0, 1), features=("t", BOTH))
def dead_results(kind, part, features):
    """Only the part that is used runs, on meshes and inside shard_map."""
    m, name, call = mesh.make_mesh(kind), ("rows", "ragged")[part], Call("dual")
    specs = call.specs(features=features)[part]

    def function(x, sizes):
        return call.function(x, sizes)[part]

    in_specs = tuple(call.operand_specs(features=features))
    mapped = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=specs, check_vma=False)
    arguments = call.put(m, features=features)
    for program in (function, mapped):
        mesh.check(program, arguments, call.expected[part], mesh=m, specs=specs)
        assert layouts.calls(jax.jit(program).lower(*arguments).compile()) == [name]


@CASES.add(kind=KINDS)
def dead_results_keep_their_types(kind):
    """Where shards cut blocks, columns alone could stay split: with dead rows they still lie as their types say."""
    m, call = mesh.make_mesh(kind), Call("dual", features=640)

    def columns(x, sizes):
        return call.function(x, sizes)[1]

    arguments = call.put(m, features="t")
    results = mesh.check(columns, arguments, call.expected[1], mesh=m, communication=None)
    if kind == "explicit" and m.size > 1:
        compiled = jax.jit(columns).lower(*arguments).compile()
        assert layouts.calls(compiled) == ["dual"]
        for leaf, sharding in zip(results, compiled.output_shardings, strict=True):
            assert sharding.is_equivalent_to(NamedSharding(m, jax.typeof(leaf).sharding.spec), leaf.ndim)


@CASES.add(kind=KINDS, axes=((None, "t"), ("e", "t"), (BOTH, None)), way=("mesh", "shard_map"))
def scales_are_not_copied(kind, axes, way):
    """Between two native calls nothing moves: row scales lie as their consumer wants them."""
    m, function = mesh.make_mesh(kind), layouts.quantize_and_consume
    if way == "shard_map":
        function = jax.shard_map(function, mesh=m, in_specs=P(*axes), out_specs=P(*axes))
    layouts.check_no_copies(jax.jit(lambda x: function(x)).lower(mesh.put(X, m, *axes)).compile())


@CASES.add(kind=KINDS, way=("mesh", "shard_map"))
def scales_of_dual_are_not_copied(kind, way):
    """The same for rows that come with columns."""
    m, function, call, where = mesh.make_mesh(kind), layouts.quantize_both_and_consume, Call("dual"), dict(features="t")
    if way == "shard_map":
        in_specs, (rows, columns) = tuple(call.operand_specs(**where)), call.specs(**where)
        specs = dict(in_specs=in_specs, out_specs=(rows.values, columns))
        function = jax.shard_map(function, mesh=m, check_vma=False, **specs)
    layouts.check_no_copies(jax.jit(lambda *a: function(*a)).lower(*call.put(m, **where)).compile(), "dual")


@CASES.add(kind=("explicit", "auto"), way=("mesh", "shard_map"))
def exported_scales_are_not_copied(kind, way):
    """The same in a program that was written and read back."""
    if (kind, way) == ("auto", "mesh"):  # JAX does not export it
        return
    m, function = mesh.make_mesh(kind), layouts.quantize_and_consume
    if way == "shard_map":
        function = jax.shard_map(function, mesh=m, in_specs=P("e", "t"), out_specs=P("e", "t"))
    exemptions = [jax.export.DisabledSafetyCheck.custom_call(f"jax_tsq.{name}") for name in ("rows", "toy")]
    x = mesh.put(X, m, "e", "t")
    exported = jax.export.export(jax.jit(lambda x: function(x)), disabled_checks=exemptions)(x)
    loaded = jax.export.deserialize(exported.serialize())
    layouts.check_no_copies(jax.jit(loaded.call).lower(x).compile())


@CASES.add(kind=KINDS)
def gathers_one_byte_a_weight(kind):
    """Weights split for FSDP are quantized in their shards: what is gathered for the product is FP8 and scales."""
    m, call = mesh.make_mesh(kind), Call("blocks")

    def gathered(w):
        quantized = jax_tsq.quantize_blocks(w)
        whole = NamedSharding(m, P())
        move = jax.sharding.reshard if kind == "explicit" else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda leaf: move(leaf, whole), quantized)

    if kind == "mixed":  # JAX has one function for each type of axes
        gathered = functools.partial(jax.jit(jax_tsq.quantize_blocks, out_shardings=NamedSharding(m, P())))
    arguments = call.put(m, features="t")
    compiled = jax.jit(gathered).lower(*arguments).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    assert m.shape["t"] == 1 or len(moved) == 3, moved
    assert not any("f32[4,512" in line for line in moved), moved
    call.assert_right(compiled(*arguments))


if __name__ == "__main__":
    CASES.main()
