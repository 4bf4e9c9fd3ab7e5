"""The engine as the tests see it: native/rkv.h and llama.h by ctypes, without rkv_local's own wrappers.

A second transcription of the header on purpose; test_c_api.py checks that rkv_local._native agrees.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from ctypes import POINTER, byref, c_bool, c_float, c_int32, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import reference as ref
from rkv_local import _lib

_lib.prepare()
import llama_cpp  # noqa: E402  (prepare() says which library it loads)
from llama_cpp import _logger  # noqa: E402

_logger.set_verbose(False)  # errors only

# For SmolLM2; 1 is faster on a machine that is busy with other things.
THREADS = int(os.environ.get("RKV_TEST_THREADS", min(2, os.cpu_count() or 1)))

POLICY = {
    "none": 0,
    "rkv": 1,
    "snapkv": 2,
    "streaming": 3,
    "latest": 4,
    "h2o": 5,
    "gkv": 6,
    "rpc": 7,
    "chunkkv": 8,
}
POLICY |= {"value-aware": 9, "keydiff": 10, "lagkv": 11, "triattention": 12, "given": 13}
GGML_TYPE = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}


class RkvParams(ctypes.Structure):
    _fields_ = [
        ("policy", c_int32),
        ("budget", c_uint32),
        ("buffer", c_uint32),
        ("window", c_uint32),
        ("pin", c_uint32),
        ("pool", c_uint32),
        ("lambda_", c_float),
        ("threshold", c_float),
        ("n_sim", c_uint32),
        ("memory", c_float),
        ("chunk", c_uint32),
        ("recent", c_uint32),
        ("growth", c_uint32),
        ("value_share", c_float),
        ("value_weight", c_float),
        ("seed", c_uint32),
        ("shared_heads", c_bool),
        ("reference", c_bool),
        ("n_batch_seq", c_uint32),
        ("layer_budgets", POINTER(c_uint32)),
        ("n_layer_budgets", c_uint32),
    ]


class RkvStats(ctypes.Structure):
    _fields_ = [
        ("active", c_bool),
        ("cells", c_uint32),
        ("bytes", c_uint64),
        ("bytes_kv", c_uint64),
        ("compactions", c_uint64),
        ("t_compaction_us", c_uint64),
        ("tokens_evicted", c_uint64),
    ]


class RkvLayer(ctypes.Structure):
    _fields_ = [
        *[(x, c_int32) for x in ("n_head", "n_readers", "n_head_kv", "n_embd_head_k", "n_embd_head_v")],
        ("n_rot", c_int32),
        ("rope_begin", c_int32),
        ("budget", c_uint32),
        ("scale", c_float),
        ("softcap", c_float),
        ("has_sinks", c_bool),
        ("v_in_k", c_bool),
        ("unrotatable", c_bool),
    ]


class RkvSelectArgs(ctypes.Structure):
    _fields_ = [
        ("params", RkvParams),
        *[(x, c_int32) for x in ("layer", "n", "n_head_kv", "n_head", "n_embd_head", "n_old", "n_threads")],
        ("type_k", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("k", c_void_p),
        ("q", c_void_p),
        ("pos", c_void_p),
        ("v", c_void_p),
        ("n_embd_head_v", c_int32),
        ("type_v", c_int32),
        ("aux", c_void_p),
        ("stats", c_void_p),
        *[(x, c_int32) for x in ("rope_n_rot", "rope_neox", "rope_n_ctx_orig")],
        *[(f"rope_{x}", c_float) for x in ("freq_base", "freq_scale", "ext_factor", "attn_factor")],
        ("rope_beta_fast", c_float),
        ("rope_beta_slow", c_float),
        ("rope_freq_factors", c_void_p),
    ]


class NativeError(RuntimeError):
    """An rkv_* call failed; the text is rkv_last_error()."""


_library = ctypes.CDLL(llama_cpp.llama_cpp._lib._name)  # a handle of our own: argtypes belong to a handle


def _function(name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
    function = getattr(_library, name)
    function.restype, function.argtypes = restype, list(argtypes)
    return function


_row = (c_void_p, c_int32, c_int32, c_int32, c_void_p, c_size_t)  # ctx, seq, layer, head, dst, n_max
rkv_default_params = _function("rkv_default_params", RkvParams)
rkv_params_check = _function("rkv_params_check", c_bool, POINTER(RkvParams))
rkv_begin_init = _function("rkv_begin_init", None, POINTER(RkvParams))
rkv_end_init = _function("rkv_end_init", c_bool)
rkv_last_error = _function("rkv_last_error", ctypes.c_char_p)
rkv_init_from_model = _function(
    "rkv_init_from_model", c_void_p, c_void_p, llama_cpp.llama_context_params, POINTER(RkvParams)
)
rkv_get_stats = _function("rkv_get_stats", RkvStats, c_void_p)
rkv_seq_used = _function("rkv_seq_used", c_int32, c_void_p, c_int32)
rkv_seq_compact = _function("rkv_seq_compact", c_bool, c_void_p, c_int32)
rkv_seq_pin = _function("rkv_seq_pin", c_bool, c_void_p, c_int32, c_uint32)
rkv_seq_set_scores = _function("rkv_seq_set_scores", c_bool, *_row)
rkv_get_positions = _function("rkv_get_positions", c_int32, *_row)
rkv_get_keys = _function("rkv_get_keys", c_int32, *_row)
rkv_get_keys_unrotated = _function("rkv_get_keys_unrotated", c_int32, *_row)
rkv_get_values = _function("rkv_get_values", c_int32, *_row)
rkv_get_scores = _function("rkv_get_scores", c_int32, *_row[:4], c_int32, *_row[4:])
rkv_get_queries = _function("rkv_get_queries", c_int32, c_void_p, c_int32, c_int32, c_void_p, c_size_t)
rkv_get_attn_scale = _function("rkv_get_attn_scale", c_float, c_void_p, c_int32)
rkv_get_layer = _function("rkv_get_layer", c_bool, c_void_p, c_int32, POINTER(RkvLayer))
rkv_select = _function("rkv_select", c_int32, POINTER(RkvSelectArgs), c_void_p, c_void_p)
rkv_unrotate = _function("rkv_unrotate", c_int32, POINTER(RkvSelectArgs), c_void_p)


ggml_op_name = _function("ggml_op_name", ctypes.c_char_p, c_int32)


def last_error() -> str:
    return str(rkv_last_error().decode())


def params(
    spec: ref.Spec,
    buffer: int = 16,
    batch: int = 0,
    layer_budgets: Sequence[int] = (),
    growth: int = 1,
    shared_heads: bool = False,
) -> RkvParams:
    out: RkvParams = rkv_default_params()
    out.policy, out.budget, out.buffer = POLICY[spec.policy], spec.budget, buffer
    out.window, out.pin, out.pool, out.n_sim = spec.window, spec.pin, spec.pool, spec.n_sim
    out.lambda_, out.threshold, out.reference = spec.lam, spec.threshold, spec.reference
    out.growth, out.shared_heads = growth, shared_heads
    out.recent = max(spec.recent, spec.window)
    out.value_weight = spec.value_weight
    out.memory, out.chunk, out.value_share, out.seed = spec.memory, spec.chunk, spec.value_share, spec.seed
    out.n_batch_seq = batch
    if layer_budgets:
        out.layer_budgets = (c_uint32 * len(layer_budgets))(*layer_budgets)
        out.n_layer_budgets = len(layer_budgets)
    return out


def dequantised(k: NDArray[np.float32], type_k: str) -> NDArray[np.float32]:
    """k [n, n_head_kv, d] as a cache of this type would give it back."""
    if type_k == "f32":
        return k
    kind = gguf.GGMLQuantizationType[type_k.upper()]
    rows = k.reshape(-1, k.shape[-1])
    return np.asarray(gguf.dequantize(gguf.quantize(rows, kind), kind), np.float32).reshape(k.shape)


# --- the selection by itself ----------------------------------------------------------------------


@dataclass(frozen=True)
class NativeSelection:
    kept: NDArray[np.int32]  # [n_head_kv, min(budget, n)]
    score: NDArray[np.float32]  # [n_head_kv, n]
    aux: NDArray[np.float32]
    stats: NDArray[np.float32]


def _address(x: NDArray[Any] | None) -> int | None:
    return None if x is None else x.ctypes.data


def select_args(spec: ref.Spec, k: NDArray[np.float32], rope: ref.Rope) -> tuple[RkvSelectArgs, list[Any]]:
    """rkv_select_args without q, pos and aux, and what must stay alive beside it."""
    n, n_head_kv, d = k.shape
    args = RkvSelectArgs(params=params(spec), n=n, n_head_kv=n_head_kv, n_head=n_head_kv, n_embd_head=d)
    args.n_threads, args.scale, args.softcap, args.k = 1, spec.scale, spec.softcap, _address(k)
    args.rope_n_rot, args.rope_neox, args.rope_n_ctx_orig = rope.n_rot, rope.neox, rope.n_ctx_orig
    for name in ("freq_base", "freq_scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow"):
        setattr(args, f"rope_{name}", getattr(rope, name))
    args.rope_freq_factors = _address(rope.freq_factors)
    return args, [k, rope]


def native_select(
    k: NDArray[np.float32],
    q: NDArray[np.float32],
    spec: ref.Spec,
    pos: NDArray[np.int32] | None = None,
    aux: NDArray[np.floating] | None = None,
    n_old: int = 0,
    n_threads: int = 1,
    type_k: str | int = "f32",
    missing: str = "",
    v: NDArray[np.float32] | None = None,
    stats: NDArray[np.floating] | None = None,
    type_v: str = "f32",
    **overrides: int,
) -> NativeSelection:
    """rkv_select. `missing` passes NULL for one array, `overrides` sets raw fields (bad arguments)."""
    n, n_head_kv, _ = k.shape
    k, q = np.ascontiguousarray(k, np.float32), np.ascontiguousarray(q, np.float32)
    args, alive = select_args(spec, k, spec.rope)
    if aux is None:
        aux = ref.empty_aux(spec.n_aux, n, n_head_kv)
    stats = np.zeros((q.shape[1], spec.n_stats(k.shape[2]))) if stats is None else stats
    stats = np.array(stats, np.float32, order="C")
    v = None if v is None else np.ascontiguousarray(v, np.float32)
    aux = np.array(aux, np.float32, order="C")
    pos = None if pos is None else np.ascontiguousarray(pos, np.int32)
    args.n_head, args.n_old, args.n_threads = q.shape[1], n_old, n_threads
    args.type_k = type_k if isinstance(type_k, int) else GGML_TYPE[type_k]
    args.q, args.pos, args.aux = _address(q), _address(pos), _address(aux)
    args.v, args.stats, args.layer = _address(v), _address(stats), spec.layer
    args.n_embd_head_v, args.type_v = 0 if v is None else v.shape[2], GGML_TYPE[type_v]
    for name, value in overrides.items():
        setattr(args, name, value)
    if missing and missing != "idx":
        setattr(args, missing, None)
    idx = np.full((n_head_kv, min(spec.budget, n)), -1, np.int32)
    score = np.full((n_head_kv, n), np.nan, np.float32)
    status = rkv_select(byref(args), None if missing == "idx" else _address(idx), _address(score))
    del alive
    if status != 0:
        raise NativeError(last_error())
    return NativeSelection(idx, score, aux, stats)


def native_unrotate(k: NDArray[np.float32], pos: NDArray[np.int32], rope: ref.Rope) -> NDArray[np.float32]:
    out, pos = np.array(k, np.float32, order="C"), np.ascontiguousarray(pos, np.int32)
    args, alive = select_args(ref.Spec(), out, rope)
    args.pos = _address(pos)
    status = rkv_unrotate(byref(args), _address(out))
    del alive
    if status != 0:
        raise NativeError(last_error())
    return out


# --- a context ------------------------------------------------------------------------------------


class Model:
    """A llama_model on the CPU."""

    def __init__(self, path: Path) -> None:
        mparams = llama_cpp.llama_model_default_params()
        mparams.n_gpu_layers = 0
        self.adjust(mparams)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), mparams)
        if not self.model:
            raise NativeError(f"{path} did not load")
        self.n_layer = llama_cpp.llama_model_n_layer(self.model)
        self.n_head = llama_cpp.llama_model_n_head(self.model)
        self.n_head_kv = llama_cpp.llama_model_n_head_kv(self.model)
        self.d_head = llama_cpp.llama_model_n_embd(self.model) // max(1, self.n_head)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def adjust(self, mparams: llama_cpp.llama_model_params) -> None:
        """Where the layers go; for subclasses."""

    def tokenize(self, text: str) -> list[int]:
        raw, vocab = text.encode(), llama_cpp.llama_model_get_vocab(self.model)
        out = (ctypes.c_int32 * (len(raw) + 2))()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), out, len(out), True, False)
        return [int(t) for t in out[:n]]

    def close(self) -> None:
        if self.model:
            llama_cpp.llama_model_free(self.model)
            self.model = None


@dataclass
class Options:
    """What a context is made with. n_ctx is per sequence; batch is per sequence and decode."""

    spec: ref.Spec = field(default_factory=lambda: ref.Spec(policy="none"))
    buffer: int = 16
    batch: int = 16
    layer_budgets: Sequence[int] = ()
    n_ctx: int = 4096
    n_seq: int = 1
    flash_attn: bool = False
    type_k: str = "f32"
    type_v: str = "f32"
    n_threads: int = 1  # enough for the tiny models, and faster
    swa_full: bool = False
    growth: int = 1
    shared_heads: bool = False


class Context:
    """A llama_context, decoded through llama.h. Policy none: llama_init_from_model, untouched."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        c = llama_cpp.llama_context_default_params()
        c.n_ctx = options.n_ctx * options.n_seq
        c.n_batch = c.n_ubatch = options.batch * options.n_seq
        c.n_seq_max, c.kv_unified = options.n_seq, False
        c.n_threads = c.n_threads_batch = options.n_threads
        c.flash_attn_type = int(options.flash_attn)
        c.type_k, c.type_v = GGML_TYPE[options.type_k], GGML_TYPE[options.type_v]
        c.no_perf = False
        c.swa_full = options.swa_full
        self.adjust(c)
        if options.spec.policy == "none":
            self.ctx = llama_cpp.llama_init_from_model(model.model, c)
        else:
            shared = options.shared_heads
            p = params(
                options.spec, options.buffer, options.batch, options.layer_budgets, options.growth, shared
            )
            self.ctx = rkv_init_from_model(model.model, c, byref(p))
        if not self.ctx:
            raise NativeError(last_error())
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        found = [self.layer(il) for il in range(model.n_layer)]
        self.layers = {
            il: layer for il, layer in enumerate(found) if layer
        }  # those with cells under the budget

    def adjust(self, cparams: llama_cpp.llama_context_params) -> None:
        """What else the context is made with; for subclasses."""

    def layer(self, il: int) -> RkvLayer | None:
        out = RkvLayer()
        return out if rkv_get_layer(self.ctx, il, byref(out)) else None

    def close(self) -> None:
        if self.ctx:
            llama_cpp.llama_free(self.ctx)
            self.ctx = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def try_decode(self, tokens: Sequence[tuple[int, int, int]], last_only: bool = False) -> int:
        """llama_decode's status for (token, position, sequence) rows; logits of every row, or of the last."""
        n = len(tokens)
        batch = llama_cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, (token, pos, seq) in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.logits[i] = token, pos, not last_only or i == n - 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, seq
            return int(llama_cpp.llama_decode(self.ctx, batch))
        finally:
            llama_cpp.llama_batch_free(batch)

    def decode(self, tokens: Sequence[tuple[int, int, int]], last_only: bool = False) -> NDArray[np.float32]:
        """Logits [n_tokens, n_vocab], or [1, n_vocab] of the last."""
        status = self.try_decode(tokens, last_only)
        if status != 0:
            raise NativeError(f"llama_decode returned {status}: {last_error()}")
        row = llama_cpp.llama_get_logits(self.ctx)
        n = 1 if last_only else len(tokens)
        return np.ctypeslib.as_array(row, shape=(n, self.model.n_vocab)).copy()

    def feed(
        self, tokens: Sequence[int], seq: int = 0, chunk: int | None = None, last_only: bool = False
    ) -> NDArray[np.float32]:
        """Append tokens to a sequence in chunks; logits [n_tokens, n_vocab], or of each chunk's last."""
        chunk, start = chunk or self.options.batch, self.pos_max(seq) + 1
        rows = [(int(t), start + i, seq) for i, t in enumerate(tokens)]
        parts = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
        return np.concatenate([self.decode(part, last_only) for part in parts])

    # memory
    def pos_max(self, seq: int = 0) -> int:
        return int(llama_cpp.llama_memory_seq_pos_max(self.memory, seq))

    def pos_min(self, seq: int = 0) -> int:
        return int(llama_cpp.llama_memory_seq_pos_min(self.memory, seq))

    def remove(self, seq: int, p0: int, p1: int) -> bool:
        return bool(llama_cpp.llama_memory_seq_rm(self.memory, seq, p0, p1))

    # rkv
    @property
    def stats(self) -> RkvStats:
        out: RkvStats = rkv_get_stats(self.ctx)
        return out

    def used(self, seq: int = 0) -> int:
        return int(rkv_seq_used(self.ctx, seq))

    def compact(self, seq: int = 0) -> bool:
        return bool(rkv_seq_compact(self.ctx, seq))

    def pin(self, n: int, seq: int = 0) -> bool:
        return bool(rkv_seq_pin(self.ctx, seq, n))

    def give(self, layer: int, head: int, z: NDArray[np.floating], seq: int = 0) -> bool:
        z = np.ascontiguousarray(z, np.float32)
        return bool(rkv_seq_set_scores(self.ctx, seq, layer, head, z.ctypes.data, len(z)))

    def _read(
        self, function: Callable[..., int], *where: int, width: tuple[int, ...], dtype: type
    ) -> NDArray[Any]:
        n = function(self.ctx, *where, None, 0)
        if n < 0:
            raise NativeError(last_error())
        out: NDArray[Any] = np.zeros((n, *width), dtype)
        assert function(self.ctx, *where, out.ctypes.data, n) == n
        return out

    def positions(self, layer: int, head: int, seq: int = 0) -> NDArray[np.int32]:
        return self._read(rkv_get_positions, seq, layer, head, width=(), dtype=np.int32)

    def per_head(self, what: str, layer: int, seq: int = 0) -> NDArray[np.float32]:
        """[n, n_head_kv, d] of one layer: what is keys, keys_unrotated or values."""
        function = {"keys": rkv_get_keys, "keys_unrotated": rkv_get_keys_unrotated, "values": rkv_get_values}[
            what
        ]
        shape = self.layers[layer]
        heads = range(shape.n_head_kv)
        width = (shape.n_embd_head_v if what == "values" else shape.n_embd_head_k,)
        return np.stack(
            [self._read(function, seq, layer, h, width=width, dtype=np.float32) for h in heads], 1
        )

    def all_positions(self, layer: int, seq: int = 0) -> NDArray[np.int32]:
        """[n, n_head_kv]"""
        return np.stack([self.positions(layer, h, seq) for h in range(self.layers[layer].n_head_kv)], 1)

    def stored(self, layer: int, n_sim: int, seq: int = 0) -> NDArray[np.float32]:
        """[n_sim, n, n_head_kv]: the first n_sim floats that are stored with each cell"""
        heads, slots = range(self.layers[layer].n_head_kv), range(n_sim)
        rows = [
            [self._read(rkv_get_scores, seq, layer, h, s, width=(), dtype=np.float32) for h in heads]
            for s in slots
        ]
        return np.array(rows, np.float32).transpose(0, 2, 1)

    def queries(self, layer: int, seq: int = 0) -> NDArray[np.float32]:
        """[window, n_head, d]"""
        shape = self.layers[layer]
        return self._read(
            rkv_get_queries, seq, layer, width=(shape.n_head, shape.n_embd_head_k), dtype=np.float32
        )

    def attn_scale(self, layer: int) -> float:
        return float(rkv_get_attn_scale(self.ctx, layer))

    def n_reused(self) -> int:
        return int(llama_cpp.llama_perf_context(self.ctx).n_reused)
