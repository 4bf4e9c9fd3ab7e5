"""docs/quality.md and other reports, as Markdown, from result files."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rkv_local.budget import KVBudget
from rkv_local.cli.ui import markdown_table

from .summary import Row, Section, sections
from .tables import accuracy, pct, section_tables, title, types
from .verdict import PUBLISHED, headline, verdict

__all__ = ["overview", "page", "title"]

NO_PLOTS = "Without plots: matplotlib is not installed (`pip install 'rkv-local[eval]'`)."
MADE_BY = "Made by `rkv-local eval report` from result files"

Plots = dict[str, list[tuple[str, str]]]  # section title → (what, path)


def overview(rows: Sequence[Row]) -> str:
    """A short table of any rows, for the terminal."""
    out = []
    for section in sections(rows):
        if section.kind == "kl":
            head = ["policy", "cells", "cache", "KL", "top-1", "MiB"]
            body = [
                [
                    r["variant"],
                    "–" if r["budget"] is None else f"{r['budget']:,}",
                    types(r),
                    f"{r['kl']:.4f} ({r['kl_low']:.4f}–{r['kl_high']:.4f})",
                    pct(r["top1"]),
                    f"{(r['bytes'] or 0) / 2**20:.2f}",
                ]
                for r in section.rows
            ]
        else:
            head = [
                "policy",
                "cells",
                "% of trace",
                "cache",
                "right",
                "tokens",
                "max",
                "at limit",
                "MiB",
                "s",
            ]
            body = [
                [
                    r["variant"],
                    "–" if r["budget"] is None else f"{r['budget']:,}",
                    f"{r['budget_percent']:.0f}" if r["budget_percent"] else "–",
                    types(r),
                    f"{r['correct']}/{r['problems']} {accuracy(r)}",
                    f"{r['mean_tokens']:,.0f}",
                    f"{r['max_tokens']:,}",
                    pct(r["limit_share"], 0),
                    f"{(r['bytes'] or 0) / 2**20:.2f}",
                    f"{r['seconds']:.0f}",
                ]
                for r in section.rows
            ]
        right = [False, True] + [True] * (len(head) - 2)
        out.append(f"{title(section)}\n\n{markdown_table(head, body, right)}")
    return "\n\n".join(out) if out else "no results"


def origin(rows: Sequence[Row]) -> str:
    """Models, devices and versions."""
    models = sorted({f"{r['model']} (sha256 {r['sha256'][:16]})" for r in rows})
    builds = sorted(
        {
            f"rkv-local {v.get('rkv-local')}, {v.get('build')}"
            for r in rows
            for v in map(json.loads, r["versions"])
        }
    )
    hours = sum(r["seconds"] for r in rows) / 3600
    return f"Models: {'; '.join(models)}. {measured(rows)} {'; '.join(builds)}. {hours:.1f} hours in all."


def measured(rows: Sequence[Row]) -> str:
    """On what and when."""
    devices = sorted({d for r in rows for d in r["device"]})
    dates = sorted({r["date"] for r in rows if r["date"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "unknown date"
    return f"Computed on: {', '.join(devices)}. {when}."


def sampling(section: Section) -> str:
    """How answers were made, and on what."""
    row = section.rows[0]
    how = f"temperature {row['temp']:g}, seed {row['seed']}" if row["temp"] else "greedy"
    return f"{how.capitalize()}, at most {row['limit']:,} tokens. {measured(section.rows)}"


def page(
    rows: Sequence[Row],
    default: str | None = None,
    plots: Plots | None = None,
    published: str = PUBLISHED,
    note: str = "",
    made_by: str = MADE_BY,
    notes: str = "",
    tail: str = "",
) -> str:
    """The whole report.

    default: the variant that the verdict is about (None: KVBudget's policy); published: what it is compared
    with; plots: by section title; note: a line below the head; made_by: how the head begins; notes: Markdown
    written by hand, below the verdict; tail: Markdown at the end.
    """
    default = default or KVBudget().policy
    found = sections(rows)
    reasons = [s for s in found if s.kind == "reason" and len(s.of_types()) > 1]
    parts = [
        "# Quality",
        f"{made_by}; do not edit. Percentages of a budget are of the full cache's mean trace on the same "
        "problems. Intervals are Wilson's, 95 %.",
        headline(reasons, default, published),
        origin(rows) if rows else "There are no results.",
        note,
    ]
    if reasons:
        parts.append("## Verdict")
        for section in reasons:
            parts += [f"### {title(section)}", *verdict(section, default, published)]
    parts.append(notes.strip())
    for section in found:
        main, more = section_tables(section)
        parts.append(f"## {title(section)}")
        parts += [] if section.kind == "kl" else [sampling(section)]
        parts += main
        parts += [f"![{what}]({path})" for what, path in (plots or {}).get(title(section), [])]
        parts += more
    parts.append(tail.strip())
    return "\n\n".join(part for part in parts if part) + "\n"
