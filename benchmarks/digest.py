"""Which sources a result was measured with."""

import hashlib
import re
from pathlib import Path

FFI = Path(__file__).parents[1] / "ffi"


def sources(pattern: str) -> list[Path]:
    """The files of `ffi/` that match a pattern, and those that they include."""
    found, queue = set(), sorted(FFI.glob(pattern))
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        included = re.findall(r'^#include "([^"/]+)"', path.read_text(), re.MULTILINE)
        queue += [FFI / name for name in included if (FFI / name).exists()]
    return sorted(found)


def digest(platform: str) -> str:
    """SHA-256 of the sources of the CUDA ("gpu") or the CPU ("cpu") kernels, whatever their white space."""
    sha = hashlib.sha256()
    for path in sources({"gpu": "*.cu", "cpu": "*_cpu.cc"}[platform]):
        sha.update(b"".join([path.name.encode(), *path.read_bytes().split()]))
    return sha.hexdigest()
