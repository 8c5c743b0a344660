"""What the devices did, from a profile of JAX's."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax


class Event(NamedTuple):
    device: str
    module: str
    start: float  # nanoseconds
    duration: float
    kernel: str
    operation: str  # its name in the compiled program, where the profile says so


def _event(device: str, event, stats: dict) -> Event:
    module, operation = stats.get("hlo_module", event.name), stats.get("hlo_op", "")
    return Event(device, module, event.start_ns, event.duration_ns, event.name, operation)


def profile(run: Callable[[], object]) -> tuple[list[Event], set[str]]:
    """Runs and waits; returns what the device did, in order, and the names of all events of the host."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    device, host = [], set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the profile reader's own types
        for plane in data.planes:
            for line in plane.lines:
                if plane.name.startswith("/device:GPU"):
                    device += [
                        _event(plane.name, e, dict(e.stats)) for e in line.events if line.name.startswith("Stream")
                    ]
                else:
                    host |= {e.name for e in line.events}
    return sorted(device, key=lambda event: event.start), host
