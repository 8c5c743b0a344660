"""Shardings of arrays, outside `jax.shard_map`: meshes whose axes are Auto, Explicit, or one of each."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh
from tests.mesh import COUNTS, KINDS, SIZES, Call, check, put, split
from tests.operations import EXAMPLES, OF_EACH_KIND

CASES = mesh.Cases()

EVERY = tuple(EXAMPLES)
# One of the results of each, by its place among the leaves.
RESULTS = [("split", 0), ("ragged_fp8", 0), ("rows", 0), ("rows", 1), ("blocks", 0), ("blocks", 1), ("blocks", 2)]


def layouts(parallel):
    """Name -> mesh axes: none, each dimension on one axis and on two, two dimensions, and experts in front."""
    named = {"replicated": {}, "experts": dict(batch=("e",)), "experts_over_two_axes": dict(batch=(("e", "t"),))}
    named |= {dim: {dim: "t"} for dim in parallel}
    named |= {f"{dim}_over_two_axes": {dim: ("e", "t")} for dim, devices in parallel.items() if devices == 8}
    named |= {f"experts_and_{dim}": {"batch": ("e",), dim: "t"} for dim in list(parallel)[:1]}
    return named | {f"{a}_and_{b}": {a: "e", b: "t"} for a, b in itertools.permutations(parallel, 2)}


LAYOUTS = {
    f"{name}-{layout}": (name, axes) for name, row in EXAMPLES.items() for layout, axes in layouts(row.parallel).items()
}
GATHERED = {f"{name}-{dim}": (name, dim) for name, row in EXAMPLES.items() for dim in row.gathered}


def of_each_kind(cases):
    """Those for a mixed mesh, where each axis is what it is on an Auto or on an Explicit one."""
    return [case for case, (name, _) in cases.items() if name in OF_EACH_KIND]


# Layouts of a mesh of one kind: of `OF_EACH_KIND` all, of the others those with one dimension on one axis.
SIMPLE = [
    case
    for case, (name, axes) in LAYOUTS.items()
    if name in OF_EACH_KIND or (len(axes) < 2 and not any(isinstance(axis, tuple) for axis in axes.values()))
]


def call_on(axes, name):
    """A call with as many experts in front as the axes need that are theirs."""
    return Call(name, {None: (), "e": (2,), ("e", "t"): (8,)}[axes.get("batch", [None])[0]])


@CASES.add(kind=("mixed",), layout=of_each_kind(LAYOUTS))
@CASES.add(kind=("auto", "explicit"), layout=SIMPLE)
def stays_split(kind, layout):
    """Features, experts or both split: no communication, and the results are split alike; of one split eager, too."""
    name, axes = LAYOUTS[layout]
    call_on(axes, name).check(mesh.make_mesh(kind), axes, eager=len(axes) == 1 and name in OF_EACH_KIND)


@CASES.add(layout=[name for name in LAYOUTS if name.endswith(("-features", "-outputs", "-experts_and_features"))])
def output_sharding_only(layout):
    """Replicated arguments, results asked for in shards: each device makes its own, without communication."""
    m, (name, axes) = mesh.make_mesh("auto"), LAYOUTS[layout]
    call = call_on(axes, name)
    shardings = jax.tree.map(lambda s: NamedSharding(m, s), call.specs(**axes))
    call.check(m, axes, arguments=call.put(m, batch=(None,) * len(axes.get("batch", ()))), out_shardings=shardings)


@CASES.add(result=[f"{operation}-{leaf}" for operation, leaf in RESULTS])
def constraint_on_a_result(result):
    """A sharding constraint on one result inside the program is enough."""
    operation, leaf = result.split("-")
    m, call, leaf, where = mesh.make_mesh("auto"), Call(operation), int(leaf), dict(features="t")
    sharding = NamedSharding(m, jax.tree.leaves(call.specs(**where))[leaf])

    def function(*operands):
        leaves, tree = jax.tree.flatten(call.function(*operands))
        leaves[leaf] = jax.lax.with_sharding_constraint(leaves[leaf], sharding)
        return jax.tree.unflatten(tree, leaves)

    call.check(m, where, function=function, arguments=call.put(m))


@CASES.add(kind=KINDS)
def input_sharding_only(kind):
    """numpy arguments with in_shardings."""
    m, call = mesh.make_mesh(kind), Call("split")
    call.check(m, dict(features="t"), arguments=call.arrays, in_shardings=NamedSharding(m, P(None, "t")))


@CASES.add(kind=KINDS)
def ahead_of_time(kind):
    """Lowered for shapes with shardings; the types and the compiled program know the results' shardings."""
    m, (x,) = mesh.make_mesh(kind), Call("split").arrays
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(m, P(None, "t")))
    compiled = jax.jit(split).lower(shape).compile()
    for sharding, count in zip(compiled.output_shardings.outs, COUNTS, strict=True):
        assert not count or sharding.is_equivalent_to(NamedSharding(m, P("t")), 2)
    if kind == "explicit":
        outs = jax.eval_shape(split, shape).outs
        assert all(tuple(out.sharding.spec) == ("t", None) for out in outs), outs


