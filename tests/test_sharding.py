"""What happens on meshes, case by case; the cases are in `sharding/`."""

import re

import pytest

from tests import mesh

PROGRAMS = ["meshes", "propagated", "quantizers", "shard_maps", "shardy_off"]


@mesh.parametrize(*PROGRAMS)
def test_mesh(tmp_path_factory, platform, program, case):
    """8 host devices, and all GPUs that are there."""
    mesh.check_case(mesh.run_once(tmp_path_factory, program, platform), case)


def test_an_abort_fails_its_cases_only():
    """A process that dies leaves the results it had, and an error for the case it died in."""
    outcome = mesh.run("dies", "cpu")
    mesh.check_case(outcome, "passes-1")
    with pytest.raises(AssertionError, match="assert n == 2"):
        mesh.check_case(outcome, "fails-1")
    with pytest.raises(AssertionError, match="exit status -6"):
        mesh.check_case(outcome, "aborts")


DOCS = mesh.ROOT / "docs"


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are not beside the tests")
def test_documented_cases_exist():
    """The cases that the pages name."""
    programs = [path.stem for path in mesh.ROOT.glob("tests/sharding/*.py") if path.stem != "__init__"]
    pattern = re.compile(rf"`({'|'.join(programs)})/(\w+)")
    named = {case for page in DOCS.rglob("*.md") for case in pattern.findall(page.read_text())}
    assert len(named) > 40
    for program, case in named:
        assert any(name.split("-")[0] == case for name in mesh.case_names(program)), f"{program}/{case}"
