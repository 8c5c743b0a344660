"""ragged_quantize: byte for byte its two parts; and where one of them is not used, only the other runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.interpreters import partial_eval

import jax_tsq
from tests import layouts, spec
from tests.cases import BF16_KINDS, assert_same_bytes, bfloat16, matrix, normal

MOST = 2**31 - 1
# Sizes for 300 rows: all in use and not, empty groups, whole blocks, and every way to break the rules.
SIZES = [
    *[[300, 0, 0, 0], [0, 0, 0, 0], [100, 0, 156, 1], [128, 0, 128, 0], [1, 1, 1, 1]],
    *[[-5, 10, 0, 0], [200, 0, 0, 200], [0, MOST, MOST, 5], [130, -1, 129, MOST]],
]
OPTIONS = pytest.mark.parametrize("aligned", [False, True], ids=["", "aligned"])


@settings(max_examples=100)
@given(
    features=st.sampled_from([256, 129, 5]),
    group_sizes=st.sampled_from(SIZES),
    pow_2_scales=st.booleans(),
    aligned=st.booleans(),
    kinds=st.sets(st.sampled_from(sorted(BF16_KINDS))),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_specification(implementation, features, group_sizes, pow_2_scales, aligned, kinds, seed):
    """Generated cases: any mixture of kinds of blocks along tokens, any sizes."""
    x, _ = matrix(seed, bfloat16, [300], features, sorted(kinds))
    options = dict(pow_2_scales=pow_2_scales, aligned=aligned)
    sizes = np.int32(group_sizes)
    assert_same_bytes(jax.tree.leaves(implementation.dual(x, sizes, **options)), spec.dual(x, sizes, **options))


@pytest.mark.parametrize(
    "shape", [(0, 5), (5, 0), (0, 0), (1, 1), (3, 128), (129, 127), (2, 2162), (515, 640)], ids=str
)
def test_equals_its_parts(implementation, shape):
    """Any M and K, from 0 up: what the single calls write."""
    x, sizes = normal(shape)[0], np.int32([shape[0] // 2, 0, shape[0] // 3])
    parts = implementation.rows(x, sizes), implementation.ragged(x, sizes)
    assert_same_bytes(implementation.dual(x, sizes), parts)


@pytest.mark.parametrize("sizes", [[], [1] * 40, [7] * 1030], ids=len)
def test_numbers_of_groups(implementation, sizes):
    """No group, and more than there are threads in a block."""
    x, sizes = normal([300, 5])[0], np.int32(sizes)
    assert_same_bytes(jax.tree.leaves(implementation.dual(x, sizes)), spec.dual(x, sizes))


@pytest.mark.parametrize("pow_2_scales", [False, True], ids=["", "pow2"])
def test_every_bf16_value(implementation, pow_2_scales):
    """All 65,536 values of bfloat16, alone as maxima of a row's and of a column's block, and beside 1."""
    x = np.zeros([256, 65536 // 256 * 128], bfloat16)
    x[:, ::128] = np.arange(65536, dtype=np.uint16).view(bfloat16).reshape(256, 256)
    every = np.arange(32768, dtype=np.uint16)
    x[0], x[128] = every.view(bfloat16), (every + 32768).astype(np.uint16).view(bfloat16)
    x[200, 1::128] = 1
    sizes = np.int32([256])
    assert_same_bytes(jax.tree.leaves(implementation.dual(x, sizes, pow_2_scales)), spec.dual(x, sizes, pow_2_scales))


@pytest.mark.parametrize("soil", [np.nan, np.inf], ids=str)
def test_rows_past_the_sum(implementation, soil):
    """What lies there reaches no byte of the results."""
    x, sizes = normal([300, 200])[0], np.int32([100, 3, 0, 50])
    expected = spec.dual(x, sizes)
    x[153:] = soil
    assert_same_bytes(jax.tree.leaves(implementation.dual(x, sizes)), expected)


def test_batches(implementation):
    """Two batch dimensions of both operands."""
    x = np.stack([matrix(seed, bfloat16, [200], 130)[0] for seed in range(6)])
    sizes = np.int32([[200, 0], [7, 8], [0, 0], [-1, 39], [150, 150], [128, 1]])
    results = jax.tree.leaves(implementation.dual(x.reshape(2, 3, 200, 130), sizes.reshape(2, 3, 2)))
    for i, (one, its_sizes) in enumerate(zip(x, sizes, strict=True)):
        assert_same_bytes([leaf.reshape(6, *leaf.shape[2:])[i] for leaf in results], spec.dual(one, its_sizes))


# --- Dead results ----------------------------------------------------------------------------------------------------

X, GROUPS = jax.ShapeDtypeStruct((300, 256), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.int32)
# What is used of both results -> the call that is left.
USED = {
    "rows": (lambda rows, columns: rows, ["rows"]),
    "values of rows": (lambda rows, columns: rows.values, ["rows"]),
    "scales of rows": (lambda rows, columns: rows.scales, ["rows"]),
    "columns": (lambda rows, columns: columns, ["ragged"]),
    "scales of columns": (lambda rows, columns: columns.scales, ["ragged"]),
    "padded sizes": (lambda rows, columns: columns.padded_sizes, ["ragged"]),
    "both": (lambda rows, columns: (rows.scales, columns.values), ["dual"]),
    "rows and padded sizes": (lambda rows, columns: (rows, columns.padded_sizes), ["dual"]),
    "nothing": (lambda rows, columns: (), []),
}


@OPTIONS
@pytest.mark.parametrize("used", USED)
def test_only_what_is_used(used, aligned):
    """A compiled program holds the call of one part where the other is dead, its bytes are the same."""
    select, expected = USED[used]
    quantize = functools.partial(jax_tsq.ragged_quantize, pow_2_scales=True, aligned=aligned)
    compiled = jax.jit(lambda x, sizes: select(*quantize(x, sizes))).lower(X, GROUPS).compile()
    assert layouts.calls(compiled) == expected
    x, sizes = matrix(0, bfloat16, [300], 256)[0], np.int32([130, -1, 129])
    leaves = spec.dual(x, sizes, pow_2_scales=True, aligned=aligned)
    whole = jax_tsq.RowQuantized(*leaves[:2]), jax_tsq.RaggedQuantized(*leaves[2:])
    assert_same_bytes(jax.tree.leaves(compiled(x, sizes)), jax.tree.leaves(select(*whole)))


@pytest.mark.parametrize("used", USED)
def test_only_what_is_used_of_a_batch(used):
    """The same under vmap, and in the body of a loop."""
    select, expected = USED[used]

    def function(x, sizes):
        return select(*jax_tsq.ragged_quantize(x, sizes))

    def loop(x, sizes):
        return jax.lax.scan(lambda carry, operands: (carry, function(*operands)), 0, (x, sizes))

    operands = [jax.ShapeDtypeStruct((2, *shape.shape), shape.dtype) for shape in (X, GROUPS)]
    for program in (jax.vmap(function), loop):
        assert layouts.calls(jax.jit(program).lower(*operands).compile()) == expected


def test_parts_keep_their_types():
    """A part that would not have the types that the whole has, as it may be on a mesh, does not take its place."""
    jaxpr = jax.make_jaxpr(lambda x, sizes: jax_tsq.ragged_quantize(x, sizes)[1])(X, GROUPS).jaxpr
    (call,) = jaxpr.eqns
    for aval, left in [(call.outvars[2].aval, "ragged"), (call.outvars[2].aval.update(weak_type=True), "dual")]:
        call.outvars[2].aval = aval
        changed, _ = partial_eval.dce_jaxpr(jaxpr.replace(), [True] * len(jaxpr.outvars))
        assert [eqn.primitive.name for eqn in changed.eqns] == [f"jax_tsq_{left}"]


@jax.custom_vjp
def layer(x, sizes):
    """Rows for a product, columns for its weight gradient."""
    return product(jax_tsq.ragged_quantize(x, sizes)[0])


def product(quantized):
    return jax_tsq.dequantize(quantized, dtype=jnp.bfloat16)


def forward(x, sizes):
    rows, columns = jax_tsq.ragged_quantize(x, sizes)
    return product(rows), columns


def backward(columns, dy):
    return dy + product(columns).sum(), None


layer.defvjp(forward, backward)


def stack(x, sizes):
    """Two layers and a loss, whose gradient needs the columns of both."""
    for _ in range(2):
        x = layer(x, sizes)
    return x.astype(jnp.float32).sum()


def test_without_checkpoint():
    """One read gives both."""
    compiled = jax.jit(jax.value_and_grad(stack)).lower(X, GROUPS).compile()
    assert layouts.calls(compiled) == ["dual", "dual"]


def test_checkpoint():
    """Rows in the forward pass, columns when it is computed again; rows then only as input of the next layer."""

    def checkpointed(x, sizes):
        for _ in range(2):
            x = jax.checkpoint(layer)(x, sizes)
        return x.astype(jnp.float32).sum()

    compiled = jax.jit(jax.value_and_grad(checkpointed)).lower(X, GROUPS).compile()
    assert layouts.calls(compiled) == ["ragged", "ragged", "rows", "rows"]


def test_checkpoint_of_a_stack():
    """The last layer's rows are dead in the recomputation, the first one's are the second one's input."""
    compiled = jax.jit(jax.value_and_grad(jax.checkpoint(stack))).lower(X, GROUPS).compile()
    assert layouts.calls(compiled) == ["dual", "ragged", "rows", "rows"]
