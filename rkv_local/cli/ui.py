"""Everything that is drawn on a terminal: the answer, progress, statistics, tables, error lines."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rkv_local.chat import Kind
    from rkv_local.cli.session import Answer, KvReport

DIM, RESET = "\x1b[2m", "\x1b[0m"
ERASE = "\r\x1b[K"
MIB = 1024 * 1024


def is_terminal(stream: IO[str] | None) -> bool:
    """True if `stream` is a terminal (a closed or replaced one is not; Python has None for closed)."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


def dims(stream: IO[str]) -> bool:
    """True if dim text may be written to `stream` (https://no-color.org is honoured)."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def line(text: str) -> None:
    """One line on stderr: statistics, notes. A closed stderr is no reason to fail."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def error(message: str) -> None:
    """The one line that every failure ends in."""
    line(f"rkv-local: error: {' '.join(message.split())}")


def note(text: str) -> None:
    """A line of ours in a chat, dim where that is possible."""
    line(dimmed(text, sys.stderr))


def mib(size: int) -> str:
    """A number of bytes in MiB."""
    return f"{size / MIB:.{1 if size >= 10 * MIB else 3}f} MiB"


def plural(n: int, noun: str) -> str:
    """'1 token', '2 tokens'."""
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


class AnswerWriter:
    """Streams an answer to stdout. On a terminal thinking is dim; elsewhere it stands between its tags.

    thinking: False leaves the thinking out.
    """

    def __init__(self, thinking: bool = True) -> None:
        self.thinking = thinking
        self.dim = dims(sys.stdout)
        self._kind: Kind = "text"
        self._wrote = False
        self._newline = True

    def write(self, kind: Kind, text: str) -> None:
        """Show one piece at once."""
        if kind == "thinking" and not self.thinking:
            return
        if kind != self._kind:
            self._switch(kind)
        sys.stdout.write(text)
        sys.stdout.flush()
        self._wrote = True
        self._newline = text.endswith("\n")

    def _switch(self, kind: Kind) -> None:
        self._kind = kind
        if self.dim:
            sys.stdout.write(DIM if kind == "thinking" else RESET)
        if kind == "thinking":
            sys.stdout.write("" if self.dim else "<think>\n")
        else:
            end = "" if self._newline else "\n"
            sys.stdout.write(end + ("\n" if self.dim else "</think>\n\n"))
            self._newline = True

    def finish(self) -> None:
        """End the last line, so that a prompt or statistics start on their own."""
        if self._kind == "thinking" and self.dim:
            sys.stdout.write(RESET)
        self._kind = "text"
        if self._wrote and not self._newline:
            sys.stdout.write("\n")
        sys.stdout.flush()


@contextlib.contextmanager
def progress(
    label: str, state: Callable[[], tuple[float, str]] | None = None, text: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Draw a line on stderr while the body runs, if stderr is a terminal.

    state: gives (share done 0..1, text) whenever the line is drawn; text: the text where there is no share.
    It is drawn by a thread on a copy of the file descriptor, since llama_cpp points the real one at /dev/null
    while it loads a model.
    """
    if not is_terminal(sys.stderr):
        yield
        return
    try:
        out = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_draw, args=(out, label, state, text, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        out.close()


def _draw(
    out: IO[str],
    label: str,
    state: Callable[[], tuple[float, str]] | None,
    text: Callable[[], str],
    done: threading.Event,
) -> None:
    start = time.monotonic()
    drawn = False
    # nothing is drawn for what is over at once
    while not done.wait(0.1 if drawn else 0.4):
        width = shutil.get_terminal_size().columns - 1
        share, words = state() if state else (0.0, text())
        bar = f"[{'#' * round(20 * min(share, 1)):<20}] {share:4.0%}  " if state else ""
        shown = f"{label}  {bar}{words}{'  ' if words else ''}{time.monotonic() - start:.0f} s"
        with contextlib.suppress(OSError):
            out.write(ERASE + shown[:width])
            out.flush()
        drawn = True
    if drawn:
        with contextlib.suppress(OSError):
            out.write(ERASE)
            out.flush()


def stats_line(answer: Answer, kv: KvReport, used: int) -> str:
    """One line on what an answer took: speeds, cells, memory, compactions and their share of the time."""
    parts = [
        speeds(answer),
        f"KV {kv.policy} {used}/{kv.cells} cells, {mib(kv.bytes)}",
    ]
    if kv.policy != "none":
        share = answer.compaction_seconds / answer.seconds if answer.seconds else 0.0
        parts.append(f"{plural(answer.compactions, 'compaction')}, {share:.1%} of the time")
    return "[" + " | ".join(parts) + "]"


def speeds(answer: Answer) -> str:
    """Tokens and tokens per second of prompt and answer; how much of the prompt was read, if not all."""
    read = "" if answer.n_read == answer.n_prompt else f" ({answer.n_read:,} read)"
    return (
        f"prompt {plural(answer.n_prompt, 'token')}{read}{rate(answer.prompt_tps)}"
        f" | generated {plural(answer.n_generated, 'token')}{rate(answer.generated_tps)}"
    )


def rate(tokens_per_second: float | None) -> str:
    """' at 12.3 tok/s', or nothing where it was too short to say."""
    return "" if tokens_per_second is None else f" at {tokens_per_second:.1f} tok/s"


def dimmed(text: str, stream: IO[str]) -> str:
    """`text` in dim, if `stream` shows it so."""
    return f"{DIM}{text}{RESET}" if dims(stream) else text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A plain table in columns; `right`: which columns are aligned to the right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """The same in Markdown."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    rule = [("-" * (w + 1) + ":") if r else ":" + "-" * (w + 1) for w, r in zip(widths, right, strict=True)]
    lines = []
    for row in [head, *rows]:
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([lines[0], "|" + "|".join(rule) + "|", *lines[1:]])
