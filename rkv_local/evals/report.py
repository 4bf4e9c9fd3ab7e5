"""docs/quality.md and other reports, as Markdown, from result files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rkv_local.budget import KVBudget
from rkv_local.cli.ui import markdown_table

from .stats import apart
from .summary import BUCKET, Row, Section, column, sections

__all__ = ["overview", "page", "title"]

PUBLISHED = "rkv"
COMPARED = (10, 16, 25, 34)  # percent of the mean trace
AIMS = {
    "dense": ((25, 0.97), (16, 0.90)),
    "sparse": ((10, 0.97),),
}  # budget, share of the full cache's accuracy
_NEAR = 1.5  # points that a budget may be off the percentage it stands for
NO_PLOTS = "Without plots: matplotlib is not installed (`pip install 'rkv-local[eval]'`)."

Plots = dict[str, list[tuple[str, str]]]  # section title → (what, path)


def pct(share: float, digits: int = 1) -> str:
    """A share as a percentage."""
    return f"{100 * share:.{digits}f} %"


def accuracy(row: Row | None) -> str:
    """With its interval; a dash for nothing."""
    if row is None:
        return "–"
    return f"{pct(row['accuracy'])} ({100 * row['low']:.1f}–{100 * row['high']:.1f})"


def lengths(row: Row | None) -> str:
    """Mean tokens and share at the limit."""
    return "–" if row is None else f"{row['mean_tokens']:,.0f} ({pct(row['limit_share'], 0)})"


def kl_text(row: Row | None) -> str:
    """KL with its interval, and top-1 agreement."""
    if row is None:
        return "–"
    return f"{row['kl']:.4f} ({row['kl_low']:.4f}–{row['kl_high']:.4f}), {pct(row['top1'])}"


def types(row: Row) -> str:
    """Of the cache."""
    return row["type_k"] if row["type_k"] == row["type_v"] else f"{row['type_k']}/{row['type_v']}"


def title(section: Section) -> str:
    """What a section is about, unique among the sections of a report."""
    task, row = section.task, section.rows[0]
    text = {
        "reason": lambda: (
            f"{task['kind'].capitalize()} problems ({task['split']} seeds: {', '.join(task['families'])})"
        ),
        "jsonl": lambda: f"{task['file']}",
        "needles": lambda: f"Needles in {task['tokens']:,} tokens of {task['text']}",
        "kl": lambda: f"Distance from the full cache over {task['tokens']:,} tokens of {task['text']}",
    }[section.kind]()
    extra = [row["model"]]
    if row["temp"]:
        extra.append(f"temperature {row['temp']:g}, seed {row['seed']}")
    return f"{text}: {', '.join(extra)}"


def heading(section: Section, col: tuple[int, float]) -> str:
    """A budget as the head of a column."""
    row = next(r for r in section.rows if column(r) == col)
    cells = f"{row['budget']:,} cells"
    if col[0] == 0:
        budgets = {r["budget"] for r in section.rows if column(r) == col}
        return f"{col[1]:g} % ({cells})" if len(budgets) == 1 else f"{col[1]:g} %"
    percent = row.get("budget_percent")
    return f"{cells} ({percent:.0f} %)" if percent else cells


def main_variants(section: Section) -> list[str]:
    """Rows of the main table: each policy's base, and other settings measured at three budgets."""
    seen = section.variants()
    return [label for label, cols in seen.items() if label == section.base(label) or len(cols) >= 3]


def sizes(rows: Sequence[Row | None]) -> str:
    """Of the cache of one sequence, smallest and largest, in MiB."""
    found = sorted({f"{row['bytes'] / 2**20:.2f}" for row in rows if row and row["bytes"]}, key=float)
    return "–".join(found[:1] + found[1:][-1:]) or "–"


def grid(section: Section, labels: Sequence[str], show: Any, last: str = "", column_of: Any = None) -> str:
    """A table of variants by budgets; last: a row more, of what column_of says of each column's rows."""
    cols = section.columns
    body = [[label, *(show(section.find(label, c)) for c in cols)] for label in labels]
    if last:
        body.append([last, *(column_of([section.find(label, c) for label in labels]) for c in cols)])
    return markdown_table(
        ["policy", *(heading(section, c) for c in cols)], body, [False] + [True] * len(cols)
    )


