"""Runs of a trainer, chunk by chunk, and what is recorded of them."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from examples.moe import checkpoint, measure, model

SAVE_SECONDS = 60  # between two checkpoints
WINDOW = 10  # steps whose mean is recorded


def say(*words: str, sep: str = " ") -> None:
    if jax.process_index() == 0:
        print(*words, sep=sep, flush=True)


def start(trainer: model.Trainer, seed: int) -> checkpoint.Run:
    config, none = trainer.config, np.zeros(0, np.float32)
    loads = np.zeros((0, config.layers, config.experts), np.int32)
    return checkpoint.Run(trainer.init(jax.random.key(seed)), none, none, loads, none)


def train(
    trainer: model.Trainer,
    seed: int,
    steps: int,
    chunk: int,
    compilations: measure.Compilations,
    run: checkpoint.Run | None = None,
    after: Callable[[checkpoint.Run], None] = lambda run: None,
) -> tuple[checkpoint.Run, int]:
    """Trains from one seed, or goes on with a run; also returns what was compiled after the first chunk.

    Args:
        chunk: steps of one program, between which the host looks at losses; must divide `steps`.
        after: called with what the run has come to by each chunk.
    """
    run = start(trainer, seed) if run is None else run
    key, compiled = jax.random.key(seed), None
    for first in range(len(run.losses), steps, chunk):
        begin = time.perf_counter()
        state, metrics = trainer.steps(run.state, key, first, chunk)
        losses, norms, loads = map(np.asarray, metrics)
        milliseconds = np.float32(1e3 * (time.perf_counter() - begin) / chunk)
        run = checkpoint.Run(
            state,
            np.append(run.losses, losses),
            np.append(run.norms, norms),
            np.append(run.loads, loads, axis=0),
            run.milliseconds if compiled is None else np.append(run.milliseconds, milliseconds),
        )
        how = f"{milliseconds:.1f} ms a step" if compiled is not None else "compiled"
        say(f"{trainer.mode.label}, seed {seed}: step {first + chunk} of {steps}, loss {losses[-1]:.4f}, {how}")
        compiled = compilations.count if compiled is None else compiled
        after(run)
    return run, 0 if compiled is None else compilations.count - compiled


class Saver:
    """Saves a run every minute; ends the program, after saving, when its time is up.

    Args:
        path: where to; nothing is saved without one.
        identity: of what.
        deadline: on the clock of `time.perf_counter`.
    """

    def __init__(self, path: Path | None, identity: dict, deadline: float):
        self.path, self.identity, self.deadline = path, identity, deadline
        self.last = time.perf_counter()

    def __call__(self, run: checkpoint.Run) -> None:
        now = time.perf_counter()
        if self.path is not None and (now >= self.deadline or now - self.last >= SAVE_SECONDS):
            checkpoint.save(self.path, run, self.identity)
            self.last = time.perf_counter()
        if now >= self.deadline:
            raise SystemExit(f"Time is up after step {len(run.losses)}. The same command goes on.")


def means(values: np.ndarray) -> list[float]:
    """Of every ten steps."""
    return [float(f"{mean:.6g}") for mean in values.astype(np.float64).reshape(-1, WINDOW).mean(axis=1)]


def record(trainer: model.Trainer, run: checkpoint.Run, compilations: int) -> dict:
    """What a result holds of a whole run."""
    return {
        "losses": means(run.losses),
        "gradient_norms": means(run.norms),
        "held_out_loss": trainer.evaluate(run.state),
        "milliseconds_per_step": float(np.median(run.milliseconds)) if run.milliseconds.size else None,
        "compilations": compilations,
        "routings": len({load.tobytes() for load in run.loads}),
    }
