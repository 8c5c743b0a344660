"""Which path a call takes, the native kernel or portable JAX, and why not the kernel."""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jax_tsq._core import ffi

SETTING = "JAX_TSQ_KERNELS"
"""Environment variable, read when a program is lowered: auto, native or portable."""

MULTIPROCESSORS = "JAX_TSQ_MULTIPROCESSORS"
"""Environment variable, read when a program is lowered: the multiprocessors that a persistent kernel takes at most."""

NO_CUDA = "this build of jax_tsq has no CUDA kernels"

OPERATIONS: dict[str, Any] = {}
"""All operations, by FFI target."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What the native code of an operation asks for.

    Attributes:
        platforms: those that there is code for.
        capability: the compute capability that all GPUs of a program must have, such as "9.0"; None for any.
        sizes: maps the operands' shapes without batch dimensions, and the parameters, to the condition that they do not
            meet, or None.
        persistent: whether its thread blocks stay on their multiprocessors, so that it takes their number as an
            attribute.
    """

    platforms: tuple[str, ...] = ("cpu", "cuda")
    capability: str | None = None
    sizes: Callable[..., str | None] = lambda *shapes, **params: None
    persistent: bool = False


def setting() -> str:
    """The environment's word on the path."""
    value = os.environ.get(SETTING) or "auto"
    if value not in ("auto", "native", "portable"):
        raise ValueError(f'{SETTING} must be "auto", "native" or "portable"; got "{value}".')
    return value


def attributes(op) -> dict[str, Any]:
    """What the environment says to the native code of an operation."""
    return {"multiprocessors": np.int64(_multiprocessors())} if op.kernel.persistent else {}


def _multiprocessors() -> int:
    """The environment's word on how many multiprocessors a kernel may take, 0 for all."""
    value = os.environ.get(MULTIPROCESSORS)
    if not value:
        return 0
    if not value.isdecimal() or not 1 <= int(value) < 2**31:
        raise ValueError(
            f'{MULTIPROCESSORS} must be a whole number of at least 1; got "{value}". Unset it to let kernels take all '
            "multiprocessors."
        )
    return int(value)


def unmet(op, platform: str, devices: Sequence[Any] | None) -> str | None:
    """Which condition of an operation's kernel, sizes aside, a platform and its devices do not meet, None if all are.

    Devices of None are unknown, and taken for what the kernel asks for.
    """
    if platform not in op.kernel.platforms:
        return f"its kernel is for {' and '.join(op.kernel.platforms)}, not for {platform}"
    capability = op.kernel.capability
    if platform == "cuda" and capability is not None and devices is not None:
        found = {str(getattr(device, "compute_capability", device.platform)) for device in devices}
        if found != {capability}:
            got = ", ".join(sorted(found)) or "none"
            return f"all devices must have compute capability {capability}; got {got}"
    return NO_CUDA if platform == "cuda" and not ffi.HAS_CUDA else None


def takes_native(op, platform: str, devices: Sequence[Any] | None, avals, params: Mapping[str, Any]) -> bool:
    """Whether a call that is lowered for a platform takes the native path; raises if it must and cannot."""
    chosen = setting()
    if chosen == "portable":
        return False
    reason = unmet(op, platform, devices) or op.kernel.sizes(*op.shapes(*avals), **params)
    if chosen == "native" and reason is not None:
        raise ValueError(
            f"{SETTING} is native, but jax_tsq.{op.function} cannot take the native path: {reason}. Change that, or "
            f"set {SETTING} to auto."
        )
    if reason == NO_CUDA:
        ffi.warn_no_cuda()
    elif platform == "cuda" and reason is None:
        ffi.check_driver()
    return reason is None


def kernels_used(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns how many calls of native code a compiled program holds, by public function.

    A function that is not among them takes the portable path in this program, or is not called. A call in a loop counts
    once, and equal calls that XLA has made one count as one. To be sure that no call is portable, set the environment
    variable `JAX_TSQ_KERNELS` to `native`: lowering then fails where one cannot be native, and says why.

    Args:
        compiled: `jax.jit(function).lower(*arguments).compile()`.

    Returns:
        A dict from names of public functions to counts above 0.

    Raises:
        TypeError: compiled is not a `jax.stages.Compiled`.
        NotImplementedError: JAX does not show the program of this platform.

    Example:
        >>> import jax, jax.numpy as jnp, jax_tsq
        >>> x, sizes = jnp.ones((384, 512), jnp.bfloat16), jnp.array([100, 0, 284], jnp.int32)
        >>> jax_tsq.kernels_used(jax.jit(jax_tsq.ragged_transpose_quant).lower(x, sizes).compile())
        {'ragged_transpose_quant': 1}
    """
    if not isinstance(compiled, jax.stages.Compiled):
        raise TypeError(
            f"compiled must be a compiled program, jax.jit(function).lower(*arguments).compile(); got "
            f"{type(compiled).__name__}."
        )
    text = compiled.as_text()
    if text is None:
        raise NotImplementedError("JAX does not show the compiled program of this platform.")
    targets = re.findall(r'custom_call_target="(jax_tsq\.\w+)"', text)
    return dict(collections.Counter(OPERATIONS[target].function for target in targets))
