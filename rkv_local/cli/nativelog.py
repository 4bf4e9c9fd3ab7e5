"""llama.cpp's log: silent unless asked for, and its reasons kept for our own error lines."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
ERROR, CONTINUED = 4, 5  # enum ggml_log_level
WARN = 3

_lines: deque[tuple[int, str]] = deque(maxlen=200)
_keep: dict[str, Any] = {}  # ctypes callbacks must outlive the library's use of them
_verbose = False
_level = 0

# "llama_model_load: error loading model: ..." names a function, which is no help to the user
PREFIX = re.compile(r"^(?:[A-Za-z_][\w:~]*(?:\(\))?: )+(?:error loading model: )?")
# what llama_cpp says where the reason stands in the log
VAGUE = re.compile(
    r"Failed to (load model from file|create llama_context)|llama_decode returned|rkv_end_init"
)


def install(verbose: bool) -> None:
    """Take llama.cpp's and ggml's log: kept in memory, and written to stderr if `verbose`."""
    global _verbose
    _verbose = verbose
    if not verbose:
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # ggml's abort starts a debugger
    from llama_cpp import llama_cpp as lib

    if "callback" not in _keep:
        _keep["callback"] = lib.llama_log_callback(_log)
    lib.llama_log_set(_keep["callback"], ctypes.c_void_p(0))


def _log(level: int, text: bytes, _: Any) -> None:
    global _level
    shown = text.decode("utf-8", errors="replace")
    if level != CONTINUED:
        _level = level
        _lines.append((level, shown))
    elif _lines:
        _lines[-1] = (_level, _lines[-1][1] + shown)
    if _verbose:
        sys.stderr.write(shown)


def clear() -> None:
    """Forget what was logged so far."""
    _lines.clear()


def with_stderr(function: Callable[[], T]) -> tuple[T, str]:
    """Call `function` and return its result and what C code wrote to stderr past the log, in one line."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            result = function()
        finally:
            os.dup2(saved, 2)
            os.close(saved)
        file.seek(0)
        return result, " ".join(file.read().decode("utf-8", errors="replace").split())


def reason(message: str, subject: str = "") -> str:
    """`message`, or llama.cpp's own first error line where the message alone does not say why."""
    if not VAGUE.search(message):
        return message
    wanted = [text for level, text in _lines if level == ERROR] or [t for lv, t in _lines if lv == WARN]
    for text in wanted:
        cleaned = " ".join(PREFIX.sub("", text.strip()).split())
        if cleaned:
            return f"cannot load {subject}: {cleaned}" if subject else cleaned
    return message
