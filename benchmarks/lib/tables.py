"""Committed results as tables, and the pages that show them."""

import json
from collections.abc import Iterable, Sequence

from benchmarks.lib import ROOT
from benchmarks.lib.digest import digest

RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def load_if_measured(name: str) -> dict | None:
    return load(name) if (RESULTS / f"{name}.json").exists() else None


def on_card(card: str, blocks: dict[str, str]) -> dict[str, str]:
    """Blocks of results that end in `-gpu`, or in the name of another card, which theirs then end in, too."""
    return blocks if card == "gpu" else {f"{name}, {card}": block for name, block in blocks.items()}


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def provenance(result: dict) -> str:
    driver = f", driver {result['driver']}" if result["driver"] else ""
    return f"{result['device']}{driver}, jax {result['jax']}, {result['date']}, commit {result['commit'][:10]}."


def provenances(results: dict[str, dict]) -> str:
    """What results by name have in common, or a line for each group of them that has."""
    groups: dict[str, list[str]] = {}
    for name, result in results.items():
        groups.setdefault(provenance(result), []).append(name)
    if len(groups) == 1:
        return next(iter(groups))
    return "  \n".join(f"{', '.join(names)}: {line}" for line, names in groups.items())


def kernels_changed(result: dict, operations: Iterable[str]) -> str:
    """Whether the sources of the kernels are others than those that were measured."""
    return "no" if result["digest"] == digest(result["platform"], operations) else "yes"


def replaced(page: str, blocks: dict[str, str]) -> str:
    """A page with these blocks between their marks, `<!-- NAME -->` and `<!-- end NAME -->`."""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in page:
            before, _, rest = page.partition(begin)
            _, _, after = rest.partition(end)
            page = f"{before}{begin}\n{block}\n{end}{after}"
    return page
