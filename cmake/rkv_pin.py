"""Reads the pin file; also the scikit-build-core metadata provider that puts it into `dependencies`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PIN_FILE = Path(__file__).resolve().parent.parent / "rkv_local" / "llama-cpp.pin"


def read_pin(path: Path = PIN_FILE) -> dict[str, str]:
    """The pin's KEY=VALUE lines. Raises OSError if the file is missing."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, value in pairs}


def dynamic_metadata(settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
    """`requirements` of pyproject.toml with {LLAMA_CPP_PYTHON_VERSION} filled in from the pin."""
    pin = read_pin()
    return {"dependencies": [requirement.format(**pin) for requirement in settings["requirements"]]}