# --- Communication that the mathematics needs ------------------------------------------------------------------------


@CASES.add(kind=("mixed",), gathered=of_each_kind(GATHERED))
@CASES.add(kind=("auto", "explicit"), gathered=GATHERED)
def one_gather(kind, gathered):
    """Tokens split: one gather of x, or of its values and of its scales, and replicated results."""
    m, (name, dim) = mesh.make_mesh(kind), GATHERED[gathered]
    call = Call(name)
    where = {"only": next(iter(call.operands)), dim: "t"}
    split = sum("t" in spec for spec in jax.tree.leaves(call.operand_specs(**where)))
    call.check(m, arguments=call.put(m, **where), communication=["all-gather"] * split)


@CASES.add(kind=KINDS)
def tokens_and_features_split(kind):
    """Tokens and features split: one gather over the tokens' axis; features stay split."""
    m, call = mesh.make_mesh(kind), Call("split")
    needed = ["all-gather"] if m.shape["e"] > 1 else []
    call.check(m, dict(features="t"), arguments=call.put(m, tokens="e", features="t"), communication=needed)


@CASES.add(kind=KINDS)
def group_sizes_split(kind):
    """Group sizes split: a gather of E numbers; x and its results stay where they are."""
    m, call = mesh.make_mesh(kind), Call("ragged")
    arguments = call.put(m, features="t", groups="t")
    results = call.check(m, arguments=arguments, specs=None, communication=["all-gather"])
    assert results.values.sharding.is_equivalent_to(NamedSharding(m, P("t")), 2)


def moved(compiled):
    """The communicating instructions of a compiled program."""
    return [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]


@CASES.add(kind=KINDS, where=("tokens", "other_axis"))
def scales_split_elsewhere(kind, where):
    """Scales split otherwise than x: they move, x does not."""
    m, call = mesh.make_mesh(kind), Call("split_fp8")
    elsewhere = {"tokens": dict(tokens="t"), "other_axis": dict(features="e")}[where]
    arguments = [call.put(m, features="t")[0], call.put(m, **elsewhere)[1]]
    call.check(m, dict(features="t"), arguments=arguments, communication=None)
    lines = moved(jax.jit(call.function).lower(*arguments).compile())
    assert all("f8e4m3" not in line for line in lines), lines


@CASES.add(operand=("scales", "group_sizes"))
def no_split_that_must_be_undone(operand):
    """Tokens or groups split in one operand do not spread to the others, which would have to be gathered in turn."""
    m, call = mesh.make_mesh("auto"), Call("split_fp8" if operand == "scales" else "ragged")
    x, other = call.arrays

    def function(x, other):
        computed = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(other)
        return call.function(*computed)

    compiled = jax.jit(function).lower(put(x, m), put(other, m, "t")).compile()
    lines = moved(compiled)
    assert len(lines) == (1 if m.shape["t"] > 1 else 0), lines
    assert all(str(x.dtype).replace("loat8_e4m3fn", "8e4m3fn") not in line for line in lines), lines
    call.assert_right(compiled(put(x, m), put(other, m, "t")))


