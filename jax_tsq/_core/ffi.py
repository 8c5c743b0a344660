"""Loads the native module, registers its FFI targets and says what is available."""

import functools
import importlib
import importlib.util
import warnings
from importlib.metadata import version

import jax
import jaxlib

MINIMUM_JAXLIB = (0, 10, 0)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _check_versions() -> None:
    for name, found in (("jax", jax.__version__), ("jaxlib", jaxlib.__version__)):
        if _version(found) < MINIMUM_JAXLIB:
            needed = ".".join(map(str, MINIMUM_JAXLIB))
            raise ImportError(
                f"jax_tsq needs {name} >= {needed}, whose foreign function interface it is built for, but found "
                f'{name} {found}. Upgrade with: pip install --upgrade "jax>={needed}"'
            )


def _load():
    if importlib.util.find_spec("jax_tsq._native") is None:
        raise ImportError(
            f"jax_tsq was imported from {__file__}, where its native library is missing. In a source tree, build it "
            'with "pip install -e ."; elsewhere, reinstall jax-tsq.'
        )
    native = importlib.import_module("jax_tsq._native")  # if it cannot be loaded, with the loader's own message
    for platform, name, handler in native.targets():
        jax.ffi.register_ffi_target(name, handler, platform=platform)
    return native


_check_versions()
_native = _load()

HAS_CUDA: bool = _native.HAS_CUDA
"""Whether the native module holds the CUDA kernels."""


@functools.cache
def build() -> tuple[str, str]:
    """What the native code of a program depends on: this version, and whether it has CUDA kernels."""
    return version("jax-tsq"), "cuda" if HAS_CUDA else "cpu"


@functools.cache
def warn_no_cuda() -> None:
    """Warns, once in a process, that a GPU runs the pure-JAX version."""
    warnings.warn(
        "jax_tsq was built without CUDA: on this GPU its operations run as pure JAX, at a fraction of the speed. "
        "Reinstall jax-tsq from a wheel, or build it where a CUDA compiler can be had.",
        stacklevel=2,
    )


def check_driver() -> None:
    """Raises if the NVIDIA driver is too old for the CUDA kernels."""
    built, driver = _native.cuda_versions()
    if 0 < driver // 1000 < built // 1000:
        built, driver = (f"{version // 1000}.{version % 1000 // 10}" for version in (built, driver))
        raise RuntimeError(
            f"jax_tsq's kernels were built by CUDA {built}, but the NVIDIA driver here supports no more than CUDA "
            f"{driver}. Update the driver (CUDA 13 needs version 580 or newer), or build jax_tsq by a CUDA toolkit "
            "that the driver supports: CUDACXX=/path/to/nvcc pip install --no-binary jax-tsq jax-tsq"
        )
