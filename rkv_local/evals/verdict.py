"""Is the default policy better than R-KV as published, and is it as good as was aimed at?"""

from __future__ import annotations

from collections.abc import Sequence

from rkv_local.budget import KVBudget
from rkv_local.cli.ui import markdown_table

from .stats import apart
from .summary import Row, Section
from .tables import accuracy, pct

__all__ = ["AIMS", "COMPARED", "PUBLISHED", "at_percent", "candidate", "headline", "verdict"]

PUBLISHED = "rkv"
COMPARED = (10, 16, 25, 34)  # percent of the mean trace
AIMS = {
    "dense": ((25, 0.97), (16, 0.90)),
    "sparse": ((10, 0.97),),
}  # budget, share of the full cache's accuracy
_NEAR = 1.5  # points that a budget may be off the percentage it stands for


def candidate() -> str:
    """The policy that is compared with R-KV: the default one."""
    return KVBudget().policy


def at_percent(section: Section, label: str, percent: float) -> Row | None:
    """The f16 row of a variant at a share of the mean trace: the one made for it, else the nearest."""
    rows = [r for r in section.of_types() if r["variant"] == label and r.get("budget_percent")]

    def off(row: Row) -> tuple[bool, float, int]:
        asked = row["asked_percent"] == percent
        return not asked, 0.0 if asked else abs(row["budget_percent"] - percent), -row["problems"]

    best = min(rows, key=off, default=None)
    return best if best is not None and abs(best["budget_percent"] - percent) <= _NEAR else None


def share(row: Row) -> float | None:
    """Of the full cache's accuracy on the same problems; None where that is 0 or not known."""
    return row["accuracy"] / row["full_accuracy"] if row.get("full_accuracy") else None


def judged(ours: Row, theirs: Row) -> str:
    """Two rows in words."""
    better, equal = ours["accuracy"] > theirs["accuracy"], ours["accuracy"] == theirs["accuracy"]
    separate = apart((ours["low"], ours["high"]), (theirs["low"], theirs["high"]))
    said = "better" if better else "equal" if equal else "**worse**"
    return said + (", intervals apart" if separate else ", intervals overlap")


def score(both: Sequence[tuple[int, Row, Row]]) -> str:
    """How often the first was better."""
    said = [judged(a, b) for _, a, b in both]
    wins = sum(words.startswith("better") for words in said)
    clear = sum(words == "better, intervals apart" for words in said)
    return f"better at {wins} of {len(said)} budgets, with intervals apart at {clear}"


def pairs(section: Section, ours: str, theirs: str) -> list[tuple[int, Row, Row]]:
    """(percent, row, row) of the budgets where both were measured."""
    if ours == theirs:
        return []
    found = [(p, at_percent(section, ours, p), at_percent(section, theirs, p)) for p in COMPARED]
    return [(p, a, b) for p, a, b in found if a is not None and b is not None]


def verdict(section: Section, default: str, published: str) -> list[str]:
    """The default policy against R-KV as published, and against what was aimed at."""
    out = []
    both = pairs(section, default, published)
    body = [
        [f"{percent} %", f"{a['budget']:,}", accuracy(a), accuracy(b), judged(a, b)] for percent, a, b in both
    ]
    if body:
        head = ["budget", "cells", default, published, "verdict"]
        out.append(markdown_table(head, body, [True, True, False, False, False]))
        numbers = {r["problems"] for _, *two in both for r in two}
        if len(numbers) > 1:
            out.append(
                f"Of {min(numbers):,} to {max(numbers):,} problems: the tables below say which of how many."
            )
        out.append(f"{score(both).capitalize()}.")
    else:
        out.append(
            f"The default policy is {published} itself."
            if default == published
            else f"Nothing to compare: {default} and {published} were not measured at the same budgets."
        )
    for percent, aim in AIMS.get(section.task["kind"], ()):
        said = aimed(section, default, percent, aim)
        out.append(f"- Aim at {percent} %: {pct(aim, 0)} of the full cache's accuracy. {said}.")
    return out


def aimed(section: Section, label: str, percent: int, aim: float) -> str:
    """How far a variant is from an aim."""
    row = at_percent(section, label, percent)
    reached = share(row) if row else None
    if row is None or reached is None:
        return "Not measured"
    met = "reached" if reached >= aim else f"missed by {100 * (aim - reached):.1f} points"
    return f"{pct(reached)} on {row['problems']:,} problems: {met}"


def headline(sections: Sequence[Section], default: str, published: str) -> str:
    """The verdict in a few sentences, "" where nothing can be said."""
    said = []
    for section in sections:
        kind, both = section.task["kind"], pairs(section, default, published)
        if not both:
            continue
        words = [f"{p} %: {judged(a, b)} ({pct(a['accuracy'])} and {pct(b['accuracy'])})" for p, a, b in both]
        said.append(
            f"**{kind.capitalize()} problems, {section.task['split']} seeds**: `{default}` is {score(both)}; "
            f"at {'; at '.join(words)}."
        )
        aims = [
            f"at {p} % ({pct(aim, 0)}): {aimed(section, default, p, aim).lower()}"
            for p, aim in AIMS.get(kind, ())
        ]
        if aims:
            said.append(f"Aims, as shares of the full cache's accuracy, {'; '.join(aims)}.")
    if not said:
        return ""
    return "\n\n".join(
        [
            f"Right answers with a cache of fixed size: `{default}` against R-KV as published "
            f"(`{published}`). Budgets are in percent of the full cache's mean trace.",
            *said,
        ]
    )
