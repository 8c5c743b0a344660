"""The package at the call sites of others: what docs/choose.md shows of packages that may not be installed."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "choose.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the docs are not beside the tests")


def blocks(section, language):
    """The code of a section of the page."""
    (text,) = re.findall(rf"^### {re.escape(section)}\n(.*?)(?=^###? |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("section", "package"), [("Equinox", "equinox"), ("Tokamax", "tokamax")])
def test_section(section, package):
    """The section's code runs after that of the first one; test_docs.py runs the other sections."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    namespace = {}
    for block in blocks("jax.lax.ragged_dot", "python") + blocks(section, "py"):
        exec(compile(block, f"{PAGE} {section}", "exec"), namespace)
