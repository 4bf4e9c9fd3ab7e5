"""Problems for the reasoner in models/, each from a seed: chains of quantities, long arithmetic, sorting.

A problem is of one of two kinds. *dense*: many facts, all needed, some of them hundreds of tokens after they
were last read. *sparse*: few facts under a long trace of checking. Seeds of the splits train, dev, final and
fresh (for what was changed after the final seeds had been asked) are disjoint.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FAMILIES", "KINDS", "SPLITS", "Fact", "Problem", "problem", "problems"]

KINDS = ("dense", "sparse")
# first seed of each split; a split has room for 2**40 problems
SPLITS = {"train": 0, "dev": 1 << 40, "final": 2 << 40, "fresh": 3 << 40}

LONGEST = 3900  # tokens of a trace, about: the reasoner's context has 4,096, the question among them

# fmt: off
NAMES = (
    "Tom", "Mia", "Zoe", "Ann", "Ben", "Eva", "Max", "Lea", "Sam", "Ida", "Leo", "Amy", "Jim", "Kim",
    "Ron", "Sue", "Ted", "Una", "Vic", "Wes", "Abe", "Bea", "Cal", "Dot", "Eli", "Fay", "Gus", "Hal",
    "Ivy", "Jan", "Ken", "Liz", "Mac", "Nan", "Ora", "Pam", "Ray", "Sal", "Tia", "Uma",
)
ITEMS = (
    "coins", "cards", "stamps", "books", "shells", "stones", "apples", "marbles", "stickers", "buttons",
    "pencils", "tickets",
)
# fmt: on


@dataclass(frozen=True)
class Problem:
    """A question with one right answer.

    Args:
        id: family/kind/split/number, unique.
        family: a key of FAMILIES.
        kind: "dense" or "sparse".
        question: the user's message.
        answer: what follows "The answer is ", without the full stop.
        data: what a trace is written from (models/train/traces.py).
    """

    id: str
    family: str
    kind: str
    question: str
    answer: str
    data: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Fact:
    """`who` has `op` of `refs`: ops "is", "more", "fewer", "times", "half", "both"; k is the number in it."""

    who: str
    op: str
    k: int
    refs: tuple[str, ...]
    value: int

    def said(self, items: str = "") -> str:
        """As a statement, with the things counted if they are given."""
        s = f" {items}" if items else ""
        if self.op == "is":
            return f"{self.who} has {self.k}{s}."
        ref = self.refs[0]
        if self.op in ("more", "fewer"):
            return f"{self.who} has {self.k} {self.op}{s} than {ref}."
        if self.op == "times":
            return f"{self.who} has {self.k} times as many{s} as {ref}."
        if self.op == "half":
            return f"{self.who} has half as many{s} as {ref}."
        return f"{self.who} has as many{s} as {ref} and {self.refs[1]} together."


def checks_text(n: int) -> str:
    """The sentence that asks for n checks."""
    return f"Check {n} times."


# --- chains of quantities -------------------------------------------------------------------------


def _next_fact(rng: random.Random, who: str, known: list[Fact]) -> Fact:
    last = known[-1]
    v = last.value
    while True:
        op = rng.choice(("more", "more", "fewer", "fewer", "times", "half", "both"))
        if op == "more" and v <= 400:
            k = rng.randint(2, 99)
            return Fact(who, op, k, (last.who,), v + k)
        if op == "fewer" and v >= 12:
            k = rng.randint(2, min(99, v - 3))
            return Fact(who, op, k, (last.who,), v - k)
        if op == "times" and v <= 130:
            k = rng.choice((2, 3))
            return Fact(who, op, k, (last.who,), v * k)
        if op == "half" and v % 2 == 0 and v >= 12:
            return Fact(who, op, 2, (last.who,), v // 2)
        if op == "both" and len(known) > 2:
            other = rng.choice(known[:-1])
            if v + other.value <= 500:
                return Fact(who, op, 0, (last.who, other.who), v + other.value)


def _chain(rng: random.Random, kind: str) -> tuple[str, str, Any]:
    n = rng.randint(8, 20) if kind == "dense" else rng.randint(4, 6)
    checks = rng.randint(8, 36) if kind == "dense" else rng.randint(12, 26)
    if kind == "dense":
        checks = min(checks, (LONGEST - 115 * n) // 59)  # tokens of a fact, and of a check
    names = rng.sample(NAMES, n)
    items = rng.choice(ITEMS)
    first = rng.randint(5, 99)
    facts = [Fact(names[0], "is", first, (), first)]
    for who in names[1:]:
        facts.append(_next_fact(rng, who, facts))
    shuffled = rng.sample(facts, n)
    text = " ".join(f.said(items) for f in shuffled)
    if rng.random() < 0.5:
        asked = [f.who for f in facts]
        question = f"How many {items} do they have in all?"
        answer = sum(f.value for f in facts)
    else:
        pair = sorted(rng.sample(range(n), 2))
        asked = [facts[i].who for i in pair]
        question = f"How many {items} do {asked[0]} and {asked[1]} have together?"
        answer = sum(facts[i].value for i in pair)
    data = {"facts": facts, "items": items, "asked": asked, "checks": checks}
    return f"{text} {question} {checks_text(checks)}", str(answer), data


# --- long arithmetic ------------------------------------------------------------------------------


def _digits(rng: random.Random, kind: str) -> tuple[str, str, Any]:
    if rng.random() < 0.6:
        if kind == "dense":
            n, width, checks = rng.randint(4, 7), rng.randint(4, 6), rng.randint(1, 2)
        else:
            n, width, checks = 2, rng.randint(4, 6), rng.randint(8, 14)
        terms = [rng.randint(10 ** (width - 1), 10**width - 1) for _ in range(n)]
        answer = sum(terms)
        question = f"Add {', '.join(map(str, terms[:-1]))} and {terms[-1]}."
        op, one_pass = "+", 31 * (len(terms) - 1) * (width + 1)  # tokens
    else:
        widths = (rng.randint(3, 5), rng.randint(2, 4)) if kind == "dense" else (rng.randint(2, 3), 2)
        checks = rng.randint(1, 2) if kind == "dense" else rng.randint(5, 9)
        terms = [rng.randint(10 ** (w - 1), 10**w - 1) for w in widths]
        answer = terms[0] * terms[1]
        question = f"Multiply {terms[0]} by {terms[1]}."
        op, one_pass = "*", 86 * widths[0] * widths[1]
    checks = min(checks, LONGEST // one_pass - 1)
    return f"{question} {checks_text(checks)}", str(answer), {"terms": terms, "op": op, "checks": checks}


# --- reasoning-gym --------------------------------------------------------------------------------

GYM: dict[str, dict[str, dict[str, Any]]] = {
    "dense": {
        "chain_sum": {"min_terms": 3, "max_terms": 8, "min_digits": 2, "max_digits": 3},
        "leg_counting": {},
        "number_sorting": {"min_decimals": 0, "max_decimals": 0},
    },
    "sparse": {
        "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 2, "max_digits": 3},
        "leg_counting": {"min_animals": 2, "max_animals": 3},
        "number_sorting": {"min_numbers": 3, "max_numbers": 4, "min_decimals": 0, "max_decimals": 0},
    },
}


def gym_entry(kind: str, seed: int) -> dict[str, Any]:
    """A reasoning-gym entry (question, answer, metadata) of one of the tasks in GYM[kind].

    Raises:
        RuntimeError: the package is not installed.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise RuntimeError(
            "the family 'gym' needs the package reasoning-gym: pip install reasoning-gym"
        ) from None
    rng = random.Random(f"gym entry {kind} {seed}")
    task = rng.choice(list(GYM[kind]))
    data = reasoning_gym.create_dataset(task, size=1, seed=rng.getrandbits(31), **GYM[kind][task])
    return dict(data[0])


