"""How the reasoner thinks: a trace for each problem, as segments of text that are learned or only read.

A trace restates, works step by step, sums up, doubts, checks and corrects itself. What is wrong in it (a slip
that the next sentence mends) is read but not learned: the model learns to notice slips, not to make them.
"""

from __future__ import annotations

import itertools
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # rkv_local, where it is not installed
from rkv_local.evals.problems import Fact, Problem

Segment = tuple[str, bool]  # text, learned

LEGS: dict[str, int] = {}  # filled from reasoning-gym's own questions (see learn_legs)

ORDERED = "There are"  # how the segment behind a chain's ordered facts begins

HUMS = (
    "Hmm, let me think about this again.",
    "I want to be sure.",
    "Let me go slowly here.",
    "Maybe I mixed up the names.",
    "Wait, is that right?",
    "Let me look at it from the other side.",
    "I should not rush.",
    "OK, once more.",
)
FINES = ("Good.", "That matches.", "Yes, that is right.", "OK, it holds.")


class Trace:
    """Text being written; slip() adds what is read but not learned."""

    def __init__(self, rng: random.Random, slips: float = 0.03, hints: bool = True) -> None:
        self.rng, self.slips, self.hints = rng, slips, hints
        self.segments: list[Segment] = []

    def say(self, text: str) -> None:
        """Learned text."""
        self.segments.append((text, True))

    def slip(self, wrong: str) -> None:
        """Text that is wrong."""
        self.segments.append((wrong, False))

    def result(self, work: str, value: int, how: str = "") -> None:
        """`work` followed by its value; now and then wrong at first, and mended."""
        if self.rng.random() < self.slips:
            wrong = value + self.rng.choice((-10, -2, -1, 1, 2, 10, 100))
            self.say(work)
            self.slip(f" {wrong}.")
            self.say(f" Wait, that is wrong. {how or work} {value}.")
        else:
            self.say(f"{work} {value}.")

    def hum(self, share: float) -> None:
        """A sentence of doubt, sometimes."""
        if self.rng.random() < share:
            self.say(f" {self.rng.choice(HUMS)}")

    def fine(self) -> None:
        """The end of a check."""
        self.say(f" {self.rng.choice(FINES)}\n")


# --- chains ---------------------------------------------------------------------------------------


def work_of(fact: Fact, value: dict[str, int]) -> str:
    """The sum that gives a fact's value, up to the equals sign."""
    if fact.op == "more":
        return f"{value[fact.refs[0]]} + {fact.k} ="
    if fact.op == "fewer":
        return f"{value[fact.refs[0]]} - {fact.k} ="
    if fact.op == "times":
        return f"{value[fact.refs[0]]} * {fact.k} ="
    if fact.op == "half":
        return f"{value[fact.refs[0]]} / 2 ="
    return f"{value[fact.refs[0]]} + {value[fact.refs[1]]} ="


def needs_of(fact: Fact, value: dict[str, int]) -> str:
    """What a fact builds on, with values."""
    return " and ".join(f"{r} has {value[r]}" for r in fact.refs)


def total(t: Trace, asked: list[str], value: dict[str, int]) -> int:
    """Add up what is asked."""
    if len(asked) == 2:
        a, b = (value[w] for w in asked)
        t.say(f"{asked[0]} has {a} and {asked[1]} has {b}. ")
        t.result(f"{a} + {b} =", a + b)
        t.say("\n")
        return a + b
    run = value[asked[0]]
    t.say(f"{asked[0]} {run}.")
    for who in asked[1:]:
        t.say(f" {who} {value[who]}: ")
        t.result(f"{run} + {value[who]} =", run + value[who])
        run += value[who]
    t.say("\n")
    return run


