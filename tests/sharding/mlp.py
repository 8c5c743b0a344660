"""moe_mlp on meshes: values and gradients are those of one device, and nothing travels but sums over F."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_tsq
from tests import mesh
from tests.cases import bfloat16
from tests.mlp import errors, value_and_gradients

CASES = mesh.Cases()
SIZES = np.int32([100, 0, 130, 2])  # of the experts of one device
TOKENS, WIDTH, FEATURES = 256, 128, 512


def operands(groups=1):
    """For devices one after the other, with other sizes each: x, gates', ups' and down weights, weights, sizes, dy.

    Rows past the sums hold NaN.
    """
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((groups, TOKENS, WIDTH)).astype(bfloat16) for _ in range(2))
    weights = rng.random((groups, TOKENS), np.float32)
    for a in (x, dy, weights):
        a[:, SIZES.sum() :] = np.nan
    experts = groups * len(SIZES)
    w_gate, w_up = (rng.standard_normal((2, experts, WIDTH, FEATURES)) / WIDTH**0.5).astype(np.float32)
    w_down = (rng.standard_normal((experts, FEATURES, WIDTH)) / FEATURES**0.5).astype(np.float32)
    sizes = np.concatenate([np.roll(SIZES, i) for i in range(groups)])
    return x.reshape(-1, WIDTH), w_gate, w_up, w_down, weights.ravel(), sizes, dy.reshape(-1, WIDTH)


def run(layer, x, w_gate, w_up, w_down, weights, sizes, dy):
    """y and all gradients."""
    y, pullback = jax.vjp(functools.partial(layer, sizes), x, w_gate, w_up, w_down, weights)
    return y, *pullback(dy)


def layer(sizes, x, w_gate, w_up, w_down, weights):
    return jax_tsq.moe_mlp(x, (w_gate, w_up), w_down, sizes, weights)


@functools.cache
def on_one_device(groups):
    """The same, group after group."""
    split = [np.split(a, groups) for a in operands(groups)]
    one = jax.jit(functools.partial(run, layer))
    parts = [one(*arrays) for arrays in zip(*split, strict=True)]
    return [np.concatenate(results) for results in zip(*parts, strict=True)]


# The axes of experts and of F.
LAYOUTS = {"features": (None, "t"), "experts": ("t", None), "experts_and_features": ("e", "t")}


# Inside all axes are manual, whatever their kind: one layout, which has both collectives and none, tells kinds apart.
@CASES.add(kind=("explicit", "mixed"), layout=["experts_and_features"])
@CASES.add(kind=("auto",), layout=LAYOUTS)
def shard_map(kind, layout):
    """Experts and their tokens over one axis, F over another: sums over F, and no other collective."""
    experts, features = LAYOUTS[layout]
    grid = mesh.make_mesh(kind)
    groups = grid.shape[experts] if experts else 1
    arrays = operands(groups)
    columns = P(experts, None, features)
    specs = P(experts), columns, columns, P(experts, features), P(experts), P(experts), P(experts)

    def part(sizes, *operands):
        y = layer(sizes, *operands)
        return jax.lax.psum(y, features) if features else y

    def whole(sizes, *operands):
        return jax.shard_map(part, mesh=grid, in_specs=(specs[5], *specs[:5]), out_specs=P(experts))(sizes, *operands)

    placed = [mesh.put(a, grid, *spec) for a, spec in zip(arrays, specs, strict=True)]
    compiled = jax.jit(functools.partial(run, whole)).lower(*placed).compile()
    results = compiled(*placed)
    assert max(errors(results, on_one_device(groups))) < 1e-2
    found = mesh.collectives(compiled)
    if features and grid.shape[features] > 1:
        assert set(found) == {"all-reduce"} and len(found) <= 3, compiled.as_text()
    else:
        assert not found, compiled.as_text()


SPLIT = {
    "tokens": (P("e"), P(), P(), P("e")),
    "width": (P(None, "t"), P(None, "t"), P(None, None, "t"), P()),
    "features": (P(), P(None, None, "t"), P(None, "t"), P()),
    "experts": (P(), P("e"), P("e"), P()),
    "all": (P("e"), P(None, "t", "e"), P(None, "e", "t"), P("e")),
}


# Each operation on Auto meshes is a case of quantizers.py, linear.py and weight_gradient.py.
@CASES.add(kind=("explicit",), split=SPLIT)
@CASES.add(kind=("auto",), split=["width", "all"])
def on_a_mesh(kind, split):
    """Outside of shard_map operands may lie in any way; on an Explicit mesh gradients are typed as they are."""
    x_spec, w1_spec, w2_spec, weights_spec = SPLIT[split]
    arrays, grid = operands(), mesh.make_mesh(kind)
    specs = x_spec, w1_spec, w1_spec, w2_spec, weights_spec, P(), P(x_spec[0] if x_spec else None)
    with jax.set_mesh(grid):
        placed = [mesh.put(a, grid, *spec) for a, spec in zip(arrays, specs, strict=True)]
        x, w_gate, w_up, w_down, weights, sizes, dy = placed
        if kind == "explicit":
            y_type = jax.eval_shape(lambda *a: layer(sizes, *a), *placed[:5])
            dy = jax.sharding.reshard(dy, y_type.sharding)
        results = jax.jit(functools.partial(run, layer))(x, w_gate, w_up, w_down, weights, sizes, dy)
    assert max(errors(results, on_one_device(1))) < 1e-2
    if kind == "explicit":
        for result, operand in zip(results[1:], placed, strict=False):
            assert jax.typeof(result).sharding.spec == jax.typeof(operand).sharding.spec


@CASES.add()
def one_array_of_weights():
    """Gates and ups in one array that is split along its columns."""
    x, w_gate, w_up, w_down, weights, sizes, dy = operands()
    grid, joined = mesh.make_mesh("explicit"), np.concatenate([w_gate, w_up], axis=2)
    expected = jax.jit(value_and_gradients)(x, joined, w_down, weights, sizes, dy)
    with jax.set_mesh(grid):
        specs = P(), P(None, None, "t"), P(None, "t"), P(), P(), P()
        arrays = [mesh.put(a, grid, *s) for a, s in zip((x, joined, w_down, weights, sizes, dy), specs, strict=True)]
        results = jax.jit(value_and_gradients)(*arrays)
    assert max(errors(results, expected)) < 1e-2


@CASES.add()
def bare_out_specs():
    """What differs between devices through any operand is refused as a replicated result."""
    x, w_gate, w_up, w_down, weights, sizes, _ = operands()
    for at in range(5):

        def function(*arrays, at=at):
            arrays = [jax.lax.pcast(a, "t", to="varying") if i == at else a for i, a in enumerate(arrays)]
            return layer(sizes, *arrays)

        hiding = jax.shard_map(function, mesh=mesh.make_mesh("auto"), in_specs=P(), out_specs=P())
        with pytest.raises(ValueError, match="out_specs"):
            jax.jit(hiding).trace(x, w_gate, w_up, w_down, weights)


if __name__ == "__main__":
    CASES.main()