def by_tasks(section: Section) -> list[str]:
    """The tables of a section whose answers are right or wrong."""
    full, labels = section.full, main_variants(section)
    out = []
    if full is not None:
        text = (
            f"Full cache: {accuracy(full)} of {full['problems']:,} right, {full['mean_tokens']:,.0f} tokens "
            f"on average, at most {full['max_tokens']:,}, {pct(full['limit_share'])} at the limit of "
            f"{full['limit']:,}."
        )
        if "families" in full:
            text += (
                " By family: "
                + ", ".join(f"{name} {right}/{n}" for name, (right, n) in full["families"].items())
                + "."
            )
        out.append(text)
    if labels:
        text = grid(section, labels, accuracy, "MiB a sequence", sizes)
        out += ["Right answers, with 95 % intervals:", text]
        if section.kind != "needles":
            out += [
                "Mean tokens of a trace, and the share that hit the limit:",
                grid(section, labels, lengths),
            ]
    if section.kind == "needles":
        out += depth_table(section, labels)
    return out


def depth_table(section: Section, labels: Sequence[str]) -> list[str]:
    """Needles found, by depth."""
    rows = [r for r in [section.full] if r] + [
        row for label in labels for c in section.columns if (row := section.find(label, c))
    ]
    depths = sorted({d for r in rows for d in r["depths"]})
    body = [
        [
            r["variant"],
            "–" if r["budget"] is None else f"{r['budget']:,}",
            *(f"{r['depths'][d][0]}/{r['depths'][d][1]}" if d in r["depths"] else "–" for d in depths),
        ]
        for r in rows
    ]
    head = ["policy", "cells", *(f"{100 * float(d):.0f} %" for d in depths)]
    return ["Found, by depth in the text:", markdown_table(head, body, [False] + [True] * (len(head) - 1))]


def by_distance(section: Section) -> list[str]:
    """The table of a section of KL divergences."""
    row = section.rows[0]
    text = (
        "KL divergence from the full f16 cache in nats, with 95 % intervals by the standard error of "
        f"stretches of {BUCKET} tokens, and the share of positions with the same likeliest token. Means over "
        f"{row['positions']:,} positions from {row['from_position']:,} on, read "
        f"{section.task['step']} tokens at a time. The full cache's own loss is {row['nll_full']:.3f} nats."
    )
    full = [["full cache", types(r), kl_text(r)] for r in section.rows if r["kv"] is None]
    out = [text, grid(section, main_variants(section), kl_text)]
    return out + ([markdown_table(["", "cache", "distance"], full, [False] * 3)] if full else [])


def cell(section: Section, row: Row | None) -> str:
    """The main number of a row."""
    return kl_text(row) if section.kind == "kl" else accuracy(row)


def shared_heads(section: Section) -> list[str]:
    """One index set for all heads and layers against one for each."""
    body = []
    for row in section.of_types():
        if row["kv"] is None or not row["kv"].get("shared_heads"):
            continue
        label = row["variant"].replace(" shared_heads", "")
        own = section.find(label, column(row))
        body.append([label, heading(section, column(row)), cell(section, own), cell(section, row)])
    if not body:
        return []
    head = ["policy", "budget", "each layer and head its own cells", "one index set for all"]
    return [
        "**Per head against one index set for all heads and layers:**",
        markdown_table(head, body, [False] * 4),
    ]


def quantised(section: Section) -> list[str]:
    """Other cache types against f16."""
    body = []
    for row in section.rows:
        if (row["type_k"], row["type_v"]) == ("f16", "f16"):
            continue
        budget = "–" if row["kv"] is None else heading(section, column(row))
        body.append(
            [
                row["variant"],
                budget,
                types(row),
                cell(section, section.find(row["variant"], column(row))),
                cell(section, row),
                f"{row['bytes'] / 2**20:.2f} MiB" if row["bytes"] else "–",
            ]
        )
    if not body:
        return []
    head = ["policy", "budget", "type", "f16", "this type", "bytes"]
    return ["**Cache types:**", markdown_table(head, body, [False] * 5 + [True])]


def ablations(section: Section) -> list[str]:
    """Parameters that differ from the defaults, beside the same policy without them."""
    main = main_variants(section)
    body = []
    for row in section.of_types():
        if row["kv"] is None or row["kv"].get("shared_heads"):
            continue
        label = section.base(row["variant"])
        base = section.find(label, column(row))
        if row["variant"] == label or (base is None and row["variant"] in main):
            continue
        changed = row["variant"].partition(" ")[2] or "defaults"
        body.append([label, changed, heading(section, column(row)), cell(section, base), cell(section, row)])
    if not body:
        return []
    head = ["policy", "with", "budget", "as in the table above", "so"]
    return ["**Ablations:**", markdown_table(head, body, [False] * 5)]


