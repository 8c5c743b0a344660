"""The tables of `benchmarks.layer`, and the names that they share with it."""

from collections.abc import Iterable, Iterator
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


def _random(rows: list[dict], kind: str) -> Iterator[tuple[dict, dict, dict]]:
    """Rows with random sizes and sustained times, the right ways of a kind, and how many times as fast ours are."""
    for row in rows:
        times = row["times"].get(kind, {}).get("sustained", {})
        if row["counts"] == "random" and times:
            yield row, {way: record for way, record in row[kind].items() if record.get("right")}, times


def _milliseconds(record: dict | None) -> str:
    """Sustained; in parentheses the short turns of what was too slow for more."""
    if record is None:
        return ""
    if "sustained" in record:
        return f"{record['sustained']['microseconds'] / 1e3:.2f}"
    return f"({record['short']['microseconds'] / 1e3:.2f})"


def summary(rows: list[dict], kind: str = "layer") -> str:
    """Milliseconds of a layer or a block: FP8 with all quantization in the call, or but that of w, and bfloat16."""
    before = next(iter(WAYS[kind]))
    found = list(_random(rows, kind))
    peers = [column for column in PEERS if any(column.way in ways for _, ways, _ in found)]
    lines = []
    for row, ways, times in found:
        shown = ("w_float32", before, *(column.way for column in peers))
        faster = [f"{times[way]['best']:.2f}" for way in ("w_float32", before)]
        lines.append([label(row), *(_milliseconds(ways.get(way)) for way in shown), *faster])
    head = [_dimensions(kind == "block"), "FP8", "FP8, w quantized before", *(column.head for column in peers)]
    return markdown([*head, "times best bf16", "the same, w quantized before"], lines)


def headline(rows: list[dict]) -> str:
    """Sustained milliseconds of a block in bfloat16, by the fastest way of the row, and in FP8."""
    lines = []
    for row, ways, times in _random(rows, "block"):
        taken = {way: r["sustained"]["microseconds"] / 1e3 for way, r in ways.items() if "sustained" in r}
        cells = [min(time for way, time in taken.items() if way not in WAYS["block"])]
        for way in ("w_float32", "quantized_weights"):
            cells += [taken[way], times[way]["best"]]
        lines.append([label(row), *(f"{cell:.2f}" for cell in cells)])
    head = ["M, H, F, E", "bf16, ms", "FP8, ms", "times as fast"]
    return markdown([*head, "FP8, weights quantized before, ms", "times as fast"], lines)


def product_summary(rows: list[dict]) -> str:
    """TF/s of the products that a `ragged_dot` makes: output / input gradient, short turns."""
    peers = [column for column in PEERS if column.way not in ("loop", "torch")]
    lines = []
    for row in rows:
        if row["counts"] != "random" or "forward" not in row:
            continue
        cells = []
        for way in ("jax_tsq", *(column.way for column in peers)):
            records = [row[kind].get(way, {}) for kind in ("forward", "input_gradient")]
            cells.append(_pair(f"{r['short']['teraflops']:.0f}" for r in records if "short" in r and r["right"]))
        lines.append([label(row), *cells])
    filled = [i for i in range(len(lines[0])) if any(line[i] for line in lines)] if lines else []
    head = ["M, K, N, E", "jax_tsq, FP8", *(column.head for column in peers)]
    return markdown([head[i] for i in filled], [[line[i] for i in filled] for line in lines])


def kept(rows: list[dict]) -> str:
    """What a block keeps of a token for its backward pass, and its temporaries: bfloat16 by Pallas, and FP8."""
    lines = []
    for row in rows:
        records = [row.get("block", {}).get(way, {}).get("memory") for way in ("pallas", *WAYS["block"])]
        if row["counts"] != "random" or records[1] is None:
            continue
        bf16, before, floats, _ = records
        bytes_ = [f"{m['kept_bytes_per_token']:,.0f}" if m else "" for m in (bf16, floats)]
        temporary = [f"{m['temporary_bytes'] / 1e6:,.0f}" if m else "" for m in (bf16, floats, before)]
        lines.append([label(row), *bytes_, *temporary])
    head = ["M, H, F, E", "bf16, bytes a token", "FP8, bytes a token", "bf16, temporaries, MB"]
    return markdown([*head, "FP8, temporaries, MB", "the same, weights quantized before"], lines)


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
        "product summary": product_summary(rows),
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
        "block card": provenance(result),
        "block speed": _lines(rows, ("block",), "microseconds", 1e-3, 2),
        "block headline": headline(rows),
        "block summary": summary(rows, "block"),
        "block kept": kept(rows),
        "block memory": memory(rows, "block"),
    }
    return on_card(card, found)
