"""ragged_weight_gradient with an accumulator: one addition to the byte, in place wherever JAX can donate."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_tsq import ragged_weight_gradient
from jax_tsq._core import ffi, kernels
from tests import spec
from tests.cases import assert_same_bytes, bfloat16
from tests.test_wgrad import CHECKS, DY, PATHS, SHAPES, X, pair


@pytest.fixture(params=PATHS)
def device(request, monkeypatch):
    """A device whose programs take one of the paths."""
    monkeypatch.setenv(kernels.SETTING, PATHS[request.param][0])
    return PATHS[request.param][1]


def is_reproducible(device):
    """Whether every program has the same sums: for portable ones on GPUs XLA looks for the fastest product anew."""
    return device.platform == "cpu" or kernels.setting() == "native"


def accumulated(accumulate, x, dy):
    return ragged_weight_gradient(x, dy, accumulate=accumulate)


def run(function, device, *arguments, **options):
    """In a program of its own, for which the setting is read again."""
    return np.asarray(jax.jit(lambda *a: function(*a), **options)(*jax.device_put(arguments, device)))


def terms(x, dy, seed=2):
    """What dW is added to: normal numbers, zeros of both signs, and some that are not finite."""
    shape = (len(x.padded_sizes), len(x.values), len(dy.values))
    result = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    for i, other in enumerate((-0.0, 0.0, np.inf, -np.inf, np.nan)):
        result.reshape(-1)[i::17] = other
    return result


def assert_added(device, result, accumulate, x, dy):
    """The bytes of accumulate + dW; groups without tokens keep those of accumulate."""
    dw = run(ragged_weight_gradient, device, x, dy)
    rows = spec.taken_rows(x.padded_sizes, x.values.shape[1], True)
    expected = np.where((rows > 0)[:, None, None], accumulate + dw, accumulate)
    assert_same_bytes(result[rows == 0], accumulate[rows == 0])
    if is_reproducible(device):
        is_nan = np.isnan(expected)  # whose bytes processors choose
        assert np.isnan(result[is_nan]).all()
        assert_same_bytes(result[~is_nan], expected[~is_nan])
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * np.abs(dw).max(initial=0))


@pytest.mark.parametrize("donated", [(), (0,)], ids=["kept", "donated"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bytes(device, shape, donated):
    """One float32 addition of what the call gives without an accumulator, whose memory XLA gives away or copies."""
    x, dy = pair(*shape)
    accumulate = terms(x, dy)
    result = run(accumulated, device, accumulate, x, dy, donate_argnums=donated)
    assert_added(device, result, accumulate, x, dy)


@pytest.mark.parametrize("shape", [(0, 8, 128, [128]), (8, 0, 128, [128]), (8, 8, 0, [0, 5]), (8, 8, 128, [])], ids=str)
def test_empty_arrays(device, shape):
    """No features, tokens or groups: what is added to."""
    x, dy = pair(*shape)
    accumulate = terms(x, dy)
    assert_same_bytes(run(accumulated, device, accumulate, x, dy), accumulate)


def test_what_is_added_to_can_be_used_again(device):
    """The same array added to twice, and returned as it was."""
    x, dy = pair(68, 72, 512, [128, 0, 384])
    accumulate = np.nan_to_num(terms(x, dy))  # processors choose what the negative of a NaN is
    arguments = jax.device_put((accumulate, x, dy), device)
    one, other, same = jax.jit(lambda a, x, dy: (accumulated(a, x, dy), accumulated(-a, x, dy), a))(*arguments)
    assert_added(device, np.asarray(one), accumulate, x, dy)
    assert_added(device, np.asarray(other), -accumulate, x, dy)
    assert_same_bytes(same, accumulate)


@pytest.mark.parametrize("mapped", [(0, 0, 0), (None, 0, 0), (0, None, None), (2, 0, 1)], ids=str)
def test_vmap(device, mapped):
    """Any of the operands batched, along any axis."""
    pairs = [pair(68, 72, 512, sizes) for sizes in ([128, 384], [512, 0], [0, 256])]
    parts = [(terms(*operands, seed=i), *operands) for i, operands in enumerate(pairs)]
    arguments, expected = [], []
    for column, axis in zip(zip(*parts, strict=True), mapped, strict=True):
        one = column[0]
        arguments.append(one if axis is None else jax.tree.map(lambda *a, axis=axis: np.stack(a, axis), *column))
        expected.append([one] * 3 if axis is None else column)
    result = run(jax.vmap(accumulated, mapped), device, *arguments)
    for got, *operands in zip(result, *expected, strict=True):
        assert_added(device, got, *operands)


# --- In place --------------------------------------------------------------------------------------------------------


def copies(compiled):
    """How many instructions of a program copy an array of the shape of dW."""
    shape = rf"f32\[{len(X.padded_sizes)},{len(X.values)},{len(DY.values)}\]"
    return len(re.findall(rf"= \(?{shape}\S* copy(?:-start)?\(", compiled.as_text()))


def over_microbatches(accumulate, x, dy):
    return jax.lax.scan(lambda a, operands: (accumulated(a, *operands), None), accumulate, (x, dy))[0]


@pytest.mark.parametrize("function", [accumulated, over_microbatches], ids=["jit", "scan"])
def test_donation(device, function):
    """A donated accumulator is the result's memory, under jit and as a scan's carry; one that is kept is copied."""
    accumulate, x, dy = terms(X, DY), X, DY
    if function is over_microbatches:
        x, dy = jax.tree.map(lambda a: np.stack([a] * 3), (x, dy))
    arguments = jax.device_put((accumulate, x, dy), device)
    arguments = (jnp.negative(arguments[0]), *arguments[1:])  # on CPU, memory of JAX, not of numpy
    kept, donated = (jax.jit(lambda *a: function(*a), donate_argnums=d) for d in ((), (0,)))
    assert copies(donated.lower(*arguments).compile()) == 0
    if function is over_microbatches:
        assert copies(kept.lower(*arguments).compile()) == 1
    pointer = arguments[0].unsafe_buffer_pointer()
    result = donated(*arguments)
    assert arguments[0].is_deleted() and result.unsafe_buffer_pointer() == pointer
    expected = -accumulate
    for _ in range(3 if function is over_microbatches else 1):
        expected = run(accumulated, device, expected, X, DY)
    if is_reproducible(device):
        assert_same_bytes(result, expected)
    else:
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("accumulates", [True, False], ids=["accumulate", "plain"])
def test_call_for_cuda(monkeypatch, accumulates):
    """The native call gives the memory of its sixth operand to its result, and nothing beside it computes."""
    monkeypatch.setenv(kernels.SETTING, "native")
    monkeypatch.setattr(ffi, "HAS_CUDA", True)
    monkeypatch.setattr(ffi, "check_driver", lambda: None)
    function = jax.jit(accumulated if accumulates else lambda _, x, dy: ragged_weight_gradient(x, dy))
    with jax.default_device(jax.devices("cpu")[0]):
        exported = jax.export.export(function, platforms=["cuda"], disabled_checks=CHECKS)
        text = exported(terms(X, DY), X, DY).mlir_module()
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", "constant", "return", "output_operand_alias"}
    found = re.findall(r"output_operand_alias<output_tuple_indices = \[\], *operand_index = (\d)", text)
    assert found == (["5"] if accumulates else [])


def test_export(device):
    """Written, read back and run."""
    accumulate = terms(X, DY)
    platform = "cuda" if device.platform == "gpu" else device.platform
    with jax.default_device(device):
        function = jax.jit(lambda *a: accumulated(*a))
        exported = jax.export.export(function, platforms=[platform], disabled_checks=CHECKS)(accumulate, X, DY)
        result = jax.export.deserialize(exported.serialize()).call(*jax.device_put((accumulate, X, DY), device))
        assert_added(device, np.asarray(result), accumulate, X, DY)


# --- What is refused -------------------------------------------------------------------------------------------------

A = terms(X, DY)
BAD = {
    "list": (TypeError, dict(accumulate=A.tolist()), r"^accumulate must be float32; got list"),
    "bfloat16": (TypeError, dict(accumulate=A.astype(bfloat16)), r"^accumulate must be float32; got bfloat16"),
    "bfloat16 result": (
        TypeError,
        dict(accumulate=A, dtype=bfloat16),
        r"^dtype must be float32 with accumulate.*bfloa",
    ),
    "one group": (
        ValueError,
        dict(accumulate=A[0]),
        r"^accumulate must be \[E, K, N\], here \[2, 64, 72\]; got .*64, 72",
    ),
    "transposed": (ValueError, dict(accumulate=A.swapaxes(1, 2)), r"^accumulate must be \[E, K, N\].*72, 64"),
    "batched": (ValueError, dict(accumulate=A[None]), r"^accumulate must be .*jax\.vmap"),
}


@pytest.mark.parametrize(("error", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(error, arguments, message):
    """The argument, the rule, and what was got."""
    with pytest.raises(error, match=message):
        ragged_weight_gradient(X, DY, **arguments)


def test_derivative_is_refused():
    """With respect to the accumulator, too."""
    with pytest.raises(NotImplementedError, match="custom_vjp"):
        jax.grad(lambda a: accumulated(a, X, DY).sum())(jnp.asarray(A))
