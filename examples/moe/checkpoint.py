"""A training run on its way, in one file: going on from it gives the bits of a run that was never stopped."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np


class Run(NamedTuple):
    """What a run has come to.

    Attributes:
        state: parameters and the optimizer's state.
        losses, norms, loads: what `model.Metrics` says, of every step so far.
        milliseconds: of a step, one for each chunk of steps but those that were compiled for.
    """

    state: Any
    losses: np.ndarray
    norms: np.ndarray
    loads: np.ndarray
    milliseconds: np.ndarray


def save(path: Path, run: Run, identity: dict) -> None:
    """Replaces the file in one step, so that there is a whole one at any time."""
    arrays: dict[str, Any] = {f"state {i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(run.state))}
    arrays |= {name: array for name, array in run._asdict().items() if name != "state"}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("wb") as file:
        np.savez(file, identity=json.dumps(identity), **arrays)
    os.replace(unfinished, path)


def load(path: Path, state_shardings: Any, identity: dict) -> Run | None:
    """The run that is in the file, or None where that is another mode's or seed's, or there is no file."""
    if not path.exists():
        return None
    with np.load(path) as file:
        found = json.loads(str(file["identity"]))
        if found != identity:
            check_same(path, found, identity, free=("mode", "seed"))
            return None
        shardings, tree = jax.tree.flatten(state_shardings)
        leaves = [jax.device_put(file[f"state {i}"], sharding) for i, sharding in enumerate(shardings)]
        others = {name: file[name] for name in Run._fields if name != "state"}
        return Run(state=jax.tree.unflatten(tree, leaves), **others)


def check_same(path: Path, found: dict, wanted: dict, free: tuple[str, ...] = ()) -> None:
    """Raises if a file is of other settings."""
    for name, value in wanted.items():
        if name not in free and found.get(name) != value:
            raise SystemExit(
                f"{path} is of a training with {name} {found.get(name)}, and this one has {value}. Delete the file, "
                "or name another place."
            )
