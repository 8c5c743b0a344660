"""The training example with tokens that travel in bf16 and in FP8: losses, and time of a step."""

import jax
import numpy as np

from benchmarks.multi_gpu import training
from examples import train_moe
from examples.moe import measure, model
from examples.moe.training import train

STEPS = 40


def run(small: bool) -> dict:
    if jax.default_backend() != "gpu":
        return {"failures": [], "rows": [], "skipped": "XLA:CPU has no ragged_all_to_all"}
    config = training.SMALL if small else training.LARGE
    shape = train_moe.default_mesh(jax.device_count(), config.experts)
    losses, milliseconds = {}, {}
    for name, dispatch in (("bf16", "all_to_all"), ("fp8", "fp8_all_to_all")):
        trainer = model.Trainer(config, model.make_mesh(shape), model.FP8_DISPATCH_MODE, dispatch)
        result, _ = train(trainer, 0, STEPS, training.CHUNK, measure.Compilations())
        losses[name], milliseconds[name] = result.losses, float(np.median(result.milliseconds))
    difference = np.abs(losses["fp8"] / losses["bf16"] - 1)
    failures = []
    if not (difference[:2] < training.FIRST_TWO).all() or not (difference[: training.COMPARED] < training.ALL).all():
        failures.append(f"process {jax.process_index()}: losses {[one.tolist() for one in losses.values()]}")
    return {
        "failures": failures,
        "rows": [],
        "mesh": list(shape),
        "steps": STEPS,
        "compared": training.COMPARED,
        "config": config._asdict(),
        "losses": {name: one.tolist() for name, one in losses.items()},
        "largest_difference": float(difference[: training.COMPARED].max()),
        "milliseconds": milliseconds,
    }
