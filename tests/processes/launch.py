"""Programs of several processes on this machine: a free port, output of each, bounded time, nothing left behind."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]


class Ended(NamedTuple):
    """How a process ended: exit status (negative for a signal), seconds since the start, and all that it printed."""

    status: int
    seconds: float
    output: str


def free_port() -> int:
    """A port of the loopback interface that nobody uses right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    commands: Sequence[Sequence],
    *,
    timeout: float,
    grace: float,
    env: dict[str, str] | None = None,
    watch: Callable[[list[subprocess.Popen], list[str]], None] | None = None,
    show: bool = False,
) -> list[Ended]:
    """Runs the processes of a program to their end, in the root of the repository.

    Once one of them fails, the others have `grace` seconds to notice; what then still runs is killed, and so is
    everything after `timeout` seconds.

    Args:
        commands: the command line of each process.
        env: their environment, by default that of this process.
        watch: called again and again with the processes and their output so far, for tests that interfere.
        show: whether the output of the first process appears here as it comes.
    """
    start, ended = time.monotonic(), {}
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        processes = []
        try:
            for command, log in zip(commands, logs, strict=True):
                processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
            deadline, shown = start + timeout, 0
            while len(ended) < len(processes) and time.monotonic() < deadline:
                time.sleep(0.05)
                for i, process in enumerate(processes):
                    if i not in ended and process.poll() is not None:
                        ended[i] = time.monotonic() - start
                        if process.returncode:
                            deadline = min(deadline, time.monotonic() + grace)
                if watch:
                    watch(processes, [_read(log) for log in logs])
                if show:
                    text = _read(logs[0])
                    sys.stdout.write(text[shown:])
                    sys.stdout.flush()
                    shown = len(text)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [
            Ended(process.returncode, ended.get(i, time.monotonic() - start), _read(log))
            for i, (process, log) in enumerate(zip(processes, logs, strict=True))
        ]


def _read(log) -> str:
    return os.pread(log.fileno(), os.fstat(log.fileno()).st_size, 0).decode(errors="replace")
