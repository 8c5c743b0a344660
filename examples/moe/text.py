"""What the model reads: Python source files that are there wherever the example runs, as bytes."""

import functools
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PACKAGES = ("jax", "numpy")  # beside the standard library
SKIPPED = {"site-packages", "dist-packages", "test", "tests"}
HELD_OUT = 20  # one file of so many


class Text(NamedTuple):
    """Bytes to train on and bytes held out, uint8, and what they are."""

    training: np.ndarray
    held_out: np.ndarray
    summary: dict


def _sources(name: str, root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted({*folders} - SKIPPED)
        for file in sorted(files):
            if file.endswith(".py"):
                path = Path(folder, file)
                yield f"{name}/{path.relative_to(root).as_posix()}", path


def _roots() -> Iterator[tuple[str, Path]]:
    yield "stdlib", Path(sysconfig.get_path("stdlib"))
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations
        yield name, Path(spec.submodule_search_locations[0])


@functools.cache
def read() -> Text:
    """All files in the order of their names; every 20th is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    files: dict[str, int] = {}
    found = (item for name, root in _roots() for item in _sources(name, root))
    for i, (name, path) in enumerate(found):
        parts[i % HELD_OUT == HELD_OUT - 1].append(path.read_bytes())
        root = name.partition("/")[0]
        files[root] = files.get(root, 0) + 1
    training, held_out = (b"".join(part) for part in parts)
    summary = {
        "files": files,
        "training_bytes": len(training),
        "held_out_bytes": len(held_out),
        "sha256": hashlib.sha256(training + held_out).hexdigest(),
    }
    return Text(np.frombuffer(training, np.uint8), np.frombuffer(held_out, np.uint8), summary)
