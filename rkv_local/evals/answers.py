"""What an answer says, and whether that is right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from rkv_local.chat import THINK_TAGS

__all__ = ["expected", "final_part", "math_equal", "math_verifier", "mentions", "normalised", "text_equal"]

Compare = Callable[[str, str], bool]  # (what was said, what is right)

INSTALL = "answers are compared by math-verify, which is not installed: pip install 'rkv-local[eval]'"
_CLOSE = tuple(close for _, close in THINK_TAGS)
_OPEN = tuple(opening for opening, _ in THINK_TAGS)


def final_part(text: str) -> str:
    """What follows the thinking; "" where the thinking never ended; everything where there was none."""
    for close in _CLOSE:
        _, found, rest = text.rpartition(close)
        if found:
            return rest.strip()
    return "" if any(tag in text for tag in _OPEN) else text.strip()


def normalised(text: str) -> str:
    """Without differences that don't matter: case, blanks, a full stop at the end."""
    return " ".join(text.split()).rstrip(".").strip().casefold()


def text_equal(said: str, right: str) -> bool:
    """Whether two answers are the same text, normalised."""
    return normalised(said) == normalised(right)


def mentions(said: str, right: str) -> bool:
    """Whether the right answer occurs in a sentence, as whole words."""
    return re.search(rf"(?<!\w){re.escape(normalised(right))}(?!\w)", normalised(said)) is not None


def expected(row: Mapping[str, Any], where: str) -> str:
    """The right answer of a question, from its `answer` or `solution`.

    GSM8K writes it after ####, MATH into a \\boxed{} of its solution, others plainly.

    Raises:
        ValueError: the row has neither, or it is empty.
    """
    for field in ("answer", "solution"):
        value = row.get(field)
        if value is None or isinstance(value, (list, dict)):
            continue
        text = str(value)
        marked = text.rpartition("####")[2].strip() if "####" in text else boxed(text)
        found = text.strip() if marked is None else marked
        if found:
            return found
    raise ValueError(f"{where} has no answer: a field answer or solution is needed")


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} of a LaTeX text, braces inside it balanced; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start:i].strip()
    return None


def math_verifier() -> Any:
    """The package math_verify. Raises RuntimeError with the command that installs it."""
    try:
        import math_verify
    except ImportError:
        raise RuntimeError(INSTALL) from None
    return math_verify


def math_equal(said: str, right: str) -> bool:
    """Whether two answers are the same mathematically, by math-verify; the same text always is.

    Must be called in the main thread: math-verify limits its time with a signal.

    Raises:
        RuntimeError: math-verify is not installed.
    """
    tool = math_verifier()
    inside = boxed(said)
    if text_equal(said if inside is None else inside, right):
        return True
    gold = tool.parse(right if "$" in right or "\\boxed" in right else f"${right}$")
    return bool(gold) and bool(tool.verify(gold, tool.parse(said)))
