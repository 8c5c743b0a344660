"""Shardings of arrays, outside `jax.shard_map`: meshes whose axes are Auto, Explicit, or one of each."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_tsq
from jax_tsq._core import jax_internals
from tests import mesh
from tests.cases import float8_e4m3fn
from tests.mesh import COUNTS, EXPERTS, KINDS, OPERATIONS, SIZES, Call, check, data, put, ragged, split

CASES = mesh.Cases()

LAYOUTS = {
    "replicated": dict(),
    "features": dict(features="t"),
    "features_over_two_axes": dict(features=("e", "t")),
    "experts": dict(batch=("e",)),
    "experts_and_features": dict(batch=("e",), features="t"),
    "experts_over_two_axes": dict(batch=(("e", "t"),)),
}


@CASES.add(kind=KINDS, operation=OPERATIONS, layout=LAYOUTS)
def stays_split(kind, operation, layout):
    """Features, experts or both split: no communication, and the results are split alike; jitted and eager."""
    m, axes = mesh.make_mesh(kind), LAYOUTS[layout]
    call = Call(operation, batch=2 * EXPERTS if axes.get("batch") else None)
    check(call.function, call.put(m, **axes), call.expected, mesh=m, specs=call.specs(**axes), eager=True)


@CASES.add(operation=OPERATIONS, layout=("features", "experts_and_features"))
def output_sharding_only(operation, layout):
    """Replicated arguments, results asked for in shards: each device makes its own, without communication."""
    m, axes = mesh.make_mesh("auto"), LAYOUTS[layout]
    call = Call(operation, batch=EXPERTS if axes.get("batch") else None)
    specs = call.specs(**axes)
    shardings = jax.tree.map(lambda s: NamedSharding(m, s), specs, is_leaf=lambda s: isinstance(s, P))
    batch = (None,) if call.batched else ()
    check(call.function, call.put(m, batch), call.expected, mesh=m, specs=specs, out_shardings=shardings)


@CASES.add(operation=("split", "ragged_fp8"))
def constraint_on_a_result(operation):
    """A sharding constraint on one result inside the program is enough."""
    m, call = mesh.make_mesh("auto"), Call(operation)

    def function(*operands):
        results = call.function(*operands)
        first = jax.lax.with_sharding_constraint(jax.tree.leaves(results)[0], NamedSharding(m, P(("e", "t"))))
        return jax.tree.unflatten(jax.tree.structure(results), [first, *jax.tree.leaves(results)[1:]])

    specs = call.specs(features=("e", "t"))
    check(function, call.put(m), call.expected, mesh=m, specs=specs)


@CASES.add(kind=KINDS)
def input_sharding_only(kind):
    """numpy arguments with in_shardings."""
    m, (x, _) = mesh.make_mesh(kind), data()
    options = dict(specs=mesh.split_specs(features="t"), in_shardings=NamedSharding(m, P(None, "t")))
    check(split, [x], mesh.expect_split(x), mesh=m, **options)


@CASES.add(kind=KINDS)
def ahead_of_time(kind):
    """Lowered for shapes with shardings; the types and the compiled program know the results' shardings."""
    m, (x, _) = mesh.make_mesh(kind), data()
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(m, P(None, "t")))
    compiled = jax.jit(split).lower(shape).compile()
    for sharding, count in zip(compiled.output_shardings.outs, COUNTS, strict=True):
        assert not count or sharding.is_equivalent_to(NamedSharding(m, P("t")), 2)
    if kind == "explicit":
        outs = jax.eval_shape(split, shape).outs
        assert all(tuple(out.sharding.spec) == ("t", None) for out in outs), outs


# --- Communication that the mathematics needs ------------------------------------------------------------------------


@CASES.add(kind=KINDS, operation=("split", "ragged"))
def tokens_split(kind, operation):
    """Tokens split: one gather of x, and replicated results."""
    m, call = mesh.make_mesh(kind), Call(operation)
    x, *rest = call.arrays
    arguments = [put(x, m, "t"), *(put(a, m) for a in rest)]
    check(call.function, arguments, call.expected, mesh=m, specs=call.specs(), communication=["all-gather"])


@CASES.add(kind=KINDS)
def tokens_and_features_split(kind):
    """Tokens and features split: one gather over the tokens' axis; features stay split."""
    m, (x, _) = mesh.make_mesh(kind), data()
    needed = ["all-gather"] if m.shape["e"] > 1 else []
    specs = mesh.split_specs(features="t")
    check(split, [put(x, m, "e", "t")], mesh.expect_split(x), mesh=m, specs=specs, communication=needed)


