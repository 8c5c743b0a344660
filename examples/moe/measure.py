"""What the training run reports beside its losses."""

import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

import jax_tsq
from examples.moe import model, modes

E4M3_NORMAL, E4M3_STEP = 2.0**-6, 2.0**-9  # smallest normal value and distance of the values below it


def commit() -> str:
    """Of the sources, where git knows it."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Compilations:
    """Counts what XLA compiles in this process, from the moment it is made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def stored_bytes(f: Callable, params, quantized, *args) -> int:
    """Bytes of activations that f keeps between its forward and its backward pass for the gradient of `params`.

    Counts the arrays that the backward pass of `jax.vjp` holds, each once. Arrays shaped like a parameter, whose last
    dimensions may be joined, are weights, or weights cast to bf16, and do not count, nor do those shaped like
    `quantized` weights. XLA may still decide to compute some of the others again.
    """

    def kept(params, *args):
        return jax.tree.leaves(jax.vjp(lambda params: f(params, *args), params)[1])

    outputs = jax.make_jaxpr(kept)(params, quantized, *args).jaxpr.outvars
    variables = {v for v in outputs if not isinstance(v, jax.extend.core.Literal)}
    arrays = [v.aval for v in variables if isinstance(v.aval, jax.core.ShapedArray)]
    weights = {(leaf.shape[:2], leaf.size) for leaf in jax.tree.leaves((params, quantized))}
    return sum(a.size * a.dtype.itemsize for a in arrays if (a.shape[:2], a.size) not in weights)


def stored(trainer: model.Trainer) -> dict[str, int]:
    """Bytes of stored activations of a step, all on one device: of one expert layer and of the whole model."""
    config, mesh, mode = trainer.config, model.make_mesh((1, 1)), trainer.mode
    others, experts = model.split(trainer.state[0])
    ready = jax.eval_shape(lambda experts: model.quantize(experts, config, mesh, mode), experts)
    quantized = [block["quantized"] for block in ready]
    rows = config.batch * config.context * config.top
    layer_inputs = (
        jax.ShapeDtypeStruct((rows, config.features), jnp.bfloat16),
        jax.ShapeDtypeStruct((config.experts,), jnp.int32),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    batch = jax.ShapeDtypeStruct((config.batch, config.context + 1), jnp.int32)
    how = trainer.how | {"mesh": mesh, "dispatch": "replicate"}

    def expert_layer(weights, quantized, *inputs):
        return mode.experts(weights | {"quantized": quantized}, *inputs)

    def whole(params, quantized, batch):
        others, experts = params
        blocks = [block | {"quantized": one} for block, one in zip(experts, quantized, strict=True)]
        return model.losses(others, blocks, batch, **how)[0]

    return {
        "expert_layer": stored_bytes(expert_layer, experts[0], quantized[0], *layer_inputs),
        "model": stored_bytes(whole, (others, experts), quantized, batch),
    }


def scratch_bytes(trainer: model.Trainer, chunk: int) -> int | None:
    """What XLA plans for temporary arrays of the compiled steps on each device, where it says so."""
    analysis = trainer.compiled(chunk).memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


@jax.jit
def _requantized(x: jax.Array, group_sizes: jax.Array) -> dict:
    """Sums over the elements of x that are in use; see `requantization`."""
    original = jax_tsq.pad_rows(x, group_sizes).astype(jnp.float32)
    in_use = jax_tsq.pad_rows(jnp.ones_like(x, jnp.float32), group_sizes)
    counts = {}

    def columnwise(x, **options):
        quantized = jax_tsq.ragged_transpose_quant(x, group_sizes, **options)
        return jnp.asarray(jax_tsq.dequantize(quantized)), quantized.scales

    for pow_2_scales, name in ((True, "power_of_two"), (False, "any_scale")):
        rows = jax_tsq.quantize_rows(x, pow_2_scales=pow_2_scales)
        once = jnp.asarray(jax_tsq.dequantize(rows, dtype=jnp.bfloat16))
        once = jax_tsq.pad_rows(once, group_sizes).astype(jnp.float32)
        twice, scales = columnwise(rows.values, input_scales=rows.scales, pow_2_scales=pow_2_scales)
        direct, _ = columnwise(x, pow_2_scales=pow_2_scales)
        scaled = jnp.abs(once) / jnp.repeat(scales, 128, axis=0)
        counts[name] = {
            "elements": in_use.sum(),
            "below_normal": jnp.sum((scaled < E4M3_NORMAL) & (once != 0)),
            "below_step": jnp.sum((scaled < E4M3_STEP) & (once != 0)),
            "changed": jnp.sum(once != twice),
            "power": jnp.sum(original**2),
            "error_rows": jnp.sum((once - original) ** 2),
            "error_second": jnp.sum((twice - once) ** 2),
            "error_both": jnp.sum((twice - original) ** 2),
            "error_direct": jnp.sum((direct - original) ** 2),
        }
    return counts


def requantization(trainer: model.Trainer, state, batches: int = 2) -> dict[str, dict[str, float]]:
    """What quantizing rows first and columns later does to the real inputs of the expert layers of a trained model.

    Shares of all elements: scaled below e4m3's smallest normal value, below its subnormal step, changed by the second
    quantization. Errors are relative, in the norm: of quantizing rows, of the second step alone, of both, and of
    quantizing columns directly.
    """
    config, mesh = trainer.config, model.make_mesh((1, 1))
    inputs: list[tuple] = []

    def recording(x, w, group_sizes):
        jax.debug.callback(lambda *args: inputs.append(args), x, group_sizes)
        return modes.bf16_linear(x, w, group_sizes)

    @jax.jit
    def run(params, characters, key):
        batches = model.sample(characters, key, config, mesh)
        mode = modes.Mode("bf16", modes.by_linear(recording))
        others, experts = model.split(params)
        experts = model.quantize(experts, config, mesh, mode)
        return model.losses(others, experts, batches[0], config=config, mesh=mesh, mode=mode, dispatch="replicate")[1]

    params = jax.tree.map(np.asarray, state[0])
    characters = np.asarray(trainer.text)
    for i in range(batches):
        jax.block_until_ready(run(params, characters, jax.random.fold_in(jax.random.key(2**30), i)))
    jax.effects_barrier()
    totals: dict[str, Counter] = {}
    for x, sizes in inputs:
        for name, counts in _requantized(jnp.asarray(x), jnp.asarray(sizes)).items():
            totals.setdefault(name, Counter()).update({key: float(value) for key, value in counts.items()})
    return {
        name: {
            **{f"share_{key}": sums[key] / sums["elements"] for key in ("below_normal", "below_step", "changed")},
            **{key: (sums[key] / sums["power"]) ** 0.5 for key in sums if key.startswith("error")},
        }
        for name, sums in totals.items()
    }
