"""Detokenizing at a cost that does not grow with the trace.

llama_cpp turns the whole completion back into text after every token, with one C call per token: at 6,000
tokens that costs as much as the decode itself. Here each token's text is fetched once.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp.llama_cpp as low
from llama_cpp.llama_tokenizer import LlamaTokenizer


class _Pieces(dict[int, bytes]):
    """token → its text, filled on demand."""

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
    """LlamaTokenizer with every token's text remembered."""

    def __init__(self, llama: Any) -> None:
        super().__init__(llama)
        self._bos = llama.token_bos()
        self._pieces = {special: _Pieces(self._model.vocab, special) for special in (False, True)}

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens; a space after a leading BOS token is dropped, as LlamaTokenizer does."""
        text = b"".join(map(self._pieces[special].__getitem__, tokens))
        return text[1:] if len(tokens) > 0 and tokens[0] == self._bos and text[:1] == b" " else text
