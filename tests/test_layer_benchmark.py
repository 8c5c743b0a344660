"""The benchmark of the layer runs on any device, notices wrong results, and makes its tables of what it measured."""

import argparse
import json
import os
import re
import subprocess
import sys

import pytest

import jax_tsq
from tests import mesh

pytestmark = pytest.mark.skipif(
    not (mesh.ROOT / "benchmarks").exists(), reason="the benchmarks are not beside the tests"
)


def run(*arguments):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "benchmarks.layer", "--small", "--rounds", "2", *arguments]
    process = subprocess.run(command, cwd=mesh.ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stdout + process.stderr


def test_command_line(tmp_path):
    """The layer is added to a file of the products; every way that runs here is right."""
    from benchmarks.lib import layer_tables

    output = tmp_path / "result.json"
    run("--only", "products", "--output", output)
    run("--only", "layer", "--output", output, "--add")
    result = json.loads(output.read_text())
    assert result["small"] and len(result["digest"]) == 64
    assert [row["counts"] for row in result["rows"]] == ["random", "aligned"]
    for row in result["rows"]:
        for kind in layer_tables.KINDS:
            assert {"loop", "ragged_dot"} <= {way for way, record in row[kind].items() if "short" in record}
            assert set(layer_tables.WAYS[kind]) == set(row["times"][kind]["short"])
            assert all(record["right"] for record in row[kind].values() if "failed" not in record)
            assert all(record["failed"] for way, record in row[kind].items() if way == "pallas")
    (random, _) = result["rows"]
    assert "sustained" in random["forward"]["jax_tsq"]
    kept = {way: record["memory"]["kept_bytes"] for way, record in random["layer"].items() if "memory" in record}
    assert kept["quantized_w"] < kept["w_float32"] and kept["loop"] >= 2 * (512 * 256 + 3 * 256 * 128)
    blocks = layer_tables.blocks(result)
    assert len(blocks["layer products"].splitlines()) == 2 + 2 * 4
    assert len(blocks["layer speed"].splitlines()) == 2 + 2 * 3
    (shown,) = blocks["layer summary"].splitlines()[2:]
    assert shown.startswith("| 512, 256, 128, 3 | ") and shown.count("|") == 8
    assert re.search(r"float8_e4m3fn \[256, \d+\]", blocks["layer memory"])
    for table in blocks.values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_block(tmp_path):
    """The expert block is near that of the peers, and keeps less for a token than they do."""
    from benchmarks.lib import layer_tables

    output = tmp_path / "result.json"
    run("--only", "block", "--output", output)
    result = json.loads(output.read_text())
    (row,) = result["rows"]
    block = row["block"]
    assert {"loop", "ragged_dot", *layer_tables.WAYS["block"]} == {way for way, r in block.items() if "short" in r}
    assert all(record["right"] for record in block.values() if "failed" not in record)
    assert max(block["w_float32"]["error"].values()) > 0.02 and block["ragged_dot"]["error"]["dw_down"] < 0.01
    bfloat16 = 2 * (256 + 3 * 128) + 4  # x, gates and ups, h, and a routing weight
    for way in ("loop", "ragged_dot"):
        assert bfloat16 <= block[way]["memory"]["kept_bytes_per_token"] < bfloat16 + 1
    for way in layer_tables.WAYS["block"]:
        assert block[way]["memory"]["kept_bytes_per_token"] < bfloat16
    tables = layer_tables.expert_blocks(result)
    assert len(tables["block speed"].splitlines()) == 2 + 3
    assert len(tables["block memory"].splitlines()) == 2 + 5
    for table in tables.values():
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_short_tables():
    """bfloat16 is the fastest way of the row that was right; what has no sustained time stands in parentheses."""
    from benchmarks.lib import layer_tables

    def record(milliseconds, right=True, turns=("short", "sustained")):
        return {"right": right} | {turn: {"microseconds": 1e3 * milliseconds, "teraflops": 7} for turn in turns}

    ways = {
        "pallas": record(20),
        "loop": record(15),
        "torch": record(1, right=False),
        "ragged_dot": record(100, turns=("short",)),
        "w_float32": record(10),
        "quantized_weights": record(8),
    }
    times = {"w_float32": {"best": 1.5}, "quantized_weights": {"best": 1.875}}
    row = dict(tokens=1, features=2, outputs=3, experts=4, counts="random", block=ways, forward={"jax_tsq": record(1)})
    row |= dict(input_gradient={"jax_tsq": record(1)}, times={"block": {"sustained": times}})
    rows = [row, row | {"counts": "aligned"}]
    assert layer_tables.headline(rows).splitlines()[2:] == ["| 1, 2, 3, 4 | 15.00 | 10.00 | 1.50 | 8.00 | 1.88 |"]
    (line,) = layer_tables.summary(rows, "block").splitlines()[2:]
    assert line == "| 1, 2, 3, 4 | 10.00 | 8.00 | 20.00 | 15.00 | (100.00) | 1.50 | 1.88 |"
    assert layer_tables.product_summary(rows).splitlines()[2:] == ["| 1, 2, 3, 4 | 7 / 7 |"]


@pytest.fixture
def small(monkeypatch):
    """Measures products or the block beside the loop, of peers the only one."""
    from benchmarks import layer
    from benchmarks.lib import block_programs, peers

    monkeypatch.setattr(peers, "MOST_RAGGED_DOT_EXPERTS", 0)
    monkeypatch.setattr(block_programs, "MOST_RAGGED_DOT_EXPERTS", 0)

    def measure(*kinds):
        options = argparse.Namespace(kinds=kinds or layer.PRODUCTS, short=0.0, rounds=1, sustained=())
        shared = layer.family_of(options.kinds).operands_of(layer.SMALL[0])
        return layer.measure(layer.SMALL[0], "random", shared, {}, options)

    return measure


def test_a_wrong_peer_is_noticed(small, monkeypatch):
    """It is nobody to be compared with."""
    from benchmarks.lib import peers

    loop = peers.loop()
    wrong = loop._replace(forward=lambda xs, ws, sizes: loop.forward(xs, ws[::-1], sizes))
    monkeypatch.setattr(peers, "loop", lambda: wrong)
    row = small()
    assert not row["forward"]["loop"]["right"] and "loop" not in row["times"]["forward"]["short"]["jax_tsq"]
    assert row["input_gradient"]["loop"]["right"] and "loop" in row["times"]["input_gradient"]["short"]["jax_tsq"]


def test_our_wrong_product_is_noticed(small, monkeypatch):
    from benchmarks import layer

    right = jax_tsq.ragged_matmul
    monkeypatch.setattr(jax_tsq, "ragged_matmul", lambda *a, **k: 1.01 * right(*a, **k))
    row = small()
    assert not row["forward"]["jax_tsq"]["right"] and not layer.show(row)


def test_our_wrong_block_is_noticed(small, monkeypatch):
    from benchmarks import layer

    right = jax_tsq.moe_mlp
    monkeypatch.setattr(jax_tsq, "moe_mlp", lambda *a, **k: 1.1 * right(*a, **k))
    row = small("block")
    assert not any(row["block"][way]["right"] for way in ("quantized_weights", "w_float32", "w_bfloat16"))
    assert row["block"]["loop"]["right"] and not layer.show(row)
