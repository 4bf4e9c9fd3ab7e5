"""What the user types in a chat: a line editor on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rkv_local.cli import ui

PROMPT, CONTINUED = ">>> ", "... "
QUOTES = '"""'


def history_file() -> Path:
    """Where lines are remembered between sessions (XDG Base Directory Specification: state)."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # the specification says that relative paths are to be ignored
    base = Path(state) if os.path.isabs(state) else Path.home() / ".local" / "state"  # noqa: PTH117
    return base / "rkv-local" / "history"


def line_reader() -> Callable[[str], str]:
    """A function that shows a prompt and returns one line without its end.

    It raises EOFError at the end of the input (Ctrl-D), KeyboardInterrupt on Ctrl-C, ValueError for a line
    that is not UTF-8.
    """
    if ui.is_terminal(sys.stdin) and ui.is_terminal(sys.stdout):
        return terminal_reader()
    return plain_line


def plain_line(prompt: str) -> str:
    """A line from a pipe or a file."""
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    return data.decode("utf-8").rstrip("\r\n")


def terminal_reader() -> Callable[[str], str]:
    """prompt_toolkit's editor, with history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory

    history: History = InMemoryHistory()
    path = history_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        history = FileHistory(str(path))
    editor: PromptSession[str] = PromptSession(history=history)
    return lambda prompt: editor.prompt(prompt)


def read_message(read: Callable[[str], str]) -> tuple[str, bool]:
    """One message, and whether it was quoted: a line, or all lines between two triple quotes."""
    first = read(PROMPT)
    head = first.lstrip()
    if not head.startswith(QUOTES):
        return first, False
    text = head[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + read(CONTINUED)
    return text.rstrip()[: -len(QUOTES)].strip("\n"), True
