"""rkv-local chat on a pseudo-terminal: typing, several lines, Ctrl-C, Ctrl-D, commands, history."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_tools import COMMAND, environment, talker

if os.name == "nt":
    pytest.skip("Windows has no pseudo-terminals", allow_module_level=True)
import pexpect

CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# prompt_toolkit writes no blank after a prompt but moves the cursor, and shows the cursor when it is ready
READY, MORE = (prompt + r"[^\n]*\x1b\[\?25h" for prompt in (">>>", r"\.\.\."))


class Terminal:
    """A chat in a pseudo-terminal of 100 columns."""

    def __init__(self, state: Path, *args: str) -> None:
        small = ["--kv-budget", "64", "--kv-buffer", "32", "-b", "32", "-t", "1"]
        self.child: Any = pexpect.spawn(
            COMMAND[0],
            [*COMMAND[1:], "chat", str(talker()), *small, *args],
            env=environment(XDG_STATE_HOME=str(state), PROMPT_TOOLKIT_NO_CPR="1"),
            dimensions=(40, 100),
            encoding="utf-8",
            codec_errors="replace",
            timeout=40,
        )
        self.child.delaybeforesend = 0.02
        self.ready()

    def ready(self) -> str:
        """Wait for a prompt; what came before it."""
        self.child.expect(READY)
        return plain(self.child.before)

    def say(self, text: str) -> str:
        """Type a line and return all that comes up to the next prompt."""
        self.child.send(text)
        self.settle()
        self.child.send("\r")
        return self.ready()

    def settle(self, seconds: float = 0.3) -> str:
        """Read what the editor draws until it is still."""
        seen = ""
        while True:
            try:
                seen += self.child.read_nonblocking(4096, timeout=seconds)
            except pexpect.TIMEOUT:
                return plain(seen)

    def leave(self) -> int:
        """Wait for the end; the exit code."""
        self.child.expect(pexpect.EOF)
        self.child.close()
        assert self.child.signalstatus is None
        return int(self.child.exitstatus)


def plain(text: str) -> str:
    """Without escape sequences and carriage returns."""
    return re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])", "", text).replace("\r", "")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def chat(state: Path) -> Iterator[Terminal]:
    terminal = Terminal(state, "-n", "12", "--seed", "7")
    yield terminal
    terminal.child.close(force=True)


def test_typing_commands_and_ctrl_d(chat: Terminal) -> None:
    shown = chat.say("hello there")
    assert re.search(r"generated 12 tokens.*KV rkv \d+/96 cells", shown)
    assert "/regen" in chat.say("/help")
    assert "temperature = 0" in chat.say("/set temperature 0")
    assert "system prompt set" in chat.say("/set system You are brief.")
    shown = chat.say("/show")
    assert (
        "talker.gguf" in shown and "You are brief." in shown and "96 cells" in shown and "im_start" in shown
    )
    assert "no command /walk" in chat.say("/walk")
    assert re.search(r"turns +1\b", chat.say("/stats"))
    assert "generated 12 tokens" in chat.say("/regen")
    assert re.search(r"turns +1\b", chat.say("/stats"))
    chat.say("/clear")
    assert re.search(r"turns +0\b", chat.say("/stats"))
    chat.child.send(CTRL_D)
    assert chat.leave() == 0


def test_several_lines_and_bye(chat: Terminal) -> None:
    chat.child.send('"""first line\r')
    chat.child.expect(MORE)
    chat.settle()
    chat.child.send("second line\r")
    chat.child.expect(MORE)
    chat.settle()
    chat.child.send('third line"""\r')
    assert "generated 12 tokens" in chat.ready()
    assert re.search(r"turns +1\b", chat.say("/stats"))
    chat.settle()
    chat.child.send("/bye\r")
    assert chat.leave() == 0


def test_ctrl_c_stops_the_answer_and_keeps_the_session(chat: Terminal) -> None:
    chat.say("/set max-tokens -1")
    chat.say("/set temp 5")
    chat.child.send("talk for ever\r")
    time.sleep(1.5)
    chat.child.send(CTRL_C)
    shown = chat.ready()
    assert "generated" in shown and "Traceback" not in shown
    assert re.search(r"turns +1\b", chat.say("/stats"))
    chat.say("/set max-tokens 4")
    assert "generated 4 tokens" in chat.say("again")
    chat.child.send(CTRL_D)
    assert chat.leave() == 0


def test_ctrl_c_at_the_prompt_and_while_typing(chat: Terminal) -> None:
    chat.settle()
    chat.child.send(CTRL_C)
    assert "Ctrl-D or /bye leaves" in chat.ready()
    chat.child.send("half a messa")
    chat.settle()
    chat.child.send(CTRL_C)
    chat.ready()
    assert re.search(r"turns +0\b", chat.say("/stats"))
    chat.child.send(CTRL_D)
    assert chat.leave() == 0


def test_lines_are_remembered_between_sessions(state: Path) -> None:
    first = Terminal(state, "-n", "2")
    first.say("something to remember")
    first.child.send(CTRL_D)
    assert first.leave() == 0
    history = state / "rkv-local" / "history"
    assert "something to remember" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0
    second = Terminal(state, "-n", "2")
    second.settle()
    second.child.send(UP)
    assert "something to remember" in second.settle(0.5)
    second.child.send("\r")
    assert "generated" in second.ready()
    second.child.send(CTRL_D)
    assert second.leave() == 0


def test_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file, not a folder")
    terminal = Terminal(tmp_path / "state", "-n", "2")
    assert "generated 2 tokens" in terminal.say("hello")
    terminal.child.send(CTRL_D)
    assert terminal.leave() == 0


def test_thinking_is_dim_on_a_terminal_and_tagged_in_a_pipe() -> None:
    code = (
        "from rkv_local.cli.ui import AnswerWriter\n"
        "w = AnswerWriter()\n"
        "[w.write(k, t) for k, t in (('thinking', 'hm'), ('thinking', ' so'), ('text', 'four'))]\n"
        "w.finish()\n"
    )
    shown, _ = pexpect.run(f'{sys.executable} -c "{code}"', env=environment(), withexitstatus=True)
    assert shown.decode().replace("\r", "") == "\x1b[2mhm so\x1b[0m\n\nfour\n"
    import subprocess

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
    shown, status = pexpect.run(f'{sys.executable} -c "{code}"', env=environment(), withexitstatus=True)
    assert status == 0
    text = shown.decode()
    assert "5/10 tokens" in text and "50%" in text and "#" * 10 in text
    assert text.replace("\r\n", "").endswith("\r\x1b[Kdone")
