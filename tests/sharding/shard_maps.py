"""Calls inside `jax.shard_map` and `jax.pmap`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh, spec
from tests.mesh import EXPERTS, KINDS, SIZES, Call, check, put, split
from tests.operations import EXAMPLES, OF_EACH_KIND

CASES = mesh.Cases()
BOTH = ("e", "t")
SPLITTABLE = tuple(name for name, row in EXAMPLES.items() if "features" in row.parallel)

# There JAX gathers around every shard_map that leaves some Explicit axes to another, even of a plain transpose.
GATHERS_EXPLICIT_AXES = jax.__version_info__ == (0, 10, 2)


def ragged(x, group_sizes, input_scales=None):
    return jax_tsq.ragged_transpose_quant(x, group_sizes, input_scales=input_scales)


def varying(x):
    """The mesh axes over which JAX takes an array inside shard_map to differ."""
    return jax.typeof(x).manual_axis_type.varying


def full_specs(call, batch=(), **axes):
    """in_specs and out_specs that split features and batch dimensions over manual axes."""
    axes = axes or dict(features=BOTH)
    # The padded sizes are typed after x, so as varying over the features' axes: the same on each.
    return tuple(call.operand_specs(batch, **axes)), call.specs(batch, **axes, padded_sizes=axes.get("features"))


def change_ragged(change, result):
    """A result, or its specs, with a change to each RaggedQuantized in it."""
    is_ragged = lambda part: isinstance(part, jax_tsq.RaggedQuantized)  # noqa: E731
    return jax.tree.map(lambda part: change(part) if is_ragged(part) else part, result, is_leaf=is_ragged)


def repeated_sizes(expected, times):
    """A result whose padded sizes come once from every device along the features."""

    def repeat(part):
        return part._replace(padded_sizes=np.concatenate([part.padded_sizes] * times, axis=-1))

    return change_ragged(repeat, expected)


def without_sizes_if_mixed(kind, function, *results):
    """Drops the padded sizes: on a mixed mesh JAX itself gathers such one-dimensional results over the Auto axes."""
    if kind != "mixed":
        return function, *results
    drop = functools.partial(change_ragged, lambda part: part[:2])
    return lambda *operands: drop(function(*operands)), *map(drop, results)


@CASES.add(kind=("explicit", "mixed"), operation=OF_EACH_KIND)
@CASES.add(kind=("auto",), operation=[name for name, row in EXAMPLES.items() if row.parallel])
def full(kind, operation):
    """All axes manual: the call is what it is on one device."""
    m, call = mesh.make_mesh(kind), Call(operation)
    (first, devices), *others = call.row.parallel.items()
    axes = {first: "e", others[0][0]: "t"} if others else {first: BOTH if devices == 8 else "t"}
    in_specs, out_specs = full_specs(call, **axes)
    expected = repeated_sizes(call.expected, m.size)
    function, out_specs, expected = without_sizes_if_mixed(kind, call.function, out_specs, expected)
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    # Older ones fail on empty results.
    eager = jax.__version_info__ >= (0, 12) or all(leaf.size for leaf in jax.tree.leaves(expected))
    call.check(m, axes, function=function, expected=expected, specs=out_specs, eager=eager)


@CASES.add(kind=KINDS, operation=("ragged", "ragged_fp8"))
def different_groups_on_each_device(kind, operation):
    """Group sizes of each device's own, x replicated or split over the other axis."""
    m, call = mesh.make_mesh(kind), Call(operation)
    x, _, *scales = call.arrays
    sizes = mesh.BATCH_SIZES[: m.shape["e"]]

    def function(x, sizes, *scales):
        result = call.function(x, sizes[0], *scales)
        assert all(varying(leaf) == {"e", "t"} for leaf in result)
        return result

    parts = [call.expect(x, one, *scales) for one in sizes]
    expected = jax_tsq.RaggedQuantized(
        np.concatenate([part.values for part in parts], 1),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.padded_sizes for part in parts for _ in range(m.shape["t"])]),
    )
    out_specs = jax_tsq.RaggedQuantized(P("t", "e"), P("e", "t"), P(BOTH))
    in_specs = (P(None, "t"), P("e"), *(P(None, "t") for _ in scales))
    function, out_specs, expected = without_sizes_if_mixed(kind, function, out_specs, expected)
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    arguments = [put(x, m, None, "t"), put(sizes, m, "e"), *(put(s, m, None, "t") for s in scales)]
    check(function, arguments, expected, mesh=m, specs=out_specs)


