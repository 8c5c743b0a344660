"""grouped_linear, pad_rows and unpad_rows on meshes: values and gradients are those of one device."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh
from tests.cases import assert_same_bytes, bfloat16

CASES = mesh.Cases()
SIZES, TOKENS, FEATURES, OUTPUTS = np.array([100, 0, 130, 2], np.int32), 256, 512, 256
LAYOUTS = {
    "features": (P(None, "t"), P(None, "t", None), P(None, None), P(None, None)),
    "outputs": (P(), P(None, None, "t"), P(None, None), P(None, "t")),
    "experts": (P(), P("e", None, "t"), P(), P(None, "t")),
    "tokens": (P("e", None), P(None, None, "t"), P(), P("e", "t")),
    "all": (P("e", "t"), P(None, "t", None), P(), P("e", None)),
}
# What a function leaves to the partitioner where x and w are split alike: the sum of partial products, in y or in dx.
SUMS = {"features": ["all-reduce"], "outputs": ["all-reduce"]}
OPTIONS = {
    "fp8": {},
    "residuals": dict(ragged_dot=jax.lax.ragged_dot, pow_2_scales=True, fp8_residuals=True),
}


def operands(devices=1):
    """x and dy with NaN past the sums, w, and sizes; for several devices one after the other, with other sizes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((devices, TOKENS, FEATURES)).astype(bfloat16)
    dy = rng.standard_normal((devices, TOKENS, OUTPUTS)).astype(bfloat16)
    w = (rng.standard_normal((len(SIZES), FEATURES, OUTPUTS)) / 16).astype(np.float32)
    sizes = np.stack([np.roll(SIZES, i) for i in range(devices)])
    x[:, SIZES.sum() :], dy[:, SIZES.sum() :] = np.nan, np.nan
    return x.reshape(-1, FEATURES), w, sizes.ravel(), dy.reshape(-1, OUTPUTS)


def value_and_gradients(x, w, sizes, dy, **options):
    y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes, **options), x, w)
    return y, *pullback(dy)


@functools.cache
def on_one_device(options, features=FEATURES):
    """What the meshes have to give for the first features of `operands`."""
    x, w, sizes, dy = operands()
    run = jax.jit(lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options]))
    return run(x[:, :features], w[:, :features], sizes, dy)


def assert_close(actual, expected):
    """Equal but for the rounding to bf16 of partial sums."""
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=2e-2, atol=1e-2 * np.abs(e).max())
        assert np.linalg.norm(a - e) < 4e-3 * np.linalg.norm(e)


@CASES.add(kind=("auto", "explicit"), layout=(*SUMS, "all"), options=("residuals",))
@CASES.add(kind=("auto", "explicit"), layout=LAYOUTS, options=("fp8",))
def on_a_mesh(kind, layout, options):
    """Operands split in several ways, with the sizes on every device."""
    x, w, sizes, dy = operands()
    x_spec, w_spec, sizes_spec, y_spec = LAYOUTS[layout]
    grid = mesh.make_mesh(kind)
    with jax.set_mesh(grid):
        arrays = [
            mesh.put(a, grid, *s)
            for a, s in ((x, x_spec), (w, w_spec), (sizes, sizes_spec[:0]), (dy, y_spec if kind == "explicit" else ()))
        ]
        compiled = jax.jit(lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options])).lower(*arrays).compile()
        results = compiled(*arrays)
    assert_close(results, on_one_device(options))
    if options == "residuals" and layout in SUMS and grid.shape["t"] > 1:
        assert mesh.collectives(compiled) == SUMS[layout], compiled.as_text()
    if kind == "explicit":
        assert jax.typeof(results[1]).sharding.spec == jax.typeof(arrays[0]).sharding.spec
        assert jax.typeof(results[2]).sharding.spec == jax.typeof(arrays[1]).sharding.spec


def gathers(compiled):
    """The dtypes of what is gathered, without small arrays: scales and sizes. XLA's CPUs move float8 as float16."""
    found = re.findall(r"= \(?(\w+)\[([\d,]+)\][^=]*? all-gather(?:-start)?\(", compiled.as_text())
    names = {"f16": "f8e4m3fn"}
    return sorted(
        names.get(dtype, dtype) for dtype, shape in found if np.prod([int(size) for size in shape.split(",")]) > 10000
    )


