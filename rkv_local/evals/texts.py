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
QUESTION = "\n\nAnswer this question with a fact from the text: {question}"

# a fact, a question about it in other words, and which value answers it: {j} is who it is about
FACTS = (
    ("the password of the {j} is {n}.", "What is the secret number of the {j}?", "n"),
    ("the {j} paid with a {c} card.", "Which colour had the card of the {j}?", "c"),
    ("the room of the {j} has the number {n}.", "In which room does one find the {j}?", "n"),
    ("the {j} was born in {y}.", "What is the year of birth of the {j}?", "y"),
    ("the telephone number of the {j} is {n}.", "Which number does one dial to call the {j}?", "n"),
    ("the {j} painted the door {c}.", "What colour did the {j} give to the door?", "c"),
    ("the {j} goes home by bus {n}.", "Which bus takes the {j} back home?", "n"),
    ("the boat of the {j} is called {w}.", "What name does the {j}'s boat have?", "w"),
    ("the {j} owns {n} sheep.", "How many sheep belong to the {j}?", "n"),
    ("the {j} plays the {i}.", "Which instrument is the {j}'s?", "i"),
    ("the {j} opened a shop in {y}.", "Since when does the {j}'s shop exist?", "y"),
    ("the locker of the {j} is number {n}.", "Which locker holds the {j}'s things?", "n"),
)
ROLES = "baker judge pilot nurse miner sailor tailor poet barber painter butcher gardener".split()  # noqa: SIM905
WORDS = {
    "c": "yellow purple orange green black white",
    "i": "cello trumpet flute harp oboe tuba",
    "w": "Agnes Clara Esther Greta Ingrid Marta",
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
    """n facts with question and answer, each about someone else.

    Raises:
        ValueError: there are not so many.
    """
    if n > len(FACTS):
        raise ValueError(f"{n} facts in one text, there are {len(FACTS)}")
    made = []
    for (fact, question, kind), role in zip(rng.sample(FACTS, n), rng.sample(ROLES, n), strict=True):
        values = {key: rng.choice(words.split()) for key, words in WORDS.items()}
        values |= {"j": role, "n": str(rng.randint(12, 98)), "y": str(rng.randint(1702, 1989))}
        made.append((f"Please remember: {fact.format(**values)}", question.format(**values), values[kind]))
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
        for d, (depth, (fact, question, answer)) in enumerate(zip(depths, facts(n_depths, rng), strict=True)):
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
