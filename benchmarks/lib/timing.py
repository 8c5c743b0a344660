"""Device time from a profile, and wall time of calls and of turns of many calls."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.lib.profile import Event, profile

TWICE = 2  # in a row: the second call, which counts, finds in the caches what its own kind wrote


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


def busy(events: Iterable[Event]) -> float:
    """Nanoseconds in which at least one of the events runs: a kernel may start early and wait for the one before."""
    total = end = 0.0
    for event in sorted(events, key=lambda event: event.start):
        total += max(0.0, event.start + event.duration - max(event.start, end))
        end = max(end, event.start + event.duration)
    return total


def device_seconds(calls: Iterable[Call], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every call in which a device is busy, the calls taking turns: an array of `rounds` times for each."""
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
        by_module[event.module].append(event)
    times = {}
    for call in calls:
        events = by_module[f"jit_{call.name}"]
        each, rest = divmod(len(events), TWICE * rounds)
        if not each or rest:
            raise RuntimeError(f"{len(events)} device events for {TWICE * rounds} calls of {call.name}")
        last = range((TWICE - 1) * each, len(events), TWICE * each)
        times[call.name] = np.array([busy(events[i : i + each]) for i in last]) * 1e-9
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


class Turn(NamedTuple):
    """Something to call again and again.

    Attributes:
        run: the call.
        wait: waits for what calls returned.
        ahead: how many results may be pending, so that they fit into memory; None if each serves the next one's.
    """

    run: Callable[[], object]
    wait: Callable[[object], object] = jax.block_until_ready
    ahead: int | None = 32

    def seconds(self, calls: int) -> float:
        """Wall seconds of one of so many calls in a row."""
        pending = deque(maxlen=1 if self.ahead is None else None)
        start = time.perf_counter()
        for _ in range(calls):
            if len(pending) == self.ahead:
                self.wait(pending.popleft())
            pending.append(self.run())
        self.wait(list(pending))
        return (time.perf_counter() - start) / calls


def turns(programs: dict[str, Turn], length: float, rounds: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Wall seconds of a call, from turns of about `length` seconds: in every round one of each, in a new order."""
    rng = np.random.default_rng(seed)
    calls = {}
    for name, turn in programs.items():
        turn.seconds(1)
        calls[name] = max(1, round(length / turn.seconds(2)))
    times = defaultdict(list)
    for _ in range(rounds):
        for name in rng.permutation(list(programs)).tolist():
            times[name].append(programs[name].seconds(calls[name]))
    return {name: np.array(values) for name, values in times.items()}


def summary(times: np.ndarray) -> dict:
    """Median, 10 and 90 % of times, in microseconds."""
    return {
        "microseconds": float(np.median(times)) * 1e6,
        "microseconds_10_90": [float(q) * 1e6 for q in np.quantile(times, (0.1, 0.9))],
    }