@CASES.add(kind=("auto", "explicit"), side=("K", "N"))
def split_weights(kind, side):
    """Weights split into whole blocks, and x along K or dy along N as they are: what travels has been quantized."""
    x, w, sizes, dy = operands()
    w = np.concatenate([w, w], axis=2)
    dy = np.concatenate([dy, dy], axis=1)
    expected = jax.jit(value_and_gradients)(x, w, sizes, dy)
    grid = mesh.make_mesh(kind)
    where = (None, "t") if side == "K" else (None, None, "t")
    x_axis, y_axis = ("t", None) if side == "K" else (None, "t")
    arrays = [mesh.put(x, grid, None, x_axis), mesh.put(w, grid, *where), mesh.put(sizes, grid)]
    arrays.append(mesh.put(dy, grid, None, y_axis))
    with jax.set_mesh(grid):
        compiled = jax.jit(value_and_gradients).lower(*arrays).compile()
        results = compiled(*arrays)
    assert_close(results, expected)
    if grid.shape["t"] > 1:
        assert set(gathers(compiled)) == {"f8e4m3fn"}, gathers(compiled)


@CASES.add(side=("K", "N"))
def fsdp(side):
    """As docs/sharding.md shows it: every device has tokens of its own, and a part of the weights."""
    x, w, sizes, dy = operands(4)
    x, dy = np.nan_to_num(x), np.nan_to_num(dy)
    w = np.concatenate([w, w], axis=2)
    dy = np.concatenate([dy, dy], axis=1)
    grid, axis = mesh.make_mesh("auto"), 1 if side == "K" else 2
    where = P(None, "t") if side == "K" else P(None, None, "t")

    def layer(x, w, sizes):
        parts = jax_tsq.quantize_blocks(jax.lax.stop_gradient(w))
        axes = (axis, 3 - axis, axis)
        gather = functools.partial(jax.lax.all_gather, axis_name="t", tiled=True)
        quantized = jax_tsq.BlockQuantized(*(gather(part, axis=at) for part, at in zip(parts, axes, strict=True)))
        return jax_tsq.grouped_linear(x, gather(w, axis=axis), sizes, quantized_w=quantized)

    def run(x, w, sizes, dy):
        sharded = jax.shard_map(layer, mesh=grid, in_specs=(P("t"), where, P("t")), out_specs=P("t"))
        y, pullback = jax.vjp(lambda x, w: sharded(x, w, sizes), x, w)
        return y, *pullback(dy)

    if grid.shape["t"] != 4:
        return
    arrays = mesh.put(x, grid, "t"), mesh.put(w, grid, *where), mesh.put(sizes, grid, "t"), mesh.put(dy, grid, "t")
    compiled = jax.jit(run).lower(*arrays).compile()
    y, dx, dw = compiled(*arrays)
    parts = [a.reshape(4, -1, *a.shape[1:]) for a in (x, sizes, dy)]
    plain = jax.jit(value_and_gradients)
    wanted = [plain(parts[0][i], w, parts[1][i], parts[2][i]) for i in range(4)]
    assert_close([y, dx], [np.concatenate([a[i] for a in wanted]) for i in range(2)])
    assert_close([dw], [sum(np.asarray(a[2]) for a in wanted)])
    assert set(gathers(compiled)) == {"f8e4m3fn"}, gathers(compiled)


# "unplaced" is an array that nobody put anywhere.
X_PLACES = [(), ("e",), (None, "t"), ("e", "t"), (None, ("e", "t")), "unplaced"]
W_PLACES = [(), (None, "t"), (None, None, "t"), ("e",), (None, "t", "e"), "unplaced"]


@CASES.add()
def every_placement():
    """x and w anywhere over two axes, together or not: right values, gradients of the types of x and w."""
    x, w, sizes, dy = operands()
    x, w, dy = x[:, :256], w[:, :256, :64], dy[:, :64]
    expected = jax.jit(value_and_gradients)(x, w, sizes, dy)
    grid = mesh.make_mesh("explicit")

    def placed(a, places):
        return [jnp.asarray(a) if axes == "unplaced" else mesh.put(a, grid, *axes) for axes in places]

    def one(x, w, sizes, dy):
        y, pullback = jax.vjp(lambda x, w: jax_tsq.grouped_linear(x, w, sizes), x, w)
        return y, *pullback(jax.sharding.reshard(dy, jax.typeof(y).sharding.spec))

    pairs = list(itertools.product(range(len(X_PLACES)), range(len(W_PLACES))))

    def everything(xs, ws, sizes, dy):
        return [one(xs[i], ws[j], sizes, dy) for i, j in pairs]

    arrays = placed(x, X_PLACES), placed(w, W_PLACES), mesh.put(sizes, grid), mesh.put(dy, grid)
    with jax.set_mesh(grid):
        results = jax.jit(everything)(*arrays)
    for (i, j), (y, dx, dw) in zip(pairs, results, strict=True):
        assert_close((y, dx, dw), expected)
        for got, wanted in ((dx, arrays[0][i]), (dw, arrays[1][j])):
            types = jax.typeof(got), jax.typeof(wanted)
            assert types[0].sharding.spec == types[1].sharding.spec, f"{types[0]} is the gradient of {types[1]}"


