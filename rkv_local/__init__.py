"""rkv-local: language models with a key-value cache of fixed size.

Cheap to import: the native library and llama_cpp are loaded when Llama, Session, KVStats or plan is first
used.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from . import _lib
from .budget import POLICIES, SCHEDULES, KVBudget
from .errors import RKVError
from .shape import CACHE_TYPES, ModelShape

if TYPE_CHECKING:
    from .engine import KVStats, Llama, Session
    from .memory import Plan, plan

__all__ = [
    "CACHE_TYPES",
    "POLICIES",
    "SCHEDULES",
    "KVBudget",
    "KVStats",
    "Llama",
    "ModelShape",
    "Plan",
    "RKVError",
    "Session",
    "plan",
]

# For those who import llama_cpp next; _lib.prepare() checks all when Llama is first used.
if "llama_cpp" not in sys.modules:
    os.environ["LLAMA_CPP_LIB_PATH"] = str(_lib.lib_dir())

_LAZY = {"KVStats": "engine", "Llama": "engine", "Session": "engine", "Plan": "memory", "plan": "memory"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("rkv-local")
        except PackageNotFoundError:  # a source tree
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
