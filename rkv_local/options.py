"""What a Llama is made with, checked and completed before the native library sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .budget import KVBudget, pad_ctx
from .shape import CACHE_TYPES, cache_type, is_quantised, read_metadata

DEFAULT_N_CTX = 32768  # with a budget, where it costs no memory
_STOCK_N_CTX, _STOCK_N_BATCH = 512, 512  # llama_cpp's defaults
_STOCK_N_UBATCH = 512  # compute buffers grow with it
MAX_THREADS = 512  # GGML_MAX_N_THREADS
_AUTO = -1  # LLAMA_FLASH_ATTN_TYPE_AUTO
# llama_context_params of a context with a budget; llama.cpp's default is window caches of n_ctx cells
WITH_BUDGET: dict[str, Any] = {"swa_full": False}


@dataclass(frozen=True)
class Options:
    """Consistent sizes of a context.

    n_ctx: positions of one sequence; n_batch: tokens of one sequence per decode; width: tokens of all
    sequences per decode; forced: fields of llama_context_params that llama_cpp.Llama has no parameter for.
    """

    kv: KVBudget | None
    n_layer: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    type_k: int | None
    type_v: int | None
    forced: dict[str, Any]

    @property
    def active(self) -> bool:
        """Whether there is a budget."""
        return self.kv is not None and self.kv.active

    @property
    def width(self) -> int:
        """Tokens of one decode: a chunk of one sequence, or one token of each."""
        return max(self.n_batch, self.n_seq_max)

    @property
    def n_ctx_total(self) -> int:
        """llama_context_params.n_ctx: llama.cpp divides it among the sequences."""
        return pad_ctx(self.n_ctx) * self.n_seq_max


def resolve(
    path: str,
    *,
    kv: KVBudget | None,
    n_ctx: int | None,
    n_batch: int | None,
    n_ubatch: int | None,
    n_seq_max: int | None,
    flash_attn: bool | None,
    type_k: str | int | None,
    type_v: str | int | None,
    embedding: bool,
    n_outputs: int | None = None,
    swa_full: bool | None = None,
) -> Options:
    """Check what belongs together and fill in what was left out; parameters as in Llama.

    Raises:
        ValueError: one line with the parameter, its value and what is allowed.
    """
    if kv is not None and not isinstance(kv, KVBudget):
        raise ValueError(f"kv is {kv!r}, must be a KVBudget or None")
    if not Path(path).is_file():
        raise ValueError(f"the model file does not exist: {path}")
    metadata = read_metadata(path)
    active = kv is not None and kv.active
    if active and embedding:
        raise ValueError("embedding=True needs the whole text in the cache: pass kv=None")
    if flash_attn not in (True, False, None):
        raise ValueError(f"flash_attn is {flash_attn!r}, must be True, False or None (automatic)")

    if n_ctx is None:
        n_ctx = DEFAULT_N_CTX if active else _STOCK_N_CTX
    if n_ctx == 0:
        n_ctx = int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0)) or _STOCK_N_CTX
    _at_least("n_ctx", n_ctx, 1)
    from ._native import max_sequences

    n_seq = 1 if n_seq_max is None else _at_least("n_seq_max", n_seq_max, 1)
    if n_seq > max_sequences():
        raise ValueError(f"n_seq_max is {n_seq}, must be from 1 to {max_sequences()}")
    if pad_ctx(n_ctx) * n_seq >= 2**32:
        raise ValueError(f"n_ctx is {n_ctx} for {n_seq} sequences, must be below 2**32 in all")
    if n_batch is not None:
        _at_least("n_batch", n_batch, 1)

    n_layer = 0
    if kv is not None and kv.active:
        arch = metadata.get("general.architecture")
        n_layer = int(metadata.get(f"{arch}.block_count", 0))
        n_layer -= int(metadata.get(f"{arch}.nextn_predict_layers", 0))  # as llama_model_n_layer() counts
        kv = kv.for_model(path, n_layer)
        kv.budgets(n_layer)  # they must fit the model
        if n_batch is None:
            n_batch = kv.n_batch
        elif kv.batch is None:
            kv = replace(kv, batch=n_batch)
        elif n_batch > kv.batch:
            raise ValueError(f"n_batch is {n_batch}, must be at most the budget's batch, {kv.batch}")
    chunk = min(_STOCK_N_BATCH if n_batch is None else n_batch, n_ctx)
    forced: dict[str, Any] = dict(WITH_BUDGET) if active and swa_full is None else {}
    if n_seq_max is not None:
        forced |= {"n_seq_max": n_seq, "kv_unified": False}
    if flash_attn is None:
        forced["flash_attn_type"] = _AUTO
    if n_outputs is not None:
        forced["n_outputs_max"] = max(_at_least("n_outputs", n_outputs, 1), n_seq)
    number_k = None if type_k is None else cache_type(type_k, "type_k")
    number_v = None if type_v is None else cache_type(type_v, "type_v")
    if number_v is not None and is_quantised(number_v) and flash_attn is False:
        name = next(name for name, (number, _, _) in CACHE_TYPES.items() if number == number_v)
        raise ValueError(f"type_v is {name}, a quantised V needs flash_attn=True")
    width = max(chunk, n_seq)
    n_ubatch = min(width, _STOCK_N_UBATCH if n_ubatch is None else _at_least("n_ubatch", n_ubatch, 1))
    return Options(kv, n_layer, n_ctx, chunk, n_ubatch, n_seq, number_k, number_v, forced)


def check_threads(field: str, value: int | None) -> None:
    """Refuse a number of threads that ggml would not survive.

    Raises:
        ValueError: it is not from 1 to 512 (None: llama_cpp chooses).
    """
    if value is not None and _at_least(field, value, 1) > MAX_THREADS:
        raise ValueError(f"{field} is {value}, must be from 1 to {MAX_THREADS}")


def _at_least(field: str, value: int, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{field} is {value!r}, must be an integer of at least {low}")
    return value
