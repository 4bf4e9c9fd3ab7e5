"""The tables of a report's sections, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rkv_local.cli.ui import markdown_table

from .summary import BUCKET, Row, Section, column, rank

__all__ = ["accuracy", "kl_text", "main_variants", "pct", "section_tables", "title", "types"]

Column = tuple[int, float]
Show = Callable[[Row | None], str]


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
    """Rows of the main table: each policy's base, and other settings measured at three budgets.

    What stands beside its counterpart in a table of its own (index sets shared by heads, calibrated layers)
    is not among them.
    """
    return [
        label
        for label, cols in section.variants.items()
        if not counterparts(section, label) and (label == section.base(label) or len(cols) >= 3)
    ]


def counterparts(section: Section, label: str) -> list[tuple[str, str]]:
    """(a word of CONTRASTS in a variant's name, the variant without it), where that was measured."""
    found, words = [], label.split()
    for word in CONTRASTS:
        plain = " ".join(part for part in words if part != word)
        if word == "shared_heads" and f"{plain} layers=uniform" in section.variants:
            plain += " layers=uniform"  # one index set has no budgets by layer
        if word in words and plain in section.variants:
            found.append((word, plain))
    return found


def sizes(rows: Sequence[Row | None]) -> str:
    """Of the cache of one sequence, smallest and largest, in MiB."""
    found = sorted({f"{row['bytes'] / 2**20:.2f}" for row in rows if row and row["bytes"]}, key=float)
    return "–".join(found[:1] + found[1:][-1:]) or "–"


def grid(
    section: Section, lines: Sequence[tuple[str, Sequence[Row | None]]], show: Show, head: str = "policy"
) -> str:
    """A table: its lines' labels, and one row of results for each of the section's columns.

    Columns in which no line has anything are left out.
    """
    cols = section.columns
    used = [i for i in range(len(cols)) if any(rows[i] for _, rows in lines)]
    body = [[label, *(show(rows[i]) for i in used)] for label, rows in lines]
    heads = [head, *(heading(section, cols[i]) for i in used)]
    return markdown_table(heads, body, [False] + [True] * len(used))


def line(section: Section, label: str, rows: Sequence[Row] | None = None) -> list[Row | None]:
    """A variant's results in the section's columns."""
    return [section.find(label, c, rows) for c in section.columns]


def counted(section: Section, row: Row | None) -> str:
    """The main number of a row: KL, or accuracy; with the number of problems where others have more."""
    if row is None or section.kind == "kl":
        return kl_text(row)
    return accuracy(row) + ("" if row["problems"] == section.problems else f" of {row['problems']:,}")


def by_tasks(section: Section) -> list[str]:
    """The main tables of a section whose answers are right or wrong."""
    full, labels = section.full, main_variants(section)
    out = []
    if full is not None:
        text = (
            f"Full cache: {accuracy(full)} of {full['problems']:,} right, {full['mean_tokens']:,.0f} tokens "
            f"on average, at most {full['max_tokens']:,}, {pct(full['limit_share'])} at the limit of "
            f"{full['limit']:,}."
        )
        if "families" in full:
            parts = (f"{name} {right}/{n}" for name, (right, n) in full["families"].items())
            text += f" By family: {', '.join(parts)}."
        out.append(text)
    if labels:
        lines = [(label, line(section, label)) for label in labels]
        body = grid(section, lines, lambda row: counted(section, row))
        fewer = any(r["problems"] != section.problems for r in section.rows)
        note = "; “of n” where it is another number" if fewer else ""
        out += [f"Right answers of {section.problems:,} problems{note}, with 95 % intervals:", body]
        if section.kind != "needles":
            out += [
                "Mean tokens of a trace, and the share that hit the limit:",
                grid(section, lines, lengths),
            ]
        out += memory(section, labels)
    if section.kind == "needles":
        out += depth_table(section, labels)
    return out


def memory(section: Section, labels: Sequence[str]) -> list[str]:
    """Bytes of a sequence's cache, by budget."""
    parts = []
    for col in section.columns:
        size = sizes([section.find(label, col) for label in labels])
        if size != "–":
            parts.append(f"{size} MiB at {heading(section, col)}")
    return [f"Memory of a sequence: {', '.join(parts)}."] if parts else []


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
    """The main table of a section of KL divergences."""
    row = section.rows[0]
    # of other devices it is a little different
    losses = sorted({f"{r['nll_full']:.3f}" for r in section.rows})
    loss = " to ".join(dict.fromkeys((losses[0], losses[-1])))
    text = (
        "KL divergence from the full f16 cache in nats, with 95 % intervals by the standard error of "
        f"stretches of {BUCKET} tokens, and the share of positions with the same likeliest token. Means over "
        f"{row['positions']:,} positions from {row['from_position']:,} on, read "
        f"{section.task['step']} tokens at a time. The full cache's own loss is {loss} nats."
    )
    full = [["full cache", types(r), kl_text(r)] for r in section.rows if r["kv"] is None]
    labels = main_variants(section)
    out = [text]
    if labels:
        out.append(grid(section, [(label, line(section, label)) for label in labels], kl_text))
    return out + ([markdown_table(["", "cache", "distance"], full, [False] * 3)] if full else [])


_SHARED = "One index set for all heads and layers, against one for each (every layer the same budget)"
_LAYERS = "Calibrated budgets by layer, against uniform ones"
# a word of a variant's name: (title, what the line without it is, what the line with it is)
CONTRASTS = {
    "shared_heads": (_SHARED, "each layer and head its own cells", "one index set for all"),
    "layers=calibrated": (_LAYERS, "uniform", "calibrated"),
    "layers=uniform": (_LAYERS, "calibrated", "uniform"),
}


def contrasts(section: Section) -> list[str]:
    """Tables of two ways beside each other, where one was measured as an alternative to the other."""
    tables: dict[str, list[tuple[str, list[Row | None]]]] = {name: [] for name, *_ in CONTRASTS.values()}
    for label in section.variants:
        for word, plain in counterparts(section, label):
            name, usual, other = CONTRASTS[word]
            policy = " ".join(part for part in label.split() if part != word)
            with_word = line(section, label)
            without = [r if w else None for r, w in zip(line(section, plain), with_word, strict=True)]
            pair = [(f"{policy}: {usual}", without), (f"{policy}: {other}", with_word)]
            tables[name] += pair[::-1] if other == "uniform" else pair
    out = []
    for name, lines in tables.items():
        if lines:
            out += [f"**{name}:**", grid(section, lines, lambda row: counted(section, row))]
    return out


def quantised(section: Section) -> list[str]:
    """Other cache types, with what they are with f16 beside them."""
    out = []
    for kind in dict.fromkeys((r["type_k"], r["type_v"]) for r in section.rows):
        rows = section.of_types(*kind)
        if kind == ("f16", "f16"):
            continue
        out.append(f"**Cache type {types(rows[0])}** (f16 in brackets):")

        def beside(row: Row | None) -> str:
            if row is None:
                return "–"
            plain = section.full if row["kv"] is None else section.find(row["variant"], column(row))
            same = plain if plain and (plain["type_k"], plain["type_v"]) == ("f16", "f16") else None
            return f"{counted(section, row)} [{counted(section, same)}]"

        out += [f"Full cache: {beside(row)}." for row in rows if row["kv"] is None]
        labels = sorted({r["variant"] for r in rows if r["kv"] is not None}, key=rank)
        if labels:
            out.append(grid(section, [(label, line(section, label, rows)) for label in labels], beside))
    return out


def ablations(section: Section) -> list[str]:
    """One setting changed, below the same policy without the change: a table for each policy."""
    main = main_variants(section)
    tables: dict[str, list[str]] = {}
    for label in section.variants:
        base = section.base(label)
        if label == base or counterparts(section, label):
            continue
        if label in main and not any(line(section, base)):
            continue
        tables.setdefault(base, []).append(label)
    out = []
    for base, labels in tables.items():
        changed = [(label.partition(" ")[2] or "defaults", line(section, label)) for label in labels]
        used = [any(rows[i] for _, rows in changed) for i in range(len(section.columns))]
        plain = [row if use else None for row, use in zip(line(section, base), used, strict=True)]
        body = grid(section, [("as above", plain), *changed], lambda row: counted(section, row), base)
        out += [f"**Ablations of {base}:**", body]
    return out


def section_tables(section: Section) -> tuple[list[str], list[str]]:
    """(the main tables, those that stand below the plots)."""
    main = by_distance(section) if section.kind == "kl" else by_tasks(section)
    return main, [*contrasts(section), *quantised(section), *ablations(section)]
