"""Products with more than 2^31 elements: what repeats in the operands repeats in the results."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jax_tsq
from tests.conftest import NATIVE

pytestmark = pytest.mark.skipif("cuda" not in NATIVE, reason="takes a GPU's memory bandwidth")

PERIOD = 384  # tokens


def normal(*shape):
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.bfloat16)


def matmul():
    """x and y are large; the rows of a group do not depend on where they are."""
    features, repeats = 1040, 5400
    assert PERIOD * repeats * features > 2**31
    w = jax_tsq.quantize_blocks(normal(1, features, features))
    rows = jax_tsq.quantize_rows(normal(PERIOD, features))
    large = jax.tree.map(lambda a: jnp.tile(a, (repeats, 1)), rows)
    expected = jax_tsq.ragged_matmul(rows, w, jnp.array([PERIOD]))
    result = jax_tsq.ragged_matmul(large, w, jnp.array([PERIOD * repeats]))
    return result.reshape(repeats, PERIOD, features), expected


def wgrad(accumulate):
    """dW is large; groups of the same tokens have the same."""
    groups, features, columns = 300, 2048, 4096
    assert groups * features * columns > 2**31
    sizes = jnp.array([PERIOD])
    one = [jax_tsq.ragged_transpose_quant(normal(PERIOD, n), sizes, aligned=True) for n in (features, columns)]
    large = [
        a._replace(
            values=jnp.tile(a.values, (1, groups)),
            scales=jnp.tile(a.scales, (groups, 1)),
            padded_sizes=jnp.tile(a.padded_sizes, groups),
        )
        for a in one
    ]
    added = jnp.ones((groups, features, columns)) if accumulate else None
    result = jax_tsq.ragged_weight_gradient(*large, accumulate=added)
    return result, jax_tsq.ragged_weight_gradient(*one, accumulate=None if added is None else added[:1])[0]


@pytest.mark.parametrize(
    "run",
    [matmul, functools.partial(wgrad, False), functools.partial(wgrad, True)],
    ids=["matmul", "wgrad", "accumulate"],
)
def test_huge(run):
    result, expected = run()
    assert jax.jit(lambda a, b: (a == b).all())(result, expected)
