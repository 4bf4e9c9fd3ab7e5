"""The sizes of a model that decide how large its cache is, read from GGUF metadata."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from llama_cpp import Llama as StockLlama

# name: (number in enum ggml_type, elements per block, bytes per block); what llama.cpp offers for caches
CACHE_TYPES: dict[str, tuple[int, int, int]] = {
    "f32": (0, 1, 4),
    "f16": (1, 1, 2),
    "bf16": (30, 1, 2),
    "q8_0": (8, 32, 34),
    "q4_0": (2, 32, 18),
    "q4_1": (3, 32, 20),
    "q5_0": (6, 32, 22),
    "q5_1": (7, 32, 24),
    "iq4_nl": (20, 32, 18),
}
_NAMES = {number: name for name, (number, _, _) in CACHE_TYPES.items()}


def cache_type(value: str | int, field: str = "type") -> int:
    """The ggml type number of a cache type given by name or number.

    Raises:
        ValueError: not a type that a cache can have.
    """
    if isinstance(value, str) and value.lower() in CACHE_TYPES:
        return CACHE_TYPES[value.lower()][0]
    if isinstance(value, int) and not isinstance(value, bool) and value in _NAMES:
        return value
    raise ValueError(f"{field} is {value!r}, must be one of {', '.join(CACHE_TYPES)}")


def is_quantised(value: str | int) -> bool:
    """Whether the cache type stores blocks of several elements."""
    return CACHE_TYPES[_NAMES[cache_type(value)]][1] > 1


def row_bytes(value: str | int, n_head: int, n_embd_head: int, field: str = "type") -> int:
    """Bytes of one cell: n_head rows of n_embd_head elements, each a whole number of blocks.

    Raises:
        ValueError: an unknown type, or a head that is not a whole number of its blocks.
    """
    name = _NAMES[cache_type(value, field)]
    _, block, size = CACHE_TYPES[name]
    if n_embd_head % block:
        raise ValueError(
            f"{field} is {name}, whose blocks of {block} do not divide the head size, {n_embd_head}"
        )
    return n_head * (n_embd_head // block) * size


@dataclass(frozen=True)
class ModelShape:
    """Heads and head sizes of each layer; every tuple has n_layer entries.

    n_head: query heads; n_head_kv: key-value heads; n_embd_head_k, n_embd_head_v: elements of one head's
    K and V row.
    """

    n_layer: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_embd_head_k: tuple[int, ...]
    n_embd_head_v: tuple[int, ...]

    def __post_init__(self) -> None:
        for field in ("n_head", "n_head_kv", "n_embd_head_k", "n_embd_head_v"):
            n = len(getattr(self, field))
            if n != self.n_layer:
                raise ValueError(f"{field} has {n} numbers, must have one per layer: {self.n_layer}")

    @classmethod
    def uniform(cls, n_layer: int, n_head: int, n_head_kv: int, n_embd_head: int) -> ModelShape:
        """A model whose layers are alike, with K and V heads of the same size."""
        head = (n_embd_head,) * n_layer
        return cls(n_layer, (n_head,) * n_layer, (n_head_kv,) * n_layer, head, head)

    @classmethod
    def of(cls, model: ModelShape | StockLlama | str | os.PathLike[str]) -> ModelShape:
        """The shape of a GGUF file, of which only the header is read; of a loaded Llama's, too.

        Raises:
            ValueError: the file is missing or no GGUF, or says nothing about attention heads.
        """
        if isinstance(model, ModelShape):
            return model
        if isinstance(model, (str, os.PathLike)):
            return cls.from_metadata(read_metadata(model))
        # not its metadata: llama.cpp leaves arrays out of it
        path = getattr(model, "model_path", None)
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"model is {type(model).__name__}, must be a Llama, a path or a ModelShape")
        return cls.from_metadata(read_metadata(path))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> ModelShape:
        """From GGUF keys; values may be numbers, lists, or llama.cpp's text form of them.

        Raises:
            ValueError: a key is missing or has an impossible value.
        """
        arch = metadata.get("general.architecture", "")
        n_layer = _one(metadata, f"{arch}.block_count")
        n_head = _per_layer(metadata, f"{arch}.attention.head_count", n_layer)
        n_head_kv = _per_layer(metadata, f"{arch}.attention.head_count_kv", n_layer, n_head)
        if any(n_head):
            default = tuple(_one(metadata, f"{arch}.embedding_length") // max(h, 1) for h in n_head)
        else:
            default = (0,) * n_layer
        d_k = _per_layer(metadata, f"{arch}.attention.key_length", n_layer, default)
        d_v = _per_layer(metadata, f"{arch}.attention.value_length", n_layer, default)
        if int(metadata.get(f"{arch}.attention.value_length_mla", 0)) > 0:
            d_v = (0,) * n_layer  # the latent K is all that is cached
        return cls(n_layer, n_head, n_head_kv, d_k, d_v)


def _one(metadata: Mapping[str, Any], key: str) -> int:
    try:
        return int(metadata[key])
    except KeyError:
        raise ValueError(f"the model's metadata has no {key}") from None


def _per_layer(
    metadata: Mapping[str, Any], key: str, n_layer: int, default: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    value = metadata.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"the model's metadata has no {key}")
        return default
    if isinstance(value, str):  # llama.cpp writes an array as "[1, 2]"
        parts = [int(part) for part in value.strip("[] ").split(",")]
        value = parts if value.startswith("[") else parts[0]
    if isinstance(value, list):
        if len(value) != n_layer:
            raise ValueError(f"{key} has {len(value)} numbers for {n_layer} layers")
        return tuple(value)
    return (int(value),) * n_layer


# GGUF value types (the gguf specification): struct codes of the fixed-size ones
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_ARRAY = 4096  # vocabularies are skipped
_LONGEST_STRING = 1 << 26


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Key-value pairs of a GGUF file's header, without its vocabulary and tensors.

    Raises:
        ValueError: the file is missing, no GGUF, or cut short.
    """
    try:
        stat = Path(path).stat()
    except OSError as error:
        raise ValueError(f"cannot read the model file: {error}") from error
    return dict(_read_metadata(os.fspath(path), stat.st_mtime_ns, stat.st_size))


