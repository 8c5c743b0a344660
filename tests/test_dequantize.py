"""dequantize: float32(value) * scale, rounded to the dtype asked for, in the order of the tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, normal


def product(values, scales, dtype=np.float32):
    """[T, K] of values [T, K] and scales [ceil(T / 128), K]."""
    return (values.astype(np.float32) * np.repeat(scales, 128, axis=0)[: len(values)]).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, bfloat16, np.float16], ids=lambda dtype: np.dtype(dtype).name)
def test_split(dtype):
    """A SplitQuantized, or its two lists, gives a tuple of [T_i, K]."""
    counts = [130, 0, 128]
    x, _ = normal([258, 33])
    quantized = jax_tsq.fused_transpose_split_quant(jnp.asarray(x), None, counts)
    expected = [product(out.T, scale, dtype) for out, scale in zip(*spec.split(x, None, counts), strict=True)]
    for result in [
        jax_tsq.dequantize(quantized, dtype=dtype),
        jax_tsq.dequantize(list(quantized.outs), list(quantized.scales), dtype),
        jax_tsq.dequantize(quantized.outs, quantized.scales, dtype),
    ]:
        assert type(result) is tuple and len(result) == 3
        for actual, part in zip(result, expected, strict=True):
            assert actual.dtype == dtype
            np.testing.assert_array_equal(actual, part, strict=True)


@pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])
@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_ragged(layout, aligned):
    """A RaggedQuantized of either layout gives [P, K], zeros outside the groups."""
    sizes = [128, 0, 256, 128] if aligned else [100, 0, 156, 1]
    x, _ = normal([600, 33])
    quantized = jax_tsq.ragged_transpose_quant(jnp.asarray(x), jnp.int32(sizes), aligned=aligned, layout=layout)
    values, scales, _ = spec.ragged(x, sizes, aligned=aligned)
    for function in [jax_tsq.dequantize, jax.jit(jax_tsq.dequantize)]:
        actual = function(quantized)
        np.testing.assert_array_equal(actual, product(values.T, scales), strict=True)


@pytest.mark.parametrize("layout", ["packed", "flat"])
def test_vmap(layout):
    """Over batches of results, of either layout."""
    x, _ = normal([600, 33])
    sizes = np.int32([[100, 0, 156], [3, 297, 0]])
    quantized = jax.vmap(lambda x, sizes: jax_tsq.ragged_transpose_quant(x, sizes, layout=layout))(
        jnp.asarray(x.reshape(2, 300, 33)), jnp.asarray(sizes)
    )
    actual = jax.vmap(jax_tsq.dequantize)(quantized)
    for i in range(2):
        values, scales, _ = spec.ragged(x.reshape(2, 300, 33)[i], sizes[i])
        np.testing.assert_array_equal(actual[i], product(values.T, scales), strict=True)


@pytest.mark.parametrize("shape", [(5, 300), (0, 5), (5, 0)], ids=str)
def test_rows(shape):
    """A RowQuantized gives [M, K]."""
    x, _ = normal(shape)
    values, scales = spec.rows(x)
    actual = jax_tsq.dequantize(jax_tsq.quantize_rows(jnp.asarray(x)))
    np.testing.assert_array_equal(actual, product(values.T, scales.T).T, strict=True)


def test_no_experts():
    """Nothing in, an empty tuple out."""
    x = jnp.zeros([0, 8], jnp.bfloat16)
    assert jax_tsq.dequantize(jax_tsq.fused_transpose_split_quant(x, None, [])) == ()
    assert jax_tsq.dequantize([], []) == ()


def test_every_value():
    """All 256 values of float8_e4m3fn times scales of every size, subnormal and infinite ones too.

    Only where the product is subnormal may it be flushed to zero, as XLA:CPU does, or rounded twice, as elsewhere.
    """
    values = np.arange(256, dtype=np.uint8).view(spec.float8_e4m3fn)[None].repeat(40 * 128, axis=0)
    scales = np.exp2(np.linspace(-149, 127.9, 40 * 256)).astype(np.float32).reshape(40, 256)
    scales[-1] = np.inf
    (actual,) = jax_tsq.dequantize([jnp.asarray(values.T)], [jnp.asarray(scales)])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = product(values, scales)
    subnormal = np.abs(expected) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(np.where(subnormal, 0, actual), np.where(subnormal, 0, expected), strict=True)
    off = np.abs(np.float64(actual)[subnormal] - expected[subnormal])
    assert ((off <= 2.0**-149) | (np.asarray(actual)[subnormal] == 0)).all()


def test_infinite_scale():
    """A block that held an infinity is NaN altogether, as documented: 0 * inf."""
    x = np.ones([130, 2], bfloat16)
    x[3, 1] = np.inf
    (actual,) = jax_tsq.dequantize(jax_tsq.fused_transpose_split_quant(jnp.asarray(x), None, [130]))
    assert np.isnan(actual[:128, 1]).all()
    assert (actual[:, 0] == 1).all() and (actual[128:, 1] == 1).all()
    assert "inf" in jax_tsq.dequantize.__doc__


def test_relative_error():
    """Normal data comes back to FP8 accuracy: half a step of three mantissa bits, 2^-4, for all but tiny elements."""
    x, _ = normal([384, 64])
    (actual,) = jax_tsq.dequantize(jax_tsq.fused_transpose_split_quant(jnp.asarray(x), None, [384]))
    x = x.astype(np.float32)
    large = np.abs(x) > np.abs(x).max() * 2**-13
    assert np.abs(actual / x - 1)[large].max() <= 2**-4


@functools.cache
def results():
    x = jnp.asarray(normal([300, 3])[0])
    return {
        "split": jax_tsq.fused_transpose_split_quant(x, None, [172, 128]),
        "ragged": jax_tsq.ragged_transpose_quant(x, jnp.int32([100, 200])),
        "flat": jax_tsq.ragged_transpose_quant(x, jnp.int32([100, 200]), layout="flat"),
        "rows": jax_tsq.quantize_rows(x),
    }


@pytest.mark.parametrize("name", ["split", "ragged", "flat", "rows"])
def test_methods(name):
    """Each result brings its own; the function calls it."""
    result = results()[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        assert_same_bytes(
            jax.tree.leaves(result.dequantize(dtype)), jax.tree.leaves(jax_tsq.dequantize(result, dtype=dtype))
        )
    assert_same_bytes(jax.tree.leaves(result.dequantize()), jax.tree.leaves(result.dequantize(jnp.float32)))


@pytest.mark.parametrize("name", ["split", "ragged", "flat", "rows"])
def test_derivatives(name):
    """With respect to scales they are right; with respect to values, lossy in their dtype, they are refused."""
    result = results()[name]
    values = "outs" if name == "split" else "values"

    def loss(field, part):
        return sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(result._replace(**{field: part}).dequantize()))

    scales = result.scales
    gradient = jax.jit(jax.grad(lambda scales: loss("scales", scales)))(scales)
    # The loss is quadratic in the scales.
    along = sum(jnp.vdot(g, s) for g, s in zip(jax.tree.leaves(gradient), jax.tree.leaves(scales), strict=True))
    np.testing.assert_allclose(along, 2 * loss("scales", scales), rtol=1e-4)
    for transform in (jax.grad, lambda f: lambda v: jax.jvp(f, (v,), (v,)), lambda f: jax.jit(jax.grad(f))):
        with pytest.raises(NotImplementedError, match=r"^jax_tsq\.dequantize has no derivative .*custom_vjp"):
            transform(lambda part: loss(values, part))(getattr(result, values))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (lambda q: (q, q.scales), ValueError, "^scales.*None.*SplitQuantized"),
        (lambda q: (q.outs,), ValueError, "^scales.*None"),
        (lambda q: (q.outs, q.scales[:1]), ValueError, r"^scales.*\b2\b.*\b1\b"),
        (lambda q: (q.outs[0], q.scales[0]), TypeError, r"^quantized.*sequence.*3, 172.*\[out\]"),
        (lambda q: (q.scales, q.scales), TypeError, "float8_e4m3fn.*float32"),
        (lambda q: (q.outs, q.outs), TypeError, "scales.*float32.*float8_e4m3fn"),
        (lambda q: (q.outs, [s.T for s in q.scales]), ValueError, r"scales.*2, 3.*3, 2"),
        (lambda q: (q.outs, [s[:, :1] for s in q.scales]), ValueError, r"scales.*2, 3.*2, 1"),
        (lambda q: (q, None, jnp.int32), TypeError, "^dtype.*int32"),
        (lambda q: (None,), TypeError, "^quantized.*None"),
        (
            lambda q: (tuple(q),),
            TypeError,
            r"^quantized.*got a tuple of tuple, tuple\. Pass the result",
        ),
        (lambda q: (list(results()["ragged"]),), TypeError, r"got a list of float8_e4m3fn\[3, 512\], float32.*, int32"),
    ],
    ids=[
        *["unwanted scales", "no scales", "too few scales", "no sequence", "dtype of values", "dtype of scales"],
        *["transposed scales", "broadcast scales", "dtype", "None", "split result's parts", "ragged result's parts"],
    ],
)
def test_bad_input(arguments, error, words):
    """Wrong types, dtypes and shapes are named, and never broadcast into a result."""
    quantized = jax_tsq.fused_transpose_split_quant(jnp.ones([300, 3], jnp.bfloat16), None, [172, 128])
    with pytest.raises(error, match=words):
        jax_tsq.dequantize(*arguments(quantized))