@CASES.add(kind=("auto", "explicit"))
def mapped_dimension(kind):
    """`vmap` over a split dimension, with weights that are not mapped: every device its own part."""
    batch = 2
    x, w, sizes, dy = operands(batch)
    x, sizes, dy = (a.reshape(batch, -1, *a.shape[1:]) for a in (x, sizes, dy))
    arrays, axes = (x, w, sizes, dy), (0, None, 0, 0)
    run = jax.vmap(lambda *arrays: value_and_gradients(*arrays, **OPTIONS["residuals"]), in_axes=axes)
    grid = mesh.make_mesh(kind)
    placed = [mesh.put(a, grid, *("e",) * (axis == 0)) for a, axis in zip(arrays, axes, strict=True)]
    compiled = jax.jit(run).lower(*placed).compile()
    assert_close(compiled(*placed), jax.jit(lambda *arrays: run(*arrays))(*arrays))
    assert not mesh.collectives(compiled), compiled.as_text()


@CASES.add(manual=(False, True))
def master_weights(manual):
    """Master weights split over Explicit axes, w on every device; or both replicated in shard_map: dw is as those."""
    x, w, sizes, dy = operands()
    expected = on_one_device("fp8")[2]
    grid = mesh.make_mesh("auto" if manual else "explicit")

    def gradient(x, w, master_w, sizes, dy):
        _, pullback = jax.vjp(lambda master_w: jax_tsq.grouped_linear(x, w, sizes, master_w=master_w), master_w)
        return pullback(dy)[0]

    master_w = mesh.put(np.zeros_like(w), grid, *() if manual else (None, "t"))
    arrays = mesh.put(x, grid), mesh.put(w.astype(bfloat16), grid), master_w, mesh.put(sizes, grid), mesh.put(dy, grid)
    if manual:
        every = P("e")
        arrays = (*arrays[:3], *(mesh.put(np.concatenate([a] * grid.shape["e"]), grid, "e") for a in (sizes, dy)))
        gradient = jax.shard_map(gradient, mesh=grid, in_specs=(P(), P(), P(), every, every), out_specs=P())
        expected = expected * grid.shape["e"]
    dw = jax.jit(gradient)(*arrays)
    assert_close([dw], [expected])
    assert jax.typeof(dw).sharding.spec == jax.typeof(master_w).sharding.spec


def scaled_gradients(x, w, sizes, scale):
    """Gradients of a layer whose product closes over a scale."""

    def loss(x, w):
        return jax_tsq.grouped_linear(x, w, sizes, ragged_dot=ragged_dot).astype(jnp.float32).sum()

    def ragged_dot(*operands):
        return scale * jax.lax.ragged_dot(*operands).astype(jnp.float32)

    return jax.grad(loss, argnums=(0, 1))(x, w)


@CASES.add(kind=("auto", "explicit"))
def closure(kind):
    """The product closes over an array on the mesh, and over one that nobody placed."""
    x, w, sizes, _ = operands()
    grid = mesh.make_mesh(kind)
    placed = mesh.put(x, grid, None, "t"), mesh.put(w, grid, None, None, "e"), mesh.put(sizes, grid)
    expected = jax.jit(scaled_gradients)(x, w, sizes, np.float32(2))
    for scale in (mesh.put(np.float32(2), grid), np.float32(2)):
        assert_close(jax.jit(scaled_gradients)(*placed, scale), expected)


@CASES.add()
def closure_that_differs():
    """Inside shard_map, the product closes over the device's number: gradients of what is replicated are summed."""
    x, w, sizes, _ = operands()
    grid = mesh.make_mesh("auto")

    def run(x, w, sizes):
        return scaled_gradients(x, w, sizes, 2.0 ** jax.lax.axis_index("t").astype(jnp.float32))

    dx, dw = jax.jit(jax.shard_map(run, mesh=grid, in_specs=P(), out_specs=P()))(x, w, sizes)
    one_dx, one_dw = jax.jit(scaled_gradients)(x, w, sizes, np.float32(1))
    devices = grid.shape["t"]
    assert_close((dx, dw), (one_dx * (2**devices - 1), one_dw * devices))


