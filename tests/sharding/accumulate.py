"""Accumulators of weight gradients on meshes: sums of one device, in the memory that was donated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import accumulate, mesh
from tests.cases import bfloat16
from tests.mlp import errors

CASES = mesh.Cases()
SIZES, TOKENS, WIDTH, FEATURES = np.array([100, 0, 130, 2], np.int32), 256, 256, 512
MICROBATCHES = 3


def operands(name, groups=1):
    """Sums, x of all microbatches, bfloat16 weights, sizes and dy; for so many devices one after the other."""
    rng = np.random.default_rng(0)
    outputs = FEATURES if name == "linear" else WIDTH
    x = rng.standard_normal((MICROBATCHES, groups * TOKENS, WIDTH)).astype(bfloat16)
    dy = rng.standard_normal((groups * TOKENS, outputs)).astype(bfloat16)
    shape = (len(SIZES), WIDTH, FEATURES)
    w = [(rng.standard_normal(shape) / 16).astype(bfloat16) for _ in range(3)]
    w = w[0] if name == "linear" else ((w[0], w[1]), w[2].swapaxes(1, 2).copy())
    sizes = np.concatenate([np.roll(SIZES, i) for i in range(groups)])
    return accumulate.sums_for(w), x, w, sizes, dy


def loss_of(name):
    return accumulate.linear_loss if name == "linear" else accumulate.mlp_loss


def one_device(name, groups=1):
    """The sums and dx, group after group."""
    sums, x, w, sizes, dy = operands(name, groups)
    run = jax.jit(functools.partial(accumulate.step, loss_of(name)))
    dx = []
    for part in zip(np.split(x, groups, 1), np.split(sizes, groups), np.split(dy, groups), strict=True):
        sums, (_, one) = run(sums, part[0], w, *part[1:])
        dx.append(one)
    return jax.tree.leaves(sums), np.concatenate(dx, 1)


def pointers(tree):
    return [[s.data.unsafe_buffer_pointer() for s in a.addressable_shards] for a in jax.tree.leaves(tree)]


def check_in_place(function, arguments, collectives=None):
    """Runs it; donated sums are the results' memory, and in its loop only native calls make such arrays."""
    shapes = {a.sharding.shard_shape(a.shape) for a in jax.tree.leaves(arguments[0])}
    with pytest.MonkeyPatch.context() as patch:
        accumulate.compile_native(patch)
        compiled = jax.jit(lambda *a: function(*a), donate_argnums=0).lower(*arguments).compile()
    # Outside of the loop the partitioner moves weights, on CPUs in float32.
    found = accumulate.instructions(compiled, shapes, ("%fused_computation", "%wrapped_", "ENTRY"))
    assert found.pop("custom-call") == len(jax.tree.leaves(arguments[0])), found
    assert set(found) <= {"parameter", "get-tuple-element"}, found
    if collectives is not None and len(jax.devices()) > 1:
        assert set(mesh.collectives(compiled)) == collectives, mesh.collectives(compiled)
    sums = jax.tree.map(lambda a: jnp.negative(-a), arguments[0])  # memory of JAX, not of numpy
    before = pointers(sums)
    results = jax.jit(function, donate_argnums=0)(sums, *arguments[1:])
    assert pointers(results[0]) == before
    return results


W = {  # where gates, ups and the linear layer's weights lie, and where those of the way down
    "features": (P(None, "t"), P(None, None, "t")),
    "outputs": (P(None, None, "t"), P(None, "t")),
    "experts": (P("e"), P("e")),
}
LAYOUTS = [("linear", layout) for layout in W] + [("mlp", "outputs")]


def placed(tree, spec, grid):
    return jax.tree.map(lambda a, s: mesh.put(a, grid, *s), tree, spec)


@CASES.add(kind=("auto",), layout=["-".join(layout) for layout in LAYOUTS])
@CASES.add(kind=("explicit",), layout=["-".join(layout) for layout in LAYOUTS if layout[0] == "linear"])
def on_a_mesh(kind, layout):
    """Sums and weights are split alike, and stay where they are: in place, unless experts are split."""
    name, layout = layout.split("-")
    grid, (up, down) = mesh.make_mesh(kind), W[layout]
    spec = up if name == "linear" else ((up, up), down)
    sums, x, w, sizes, dy = operands(name)
    step = functools.partial(accumulate.step, loss_of(name))
    with jax.set_mesh(grid):
        arguments = (
            placed(sums, spec, grid),
            mesh.put(x, grid),
            placed(w, spec, grid),
            mesh.put(sizes, grid),
            mesh.put(dy, grid),
        )
        if layout == "experts":
            results = jax.jit(step, donate_argnums=0)(*arguments)
        else:
            results = check_in_place(step, arguments)
    check_results(results, one_device(name))
    for got, given in zip(jax.tree.leaves(results[0]), jax.tree.leaves(arguments[2]), strict=True):
        assert got.sharding.is_equivalent_to(given.sharding, 3), got.sharding