@CASES.add(kind=KINDS)
def different_tokens_on_each_device(kind):
    """Tokens of each device's own, the same group sizes: one call for each device, and no communication."""
    m, call = mesh.make_mesh(kind), Call("ragged", (len(jax.devices()),), sizes=(tuple(SIZES.tolist()),))
    x, sizes = call.arrays

    def function(x, sizes):
        return jax.tree.map(lambda leaf: leaf[None], ragged(x[0], sizes))

    function = jax.shard_map(function, mesh=m, in_specs=(P(BOTH), P()), out_specs=P(BOTH))
    call.check(m, dict(batch=(BOTH,)), function=function, arguments=[put(x, m, BOTH), put(sizes[0], m)])


@CASES.add(kind=KINDS, operation=OF_EACH_KIND)
def different_operands_on_each_device(kind, operation):
    """All operands each device's own, such as tokens and group sizes after an exchange of tokens."""
    m, call = mesh.make_mesh(kind), Call(operation, (len(jax.devices()),))

    def function(*operands):
        return jax.tree.map(lambda leaf: leaf[None], call.one(*jax.tree.map(lambda a: a[0], operands)))

    call.check(m, dict(batch=(BOTH,)), function=jax.shard_map(function, mesh=m, in_specs=P(BOTH), out_specs=P(BOTH)))


@CASES.add(kind=KINDS)
def nested(kind):
    """One shard_map inside another, which together make all axes manual."""
    m, call = mesh.make_mesh(kind), Call("ragged", (EXPERTS,))
    inner_specs = full_specs(call, (None,), features="t")

    def outer(x, sizes):
        inner = jax.shard_map(call.function, in_specs=inner_specs[0], out_specs=inner_specs[1], axis_names={"t"})
        result = inner(x, sizes)
        assert all("e" in varying(leaf) for leaf in result)
        return result

    function = jax.shard_map(outer, mesh=m, in_specs=(P("e"), P("e")), out_specs=P("e"), axis_names={"e"})
    expected = repeated_sizes(call.expected, m.shape["t"])
    communication = ["all-gather"] * 4 if kind == "explicit" and GATHERS_EXPLICIT_AXES else []
    where = dict(batch=("e",), features="t")
    call.check(m, where, function=function, expected=expected, specs=None, communication=communication)


@CASES.add(kind=KINDS)
def inside_scan(kind):
    """A scan over group sizes: the carry and the results keep their types."""
    m, call = mesh.make_mesh(kind), Call("ragged", (EXPERTS,))
    x, sizes = call.arrays

    def function(x, sizes):
        def body(carry, sizes):
            result = ragged(x, sizes)
            return carry + result.scales, result

        rows = jax_tsq.padded_tokens(len(x), sizes.shape[1]) // spec.BLOCK
        carry = jax.lax.pcast(jnp.zeros((rows, x.shape[1]), jnp.float32), BOTH, to="varying")
        return jax.lax.scan(body, carry, sizes)[1]

    in_specs, out_specs = full_specs(call, (None,))
    function = jax.shard_map(function, mesh=m, in_specs=(P(None, BOTH), in_specs[1]), out_specs=out_specs)
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *(call.expect(x[0], one) for one in sizes))
    arguments = [put(x[0], m, None, BOTH), put(sizes, m)]
    call.check(m, function=function, arguments=arguments, expected=repeated_sizes(expected, m.size), specs=None)


@CASES.add(kind=KINDS)
def inside_jit_and_cond(kind):
    """jit and cond inside shard_map."""
    call = Call("split")

    def function(x):
        return jax.lax.cond(x.astype(jnp.float32).sum() < jnp.inf, jax.jit(split), jax.jit(split), x)

    m, (in_specs, out_specs) = mesh.make_mesh(kind), full_specs(call)
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    arguments = call.put(m, features=BOTH)
    compiled = jax.jit(function).lower(*arguments).compile()
    assert mesh.collectives(compiled) == []
    call.assert_right(compiled(*arguments))


