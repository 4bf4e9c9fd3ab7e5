"""Detokenizing at a cost that does not grow with the trace.

llama_cpp turns the whole completion back into text after every token, with one C call per token: at 6,000
tokens that costs as much as the decode itself. Here each token's text is fetched once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as low
from llama_cpp.llama_tokenizer import LlamaTokenizer


class Pieces(dict[int, bytes]):
    """token → its text (control tokens: nothing, unless `special`), filled on demand."""

    def __init__(self, vocab: Any, special: bool) -> None:
        self._vocab, self._special = vocab, special

    def __missing__(self, token: int) -> bytes:
        n_vocab = low.llama_vocab_n_tokens(self._vocab)
        if not 0 <= token < n_vocab:
            raise ValueError(f"token is {token}, must be from 0 to {n_vocab - 1}")
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = low.llama_token_to_piece(self._vocab, token, buffer, size, 0, self._special)
            if n >= 0:
                break
            size = -n  # the size that is needed
        self[token] = piece = buffer.raw[:n]
        return piece


class PieceTokenizer(LlamaTokenizer):
    """LlamaTokenizer that remembers the text of every token, and of the last long list of them."""

    _LONG = 64

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._bos = llama.token_bos()
        self._pieces = {special: Pieces(self._model.vocab, special) for special in (False, True)}
        self._last: dict[bool, tuple[list[int], bytes]] = {False: ([], b""), True: ([], b"")}

    def piece(self, token: int, special: bool = False) -> bytes:
        """A token's text; for control tokens nothing, or with `special` their name."""
        return self._pieces[special][token]

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens; a space after a leading BOS token is dropped, as LlamaTokenizer does."""
        tokens = list(tokens)
        piece = self._pieces[special].__getitem__
        if len(tokens) < self._LONG:
            text = b"".join(map(piece, tokens))
        else:
            # A trace that grows from call to call: only its new tokens are looked up.
            known, text = self._last[special]
            if tokens[: len(known)] != known:
                known, text = [], b""
            text += b"".join(map(piece, tokens[len(known) :]))
            self._last[special] = (tokens, text)
        return text[1:] if tokens and tokens[0] == self._bos and text[:1] == b" " else text