def solve_chain(t: Trace, facts: list[Fact], value: dict[str, int], summaries: bool) -> None:
    """Order the facts, then one pass through them."""
    t.say("Let me put the facts in order.\n")
    for i, f in enumerate(facts):
        after = f"After {facts[i - 1].who}: " if i and t.hints else ""
        t.say(f"{i + 1}. {after}{f.said()}\n")
    t.say(f"{ORDERED} {len(facts)} facts. Now step by step.\n")
    for i, f in enumerate(facts):
        t.say(f"Step {i + 1}: {f.said()}")
        if f.op != "is":
            t.say(f" {needs_of(f, value)}. ")
            t.result(work_of(f, value), f.value)
        if f.op != "is":
            t.say(f" So {f.who} has {f.value}.")
        t.say("\n")
        if summaries and i % 4 == 3 and i + 1 < len(facts):
            t.say("So far: " + ", ".join(f"{g.who} {g.value}" for g in facts[: i + 1]) + ".\n")


def dense_check(t: Trace, f: Fact, value: dict[str, int], items: str, turn: int) -> None:
    """A check of one step: recompute, or go back from the result."""
    if t.rng.random() < 0.15:
        t.say(f" Did I read that right? The problem says: {f.said(items)} Yes.")
    if f.op == "is":
        t.say(f" {f.who} has {f.value}, that is given.")
    elif turn % 2 == 0 or f.op == "both":
        t.say(f" {f.said()} {needs_of(f, value)}. ")
        t.result(work_of(f, value), f.value)
        t.say(f" I have {f.value} for {f.who}.")
    else:
        ref = f.refs[0]
        back = {"more": f"{f.value} - {f.k}", "fewer": f"{f.value} + {f.k}"}
        back |= {"times": f"{f.value} / {f.k}", "half": f"{f.value} * 2"}
        t.say(f" {f.said()} {f.who} has {f.value}, so {ref} should have ")
        t.result(f"{back[f.op]} =", value[ref])
        t.say(f" I have {value[ref]} for {ref}.")
    t.fine()