def check_results(results, expected):
    sums, (_, dx) = results
    assert max(errors([*jax.tree.leaves(sums), dx], [*expected[0], expected[1]])) < 1e-2


@CASES.add(kind=("auto",), name=("linear", "mlp"))
@CASES.add(kind=("explicit",), name=("linear",))
def own_sums(kind, name):
    """Inside shard_map every device has tokens and sums of its own: no collective before the sum after the step."""
    grid = mesh.make_mesh(kind)
    groups = grid.shape["t"]
    sums, x, w, sizes, dy = operands(name, groups)
    expected, dx = one_device(name, groups)
    own = jax.tree.map(lambda a: np.concatenate([a / groups] * groups), sums)  # a power of two
    step = functools.partial(accumulate.step, loss_of(name))

    def part(sums, *others):
        sums, (values, dx) = step(sums, *others)
        return sums, (jax.lax.psum(values, "t"), dx)

    tokens, every = P("t"), P(None, "t")
    specs = (jax.tree.map(lambda _: tokens, sums), every, jax.tree.map(lambda _: P(), w), tokens, tokens)
    sharded = jax.shard_map(part, mesh=grid, in_specs=specs, out_specs=(specs[0], (P(), every)))
    arguments = [placed(a, s, grid) for a, s in zip((own, x, w, sizes, dy), specs, strict=True)]
    results = check_in_place(sharded, arguments, {"all-reduce"})
    totals = jax.tree.map(lambda a: np.asarray(a).reshape(groups, -1, *a.shape[1:]).sum(axis=0), results[0])
    check_results((totals, results[1]), (expected, dx))


@CASES.add(name=("linear", "mlp"), outside=(False, True))
def shared_sums(name, outside):
    """Sums that all devices share get the sum of their terms, each once; the gradient in shard_map or around it."""
    grid = mesh.make_mesh("auto")
    groups = grid.shape["t"]
    sums, x, w, sizes, dy = operands(name, groups)
    loss = loss_of(name)
    tokens, nowhere = P("t"), jax.tree.map(lambda _: P(), w)
    specs = nowhere, tokens, nowhere, tokens, tokens

    def whole(*arguments):
        return jax.lax.psum(loss(*arguments), "t")

    if outside:
        gradient = jax.grad(jax.shard_map(whole, mesh=grid, in_specs=specs, out_specs=P()), (0, 1))
    else:
        gradient = jax.shard_map(jax.grad(loss, (0, 1)), mesh=grid, in_specs=specs, out_specs=(nowhere, tokens))
    results = jax.jit(gradient)(*(placed(a, s, grid) for a, s in zip((sums, x[0], w, sizes, dy), specs, strict=True)))
    single = sums
    for part in zip(np.split(x[0], groups), np.split(sizes, groups), np.split(dy, groups), strict=True):
        single = jax.jit(jax.grad(loss))(single, part[0], w, *part[1:])
    assert max(errors(jax.tree.leaves(results[0]), jax.tree.leaves(single))) < 1e-5


@CASES.add()
def split_features():
    """Inside shard_map F of the expert block is split, and so are its sums: in place, with sums over F alone."""
    grid = mesh.make_mesh("auto")
    sums, x, w, sizes, dy = operands("mlp")
    up, down = W["outputs"]
    spec = ((up, up), down)

    def loss(sums, x, w, sizes, dy, quantized_w):
        gates_and_ups, w_down = w
        y = jax_tsq.moe_mlp(x, gates_and_ups, w_down, sizes, quantized_weights=quantized_w, accumulate=sums)
        return (jax.lax.psum(y, "t").astype(jnp.float32) * dy.astype(jnp.float32)).sum()

    specs = spec, P(), spec, P(), P()
    step = functools.partial(accumulate.step, loss)
    sharded = jax.shard_map(step, mesh=grid, in_specs=specs, out_specs=(spec, P()))
    arguments = [placed(a, s, grid) for a, s in zip((sums, x, w, sizes, dy), specs, strict=True)]
    results = check_in_place(sharded, arguments, {"all-reduce"})
    check_results(results, one_device("mlp"))


if __name__ == "__main__":
    CASES.main()
