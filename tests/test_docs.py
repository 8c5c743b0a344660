"""What the README and the docs show runs, and their tables are those of the committed results."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the docs are not beside the tests")


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("digest", "report", "timing", "workloads"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page):
    """The Python blocks of a page, one after the other in one namespace."""
    namespace = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link of a page names a file."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_are_generated_from_the_results(benchmarks):
    """`python benchmarks/report.py` would change nothing."""
    import report

    for page in report.PAGES:
        assert report.filled(page.read_text()) == page.read_text(), f"{page.name}: run python benchmarks/report.py"


def test_measured_bytes_were_right(benchmarks):
    """Every measured call gave the bytes that it had to."""
    import report

    for row in report.load("gpu")["rows"] + report.load("cpu")["rows"]:
        assert row["bytes_equal"] is not False, row
