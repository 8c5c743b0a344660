"""The training example, expert x tensor parallel on all devices and on one: losses, and time of a step."""

import jax
import numpy as np
from jax.sharding import AxisType

from examples import train_moe
from examples.moe import measure, model, training

MODE = "fp8-residuals-pow2"
LARGE = model.Config(features=1024, hidden=1024, heads=16, batch=16, context=512, learning_rate=2e-4)
SMALL = model.Config(layers=1, features=64, hidden=64, heads=2, context=16)
COMPARED, STEPS, FEW, CHUNK = 16, 60, 8, 4
FIRST_TWO, ALL = 1e-3, 1e-2  # relative: rounding grows as training goes on


def train(mesh, dispatch: str, config: model.Config, steps: int) -> tuple[np.ndarray, float]:
    """Losses, and milliseconds a step."""
    trainer = model.Trainer(config, mesh, MODE, dispatch)
    run, _ = training.train(trainer, 0, steps, CHUNK, measure.Compilations())
    return run.losses, float(np.median(run.milliseconds))


def run(small: bool) -> dict:
    config, steps = (SMALL, FEW) if small else (LARGE, STEPS)
    shape = train_moe.default_mesh(jax.device_count(), config.experts)
    own = jax.make_mesh((1, 1), ("expert", "tensor"), (AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
    dispatch = "all_to_all" if jax.default_backend() == "gpu" else "replicate"  # XLA:CPU has no ragged_all_to_all
    one, one_milliseconds = train(own, "replicate", config, steps)
    losses, milliseconds = train(model.make_mesh(shape), dispatch, config, steps)
    difference = np.abs(losses - one) / one
    failures = []
    if not (difference[:2] < FIRST_TWO).all() or not (difference[:COMPARED] < ALL).all():
        failures.append(f"process {jax.process_index()}: losses {losses.tolist()}, on one device {one.tolist()}")
    return {
        "failures": failures,
        "rows": [],
        "mode": MODE,
        "mesh": list(shape),
        "dispatch": dispatch,
        "steps": steps,
        "compared": min(COMPARED, steps),
        "config": config._asdict(),
        "losses": losses.tolist(),
        "losses_on_one": one.tolist(),
        "largest_difference": float(difference[:COMPARED].max()),
        "milliseconds": milliseconds,
        "milliseconds_on_one": one_milliseconds,
    }