def _gym(rng: random.Random, kind: str, entry: dict[str, Any]) -> tuple[str, str, Any]:
    checks = rng.randint(2, 4) if kind == "dense" else rng.randint(8, 14)
    question = f"{entry['question'].strip()}\n{checks_text(checks)}"
    return question, str(entry["answer"]), {"entry": entry, "checks": checks}


FAMILIES: dict[str, str] = {
    "chain": "quantity statements in shuffled order, each about the one before it",
    "digits": "sums and products of long numbers, worked digit by digit",
    "gym": "chain_sum, leg_counting and number_sorting of the package reasoning-gym",
}
_MAKE: dict[str, Callable[[random.Random, str], tuple[str, str, Any]]] = {"chain": _chain, "digits": _digits}


def problem(family: str, kind: str, split: str, number: int, entry: dict[str, Any] | None = None) -> Problem:
    """Problem `number` of a split; the same on every machine.

    Args:
        entry: for `gym`, an entry made before by gym_entry(); None makes it.

    Raises:
        ValueError: no such family, kind or split. RuntimeError: reasoning-gym is not installed.
    """
    for name, value, known in (
        ("family", family, FAMILIES),
        ("kind", kind, KINDS),
        ("split", split, SPLITS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, must be one of {', '.join(known)}")
    seed = SPLITS[split] + number
    rng = random.Random(f"{family} {kind} {seed}")
    if family == "gym":
        text, answer, data = _gym(rng, kind, gym_entry(kind, seed) if entry is None else entry)
    else:
        text, answer, data = _MAKE[family](rng, kind)
    return Problem(f"{family}/{kind}/{split}/{number}", family, kind, text, answer, data)


def problems(family: str, kind: str, split: str, n: int, start: int = 0) -> list[Problem]:
    """Problems start .. start + n - 1 of a split. Raises as problem() does."""
    return [problem(family, kind, split, start + i) for i in range(n)]