@functools.lru_cache(maxsize=8)
def _read_metadata(path: str, _mtime: int, _size: int) -> dict[str, Any]:
    try:
        with Path(path).open("rb") as file:
            magic, version = file.read(4), file.read(4)
            if magic != b"GGUF" or struct.unpack("<I", version)[0] < 2:
                raise ValueError(f"not a GGUF file of version 2 or later: {os.fspath(path)}")
            _, n_pairs = _unpack(file, "<QQ")
            pairs = {}
            for _ in range(n_pairs):
                key = _string(file)
                value = _value(file, _unpack(file, "<I")[0])
                if value is not None:
                    pairs[key] = value
            return pairs
    except OSError as error:
        raise ValueError(f"cannot read the model file: {error}") from error
    except (struct.error, UnicodeDecodeError, KeyError):
        raise ValueError(f"the GGUF header is damaged or cut short: {os.fspath(path)}") from None


def _unpack(file: BinaryIO, code: str) -> tuple[Any, ...]:
    return struct.unpack(code, file.read(struct.calcsize(code)))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "<Q")
    data = file.read(min(length, _LONGEST_STRING + 1))
    if len(data) < length:
        raise struct.error("cut short")
    return data.decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, "<" + _CODES[kind])[0]
    element, count = _unpack(file, "<IQ")
    if element == _STRING:
        for _ in range(count):
            file.seek(_unpack(file, "<Q")[0], os.SEEK_CUR)
        return None
    code = _CODES[element]
    if count > _LONGEST_ARRAY:
        file.seek(count * struct.calcsize("<" + code), os.SEEK_CUR)
        return None
    return list(_unpack(file, f"<{count}{code}"))
