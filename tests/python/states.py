"""Saving and restoring through llama.h, and what a context holds, for tests and scripts/fuzz_state.py."""

from __future__ import annotations

import ctypes
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from engine_tools import Context

WHOLE = -1


def save(context: Context, seq: int = WHOLE) -> bytes:
    """llama_state_get_data, or of one sequence; b"" if refused."""
    if seq == WHOLE:
        size = llama_cpp.llama_state_get_size(context.ctx)
    else:
        size = llama_cpp.llama_state_seq_get_size(context.ctx, seq)
    buffer = (ctypes.c_uint8 * size)()
    if seq == WHOLE:
        n = llama_cpp.llama_state_get_data(context.ctx, buffer, size)
    else:
        n = llama_cpp.llama_state_seq_get_data(context.ctx, buffer, size, seq)
    assert n == size
    return bytes(buffer)


def load(context: Context, data: bytes, seq: int = WHOLE) -> int:
    """Bytes read, 0 if refused. The copy ends where the data does, so that a sanitizer sees reads beyond."""
    buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
    if seq == WHOLE:
        return int(llama_cpp.llama_state_set_data(context.ctx, buffer, len(data)))
    return int(llama_cpp.llama_state_seq_set_data(context.ctx, buffer, len(data), seq))


def load_file(context: Context, path: Path, seq: int = WHOLE) -> int:
    """llama_state_load_file, or of one sequence: 0 if refused."""
    name, prompt, n = str(path).encode(), (ctypes.c_int32 * 8)(), ctypes.c_size_t()
    if seq == WHOLE:
        return int(llama_cpp.llama_state_load_file(context.ctx, name, prompt, 8, ctypes.byref(n)))
    return int(llama_cpp.llama_state_seq_load_file(context.ctx, name, seq, prompt, 8, ctypes.byref(n)))


def contents(context: Context, seq: int) -> list[NDArray[Any]]:
    """All that a sequence holds: positions, keys, values, stored floats and queries of every layer."""
    spec = context.options.spec
    out: list[NDArray[Any]] = [np.array([context.used(seq), context.pos_min(seq), context.pos_max(seq)])]
    for layer in range(context.model.n_layer):
        out += [context.all_positions(layer, seq), context.queries(layer, seq)]
        out += [context.per_head(what, layer, seq) for what in ("keys", "values")]
        if spec.n_aux > 0:
            out.append(context.stored(layer, spec.n_aux, seq))
    return out


def same(a: list[NDArray[Any]], b: list[NDArray[Any]]) -> bool:
    """Bit by bit."""
    return len(a) == len(b) and all(
        x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True)
    )


def is_empty(context: Context, seq: int) -> bool:
    return context.used(seq) == 0 and context.pos_max(seq) == -1


# --- the layout, as native/rkv-state.cpp writes it --------------------------------------------------


def sealed_parts(data: bytes, seq: int, window: int) -> Iterator[tuple[int, int]]:
    """[start, end) of each part that a checksum follows, so that a test can change it and seal it again."""
    at = 8 if seq != WHOLE else 4 + struct.unpack_from("<I", data)[0]  # magic and id, or the architecture
    start = at
    n_seq, n_lines = struct.unpack_from("<II", data, at + 8)
    at += 16
    for _ in range(n_lines):
        at += 4 + struct.unpack_from("<I", data, at)[0]
    yield start, at
    at += 4
    for _ in range(max(1, n_seq)):
        first, end = struct.unpack_from("<II", data, at)
        size = 8 if end == 0 else 8 + 20 + 4 * window + 4 * (end - first)
        yield at, at + size
        at += size + 4
        if end > 0:  # its data ends where a checksum is right
            stop = at
            crc = 0
            while True:
                if stop + 4 > len(data):
                    raise ValueError("no data block ends here")
                if stop > at and struct.unpack_from("<I", data, stop)[0] == crc:
                    break
                crc = zlib.crc32(data[stop : stop + 4], crc)
                stop += 4
            yield at, stop
            at = stop + 4


def sealed(data: bytes, parts: list[tuple[int, int]]) -> bytes:
    """The same with right checksums: what a malicious file would have."""
    out = bytearray(data)
    for start, end in parts:
        struct.pack_into("<I", out, end, zlib.crc32(out[start:end]))
    return bytes(out)
