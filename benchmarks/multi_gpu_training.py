"""The training example, expert x tensor parallel on all devices and on one: losses, and time of a step."""

import jax
import numpy as np
import train_moe  # pyright: ignore[reportMissingImports]
from jax.sharding import AxisType
from moe import measure, model  # pyright: ignore[reportMissingImports]

MODES = ("bf16", "fp8-residuals-pow2")
LARGE = model.Config(features=512, hidden=512, heads=8, batch=16, context=256)
SMALL = model.Config(layers=1, features=64, hidden=64, heads=2, context=16)
COMPARED, STEPS, FEW = 16, 61, 8
FIRST_TWO, ALL = 1e-3, 1e-2  # relative: rounding grows as training goes on


def train(mode: str, mesh, dispatch: str, config: model.Config, steps: int) -> tuple[np.ndarray, float]:
    trainer = model.Trainer(config, mesh, mode, dispatch)
    label = f"{mode}, {mesh.shape['expert']} x {mesh.shape['tensor']}"
    result = train_moe.train(trainer, 0, steps, label, measure.Compilations())
    return np.array(result["losses"]), result["milliseconds"]


def run(small: bool) -> dict:
    failures, modes = [], {}
    config, steps = (SMALL, FEW) if small else (LARGE, STEPS)
    shape = train_moe.default_mesh(jax.device_count(), config.experts)
    own = jax.make_mesh((1, 1), ("expert", "tensor"), (AxisType.Auto,) * 2, devices=jax.local_devices()[:1])
    dispatch = "all_to_all" if jax.default_backend() == "gpu" else "replicate"  # XLA:CPU has no ragged_all_to_all
    for mode in MODES[1:] if small else MODES:
        one, one_milliseconds = train(mode, own, "replicate", config, steps)
        losses, milliseconds = train(mode, model.make_mesh(shape), dispatch, config, steps)
        difference = np.abs(losses - one)[:COMPARED] / one[:COMPARED]
        if not (difference[:2] < FIRST_TWO).all() or not (difference < ALL).all():
            failures.append(f"process {jax.process_index()}, {mode}: losses {losses.tolist()}, on one {one.tolist()}")
        modes[mode] = {
            "losses": losses.tolist(),
            "losses_on_one": one.tolist(),
            "largest_relative_difference": float(difference.max()),
            "milliseconds_per_step": milliseconds,
            "milliseconds_per_step_on_one": one_milliseconds,
        }
    what = {"mesh": list(shape), "dispatch": dispatch, "steps": steps, "compared": COMPARED, **config._asdict()}
    return {"failures": failures, "rows": [], **what, "modes": modes}
