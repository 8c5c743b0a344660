"""Calls inside `jax.shard_map` and `jax.pmap`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh, spec
from tests.cases import float8_e4m3fn
from tests.mesh import EXPERTS, KINDS, OPERATIONS, SIZES, Call, check, data, put, ragged, split

CASES = mesh.Cases()
BOTH = ("e", "t")

# There JAX gathers around every shard_map that leaves some Explicit axes to another, even of a plain transpose.
GATHERS_EXPLICIT_AXES = jax.__version_info__ == (0, 10, 2)


def varying(x):
    """The mesh axes over which JAX takes an array inside shard_map to differ."""
    return jax.typeof(x).manual_axis_type.varying


def full_specs(operation, batch=(), features=BOTH):
    """in_specs and out_specs that split features and batch dimensions over manual axes."""
    x = P(*batch, None, features)
    sizes, scales = [P(*batch)], [x]
    in_specs = [x, *(sizes if "ragged" in operation else []), *(scales if "fp8" in operation else [])]
    if "ragged" in operation:
        # The padded sizes are typed after x, so as varying over the features' axes: the same on each.
        out_specs = jax_tsq.RaggedQuantized(P(*batch, features), P(*batch, None, features), P(*batch, features))
    else:
        out_specs = mesh.split_specs(batch, features)
    return tuple(in_specs), out_specs


def repeated_sizes(expected, times):
    """A ragged result whose padded sizes come once from every device along the features."""
    if isinstance(expected, jax_tsq.SplitQuantized):
        return expected
    return expected._replace(padded_sizes=np.concatenate([expected.padded_sizes] * times, axis=-1))


def without_sizes_if_mixed(kind, function, *results):
    """Drops the padded sizes: on a mixed mesh JAX itself gathers such one-dimensional results over the Auto axes."""
    if kind != "mixed" or isinstance(results[0], jax_tsq.SplitQuantized):
        return function, *results
    return lambda *operands: function(*operands)[:2], *(tuple(result[:2]) for result in results)


@CASES.add(kind=KINDS, operation=OPERATIONS)
def full(kind, operation):
    """All axes manual: the call is what it is on one device."""
    m, call = mesh.make_mesh(kind), Call(operation)
    in_specs, out_specs = full_specs(operation)
    expected = repeated_sizes(call.expected, m.size)
    function, out_specs, expected = without_sizes_if_mixed(kind, call.function, out_specs, expected)
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    eager = jax.__version_info__ >= (0, 12) or call.is_ragged  # older ones fail on empty results
    check(function, call.put(m, features=BOTH), expected, mesh=m, specs=out_specs, eager=eager)


@CASES.add(kind=KINDS, operation=("ragged", "ragged_fp8"))
def different_groups_on_each_device(kind, operation):
    """Group sizes of each device's own, x replicated or split over the other axis."""
    m, call = mesh.make_mesh(kind), Call(operation)
    x, _, *scales = call.arrays
    sizes = mesh.BATCH_SIZES[: m.shape["e"]]

    def function(x, sizes, *scales):
        result = ragged(x, sizes[0], *scales)
        assert all(varying(leaf) == {"e", "t"} for leaf in result)
        return result

    expected = [mesh.expect_ragged(x, one, *scales) for one in sizes]
    expected = jax_tsq.RaggedQuantized(
        np.concatenate([part.values for part in expected], 1),
        np.concatenate([part.scales for part in expected]),
        np.concatenate([part.padded_sizes for part in expected for _ in range(m.shape["t"])]),
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
    m, (x, _) = mesh.make_mesh(kind), data(batch=len(jax.devices()))
    sizes = np.int32([100, 0, 130, 99])
    parts = [mesh.expect_ragged(one, sizes) for one in x]
    expected = jax_tsq.RaggedQuantized(*(np.stack(leaves) for leaves in zip(*parts, strict=True)))

    def function(x, sizes):
        return jax.tree.map(lambda leaf: leaf[None], ragged(x[0], sizes))

    out_specs = jax_tsq.RaggedQuantized(P(BOTH), P(BOTH), P(BOTH))
    function = jax.shard_map(function, mesh=m, in_specs=(P(BOTH), P()), out_specs=out_specs)
    check(function, [put(x, m, BOTH), put(sizes, m)], expected, mesh=m, specs=out_specs)


@CASES.add(kind=KINDS)
def different_tokens_and_groups_on_each_device(kind):
    """Tokens and group sizes of each device's own, as after an exchange of tokens."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=len(jax.devices()))
    sizes = np.stack([np.roll(SIZES, i) for i in range(len(x))])

    def function(x, sizes):
        return jax.tree.map(lambda leaf: leaf[None], ragged(x[0], sizes[0]))

    out_specs = jax_tsq.RaggedQuantized(P(BOTH), P(BOTH), P(BOTH))
    function = jax.shard_map(function, mesh=m, in_specs=(P(BOTH), P(BOTH)), out_specs=out_specs)
    arguments = [put(x, m, BOTH), put(sizes, m, BOTH)]
    check(function, arguments, mesh.expect_ragged(x, sizes), mesh=m, specs=out_specs)


@CASES.add(kind=KINDS)
def nested(kind):
    """One shard_map inside another, which together make all axes manual."""
    m, call = mesh.make_mesh(kind), Call("ragged", batch=EXPERTS)
    inner_specs = full_specs("ragged", (None,), "t")

    def outer(x, sizes):
        inner = jax.shard_map(call.function, in_specs=inner_specs[0], out_specs=inner_specs[1], axis_names={"t"})
        result = inner(x, sizes)
        assert all("e" in varying(leaf) for leaf in result)
        return result

    out_specs = jax_tsq.RaggedQuantized(P("e"), P("e"), P("e"))
    function = jax.shard_map(outer, mesh=m, in_specs=(P("e"), P("e")), out_specs=out_specs, axis_names={"e"})
    expected = repeated_sizes(call.expected, m.shape["t"])
    communication = ["all-gather"] * 4 if kind == "explicit" and GATHERS_EXPLICIT_AXES else []
    check(function, call.put(m, ("e",), "t"), expected, mesh=m, communication=communication)


@CASES.add(kind=KINDS)
def inside_scan(kind):
    """A scan over group sizes: the carry and the results keep their types."""
    m, (x, _) = mesh.make_mesh(kind), data()
    sizes = mesh.BATCH_SIZES

    def function(x, sizes):
        def body(carry, sizes):
            result = ragged(x, sizes)
            return carry + result.scales, result

        rows = jax_tsq.padded_tokens(len(x), sizes.shape[1]) // spec.BLOCK
        carry = jax.lax.pcast(jnp.zeros((rows, x.shape[1]), jnp.float32), BOTH, to="varying")
        return jax.lax.scan(body, carry, sizes)[1]

    in_specs, out_specs = full_specs("ragged", (None,))
    function = jax.shard_map(function, mesh=m, in_specs=(P(None, BOTH), in_specs[1]), out_specs=out_specs)
    expected = repeated_sizes(mesh.expect_ragged(np.stack([x] * len(sizes)), sizes), m.size)
    check(function, [put(x, m, None, BOTH), put(sizes, m)], expected, mesh=m)


@CASES.add(kind=KINDS)
def inside_jit_and_cond(kind):
    """jit and cond inside shard_map."""
    m, (x, _) = mesh.make_mesh(kind), data()

    def function(x):
        return jax.lax.cond(x.astype(jnp.float32).sum() < jnp.inf, jax.jit(split), jax.jit(split), x)

    in_specs, out_specs = full_specs("split")
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    compiled = jax.jit(function).lower(put(x, m, None, BOTH)).compile()
    assert mesh.collectives(compiled) == []
    mesh.assert_same_bytes(jax.tree.leaves(compiled(put(x, m, None, BOTH))), jax.tree.leaves(mesh.expect_split(x)))


@CASES.add(kind=KINDS, mapped=("x", "both"))
def vmap_inside(kind, mapped):
    """vmap inside shard_map."""
    m, call = mesh.make_mesh(kind), Call("ragged", batch=EXPERTS)
    x, sizes = call.arrays
    in_specs, out_specs = full_specs("ragged", ("e",), "t")
    if mapped == "x":
        sizes, in_specs = SIZES, (in_specs[0], P())
    function = jax.vmap(ragged, in_axes=(0, 0 if mapped == "both" else None))
    function = jax.shard_map(function, mesh=m, in_specs=in_specs, out_specs=out_specs)
    expected = mesh.expect_ragged(x, np.resize(sizes, (EXPERTS, len(SIZES))))
    arguments = [put(x, m, "e", None, "t"), put(sizes, m, *(["e"] if mapped == "both" else []))]
    check(function, arguments, repeated_sizes(expected, m.shape["t"]), mesh=m, specs=out_specs)


@CASES.add(kind=("auto", "explicit"))
def vmap_outside(kind):
    """vmap of a shard_map."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=EXPERTS)
    in_specs, out_specs = full_specs("split")
    function = jax.vmap(jax.shard_map(split, mesh=m, in_specs=in_specs, out_specs=out_specs))
    check(function, [put(x, m, None, None, BOTH)], mesh.expect_split(x), mesh=m)


@CASES.add(kind=KINDS)
def custom_vjp_under_remat(kind):
    """Quantized residuals of a custom_vjp, under jax.checkpoint inside shard_map."""
    m, (x, _) = mesh.make_mesh(kind), data()
    function = jax.shard_map(
        mesh.gradient_with_quantized_residuals, mesh=m, in_specs=P(None, BOTH), out_specs=P(None, BOTH)
    )
    expected = 1 + np.broadcast_to(mesh.expect_split(x).scales[0][0].astype(x.dtype), x.shape)
    check(function, [put(x, m, None, BOTH)], expected, mesh=m, specs=P(None, BOTH))


@CASES.add(kind=KINDS)
def check_vma_off(kind):
    """shard_map without its check."""
    m, (x, _) = mesh.make_mesh(kind), data()
    in_specs, _ = full_specs("ragged")
    out_specs = mesh.ragged_specs(features=BOTH)
    function = jax.shard_map(ragged, mesh=m, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arguments = [put(x, m, None, BOTH), put(SIZES, m)]
    check(function, arguments, mesh.expect_ragged(x, SIZES), mesh=m, specs=out_specs)


# --- What out_specs may not hide -------------------------------------------------------------------------------------


DIFFERENCES = {
    "built_in": lambda x, sizes, scales: x * sizes[0].astype(x.dtype),
    "group_sizes_to_values": lambda x, sizes, scales: ragged(x, sizes).values,
    "group_sizes_to_scales": lambda x, sizes, scales: ragged(x, sizes).scales,
    "group_sizes_to_padded_sizes": lambda x, sizes, scales: ragged(x, sizes).padded_sizes,
    "group_sizes_to_flat": lambda x, sizes, scales: jax_tsq.ragged_transpose_quant(x, sizes, layout="flat").values,
    "group_sizes_mapped": lambda x, sizes, scales: jax.vmap(ragged, (0, None))(x[None], sizes).values,
    "scales_to_split": lambda x, sizes, scales: split(x.astype(float8_e4m3fn), scales).outs[0],
    "scales_to_ragged": lambda x, sizes, scales: ragged(x.astype(float8_e4m3fn), jnp.asarray(SIZES), scales).values,
}


@CASES.add(kind=KINDS, difference=DIFFERENCES)
def a_difference_is_refused(kind, difference):
    """x the same on every device and another operand not: out_specs=P() is refused, as for a built-in."""
    m, (x, _) = mesh.make_mesh(kind), data()
    scales = np.ones((len(x), x.shape[1] // spec.BLOCK), np.float32)

    def differing(x, sizes, scales):
        sizes, scales = jax.lax.pcast((sizes, scales), "e", to="varying")
        result = DIFFERENCES[difference](x, sizes, scales)
        assert varying(result) == {"e"}, jax.typeof(result)
        return result

    hiding = jax.shard_map(differing, mesh=m, in_specs=(P(), P(), P()), out_specs=P())
    with pytest.raises(ValueError, match="out_specs"):
        jax.jit(hiding).trace(x, SIZES, scales)


@CASES.add(kind=KINDS)
def sameness_is_accepted(kind):
    """Operands that are the same on every device give results that are."""
    m, (x, _) = mesh.make_mesh(kind), data()
    function = jax.shard_map(ragged, mesh=m, in_specs=(P(), P()), out_specs=P())
    check(function, [put(x, m), put(SIZES, m)], mesh.expect_ragged(x, SIZES), mesh=m, specs=P())


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


def check_partial(m, function, arguments, expected, allowed):
    compiled = jax.jit(function).lower(*arguments).compile()
    found = mesh.collectives(compiled)
    assert allowed is None or set(found) <= allowed, f"{found} in\n{compiled.as_text()}"
    assert mesh.custom_calls(compiled) == 1
    mesh.assert_same_bytes(jax.tree.leaves(compiled(*arguments)), jax.tree.leaves(expected))


@CASES.add(kind=KINDS, operation=OPERATIONS)
def partially_manual(kind, operation):
    """Experts manual, features left to the partitioner: right bytes, at most a gather; none with Explicit features."""
    m, call = mesh.make_mesh(kind), Call(operation, batch=EXPERTS)
    batch = P("e")
    function = jax.shard_map(call.function, mesh=m, in_specs=batch, out_specs=batch, axis_names={"e"})
    no_gather = kind == "explicit" and not GATHERS_EXPLICIT_AXES
    allowed = set() if no_gather else {"all-gather"}
    check_partial(m, function, call.put(m, ("e",), "t"), call.expected, allowed)


@CASES.add(kind=("auto", "explicit"))
def partially_manual_with_a_cut_block(kind):
    """The same with fp8 features whose shards cut a block."""
    m, call = mesh.make_mesh(kind), Call("split_fp8", batch=EXPERTS, features=640)
    x, scales = call.arrays
    batch = P("e")
    function = jax.shard_map(call.function, mesh=m, in_specs=batch, out_specs=batch, axis_names={"e"})
    arguments = [put(x, m, "e", None, "t"), put(scales, m, "e")]
    check_partial(m, function, arguments, call.expected, {"all-gather"})


@CASES.add(
    types=("Auto Auto Auto", "Explicit Explicit Explicit", "Explicit Explicit Auto", "Auto Explicit Auto"),
    manual=(("a",), ("a", "b")),
)
def partially_manual_of_three_axes(types, manual):
    """One or two of three axes manual, the others of either type."""
    m, call = mesh.make_cube(types.split()), Call("ragged", batch=EXPERTS)
    axes = P(manual)
    function = jax.shard_map(call.function, mesh=m, in_specs=axes, out_specs=axes, axis_names=set(manual))
    features = ("b", "c") if manual == ("a",) else "c"
    allowed = {"all-gather"} if len(set(types.split())) == 1 else None  # JAX moves what it types as split otherwise
    check_partial(m, function, call.put(m, (manual,), features), call.expected, allowed)


@CASES.add(kind=KINDS, operation=OPERATIONS)
def partially_manual_on_other_platforms(kind, operation):
    """A platform without native code gets pure JAX there, too."""
    m, call = mesh.make_mesh(kind), Call(operation, batch=EXPERTS)
    function = jax.shard_map(call.function, mesh=m, in_specs=P("e"), out_specs=P("e"), axis_names={"e"})
    traced = jax.jit(function).trace(*call.put(m, ("e",), "t"))
    assert "@jax_tsq" not in traced.lower(lowering_platforms=("tpu",)).as_text()


@CASES.add(kind=KINDS)
def partially_manual_padding(kind):
    """`pad_rows` and `unpad_rows` where some axes are left to the partitioner."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=EXPERTS)

    def function(x, sizes):
        def one(x, sizes):
            return jax_tsq.unpad_rows(jax_tsq.pad_rows(x, sizes), sizes, len(x))

        return jax.vmap(one)(x, sizes)

    batch = P("e")
    function = jax.shard_map(function, mesh=m, in_specs=(batch, batch), out_specs=batch, axis_names={"e"})
    sizes = mesh.BATCH_SIZES
    results = jax.jit(function)(put(x, m, "e", None, "t"), put(sizes, m, "e"))
    used = sizes[0].sum()
    mesh.assert_same_bytes(np.asarray(results)[:, :used], x[:, :used])


@CASES.add()
def pmap():
    """jax.pmap: tokens and groups of each device's own."""
    devices = len(jax.devices())
    (x, _), sizes = data(batch=devices), np.resize(mesh.BATCH_SIZES, (devices, len(SIZES)))
    results = jax.pmap(ragged)(x, sizes)
    mesh.assert_same_bytes(jax.tree.leaves(results), jax.tree.leaves(mesh.expect_ragged(x, sizes)))


if __name__ == "__main__":
    CASES.main()
