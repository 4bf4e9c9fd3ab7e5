"""A model loaded once, and contexts over it that are made and freed for one configuration after the other."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rkv_local import _lib, _native
from rkv_local.budget import KVBudget, pad_ctx
from rkv_local.chat import Template
from rkv_local.errors import RKVError
from rkv_local.options import WITH_BUDGET
from rkv_local.shape import CACHE_TYPES, read_metadata

_lib.prepare()

import llama_cpp.llama_cpp as low  # noqa: E402

from rkv_local.session import decode as checked_decode  # noqa: E402
from rkv_local.tokenizer import Pieces  # noqa: E402

__all__ = ["Context", "Model", "Setting", "sha256"]

Tokens = npt.NDArray[np.int32]
_FULL_CHUNK = 512  # tokens of a prompt in one decode where no budget says otherwise
_PROMPTS = 1024  # tokens of all prompts beside the decoding sequences, in one decode
_UBATCH = 512
_FLASH = {True: 1, False: 0, None: -1}  # enum llama_flash_attn_type


@functools.lru_cache(maxsize=8)
def sha256(path: Path) -> str:
    """The file's checksum in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Setting:
    """What a context is made with.

    kv: None is a full cache. n_ctx: positions of one sequence. flash_attn None: llama.cpp decides.
    n_outputs: most rows of logits in one decode; None: one for each sequence.
    """

    kv: KVBudget | None = None
    n_ctx: int = 4096
    n_seq: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool | None = False
    threads: int = 1
    kv_offload: bool = True
    n_outputs: int | None = None

    @property
    def chunk(self) -> int:
        """Most tokens of one sequence in one decode."""
        return self.kv.n_batch if self.kv else _FULL_CHUNK

    @property
    def prompts(self) -> int:
        """Most tokens of prompts in one decode, all sequences together."""
        return max(self.chunk, _PROMPTS)

    @property
    def width(self) -> int:
        """Most tokens in one decode."""
        return self.prompts + self.n_seq


class Model:
    """Weights, vocabulary and chat template. gpu_layers: -1 is all.

    Raises:
        RuntimeError: llama.cpp cannot load the file, or it has no vocabulary.
    """

    def __init__(self, path: str | os.PathLike[str], gpu_layers: int = 0) -> None:
        self.path = Path(path)
        low.llama_backend_init()
        params = low.llama_model_default_params()
        params.n_gpu_layers = 0x7FFFFFFF if gpu_layers < 0 else gpu_layers
        self.raw = low.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self.raw:
            raise RuntimeError(f"Failed to load model from file: {self.path}")
        self.vocab = low.llama_model_get_vocab(self.raw)
        if low.llama_vocab_type(self.vocab) == low.LLAMA_VOCAB_TYPE_NONE:
            self.close()
            raise RuntimeError(f"{self.path.name} has no vocabulary: it can be measured, not talked to")
        self.n_vocab = int(low.llama_vocab_n_tokens(self.vocab))
        self.n_layer = int(low.llama_model_n_layer(self.raw))
        # [n_vocab]: the tokens that end an answer
        self.ends = np.array([low.llama_vocab_is_eog(self.vocab, i) for i in range(self.n_vocab)], bool)
        metadata = {k: v for k, v in read_metadata(self.path).items() if isinstance(v, str)}
        self.template = Template.of(
            metadata,
            self._text(low.llama_vocab_bos(self.vocab)),
            self._text(low.llama_vocab_eos(self.vocab)),
        )
        self._pieces = Pieces(self.vocab, special=True)

    def close(self) -> None:
        """Free it; no context over it may be left."""
        if self.raw:
            low.llama_model_free(self.raw)
            self.raw = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def sha256(self) -> str:
        """The file's checksum."""
        return sha256(self.path)

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        return str(low.llama_vocab_get_text(self.vocab, token).decode("utf-8", errors="replace"))

    def tokenize(self, text: str, start: bool = True) -> Tokens:
        """Tokens of `text`, special ones among them. start: with the vocabulary's beginning, once."""
        if self.template.bos and text.startswith(self.template.bos):
            start = False
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            out = np.empty(room, np.int32)
            pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            n = low.llama_tokenize(self.vocab, data, len(data), pointer, room, start, True)
            if n >= 0:
                return out[:n]
            if n == -(2**31):
                raise RuntimeError("the text has too many tokens")
            room = -n

    def text(self, tokens: Sequence[int] | Tokens) -> str:
        """Text of tokens, with that of special ones; bytes that are no UTF-8 become U+FFFD."""
        pieces = self._pieces
        return b"".join([pieces[t] for t in np.asarray(tokens).tolist()]).decode("utf-8", errors="replace")

    def opened(self, prompt: Tokens) -> str:
        """The tag of thinking that a prompt ends in, where the template opens it; else ""."""
        pair = Template.open_tag(self.text(prompt[-16:]))
        return pair[0] if pair else ""

    def prompt(self, user: str, system: str = "") -> Tokens:
        """Tokens of the chat template with the user's message, up to where the answer begins."""
        messages = [{"role": "system", "content": system}] if system else []
        return self.tokenize(self.template.render([*messages, {"role": "user", "content": user}]))


