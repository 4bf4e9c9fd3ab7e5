"""Log probabilities of generated tokens: k numbers per token are kept, not n_vocab logits per position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Detokenize = Callable[[list[int]], bytes]


@dataclass(frozen=True)
class Entry:
    """One token, its log probability, and the k most likely tokens in its place with theirs, best first.

    Without logits (the first token of a sequence) logprob is None and top is empty.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]

    @classmethod
    def from_logits(cls, logits: npt.NDArray[np.float32], token: int, k: int) -> Entry:
        """logits: float32 [n_vocab] of the position before the token."""
        finite_max = float(logits.max())
        logprobs = logits - np.float32(finite_max)
        # Summed in float64: 10^5 terms in float32 lose two digits.
        logprobs = logprobs - np.float32(np.log(np.exp(logprobs).sum(dtype=np.float64)))
        k = min(k, len(logprobs))
        best = np.argpartition(-logprobs, k - 1)[:k] if k > 0 else np.empty(0, np.intp)
        best = best[np.lexsort((best, -logprobs[best]))]
        return cls(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


@dataclass
class Recorder:
    """Collects one completion's entries while it is generated, and writes them into its response.

    k: how many alternatives to report; echo: the prompt's tokens too.
    """

    k: int
    echo: bool
    detokenize: Detokenize
    prompt: list[int] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    prompt_entries: list[Entry] = field(default_factory=list)
    _reported: int = 0  # entries that a stream has given out
    _text_bytes: int = 0  # and the bytes of text
    _entry_bytes: int = 0  # of the entries given out, in bytes and in characters
    _entry_chars: int = 0

    def sampled(self, token: int, logits: npt.NDArray[np.float32]) -> None:
        """A generated token; logits float32 [n_vocab] that it was sampled from."""
        self.entries.append(Entry.from_logits(logits, token, self.k))

    def evaluated(self, start: int, logits: npt.NDArray[np.float32]) -> None:
        """Logits float32 [n, n_vocab] of positions start to start + n; used for the prompt with `echo`."""
        for i, row in enumerate(logits, start + 1):
            if i < len(self.prompt):
                self.prompt_entries.append(Entry.from_logits(row, self.prompt[i], self.k))

    def complete(self, response: dict[str, Any], prompt: str | Sequence[int], bos: int) -> None:
        """Set the logprobs of a whole completion. prompt: as the caller gave it."""
        n_text = response["usage"]["completion_tokens"] - (1 if len(prompt) == 0 else 0)
        entries, offset = self.entries[:n_text], len(prompt)
        if self.echo:
            first = [Entry(self.prompt[0], None, ())] if self.prompt else []
            entries = [e for e in first + self.prompt_entries if e.token != bos] + entries
            if entries:  # the OpenAI API reports none for the first token
                entries[0] = Entry(entries[0].token, None, ())
            offset = 0
        response["choices"][0]["logprobs"] = self._format(entries, offset)

    def stream(self, chunk: dict[str, Any], prompt: str | Sequence[int]) -> None:
        """Set the logprobs of a chunk: those of the tokens whose text it completes."""
        choice = chunk["choices"][0]
        if choice["finish_reason"] is not None:
            return
        self._text_bytes += len(choice["text"].encode("utf-8"))
        start, offset = self._reported, len(prompt) + self._entry_chars
        while self._reported < len(self.entries):
            text = self.detokenize([self.entries[self._reported].token])
            if self._entry_bytes + len(text) > self._text_bytes:
                break
            self._entry_bytes += len(text)
            self._entry_chars += len(text.decode("utf-8", errors="ignore"))
            self._reported += 1
        if self._reported > start:
            choice["logprobs"] = self._format(self.entries[start : self._reported], offset)

    def _format(self, entries: Sequence[Entry], offset: int) -> dict[str, Any]:
        """The OpenAI completion format; offset: where the first token's text begins."""
        result: dict[str, Any] = {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}
        for entry in entries:
            text = self._text(entry.token)
            result["tokens"].append(text)
            result["text_offset"].append(offset)
            result["token_logprobs"].append(entry.logprob)
            if entry.logprob is None:
                result["top_logprobs"].append(None)
            else:
                # Tokens may share a text (parts of a character): the most likely one stands for it.
                top: dict[str, float] = {}
                for token, logprob in entry.top:
                    top.setdefault(self._text(token), logprob)
                top[text] = entry.logprob
                result["top_logprobs"].append(top)
            offset += len(text)
        return result

    def _text(self, token: int) -> str:
        return self.detokenize([token]).decode("utf-8", errors="ignore")
