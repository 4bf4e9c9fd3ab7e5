"""rkv-local chat on a pseudo-terminal: typing, several lines, Ctrl-C, Ctrl-D, commands, history."""

from __future__ import annotations

import os
import re
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)
import fcntl
import pty
import termios

from cli_tools import COMMAND, environment, talker

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# prompt_toolkit writes no blank after a prompt but moves the cursor, and shows the cursor when it is ready
READY, MORE = (prompt + r"[^\n]*\x1b\[\?25h" for prompt in (">>>", r"\.\.\."))
PATIENCE = 60.0  # seconds; a busy machine may need some


class Terminal:
    """A command on a pseudo-terminal of 40 lines and 100 columns."""

    def __init__(self, command: Sequence[str], **variables: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(PROMPT_TOOLKIT_NO_CPR="1", **variables),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self.unread = ""

    def read(self, seconds: float) -> bool:
        """Take in what comes within some time; False if nothing did, or the other side is closed."""
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux says so when the last process has gone
            return False
        self.unread += data.decode("utf-8", errors="replace")
        return bool(data)

    def expect(self, pattern: str) -> str:
        """Wait for a pattern; what came before it, as plain text."""
        end = time.monotonic() + PATIENCE
        while not (match := re.search(pattern, self.unread)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.unread!r}"
            if not self.read(1) and self.process.poll() is not None and not self.read(0):
                raise AssertionError(f"it ended with {self.process.returncode}: {self.unread!r}")
        before, self.unread = self.unread[: match.start()], self.unread[match.end() :]
        return plain(before)

    def send(self, keys: str) -> None:
        """Press keys."""
        os.write(self.master, keys.encode())

    def settle(self, seconds: float = 0.3) -> str:
        """Take in what the editor draws until it is still; all of it, as plain text."""
        while self.read(seconds):
            pass
        shown, self.unread = self.unread, ""
        return plain(shown)

    def say(self, text: str, *patterns: str) -> None:
        """Type a line, wait for what must come of it, in this order, and for the next prompt."""
        self.settle()
        self.send(text)
        self.settle()
        self.send("\r")
        for pattern in patterns:
            self.expect(pattern)
        self.expect(READY)

    def stream(self, n: int) -> None:
        """Wait until n characters have come that nobody expected yet."""
        end = time.monotonic() + PATIENCE
        while len(self.unread) < n:
            assert self.read(1) or time.monotonic() < end, self.unread

    def leave(self) -> int:
        """Wait for the end; the exit code."""
        end = time.monotonic() + PATIENCE
        while self.read(1) or (self.process.poll() is None and time.monotonic() < end):
            pass
        return self.process.wait(1)

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def start_chat(state: Path, *args: str) -> Terminal:
    """A chat with a small budget that keeps its history under `state`, at its first prompt."""
    small = ("--kv-budget", "64", "--kv-buffer", "32", "-b", "32", "-t", "1")
    terminal = Terminal([*COMMAND, "chat", str(talker()), *small, *args], XDG_STATE_HOME=str(state))
    terminal.expect(READY)
    return terminal


def python(code: str) -> tuple[int, str]:
    """Run Python code on a terminal: exit code, what it wrote."""
    terminal = Terminal([sys.executable, "-c", code])
    code_, shown = terminal.leave(), terminal.unread
    terminal.close()
    return code_, shown


def plain(text: str) -> str:
    """Without escape sequences and carriage returns."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])", "", text).replace("\r", "")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def chat(state: Path) -> Iterator[Terminal]:
    terminal = start_chat(state, "-n", "12", "--seed", "7")
    yield terminal
    terminal.close()


def test_typing_commands_and_ctrl_d(chat: Terminal) -> None:
    chat.say("hello there", r"generated 12 tokens", r"KV latest \d+/96 cells", r"compactions")
    chat.say("/help", "/regen")
    chat.say("/set temperature 0", "temperature = 0")
    chat.say("/set system You are brief.", "system prompt set")
    chat.say("/show", r"talker\.gguf", "96 cells", "You are brief", "im_start")
    chat.say("/walk", "no command /walk")
    chat.say("/stats", r"turns +1\b")
    chat.say("/regen", "generated 12 tokens")
    chat.say("/stats", r"turns +1\b")
    chat.say("/clear", "forgotten")
    chat.say("/stats", r"turns +0\b")
    chat.send(CTRL_D)
    assert chat.leave() == 0


def test_several_lines_and_bye(chat: Terminal) -> None:
    for line in ('"""first line', "second line"):
        chat.settle()
        chat.send(line + "\r")
        chat.expect(MORE)
    chat.say('third line"""', "generated 12 tokens")
    chat.say("/stats", r"turns +1\b")
    chat.settle()
    chat.send("/bye\r")
    assert chat.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(chat: Terminal) -> None:
    chat.say("/set max-tokens -1", "max-tokens = -1")
    chat.say("/set temp 5", "temperature = 5")
    chat.settle()
    chat.send("talk for ever")
    chat.settle()
    chat.send("\r")
    chat.stream(500)
    chat.send(CTRL_C)
    assert "Traceback" not in chat.expect("generated [0-9,]+ tokens")
    chat.expect(READY)
    chat.say("/stats", r"turns +1\b")
    chat.say("/set max-tokens 4", "max-tokens = 4")
    chat.say("again", "generated 4 tokens")
    chat.send(CTRL_D)
    assert chat.leave() == 0


def test_ctrl_c_at_the_prompt_and_while_typing(chat: Terminal) -> None:
    chat.settle()
    chat.send(CTRL_C)
    chat.expect("Ctrl-D or /bye leaves")
    chat.expect(READY)
    chat.send("half a messa")
    chat.settle()
    chat.send(CTRL_C)
    chat.expect("Ctrl-D or /bye leaves")
    chat.expect(READY)
    chat.say("/stats", r"turns +0\b")
    chat.send(CTRL_D)
    assert chat.leave() == 0


def test_lines_are_remembered_between_sessions(state: Path) -> None:
    first = start_chat(state, "-n", "2")
    first.say("something to remember", "generated")
    first.send(CTRL_D)
    assert first.leave() == 0
    first.close()
    history = state / "rkv-local" / "history"
    assert "something to remember" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0
    second = start_chat(state, "-n", "2")
    second.settle()
    second.send(UP)
    second.expect("something to remember")
    second.say("", "generated")
    second.send(CTRL_D)
    assert second.leave() == 0
    second.close()


def test_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a folder")
    terminal = start_chat(tmp_path / "state", "-n", "2")
    terminal.say("hello", "generated 2 tokens")
    terminal.send(CTRL_D)
    assert terminal.leave() == 0
    terminal.close()


def test_thinking_is_dim_on_a_terminal_and_tagged_in_a_pipe() -> None:
    code = (
        "from rkv_local.cli.ui import AnswerWriter\n"
        "w = AnswerWriter()\n"
        "[w.write(k, t) for k, t in (('thinking', 'hm'), ('thinking', ' so'), ('text', 'four'))]\n"
        "w.finish()\n"
    )
    _, shown = python(code)
    assert shown.replace("\r", "") == "\x1b[2mhm so\x1b[0m\n\nfour\n"
    piped = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True)
    assert piped.stdout.decode() == "<think>\nhm so\n</think>\n\nfour\n"
    code = code.replace("AnswerWriter()", "AnswerWriter(thinking=False)")
    piped = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, check=True)
    assert piped.stdout.decode() == "four\n"


def test_progress_is_drawn_on_a_terminal_and_wiped(state: Path) -> None:
    code = (
        "import time\nfrom rkv_local.cli.ui import progress\n"
        "with progress('reading', lambda: (0.5, '5/10 tokens')):\n time.sleep(0.9)\n"
        "print('done')\n"
    )
    status, shown = python(code)
    assert status == 0
    text = shown
    assert "5/10 tokens" in text and "50%" in text and "#" * 10 in text
    assert text.replace("\r\n", "").endswith("\r\x1b[Kdone")
