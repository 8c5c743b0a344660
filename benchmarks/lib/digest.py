"""Which sources a result was measured with."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from benchmarks.lib import ROOT

FFI = ROOT / "ffi"
KERNELS = {"gpu": ["{operation}/*.cu"], "cpu": ["{operation}/*_cpu.cc", "cpu/*.cc"]}


def sources(platform: str, operations: Iterable[str]) -> list[Path]:
    """The files of the operations' kernels, and those of `ffi/` that they include."""
    patterns = {pattern.format(operation=operation) for operation in operations for pattern in KERNELS[platform]}
    found, queue = set(), [path for pattern in patterns for path in FFI.glob(pattern)]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        included = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        queue += [FFI / name for name in included if (FFI / name).exists()]
    return sorted(found)


def digest(platform: str, operations: Iterable[str]) -> str:
    """SHA-256 of the sources of these operations' kernels on a GPU ("gpu") or CPU ("cpu").

    White space and comments do not count.
    """
    sha = hashlib.sha256()
    for path in sources(platform, operations):
        code = re.sub(rb"//[^\n]*", b"", path.read_bytes())
        sha.update(b"".join([path.name.encode(), *code.split()]))
    return sha.hexdigest()