@CASES.add(kind=KINDS, mapped=("x", "both"))
def vmap_inside(kind, mapped):
    """vmap inside shard_map."""
    m, shared = mesh.make_mesh(kind), mapped == "x"
    call = Call("ragged", (EXPERTS,), **dict(sizes=(tuple(SIZES.tolist()),)) if shared else {})
    in_specs, out_specs = full_specs(call, ("e",), features="t")
    arguments = call.put(m, batch=("e",), features="t")
    if shared:
        in_specs, arguments = (in_specs[0], P()), [arguments[0], put(SIZES, m)]
    function = jax.vmap(ragged, in_axes=(0, None if shared else 0))
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    expected = repeated_sizes(call.expected, m.shape["t"])
    call.check(m, function=function, arguments=arguments, expected=expected, specs=out_specs)


@CASES.add(kind=("auto", "explicit"))
def vmap_outside(kind):
    """vmap of a shard_map."""
    m, call = mesh.make_mesh(kind), Call("split", (EXPERTS,))
    in_specs, out_specs = full_specs(Call("split"))
    function = jax.vmap(jax.shard_map(split, mesh=m, in_specs=in_specs, out_specs=out_specs))
    call.check(m, dict(batch=(None,), features=BOTH), function=function, specs=None)


@CASES.add(kind=KINDS)
def custom_vjp_under_remat(kind):
    """Quantized residuals of a custom_vjp, under jax.checkpoint inside shard_map."""
    m, call = mesh.make_mesh(kind), Call("split")
    (x,) = call.arrays
    function = jax.shard_map(
        mesh.gradient_with_quantized_residuals, mesh=m, in_specs=P(None, BOTH), out_specs=P(None, BOTH)
    )
    expected = 1 + np.broadcast_to(call.expected.scales[0][0].astype(x.dtype), x.shape)
    check(function, [put(x, m, None, BOTH)], expected, mesh=m, specs=P(None, BOTH))


@CASES.add(kind=KINDS)
def check_vma_off(kind):
    """shard_map without its check."""
    m, call, where = mesh.make_mesh(kind), Call("ragged"), dict(features=BOTH)
    specs = dict(in_specs=tuple(call.operand_specs(**where)), out_specs=call.specs(**where))
    function = jax.shard_map(ragged, mesh=m, check_vma=False, **specs)
    call.check(m, where, function=function)


# --- What out_specs may not hide -------------------------------------------------------------------------------------


# Group sizes of dy, since those of x count; and the orientation of w that the product does not read.
UNUSED = ["wgrad-5", "wgrad_accumulate-5", "matmul-2", "matmul_transposed-3"]
DIFFERENCES = [
    f"{name}-{i}" for name, row in EXAMPLES.items() for i in range(len(jax.tree.leaves(row.draw(mesh.SHAPE, 0))))
]


