"""Two processes with four host devices each, which see the other's devices as their own: results are those of one.

The programs are `processes/worker.py` and the training example. Nothing here waits longer than it says.
"""

import json
import os
import signal
import sys

import pytest

from tests import mesh
from tests.processes import launch

PROCESSES, DEVICES = 2, 8
CASES = [
    "propagated/stays_split-auto-split-features_over_two_axes",
    "propagated/stays_split-auto-ragged_fp8-experts_and_features",
    "propagated/stays_split-explicit-split-experts_and_features",
    "propagated/stays_split-explicit-ragged_fp8-experts_over_two_axes",
    "propagated/one_gather-auto-ragged-tokens",
    "propagated/stays_split-explicit-rows-tokens",
    "shard_maps/full-auto-split",
    "shard_maps/different_groups_on_each_device-explicit-ragged_fp8",
    "shard_maps/different_operands_on_each_device-auto-ragged_fp8",
]


def environment():
    return dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=mesh.QUICK)


def run_workers(task, *arguments, of_second=(), timeout=120, **options):
    """Runs `worker.py` twice; the second process gets some arguments of its own."""
    worker, port = [sys.executable, "-m", "tests.processes.worker"], launch.free_port()
    commands = [[*worker, str(i), str(PROCESSES), str(port), task, *arguments] for i in range(PROCESSES)]
    commands[1] += of_second
    return launch.run(commands, timeout=timeout, env=environment(), **{"grace": 30, **options})


def errors(ended):
    """The error of each case, None if it passed."""
    assert ended.status == 0, ended.output
    lines = [line for line in ended.output.splitlines() if line.startswith('{"case"')]
    return {result["case"]: result["error"] for result in map(json.loads, lines)}


def test_operations():
    """Bytes, communication and shardings of global arrays; each process checks what its devices hold."""
    for ended in run_workers("cases", *CASES):
        assert errors(ended) == dict.fromkeys(CASES)


def test_other_data_is_seen():
    """If one process has other data, its checks fail."""
    first, second = run_workers("cases", *CASES[:2], of_second=["--other-data"])
    assert set(errors(first)) == set(errors(second)) == set(CASES[:2])
    assert all("differ, first at" in error for error in errors(second).values()), errors(second)


def train(tmp_path, processes, seeds):
    """Trains by that many processes, each with seeds of its own; the losses by seed of the first."""
    sizes = {"layers": 1, "features": 32, "hidden": 16, "heads": 2, "batch": 8, "context": 8, "steps": 10, "chunk": 10}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "examples.train_moe", *options, "--modes", "fp8-residuals-pow2"]
    command += ["--host-devices", str(DEVICES // processes), "--out-dir", tmp_path / str(processes)]
    if processes > 1:
        command += ["--coordinator", f"127.0.0.1:{launch.free_port()}", "--processes", str(processes)]
    commands = [[*command, "--process", str(i), "--seeds", *seeds[i]] for i in range(processes)]
    for ended in launch.run(commands, timeout=300, grace=60, env=environment()):
        assert ended.status == 0, ended.output
    result = json.loads((tmp_path / str(processes) / "training-cpu.json").read_text())
    assert result["mesh"] == [4, 2]
    return {seed: run["losses"] for seed, run in result["modes"]["fp8-residuals-pow2"]["runs"].items()}


def test_training(tmp_path):
    """The example's losses with seed 0 for all; those of another seed, if one process has yet another, differ."""
    one = train(tmp_path, 1, [["0", "2"]])
    two = train(tmp_path, 2, [["0", "2"], ["0", "3"]])
    assert two["0"] == pytest.approx(one["0"], rel=1e-3)
    assert two["2"] != pytest.approx(one["2"], rel=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other(victim):
    """With an error, within half a minute."""
    killed = []

    def kill(processes, outputs):
        if not killed and all("at work" in output for output in outputs):
            processes[victim].send_signal(signal.SIGKILL)
            killed.append(True)

    ended = run_workers("steps", grace=60, watch=kill)
    dead, other = ended[victim], ended[1 - victim]
    assert killed and dead.status == -signal.SIGKILL, dead.output
    assert other.status not in (0, -signal.SIGKILL) and "another task died" in other.output, other.output
    assert other.seconds < dead.seconds + 30


def test_an_exception_in_one_process_ends_the_other():
    """With an error, within half a minute, and the exception is shown."""
    first, second = run_workers("steps", of_second=["--raises"], grace=60)
    assert "at work" in first.output and "this process fails" in second.output, first.output + second.output
    for ended in (first, second):
        assert ended.status not in (0, -signal.SIGKILL) and ended.seconds < 45, ended.output
