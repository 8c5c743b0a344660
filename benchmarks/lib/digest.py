"""Which sources a result was measured with."""

import hashlib
import re
from pathlib import Path

FFI = Path(__file__).parents[1] / "ffi"


KERNELS = {"gpu": ["split/*.cu", "ragged/*.cu"], "cpu": ["*/*_cpu.cc", "cpu/*.cc"], "weight_gradient": ["wgrad/*.cu"]}


def sources(patterns: list[str]) -> list[Path]:
    """The files of `ffi/` that match a pattern, and those that they include."""
    found, queue = set(), [path for pattern in patterns for path in FFI.glob(pattern)]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        included = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        queue += [FFI / name for name in included if (FFI / name).exists()]
    return sorted(found)


def digest(kernels: str) -> str:
    """SHA-256 of the sources of the kernels that quantize on a GPU ("gpu") or CPU ("cpu"), or of those named.

    White space and comments do not count.
    """
    sha = hashlib.sha256()
    for path in sources(KERNELS[kernels]):
        code = re.sub(rb"//[^\n]*", b"", path.read_bytes())
        sha.update(b"".join([path.name.encode(), *code.split()]))
    return sha.hexdigest()
