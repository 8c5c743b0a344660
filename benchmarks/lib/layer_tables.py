"""The tables of `benchmarks.layer`, and the names that they share with it."""

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.lib.tables import load_if_measured, markdown, on_card, provenance

OPERATIONS = ("matmul", "wgrad", "dual", "rows", "blocks")  # whose kernels are measured
BLOCK_OPERATIONS = (*OPERATIONS, "swiglu", "dswiglu")
PRODUCTS = ("forward", "input_gradient", "weight_gradient")
KINDS = (*PRODUCTS, "layer")


class Column(NamedTuple):
    way: str
    head: str


PEERS = [
    Column("pallas", "Pallas"),
    Column("loop", "loop of dots"),
    Column("ragged_dot", "ragged_dot"),
    Column("tokamax", "tokamax"),
    Column("torch", "torch"),
]
WAYS = {
    "block": {"quantized_weights": "weights given quantized", "w_float32": "w float32", "w_bfloat16": "w bfloat16"},
    "layer": {"quantized_w": "`quantized_w` given", "w_float32": "w float32", "w_bfloat16": "w bfloat16"},
    "weight_gradient": {"jax_tsq": "weight gradient", "jax_tsq_bfloat16": "weight gradient, bfloat16"},
    "input_gradient": {"jax_tsq": "input gradient"},
    "forward": {"jax_tsq": "forward"},
}


def label(row: dict) -> str:
    return ", ".join(str(row[field]) for field in ("tokens", "features", "outputs", "experts"))


def _dimensions(block: bool) -> str:
    return "M, H, F, E" if block else "M, K, N, E"


def _pair(values: Iterable[str | None]) -> str:
    """Short / sustained."""
    return " / ".join(value for value in values if value is not None)


def _measured(record: dict | None, unit: str, scale: float, digits: int) -> str:
    if record is None:
        return ""
    if "failed" in record:
        return "failed"
    found = _pair(f"{record[t][unit] * scale:.{digits}f}" for t in ("short", "sustained") if t in record)
    return found if record["right"] else f"{found} wrong"


def _spread(record: dict) -> str:
    """10 to 90 % of the times, as a share of their median."""
    spreads = []
    for turn in ("short", "sustained"):
        if turn in record:
            low, high = record[turn]["microseconds_10_90"]
            spreads.append(f"{(high - low) / record[turn]['microseconds']:.1%}")
    return _pair(spreads)


def _lines(rows: list[dict], kinds: Iterable[str], unit: str, scale: float, digits: int) -> str:
    kinds = list(kinds)
    found = [row for row in rows if any(kind in row for kind in kinds)]
    present = [
        column
        for column in PEERS
        if any("short" in row.get(kind, {}).get(column.way, {}) for row in found for kind in kinds)
    ]
    lines = []
    for row in found:
        for kind in (kind for kind in kinds if kind in row):
            for way, name in WAYS[kind].items():
                records = row[kind]
                cells = [_measured(records.get(w), unit, scale, digits) for w in (way, *(c.way for c in present))]
                times = [row["times"][kind][turn].get(way, {}) for turn in ("short", "sustained")]
                shares = [
                    _pair(f"{t[peer]:.2f}" for t in times if peer in t) for peer in ("best", "best_traced", "loop")
                ]
                sizes = "multiples of 128" if row["counts"] == "aligned" else row["counts"]
                lines.append([label(row), sizes, name, *cells, *shares, _spread(records[way])])
    head = [
        "M, H, F, E" if "block" in kinds else "M, K, N, E",
        "sizes",
        "",
        "jax_tsq",
        *(column.head for column in present),
    ]
    return markdown([*head, "times best", "times best in JAX, sizes traced", "times loop", "spread"], lines)


def products(rows: list[dict]) -> str:
    """TF/s of the products, short / sustained."""
    return _lines(rows, PRODUCTS, "teraflops", 1, 0)


def layers(rows: list[dict]) -> str:
    """Milliseconds of a layer, short / sustained."""
    return _lines(rows, ("layer",), "microseconds", 1e-3, 2)


def summary(rows: list[dict]) -> str:
    """Sustained milliseconds of a layer, random sizes: FP8, the best that takes traced sizes, the loop."""
    lines = []
    for row in rows:
        records, times = row.get("layer", {}), row["times"].get("layer", {}).get("sustained", {})
        if row["counts"] != "random" or not times:
            continue
        taken = {
            way: record["sustained"]["microseconds"] / 1e3
            for way, record in records.items()
            if "sustained" in record and record["right"]
        }
        shown = ("quantized_w", "w_float32")
        traced = [time for way, time in taken.items() if way not in (*WAYS["layer"], "loop")]
        cells = [taken.get(way) for way in shown] + [min(traced, default=None), taken.get("loop")]
        cells += [times[way].get(peer) for peer in ("best_traced", "loop") for way in shown]
        lines.append([label(row), *("" if cell is None else f"{cell:.2f}" for cell in cells)])
    head = ["M, K, N, E", "FP8", "and w quantized", "bf16", "bf16, loop", "times bf16", "and w", "times loop", "and w"]
    return markdown(head, lines)


def memory(rows: list[dict], kind: str = "layer") -> str:
    """Temporaries, and what is kept for the backward pass; of the block for each token, too."""
    block = kind == "block"
    lines = []
    for row in rows:
        if row["counts"] != "random":
            continue
        for way, record in row.get(kind, {}).items():
            if "memory" not in record:
                continue
            found = record["memory"]
            name = WAYS[kind].get(way) or next(column.head for column in PEERS if column.way == way)
            bytes_ = [found["temporary_bytes"], found["kept_bytes"]]
            shown = ["" if value is None else f"{value / 1e6:,.1f}" for value in bytes_]
            token = [f"{found['kept_bytes_per_token']:,.0f}"] if block else []
            kept = ", ".join(f"{array} {size / 1e6:,.1f}" for array, size in found["kept"].items())
            lines.append([label(row), name, *shown, *token, kept])
    head = [_dimensions(block), kind, "temporaries, MB", "kept, MB"]
    return markdown([*head, *(["a token, bytes"] if block else []), "of which"], lines)


def copies(rows: list[dict]) -> str:
    """GB/s of copies of x beside the programs."""
    rates = [rate for row in rows for rate in row["copy_gigabytes_per_second"].values()]
    return f"Copies of x that took turns with them moved {min(rates):,.0f} to {max(rates):,.0f} GB/s."


def blocks(result: dict | None = None, card: str = "gpu") -> dict[str, str]:
    """What the docs show; nothing before the first measurement."""
    result = result or load_if_measured(f"layer-{card}")
    if result is None:
        return {}
    rows = result["rows"]
    found = {
        "layer provenance": f"{provenance(result)} {copies(rows)}",
        "layer products": products(rows),
        "layer speed": layers(rows),
        "layer summary": summary(rows),
        "layer memory": memory(rows),
    }
    return on_card(card, found)


def expert_blocks(result: dict | None = None, card: str = "gpu") -> dict[str, str]:
    """What the docs show of the expert block; nothing before the first measurement."""
    result = result or load_if_measured(f"block-{card}")
    if result is None:
        return {}
    rows = result["rows"]
    found = {
        "block provenance": f"{provenance(result)} {copies(rows)}",
        "block speed": _lines(rows, ("block",), "microseconds", 1e-3, 2),
        "block memory": memory(rows, "block"),
    }
    return on_card(card, found)
