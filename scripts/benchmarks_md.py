#!/usr/bin/env python3
"""Makes docs/benchmarks.md from the JSON that scripts/gpu_bench.py wrote.

python scripts/benchmarks_md.py bench.json > docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MIB = 2**20
# Llama-8B, one sequence: layers, KV heads, query heads, head size, cells, kept, window
LAYERS, HEADS_KV, HEADS, HEAD, CELLS, KEPT, WINDOW = 32, 8, 32, 128, 1152, 1024, 8
H200 = {"bandwidth": 4.8e12, "f16": 989e12, "f32": 67e12}  # bytes and operations per second, data sheet


def number(value: float | None, digits: int = 0) -> str:
    """With thousands separators; a dash for nothing."""
    return "–" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """One decimal, two below 1 %."""
    return "–" if value is None else f"{100 * value:.{2 if value < 0.01 else 1}f} %"


def mib(value: float | None) -> str:
    """Bytes as MiB."""
    return "–" if value is None else f"{value / MIB:,.1f} MiB"


def floor() -> dict[str, float]:
    """Least time of one compaction of one sequence, in microseconds: bytes and operations by themselves."""
    row = HEADS_KV * HEAD * 2
    read = CELLS * row * LAYERS
    moved = 2 * 2 * KEPT * row * LAYERS  # K and V, read and written
    importance = 2 * HEADS * WINDOW * HEAD * CELLS * LAYERS
    search = 2 * CELLS * CELLS * HEAD * HEADS_KV * LAYERS  # no key has a copy
    return {
        "bytes": (read + moved) / H200["bandwidth"] * 1e6,
        "f32": importance / H200["f32"] * 1e6,
        "f16": search / H200["f16"] * 1e6,
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def targets(rows: dict[str, list[Row]]) -> str:
    """The table of what was to be reached."""
    out: list[list[str]] = []

    def line(what: str, value: str, reach: str, ok: bool) -> None:
        out.append([what, value, reach, "yes" if ok else "**no**"])

    def ratio(what: str, value: float, least: float) -> None:
        line(what, f"{value:.3f}", f"≥ {least}", value >= least)

    def share(what: str, value: float, most: float) -> None:
        line(what, percent(value), f"≤ {100 * most:.0f} %", value <= most)

    def size(what: str, value: float, most: int) -> None:
        line(what, mib(value), f"≤ {most} MiB", value <= most * MIB)

    for r in rows.get("one", []):
        ratio(f"{r['what']}, against stock at depth 1,024", r["ratio_1024"], 0.97)
        ratio("the same, against stock at depth 32,768", r["ratio_32768"], 1.28)
        share("share of compactions, 1 sequence", r["compaction_share"], 0.01)
        size("KV bytes, 1 sequence, f16", r["kv_bytes"], 160)
    for r in rows.get("q8_0", []):
        size("KV bytes, 1 sequence, q8_0", r["kv_bytes"], 85)
    for r in rows.get("many", []):
        ratio(f"{r['what']}, against as many of stock at depth 1,024", r["ratio_1024"], 0.93)
        ratio("the same, against 30 of stock at depth 8,192", r["ratio_30_8192"], 4.8)
        share(f"share of compactions, {r['what']}", r["compaction_share"], 0.05)
    return table(["what", "measured", "to reach", "reached"], out)


def speeds(report: Row) -> str:
    """All rows in tokens per second."""
    out = []
    for r in report["rows"]:
        stock = [
            f"{number(r[key], 1)} ({text})"
            for key, text in (
                ("stock_1024", "depth 1,024"),
                ("stock_32768", "depth 32,768"),
                ("stock_30_8192", "30 sequences at depth 8,192"),
                ("stock", "the same prompt"),
                ("without", "queries not stored"),
            )
            if key in r
        ]
        out.append(
            [
                r["what"],
                number(r["ours"], 1),
                "; ".join(stock) or "–",
                percent(r.get("compaction_share")),
                number(r.get("us_per_compaction")),
                mib(r.get("kv_bytes")),
            ]
        )
    head = [
        "what",
        "tokens/s",
        "stock tokens/s",
        "compactions' share",
        "µs per compaction",
        "KV bytes",
    ]
    return table(head, out)


def page(report: Row) -> str:
    """The whole document."""
    rows: dict[str, list[Row]] = {}
    for r in report["rows"]:
        rows.setdefault(r["part"], []).append(r)
    least = floor()
    parts = [
        "# Benchmarks\n",
        "Made by `scripts/benchmarks_md.py` from the JSON of `scripts/gpu_bench.py`; do not edit.\n",
        f"{report['date']}, {report['gpu']} ({report['memory']}, driver {report['driver']}). "
        f"{report['pins']}. Command: `{report['command']}`. Models of Llama-8B's shape with random weights, "
        "flash attention on, B = 1,024, S = 128. Speeds in one row are of one run (the first two tables"
        " in turns, else one after the other), all sequences together; a compaction's time is that of one "
        "sequence in all layers.\n",
        *(f"{note}\n" for note in report.get("notes", [])),
        "## What was to be reached\n",
        targets(rows),
        "The targets were set on an H100 and are ratios within one run.\n"
        if "H100" not in report["gpu"]
        else "",
        *(
            f"Stock's own {r['what']} at depth 1,024 are {r['stock_1024'] / r['stock_30_8192']:.2f} "
            "times as fast as its 30 at depth 8,192 in this run: no cache of this size could be more.\n"
            for r in rows.get("many", [])
        ),
        "## Speeds\n",
        speeds(report),
        "Random weights make keys that have no copies: every search for one goes through the whole cache, "
        "which text does not ask for. `latest` here is keys alone with one similarity, as its default then "
        "was.\n",
        "## Floor of a compaction\n",
        "One sequence, all layers, from the data sheet's rates of an H200: "
        f"{least['bytes']:.0f} µs for the bytes (K read once, {KEPT:,} rows of K and V read and written), "
        f"{least['f16']:.0f} µs for the search's products in float16 where no key has a copy, "
        f"{least['f32']:.0f} µs for the importance in float32.\n",
    ]
    return "\n".join(p for p in parts if p)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("report", type=Path)
    args = parser.parse_args(argv)
    sys.stdout.write(page(json.loads(args.report.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
