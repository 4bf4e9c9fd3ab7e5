"""Several sequences in one context, token by token."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import llama_cpp._internals as internals
import llama_cpp.llama_cpp as low
import numpy as np
import numpy.typing as npt

from . import _native
from .errors import RKVError

if TYPE_CHECKING:
    from .engine import Llama

Logits = npt.NDArray[np.float32]

# llama_decode's results (llama.h) that have no line of the engine's own
_REASONS = {
    1: "no cells are free for this batch",
    2: "decoding was aborted",
    -1: "the batch is invalid: token numbers or positions out of range",
}


def decode(ctx: Any, batch: Any) -> None:
    """llama_decode. Raises RKVError with the engine's reason, or llama.cpp's code in words."""
    code = low.llama_decode(ctx, batch)
    if code != 0:
        reason = _native.last_error() or _REASONS.get(code, "llama.cpp could not decode the batch")
        raise RKVError(f"{reason} (llama_decode returned {code})")


def new_batch(n_tokens: int) -> internals.LlamaBatch:
    """A llama_batch whose tokens belong to one sequence each."""
    return internals.LlamaBatch(n_tokens=n_tokens, embd=0, n_seq_max=1, verbose=False)


class Session:
    """Token-level access to a Llama's context, for benchmarks, tests and servers.

    Making one clears the context. Sequences are 0 to n_seq_max - 1.

    Args:
        llama: made with n_seq_max sequences. Its own completions must not be used beside the session.
    """

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self.n_seq_max = llama.n_seq_max
        self._width = int(low.llama_n_batch(llama.ctx))
        self._batch = new_batch(self._width)
        raw = self._batch.batch
        self._token = np.ctypeslib.as_array(raw.token, shape=(self._width,))
        self._pos = np.ctypeslib.as_array(raw.pos, shape=(self._width,))
        self._output = np.ctypeslib.as_array(raw.logits, shape=(self._width,))
        np.ctypeslib.as_array(raw.n_seq_id, shape=(self._width,))[:] = 1
        self.clear()

    @property
    def _memory(self) -> Any:
        return self.llama._ctx.memory

    def pos(self, seq: int = 0) -> int:
        """The position that the sequence's next token gets."""
        return int(low.llama_memory_seq_pos_max(self._memory, self._check(seq))) + 1

    def used(self, seq: int = 0) -> int:
        """Cells in use in the widest layer."""
        return self.llama.kv_used(seq)

    def kept(self, layer: int, head: int, seq: int = 0) -> npt.NDArray[np.int32]:
        """True positions that a layer and KV head holds: int32 [n], ascending."""
        return self.llama.kv_kept(layer, head, seq)

    def decode(
        self, tokens: Mapping[int, Sequence[int]], logits: Literal["last", "all", "none"] = "last"
    ) -> dict[int, Logits]:
        """Append tokens to sequences, side by side, in chunks that the cache has room for.

        Args:
            tokens: for each sequence the tokens that follow it, any number.
            logits: "last": float32 [n_vocab] after each sequence's last token; "all": float32
                [n_tokens, n_vocab]; "none": computed as for "last", but not copied.

        Raises:
            IndexError: no such sequence. ValueError: a bad `logits`. RKVError: beyond n_ctx, or the engine's
            reason; pos() then tells what was decoded.
        """
        if logits not in ("last", "all", "none"):
            raise ValueError(f"logits is {logits!r}, must be last, all or none")
        self._open()
        left = {self._check(seq): list(part) for seq, part in tokens.items() if len(part)}
        n_ctx = self.llama.n_ctx()
        for seq, part in left.items():
            end = self.pos(seq) + len(part)
            if end > n_ctx:
                raise RKVError(
                    f"the context is full: sequence {seq} would have {end} tokens, n_ctx is {n_ctx}"
                )
        for seq, part in left.items():
            pin = self.llama.prompt_pin(len(part)) if self.pos(seq) == 0 else None
            if pin is not None:
                _native.seq_pin(self.llama.ctx, pin, seq)
        rows: dict[int, list[Logits]] = {seq: [] for seq in left}
        while left:
            share = max(1, min(self.llama.n_batch, self._width // len(left)))
            taken: list[tuple[int, int, int]] = []  # sequence, its first row of the batch, rows
            n = 0
            for seq, part in left.items():
                count = min(share, len(part), self._width - n)
                if count > 0:
                    self._put(n, seq, part[:count], logits == "all", last=count == len(part))
                    taken.append((seq, n, count))
                    n += count
            self._batch.batch.n_tokens = n
            self.llama.check_outputs(int(np.count_nonzero(self._output[:n])))
            decode(self.llama.ctx, self._batch.batch)
            for seq, start, count in taken:
                del left[seq][:count]
                if logits == "all":
                    rows[seq] += [self._row(start + i) for i in range(count)]
                elif logits == "last" and not left[seq]:
                    rows[seq] = [self._row(start + count - 1)]
                if not left[seq]:
                    del left[seq]
        if logits == "none":
            return {}
        return {seq: np.stack(r) if logits == "all" else r[0] for seq, r in rows.items()}

    def clear(self, seq: int | None = None) -> None:
        """Forget one sequence, or all."""
        self._open()
        if seq is None:
            self.llama.forget()
        elif not self.remove(seq, 0):
            raise RKVError(_native.last_error() or f"sequence {seq} could not be cleared")

    def remove(self, seq: int, p0: int, p1: int = -1) -> bool:
        """Remove positions [p0, p1), to the end if p1 is -1. False: refused, since it would not be exact."""
        self._open()
        return bool(low.llama_memory_seq_rm(self._memory, self._check(seq), p0, p1))

    def copy(self, src: int, dst: int) -> None:
        """Make dst a copy of src, with all that it remembers."""
        self._open()
        low.llama_memory_seq_cp(self._memory, self._check(src), self._check(dst), -1, -1)

    def save(self, seq: int = 0) -> bytes:
        """What one sequence holds. Raises RKVError with the engine's reason."""
        self._open()
        size = low.llama_state_seq_get_size(self.llama.ctx, self._check(seq))
        buffer = (ctypes.c_uint8 * size)()
        if size == 0 or low.llama_state_seq_get_data(self.llama.ctx, buffer, size, seq) != size:
            raise RKVError(_native.last_error() or f"sequence {seq} could not be saved")
        return bytes(buffer)

    def load(self, data: bytes, seq: int = 0) -> None:
        """Make a sequence what save() gave, of any sequence of a context with the same model and budget.

        Raises:
            RKVError: saved with other settings, or damaged; the sequence is as it was, or empty.
        """
        self._open()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        done = low.llama_state_seq_set_data(self.llama.ctx, buffer, len(data), self._check(seq))
        if 0 < done == len(data):
            return
        reason = _native.last_error() if done == 0 else "the state is damaged: more bytes follow it"
        if done > 0:
            self.clear(seq)
        raise RKVError(reason or f"sequence {seq} could not be restored")

    def compact(self, seq: int = 0) -> bool:
        """Compact now, whatever the fill. False if there was nothing to evict."""
        self._open()
        return _native.seq_compact(self.llama.ctx, self._check(seq))

    def close(self) -> None:
        """Free the session's batch; the Llama stays."""
        self._batch.close()

    def _put(self, n: int, seq: int, part: list[int], every: bool, last: bool) -> None:
        rows, count = slice(n, n + len(part)), len(part)
        self._token[rows] = part
        self._pos[rows] = np.arange(count) + self.pos(seq)
        self._output[rows] = every
        if last:
            self._output[n + count - 1] = True
        seq_id = self._batch.batch.seq_id
        for i in range(n, n + count):
            seq_id[i][0] = seq

    def _row(self, i: int) -> Logits:
        row = low.llama_get_logits_ith(self.llama.ctx, ctypes.c_int32(i))
        return np.ctypeslib.as_array(row, shape=(self.llama.n_vocab(),)).copy()

    def _check(self, seq: int) -> int:
        if not 0 <= seq < self.n_seq_max:
            raise IndexError(f"sequence is {seq}, must be from 0 to {self.n_seq_max - 1}")
        return seq

    def _open(self) -> None:
        if self._batch.batch is None:
            raise RKVError("this Session is closed")
