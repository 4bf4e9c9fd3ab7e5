"""What is asked: problem families, files of questions, and how their answers are graded."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import boxed, final_part, math_equal, math_verifier, mentions, text_equal

__all__ = ["Group", "Item", "Task", "jsonl_task", "named_reason_task", "parts", "reason_task"]

SHOWN = 80  # characters of an answer that a result keeps
INSTRUCTION = "Think step by step and put the final answer into \\boxed{}."
COMPARE: dict[str, Callable[[str, str], bool]] = {
    "math": math_equal,
    "text": text_equal,
    "mention": mentions,
}


@dataclass(frozen=True)
class Item:
    """A question (the user's message, or what follows a group's text) and its answer.

    fields: what else a result says.
    """

    id: str
    question: str
    answer: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """Questions with a text before them that is read once; "" is none."""

    items: Sequence[Item]
    text: str = ""


@dataclass(frozen=True)
class Task:
    """name: what identifies it in results, JSON; title: for people; compare: a key of COMPARE."""

    name: dict[str, Any]
    title: str
    groups: Sequence[Group]
    compare: str = "text"
    system: str = ""

    @property
    def ids(self) -> list[str]:
        """Of all items."""
        return [item.id for group in self.groups for item in group.items]

    def grade(self, text: str, answer: str) -> tuple[bool, str]:
        """Whether the model's whole text is right, and the answer in it, shortened to what a result keeps."""
        said = final_part(text)
        right = bool(said) and COMPARE[self.compare](without_preface(said), answer)
        if self.compare == "math":  # its answer stands at the end
            inside = boxed(said)
            return right, shortened(said[-SHOWN:] if inside is None else inside)
        return right, shortened(without_preface(said))


def without_preface(said: str) -> str:
    """Without "The answer is", where an answer begins so."""
    return re.sub(r"^\s*the (final )?answer is:?\s+", "", said, flags=re.IGNORECASE)


def shortened(text: str) -> str:
    """One line of at most SHOWN characters."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"


def reason_task(kind: str, families: Sequence[str], split: str, n: int) -> Task:
    """n problems of one kind, in equal parts of each family; the first ones have one more if some are left.

    Raises:
        ValueError: no such kind, family or split. RuntimeError: a family needs a package that is absent.
    """
    from .problems import problems

    return named_reason_task(
        kind,
        families,
        split,
        [
            Item(p.id, p.question, p.answer)
            for family, share in parts(families, n)
            for p in problems(family, kind, split, share)
        ],
    )


def parts(families: Sequence[str], n: int) -> list[tuple[str, int]]:
    """How many of n problems are of each family."""
    return [(family, n // len(families) + (i < n % len(families))) for i, family in enumerate(families)]


def named_reason_task(kind: str, families: Sequence[str], split: str, items: Sequence[Item]) -> Task:
    """reason_task() of problems made elsewhere."""
    name = {"task": "reason", "kind": kind, "families": list(families), "split": split}
    return Task(name, f"{kind} ({', '.join(families)}; {split})", [Group(items)])


def jsonl_task(
    path: Path, n: int | None = None, compare: str = "math", instruction: str = INSTRUCTION, system: str = ""
) -> Task:
    """The first n questions of a JSON Lines file; None: all.

    A line is an object with question, problem or prompt, and answer or solution. `id` or `unique_id` names
    it, else its line number.

    Raises:
        ValueError: the file cannot be read, or a line is not as described. RuntimeError: math-verify is
            wanted and absent.
    """
    from .answers import expected

    if compare not in COMPARE:
        raise ValueError(f"compare is {compare!r}, must be one of {', '.join(COMPARE)}")
    if compare == "math":
        math_verifier()
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as err:
        raise ValueError(f"cannot read {path}: {err.strerror or err}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    items: list[Item] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if n is not None and len(items) == n:
            break
        where = f"{path}, line {number},"
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{where} is not JSON") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object with a question and an answer")
        question = next(
            (row[f] for f in ("question", "problem", "prompt") if isinstance(row.get(f), str)), ""
        )
        if not question.strip():
            raise ValueError(f"{where} has no question: a field question, problem or prompt is needed")
        id = str(row.get("id", row.get("unique_id", number)))
        if id in seen:
            raise ValueError(f"{where} has an id that another line has: {id}")
        seen.add(id)
        text = f"{question.strip()}\n\n{instruction}" if instruction else question.strip()
        items.append(Item(id, text, expected(row, where)))
    if not items:
        raise ValueError(f"{path} has no questions")
    name = {
        "task": "jsonl",
        "file": path.name,
        "sha256": hashlib.sha256(data).hexdigest()[:16],
        "compare": compare,
        "instruction": instruction,
        "system": system,
    }
    return Task(name, path.name, [Group(items)], compare, system)