def check_difference(kind, function, leaves, i):
    """Leaf i of the arguments differs between devices: so do all results, and out_specs=P() is refused."""

    def differing(*leaves):
        leaves = [jax.lax.pcast(a, "e", to="varying") if j == i else a for j, a in enumerate(leaves)]
        result = function(*leaves)
        assert all(varying(leaf) == {"e"} for leaf in jax.tree.leaves(result)), result
        return result

    hiding = jax.shard_map(differing, mesh=mesh.make_mesh(kind), in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(hiding).trace(*leaves)


@CASES.add(kind=KINDS, difference=[name for name in DIFFERENCES if name not in UNUSED])
def a_difference_is_refused(kind, difference):
    """One array differs between devices, no other: out_specs=P() is refused, as for a built-in."""
    name, i = difference.split("-")
    leaves, tree = jax.tree.flatten((call := Call(name)).arrays)
    check_difference(kind, lambda *leaves: call.function(*jax.tree.unflatten(tree, leaves)), leaves, int(i))


@CASES.add(kind=KINDS, how=("built_in", "mapped"))
def a_difference_of_group_sizes_is_refused(kind, how):
    """The same of a built-in function, and under vmap."""
    built_in = lambda x, sizes: x * sizes[0].astype(x.dtype)  # noqa: E731
    mapped = lambda x, sizes: jax.vmap(ragged, (0, None))(x[None], sizes)  # noqa: E731
    check_difference(kind, {"built_in": built_in, "mapped": mapped}[how], Call("ragged").arrays, 1)


@CASES.add(kind=KINDS)
def sameness_is_accepted(kind):
    """Operands that are the same on every device give results that are."""
    m = mesh.make_mesh(kind)
    Call("ragged").check(m, function=jax.shard_map(ragged, mesh=m, in_specs=(P(), P()), out_specs=P()))


@CASES.add()
def unreduced_is_refused():
    """Partial sums inside shard_map are not quantized as if they were sums."""
    m = mesh.make_mesh("explicit")
    x = jax.ShapeDtypeStruct((384, 64), jnp.bfloat16, sharding=jax.NamedSharding(m, P(unreduced={"t"})))
    specs = P(unreduced={"t"})
    function = jax.shard_map(lambda x: split(x).outs[0], mesh=m, in_specs=specs, out_specs=specs)
    with pytest.raises(TypeError, match=r"unreduced.*jax\.lax\.psum"):
        jax.jit(function).trace(x)


# --- Some axes manual ------------------------------------------------------------------------------------------------


def check_partial(m, call, arguments, allowed, manual=("e",)):
    """The call with experts on the manual axes: right, one native call, and no collectives but those allowed."""
    experts = P(manual)
    function = jax.shard_map(call.function, mesh=m, in_specs=experts, out_specs=experts, axis_names={*manual})
    compiled = jax.jit(function).lower(*arguments).compile()
    found = mesh.collectives(compiled)
    assert allowed is None or {*found} <= allowed, f"{found} in\n{compiled.as_text()}"
    assert mesh.custom_calls(compiled) == call.native_calls()
    call.assert_right(compiled(*arguments))


@CASES.add(kind=KINDS, operation=SPLITTABLE)
def partially_manual(kind, operation):
    """Experts manual, features left to the partitioner: right bytes, at most a gather; none with Explicit features."""
    m, call = mesh.make_mesh(kind), Call(operation, (2,))
    no_gather = kind == "explicit" and not GATHERS_EXPLICIT_AXES
    check_partial(m, call, call.put(m, batch=("e",), features="t"), set() if no_gather else {"all-gather"})


@CASES.add(kind=("auto", "explicit"))
def partially_manual_with_a_cut_block(kind):
    """The same with fp8 features whose shards cut a block."""
    m, call = mesh.make_mesh(kind), Call("split_fp8", (EXPERTS,), features=640)
    check_partial(m, call, call.put(m, batch=("e",), only="x", features="t"), {"all-gather"})


@CASES.add(
    types=("Auto Auto Auto", "Explicit Explicit Explicit", "Explicit Explicit Auto", "Auto Explicit Auto"),
    manual=(("a",), ("a", "b")),
)
def partially_manual_of_three_axes(types, manual):
    """One or two of three axes manual, the others of either type."""
    m, call = mesh.make_cube(types.split()), Call("ragged", (EXPERTS,))
    features = ("b", "c") if manual == ("a",) else "c"
    allowed = {"all-gather"} if len(set(types.split())) == 1 else None  # JAX moves what it types as split otherwise
    check_partial(m, call, call.put(m, batch=(manual,), features=features), allowed, manual)


@CASES.add(kind=("auto", "mixed"), operation=OF_EACH_KIND)
@CASES.add(kind=("explicit",), operation=EXAMPLES)
def partially_manual_on_other_platforms(kind, operation):
    """A platform without native code gets pure JAX there, too."""
    m, call = mesh.make_mesh(kind), Call(operation, (2,))
    function = jax.shard_map(call.function, mesh=m, in_specs=P("e"), out_specs=P("e"), axis_names={"e"})
    traced = jax.jit(function).trace(*call.put(m, batch=("e",), features="t"))
    assert "@jax_tsq" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@CASES.add(kind=KINDS)
def partially_manual_padding(kind):
    """`pad_rows` and `unpad_rows` where some axes are left to the partitioner."""
    m, (x, sizes) = mesh.make_mesh(kind), Call("ragged", (EXPERTS,)).arrays

    def function(x, sizes):
        def one(x, sizes):
            return jax_tsq.unpad_rows(jax_tsq.pad_rows(x, sizes), sizes, len(x))

        return jax.vmap(one)(x, sizes)

    batch = P("e")
    function = jax.shard_map(function, mesh=m, in_specs=(batch, batch), out_specs=batch, axis_names={"e"})
    results = jax.jit(function)(put(x, m, "e", None, "t"), put(sizes, m, "e"))
    used = sizes[0].sum()
    mesh.assert_same_bytes(np.asarray(results)[:, :used], x[:, :used])


@CASES.add()
def pmap():
    """jax.pmap: tokens and groups of each device's own."""
    call = Call("ragged", (len(jax.devices()),))
    call.assert_right(jax.pmap(ragged)(*call.arrays))


if __name__ == "__main__":
    CASES.main()
