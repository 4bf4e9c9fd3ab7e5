"""rkv_local.Llama: llama_cpp.Llama with a cache of fixed size."""

from __future__ import annotations

import ctypes
import inspect
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _lib, _native
from .budget import KVBudget
from .errors import RKVError
from .logprobs import Recorder
from .options import Options, check_threads, resolve
from .shape import ModelShape

_lib.prepare()  # our libraries, before llama_cpp loads others

import llama_cpp  # noqa: E402
import llama_cpp.llama_cpp as low  # noqa: E402
from llama_cpp import _logger  # noqa: E402
from llama_cpp.llama_speculative import LlamaDraftModel  # noqa: E402

from .session import Session, decode, new_batch  # noqa: E402
from .speculative import BoundedDraft  # noqa: E402
from .tokenizer import PieceTokenizer  # noqa: E402

__all__ = ["KVStats", "Llama", "Session"]

_STOCK_PARAMETERS = frozenset(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"self", "kwargs"}

# llama_cpp's table is of an older enum ggml_log_level: it shows warnings as errors and hides errors.
_logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL.update(
    {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
)


class _Closed:
    """Stands where a closed Llama's context, model, batch and tokenizer were."""

    def __getattr__(self, name: str) -> Any:
        raise RKVError("this Llama is closed")


_COUNTS = [field[0] for field in _native.RkvStats._fields_]


@dataclass(frozen=True)
class KVStats:
    """What the cache is and did since the context was made. Without a budget all but the sizes is 0.

    recent: the last tokens that a layer keeps whatever their score, if it has room for so many; cells:
    allocated per sequence in the widest layer; bytes: of all parts of the cache, windows and recurrent states
    too; bytes_kv: of these K and V under the budget, without one those of the full cache; compactions: one
    per sequence and pass; tokens_evicted: averaged over layers and heads.
    """

    policy: str
    budget: int
    buffer: int
    window: int
    recent: int
    pin: int | str
    active: bool
    cells: int
    bytes: int
    bytes_kv: int
    compactions: int
    t_compaction_us: int
    tokens_evicted: int

    @property
    def compaction_seconds(self) -> float:
        """Time spent in compactions."""
        return self.t_compaction_us / 1e6


class Llama(llama_cpp.Llama):
    """llama_cpp.Llama whose cache keeps a fixed number of cells. docs/python.md describes what differs.

    Args:
        model_path: a GGUF file.
        kv: the budget; None or policy `none` is stock llama.cpp.
        n_ctx: logical limit on each sequence's positions; does not size the cache. Default 32,768, and
            llama_cpp's 512 without a budget; 0 is the model's training length.
        n_batch: most tokens of one sequence per decode, at most and by default kv.n_batch.
        n_seq_max: sequences with a cache of their own.
        flash_attn: True, False, or None for llama.cpp's automatic choice.
        type_k, type_v: cache types, by name (f16, q8_0, ...) or ggml type number.
        seed: -1 is llama_cpp's default seed; 0 is a seed like any other.
        n_outputs: most rows of logits per decode, one per sequence at least; None is n_batch, for which
            compute buffers are larger.
        **stock: llama_cpp.Llama's other parameters.

    Raises:
        ValueError: a bad parameter or model file. RKVError: the engine refuses the model or the budget.
    """

    # llama_cpp.Llama.__init__ fills its context_params with no way to add to them: ours are set when read.
    _options: Options
    _ctx: Any
    _model: Any
    _batch: Any
    tokenizer_: Any
    n_tokens: int
    _draft: LlamaDraftModel | None
    # called after each decode with the position of its first token; compactions come before a decode
    on_decode: Callable[[int], None] | None = None

    @property
    def context_params(self) -> Any:
        """llama_context_params that the context is made with."""
        for name, value in self._options.forced.items():
            setattr(self._context_params, name, value)
        return self._context_params

    @context_params.setter
    def context_params(self, value: Any) -> None:
        self._context_params = value

    @property
    def draft_model(self) -> LlamaDraftModel | None:
        """Drafts tokens for speculative decoding; with a budget it is kept within the buffer."""
        return self._draft

    @draft_model.setter
    def draft_model(self, draft: LlamaDraftModel | None) -> None:
        self._draft = draft if draft is None or not self._active else BoundedDraft(draft, self)

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        kv: KVBudget | None = KVBudget(),  # noqa: B008 (frozen)
        n_ctx: int | None = None,
        n_batch: int | None = None,
        n_ubatch: int | None = None,
        n_seq_max: int | None = None,
        flash_attn: bool | None = False,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        seed: int = -1,
        logits_all: bool = False,
        n_outputs: int | None = None,
        **stock: Any,
    ) -> None:
        for name in stock:
            if name not in _STOCK_PARAMETERS:
                raise TypeError(f"Llama() got an unexpected parameter {name!r}")
        for name in ("n_threads", "n_threads_batch"):
            check_threads(name, stock.get(name))
        made = self._options = resolve(
            os.fspath(model_path),
            kv=kv,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_seq_max=n_seq_max,
            flash_attn=flash_attn,
            type_k=type_k,
            type_v=type_v,
            embedding=bool(stock.get("embedding")),
            n_outputs=n_outputs,
            swa_full=stock.get("swa_full"),
        )
        if n_outputs is not None and (logits_all or stock.get("draft_model") is not None):
            raise ValueError("n_outputs must be None with logits_all or a draft_model: all logits are wanted")
        self.kv, self.n_seq_max, self._active = made.kv, made.n_seq_max, made.active
        self._n_ctx = made.n_ctx
        self._recorder: Recorder | None = None
        self._prompt_len = 0  # of the prompt that is being read
        self._pinned: int | None = None  # of sequence 0, where kv.pin is "prompt"
        pending = _native.pending_budget(made.kv, made.n_layer) if made.kv and made.active else nullcontext()
        _native.clear_error()
        try:
            with pending:
                super().__init__(
                    os.fspath(model_path),
                    n_ctx=made.n_ctx_total,
                    n_batch=made.width,
                    n_ubatch=made.n_ubatch,
                    flash_attn=bool(flash_attn),
                    type_k=made.type_k,
                    type_v=made.type_v,
                    seed=seed,
                    logits_all=False,
                    **stock,
                )
        except ValueError as error:
            if str(error) != "Failed to create llama_context":
                raise
            reason = _native.last_error()  # also without a budget: RKV_FORCE_BUDGET may have asked for one
            raise RKVError(reason or f"llama.cpp could not make a context for {model_path}") from None

        # llama_cpp sizes these by n_ctx, which may be large here, and takes seed 0 for no seed.
        self.n_batch = made.n_batch
        self.input_ids = np.zeros(made.n_ctx, np.intc)
        self.scores = np.empty((0, self._n_vocab), np.single)
        self._batch.close()
        self._batch = self._stack.enter_context(closing(new_batch(made.width)))
        self._seed = seed & 0xFFFFFFFF
        self._logits_all = logits_all
        self._n_outputs = 1  # of the last decode
        if stock.get("tokenizer") is None:
            self.tokenizer_ = PieceTokenizer(self)

    # -- the cache ---------------------------------------------------------------------------------

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and head sizes of the model."""
        return ModelShape.of(self)

    def kv_stats(self) -> KVStats:
        """Size of the cache and what was done to it."""
        raw = _native.stats(self.ctx)
        counts = {name: getattr(raw, name) for name in _COUNTS}
        if self.kv is None or not self._active:
            return KVStats("none", 0, 0, 0, 0, 0, **counts)
        kv = self.kv
        return KVStats(kv.policy, kv.budget, kv.buffer, kv.window, kv.n_recent, kv.pin, **counts)

    def kv_used(self, seq_id: int = 0) -> int:
        """Cells in use by a sequence in the widest layer. Raises IndexError on a bad sequence."""
        self._check_seq(seq_id)
        return _native.seq_used(self.ctx, seq_id) if self._active else self._pos_next(seq_id)

    def kv_kept(self, layer: int, head: int, seq_id: int = 0) -> npt.NDArray[np.int32]:
        """True positions that a layer and KV head holds: int32 [n], ascending.

        Raises:
            IndexError: there is no such layer, head or sequence.
        """
        self._check_seq(seq_id)
        shape = self.shape
        if not 0 <= layer < shape.n_layer:
            raise IndexError(f"layer is {layer}, must be from 0 to {shape.n_layer - 1}")
        if shape.n_head_kv[layer] == 0:
            raise IndexError(f"layer {layer} has no KV heads")
        if not 0 <= head < shape.n_head_kv[layer]:
            raise IndexError(f"head is {head}, must be from 0 to {shape.n_head_kv[layer] - 1}")
        if self._active:
            return _native.kept_positions(self.ctx, layer, head, seq_id)
        return np.arange(self._pos_next(seq_id), dtype=np.int32)

    def n_ctx(self) -> int:
        """The logical limit on positions of one sequence."""
        return self._n_ctx

    # -- decoding ----------------------------------------------------------------------------------

    def eval(self, tokens: Sequence[int]) -> None:
        """Decode tokens that follow the n_tokens before them, in chunks that the cache has room for.

        Where n_tokens was set back into the compacted part, all before it is read again.

        Raises:
            RKVError: beyond n_ctx, or the engine's reason; n_tokens says what was decoded.
        """
        again = self._settle()
        if self.n_tokens == 0 and not again:
            self._pinned = self.prompt_pin(max(len(tokens), self._prompt_len))
        if self.n_tokens == 0 and self._pinned is not None:
            _native.seq_pin(self.ctx, self._pinned)
        tokens = [*again, *tokens]
        end = self.n_tokens + len(tokens)
        if end > self._n_ctx:
            raise RKVError(f"the context is full: {end} tokens, n_ctx is {self._n_ctx}")
        recorder = self._recorder if self._recorder is not None and self._recorder.echo else None
        for start in range(0, len(tokens), self.n_batch):
            part = tokens[start : start + self.n_batch]
            past, n = self.n_tokens, len(part)
            every = (
                self._logits_all
                or self._draft is not None
                or (recorder is not None and past < len(recorder.prompt))
            )
            self.check_outputs(n if every else 1)
            self._batch.set_batch(batch=part, n_past=past, logits_all=every)
            decode(self.ctx, self._batch.batch)
            self._n_outputs = n if every else 1
            self.input_ids[past : past + n] = part
            if self._logits_all:
                self._grow_scores(past + n)
                self.scores[past : past + n] = self._last_logits()
            if recorder is not None and every:
                recorder.evaluated(past, self._last_logits())
            # Last, so that Ctrl-C before it leaves tokens that the next _settle removes.
            self.n_tokens = past + n
            self._requires_eval = False
            if self.on_decode is not None:
                self.on_decode(past)

    def prompt_pin(self, n_tokens: int) -> int | None:
        """Tokens to pin of a sequence that begins with a prompt of n_tokens; None: as the budget says."""
        if not self._active or self.kv is None:
            return None
        return self.kv.prompt_pin(n_tokens, self._options.n_layer or 1)

    def check_outputs(self, n: int) -> None:
        """Refuse a decode with more rows of logits than there is room for; llama.cpp would abort.

        Raises:
            RKVError: n is more than n_outputs.
        """
        most = self._options.forced.get("n_outputs_max")
        if most is not None and n > most:
            raise RKVError(f"{n} rows of logits in one decode, n_outputs is {most}")

    def _settle(self) -> list[int]:
        """Make the cache end at n_tokens. Tokens to read again where it can't be done exactly."""
        if self._ctx.memory is None:
            return []
        removed = self._ctx.kv_cache_seq_rm(0, self.n_tokens, -1)
        if not self._active or (removed and self._pos_next(0) == self.n_tokens):
            return []
        if not self._ctx.kv_cache_seq_rm(0, 0, -1):
            raise RKVError(_native.last_error() or "the cache could not be cleared")
        again: list[int] = self.input_ids[: self.n_tokens].tolist()
        self.n_tokens = 0
        return again

    def _pos_next(self, seq_id: int) -> int:
        return int(low.llama_memory_seq_pos_max(self._ctx.memory, seq_id)) + 1

    def _last_logits(self) -> npt.NDArray[np.single]:
        """The last decode's outputs: float32 [n_outputs, n_vocab], in llama.cpp's memory until the next."""
        return np.ctypeslib.as_array(low.llama_get_logits(self.ctx), shape=(self._n_outputs, self._n_vocab))

    def _grow_scores(self, rows: int) -> None:
        if rows > len(self.scores):
            grown = np.empty((min(max(rows, 2 * len(self.scores)), self._n_ctx), self._n_vocab), np.single)
            grown[: len(self.scores)] = self.scores
            self.scores = grown

    @property
    def _scores(self) -> npt.NDArray[np.single]:
        """With logits_all a row per token, else the last decode's."""
        if self._logits_all:
            return self.scores[: self.n_tokens]
        return self._last_logits() if self.n_tokens > 0 else self.scores

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Logits of each evaluated token with logits_all, else of the last."""
        return deque(self._scores.tolist(), maxlen=self._n_ctx if self._logits_all else 1)

    def forget(self) -> None:
        """Empty the cache of every sequence."""
        self._ctx.kv_cache_clear()
        self.reset()

    # -- sampling ----------------------------------------------------------------------------------

    def sample(self, *args: Any, **kwargs: Any) -> int:
        """A token from the last decode's logits; see llama_cpp.Llama.sample."""
        token: int = super().sample(*args, **kwargs)
        if self._recorder is not None:
            index = kwargs.get("idx")
            row = low.llama_get_logits_ith(self.ctx, -1 if index is None else index - self.n_tokens)
            self._recorder.sampled(token, np.ctypeslib.as_array(row, shape=(self._n_vocab,)))
        return token

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """Tokens that follow a prompt; see llama_cpp.Llama.generate.

        Raises:
            ValueError: an empty prompt. RKVError: beyond n_ctx, or the engine's reason.
        """
        tokens = list(tokens)
        if not tokens:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if self._recorder is not None:
            self._recorder.prompt = tokens
            if self._recorder.echo:
                self.reset()  # a cached prefix has no logits
        self._prompt_len = len(tokens)
        try:
            return (yield from super().generate(tokens, *args, **kwargs))
        finally:
            self._prompt_len = 0

    def _create_completion(self, prompt: str | list[int], *args: Any, **kwargs: Any) -> Iterator[Any]:
        k = kwargs.pop("logprobs", None)
        if k is None:
            yield from super()._create_completion(prompt, *args, **kwargs)
            return
        if isinstance(k, bool) or not isinstance(k, int) or k < 0:
            raise ValueError(f"logprobs is {k!r}, must be a number from 0, or None")
        recorder = self._recorder = Recorder(k, bool(kwargs.get("echo")), self.detokenize)
        try:
            for response in super()._create_completion(prompt, *args, **kwargs):
                if kwargs.get("stream"):
                    recorder.stream(response, prompt)
                else:
                    recorder.complete(response, prompt, self.token_bos())
                yield response
        finally:
            self._recorder = None

    # -- saving and restoring ----------------------------------------------------------------------

    def save_state(self) -> llama_cpp.LlamaState:
        """What every sequence holds, to continue from later. A compressed cache is saved as it is.

        Raises:
            RKVError: the engine's reason.
        """
        self.eval([])  # what an interrupted call left behind goes
        size = low.llama_state_get_size(self.ctx)
        buffer = (ctypes.c_uint8 * size)()
        if size == 0 or low.llama_state_get_data(self.ctx, buffer, size) != size:
            raise RKVError(_native.last_error() or "llama.cpp could not save the state")
        ids = np.zeros_like(self.input_ids)
        ids[: self.n_tokens] = self.input_ids[: self.n_tokens]
        return llama_cpp.LlamaState(
            input_ids=ids,
            scores=self._scores.copy(),
            n_tokens=self.n_tokens,
            llama_state=bytes(buffer),
            llama_state_size=size,
            seed=self._seed,
        )

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continue from a saved state: the same tokens follow.

        Raises:
            RKVError: the state is of another model, budget, policy or version, or damaged. What the context
                held stays, or the cache is empty; either way the next call is right.
        """
        n, data = int(state.n_tokens), bytes(state.llama_state)
        if not 0 <= n <= min(len(state.input_ids), self._n_ctx):
            raise RKVError(f"the state holds {n} tokens, this context takes {self._n_ctx}: raise n_ctx")
        before, self.n_tokens, self._requires_eval = self.n_tokens, 0, True  # Ctrl-C here: read all again
        done = low.llama_state_set_data(
            self.ctx, (ctypes.c_uint8 * len(data)).from_buffer_copy(data), len(data)
        )
        if done == 0:
            self.n_tokens = before
            raise RKVError(_native.last_error() or "llama.cpp could not restore the state")
        if done != len(data) or (self._ctx.memory is not None and self._pos_next(0) < n):
            self.forget()
            raise RKVError("the state is damaged: its parts do not belong together")
        self.input_ids[:n] = state.input_ids[:n]
        if self._logits_all:
            self._grow_scores(n)
            self.scores[:n] = state.scores[:n]
        self._seed = state.seed
        self.n_tokens = n

    # -- life --------------------------------------------------------------------------------------

    def _check_seq(self, seq_id: int) -> None:
        if not 0 <= seq_id < self.n_seq_max:
            raise IndexError(f"seq_id is {seq_id}, must be from 0 to {self.n_seq_max - 1}")

    def __getstate__(self) -> dict[str, Any]:
        forced = self._options.forced
        ours = {"kv": self.kv, "n_ctx": self._n_ctx, "n_seq_max": forced.get("n_seq_max")}
        if "flash_attn_type" in forced:
            ours["flash_attn"] = None
        if isinstance(self._draft, BoundedDraft):
            ours["draft_model"] = self._draft.draft
        return {**super().__getstate__(), **ours}

    def close(self) -> None:
        """Free the model and its cache; whatever needs them then raises RKVError."""
        stack = getattr(self, "_stack", None)
        if stack is not None:
            stack.close()
            self._sampler = None
            self._ctx = self._model = self._batch = self.tokenizer_ = _Closed()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