@CASES.add(kind=KINDS)
def group_sizes_split(kind):
    """Group sizes split: a gather of E numbers; x and its results stay where they are."""
    m, (x, _) = mesh.make_mesh(kind), data()
    results = check(
        ragged,
        [put(x, m, None, "t"), put(SIZES, m, "t")],
        mesh.expect_ragged(x, SIZES),
        mesh=m,
        communication=["all-gather"],
    )
    assert results.values.sharding.is_equivalent_to(NamedSharding(m, P("t")), 2)


@CASES.add(kind=KINDS, where=("tokens", "other_axis"))
def scales_split_elsewhere(kind, where):
    """Scales split otherwise than x: they move, x does not."""
    m, (x, scales) = mesh.make_mesh(kind), data(float8_e4m3fn)
    scales_axes = {"tokens": ("t",), "other_axis": (None, "e")}[where]
    arguments = [put(x, m, None, "t"), put(scales, m, *scales_axes)]
    specs = mesh.split_specs(features="t")
    check(split, arguments, mesh.expect_split(x, scales), mesh=m, specs=specs, communication=None)
    compiled = jax.jit(split).lower(*arguments).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    assert all("f8e4m3" not in line for line in moved), moved


@CASES.add(operand=("scales", "group_sizes"))
def no_split_that_must_be_undone(operand):
    """Tokens or groups split in one operand do not spread to the others, which would have to be gathered in turn."""
    m, call = mesh.make_mesh("auto"), Call("split_fp8" if operand == "scales" else "ragged")
    x, other = call.arrays

    def function(x, other):
        computed = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(other)
        return call.function(*computed)

    compiled = jax.jit(function).lower(put(x, m), put(other, m, "t")).compile()
    moved = [line for line in compiled.as_text().splitlines() if mesh.COLLECTIVES.search(line)]
    assert len(moved) == (1 if m.shape["t"] > 1 else 0), moved
    assert all(str(x.dtype).replace("loat8_e4m3fn", "8e4m3fn") not in line for line in moved), moved
    mesh.assert_same_bytes(jax.tree.leaves(compiled(put(x, m), put(other, m, "t"))), jax.tree.leaves(call.expected))


@CASES.add(kind=KINDS)
def scales_replicated(kind):
    """Replicated scales beside split features: each device takes its part."""
    m, (x, scales) = mesh.make_mesh(kind), data(float8_e4m3fn)
    arguments = [put(x, m, None, "t"), put(scales, m)]
    check(split, arguments, mesh.expect_split(x, scales), mesh=m, specs=mesh.split_specs(features="t"))


@CASES.add(kind=KINDS)
def scales_alone_split(kind):
    """Replicated x: the scales are gathered, the results replicated."""
    m, (x, scales) = mesh.make_mesh(kind), data(float8_e4m3fn)
    arguments = [put(x, m), put(scales, m, None, "t")]
    check(split, arguments, mesh.expect_split(x, scales), mesh=m, communication=["all-gather"])


@CASES.add(kind=KINDS, operation=("split_fp8", "ragged_fp8"))
def shards_cut_a_block(kind, operation):
    """fp8 features whose shards are not whole blocks of 128: one gather of x, and right bytes."""
    m, call = mesh.make_mesh(kind), Call(operation, features=640)
    x, *rest = call.arrays
    arguments = [put(x, m, None, "t"), *(put(a, m) for a in rest)]
    needed = ["all-gather"] if m.shape["t"] > 1 else []
    check(call.function, arguments, call.expected, mesh=m, communication=needed)


@CASES.add(features=(256, 384, 640, 1024), axes=("t", ("e", "t")))
def computed_scales(features, axes):
    """x quantized by rows in the same program: the partitioner splits the scales, perhaps over a part of a mesh axis.

    Where no shard cuts a block there is no communication.
    """
    m, (x, _) = mesh.make_mesh("auto"), data(features=features)
    devices = m.shape["t"] if axes == "t" else m.size

    def function(x):
        rows = jax_tsq.quantize_rows(x, pow_2_scales=True)
        return split(rows.values, rows.scales)

    expected, communication = jax.jit(function)(x), None if features % (128 * devices) else ()
    check(function, [put(x, m, None, axes)], expected, mesh=m, communication=communication, calls=2)


