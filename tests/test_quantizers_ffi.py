"""FFI targets that quantize, but split and ragged, called directly: bytes of right calls, errors for wrong ones."""

import jax
import numpy as np
import pytest

import jax_tsq  # noqa: F401  registers the targets
from tests import spec
from tests.cases import assert_same_bytes, bfloat16, float8_e4m3fn, matrix

Shape = jax.ShapeDtypeStruct
FP8, F32, I32, BF16 = float8_e4m3fn, np.float32, np.int32, bfloat16
M, K, N = 300, 200, 260
X, _ = matrix(0, BF16, [M], K)
SIZES = np.int32([130, -5, 0, 70])
P = spec.padded_tokens(M, len(SIZES))
W = matrix(1, BF16, [2 * K], N)[0].reshape(2, K, N)

ROWS = [Shape((M, K), FP8), Shape((M, 2), F32)]
DUAL = [*ROWS, Shape((K, P), FP8), Shape((P // 128, K), F32), Shape((4,), I32)]
BLOCKS = [Shape((2, K, N), FP8), Shape((2, N, K), FP8), Shape((2, 2, 3), F32)]
F = 256
GATE_UP, _ = matrix(2, BF16, [M], 2 * F)
DH, _ = matrix(3, BF16, [M], F, ["normal", "zero"])
WEIGHTS = np.random.default_rng(4).random(M, F32)
SWIGLU = [Shape((M, F), FP8), Shape((M, F // 128), F32)]
DSWIGLU = [
    *(Shape((M, 2 * F), FP8), Shape((M, 2 * F // 128), F32)),
    *(Shape((2 * F, P), FP8), Shape((P // 128, 2 * F), F32)),
    *(Shape((F, P), FP8), Shape((P // 128, F), F32)),
    *(Shape((4,), I32), Shape((M,), F32), Shape((F // 128, M), F32)),
]
FLAGS = dict(pow_2_scales=False, aligned=False)
NO_LIMIT = np.float32(0)
TARGETS = {
    "rows": ([X, SIZES], ROWS, FLAGS),
    "dual": ([X, SIZES], DUAL, FLAGS),
    "blocks": ([W], BLOCKS, dict(pow_2_scales=False)),
    "swiglu": ([GATE_UP, SIZES, WEIGHTS], SWIGLU, dict(pow_2_scales=False, limit=NO_LIMIT)),
    "dswiglu": ([GATE_UP, DH, SIZES, WEIGHTS], DSWIGLU, dict(**FLAGS, limit=NO_LIMIT)),
}


def shapes(arrays):
    return [Shape(a.shape, a.dtype) for a in arrays]


def call(device, target, operands, results, **attributes):
    operands = [jax.device_put(operand, device) for operand in operands]
    layouts = [None] * len(results)
    if target != "blocks" and len(results) > 1 and len(results[1].shape) > 1:
        batch = len(results[1].shape) - 2
        layouts[1] = (*range(batch), batch + 1, batch)  # scales of rows lie as [blocks of features, tokens]
    # Without a side effect XLA drops calls whose results are all empty.
    function = jax.ffi.ffi_call("jax_tsq." + target, results, output_layouts=layouts, has_side_effect=True)
    with jax.default_device(device):
        return jax.block_until_ready(function(*operands, **attributes))


def refused(device, target, operands, results):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
        call(device, target, operands, results, **TARGETS[target][2])


@pytest.mark.parametrize("pow_2_scales", [False, True])
@pytest.mark.parametrize("shape", [(300, 200), (1, 1), (17, 127), (129, 8500), (0, 5), (5, 0)], ids=str)
def test_rows(ffi_device, shape, pow_2_scales):
    """Blocks of all kinds, whole and partial ones; with sizes, rows past their sum are not looked at."""
    tokens, features = shape
    # `matrix` makes blocks along columns.
    x = np.ascontiguousarray(matrix(tokens, BF16, [features], tokens)[0].T)
    expected = spec.rows(x, None, pow_2_scales)
    actual = call(ffi_device, "rows", [x], shapes(expected), pow_2_scales=pow_2_scales, aligned=False)
    assert_same_bytes(actual, expected)
    for sizes, aligned in [
        ([tokens // 2, -5, tokens // 4], False),
        ([tokens // 2, -5, tokens // 4], True),
        ([], False),
    ]:
        sizes = np.int32(sizes)
        flags = dict(pow_2_scales=pow_2_scales, aligned=aligned)
        expected = spec.rows(x, sizes, **flags)
        assert_same_bytes(call(ffi_device, "rows", [x, sizes], shapes(expected), **flags), expected)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sizes", [[130, -5, 0, 70], [2**31 - 1, 1], [0], [], [128, 128]], ids=str)
def test_dual(ffi_device, sizes, aligned):
    """Both parts are those of the operations that give one of them."""
    for x in (X, X[:, :0], X[:0]):
        expected = spec.dual(x, np.int32(sizes), True, aligned)
        operands = [x, np.int32(sizes)]
        actual = call(ffi_device, "dual", operands, shapes(expected), pow_2_scales=True, aligned=aligned)
        assert_same_bytes(actual, expected)


@pytest.mark.parametrize("pow_2_scales", [False, True])
@pytest.mark.parametrize(
    ("experts", "rows", "columns"),
    [
        (2, 130, [200, 57, 3]),
        (1, 1, [1]),
        (3, 256, [384]),
        (1, 300, [128, 128]),
        (2, 64, [0, 70]),
        (2, 0, [9]),
        (0, 9, [9]),
    ],
    ids=str,
)
def test_blocks(ffi_device, experts, rows, columns, pow_2_scales):
    """Weights of any bits, in parts that share blocks; float32 is what its rounding to bfloat16 is."""
    rng = np.random.default_rng(rows)
    for kind in ("normal", "any", "ties"):
        weights = []
        for n in columns:
            bits = rng.integers(2**32, size=(experts, rows, n), dtype=np.uint32)
            if kind == "normal":
                bits = rng.standard_normal((experts, rows, n), F32).view(np.uint32)
            elif kind == "ties":
                bits = bits & np.uint32(0xFFFF0000) | np.uint32(0x8000)
            weights.append(bits.view(F32))
        expected = spec.blocks(weights, pow_2_scales)
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = [w.astype(BF16) for w in weights]
        for operands in (weights, rounded):
            actual = call(ffi_device, "blocks", operands, shapes(expected), pow_2_scales=pow_2_scales)
            assert_same_bytes(actual, expected)


def swiglu(device, gate_up, dh, weights, sizes, limit=None, pow_2_scales=False, aligned=False):
    """What both targets give, beside what is specified: the workspace is anybody's."""
    sizes = np.int32(sizes)
    given = [] if weights is None else [weights]
    flags = dict(pow_2_scales=pow_2_scales, limit=np.float32(limit or 0))
    expected = spec.swiglu_quantize(gate_up, sizes, weights, pow_2_scales, limit)
    yield call(device, "swiglu", [gate_up, sizes, *given], shapes(expected), **flags), expected
    expected = spec.swiglu_backward_quantize(gate_up, dh, sizes, weights, pow_2_scales, aligned, limit)
    expected = [result for result in expected if result is not None]
    workspace = [Shape((dh.shape[1] // 128, len(w)), F32) for w in given]
    results = [*shapes(expected), *workspace]
    actual = call(device, "dswiglu", [gate_up, dh, sizes, *given], results, **flags, aligned=aligned)
    yield actual[: len(expected)], expected


@pytest.mark.parametrize("pow_2_scales", [False, True])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["no weights", "weights"])
def test_swiglu(ffi_device, weights, limit, pow_2_scales):
    """Gates and ups of all kinds, under sizes of all kinds; rows past the sum are not looked at."""
    for sizes, aligned in [([130, -5, 0, 70], False), ([130, -5, 0, 170], True), ([2**31 - 1, 1], False), ([], False)]:
        for actual, expected in swiglu(
            ffi_device, GATE_UP, DH, weights, sizes, limit, pow_2_scales=pow_2_scales, aligned=aligned
        ):
            assert_same_bytes(actual, expected)


def test_swiglu_empty(ffi_device):
    """No tokens, and no features: the weights' gradient is 0 then."""
    for gate_up, dh, weights in [(GATE_UP[:0], DH[:0], WEIGHTS[:0]), (GATE_UP[:, :0], DH[:, :0], WEIGHTS)]:
        for actual, expected in swiglu(ffi_device, gate_up, dh, weights, [100, 30]):
            assert_same_bytes(actual, expected)


def test_every_gate(ffi_device):
    """Every bfloat16 as a gate, by itself in a block, with ups, gradients and weights that are not special."""
    gates = np.arange(2**16, dtype=np.uint16).view(BF16)
    rng = np.random.default_rng(5)
    for start in range(0, 2**16, 2**13):
        gate_up = np.zeros((2**13, 256), BF16)
        gate_up[:, 77] = gates[start : start + 2**13]
        gate_up[:, 128:] = rng.standard_normal((2**13, 1))
        dh = np.broadcast_to(rng.standard_normal((2**13, 1)).astype(BF16), (2**13, 128)).copy()
        weights = rng.random(2**13, F32)
        for actual, expected in swiglu(ffi_device, gate_up, dh, weights, [2**13]):
            assert_same_bytes(actual, expected)


def test_special_weights(ffi_device):
    """Weights that make infinities, NaN and subnormals."""
    weights = np.resize(np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-38, 1e-45, 3e38, -1]), M)
    for actual, expected in swiglu(ffi_device, GATE_UP, DH, weights, [M]):
        assert_same_bytes(actual, expected)


def test_every_bfloat16(ffi_device):
    """Every bfloat16 beside a maximum of every exponent, in a row block and in a square one."""
    everything = np.arange(2**16, dtype=np.uint16)
    for exponent in range(0, 256, 5):
        amax = exponent << 7 | 0x25
        below = np.where((everything & 0x7FFF) > amax, everything & 0x8000 | amax // 2, everything)
        x = np.concatenate([np.full((520, 1), amax, np.uint16), np.resize(below, (520, 127))], axis=1).view(BF16)
        expected = spec.rows(x)
        assert_same_bytes(call(ffi_device, "rows", [x], shapes(expected), **FLAGS), expected)
        w = x[:512].reshape(4, 128, 128)
        expected = spec.blocks([w])
        assert_same_bytes(call(ffi_device, "blocks", [w], shapes(expected), pow_2_scales=False), expected)


def test_every_maximum(ffi_device):
    """Every finite bfloat16 as the largest magnitude of a row block and of a square one."""
    amax = np.arange(0x7F80, dtype=np.uint16)
    x = np.stack([amax, amax // 2, amax | 0x8000, np.full_like(amax, 0xFFC0)], axis=1).view(BF16)
    for pow_2_scales in (False, True):
        values, scales = expected = spec.rows(x, None, pow_2_scales)
        actual = call(ffi_device, "rows", [x], shapes(expected), pow_2_scales=pow_2_scales, aligned=False)
        assert_same_bytes(actual, expected)
        expected = [values[:, None], values[:, :, None], scales[:, None]]
        actual = call(ffi_device, "blocks", [x[:, None]], shapes(expected), pow_2_scales=pow_2_scales)
        assert_same_bytes(actual, expected)


def test_batched(ffi_device):
    """Leading batch dimensions."""
    x = np.stack([[X], [-X]])
    sizes = np.stack([[SIZES], [SIZES[::-1]]])
    for target in ("rows", "dual"):
        results = [Shape((2, 1, *r.shape), r.dtype) for r in TARGETS[target][1]]
        actual = call(ffi_device, target, [x, sizes], results, **TARGETS[target][2])
        expected = spec.dual(-X, SIZES[::-1])[: len(results)]
        assert_same_bytes([r[1, 0] for r in actual], expected)
    for target in ("swiglu", "dswiglu"):
        operands, results, attributes = TARGETS[target]
        operands = [np.stack([[o[::-1]], [o]]) for o in operands]
        results = [Shape((2, 1, *r.shape), r.dtype) for r in results]
        actual = call(ffi_device, target, operands, results, **attributes)
        specification = spec.swiglu_quantize if target == "swiglu" else spec.swiglu_backward_quantize
        expected = specification(*TARGETS[target][0])
        assert_same_bytes([r[1, 0] for r in actual[: len(expected)]], expected)
    results = [Shape((3, *r.shape), r.dtype) for r in BLOCKS]
    actual = call(ffi_device, "blocks", [np.stack([W, W, -W])], results, pow_2_scales=False)
    assert_same_bytes([r[2] for r in actual], spec.blocks([-W]))


@pytest.mark.parametrize(
    "change",
    [
        lambda *operands: operands[:-2],
        lambda *operands: [*operands, operands[-1]],
        lambda *operands: operands[::-1],
        lambda gate_up, *rest: [gate_up.view(np.uint16), *rest],
        lambda gate_up, *rest: [gate_up.astype(F32), *rest],
        lambda gate_up, *rest: [gate_up[:, :-128], *rest],
        lambda gate_up, *rest: [gate_up[:, :-1], *rest],
        lambda gate_up, *rest: [gate_up[:-1], *rest],
        lambda gate_up, *rest: [gate_up[None], *rest],
        lambda gate_up, *rest: [gate_up[0], *rest],
        lambda *operands: [*operands[:-1], operands[-1][:-1]],
        lambda *operands: [*operands[:-1], operands[-1][:, None]],
        lambda *operands: [*operands[:-1], operands[-1].astype(BF16)],
        lambda *operands: [*operands[:-2], operands[-2].astype(F32), operands[-1]],
        lambda *operands: [*operands[:-2], operands[-2][None], operands[-1]],
        lambda *operands: [*operands[:-2], operands[-2][0], operands[-1]],
    ],
)
@pytest.mark.parametrize("target", ["swiglu", "dswiglu"])
def test_swiglu_wrong_operands(ffi_device, target, change):
    """Operands of other types, shapes, numbers and order."""
    operands, results, _ = TARGETS[target]
    refused(ffi_device, target, list(change(*operands)), results)


@pytest.mark.parametrize("dh", [DH[:, :-1], DH[:-1], DH[None], DH.astype(F32), GATE_UP])
def test_dswiglu_wrong_dh(ffi_device, dh):
    """A gradient of another type or shape."""
    refused(ffi_device, "dswiglu", [GATE_UP, dh, SIZES, WEIGHTS], DSWIGLU)


def test_swiglu_weights_decide_results(ffi_device):
    """Without weights they have no gradient, and with weights they have, of one element for each token."""
    shorter = [*DSWIGLU[:-2], Shape((M - 1,), F32), Shape((F // 128, M - 1), F32)]
    for weights, results in [([WEIGHTS], DSWIGLU[:-2]), ([], DSWIGLU), ([WEIGHTS], shorter)]:
        refused(ffi_device, "dswiglu", [GATE_UP, DH, SIZES, *weights], results)


@pytest.mark.parametrize("target", ["rows", "dual"])
@pytest.mark.parametrize(
    "operands",
    [
        [],
        [SIZES, X],
        [X, SIZES, SIZES],
        [np.ones((M, K), F32), SIZES],
        [X.view(np.uint16), SIZES],
        [X.view(np.uint8)[:, ::2].view(FP8), SIZES],
        [X.view(np.uint8)[:, ::2].view(FP8), SIZES, np.ones((M, 2), F32)],
        [X[0], SIZES],
        [X[None], SIZES],
        [X[:-1], SIZES],
        [X[:, :-1], SIZES],
        [X, SIZES.astype(np.uint32)],
        [X, SIZES.astype(F32)],
        [X, SIZES[None]],
        [X, SIZES[0]],
    ],
    ids=lambda operands: " ".join(f"{o.dtype}{list(o.shape)}" for o in operands) or "none",
)
def test_wrong_operands(ffi_device, target, operands):
    """Operands of other types, shapes, numbers and order."""
    refused(ffi_device, target, operands, TARGETS[target][1])


def test_dual_needs_sizes(ffi_device):
    """Without them only rows are specified."""
    refused(ffi_device, "dual", [X], DUAL)


@pytest.mark.parametrize(
    "operands",
    [
        [],
        [X],
        [W.view(np.float16)],
        [W.view(np.uint16)],
        [W.view(np.uint8)[:, :, ::2].view(FP8)],
        [W[:1]],
        [W[:, :-1]],
        [W[:, :, :-1]],
        [W[None]],
        [W, W],
        [W[:, :, :100], np.ones((2, K, N - 100), F32)],
        [W[:, :, :100], W[:, :-1, 100:]],
        [W[:, :, :100], W[:1, :, 100:]],
        [W[:, :, :100], W[None, :, :, 100:]],
        [W[:, :, :100], W[0, 0, 100:]],
        [W, W[0, 0, 0]],
        [W[:, :, i : i + 16] for i in range(0, N - 16, 15)],
    ],
    ids=lambda operands: " ".join(f"{o.dtype}{list(o.shape)}" for o in operands)[:60] or "none",
)
def test_blocks_wrong_operands(ffi_device, operands):
    """Operands of other types, shapes and numbers; parts that do not fit together; more than 16 of them."""
    refused(ffi_device, "blocks", operands, BLOCKS)


def wrong_results(results):
    """Results left out, repeated, reversed, and each of another type or shape."""
    yield results[:-1]
    yield [*results, results[-1]]
    yield results[::-1]
    for i, result in enumerate(results):
        shape = result.shape
        others = [Shape(shape, np.uint8), Shape(shape, BF16), Shape((1, *shape), result.dtype), Shape((), result.dtype)]
        for axis, size in enumerate(shape):
            others += [Shape((*shape[:axis], n, *shape[axis + 1 :]), result.dtype) for n in (size - 1, size + 1)]
        for other in others:
            yield [other if j == i else r for j, r in enumerate(results)]


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_results(ffi_device, target):
    """Results of other types, shapes, numbers and order."""
    operands, right, _ = TARGETS[target]
    for results in wrong_results(right):
        refused(ffi_device, target, operands, results)


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_attributes(ffi_device, target):
    """Attributes that are missing, of another type, or unknown."""
    operands, right, attributes = TARGETS[target]
    for wrong in ({}, {**attributes, "pow_2_scales": "yes"}, {**attributes, "pow_2": True}):
        with pytest.raises(jax.errors.JaxRuntimeError):
            call(ffi_device, target, operands, right, **wrong)


def test_messages(ffi_device):
    """The error that arrives in Python names the function and the argument."""
    for target, operands, message in [
        ("rows", [np.ones((M, K), F32)], "jax_tsq.quantize_rows: x must be BF16; got F32"),
        ("dual", [X, SIZES.astype(F32)], "jax_tsq.ragged_quantize: group_sizes must be S32"),
        ("blocks", [W.view(np.float16)], "jax_tsq.quantize_blocks: w must be F32 or BF16"),
        ("swiglu", [GATE_UP[:, 2:], SIZES, WEIGHTS], "jax_tsq.swiglu_quantize: gate_up must have two times as many"),
        ("dswiglu", [GATE_UP, X, SIZES, WEIGHTS], "jax_tsq.swiglu_backward_quantize: dh must be BF16[300, 256]"),
    ]:
        _, results, attributes = TARGETS[target]
        with pytest.raises(jax.errors.JaxRuntimeError, match=message.replace("[", r"\[")):
            call(ffi_device, target, operands, results, **attributes)
