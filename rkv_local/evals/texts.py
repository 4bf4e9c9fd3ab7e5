"""Long real texts to read: Python's own language reference, or a file."""

from __future__ import annotations

import hashlib
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tasks import Group, Item, Task

__all__ = ["Source", "needles", "source"]

INTRODUCTION = "Read this text. A question about it follows.\n\n"
QUESTION = "\n\nThat was the text. {question} Answer with a few words."

# a fact, a question about it in other words, and which values fill it: {p} a place, {w} a person, {n} a number
FACTS = (
    ("The ferry to {p} leaves from pier {n}.", "At which pier does one board the boat that goes to {p}?", "n"),
    ("{w} keeps the spare key under the {c} flowerpot.", "What colour is the pot that hides {w}'s extra key?", "c"),
    ("The lighthouse of {p} was built in {y}.", "In what year was {p}'s lighthouse put up?", "y"),
    ("{w} plays the {i} in the town's orchestra.", "Which instrument does {w} play?", "i"),
    ("The library of {p} owns {n} maps of the moon.", "How many moon maps are in {p}'s library?", "n"),
    ("{w} painted the garden gate {c}.", "Which colour did {w} give to the garden gate?", "c"),
    ("The night train to {p} has {n} sleeping cars.", "How many cars with beds has the night train to {p}?", "n"),
    ("{w} was born in {y} on a ship.", "What is the year of birth of {w}, who was born at sea?", "y"),
    ("The baker of {p} sells bread with {f}.", "What is in the bread that one can buy in {p}?", "f"),
    ("{w} has locker number {n} at the swimming pool.", "Which locker does {w} use at the pool?", "n"),
    ("The mayor of {p} collects old {o}.", "What old things does {p}'s mayor collect?", "o"),
    ("{w} lost a bag full of {o} on the bus.", "What was in the bag that {w} left on the bus?", "o"),
    ("The tower clock of {p} is {n} minutes slow.", "By how many minutes is {p}'s tower clock late?", "n"),
    ("{w} named the new boat after a {f} tree.", "The tree of which fruit gave {w}'s boat its name?", "f"),
    ("The school of {p} was closed in {y}.", "When did {p}'s school shut its doors?", "y"),
    ("{w} teaches the {i} to children on Fridays.", "What do children learn to play from {w}?", "i"),
)
PLACES = "Lindhavn Orsova Marwick Tresco Vellinge Karsund Brenton Almora Dunmere Fairlie Quilan Ostra Penryn Zelten"
PEOPLE = "Agnes Bruno Clara Dmitri Esther Felix Greta Hassan Ingrid Jonas Keiko Lorenz Marta Nadia Oskar Petra"
WORDS = {
    "c": "yellow purple orange green black white",
    "i": "cello trumpet flute harp oboe tuba",
    "f": "plum cherry walnut fig apricot olive",
    "o": "coins lamps stamps buttons radios umbrellas",
}


@dataclass(frozen=True)
class Source:
    """A text by name; sha256 of its UTF-8."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """The first 16 digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def as_name(self) -> dict[str, Any]:
        """For a task's name."""
        return {"text": self.name, "text_sha256": self.sha256}

    def paragraphs(self) -> list[str]:
        """Without empty ones."""
        return [p for p in self.text.split("\n\n") if p.strip()]


def source(path: Path | None = None) -> Source:
    """A file's text; None: the topics of Python's language reference, which are part of the standard library.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    if path is None:
        from pydoc_data.topics import topics

        name = f"pydoc topics of Python {platform.python_version()}"
        return Source(name, "\n\n".join(topics[key] for key in sorted(topics)))
    try:
        return Source(path.name, path.read_text(encoding="utf-8"))
    except OSError as err:
        raise ValueError(f"cannot read {path}: {err.strerror or err}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None


def excerpts(paragraphs: Sequence[str], lengths: Sequence[int], tokens: int, n: int) -> list[list[str]]:
    """n runs of whole paragraphs, one after the other, of at most `tokens` tokens each.

    lengths: tokens of each paragraph.

    Raises:
        ValueError: the text is too short for them.
    """
    found: list[list[str]] = []
    current: list[str] = []
    used = 0
    for paragraph, length in zip(paragraphs, lengths, strict=True):
        if length > tokens:
            continue  # a table longer than a whole excerpt
        if used + length > tokens:
            found.append(current)
            current, used = [], 0
            if len(found) == n:
                return found
        current.append(paragraph)
        used += length
    raise ValueError(f"the text has {len(found)} parts of {tokens:,} tokens, {n} are needed")


def facts(n: int, rng: random.Random) -> list[tuple[str, str, str]]:
    """n facts with question and answer, no two about the same place or person.

    Raises:
        ValueError: there are not so many.
    """
    if n > len(FACTS):
        raise ValueError(f"{n} facts in one text, there are {len(FACTS)}")
    places, people = PLACES.split(), PEOPLE.split()
    rng.shuffle(places)
    rng.shuffle(people)
    made = []
    for fact, question, kind in rng.sample(FACTS, n):
        values = {key: rng.choice(words.split()) for key, words in WORDS.items()}
        values |= {"n": str(rng.randint(12, 98)), "y": str(rng.randint(1702, 1989))}
        values |= {"p": places.pop() if "{p}" in fact else "", "w": people.pop() if "{w}" in fact else ""}
        made.append((fact.format(**values), question.format(**values), values[kind]))
    return made


def needles(
    text: Source, lengths: Sequence[int], tokens: int, n_depths: int, n_texts: int, seed: int = 0
) -> Task:
    """A fact at each of n_depths depths of n_texts texts, and a question about each after the whole text.

    lengths: tokens of each paragraph of the text.

    Raises:
        ValueError: the text, or the list of facts, is too short.
    """
    groups = []
    for t, paragraphs in enumerate(excerpts(text.paragraphs(), lengths, tokens, n_texts)):
        rng = random.Random(f"needles {seed} {t}")
        depths = [(d + 0.5) / n_depths for d in range(n_depths)]
        planted: dict[int, list[str]] = {}
        items = []
        for d, (depth, (fact, question, answer)) in enumerate(
            zip(depths, facts(n_depths, rng), strict=True)
        ):
            planted.setdefault(round(depth * len(paragraphs)), []).append(fact)
            items.append(
                Item(f"{t}@{d}", QUESTION.format(question=question), answer, {"depth": round(depth, 3)})
            )
        parts = []
        for i in range(len(paragraphs) + 1):
            parts += planted.get(i, []) + paragraphs[i : i + 1]
        groups.append(Group(items, INTRODUCTION + "\n\n".join(parts)))
    name = {"task": "needles", **text.as_name(), "tokens": tokens, "depths": n_depths, "seed": seed}
    return Task(name, f"needles in {tokens:,} tokens", groups, "mention")
