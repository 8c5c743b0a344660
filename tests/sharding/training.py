"""The training example on one device and on all of them: same losses, whatever the dispatch."""

import functools
import pathlib
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_tsq
from examples import train_moe
from examples.moe import checkpoint, fp8_dispatch, layer, measure, model, training, wire
from tests import mesh

CASES = mesh.Cases()
# Of the hidden features every device has whole blocks, so that one device quantizes them alike.
CONFIG = model.Config(layers=1, features=64, hidden=256, heads=2, context=16, warmup=2, learning_rate=3e-3)
STEPS, CHUNK = 16, 8
MODES = ("bf16", "fp8-residuals-pow2", "fp8-mlp")  # nothing in FP8; all that is stored; all that is multiplied
COMPILATIONS = measure.Compilations()


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What the collective's documentation promises, by gathering everything: XLA:CPU has none."""
    me, rows = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    operands, starts, sizes, targets = (
        jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    # A promise of the caller: what devices expect is what they get.
    nothing = 255 if output.dtype == jnp.uint8 else jnp.nan
    output = jnp.where(jnp.all(recv_sizes == sizes[:, me]), output, jnp.asarray(nothing, output.dtype))
    for source in range(operands.shape[0]):
        target, size = targets[source, me], sizes[source, me]
        row = jnp.clip(rows - target + starts[source, me], 0, len(operand) - 1)
        here = (rows >= target) & (rows < target + size)
        output = jnp.where(here[:, None], operands[source, row], output)
    return output


REAL = jax.lax.ragged_all_to_all
if jax.default_backend() == "cpu":
    jax.lax.ragged_all_to_all = ragged_all_to_all


def make_trainer(mode, everywhere=True, dispatch="replicate", microbatches=1):
    shape = train_moe.default_mesh(len(jax.devices()), CONFIG.experts) if everywhere else (1, 1)
    return model.Trainer(CONFIG, model.make_mesh(shape), mode, dispatch, microbatches)


@functools.cache
def run(mode):
    """The trainer, what it has come to, and compilations after the first chunk of steps."""
    trainer = make_trainer(mode)
    return trainer, *training.train(trainer, 0, STEPS, CHUNK, COMPILATIONS)


@CASES.add(mode=MODES)
def trains(mode):
    """The loss falls and stays near that of bf16; no compilation after the first steps, though routings change."""
    _, result, compilations = run(mode)
    losses = result.losses
    assert losses[-4:].mean() < losses[:2].mean() - 0.5
    assert np.abs(losses - run("bf16")[1].losses).max() < 0.05
    assert compilations == 0 and len({load.tobytes() for load in result.loads}) > STEPS // 2


@CASES.add()
def goes_on_from_a_checkpoint():
    """With the bits of a run that was never stopped; a file of other settings is refused."""
    trainer, whole, _ = run("fp8-mlp")
    identity = {"mode": "fp8-mlp", "seed": 0, "jax": jax.__version__}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "run.npz")
        assert checkpoint.load(path, trainer.state_shardings, identity) is None
        half, _ = training.train(trainer, 0, CHUNK, CHUNK, COMPILATIONS)
        checkpoint.save(path, half, identity)
        assert checkpoint.load(path, trainer.state_shardings, identity | {"seed": 4}) is None
        with pytest.raises(SystemExit, match="and this one has another"):
            checkpoint.load(path, trainer.state_shardings, identity | {"jax": "another"})
        loaded = checkpoint.load(path, trainer.state_shardings, identity)
    resumed, _ = training.train(trainer, 0, STEPS, CHUNK, COMPILATIONS, loaded)
    for one, other in zip(*(jax.tree.leaves(run._replace(milliseconds=0)) for run in (whole, resumed)), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@functools.cache
def parameters():
    """As one device initializes them."""
    trainer = model.Trainer(CONFIG, model.make_mesh((1, 1)), "bf16", "replicate")
    return jax.tree.map(np.asarray, trainer.init(jax.random.key(0))[0])


@functools.cache
def gradients(mode, everywhere=True, dispatch="replicate", microbatches=1):
    """Of all parameters as they were initialized, on the same text; and the loss."""
    trainer = make_trainer(mode, everywhere, dispatch, microbatches)

    @jax.jit
    def run(params, characters):
        batches = model.sample(characters, jax.random.key(0), CONFIG, trainer.mesh, microbatches)
        result, (loss, _) = model.gradients(params, batches, **trainer.how)
        return result, loss

    return jax.tree.map(np.asarray, run(jax.device_put(parameters(), trainer.state_shardings[0]), trainer.text))


def assert_same_gradients(actual, expected, allowed=0.03):
    """Sizes included: an optimizer like Adam would hide a factor."""
    (actual, loss), (expected, expected_loss) = actual, expected
    np.testing.assert_allclose(loss, expected_loss, rtol=3e-4)
    for (path, one), other in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < allowed, (jax.tree_util.keystr(path), error)


@CASES.add(mode=("bf16", "fp8-mlp"), dispatch=("replicate", "all_to_all"))
def same_gradients(mode, dispatch):
    """As on one device, by both ways of dispatch, the second with NaN in all rows that nobody sent."""
    assert_same_gradients(gradients(mode, True, dispatch), gradients(mode, False))


@CASES.add(mode=("fp8-mlp",))
def microbatches_are_one_batch(mode):
    """Sums over microbatches are the gradients and the loss of one large batch."""
    assert_same_gradients(gradients(mode, microbatches=2), gradients(mode))


@CASES.add()
def same_gradients_by_fp8_dispatch():
    """As of tokens that travel in bf16 and are quantized where they arrive; and summed over microbatches."""
    mode = model.FP8_DISPATCH_MODE
    fp8 = gradients(mode, True, "fp8_all_to_all")
    assert_same_gradients(fp8, gradients(mode, True, "all_to_all"), allowed=0.01)
    assert_same_gradients(gradients(mode, True, "fp8_all_to_all", 2), fp8)


@CASES.add()
def columns_are_those_of_tokens_sent_in_bf16():
    """Bytes of rows, and of columns that are made of them; of columns that bf16 makes, all but subnormals."""
    devices = jax.device_count()
    rng = np.random.default_rng(0)
    tokens, features, top, experts_here = 96, 256, 2, 2
    x = rng.standard_normal((devices * tokens, features), np.float32) * np.exp(rng.standard_normal(features) / 2)
    x = jnp.asarray(x, jnp.bfloat16)
    chosen = rng.integers(0, devices * experts_here, (devices * tokens, top)).astype(np.int32)
    own = P(("expert", "tensor"))

    @functools.partial(jax.shard_map, mesh=model.make_mesh((devices, 1)), in_specs=P("expert"), out_specs=own)
    def run(x, chosen):
        way = layer.route(chosen.reshape(-1), experts_here)
        x = jax.lax.pcast(x, "tensor", to="varying")
        sizes = way.group_sizes
        arrived = layer.send(jnp.repeat(x, top, axis=0), way)
        rows, _ = fp8_dispatch.send(x, top, way)
        quantized_there = jax_tsq.quantize_rows(arrived, sizes, pow_2_scales=True)
        in_use = (jnp.arange(len(arrived)) < sizes.sum())[:, None]
        different = sum(
            jnp.sum(in_use & (jax.lax.bitcast_convert_type(a, b) != jax.lax.bitcast_convert_type(c, b)))
            for a, c, b in zip(rows, quantized_there, (jnp.uint8, jnp.uint32), strict=True)
        )
        columns, columns_there = (fp8_dispatch.columns(one, sizes) for one in (rows, quantized_there))
        direct = jax_tsq.ragged_transpose_quant(arrived, sizes, pow_2_scales=True)
        bits = [jax.lax.bitcast_convert_type(one.values, jnp.uint8) for one in (columns, columns_there)]
        different += jnp.sum(bits[0] != bits[1]) + jnp.sum(columns.scales != columns_there.scales)
        values, direct = (
            jax_tsq.dequantize(columns),
            (jax_tsq.dequantize(direct), jnp.repeat(direct.scales, 128, axis=0)),
        )
        original = jax_tsq.pad_rows(jnp.where(in_use, arrived, 0), sizes).astype(jnp.float32)
        padded_scales = jax_tsq.pad_rows(jnp.where(in_use, jnp.repeat(rows.scales, 128, axis=1), 1), sizes)
        smallest = measure.E4M3_NORMAL * jnp.maximum(direct[1], padded_scales)
        others = jnp.sum((values != direct[0]) & (jnp.abs(original) >= 2 * smallest))
        return different[None], others[None], jnp.sum(values != direct[0])[None], sizes.sum()[None]

    different, others, changed, received = map(np.asarray, jax.jit(run)(x, chosen))
    assert received.sum() == x.shape[0] * top
    assert not different.any() and not others.any(), (different, others)
    assert changed.sum() < 0.02 * received.sum() * features


@CASES.add()
def page_shows_what_is_sent():
    """The table of docs/dispatch.md, of the collective itself, is that of the program."""
    if not wire.PAGE.exists() or jax.device_count() < np.prod(wire.MESH):
        return
    with mock.patch.object(jax.lax, "ragged_all_to_all", REAL):
        table = wire.table()
    assert f"<!-- wire table -->\n{table}\n<!-- end wire table -->" in wire.PAGE.read_text()


@CASES.add()
def fp8_dispatch_needs_its_mode():
    """Said before anything is compiled."""
    with pytest.raises(ValueError, match="needs --modes fp8-mlp-pow2, whose products it computes; got bf16"):
        model.Trainer(CONFIG, model.make_mesh((1, 1)), "bf16", "fp8_all_to_all")


@CASES.add()
def fp8_residuals_are_smaller():
    """An expert layer stores its inputs in half the bytes; the rest of what it stores stays."""
    sizes = 4 * CONFIG.experts
    bf16, fp8, residuals = (
        measure.stored(model.Trainer(CONFIG, model.make_mesh((1, 1)), mode, "replicate"))["expert_layer"]
        for mode in ("bf16", "fp8", "fp8-residuals-pow2")
    )
    rows = CONFIG.batch * CONFIG.context * CONFIG.top
    routing = 4 * rows
    assert bf16 == fp8 == rows * (CONFIG.features + 3 * CONFIG.hidden) * 2 + sizes + routing
    scales = 4 * rows * (1 + CONFIG.hidden // 128)  # of the first input's rows and of the second one's
    assert residuals == bf16 - rows * (CONFIG.features + CONFIG.hidden) + scales


@CASES.add()
def mlp_stores_no_h():
    """Columns of the input in FP8, the input of SwiGLU, routing weights and sizes are all that is kept."""
    trainer = model.Trainer(CONFIG, model.make_mesh((1, 1)), "fp8-mlp", "replicate")
    rows = CONFIG.batch * CONFIG.context * CONFIG.top
    padded = jax_tsq.padded_tokens(rows, CONFIG.experts)
    columns = padded * CONFIG.features + padded // 128 * 4 * CONFIG.features
    sizes = 2 * 4 * CONFIG.experts  # with padding, and without
    assert measure.stored(trainer)["expert_layer"] == columns + rows * (2 * 2 * CONFIG.hidden + 4) + sizes


@CASES.add()
def requantization():
    """On what the experts really get, power-of-two scales make the second quantization exact but for a few elements."""
    trainer = model.Trainer(CONFIG, model.make_mesh((1, 1)), "bf16", "replicate")
    shares = measure.requantization(trainer, trainer.init(jax.random.key(0)), batches=1)
    exact, inexact = shares["power_of_two"], shares["any_scale"]
    assert exact["share_changed"] <= exact["share_below_normal"] < 0.01 < inexact["share_changed"]
    assert exact["error_second"] < 1e-4 and exact["error_both"] < 1.01 * exact["error_direct"]
    assert inexact["error_both"] > 1.3 * inexact["error_direct"]


if __name__ == "__main__":
    CASES.main()
