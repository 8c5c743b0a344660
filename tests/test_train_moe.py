"""The training example: its cases on meshes are in `sharding/training.py`; its command line and its report are here."""

import json
import os
import subprocess
import sys

import pytest

from examples import train_moe
from examples.moe import layer, measure, report
from tests import mesh

RESULTS = mesh.ROOT / "examples" / "results" / "training-cpu.json"
PAGE = mesh.ROOT / "docs" / "training.md"

TINY = {"layers": 1, "features": 32, "hidden": 16, "heads": 2, "batch": 4, "context": 8, "steps": 3}


@mesh.parametrize("training")
def test_training(tmp_path_factory, platform, program, case):
    """On one device and on 8 host devices, or all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


def run_example(tmp_path, *arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu")
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "examples.train_moe", *sizes, "--output", tmp_path / "results.json", *arguments]
    return subprocess.run(command, cwd=mesh.ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_command_line(tmp_path):
    """One command trains, prints the table and leaves results and picture."""
    options = ["--modes", "bf16", "fp8", "fp8-mlp", "--seeds", "0", "7", "--host-devices", "2", "--mesh", "2x1"]
    process = run_example(tmp_path, *options)
    assert process.returncode == 0, process.stderr
    assert "fp8, seed 7: step 3 of 3" in process.stdout
    result = json.loads((tmp_path / "results.json").read_text())
    assert [len(row["losses"]["7"]) for row in result["modes"].values()] == [3, 3, 3]
    assert [row["compilations"] for row in result["modes"].values()] == [1, 1, 1]
    assert result["mesh"] == [2, 1] and result["requantization"]
    table = [line for line in process.stdout.splitlines() if line.startswith("| fp8 |")]
    assert len(table) == 1 and "</svg>" in (tmp_path / "results.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "3x1"], "--experts 8 must be a multiple of 3"),
        (["--mesh", "1x2", "--heads", "1"], "--heads 1 must be a multiple of 2"),
        (["--profile"], "--profile needs a GPU"),
    ],
    ids=["experts", "heads", "profile"],
)
def test_bad_arguments(tmp_path, arguments, message):
    """Said before anything is compiled."""
    process = run_example(tmp_path, *arguments)
    assert process.returncode and message in process.stderr


def test_every_mode_has_a_color():
    """The picture is drawn after the training."""
    assert {*report.COLORS} == {*modes.MODES, "control"}


def test_kinds_of_kernels():
    """By the names that a profile gives kernels."""
    assert measure._kind("void jax_tsq::sm90::matmul::(anonymous namespace)::MatmulKernel<true>(...)") == "products"
    assert measure._kind("void jax_tsq::cuda::(anonymous namespace)::RowsKernel<false>(...)") == "quantization"
    assert measure._kind("ncclDevKernel_AllGather_RING_LL(...)") == "collectives"
    assert measure._kind("loop_add_fusion_3") == "other"


def test_without_matplotlib(monkeypatch):
    """Said before the training, not after it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["train_moe", "--mesh", "no mesh"])
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        train_moe.main()


@pytest.mark.skipif(not RESULTS.exists() or not PAGE.exists(), reason="not a source tree")
def test_page_shows_the_committed_results(tmp_path):
    """The docs' tables are those of the results, which are of 300 steps and 3 seeds at least, and close to bf16."""
    page, result = tmp_path / "training.md", json.loads(RESULTS.read_text())
    for path in (RESULTS, RESULTS.with_name("training-gpu.json")):
        page.write_text(PAGE.read_text())
        report.fill(page, json.loads(path.read_text()))
        assert page.read_text() == PAGE.read_text(), "run: python -m examples.train_moe --report " + str(path)
    assert result["steps"] >= 300 and len(result["seeds"]) >= 3
    for mode in ("fp8", "fp8-pow2", "fp8-residuals-pow2"):
        assert abs(report.difference(result, mode)[:, -report.LAST :].mean()) < 0.01
