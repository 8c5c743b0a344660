"""Device time from a profile on GPU, wall time on CPU."""

import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np


class Call(NamedTuple):
    """A jitted function and the argument sets that its calls rotate through, so that caches do not help."""

    name: str
    run: Callable
    arguments: list[tuple]

    def __call__(self, i: int):
        return self.run(*self.arguments[i % len(self.arguments)])


def named(name: str, f: Callable, arguments: list[tuple]) -> Call:
    """A call whose XLA module bears its name, by which its kernels are found in a profile."""

    def renamed(*args):
        return f(*args)

    renamed.__name__ = name
    return Call(name, jax.jit(renamed), arguments)


class Event(NamedTuple):
    device: str
    module: str
    start: float  # nanoseconds
    duration: float


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
                        Event(plane.name, dict(e.stats).get("hlo_module", e.name), e.start_ns, e.duration_ns)
                        for e in line.events
                        if line.name.startswith("Stream")
                    ]
                else:
                    host |= {e.name for e in line.events}
    return sorted(device, key=lambda event: event.start), host


TWICE = 2  # in a row: the second call, which counts, finds in the caches what its own kind wrote


def device_seconds(calls: Iterable[Call], rounds: int) -> dict[str, np.ndarray]:
    """Device seconds of every call, the calls taking turns: an array of `rounds` times for each."""
    calls = list(calls)
    for call in calls:
        jax.block_until_ready([call(i) for i in range(2)])

    def run():
        last = None
        for i in range(rounds):
            for call in calls:
                for j in range(TWICE):
                    last = call(TWICE * i + j)
        return last

    by_module = defaultdict(list)
    for event in profile(run)[0]:
        by_module[event.module].append(event.duration)
    times = {}
    for call in calls:
        durations = by_module[f"jit_{call.name}"]
        if not durations or len(durations) % (TWICE * rounds):
            raise RuntimeError(f"{len(durations)} device events for {TWICE * rounds} calls of {call.name}")
        times[call.name] = np.reshape(durations, (rounds, TWICE, -1))[:, -1].sum(axis=1) * 1e-9
    return times


def seconds(call: Call, i: int) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call(i))
    return time.perf_counter() - start


def wall_seconds(calls: Iterable[Call], rounds: int) -> dict[str, np.ndarray]:
    """Wall seconds of every call, the calls taking turns."""
    calls = list(calls)
    for call in calls:
        jax.block_until_ready([call(i) for i in range(2)])
    times = defaultdict(list)
    for i in range(rounds):
        for call in calls:
            times[call.name].append([seconds(call, TWICE * i + j) for j in range(TWICE)][-1])
    return {name: np.array(values) for name, values in times.items()}
