"""The benchmark on several devices: it runs on host devices, its checks can fail, and its page shows its results."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARK = ROOT / "benchmarks" / "multi_gpu.py"
PAGE = ROOT / "docs" / "multi-gpu.md"

pytestmark = pytest.mark.skipif(not BENCHMARK.exists(), reason="the benchmarks are not beside the tests")


def run(tmp_path, *arguments, script=BENCHMARK):
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)


def test_command_line(tmp_path):
    """One process for two devices, then one for each; what needs a GPU is skipped, and the result says so."""
    options = ["--small", "--devices", "2", "--parts", "sharding", "scaling", "dispatch", "--output", "result.json"]
    process = run(tmp_path, *options)
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


def test_a_part_that_takes_too_long_fails(tmp_path):
    """The others run all the same."""
    options = ["--small", "--devices", "2", "--processes", "one", "--limit", "1", "--output", "result.json"]
    process = run(tmp_path, *options, "--parts", "training", "dispatch")
    assert process.returncode == 1 and "Timeout (0:00:01)!" in process.stdout, process.stdout + process.stderr
    parts = json.loads((tmp_path / "result.json").read_text())["runs"][0]["parts"]
    assert parts["training"]["failures"] and not parts["dispatch"]["failures"]


EMULATED = f"""
import sys
sys.path[:0] = {[str(ROOT / folder) for folder in ("benchmarks", "examples", "tests")]}
import jax
jax.config.update("jax_num_cpu_devices", 4)
import mesh, multi_gpu_dispatch as dispatch
exchange = mesh.load("training").ragged_all_to_all
jax.lax.ragged_all_to_all = exchange
result = dispatch.compare(dispatch.SMALL)
for row in result["rows"]:
    assert row["rows_in_use"] + row["rows_of_nan"] == 4 * dispatch.SMALL.tokens, row
assert len(result["rows"]) == 4 and not result["failures"], result
jax.lax.ragged_all_to_all = lambda *operands, **options: -exchange(*operands, **options)
assert len(dispatch.compare(dispatch.SMALL)["failures"]) == 4
"""


def test_dispatch_by_an_emulated_exchange(tmp_path):
    """Rows arrive with NaN behind them; wrong ones are noticed on every device."""
    (tmp_path / "emulated.py").write_text(EMULATED)
    process = run(tmp_path, script=tmp_path / "emulated.py")
    assert process.returncode == 0, process.stderr


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import multi_gpu_report  # pyright: ignore[reportMissingImports]

    yield multi_gpu_report
    for name in ("multi_gpu_report", "report", "workloads"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are not beside the tests")
def test_page_shows_the_committed_results(report):
    """`python benchmarks/multi_gpu_report.py` would change nothing."""
    assert report.filled(PAGE.read_text()) == PAGE.read_text(), "run: python benchmarks/multi_gpu_report.py"


def test_committed_results_are_good(report):
    """Of GPUs, without a failure, and no GPU slower beside others than 0.97 of its speed alone."""
    results = report.results()
    assert {result["devices"] for result in results} >= {2, 4}
    for result in results:
        assert result["platform"] == "gpu" and not result["small"]
        for run_ in result["runs"]:
            assert list(run_["parts"]) == ["sharding", "scaling", "dispatch", "training"]
            assert not any(part["failures"] for part in run_["parts"].values())
            assert all(row["speed_together_over_alone"] >= 0.97 for row in run_["parts"]["scaling"]["rows"])
            assert all(row["bytes_equal"] and row["rows_of_nan"] for row in run_["parts"]["dispatch"]["rows"])
