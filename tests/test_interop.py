"""The results in the hands of other packages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.operations import QUANTIZERS, Call, Shape

SIZES = jnp.array([100, 0, 156], jnp.int32)
SHAPE = Shape(counts=(100, 0, 156), sizes=((100, 0, 156),), features=96)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(Call("ragged", SHAPE).arrays[0])


@pytest.fixture(scope="module", params=QUANTIZERS)
def result(request):
    call = Call(request.param, SHAPE)
    return call.function(*call.arrays)


def same(a, b):
    return all(
        u.dtype == v.dtype and np.asarray(u).tobytes() == np.asarray(v).tobytes()
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_safetensors_round_trip(result, tmp_path):
    """FP8 values and scales go into a safetensors file and come back, dtype and bytes.

    safetensors.flax 0.8 writes float8_e4m3fn but looks for it in numpy when it reads: its raw views are what is read.
    """
    from safetensors import deserialize
    from safetensors.flax import save_file

    leaves, tree = jax.tree.flatten(result)
    save_file({str(i): leaf for i, leaf in enumerate(leaves)}, tmp_path / "quantized.safetensors")
    dtypes = {"F8_E4M3": jnp.float8_e4m3fn, "F32": np.float32, "I32": np.int32}
    loaded = {
        key: np.frombuffer(view["data"], dtypes[view["dtype"]]).reshape(view["shape"])
        for key, view in deserialize((tmp_path / "quantized.safetensors").read_bytes())
    }
    back = jax.tree.unflatten(tree, [loaded[str(i)] for i in range(len(leaves))])
    assert isinstance(back, type(result))
    assert same(back, result)


def test_tree_functions(result):
    """jax.tree maps over a result and keeps its type; its leaves have named paths."""
    shapes = jax.tree.map(jnp.shape, result)
    assert isinstance(shapes, type(result))
    assert same(jax.tree.map(lambda leaf: leaf, result), result)
    for part in filter(lambda part: hasattr(part, "_fields"), result if type(result) is tuple else [result]):
        paths = {str(path[0]) for path, _ in jax.tree.leaves_with_path(part)}
        assert paths == {f".{field}" for field in part._fields}


def test_flax_nnx_module(x):
    """A Flax NNX module whose expert layer is grouped_linear trains."""
    import optax
    from flax import nnx

    class Experts(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 96, 32)) / 96**0.5)

        def __call__(self, x, group_sizes):
            return jax_tsq.grouped_linear(x, self.w[...], group_sizes)

    model = Experts(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        def loss_of(model):
            return jnp.mean(jnp.square(model(x, SIZES).astype(jnp.float32) - 1))

        loss, gradient = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer, x)) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_chex_assertions(x):
    """chex sees shapes, dtypes and trees as of any arrays."""
    import chex

    ragged = jax_tsq.ragged_transpose_quant(x, SIZES)
    chex.assert_shape(ragged.values, (96, 512))
    chex.assert_type(ragged.values, jnp.float8_e4m3fn)
    chex.assert_trees_all_equal_shapes_and_dtypes(ragged, jax.tree.map(jnp.copy, ragged))


def test_jaxtyping_annotations(x):
    """jaxtyping annotations hold when checked at run time."""
    from jaxtyping import Array, BFloat16, Float8e4m3fn, Float32, Int32, jaxtyped

    @jaxtyped(typechecker=None)
    def quantize(x):
        return jax_tsq.ragged_transpose_quant(x, SIZES)

    result = quantize(x)
    assert isinstance(x, BFloat16[Array, "M K"])
    assert isinstance(result.values, Float8e4m3fn[Array, "96 512"])
    assert isinstance(result.scales, Float32[Array, "4 96"])
    assert isinstance(result.padded_sizes, Int32[Array, "3"])


def test_pytorch_through_dlpack(x):
    """bfloat16 tokens come from PyTorch and scales go there without a copy; FP8 goes as bytes."""
    torch = pytest.importorskip("torch", reason="PyTorch is not part of the test extra")
    tokens = torch.from_dlpack(x)
    assert tokens.dtype == torch.bfloat16
    result = jax_tsq.ragged_transpose_quant(jnp.from_dlpack(tokens), SIZES)
    assert same(result, jax_tsq.ragged_transpose_quant(x, SIZES))
    assert torch.from_dlpack(result.scales).cpu().numpy().tobytes() == np.asarray(result.scales).tobytes()
    raw = torch.from_dlpack(jax.lax.bitcast_convert_type(result.values, jnp.uint8))
    values = raw.view(torch.float8_e4m3fn)
    assert values.shape == (96, 512)
    assert raw.cpu().numpy().tobytes() == np.asarray(result.values).tobytes()
    back = jax.lax.bitcast_convert_type(jnp.from_dlpack(values.view(torch.uint8)), jnp.float8_e4m3fn)
    assert same(back, result.values)