def places(n: int) -> list[int]:
    """Hundreds, tens, ones of a number, without zeros; [0] for 0."""
    return [d for d in (n // 100 * 100, n // 10 % 10 * 10, n % 10) if d] or [0]


def slow_sum(t: Trace, a: int, b: int) -> None:
    """a + b by tens and ones."""
    t.say(" Slowly:")
    for part in places(b):
        t.say(f" {a} + {part} = {a + part}.")
        a += part


def slow_difference(t: Trace, a: int, b: int) -> None:
    """a - b by tens and ones."""
    t.say(" Slowly:")
    for part in places(b):
        t.say(f" {a} - {part} = {a - part}.")
        a -= part


def sparse_check(t: Trace, f: Fact, value: dict[str, int], items: str, turn: int) -> None:
    """A long check of one step, in several ways."""
    t.hum(0.7)
    t.say(f" The problem says: {f.said(items)}")
    if f.op == "is":
        t.say(f" So {f.value} is given, there is nothing to compute. I used {f.value} for {f.who}.")
        t.hum(0.5)
        t.fine()
        return
    a = value[f.refs[0]]
    t.say(f" I found that {needs_of(f, value)}.")
    if f.op in ("more", "both"):
        b = f.k if f.op == "more" else value[f.refs[1]]
        slow_sum(t, a, b)
        t.say(f" So {f.who} has {f.value}.")
        t.hum(0.5)
        t.say(f" Back from there: {f.who} has {f.value}.")
        slow_difference(t, f.value, b)
        t.say(f" That is what {f.refs[0]} has.")
    elif f.op == "fewer":
        slow_difference(t, a, f.k)
        t.say(f" So {f.who} has {f.value}.")
        t.hum(0.5)
        t.say(f" Back from there: {f.who} has {f.value}.")
        slow_sum(t, f.value, f.k)
        t.say(f" That is what {f.refs[0]} has.")
    elif f.op == "times":
        run = a
        t.say(f" {f.k} times {a} is adding it up:")
        for _ in range(f.k - 1):
            slow_sum(t, run, a)
            run += a
        t.say(f" So {f.who} has {f.value}.")
        t.hum(0.5)
    else:
        t.say(f" Half of {a} twice is all of it.")
        slow_sum(t, f.value, f.value)
        t.say(f" That is what {f.refs[0]} has, so {f.who} has {f.value}.")
        t.hum(0.5)
    odd = "odd" if f.value % 2 else "even"
    if turn % 2:
        t.say(f" {f.value} ends in {f.value % 10}, so it is {odd}.")
    t.fine()


def chain(t: Trace, p: Problem) -> None:
    """Order, solve, check, add up."""
    facts: list[Fact] = p.data["facts"]
    items, checks = p.data["items"], p.data["checks"]
    value = {f.who: f.value for f in facts}
    dense = p.kind == "dense"
    solve_chain(t, facts, value, dense)
    t.say(f"Now {checks} checks.\n")
    n = len(facts)
    for c in range(checks):
        i = n - 1 - c % n if dense else c % n  # dense: backwards, so the oldest step waits longest
        t.say(f"Check {c + 1} of {checks}, step {i + 1}:")
        (dense_check if dense else sparse_check)(t, facts[i], value, items, c // n)
    t.say("The checks are done. Now what is asked.\n")
    total(t, p.data["asked"], value)


# --- long arithmetic ------------------------------------------------------------------------------


def spelled(n: int) -> str:
    """Digits from the right."""
    return " ".join(reversed(str(n)))


def column_sum(t: Trace, a: int, b: int) -> int:
    """a + b by columns from the right."""
    t.say(f"{a} + {b}. From the right: {spelled(a)} and {spelled(b)}.")
    carry, out = 0, a + b
    da, db = str(a)[::-1], str(b)[::-1]
    for i in range(max(len(da), len(db))):
        x, y = int(da[i]) if i < len(da) else 0, int(db[i]) if i < len(db) else 0
        s = x + y + carry
        t.say(f" {x} + {y} + {carry} = {s},")
        t.say(f" write {s % 10}.")
        carry = s // 10
    if carry:
        t.say(f" Then {carry}.")
    t.say(f" So {out}.\n")
    return out


def row_product(t: Trace, a: int, d: int) -> int:
    """a * d for a digit d, from the right."""
    carry, out = 0, a * d
    t.say(f"{a} * {d}. From the right: {spelled(a)}.")
    for x in map(int, str(a)[::-1]):
        s = x * d + carry
        t.say(f" {x} * {d} = {x * d}, + {carry} = {s}, write {s % 10}.")
        carry = s // 10
    if carry:
        t.say(f" Then {carry}.")
    t.say(f" So {out}.\n")
    return out


def sum_pass(t: Trace, terms: list[int]) -> None:
    """Add all terms, one after the other."""
    run = terms[0]
    for i, x in enumerate(terms[1:]):
        t.say(f"Number {i + 2}: ")
        run = column_sum(t, run, x)


def product_pass(t: Trace, a: int, b: int) -> None:
    """Long multiplication: rows for b's digits from the right, then their sum."""
    rows = []
    for i, d in enumerate(map(int, str(b)[::-1])):
        t.say(f"Row {i + 1}: ")
        row = row_product(t, a, d) * 10**i
        t.say(f"With {i} zeros: {row}.\n")
        rows.append(row)
    t.say("Rows: " + ", ".join(map(str, rows)) + ".\n")
    sum_pass(t, rows)


def digits(t: Trace, p: Problem) -> None:
    """Work it out, then again: sums from the last number, products with the factors exchanged, in turn."""
    terms, op, checks = p.data["terms"], p.data["op"], p.data["checks"]
    if op == "+":
        t.say(f"There are {len(terms)} numbers: " + ", ".join(map(str, terms)) + ".\n")
    else:
        t.say(f"The factors are {terms[0]} and {terms[1]}.\n")
    for turn in range(checks + 1):
        if turn:
            t.say(f"Check {turn} of {checks}.")
            t.hum(0.6)
            t.say(" From the last.\n" if turn % 2 else " From the first.\n")
        order = terms[::-1] if turn % 2 else terms
        if op == "+":
            t.say("Start with " + str(order[0]) + ".\n")
            sum_pass(t, order)
        else:
            product_pass(t, order[0], order[1])
        t.say(f"That gives {p.answer}.")
        t.fine() if turn else t.say("\n")


# --- reasoning-gym --------------------------------------------------------------------------------


def chain_sum(t: Trace, meta: dict[str, Any], turn: int) -> None:
    """Pluses, minuses, and their difference."""
    words = meta["expression"].split()
    plus: list[int] = [int(words[0])]
    minus: list[int] = []
    for sign, x in zip(words[1::2], words[2::2], strict=True):
        (plus if sign == "+" else minus).append(int(x))
    sums = []
    for name, xs in (("Plus", plus), ("Minus", minus)):
        if turn % 2:
            xs = xs[::-1]
        t.say(f"{name}: " + (", ".join(map(str, xs)) if xs else "nothing") + ".")
        run = xs[0] if xs else 0
        for x in xs[1:]:
            slow_sum(t, run, x)
            run += x
        t.say(f" {name} is {run}.\n")
        sums.append(run)
    a, b = sums
    if a >= b:
        t.say(f"{a} - {b}:")
        slow_difference(t, a, b)
        t.say(f" So {a - b}.\n")
    else:
        t.say(f"{b} is more than {a}, so it is negative. {b} - {a}:")
        slow_difference(t, b, a)
        t.say(f" So {a - b}.\n")


def leg_counting(t: Trace, meta: dict[str, Any], turn: int) -> None:
    """Each animal's legs, and a running total."""
    animals = list(meta["animals"].items())
    if turn % 2:
        animals = animals[::-1]
    run = 0
    for name, k in animals:
        legs = LEGS[name]
        t.say(f"{k} {name}: {legs} legs each. ")
        t.result(f"{k} * {legs} =", k * legs)
        t.say(f" {run} + {k * legs} = {run + k * legs}.\n")
        run += k * legs
    t.say(f"In all {run} legs.\n")


def number_sorting(t: Trace, meta: dict[str, Any], turn: int) -> None:
    """Take out the first of what is left, again and again; or compare neighbours."""
    down = meta["direction"] == "descending"
    if turn % 2:
        xs = meta["sorted_numbers"]
        t.say("Neighbours:")
        for a, b in itertools.pairwise(xs):
            t.say(f" {a} {'>=' if down else '<='} {b}.")
        t.say(f" There are {len(xs)} numbers.\n")
        return
    left = list(meta["original_numbers"])
    for x in meta["sorted_numbers"]:
        t.say(f"Left: {', '.join(left)}. The {'largest' if down else 'smallest'} is {x}.\n")
        left.remove(x)


GYM_STEPS = {"chain_sum": chain_sum, "leg_counting": leg_counting, "number_sorting": number_sorting}


def gym(t: Trace, p: Problem) -> None:
    """Work it out, then check it as often as asked."""
    meta, checks = p.data["entry"]["metadata"], p.data["checks"]
    for turn in range(checks + 1):
        if turn:
            t.say(f"Check {turn} of {checks}.")
            t.hum(0.6)
            t.say("\n")
        GYM_STEPS[meta["source_dataset"]](t, meta, turn)
        t.say(f"That gives {p.answer}.")
        t.fine() if turn else t.say("\n")


WRITERS = {"chain": chain, "digits": digits, "gym": gym}


def trace(p: Problem, rng: random.Random, slips: float = 0.03, hints: bool = True) -> list[Segment]:
    """What follows `<think>\\n`: the trace, `</think>`, the answer.

    slips: how often a result is wrong at first. hints: a chain's facts are put in order by asking who comes
    after whom (the first stage of training had none).
    """
    t = Trace(rng, slips, hints)
    WRITERS[p.family](t, p)
    t.say(f"</think>\nThe answer is {p.answer}.")
    return t.segments


def learn_legs() -> None:
    """Fill LEGS from reasoning-gym's own table of animals."""
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    LEGS.update(ANIMALS)