@CASES.add(kind=KINDS)
def shards_of_64_features(kind):
    """bfloat16 features may be cut anywhere."""
    m, (x, _) = mesh.make_mesh(kind), data(features=512)
    specs = mesh.split_specs(features=("e", "t"))
    check(split, [put(x, m, None, ("e", "t"))], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add(operation=OPERATIONS, features=(1001, 1004, 5))
def uneven_features(operation, features):
    """Features that the mesh does not divide: right bytes."""
    m, call = mesh.make_mesh("auto"), Call(operation, features=features)

    def function(x, *rest):
        return call.function(jax.lax.with_sharding_constraint(x, NamedSharding(m, P(None, ("e", "t")))), *rest)

    check(function, call.put(m), call.expected, mesh=m, communication=None)


@CASES.add(experts=(3, 5))
def uneven_experts(experts):
    """Experts that the mesh does not divide: right bytes."""
    m, (x, _) = mesh.make_mesh("auto"), data(batch=experts)

    def function(x):
        return jax.vmap(split)(jax.lax.with_sharding_constraint(x, NamedSharding(m, P("t", None, "e"))))

    check(function, [put(x, m)], mesh.expect_split(x), mesh=m, communication=None)


@CASES.add(kind=KINDS)
def flat_layout(kind):
    """The flat layout: features are gathered, experts stay split."""
    m, (x, _) = mesh.make_mesh(kind), data()
    flat = functools.partial(jax_tsq.ragged_transpose_quant, layout="flat")
    expected = mesh.expect_ragged(x, SIZES, layout="flat")
    needed = ["all-gather"] if m.shape["t"] > 1 else []
    check(flat, [put(x, m, None, "t"), put(SIZES, m)], expected, mesh=m, communication=needed)
    (x, _), sizes = data(batch=EXPERTS), mesh.BATCH_SIZES
    expected = mesh.expect_ragged(x, sizes, layout="flat")
    specs = jax_tsq.RaggedQuantized(P("e"), P("e"), P("e"))
    check(jax.vmap(flat), [put(x, m, "e"), put(sizes, m, "e")], expected, mesh=m, specs=specs)


# --- Meshes ----------------------------------------------------------------------------------------------------------


@CASES.add(types=("Auto Auto Auto", "Explicit Explicit Explicit", "Explicit Auto Explicit", "Auto Explicit Explicit"))
def two_batch_dimensions(types):
    """Nested vmap, each batch dimension on an axis of its own."""
    m = mesh.make_cube(types.split())
    x = np.stack([data(batch=EXPERTS)[0]] * 2)
    sizes = np.stack([mesh.BATCH_SIZES] * 2)
    results = [mesh.expect_ragged(*operands) for operands in zip(x, sizes, strict=True)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
    arguments = [put(x, m, "a", "b", None, "c"), put(sizes, m, "a", "b")]
    specs = mesh.ragged_specs(("a", "b"), "c")
    check(jax.vmap(jax.vmap(ragged)), arguments, expected, mesh=m, specs=specs, eager=True)


@CASES.add(kind=KINDS, mapped=("x", "group_sizes"))
def one_mapped_operand(kind, mapped):
    """vmap over one of two operands: no communication."""
    m, sizes = mesh.make_mesh(kind), mesh.BATCH_SIZES
    x, _ = data(batch=EXPERTS)
    if mapped == "x":
        arguments, axes = [put(x, m, "e", None, "t"), put(SIZES, m)], (0, None)
        expected = mesh.expect_ragged(x, np.stack([SIZES] * EXPERTS))
    else:
        arguments, axes = [put(x[0], m, None, "t"), put(sizes, m, "e")], (None, 0)
        expected = mesh.expect_ragged(np.stack([x[0]] * EXPERTS), sizes)
    check(jax.vmap(ragged, axes), arguments, expected, mesh=m, specs=mesh.ragged_specs(("e",), "t"))


@CASES.add(kind=KINDS)
def spmd_axis_name(kind):
    """vmap with the mesh axis of the mapped dimension."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=EXPERTS)
    specs = mesh.split_specs(("e",), "t")
    function = jax.vmap(split, spmd_axis_name="e")
    check(function, [put(x, m, "e", None, "t")], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add(kind=("auto", "explicit"))
def permuted_devices(kind):
    """Devices in another order than JAX lists them."""
    devices = [jax.devices()[i] for i in np.random.default_rng(0).permutation(len(jax.devices()))]
    m, (x, _) = mesh.make_mesh(kind, devices), data()
    specs = mesh.split_specs(features=("t", "e"))
    check(split, [put(x, m, None, ("t", "e"))], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add()
def an_internal_that_fails_is_an_error():
    """What JAX raises on shardings that no PartitionSpec says means "replicated", anything else is no such answer."""
    m, (x, _) = mesh.make_mesh("auto"), data()
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
    m, (x, _) = mesh.make_mesh(kind, jax.devices()[len(jax.devices()) // 2 :]), data()
    specs = mesh.split_specs(features="t")
    check(split, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add(kind=("auto", "explicit"))
def axis_of_size_one(kind):
    """Mesh axes of size 1 take part as any other."""
    devices = np.reshape(jax.devices(), (-1, 1))
    m = jax.sharding.Mesh(devices, ("e", "t"), axis_types=mesh.AXIS_TYPES[kind])
    x, _ = data()
    for features in ("t", "e", ("e", "t")):
        specs = mesh.split_specs(features=features)
        check(split, [put(x, m, None, features)], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add(kind=KINDS)
def one_axis_in_two_operands(kind):
    """The same mesh axis on x's features and on the group sizes' experts: a conflict, resolved with right bytes."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=EXPERTS)
    sizes = mesh.BATCH_SIZES
    arguments = [put(x, m, "t"), put(sizes, m, "t", "e")]
    check(jax.vmap(ragged), arguments, mesh.expect_ragged(x, sizes), mesh=m, communication=None)
    if kind == "auto":
        arguments = [put(x, m, None, None, "t"), put(sizes, m, "t")]
        check(jax.vmap(ragged), arguments, mesh.expect_ragged(x, sizes), mesh=m, communication=None)


@CASES.add()
def one_function_many_meshes():
    """One jitted function called with one sharding after the other."""
    x, _ = data()
    jitted, expected = jax.jit(split), mesh.expect_split(x)
    for kind in (*KINDS, "auto"):
        for axes in ((None, "t"), ("t",), (None, ("e", "t")), ()):
            argument = put(x, mesh.make_mesh(kind), *axes)
            mesh.assert_same_bytes(jax.tree.leaves(jitted(argument)), jax.tree.leaves(expected))


@CASES.add(kind=KINDS)
def mesh_in_context(kind):
    """jax.set_mesh around jitted and eager calls, with split and with plain arguments."""
    m, (x, _) = mesh.make_mesh(kind), data()
    with jax.set_mesh(m):
        specs = mesh.split_specs(features="t")
        check(split, [jax.device_put(x, P(None, "t"))], mesh.expect_split(x), mesh=m, specs=specs, eager=True)
        for function in (split, jax.jit(split)):
            results = function(jnp.asarray(x))
            mesh.assert_same_bytes(jax.tree.leaves(results), jax.tree.leaves(mesh.expect_split(x)))


@CASES.add(axes=(("e", "t"), ("e",)))
def auto_axes(axes):
    """jax.sharding.auto_axes over all or some axes of an Explicit mesh."""
    m, (x, _) = mesh.make_mesh("explicit"), data()
    with jax.set_mesh(m):
        specs = mesh.split_specs(features="t")
        function = jax.sharding.auto_axes(split, axes=axes, out_sharding=specs)
        check(function, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add()
def explicit_axes():
    """jax.sharding.explicit_axes on an Auto mesh."""
    m, (x, _) = mesh.make_mesh("auto"), data()
    with jax.set_mesh(m):
        function = jax.sharding.explicit_axes(split, in_sharding=(P(None, "t"),))
        specs = mesh.split_specs(features="t")
        check(function, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m, specs=specs)


# --- Around the call -------------------------------------------------------------------------------------------------


@CASES.add(kind=KINDS)
def scan(kind):
    """A scan whose body quantizes."""
    m, (x, _) = mesh.make_mesh(kind), data(batch=2)

    def function(x):
        return jax.lax.scan(lambda carry, x: (carry, split(x)), 0, x)[1]

    specs = mesh.split_specs((None,), "t")
    check(function, [put(x, m, None, None, "t")], mesh.expect_split(x), mesh=m, specs=specs)


@CASES.add(kind=KINDS)
def remat_of_custom_vjp(kind):
    """Quantized residuals of a custom_vjp under jax.checkpoint: split features need no communication."""
    m, (x, _) = mesh.make_mesh(kind), data()
    expected = 1 + np.broadcast_to(mesh.expect_split(x).scales[0][0].astype(x.dtype), x.shape)
    check(mesh.gradient_with_quantized_residuals, [put(x, m, None, "t")], expected, mesh=m, specs=P(None, "t"))


@CASES.add(kind=("auto", "explicit"))
def donated(kind):
    """A donated x."""
    m, (x, _) = mesh.make_mesh(kind), data()

    def function(x):
        return x + 1, split(x)

    results = jax.jit(function, donate_argnums=0)(put(x, m, None, "t"))
    mesh.assert_same_bytes(jax.tree.leaves(results[1]), jax.tree.leaves(mesh.expect_split(x)))


@CASES.add(kind=KINDS)
def empty(kind):
    """No features, no tokens, no groups, no experts: right shapes and dtypes."""
    m, options = mesh.make_mesh(kind), dict(communication=None)
    x, _ = data(features=0)
    check(split, [put(x, m, None, "t")], mesh.expect_split(x), mesh=m, calls=0, **options)
    x, _ = data(tokens=0)
    function = functools.partial(jax_tsq.fused_transpose_split_quant, input_scales=None, tokens_per_expert=(0, 0))
    check(function, [put(x, m, None, "t")], mesh.expect_split(x, counts=(0, 0)), mesh=m, calls=0, **options)
    arguments = [put(x, m, None, "t"), put(SIZES, m)]
    jax.tree.map(np.asarray, jax.jit(ragged)(*arguments))
    x, _ = data()
    arguments = [put(x, m, None, "t"), put(SIZES[:0], m)]
    check(ragged, arguments, mesh.expect_ragged(x, SIZES[:0]), mesh=m, **options)
    x, _ = data(batch=0)
    results = jax.jit(jax.vmap(split))(put(x, m, "e", None, "t"))
    assert results.outs[2].shape == (0, mesh.FEATURES, COUNTS[2])


@CASES.add(kind=KINDS, experts=(256, 512))
def many_experts(kind, experts):
    """One result for each of many experts: no communication; 256 compile within 2 s."""
    m, (x, _) = mesh.make_mesh(kind), data(tokens=experts)
    counts = (1,) * experts

    def function(x):
        return jax_tsq.fused_transpose_split_quant(x, None, counts)

    argument = put(x, m, None, "t")
    seconds, compiled = mesh.compile_seconds(function, argument)
    assert mesh.collectives(compiled) == []
    assert mesh.custom_calls(compiled) == 1
    assert seconds < 2 or experts > 256, seconds
    mesh.assert_same_bytes(jax.tree.leaves(compiled(argument)), jax.tree.leaves(mesh.expect_split(x, counts=counts)))


@CASES.add(kind=KINDS, axes=("features", "tokens", "both"))
def quantize_rows(kind, axes):
    """Rows quantized where they lie, and what comes of them split in turn: no communication."""
    m, (x, _) = mesh.make_mesh(kind), data()
    where = {"features": (None, "t"), "tokens": ("t", None), "both": ("e", "t")}[axes]
    expected = mesh.spec.rows(x)
    check(jax_tsq.quantize_rows, [put(x, m, *where)], expected, mesh=m, specs=P(*where))
    if axes == "features":

        def function(x):
            return split(*jax_tsq.quantize_rows(x))

        specs = mesh.split_specs(features="t")
        check(function, [put(x, m, *where)], mesh.expect_split(*expected), mesh=m, specs=specs, calls=2)


@CASES.add(kind=KINDS, operation=("split", "ragged"))
def dequantize(kind, operation):
    """Values and scales turned back where they lie, shorter blocks too: no communication."""
    m, call = mesh.make_mesh(kind), Call(operation)

    def function(*operands):
        return jax_tsq.dequantize(call.function(*operands))

    expected = function(*map(jnp.asarray, call.arrays))
    results = check(function, call.put(m, features="t"), expected, mesh=m, specs=P(None, "t"))
    assert all(leaf.shape[1] == mesh.FEATURES for leaf in jax.tree.leaves(results))


# --- Types that Explicit meshes know ---------------------------------------------------------------------------------


@CASES.add(operation=("split", "ragged"))
def unreduced_is_refused(operation):
    """Partial sums are not quantized as if they were sums."""
    m, call = mesh.make_mesh("explicit"), Call(operation)
    x = jax.ShapeDtypeStruct(call.arrays[0].shape, jnp.bfloat16, sharding=NamedSharding(m, P(unreduced={"t"})))
    with pytest.raises(TypeError, match=r"unreduced.*jax\.sharding\.reshard"):
        jax.jit(call.function).trace(x, *call.arrays[1:])


@CASES.add(operation=("split", "ragged"))
def reduced_is_replicated(operation):
    """`reduced` operands, which say what a gradient would be, count as replicated."""
    m, call = mesh.make_mesh("explicit"), Call(operation)
    x = jax.ShapeDtypeStruct(call.arrays[0].shape, jnp.bfloat16, sharding=NamedSharding(m, P(reduced={"t"})))
    compiled = jax.jit(call.function).lower(x, *call.put(m)[1:]).compile()
    assert mesh.collectives(compiled) == []
    assert mesh.custom_calls(compiled) == 1


if __name__ == "__main__":
    CASES.main()
