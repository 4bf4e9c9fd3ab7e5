"""Which tokens each layer and KV head still holds after each compaction, as arrays, a page and JSON."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _native
from .budget import KVBudget

if TYPE_CHECKING:
    from .engine import Llama

__all__ = ["Recorder", "Recording", "Summary", "record"]

Ints = npt.NDArray[np.int32]

FORMAT, FORMAT_VERSION = "rkv-local recording", 1
_HELD = np.iinfo(np.int32).max  # while recording: never dropped so far


@dataclass(frozen=True)
class Summary:
    """How much is held after a compaction, averaged over the chosen layers and heads; shares are 0 to 1.

    prompt, trace: of the tokens so far; None where there are none. agreement: the chance that a token which
    one head holds is held by another one too; chance: what it would be if each chose at random. For both,
    pinned tokens and the most recent ones do not count, which all heads must hold (of layers with different
    budgets: which one of them must); None with one head or nothing to choose.
    """

    prompt: float | None
    trace: float | None
    agreement: float | None
    chance: float | None


@dataclass(frozen=True)
class Recording:
    """What was held when. A step is a compaction, counted from 0; a row is one KV head of one layer.

    Args:
        model: its name. kv: the budget it ran with.
        n_prompt: the first tokens, which were given; the others are the trace. n_pin: those never evicted.
        tokens: int32 [n].
        pieces: the bytes of each token, control tokens by name; a character may be spread over several.
        ends: int32 [n_steps], how many tokens there were when the compaction came.
        rows: int32 [n_rows, 2], layer and head. Layers without cells under the budget have none.
        budgets: int32 [n_rows], cells that the row's layer keeps.
        gone: int32 [n_rows, n], the step that dropped a token; n_steps for those that no step did. What is
            dropped never comes back, so this is all there is to know.
        finish: "stop" (the model ended), "length", "interrupted", or "trace" (the text was given).
    """

    model: str
    kv: KVBudget
    n_prompt: int
    n_pin: int
    tokens: Ints
    pieces: tuple[bytes, ...]
    ends: Ints
    rows: Ints
    budgets: Ints
    gone: Ints
    finish: str = "length"

    @property
    def n_steps(self) -> int:
        """Compactions."""
        return len(self.ends)

    @property
    def recent(self) -> Ints:
        """int32 [n_rows]: the most recent tokens that the row's layer holds whatever their score."""
        one = self.kv.policy == "rpc"  # whose target is the same in all layers
        return np.array(
            [self.kv.recent_of(int(min(self.budgets) if one else b)) for b in self.budgets], np.int32
        )

    @property
    def texts(self) -> list[str]:
        """Each token as text; bytes that are no UTF-8 by themselves as \\xNN."""
        return [piece.decode("utf-8", errors="backslashreplace") for piece in self.pieces]

    def held(self, step: int, layer: int | None = None, head: int | None = None) -> npt.NDArray[np.bool_]:
        """Which of the tokens so far the rows of a layer and head hold after a step: bool [rows, ends[step]].

        Args:
            step: negative counts from the last.
            layer, head: None for all.

        Raises:
            IndexError: there is no such step, layer or head.
        """
        step, chosen = self._step(step), self._rows(layer, head)
        held: npt.NDArray[np.bool_] = self.gone[chosen, : self.ends[step]] > step
        return held

    def counts(self, step: int, layer: int | None = None, head: int | None = None) -> Ints:
        """How many of these rows hold each of the tokens so far: int32 [ends[step]]. Raises as held()."""
        return self.held(step, layer, head).sum(axis=0, dtype=np.int32)

    def summary(self, step: int, layer: int | None = None, head: int | None = None) -> Summary:
        """Shares held, and how far the heads agree. Raises as held()."""
        held = self.held(step, layer, head)
        rows, n = held.shape
        n_prompt = min(self.n_prompt, n)
        last = int(self.recent[self._rows(layer, head)].max())
        free = held[:, self.n_pin : max(self.n_pin, n - last)]
        agreement = chance = None
        if rows > 1 and free.any():
            counts = free.sum(axis=0, dtype=np.int64)
            agreement = float((counts * (counts - 1)).sum() / (counts.sum() * (rows - 1)))
            chance = float(free.mean())
        return Summary(
            prompt=float(held[:, :n_prompt].mean()) if n_prompt else None,
            trace=float(held[:, n_prompt:].mean()) if n > n_prompt else None,
            agreement=agreement,
            chance=chance,
        )

    def to_json(self) -> str:
        """One JSON object; docs/inspect.md describes its keys."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                **self._head(),
                "tokens": self.tokens.tolist(),
                "gone": [row.tolist() for row in self.gone],
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )

    def to_html(self) -> str:
        """A page that needs nothing but itself; one byte per row and token (more with 256 steps or more)."""
        width = next(w for w in (1, 2, 4) if self.n_steps < 256**w)
        packed = self.gone.astype(f"<u{width}").tobytes()
        data = self._head() | {"width": width, "gone": base64.b64encode(packed).decode("ascii")}
        # "<" would let a token end the script element
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        page = Path(__file__).with_name("inspect_page.html").read_text(encoding="utf-8")
        parts = {"{{title}}": html.escape(self.model), "{{data}}": text}
        return re.sub("|".join(parts), lambda found: parts[found[0]], page)

    def _head(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "kv": asdict(self.kv),
            "n_prompt": self.n_prompt,
            "n_pin": self.n_pin,
            "finish": self.finish,
            "text": self.texts,
            "ends": self.ends.tolist(),
            "rows": self.rows.tolist(),
            "budgets": self.budgets.tolist(),
            "recent": self.recent.tolist(),
        }

    def _step(self, step: int) -> int:
        if not -self.n_steps <= step < self.n_steps:
            raise IndexError(f"step is {step}, there were {self.n_steps} compactions")
        return step % self.n_steps

    def _rows(self, layer: int | None, head: int | None) -> Ints:
        chosen = np.ones(len(self.rows), np.bool_)
        if layer is not None:
            chosen &= self.rows[:, 0] == layer
        if head is not None:
            chosen &= self.rows[:, 1] == head
        if not chosen.any():
            raise IndexError(f"there are no cells under the budget in layer {layer}, head {head}")
        return np.flatnonzero(chosen).astype(np.int32)


class Recorder:
    """Watches a Llama's compactions while it reads a prompt and goes on from there.

    Making one empties the cache. The Llama must have a budget.

    Raises:
        ValueError: it has none, or the prompt is empty.
    """

    def __init__(self, llama: Llama, prompt: Sequence[int], model: str | None = None) -> None:
        if llama.kv is None or not llama.kv.active:
            raise ValueError("a full cache evicts nothing: there is nothing to inspect without a budget")
        if len(prompt) == 0:
            raise ValueError("the prompt is empty: there is no token to continue from")
        self.tokens, self._n_prompt, self.finish = list(prompt), len(prompt), "length"
        name = model or Path(llama.model_path).name
        self._model = name.encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8
        self._llama, self._kv = llama, llama.kv
        pin = llama.prompt_pin(len(prompt))
        self._n_pin = int(llama.kv.pin) if pin is None else pin
        layers = _native.governed_layers(llama.ctx)
        self._rows = [(index, head) for index, layer in layers.items() for head in range(layer.n_head_kv)]
        self._budgets = [layer.budget for layer in layers.values() for _ in range(layer.n_head_kv)]
        self._gone = np.full((len(self._rows), 0), _HELD, np.int32)
        self._ends: list[int] = []
        llama.forget()
        self._compactions = llama.kv_stats().compactions

    @property
    def n_steps(self) -> int:
        """Compactions so far."""
        return len(self._ends)

    def generate(self, **sampling: Any) -> Generator[int, None, None]:
        """The tokens that follow, until the model ends; `sampling` as for Llama.generate."""
        low = _native._low()
        vocab = low.llama_model_get_vocab(self._llama.model)
        self._llama.on_decode = self._decoded
        stream = self._llama.generate(self.tokens[: self._n_prompt], **sampling)
        try:
            for token in stream:
                if low.llama_vocab_is_eog(vocab, token):
                    self.finish = "stop"
                    return
                self.tokens.append(token)
                yield token
        finally:
            stream.close()
            self._llama.on_decode = None

    def force(self, trace: Sequence[int]) -> Generator[int, None, None]:
        """Read given tokens instead, in chunks that end where a compaction comes; yields their sizes.

        The same compactions see the same tokens and queries as if the model had generated them.
        """
        llama = self._llama
        self.tokens += trace
        llama.on_decode = self._decoded
        try:
            stream = llama.generate(self.tokens[: self._n_prompt])  # not eval: it would not know a prompt
            next(stream)
            stream.close()
            yield self._n_prompt
            start = self._n_prompt
            while start < len(self.tokens):
                room = _native.seq_room(llama.ctx) or self._kv.buffer
                part = self.tokens[start : start + min(room, llama.n_batch)]
                llama.eval(part)
                yield len(part)
                start += len(part)
            self.finish = "trace" if trace else "length"
        finally:
            llama.on_decode = None

    def recording(self) -> Recording:
        """What was seen so far."""
        from .tokenizer import PieceTokenizer

        n, n_steps = len(self.tokens), self.n_steps
        self._grow(n)
        tokenizer = PieceTokenizer(self._llama)
        return Recording(
            model=self._model,
            kv=self._kv,
            n_prompt=self._n_prompt,
            n_pin=self._n_pin,
            tokens=np.array(self.tokens, np.int32),
            pieces=tuple(tokenizer.piece(token, special=True) for token in self.tokens),
            ends=np.array(self._ends, np.int32),
            rows=np.array(self._rows, np.int32).reshape(-1, 2),
            budgets=np.array(self._budgets, np.int32),
            gone=np.minimum(self._gone[:, :n], n_steps),
            finish=self.finish,
        )

    def _decoded(self, past: int) -> None:
        """A compaction came before the tokens from `past` on, or none."""
        compactions = self._llama.kv_stats().compactions
        if past == 0:
            self._ends.clear()  # from the start: a prompt is read again where it can't be continued
            self._gone.fill(_HELD)
        elif compactions != self._compactions:
            self._grow(past)
            step, held = len(self._ends), np.empty(past, np.bool_)
            for row, (layer, head) in enumerate(self._rows):
                positions = _native.kept_positions(self._llama.ctx, layer, head)
                held[:] = False
                held[positions[positions < past]] = True
                gone = self._gone[row, :past]
                gone[(gone == _HELD) & ~held] = step
            self._ends.append(past)
        self._compactions = compactions

    def _grow(self, n: int) -> None:
        missing = n - self._gone.shape[1]
        if missing > 0:
            more = np.full((len(self._rows), max(missing, self._gone.shape[1])), _HELD, np.int32)
            self._gone = np.concatenate([self._gone, more], axis=1)


def record(
    llama: Llama,
    prompt: str | Sequence[int],
    max_tokens: int = -1,
    *,
    trace: str | Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Recording:
    """Generate after a prompt, or read a given trace, and note what every layer and KV head holds.

    Args:
        llama: with a budget; its cache is emptied.
        prompt: tokens, or text that is tokenized as it is, without a chat template.
        max_tokens: most tokens to generate; -1: until the model ends or the context is full.
        trace: this text or these tokens, instead of generating.
        progress: called with the number of tokens so far and of compactions.
        **sampling: temp, top_k, ... as for Llama.generate.

    Raises:
        ValueError: no budget, or an empty prompt. RKVError: beyond n_ctx, or the engine's reason.
    """
    recorder = Recorder(llama, _tokens(llama, prompt, True))
    if trace is None:
        room = llama.n_ctx() - len(recorder.tokens)
        limit = room if max_tokens < 0 else min(max_tokens, room)
        steps = recorder.generate(**sampling)
    else:
        steps, limit = recorder.force(_tokens(llama, trace, False)), -1
    while limit != 0 and next(steps, None) is not None:
        limit -= 1
        if progress is not None:
            progress(llama.n_tokens, recorder.n_steps)
    steps.close()
    return recorder.recording()


def _tokens(llama: Llama, text: str | Sequence[int], bos: bool) -> list[int]:
    if isinstance(text, str):
        return list(llama.tokenize(text.encode("utf-8"), add_bos=bos, special=True))
    return list(text)