@CASES.add(layout=("features", "all"))
def shards_cut_a_block(layout):
    """Stored FP8 features whose shards are half a block, on an Auto mesh."""
    x, w, sizes, dy = operands()
    x, w = x[:, : FEATURES // 2], w[:, : FEATURES // 2]
    grid = mesh.make_mesh("auto")
    x_spec, w_spec, *_ = LAYOUTS[layout]
    arrays = [mesh.put(x, grid, *x_spec), mesh.put(w, grid, *w_spec), mesh.put(sizes, grid), mesh.put(dy, grid)]
    results = jax.jit(lambda *arrays: value_and_gradients(*arrays, **OPTIONS["residuals"]))(*arrays)
    assert_close(results, on_one_device("residuals", FEATURES // 2))


@CASES.add(options=OPTIONS)
def replicated_weights(options):
    """Inside shard_map, tokens differ from device to device and the weights do not: gradients are summed."""
    grid = mesh.make_mesh("auto")
    devices = grid.size
    x, w, sizes, dy = operands(devices)
    sharded = jax.jit(
        jax.shard_map(
            lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options]),
            mesh=grid,
            in_specs=(P(("e", "t")), P(), P(("e", "t")), P(("e", "t"))),
            out_specs=(P(("e", "t")), P(("e", "t")), P()),
        )
    )
    one = jax.jit(lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options]))
    parts = [one(a, w, b, c) for a, b, c in zip(*(np.split(a, devices) for a in (x, sizes, dy)), strict=True)]
    y, dx, dw = zip(*parts, strict=True)
    assert_close(sharded(x, w, sizes, dy), (np.concatenate(y), np.concatenate(dx), np.sum(dw, axis=0)))


@CASES.add(options=OPTIONS)
def own_experts(options):
    """Inside shard_map, every device has its own experts: no collective at all."""
    grid = mesh.make_mesh("auto")
    devices = grid.size
    x, w, sizes, dy = operands(devices)
    w = np.concatenate([w * (i + 1) for i in range(devices)])
    spec = P(("e", "t"))
    sharded = jax.jit(
        jax.shard_map(
            lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options]), mesh=grid, in_specs=spec, out_specs=spec
        )
    )
    one = jax.jit(lambda *arrays: value_and_gradients(*arrays, **OPTIONS[options]))
    parts = [one(*arrays) for arrays in zip(*(np.split(a, devices) for a in (x, w, sizes, dy)), strict=True)]
    assert_close(sharded(x, w, sizes, dy), [np.concatenate(a) for a in zip(*parts, strict=True)])
    hlo = sharded.lower(x, w, sizes, dy).compile().as_text() or ""
    assert hlo and not any(name in hlo for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


@CASES.add()
def results_that_differ_are_not_replicated():
    """shard_map refuses to pass a y that differs from device to device for a replicated one."""
    grid = mesh.make_mesh("auto")
    if grid.size == 1:
        return
    x, w, sizes, _ = operands()
    for varying in range(3):
        specs = [P(), P(), P()]
        specs[varying] = P("t")
        copies = [grid.shape["t"] if i == varying else 1 for i in range(3)]
        arrays = [jnp.concatenate([jnp.asarray(a)] * n) for a, n in zip((x, w, sizes), copies, strict=True)]
        run = jax.shard_map(jax_tsq.grouped_linear, mesh=grid, in_specs=tuple(specs), out_specs=P())
        try:
            jax.eval_shape(run, *arrays)
        except ValueError:
            continue
        raise AssertionError(f"operand {varying} differs between devices, but y passed for replicated")


@CASES.add()
def padded_rows():
    """Rows and sizes split over Explicit axes: pad_rows, its gradient, unpad_rows to as many and to an odd number."""
    tokens = 296
    x = np.random.default_rng(0).standard_normal((tokens, 16), np.float32)
    grid = mesh.make_mesh("explicit")

    def run(x, sizes):
        y = jax_tsq.pad_rows(x, sizes)
        dx = jax.grad(lambda x: (jax_tsq.pad_rows(x, sizes) ** 2).sum())(x)
        starts = jax_tsq.pad_group_sizes(sizes).starts
        return y, dx, jax_tsq.unpad_rows(y, sizes, tokens), jax_tsq.unpad_rows(y, sizes, tokens - 1), starts

    places = [P("e", None), P(None, "t"), P(("e", "t"), None)]
    arrays = [mesh.put(x, grid, *axes) for axes in places], mesh.put(SIZES, grid, "e")
    expected = [np.asarray(a) for a in jax.jit(run)(x, SIZES)]
    results = jax.jit(lambda xs, sizes: [run(x, sizes) for x in xs])(*arrays)
    for axes, result in zip(places, results, strict=True):
        assert_same_bytes(list(result), expected)
        odd = P(None, axes[1]) if grid.size > 1 else axes
        assert [jax.typeof(a).sharding.spec for a in result] == [axes, axes, axes, odd, P(None)]


if __name__ == "__main__":
    CASES.main()
