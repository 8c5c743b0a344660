"""What error messages propose: the way out that keeps the meaning, for arguments that people pass by mistake."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_tsq

X = jnp.ones((300, 130), jnp.bfloat16)
W = jnp.ones((2, 130, 8))
SIZES = np.int32([172, 100])
ROWS = jax_tsq.quantize_rows(X)
E5M2 = X.astype(jnp.float8_e5m2)


def ragged(x, **options):
    return jax_tsq.ragged_transpose_quant(x, SIZES, **options)


def linear(x, w=W):
    return jax_tsq.grouped_linear(x, w, SIZES)


HINTS = {
    "arrays for x": (lambda: ragged([X, X]), r"got list of bfloat16\[300, 130\], bf.*Use jnp\.concatenate\(x\)\.$"),
    "arrays for rows": (lambda: jax_tsq.pad_rows((X, X), SIZES), r"got tuple of bf.*Use jnp\.concatenate\(x\)\.$"),
    "numbers for x": (lambda: ragged([[1.0]]), r"got list \[\[1\.0\]\]\. Use jnp\.asarray\(x, jnp\.bfloat16\)"),
    "arrays for w": (lambda: linear(X, list(W)), r"got list of float32\[130, 8\].*Use jnp\.stack\(w\)\.$"),
    "a dict": (lambda: ragged({"x": X}), r"got dict of bfloat16\[300, 130\]"),
    "a row-wise result": (lambda: ragged(ROWS), r"got RowQuantized of .*Pass x\.values with input_scales=x\.scales"),
    "a row-wise result in bfloat16's place": (lambda: linear(ROWS), r"Pass jax_tsq\.dequantize\(x, dtype=jnp.bfloat16"),
    "fp8 in bfloat16's place": (lambda: linear(ROWS.values), r"Cast it by jax_tsq\.dequantize\(jax_tsq\.RowQuantized"),
    "another fp8 with scales": (lambda: ragged(E5M2, input_scales=ROWS.scales), "Multiply it by its scales in float32"),
    "batch dimensions": (lambda: linear(X[None]), r"Reshape it, or use jax\.vmap .* with in_axes None"),
    "x and w exchanged": (lambda: linear(W, X), r"x must be \[M, K\] and w \[E, K, N\].*Exchange the two"),
}


@pytest.mark.parametrize(("call", "message"), HINTS.values(), ids=HINTS)
def test_hint(call, message):
    """No contents of arrays, and a fix that does not lead astray."""
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        call()
    assert "Array(" not in str(raised.value)


def test_batch_dimensions_with_shared_weights():
    """What the message proposes works."""
    y = jax.eval_shape(jax.vmap(jax_tsq.grouped_linear, (0, None, 0)), X[None], W, SIZES[None])
    assert y.shape == (1, 300, 8)