class Context:
    """A llama_context whose batches are numpy arrays.

    Fill `token`, `pos`, `seq`, `output` ([width] each) from the front and call decode(n). Tokens of one
    sequence stand one after the other, sequences in ascending order: llama.cpp computes neighbours together.

    Raises:
        RKVError: the engine refuses the model or the budget. RuntimeError: there is no room for the context.
    """

    def __init__(self, model: Model, setting: Setting) -> None:
        if setting.kv is not None:
            setting = replace(setting, kv=setting.kv.for_model(model.path, model.n_layer))
        self.model, self.setting, self.kv = model, setting, setting.kv
        self.n_seq, self.width = setting.n_seq, setting.width
        params = low.llama_context_default_params()
        total = pad_ctx(setting.n_ctx) * self.n_seq
        if total >= 2**32:
            raise RKVError(f"{self.n_seq} sequences of {setting.n_ctx:,} tokens are too many for one context")
        params.n_ctx, params.n_batch = total, self.width
        params.n_ubatch = max(min(self.width, _UBATCH), self.n_seq)
        params.n_seq_max, params.kv_unified = self.n_seq, False
        params.n_outputs_max = max(setting.n_outputs or 0, self.n_seq)
        params.n_threads = params.n_threads_batch = setting.threads
        params.flash_attn_type = _FLASH[setting.flash_attn]
        params.offload_kqv, params.no_perf = setting.kv_offload, True
        params.type_k, params.type_v = CACHE_TYPES[setting.type_k][0], CACHE_TYPES[setting.type_v][0]
        if self.kv:
            for name, value in WITH_BUDGET.items():
                setattr(params, name, value)
        _native.clear_error()
        self.raw = (
            _native.init_context(model.raw, params, self.kv)
            if self.kv
            else low.llama_init_from_model(model.raw, params)
        )
        if not self.raw:
            raise RuntimeError(_native.last_error() or "Failed to create llama_context")
        self.memory = low.llama_get_memory(self.raw)
        self._make_batch()

    def _make_batch(self) -> None:
        width = self.width
        self.token, self.pos, self.seq = (np.zeros(width, np.int32) for _ in range(3))
        self.output = np.zeros(width, np.int8)
        self._ones = np.ones(width, np.int32)
        # llama_batch wants a list of sequences for each token: here of one, which stands in `seq`
        self._lists = (self.seq.ctypes.data + 4 * np.arange(width)).astype(np.uintp)
        ints, lists = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))
        self.batch = low.llama_batch()
        self.batch.token = self.token.ctypes.data_as(ints)
        self.batch.pos = self.pos.ctypes.data_as(ints)
        self.batch.n_seq_id = self._ones.ctypes.data_as(ints)
        self.batch.seq_id = self._lists.ctypes.data_as(lists)
        self.batch.logits = self.output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def close(self) -> None:
        """Free it."""
        if self.raw:
            low.llama_free(self.raw)
            self.raw = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(self, n: int) -> None:
        """Decode the batch's first n tokens. Raises RKVError with the engine's reason."""
        self.batch.n_tokens = n
        checked_decode(self.raw, self.batch)

    def logits(self, n: int) -> npt.NDArray[np.float32]:
        """float32 [n, n_vocab]: rows of the last decode's n outputs, valid until the next one."""
        return np.ctypeslib.as_array(low.llama_get_logits(self.raw), shape=(n, self.model.n_vocab))

    def feed(self, seq: int, tokens: Tokens, start: int = 0, outputs: bool = False) -> None:
        """Append at most `width` tokens of one sequence at positions start, ...; outputs: of all."""
        n = len(tokens)
        self.token[:n], self.pos[:n], self.seq[:n] = tokens, np.arange(start, start + n), seq
        self.output[:n] = outputs
        self.decode(n)

    def read(self, seq: int, tokens: Tokens, start: int = 0) -> int:
        """Feed any number of tokens without outputs, in chunks; the position after them."""
        for i in range(0, len(tokens), self.setting.chunk):
            part = tokens[i : i + self.setting.chunk]
            self.feed(seq, part, start)
            start += len(part)
        return start

    def clear(self, seq: int) -> None:
        """Forget a sequence."""
        if not low.llama_memory_seq_rm(self.memory, seq, -1, -1):
            raise RKVError(_native.last_error() or f"sequence {seq} could not be cleared")

    def copy(self, source: int, target: int) -> None:
        """Make `target`, which must be empty, a copy of `source` with all that it remembers."""
        low.llama_memory_seq_cp(self.memory, source, target, -1, -1)

    @property
    def bytes(self) -> int:
        """Of the cache, one sequence."""
        return int(_native.stats(self.raw).bytes) // self.n_seq

    @property
    def cells(self) -> int:
        """Allocated for one sequence in the widest layer."""
        return int(_native.stats(self.raw).cells)
