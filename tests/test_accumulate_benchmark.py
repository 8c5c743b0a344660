"""The benchmark of accumulators runs on any device, notices wrong results, and makes its tables of what it measured."""

import json
import sys

import jax.numpy as jnp
import pytest

import jax_tsq
from tests import mesh

pytestmark = pytest.mark.skipif(
    not (mesh.ROOT / "benchmarks").exists(), reason="the benchmarks are not beside the tests"
)


def test_command_line(tmp_path, monkeypatch):
    """Every way that runs here is right; the tables have a line for each."""
    from benchmarks import accumulate

    output = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["accumulate", "--small", "--rounds", "1", "--output", str(output)])
    assert accumulate.main() == 0
    result = json.loads(output.read_text())
    assert result["small"] and len(result["digest"]) == 64
    (products,), (step,) = result["products"], result["steps"]
    assert products["right"] and set(products["ways"]) == set(accumulate.PRODUCTS)
    right = {way for way, record in step["ways"].items() if record["right"]}
    assert right >= {"loop", "ragged_dot", *accumulate.STEPS} and set(step["times_best"]) == set(accumulate.STEPS)
    assert max(step["ways"]["accumulate"]["error"].values()) > 0.02  # of another path than the first peer's
    tables = accumulate.blocks(result)
    assert len(tables["accumulate products"].splitlines()) == 2 + 1
    assert len(tables["accumulate steps"].splitlines()) == 2 + len(right)
    for table in tables.values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_a_wrong_sum_is_noticed(monkeypatch):
    """One that forgets what was there."""
    from benchmarks import accumulate

    original = jax_tsq.ragged_weight_gradient
    monkeypatch.setattr(
        jax_tsq,
        "ragged_weight_gradient",
        lambda *a, accumulate=None, **k: original(*a, **k) + (0 if accumulate is None else jnp.float32(0)),
    )
    assert not accumulate.products(accumulate.SMALL[0], 0.0, 1)["right"]
