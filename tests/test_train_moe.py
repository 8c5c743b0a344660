"""The training example: its cases on meshes are in `sharding/training.py`; its command line and its report are here."""

import json
import os
import subprocess
import sys

import pytest

from examples import train_moe
from examples.moe import modes, report
from tests import mesh

RESULTS = mesh.ROOT / "examples" / "results"
PAGE = mesh.ROOT / "docs" / "training.md"

TINY = {"layers": 1, "features": 32, "hidden": 16, "heads": 2, "batch": 4, "context": 8, "steps": 20, "chunk": 10}


@mesh.parametrize("training")
def test_training(tmp_path_factory, platform, program, case):
    """On one device and on 8 host devices, or all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


def run_example(tmp_path, *arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=mesh.QUICK)
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "examples.train_moe", *sizes, "--out-dir", tmp_path, *arguments]
    return subprocess.run(command, cwd=mesh.ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_command_line(tmp_path):
    """One command trains, prints the tables and leaves results and curves; stopped, it goes on to the same losses."""
    options = ["--modes", "bf16", "--seeds", "0", "7", "--host-devices", "2", "--mesh", "2x1"]
    process = run_example(tmp_path, *options)
    assert process.returncode == 0, process.stderr
    assert "bf16, seed 7: step 20 of 20" in process.stdout
    result = json.loads((tmp_path / "training-cpu.json").read_text())
    runs = list(result["modes"]["bf16"]["runs"].values())
    assert [len(run[name]) for run in runs for name in ("losses", "gradient_norms")] == 4 * [2]
    assert [run["compilations"] for run in runs] == 2 * [1]
    assert result["mesh"] == [2, 1] and result["requantization"] and result["text"]["training_bytes"] > 2**20
    tables = [line for line in process.stdout.splitlines() if line.startswith("| bf16 |")]
    assert len(tables) == 2 and "</svg>" in (tmp_path / "training-cpu.svg").read_text()

    del result["modes"]["bf16"]["runs"]["7"]
    (tmp_path / "training-cpu.json").write_text(json.dumps(result))
    one = [*options, "--checkpoint", tmp_path / "run.npz"]
    stopped = run_example(tmp_path, *one, "--minutes", "0")
    assert stopped.returncode and "Time is up after step 10. The same command goes on." in stopped.stderr
    process = run_example(tmp_path, *one)
    assert process.returncode == 0, process.stderr
    assert "step 10 of 20" not in process.stdout and "bf16, seed 0" not in process.stdout
    again = json.loads((tmp_path / "training-cpu.json").read_text())["modes"]["bf16"]["runs"]["7"]
    assert all(again[name] == runs[1][name] for name in ("losses", "gradient_norms", "held_out_loss"))

    process = run_example(tmp_path, *one, "--chunk", "20")
    assert process.returncode and "is of a training with chunk 10, and this one has 20" in process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "3x1"], "--experts 8 must be a multiple of 3"),
        (["--mesh", "1x2", "--heads", "1"], "--heads 1 must be a multiple of 2"),
        (["--steps", "25"], "--steps 25 one of --chunk"),
    ],
    ids=["experts", "heads", "steps"],
)
def test_bad_arguments(tmp_path, arguments, message):
    """Said before anything is compiled."""
    process = run_example(tmp_path, *arguments)
    assert process.returncode and message in process.stderr


def test_every_mode_has_a_color():
    """The picture is drawn after the training."""
    assert {*report.COLORS} == {*modes.MODES}


def test_without_matplotlib(monkeypatch):
    """Said before the training, not after it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["train_moe", "--mesh", "no mesh"])
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        train_moe.main()


@pytest.mark.skipif(not RESULTS.exists() or not PAGE.exists(), reason="not a source tree")
def test_page_shows_the_committed_results(tmp_path):
    """The docs' tables are those of the results, which are of 300 steps and 3 seeds at least, and close to bf16."""
    page = tmp_path / "training.md"
    page.write_text(PAGE.read_text())
    for path in RESULTS.glob("training-*.json"):
        result = json.loads(path.read_text())
        report.fill(page, report.blocks(result, path.stem))
        assert page.read_text() == PAGE.read_text(), f"run: python -m examples.train_moe --report {path}"
        assert result["steps"] >= 300 and len(result["seeds"]) >= 2
        for mode in result["modes"]:
            numbers = report.summary(result, mode)
            assert abs(numbers["difference"]) < 0.01 and numbers["norm"] < 2, (path.stem, mode)