@CASES.add(kind=KINDS)
def scales_replicated(kind):
    """Replicated scales beside split features: each device takes its part."""
    m, call = mesh.make_mesh(kind), Call("split_fp8")
    call.check(m, dict(features="t"), arguments=call.put(m, only="x", features="t"))


@CASES.add(kind=KINDS)
def scales_alone_split(kind):
    """Replicated x: the scales are gathered, the results replicated."""
    m, call = mesh.make_mesh(kind), Call("split_fp8")
    arguments = call.put(m, only="input_scales", features="t")
    call.check(m, arguments=arguments, specs=None, communication=["all-gather"])


@CASES.add(kind=KINDS, operation=("split_fp8", "ragged_fp8"))
def shards_cut_a_block(kind, operation):
    """fp8 features whose shards are not whole blocks of 128: one gather of x, and right bytes."""
    m, call = mesh.make_mesh(kind), Call(operation, features=640)
    needed = ["all-gather"] if m.shape["t"] > 1 else []
    call.check(m, arguments=call.put(m, only="x", features="t"), specs=None, communication=needed)


@CASES.add(features=(256, 384, 640, 1024), axes=("t", ("e", "t")))
def computed_scales(features, axes):
    """x quantized by rows in the same program: the partitioner splits the scales, perhaps over a part of a mesh axis.

    Where no shard cuts a block there is no communication.
    """
    m, (x,) = mesh.make_mesh("auto"), Call("split", features=features).arrays
    devices = m.shape["t"] if axes == "t" else m.size

    def function(x):
        rows = jax_tsq.quantize_rows(x, pow_2_scales=True)
        return split(rows.values, rows.scales)

    expected, communication = jax.jit(function)(x), None if features % (128 * devices) else ()
    check(function, [put(x, m, None, axes)], expected, mesh=m, communication=communication, calls=2)


@CASES.add(kind=KINDS)
def shards_of_64_features(kind):
    """bfloat16 features may be cut anywhere."""
    Call("split", features=512).check(mesh.make_mesh(kind), dict(features=("e", "t")))


@CASES.add(operation=EVERY, features=(1001,))
@CASES.add(operation=OF_EACH_KIND, features=(5,))
@CASES.add(operation=("split", "split_fp8", "ragged", "ragged_fp8"), features=(1004,))
def uneven_features(operation, features):
    """Features that the mesh does not divide: right bytes."""
    m, call = mesh.make_mesh("auto"), Call(operation, features=features)

    def function(*operands):
        specs = call.operand_specs(only=next(iter(call.operands)), features=("e", "t"))
        constrain = lambda a, spec: jax.lax.with_sharding_constraint(a, NamedSharding(m, spec))  # noqa: E731
        return call.function(*jax.tree.map(constrain, list(operands), specs))

    call.check(m, function=function, specs=None, communication=None)


@CASES.add(experts=(3, 5))
def uneven_experts(experts):
    """Experts that the mesh does not divide: right bytes."""
    m, call = mesh.make_mesh("auto"), Call("split", (experts,))

    def function(x):
        return call.function(jax.lax.with_sharding_constraint(x, NamedSharding(m, P("t", None, "e"))))

    call.check(m, function=function, arguments=[put(call.arrays[0], m)], specs=None, communication=None)


# --- Around the call -------------------------------------------------------------------------------------------------


@CASES.add(kind=KINDS)
def scan(kind):
    """A scan whose body quantizes."""

    def function(x):
        return jax.lax.scan(lambda carry, x: (carry, split(x)), 0, x)[1]

    Call("split", (2,)).check(mesh.make_mesh(kind), dict(batch=(None,), features="t"), function=function)


@CASES.add(kind=KINDS)
def remat_of_custom_vjp(kind):
    """Quantized residuals of a custom_vjp under jax.checkpoint: split features need no communication."""
    m, call = mesh.make_mesh(kind), Call("split")
    (x,) = call.arrays
    expected = 1 + np.broadcast_to(call.expected.scales[0][0].astype(x.dtype), x.shape)
    check(mesh.gradient_with_quantized_residuals, [put(x, m, None, "t")], expected, mesh=m, specs=P(None, "t"))


