"""Many prompts through one context: a finished sequence's slot takes the next prompt at once.

All bookkeeping is arrays over the slots, so that a step costs about the same for 1 sequence and for 256. What
a sequence is fed at once does not depend on its neighbours (a chunk of its prompt, then single tokens), so
neither does what is evicted; its text may differ from that of a run of its own only where the rounding of
larger matrix products decides between two nearly equal tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from rkv_local import _native

from .model import Context, Tokens

__all__ = ["Batcher", "Done", "Request"]


@dataclass(frozen=True)
class Request:
    """A prompt. base: a sequence below the batcher's first slot that it continues; None: an empty cache."""

    id: str
    tokens: Sequence[int] | Tokens
    base: int | None = None


@dataclass(frozen=True)
class Done:
    """An answer. tokens: those generated, without the one that ended it; stopped: False at the limit."""

    id: str
    text: str
    n_prompt: int
    tokens: Tokens
    stopped: bool

    @property
    def n_tokens(self) -> int:
        """How many were generated."""
        return len(self.tokens)


@dataclass
class _Slot:
    """A request that is being answered: of its prompt the tokens from `fed` on are left."""

    request: Request
    tokens: Tokens
    draws: np.random.Generator | None = None
    fed: int = 0


@dataclass
class Batcher:
    """Generates answers with a context's sequences from `first` on.

    max_tokens: limit of every answer. temp 0: always the likeliest token; else each request draws from random
    numbers of its own, which `seed` and its id decide. stop: asked before every step whether to leave off.
    n_generated and n_steps count while it runs.
    """

    context: Context
    max_tokens: int
    temp: float = 0.0
    seed: int = 0
    first: int = 0
    stop: Callable[[], bool] = lambda: False
    n_generated: int = 0
    n_steps: int = 0
    _slots: dict[int, _Slot] = field(default_factory=dict)
    _feeding: dict[int, _Slot] = field(default_factory=dict)  # those that have no token yet, first come first

    def __post_init__(self) -> None:
        n = self.context.n_seq
        if not 0 <= self.first < n:
            raise ValueError(f"first is {self.first}, must be from 0 to {n - 1}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, must be at least 1")
        if not self.temp >= 0:
            raise ValueError(f"temp is {self.temp}, must be at least 0")
        self._pos, self._last, self._count = (np.zeros(n, np.int32) for _ in range(3))
        self._decoding = np.zeros(n, bool)
        self._out = np.zeros((n, self.max_tokens), np.int32)
        self._base_pos: dict[int | None, int] = {None: 0}

    def base(self, seq: int, tokens: Tokens) -> None:
        """Read what the requests with this base have in common into a sequence below `first`.

        Raises:
            RKVError: it does not fit, or the engine refuses.
        """
        if not 0 <= seq < self.first:
            raise ValueError(f"seq is {seq}, must be below {self.first}")
        self.context.clear(seq)
        self._pin(seq, len(tokens))
        self._base_pos[seq] = self.context.read(seq, tokens)

    def run(self, requests: Iterable[Request]) -> Generator[Done, None, None]:
        """Yield answers as they finish. A request is taken when a slot is free.

        Raises:
            ValueError: an empty prompt, or one that leaves no room for an answer in n_ctx. RKVError: the
                engine refuses to decode.
        """
        queue = iter(requests)
        free = list(range(self.context.n_seq - 1, self.first - 1, -1))  # the lowest last
        more = True
        try:
            while True:
                while more and free:
                    request = next(queue, None)
                    if request is None:
                        more = False
                    else:
                        self._begin(free.pop(), request)
                if not self._slots or self.stop():
                    return
                if not more:
                    free = self._close_ranks()
                for slot in self._step():
                    done = self._finish(slot)
                    free.append(slot)
                    free.sort(reverse=True)
                    yield done
        finally:  # also when the caller stops listening
            for slot in list(self._slots):
                self._forget(slot)

    def _begin(self, slot: int, request: Request) -> None:
        tokens = np.asarray(request.tokens, np.int32)
        start = self._base_pos[request.base]
        if len(tokens) == 0:
            raise ValueError(f"{request.id}: the prompt has no tokens")
        if start + len(tokens) >= self.context.setting.n_ctx:
            raise ValueError(
                f"{request.id}: the prompt has {start + len(tokens):,} tokens, "
                f"n_ctx is {self.context.setting.n_ctx:,}"
            )
        if request.base is None:
            self._pin(slot, len(tokens))
        else:
            self.context.copy(request.base, slot)
        made = self._slots[slot] = self._feeding[slot] = _Slot(request, tokens)
        self._pos[slot], self._count[slot] = start, 0
        if self.temp > 0:
            made.draws = np.random.default_rng([self.seed, zlib.crc32(request.id.encode())])

    def _pin(self, slot: int, n_prompt: int) -> None:
        """KVBudget.pin "prompt": the first prompt of a sequence, up to half of the budget."""
        kv, native = self.context.kv, cast(Any, _native)
        if kv is not None and cast(Any, kv).pin == "prompt":
            n = cast(Any, kv).prompt_pin(n_prompt, self.context.model.n_layer)
            native.seq_pin(self.context.raw, n, slot)

    def _step(self) -> list[int]:
        """One decode; the slots whose answers are complete."""
        context = self.context
        slots = np.flatnonzero(self._decoding).astype(np.int32)
        if self._feeding:
            rows, n = self._put_mixed(slots)
        else:
            rows, n = slots, len(slots)
            context.token[:n], context.pos[:n] = self._last[slots], self._pos[slots]
            context.seq[:n], context.output[:n] = slots, 1
            self._pos[slots] += 1
        context.decode(n)
        self.n_steps += 1
        if len(rows) == 0:
            return []
        tokens = self._choose(context.logits(len(rows)), rows)
        ended = context.model.ends[tokens]
        going = rows[~ended]
        self._out[going, self._count[going]] = tokens[~ended]
        self._count[going] += 1
        self.n_generated += len(going)
        self._last[rows] = tokens
        full = (self._count[rows] >= self.max_tokens) | (self._pos[rows] >= context.setting.n_ctx)
        self._decoding[rows] = ~(ended | full)
        self._last[rows[ended]] = -1
        return [int(slot) for slot in rows[ended | full]]

    def _put_mixed(self, slots: Tokens) -> tuple[Tokens, int]:
        """A batch of decoding sequences and prompts in slot order; (slots with an output, tokens)."""
        context, room = self.context, self.context.setting.prompts
        parts: list[tuple[int, Tokens, bool]] = [(int(s), self._last[s : s + 1], True) for s in slots]
        for slot, feed in list(self._feeding.items()):
            left = feed.tokens[feed.fed :]
            part = left[: context.setting.chunk]
            if len(part) > room:
                break  # a chunk is never cut shorter: what is evicted must not depend on the neighbours
            room -= len(part)
            feed.fed += len(part)
            parts.append((slot, part, len(part) == len(left)))
            if len(part) == len(left):
                del self._feeding[slot]
        parts.sort(key=lambda part: part[0])
        n = 0
        for slot, part, ready in parts:
            end = n + len(part)
            context.token[n:end], context.seq[n:end], context.output[n:end] = part, slot, 0
            context.pos[n:end] = np.arange(self._pos[slot], self._pos[slot] + len(part))
            context.output[end - 1] = ready
            self._pos[slot] += len(part)
            n = end
        rows = np.array([slot for slot, _, ready in parts if ready], np.int32)
        return rows, n

    def _choose(self, logits: npt.NDArray[np.float32], rows: Tokens) -> Tokens:
        """The next token of each row: int [n]."""
        if self.temp > 0:
            # the largest of logit/temp + Gumbel noise is a draw from the softmax
            draws = [self._slots[s].draws for s in rows.tolist()]
            noise = np.stack([d.gumbel(size=logits.shape[1]) for d in draws if d is not None])
            return (logits / self.temp + noise).argmax(axis=1).astype(np.int32)
        return logits.argmax(axis=1).astype(np.int32)

    def _finish(self, slot: int) -> Done:
        tokens = self._out[slot, : self._count[slot]].copy()
        request, stopped = self._slots[slot].request, bool(self._last[slot] == -1)
        n_prompt = self._base_pos[request.base] + len(request.tokens)
        self._forget(slot)
        return Done(request.id, self.context.model.text(tokens), n_prompt, tokens, stopped)

    def _forget(self, slot: int) -> None:
        self._decoding[slot] = False
        self._slots.pop(slot, None)
        self._feeding.pop(slot, None)
        self.context.clear(slot)

    def _close_ranks(self) -> list[int]:
        """Move sequences down into slots that nobody needs any more; the slots that are free then.

        llama.cpp computes sequences together as long as their numbers have no gaps.
        """
        while True:
            taken = sorted(self._slots)
            holes = [s for s in range(self.first, taken[-1] + 1) if s not in self._slots] if taken else []
            if not holes:
                break
            source, target = taken[-1], holes[0]
            self.context.copy(source, target)
            for state in (self._pos, self._last, self._count, self._decoding, self._out):
                state[target] = state[source]
            for kept in (self._slots, self._feeding):
                if source in kept:
                    kept[target] = kept.pop(source)
            self._decoding[source] = False
            self.context.clear(source)
        return [s for s in range(self.context.n_seq - 1, self.first - 1, -1) if s not in self._slots]
