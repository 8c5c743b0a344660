"""Bad input: TypeError or ValueError with the argument, the rule, what was got and the fix, before anything runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq
from tests.operations import OPERATIONS, Call, Shape

SHAPE = Shape(counts=(172, 128), sizes=((172, 100),), features=130)
X = np.ones([300, 130], jnp.bfloat16)
X8 = np.ones([300, 130], jnp.float8_e4m3fn)
SCALES = np.ones([300, 2], np.float32)
SIZES = np.int32([172, 100])


def caller(name):
    """The public function with right arguments, of which some can be replaced: x, input_scales and any by keyword."""
    call = Call(name, SHAPE)

    def function(x=X, input_scales=None, **others):
        scales = {} if input_scales is None else dict(input_scales=input_scales)
        return call.row.call(**call.operands | call.options | dict(x=x) | scales | others)

    return function


FUNCTIONS = {name: caller(name) for name, row in OPERATIONS.items() if row.operands.get("x") == "tokens features"}
split, ragged, rows, dual = (FUNCTIONS[name] for name in ("split", "ragged", "rows", "dual"))


def rejects(error, function, *words):
    """The error of the right type holds all the words, in any order."""
    with pytest.raises(error) as raised:
        function()
    message = str(raised.value)
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"


def parametrize(names):
    return pytest.mark.parametrize("operation", [FUNCTIONS[name] for name in names], ids=names)


ALL = parametrize(list(FUNCTIONS))
SCALED = parametrize([name for name in FUNCTIONS if "input_scales" in OPERATIONS[name].operands])
UNSCALED = parametrize([name for name in FUNCTIONS if "input_scales" not in OPERATIONS[name].operands])


@ALL
@pytest.mark.parametrize(
    "dtype",
    [
        *[np.float64, np.float32, np.float16, np.int8, np.uint8, np.int32, bool, np.complex64],
        *[jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fnuz],
    ],
    ids=lambda dtype: np.dtype(dtype).name,
)
def test_dtype_of_x(operation, dtype):
    """Only bfloat16 and float8_e4m3fn, of numpy and JAX arrays, before JAX turns float64 into float32."""
    x = np.ones([300, 130]).astype(dtype)
    name = np.dtype(dtype).name
    rejects(TypeError, lambda: operation(x), r"^x\b", "bfloat16", rf"\b{name}\b", "astype|[Cc]ast")
    if dtype not in (np.float64,):
        rejects(TypeError, lambda: operation(jnp.asarray(x)), r"^x\b", "bfloat16", rf"\b{name}\b", "astype|[Cc]ast")


@UNSCALED
def test_no_fp8(operation):
    """What makes rows is for bfloat16 alone."""
    rejects(TypeError, lambda: operation(X8), r"^x\b", "bfloat16", "float8_e4m3fn")


@ALL
@pytest.mark.parametrize("x", [None, [[1.0, 2.0]], 3.0, "x"], ids=repr)
def test_x_is_no_array(operation, x):
    """Python values have no dtype to trust."""
    rejects(TypeError, lambda: operation(x), r"^x\b", "array", type(x).__name__)


@ALL
@pytest.mark.parametrize("shape", [(), (300,), (2, 300, 130)], ids=str)
def test_dimensions_of_x(operation, shape):
    """Not two-dimensional: the shape got is shown, vmap named."""
    x = np.ones(shape, jnp.bfloat16)
    rejects(ValueError, lambda: operation(x), r"^x\b", "two-dimensional", re.escape(str(list(shape))), "vmap")


class Tensor:
    """An array of a library whose dtypes are its own, as PyTorch's and TensorFlow's are."""

    shape, dtype, ndim = (300, 130), object(), 2

    def __dlpack__(self, **_):
        raise NotImplementedError


@ALL
def test_arrays_of_other_libraries(operation):
    """They are no arrays here: the error says how to make one."""
    rejects(TypeError, lambda: operation(Tensor()), r"^x must be an array", "Tensor", r"jnp\.from_dlpack\(x\)")
    sizes = "tokens_per_expert" if operation is split else "group_sizes"
    rejects(TypeError, lambda: operation(**{sizes: Tensor()}), f"^{sizes} must be", "Tensor")


def test_layers_and_arrays_of_other_libraries():
    """The same of the operands of layers."""
    w = np.ones([2, 130, 128], np.float32)
    for function, bad in [
        (lambda: jax_tsq.grouped_linear(X, Tensor(), SIZES), "w"),
        (lambda: jax_tsq.ragged_dot(Tensor(), w, SIZES), "lhs"),
        (lambda: jax_tsq.moe_mlp(X, w, Tensor(), SIZES), "w_down"),
        (lambda: jax_tsq.moe_mlp(X, w, np.swapaxes(w, 1, 2)[:, :64], SIZES, Tensor()), "weights"),
        (lambda: jax_tsq.grouped_linear(X, w, SIZES, accumulate=Tensor()), "accumulate"),
        (lambda: jax_tsq.quantize_blocks(Tensor()), "w"),
    ]:
        rejects(TypeError, function, rf"^{bad} must be", "Tensor")


@ALL
def test_raises_while_tracing(operation):
    """The same errors under jit, eval_shape and vmap, when the function is traced."""
    x = jax.ShapeDtypeStruct((300, 130), jnp.float32)
    rejects(TypeError, lambda: jax.eval_shape(operation, x), r"^x\b", "float32")
    rejects(TypeError, lambda: jax.jit(operation)(np.ones([300, 130], np.float32)), r"^x\b", "float32")
    rejects(ValueError, lambda: jax.vmap(operation)(X), r"^x\b", "two-dimensional")


@ALL
@pytest.mark.parametrize("flag", [0, 1, None, "yes", 1.0, np.int64(1), np.ones(1, bool)], ids=repr)
def test_pow_2_scales(operation, flag):
    """Neither bool nor numpy bool."""
    rejects(TypeError, lambda: operation(pow_2_scales=flag), r"^pow_2_scales\b", "True or False|bool")


@ALL
def test_traced_pow_2_scales(operation):
    """A JAX array, traced or not, is no flag."""
    rejects(TypeError, lambda: operation(pow_2_scales=jnp.array(True)), r"^pow_2_scales\b", "bool")
    function = jax.jit(lambda flag: operation(pow_2_scales=flag))
    rejects(TypeError, lambda: function(True), r"^pow_2_scales\b", "tracing|static")


@SCALED
def test_missing_input_scales(operation):
    """float8_e4m3fn x without scales: the shape wanted is shown, and what makes them."""
    rejects(ValueError, lambda: operation(X8), r"^input_scales\b", r"300, 2", "None", "quantize_rows")


@SCALED
def test_unwanted_input_scales(operation):
    """Scales beside bfloat16 x."""
    rejects(ValueError, lambda: operation(X, SCALES), r"^input_scales\b", "None", "bfloat16", r"300, 2")


@SCALED
@pytest.mark.parametrize("shape", [(2, 300), (300, 1), (300, 130), (3, 130), (299, 2), (300,), (1, 300, 2)], ids=str)
def test_shape_of_input_scales(operation, shape):
    """Another shape: both are shown."""
    scales = np.ones(shape, np.float32)
    rejects(ValueError, lambda: operation(X8, scales), "^input_scales", r"300, 2", re.escape(str(list(shape))))


@SCALED
@pytest.mark.parametrize(
    "dtype", [np.float64, jnp.bfloat16, np.float16, np.int32, np.uint8], ids=lambda dtype: np.dtype(dtype).name
)
def test_dtype_of_input_scales(operation, dtype):
    """Only float32, before JAX turns float64 into it."""
    scales = np.ones([300, 2], dtype)
    rejects(TypeError, lambda: operation(X8, scales), "^input_scales", "float32", rf"\b{np.dtype(dtype).name}\b")


@SCALED
@pytest.mark.parametrize("scales", [1.0, [[1.0]], "scales"], ids=repr)
def test_input_scales_are_no_array(operation, scales):
    """Python values."""
    rejects(TypeError, lambda: operation(X8, scales), "^input_scales", "array", type(scales).__name__)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([172.0, 128.0], ["float", "172.0"]),
        ([172, np.float32(128)], ["float32"]),
        ([True, 299], ["bool", "True"]),
        ([np.True_, 299], ["bool"]),
        (["172", "128"], ["str", "172"]),
        ([None, 300], ["None"]),
        ([[172], [128]], ["list"]),
        (np.float32([172, 128]), ["float32"]),
        (np.array([True] * 300), ["bool"]),
        (np.int32([[172, 128]]), [r"1, 2"]),
        (np.int32(300), ["int32"]),
        (jnp.float32([172, 128]), ["float32"]),
        (300, ["int", "300", r"\[M\]"]),
        (None, ["None"]),
        ("300", ["str"]),
        ({300: 1}, ["dict"]),
    ],
    ids=lambda value: repr(value) if len(repr(value)) < 40 else "",
)
def test_type_of_counts(counts, words):
    """Floats, bools, strings, arrays of another dtype or rank, no sequence."""
    rejects(TypeError, lambda: split(tokens_per_expert=counts), "^tokens_per_expert", "int", *words)


@pytest.mark.parametrize("convert", [list, np.int64, jnp.int32], ids=["list", "numpy", "jax"])
def test_negative_counts(convert):
    """The negative count and its position are shown."""
    rejects(
        ValueError, lambda: split(tokens_per_expert=convert([172, -3, 131])), "^tokens_per_expert", "-3", r"\b1\b", "0"
    )


@pytest.mark.parametrize("counts", [[172, 127], [172, 129], [300, 300], [], [2**62, 2**62]], ids=str)
def test_sum_of_counts(counts):
    """Counts that do not sum to M: both numbers are shown."""
    rejects(
        ValueError,
        lambda: split(tokens_per_expert=counts),
        "^tokens_per_expert",
        r"\b300\b",
        rf"\b{sum(counts)}\b",
        "[Ss]lice|correct",
    )


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap], ids=["jit", "vmap"])
def test_traced_counts(transform):
    """A traced array, or traced ints: the error names ragged_transpose_quant."""
    counts = jnp.int32([[172, 128]]) if transform is jax.vmap else jnp.int32([172, 128])
    function = transform(lambda counts: split(tokens_per_expert=counts))
    rejects(TypeError, lambda: function(counts), "^tokens_per_expert", "traced", "ragged_transpose_quant")
    function = transform(lambda counts: split(tokens_per_expert=[counts[0], 128]))
    rejects(TypeError, lambda: function(counts), "^tokens_per_expert", "traced", "ragged_transpose_quant")


@pytest.mark.parametrize(
    "helper", ["ragged", "rows", "dual", "pad_group_sizes", "pad_rows", "unpad_rows", "check_group_sizes"]
)
@pytest.mark.parametrize(
    ("sizes", "error", "words"),
    [
        (np.float32([172, 128]), TypeError, ["float32"]),
        (np.array([True, False]), TypeError, ["bool"]),
        ([172, 128], TypeError, ["list", "asarray"]),
        (300, TypeError, ["int 300"]),
        (None, TypeError, ["None"]),
        (np.int32(300), ValueError, [r"\[\]", "one-dimensional"]),
        (np.int32([[172, 128]]), ValueError, [r"1, 2", "one-dimensional", "vmap"]),
    ],
    ids=repr,
)
def test_group_sizes(helper, sizes, error, words):
    """Only integers [E]."""
    if helper == "rows" and sizes is None:  # there they may be left out
        return
    functions = dict(
        ragged=lambda: ragged(group_sizes=sizes),
        rows=lambda: rows(group_sizes=sizes),
        dual=lambda: dual(group_sizes=sizes),
        pad_group_sizes=lambda: jax_tsq.pad_group_sizes(sizes),
        pad_rows=lambda: jax_tsq.pad_rows(X, sizes),
        unpad_rows=lambda: jax_tsq.unpad_rows(X, sizes, 100),
        check_group_sizes=lambda: jax_tsq.check_group_sizes(sizes, 300),
    )
    rejects(error, functions[helper], "^group_sizes", "int32", *words)


@pytest.mark.parametrize("layout", ["Packed", "", None, 1, True], ids=repr)
def test_layout(layout):
    """Neither "packed" nor "flat": both are named."""
    rejects(
        (TypeError, ValueError), lambda: ragged(layout=layout), "^layout", "packed", "flat", re.escape(repr(layout))
    )


@pytest.mark.parametrize("flag", [0, 1, None, "yes", np.int64(1)], ids=repr)
def test_aligned(flag):
    """Neither bool nor numpy bool."""
    rejects(TypeError, lambda: ragged(aligned=flag), r"^aligned\b", "True or False|bool")
    rejects(TypeError, lambda: dual(aligned=flag), r"^aligned\b", "True or False|bool")
    rejects(TypeError, lambda: jax_tsq.padded_tokens(3, 3, aligned=flag), r"^aligned\b")
    rejects(TypeError, lambda: jax_tsq.check_group_sizes(SIZES, 300, aligned=flag), r"^aligned\b")


def test_too_many_padded_tokens():
    """Padded rows are counted in int32: more are an error, not an overflow."""
    x = jax.ShapeDtypeStruct((2**31 - 200, 4), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((8,), jnp.int32)
    padded = jax_tsq.padded_tokens(*x.shape[:1], 8)
    for function in (ragged, dual):
        call = lambda x, sizes, f=function: f(x, group_sizes=sizes)  # noqa: E731
        rejects(ValueError, lambda c=call: jax.eval_shape(c, x, sizes), "x", "group_sizes", str(padded))
    x = jax.ShapeDtypeStruct((2**31, 4), jnp.bfloat16)
    rejects(ValueError, lambda: jax.eval_shape(jax_tsq.quantize_rows, x, sizes), r"^x\b", str(2**31), "Split")
    assert jax.eval_shape(rows, x).values.shape == x.shape  # only with sizes


W = np.ones([2, 130, 8], np.float32)


@pytest.mark.parametrize(
    ("w", "error", "words"),
    [
        (None, TypeError, ["None", "asarray"]),
        (W.tolist(), TypeError, ["list", "asarray"]),
        ((W, None), TypeError, ["tuple"]),
        (map(np.asarray, [W]), TypeError, ["map"]),
        (W.astype(np.float64), TypeError, [r"float64\[2, 130, 8\]", "Cast"]),
        ((W, W.astype(np.float16)), TypeError, ["float16", "Cast"]),
        (jax_tsq.BlockQuantized(*[W.astype(jnp.float8_e4m3fn)] * 2, W), TypeError, ["float8_e4m3fn"]),
        (W[0], ValueError, [r"130, 8", r"\[E, K, N\]", "vmap"]),
        ((W, W[None]), ValueError, [r"1, 2, 130, 8", "vmap"]),
        ((W, W.astype(jnp.bfloat16)), ValueError, ["same dtype", r"bfloat16\[2, 130, 8\]"]),
        ((W, W[:1]), ValueError, ["same dtype, E and K", r"float32\[1, 130, 8\]"]),
        ((W, W[:, :5]), ValueError, [r"float32\[2, 5, 8\]"]),
        ((), ValueError, ["1 to 16", "got 0"]),
        ((W,) * 17, ValueError, ["1 to 16", "got 17", "concatenate"]),
    ],
    ids=[
        *["None", "list", "None in a tuple", "iterator", "float64", "float16 in a tuple", "result"],
        *["two-dimensional", "batch"],
        *["dtypes differ", "E differs", "K differs", "none", "too many"],
    ],
)
def test_weights(w, error, words):
    """One float32 or bfloat16 array [E, K, N], or some that can be joined."""
    rejects(error, lambda: jax_tsq.quantize_blocks(w), r"^w\b", *words)
    rejects(TypeError, lambda: jax_tsq.quantize_blocks(W, pow_2_scales=1), r"^pow_2_scales\b", "True or False")
    with pytest.raises(TypeError, match="positional"):
        jax_tsq.quantize_blocks(W, True)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, 3), ValueError, ["^tokens", "-1"]),
        ((3, -1), ValueError, ["^groups", "-1"]),
        ((3.0, 3), TypeError, ["^tokens", "float"]),
        ((3, True), TypeError, ["^groups", "bool"]),
        ((None, 3), TypeError, ["^tokens", "None"]),
    ],
    ids=str,
)
def test_padded_tokens(arguments, error, words):
    """Only ints from 0 up."""
    rejects(error, lambda: jax_tsq.padded_tokens(*arguments), *words)


def test_rows_of_helpers():
    """pad_rows and unpad_rows need an array with rows, unpad_rows a number of tokens."""
    for name, function in [("x", jax_tsq.pad_rows), ("y", lambda y, sizes: jax_tsq.unpad_rows(y, sizes, 3))]:
        rejects(TypeError, lambda f=function: f([1.0, 2.0], SIZES), rf"^{name}\b", "array", "list")
        rejects(ValueError, lambda f=function: f(np.float32(3), SIZES), rf"^{name}\b", "rows")
    for tokens in [3.0, True, None, jnp.array([3])]:
        rejects(TypeError, lambda tokens=tokens: jax_tsq.unpad_rows(X, SIZES, tokens), r"^tokens\b")
    rejects(ValueError, lambda: jax_tsq.unpad_rows(X, SIZES, -1), r"^tokens\b", "-1")
    rejects(TypeError, lambda: jax.jit(jax_tsq.unpad_rows)(X, SIZES, 3), r"^tokens\b", "tracing")


@ALL
def test_names_of_options(operation):
    """Options of ragged_transpose_quant are keyword-only; unknown ones are Python's own errors."""
    with pytest.raises(TypeError, match="positional"):
        jax_tsq.ragged_transpose_quant(X, SIZES, None)
    with pytest.raises(TypeError, match="positional"):
        jax_tsq.quantize_rows(X, SIZES, True)
    with pytest.raises(TypeError, match="positional"):
        jax_tsq.ragged_quantize(X, SIZES, True)
    with pytest.raises(TypeError, match="unexpected"):
        operation(power_of_two=True)