@CASES.add(kind=("auto", "explicit"))
def donated(kind):
    """A donated x."""
    call = Call("split")
    function = jax.jit(lambda x: (x + 1, split(x)), donate_argnums=0)
    call.assert_right(function(*call.put(mesh.make_mesh(kind), features="t"))[1])


@CASES.add(kind=KINDS)
def empty(kind):
    """No features, no tokens, no groups, no experts: right shapes and dtypes."""
    m, options = mesh.make_mesh(kind), dict(specs=None, communication=None)
    for call in (Call("split", features=0), Call("split", counts=(0, 0))):
        call.check(m, dict(features="t"), calls=0, **options)
    no_tokens = Call("ragged", counts=(0,), sizes=((0, 0),))
    jax.tree.map(np.asarray, jax.jit(no_tokens.function)(no_tokens.put(m, features="t")[0], put(SIZES, m)))
    Call("ragged", sizes=((),)).check(m, dict(features="t"), **options)
    x = Call("split", (1,)).arrays[0][:0]
    results = jax.jit(jax.vmap(split))(put(x, m, "e", None, "t"))
    assert results.outs[2].shape == (0, mesh.FEATURES, COUNTS[2])


@CASES.add(kind=("auto",), experts=(512,))
@CASES.add(kind=KINDS, experts=(256,))
def many_experts(kind, experts):
    """One result for each of many experts: no communication; 256 compile within 2 s."""
    call = Call("split", counts=(1,) * experts)
    arguments = call.put(mesh.make_mesh(kind), features="t")
    seconds, compiled = mesh.compile_seconds(call.function, *arguments)
    assert mesh.collectives(compiled) == []
    assert mesh.custom_calls(compiled) == 1
    assert seconds < 2 or experts > 256, seconds
    call.assert_right(compiled(*arguments))


@CASES.add(kind=KINDS)
def quantized_rows(kind):
    """Rows quantized where they lie, and what comes of them split in turn: no communication."""
    m, rows, call = mesh.make_mesh(kind), Call("rows"), Call("split_fp8")
    call.check(
        m,
        dict(features="t"),
        function=lambda x: call.function(*rows.function(x)),
        arguments=rows.put(m, features="t"),
        expected=call.expect(*rows.expected),
        calls=call.native_calls() + rows.native_calls(),
    )


@CASES.add(kind=KINDS, operation=("split", "ragged"))
def dequantize(kind, operation):
    """Values and scales turned back where they lie, shorter blocks too: no communication."""
    call = Call(operation)

    def function(*operands):
        return jax_tsq.dequantize(call.function(*operands))

    expected = function(*map(jnp.asarray, call.arrays))
    m = mesh.make_mesh(kind)
    results = check(function, call.put(m, features="t"), expected, mesh=m, specs=P(None, "t"))
    assert all(leaf.shape[1] == mesh.FEATURES for leaf in jax.tree.leaves(results))


# --- Types that Explicit meshes know ---------------------------------------------------------------------------------


def with_first_of_type(call, m, spec):
    """The arguments on a mesh, the first array as a shape with this PartitionSpec."""
    leaves, tree = jax.tree.flatten(call.put(m))
    first = jax.ShapeDtypeStruct(leaves[0].shape, leaves[0].dtype, sharding=NamedSharding(m, spec))
    return jax.tree.unflatten(tree, [first, *leaves[1:]])


@CASES.add(operation=EVERY)
def unreduced_is_refused(operation):
    """Partial sums are not quantized as if they were sums."""
    m, call = mesh.make_mesh("explicit"), Call(operation)
    arguments = with_first_of_type(call, m, P(unreduced={"t"}))
    with pytest.raises(TypeError, match=r"unreduced.*jax\.sharding\.reshard"):
        jax.jit(call.function).trace(*arguments)


@CASES.add(operation=EVERY)
def reduced_is_replicated(operation):
    """`reduced` operands, which say what a gradient would be, count as replicated."""
    m, call = mesh.make_mesh("explicit"), Call(operation)
    compiled = jax.jit(call.function).lower(*with_first_of_type(call, m, P(reduced={"t"}))).compile()
    assert mesh.collectives(compiled) == []
    assert mesh.custom_calls(compiled) == call.native_calls()


if __name__ == "__main__":
    CASES.main()