def at_percent(section: Section, label: str, percent: float) -> Row | None:
    """The f16 row of a variant nearest to a share of the mean trace, if it is near."""
    rows = [r for r in section.of_types() if r["variant"] == label and r.get("budget_percent")]

    def off(row: Row) -> float:
        return abs(row["budget_percent"] - percent)

    best = min(rows, key=off, default=None)
    return best if best is not None and off(best) <= _NEAR else None


def verdict(section: Section, default: str, published: str) -> list[str]:
    """The default policy against R-KV as published, and against what was aimed at."""
    kind, full = section.task["kind"], section.full
    out, body, clear = [], [], 0
    for percent in COMPARED:
        ours, theirs = at_percent(section, default, percent), at_percent(section, published, percent)
        if ours is None or theirs is None or default == published:
            continue
        separate = apart((ours["low"], ours["high"]), (theirs["low"], theirs["high"]))
        better = ours["accuracy"] > theirs["accuracy"]
        clear += separate and better
        said = (
            "better" if better else "equal" if ours["accuracy"] == theirs["accuracy"] else "**worse**"
        ) + (", intervals apart" if separate else ", intervals overlap")
        body.append([f"{percent} %", f"{ours['budget']:,}", accuracy(ours), accuracy(theirs), said])
    if body:
        head = ["budget", "cells", default, published, "verdict"]
        out.append(markdown_table(head, body, [True, True, False, False, False]))
        wins = sum(line[-1].startswith("better") for line in body)
        out.append(f"Better at {wins} of {len(body)} budgets, with intervals apart at {clear}.")
    else:
        out.append(
            f"The default policy is {published} itself."
            if default == published
            else f"Nothing to compare: {default} and {published} were not measured at the same budgets."
        )
    for percent, aim in AIMS.get(kind, ()):
        row = at_percent(section, default, percent)
        if row is None or full is None or not full["accuracy"]:
            out.append(f"- Aim at {percent} %: {pct(aim, 0)} of the full cache's accuracy. Not measured.")
            continue
        share = row["accuracy"] / full["accuracy"]
        met = "reached" if share >= aim else f"missed by {100 * (aim - share):.1f} points"
        out.append(f"- Aim at {percent} %: {pct(aim, 0)} of the full cache's accuracy. {pct(share)}: {met}.")
    return out


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
    devices = sorted({d for r in rows for d in r["device"]})
    builds = sorted(
        {
            f"rkv-local {v.get('rkv-local')}, {v.get('build')}"
            for r in rows
            for v in map(json.loads, r["versions"])
        }
    )
    dates = sorted({r["date"] for r in rows if r["date"]})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "unknown date"
    hours = sum(r["seconds"] for r in rows) / 3600
    return (
        f"Models: {'; '.join(models)}. Computed on: {', '.join(devices)}. {'; '.join(builds)}. {when}, "
        f"{hours:.1f} hours in all."
    )


def page(
    rows: Sequence[Row],
    default: str | None = None,
    plots: Plots | None = None,
    published: str = PUBLISHED,
    note: str = "",
) -> str:
    """The whole report.

    default: the variant that the verdict is about (None: KVBudget's policy); published: what it is compared
    with; plots: by section title; note: a line below the head.
    """
    default = default or KVBudget().policy
    found = sections(rows)
    parts = [
        "# Quality",
        "Made by `rkv-local eval report` from result files; do not edit. Percentages of a budget are of the "
        "full cache's mean trace on the same problems. Intervals are Wilson's, 95 %.",
        origin(rows) if rows else "There are no results.",
        *([note] if note else []),
    ]
    reasons = [s for s in found if s.kind == "reason" and len(s.of_types()) > 1]
    if reasons:
        parts.append("## Verdict")
        for section in reasons:
            parts += [f"### {title(section)}", *verdict(section, default, published)]
    for section in found:
        parts.append(f"## {title(section)}")
        parts += by_distance(section) if section.kind == "kl" else by_tasks(section)
        parts += [f"![{what}]({path})" for what, path in (plots or {}).get(title(section), [])]
        for extra in (shared_heads, quantised, ablations):
            parts += extra(section)
    return "\n\n".join(parts) + "\n"
