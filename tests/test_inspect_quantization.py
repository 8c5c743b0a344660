"""The inspection of a model's quantization: what a recorder keeps, what is measured of it, and the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import dispatch

import jax_tsq
from examples import inspect_quantization as inspection

X = jax.random.normal(jax.random.key(0), (400, 128), jnp.bfloat16).at[384:].set(jnp.nan)  # the last rows are not in use
W = jax.random.normal(jax.random.key(1), (3, 128, 64), jnp.float32)
DY = jax.random.normal(jax.random.key(2), (400, 64), jnp.bfloat16)
SIZES = jnp.array([100, 0, 284], jnp.int32)


def gradient(linear, w, dy):
    """dW of a jitted step, in which dy is the gradient of what a layer returns."""

    def loss(w):
        return jnp.sum(linear(X, w, SIZES).astype(jnp.float32) * dy.astype(jnp.float32))

    return jax.jit(jax.grad(loss))(w)


def recorded(dy=DY):
    recorder = inspection.Recorder()
    gradient(recorder.linear("one"), W, dy)
    return recorder.layers()


def test_recorder_keeps_operands_and_changes_nothing():
    """The layer's gradient is that of the layer without a recorder; the operands are those of the call."""
    recorder = inspection.Recorder()
    found = gradient(recorder.linear("one"), W, DY)
    np.testing.assert_array_equal(found, gradient(jax_tsq.grouped_linear, W, DY))
    (operands,) = recorder.layers().values()
    for kept, given in zip(operands, (X, W, SIZES, DY), strict=True):
        np.testing.assert_array_equal(np.asarray(kept, np.float32), np.asarray(given, np.float32))


def test_layer_without_gradient():
    """A layer that only ran forwards has no dy to inspect."""
    dispatch.runtime_tokens.clear()  # of failed calls in other tests, which a barrier reports again
    recorder = inspection.Recorder()
    recorder.linear("one")(X, W, SIZES)
    with pytest.raises(ValueError, match="one has not"):
        recorder.layers()


def test_errors_of_normal_data():
    """They are those of docs/numerics.md; powers of two cost more; scaling dy changes nothing, rows behind neither."""
    report = inspection.inspect(recorded())["one"]
    for scales, most in (("any", 1.0), ("powers of two", 1.15)):
        found = report.found[scales]
        assert 0.02 < found["x"] < 0.0255 * most and 0.02 < found["dy"] < 0.0255 * most
        assert all(0.03 < found[name] < 0.039 * most for name in ("y", "dx", "dW"))
        assert found["x subnormal"] < 0.002 and found["dy lost"] < 0.001
    assert report.found["any"]["dW"] < report.found["powers of two"]["dW"]
    small = inspection.inspect(recorded(DY * 2.0**-30))["one"].found["powers of two"]
    assert small == report.found["powers of two"]


def test_maxima():
    """log2 of the largest magnitudes of each group's blocks of 128 tokens."""
    (found,) = (report.maxima["x"] for report in inspection.inspect(recorded()).values())
    x = np.asarray(X, np.float32)
    blocks = [x[0:100], x[100:228], x[228:356], x[356:384]]
    expected = np.log2([np.abs(block).max(axis=0) for block in blocks])
    np.testing.assert_allclose(np.sort(found), np.sort(expected.ravel()), atol=1e-5)


def test_subnormal():
    """Bytes 1 to 7 of float8_e4m3fn, of those that are not 0."""
    values = jax.lax.bitcast_convert_type(jnp.array([0, 0x80, 1, 0x87, 8, 0x7E], jnp.uint8), jnp.float8_e4m3fn)
    assert inspection.subnormal(values) == 0.5


def test_command_line(tmp_path, monkeypatch, capsys):
    """One command prints the table and leaves a picture."""
    monkeypatch.setattr("sys.argv", ["inspect", "--steps", "1", "--output", str(tmp_path / "picture.png")])
    inspection.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:13].strip() for line in lines[1:9:2]] == ["0 gate and up", "0 down", "1 gate and up", "1 down"]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
