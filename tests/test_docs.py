"""What the README and the docs show runs, and their tables are those of the committed results."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the docs are not beside the tests")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_run(page):
    """The Python blocks of a page, one after the other in one namespace."""
    namespace = {}
    for _, block in re.findall(r"^( *)```python\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(textwrap.dedent(block), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Every relative link of a page names a file."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_tables_are_generated_from_the_results():
    """`python -m benchmarks.report` would change nothing."""
    from benchmarks import report

    for page in report.PAGES:
        assert report.filled(page.read_text()) == page.read_text(), f"{page.name}: run python -m benchmarks.report"


def test_measured_results_were_right():
    """Every measured call gave the bytes that it had to; every product and layer was near enough, or not measured."""
    from benchmarks.lib.tables import RESULTS, load

    for path in RESULTS.glob("*.json"):
        result, operation = load(path.stem), path.stem.rpartition("-")[0]
        if operation in ("split", "ragged", "rows", "dual", "blocks", "swiglu", "dswiglu"):
            for row in result["rows"]:
                assert row["bytes_equal"] is not False, (path, row)
        elif operation in ("layer", "block"):
            assert not result["small"]
            for row in result["rows"]:
                for kind in row["times"]:
                    for way, record in row[kind].items():
                        assert record["right"] or (not record["ours"] and "failed" in record), (path, row, kind, way)
        elif operation == "wgrad":
            for row in result["rows"]:
                for name in row["times_best_competitor"]:
                    program = row["programs"][name]
                    assert program["right"] and program["same_bytes_again"], (path, row, name)
