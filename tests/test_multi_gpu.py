"""The benchmark on several devices: it runs on host devices, its checks can fail, and its results are good."""

import json
import os
import subprocess
import sys

import pytest

from tests import mesh

pytestmark = pytest.mark.skipif(
    not (mesh.ROOT / "benchmarks").exists(), reason="the benchmarks are not beside the tests"
)


def run(*arguments, module="benchmarks.multi_gpu"):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=mesh.ROOT, env=environment, capture_output=True, text=True, timeout=400)


def test_command_line(tmp_path):
    """One process for two devices, then one for each; what needs a GPU is skipped, and the result says so."""
    options = [
        "--small",
        "--devices",
        "2",
        "--parts",
        "sharding",
        "scaling",
        "dispatch",
        "--output",
        tmp_path / "result.json",
    ]
    process = run(*options)
    assert process.returncode == 0, process.stdout + process.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [run["processes"] for run in result["runs"]] == [1, 2]
    assert result["jax"] and result["commit"] is not None and len(result["digest"]) == 64
    for run_ in result["runs"]:
        parts = run_["parts"]
        assert list(parts) == ["sharding", "scaling", "dispatch"]
        assert parts["sharding"]["cases"] == 4
        assert [row["device"] for row in parts["scaling"]["rows"] if row["operation"] == "ragged"] == [0, 1]
        assert "no ragged_all_to_all" in parts["dispatch"]["skipped"]


def test_every_case_on_a_mesh_exists():
    """Each name in the list begins that of a case."""
    from benchmarks.multi_gpu import sharding

    for chosen in (sharding.CASES, sharding.FEW):
        for program, starts in chosen.items():
            names = mesh.case_names(program)
            missing = [start for start in starts if not any(name.startswith(start) for name in names)]
            assert starts and not missing, (program, missing)


def test_a_part_that_takes_too_long_fails(tmp_path):
    """The others run all the same."""
    options = ["--small", "--devices", "2", "--processes", "one", "--limit", "1", "--output", tmp_path / "result.json"]
    process = run(*options, "--parts", "training", "dispatch")
    assert process.returncode == 1 and "Timeout (0:00:01)!" in process.stdout, process.stdout + process.stderr
    parts = json.loads((tmp_path / "result.json").read_text())["runs"][0]["parts"]
    assert parts["training"]["failures"] and not parts["dispatch"]["failures"]


def test_dispatch_by_an_emulated_exchange():
    """Rows arrive with NaN behind them; wrong ones are noticed on every device."""
    process = run(module="tests.processes.dispatch")
    assert process.returncode == 0, process.stderr


def test_committed_results_are_good():
    """Of GPUs, without a failure, and no GPU slower beside others than 0.97 of its speed alone."""
    from benchmarks.multi_gpu import report

    results = report.results()
    runs = [(result["devices"], run_["parts"]) for result in results for run_ in result["runs"]]
    for devices in (2, 4):
        parts = {part for count, parts in runs if count == devices for part in parts}
        assert parts >= {"sharding", "scaling", "dispatch", "training"}
    assert all(result["platform"] == "gpu" and not result["small"] for result in results)
    for _, parts in runs:
        rows = {name: part["rows"] for name, part in parts.items()}
        assert not any(part["failures"] for part in parts.values())
        assert all(row["speed_together_over_alone"] >= 0.97 for row in rows.get("scaling", []))
        assert all(row["bytes_equal"] and row["rows_of_nan"] for row in rows.get("dispatch", []))
