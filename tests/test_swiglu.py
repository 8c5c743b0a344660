"""swiglu_quantize and swiglu_backward_quantize: byte for byte what quantizes the specified h and do1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_tsq
from tests.cases import BF16_KINDS, assert_same_bytes, bfloat16, matrix
from tests.conftest import Implementation
from tests.operations import DSWIGLU, SWIGLU
from tests.spec.swiglu import swiglu_backward
from tests.test_bad_input import rejects

F32 = np.float32
M, F = 300, 256
SIZES = np.int32([130, 0, 129])
SPECIAL = F32([0, -0.0, np.inf, -np.inf, np.nan, 1e-38, 1e-45, 3e38, -1])
LIMITS = [None, 0.7, 7.0, 1e-3]


def operands(seed=0, features=F, kinds=("normal",), tokens=M):
    """Gates and ups, dh and routing weights."""
    gate_up, _ = matrix(seed, bfloat16, [tokens], 2 * features, kinds)
    dh, _ = matrix(seed + 1, bfloat16, [tokens], features, kinds)
    return gate_up, dh, np.random.default_rng(seed).random(tokens, F32)


def check(implementation, gate_up, dh, sizes, weights, *, aligned=False, **options):
    """Both functions against the specification."""
    actual = implementation.swiglu(gate_up, sizes, weights, **options)
    assert_same_bytes(actual, SWIGLU.expect(gate_up=gate_up, group_sizes=sizes, weights=weights, **options))
    options["aligned"] = aligned
    actual = implementation.dswiglu(gate_up, dh, sizes, weights, **options)
    expected = DSWIGLU.expect(gate_up=gate_up, dh=dh, group_sizes=sizes, weights=weights, **options)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    assert_same_bytes(jax.tree.leaves(actual), jax.tree.leaves(expected))


# Any two options with all their values, and few programs to compile.
PROGRAMS = [
    (has_weights, dict(limit=limit, pow_2_scales=pow_2_scales, aligned=pow_2_scales ^ (i % 2 > 0)))
    for i, limit in enumerate(LIMITS)
    for pow_2_scales in (False, True)
    for has_weights in [pow_2_scales ^ (i // 2 > 0)]
]


@settings(max_examples=40)
@given(
    sizes=st.sampled_from([[300, 0, 0], [0, 0, 0], [100, 1, 156], [-5, 10, 2**31 - 1], [128, 0, 128], [200, 0, 200]]),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    program=st.sampled_from(PROGRAMS),
    seed=st.integers(0, 2**31),
)
def test_equals_specification(implementation, sizes, kinds, program, seed):
    """Any mixture of kinds of blocks, any sizes; weights that make infinities, NaN and subnormals."""
    gate_up, dh, weights = operands(seed, kinds=sorted(kinds))
    weights[::3] = np.resize(SPECIAL, 100)
    has_weights, options = program
    check(implementation, gate_up, dh, np.int32(sizes), weights if has_weights else None, **options)


EVERY_GATE = np.arange(2**16, dtype=np.uint16).view(bfloat16)
# A limit only changes gates above it: with one, all of its binade, and every sixteenth of the others.
NEAR_LIMIT = [EVERY_GATE[0x3F00:0x3F80], EVERY_GATE[0xBF00:0xBF80], EVERY_GATE[::16]]
GATES = [(None, EVERY_GATE), (0.7, np.concatenate(NEAR_LIMIT))]


@pytest.mark.parametrize(("limit", "gates"), GATES, ids=["None", "0.7"])
def test_every_gate(implementation, limit, gates):
    """Each alone in its block of a row, beside ups, gradients and weights that are not special."""
    rng, tokens = np.random.default_rng(0), len(gates) // 4
    gate_up = rng.standard_normal((tokens, 1024)).astype(bfloat16)
    gate_up[:, :512] = 0
    gate_up[:, 7:512:128] = gates.reshape(-1, 4)
    dh, weights = rng.standard_normal((tokens, 512)).astype(bfloat16), rng.random(tokens, F32)
    check(implementation, gate_up, dh, np.int32([tokens]), weights, limit=limit)


@pytest.mark.parametrize(("has_weights", "limit"), [(True, 0.7), (False, None)])
def test_equals_its_parts(implementation, has_weights, limit):
    """What the quantizers of the package make of h and do1."""
    gate_up, dh, weights = operands(5)
    weights = weights if has_weights else None
    do1, dweights, h = swiglu_backward(gate_up, dh, weights, limit)
    assert_same_bytes(implementation.swiglu(gate_up, SIZES, weights, limit=limit), implementation.rows(h, SIZES))
    *columns, actual = implementation.dswiglu(gate_up, dh, SIZES, weights, limit=limit)
    assert_same_bytes(columns, [*implementation.dual(do1, SIZES), implementation.ragged(h, SIZES)])
    if dweights is None:
        assert actual is None
    else:
        dweights[SIZES.sum() :] = 0
        assert_same_bytes(actual, dweights)


@pytest.mark.parametrize("soil", [np.nan, np.inf], ids=str)
def test_rows_past_the_sum(implementation, soil):
    """What lies there, in any operand, reaches no byte of the results."""
    clean = operands(6)
    soiled = [np.array(a) for a in clean]
    for a in soiled:
        a[SIZES.sum() :] = soil
    for name, drop in (("swiglu", 1), ("dswiglu", None)):
        call = functools.partial(getattr(implementation, name))
        results = [call(*[a for i, a in enumerate(ops[:2]) if i != drop], SIZES, ops[2]) for ops in (clean, soiled)]
        assert_same_bytes(*map(jax.tree.leaves, results))


# Shapes, and which of three lists of sizes the reference, which is slow to compile, takes with them.
SHAPES = {(0, 128): 0, (5, 0): 1, (0, 0): 0, (1, 128): 1, (129, 384): 2}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(implementation, shape):
    """Any M from 0 up, and no features; no group, and more than there are threads in a block."""
    tokens, features = shape
    gate_up, dh, weights = operands(7, features, tokens=tokens)
    lists = [tokens // 2, tokens // 3], [], [1] * 1030
    for sizes in [lists[SHAPES[shape]]] if implementation.name == "reference" else lists:
        check(implementation, gate_up, dh, np.int32(sizes), weights)


# --- Sizes that no native code takes ---------------------------------------------------------------------------------

PORTABLE = Implementation("reference", jax.devices("cpu")[0])


@pytest.mark.parametrize(("features", "has_weights"), [(1, True), (127, True), (129, True), (200, True), (129, False)])
def test_other_features(features, has_weights):
    """Any F: blocks of do1 then hold gates and ups, and the last block of a sum is shorter."""
    for kinds in (None, ("normal",)):
        gate_up, dh, weights = operands(8, features, kinds)
        check(PORTABLE, gate_up, dh, SIZES, weights if has_weights else None, limit=3.0)


@pytest.mark.parametrize("features", [128, 200])
def test_the_kernels_rule(monkeypatch, features):
    """Native code where F is a multiple of 128; forced elsewhere, an error that says so."""
    gate_up, dh, weights = operands(9, features)
    for function, arguments in [
        (jax_tsq.swiglu_quantize, (gate_up, SIZES, weights)),
        (jax_tsq.swiglu_backward_quantize, (gate_up, dh, SIZES, weights)),
    ]:
        program = jax.jit(lambda *a, function=function: function(*a))
        used = jax_tsq.kernels_used(program.lower(*arguments).compile())
        assert used == ({function.__name__: 1} if features == 128 else {})
        if features == 200:
            monkeypatch.setenv("JAX_TSQ_KERNELS", "native")
            jax.clear_caches()
            rejects(ValueError, lambda program=program, a=arguments: program.lower(*a), "multiple of 128; got 200")
            monkeypatch.delenv("JAX_TSQ_KERNELS")


def test_symbolic_tokens_and_features():
    """F that is not known takes pure JAX."""
    scope = jax.export.SymbolicScope()
    gate_up, dh, weights = operands(10, 128)
    shapes = [
        jax.ShapeDtypeStruct(jax.export.symbolic_shape(dims, scope=scope), a.dtype)
        for dims, a in (("300, 2*f", gate_up), ("300, f", dh))
    ]
    program = jax.jit(lambda gate_up, dh: jax_tsq.swiglu_backward_quantize(gate_up, dh, SIZES, weights))
    exported = jax.export.export(program, platforms=["cpu"])(*shapes)
    expected = DSWIGLU.expect(gate_up=gate_up, dh=dh, group_sizes=SIZES, weights=weights)
    actual = exported.call(*jax.device_put((gate_up, dh), jax.devices("cpu")[0]))
    assert_same_bytes(jax.tree.leaves(actual), jax.tree.leaves(expected))


# --- Bad input -------------------------------------------------------------------------------------------------------

GATE_UP, DH, WEIGHTS = operands(11)


def forward(gate_up=GATE_UP, group_sizes=SIZES, weights=WEIGHTS, **options):
    return jax_tsq.swiglu_quantize(gate_up, group_sizes, weights, **options)


def backward(gate_up=GATE_UP, group_sizes=SIZES, weights=WEIGHTS, dh=DH, **options):
    return jax_tsq.swiglu_backward_quantize(gate_up, dh, group_sizes, weights, **options)


BAD = [
    (
        TypeError,
        dict(gate_up=GATE_UP.astype(F32)),
        r"^gate_up must have dtype bfloat16",
        r"float32\[300, 512\]",
        "astype",
    ),
    (TypeError, dict(gate_up=[GATE_UP, GATE_UP]), r"^gate_up must be an array", r"jnp\.concatenate\(gate_up\)"),
    (TypeError, dict(gate_up=None), r"^gate_up must be an array", "NoneType"),
    (ValueError, dict(gate_up=GATE_UP[None]), r"^gate_up must be two-dimensional", r"\[1, 300, 512\]", "vmap"),
    (ValueError, dict(gate_up=GATE_UP[:, 1:]), r"^gate_up must be \[M, 2 \* F\]", r"\[300, 511\]", "concatenate"),
    (TypeError, dict(weights=WEIGHTS.astype(bfloat16)), r"^weights must be float32\[300\]", "bfloat16", "astype"),
    (TypeError, dict(weights=0.5), r"^weights must be float32\[300\]", "float 0.5", "asarray"),
    (ValueError, dict(weights=WEIGHTS[1:]), r"^weights must be float32\[300\]", r"float32\[299\]"),
    (ValueError, dict(weights=WEIGHTS[:, None]), r"^weights must be float32\[300\]", r"\[300, 1\]", "Flatten"),
    (TypeError, dict(group_sizes=WEIGHTS), r"^group_sizes must be an integer array"),
    (ValueError, dict(group_sizes=np.int32([300, 1])), r"^group_sizes must sum to at most the 300 tokens"),
    (TypeError, dict(pow_2_scales=1), "^pow_2_scales must be True or False"),
    (TypeError, dict(limit="7"), "^limit must be None or a finite number above 0", "str '7'"),
    (TypeError, dict(limit=True), "^limit must be None", "bool True"),
    *((ValueError, dict(limit=x), "^limit must be None", "None") for x in (0, -1.0, np.inf, np.nan, 1e40, 1e-60)),
    (ValueError, dict(limit=10**400), "^limit must be None", "None"),
    (ValueError, dict(limit=1e-39), r"^limit must be None .* 2\*\*-126", "got 1e-39"),  # 0 on XLA's threads
]


@pytest.mark.parametrize("function", [forward, backward], ids=["swiglu", "dswiglu"])
@pytest.mark.parametrize(("error", "changes", "words"), [(error, changes, words) for error, changes, *words in BAD])
def test_bad_input(function, error, changes, words):
    """Each error names the argument, the rule, what was got and the fix."""
    rejects(error, lambda: function(**changes), *words)


def test_bad_gradient():
    """dh has half the features of gate_up, and aligned is a bool."""
    rejects(ValueError, lambda: backward(dh=GATE_UP), r"^dh must be \[M, F\]", r"\[300, 512\] and .*\[300, 512\]")
    rejects(ValueError, lambda: backward(dh=DH[1:]), r"^dh must be \[M, F\]", r"\[299, 256\]")
    rejects(TypeError, lambda: backward(dh=DH.astype(F32)), r"^dh must have dtype bfloat16")
    rejects(TypeError, lambda: backward(aligned=0), "^aligned must be True or False")


def test_traced_limit():
    """A limit is part of the program."""
    rejects(
        TypeError, lambda: jax.jit(lambda limit: forward(limit=limit))(jnp.float32(7)), "limit .* known when tracing"
    )


@pytest.mark.parametrize("function", [forward, backward], ids=["swiglu", "dswiglu"])
def test_too_many_tokens(function):
    """Shapes alone: 2**31 tokens."""
    many = jax.ShapeDtypeStruct((2**31, 256), jnp.bfloat16), jax.ShapeDtypeStruct((2**31, 128), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((3,), jnp.int32)

    def call(gate_up, dh, sizes):
        return function(gate_up, sizes, None, **({} if function is forward else {"dh": dh}))

    rejects(ValueError, lambda: jax.eval_shape(call, *many, sizes), r"^gate_up .*2\*\*31 - 128", "2147483648", "Split")
