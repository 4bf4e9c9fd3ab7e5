"""What a model and a context of it would take, measured by llama.cpp without reading the weights."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from . import _native
from .budget import KVBudget
from .devices import resident
from .errors import RKVError
from .options import Options, resolve
from .shape import ModelShape

_ALL_LAYERS = 0x7FFFFFFF  # as llama_cpp.Llama writes n_gpu_layers=-1
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_FLASH_ATTN = {True: 1, False: 0, None: -1}  # enum llama_flash_attn_type
MAIN = "CPU"  # main memory among the places


@dataclass(frozen=True)
class Setting:
    """Llama's parameters that decide how much memory it takes; their meaning is as there."""

    kv: KVBudget | None = KVBudget()  # noqa: RUF009 (frozen)
    n_ctx: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_seq_max: int | None = None
    n_outputs: int | None = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool | None = False
    n_gpu_layers: int = -1
    offload_kqv: bool = True
    use_mmap: bool = True
    swa_full: bool | None = None
    n_threads: int | None = None
    n_threads_batch: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for Llama."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True)
class Part:
    """Bytes at one place: weights, the cache with all that a budget adds, temporary memory."""

    weights: int = 0
    kv: int = 0
    compute: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv + self.compute

    def __add__(self, other: Part) -> Part:
        return Part(self.weights + other.weights, self.kv + other.kv, self.compute + other.compute)


@dataclass(frozen=True)
class Measured:
    """What a Setting takes. parts: by device name, MAIN for main memory; cells: per sequence, widest layer.

    rings: bytes of query rings, positions and stored floats, which are in kv; copies: bytes of weights that
    are repacked in main memory, and there a second time while the file is mapped; resident: of this process
    while the measured context was there; layers: that have those cells, 0 if that is not known; others: what
    else the cache is made of, "windows" and "states".
    """

    parts: dict[str, Part]
    cells: int
    rings: int
    copies: int
    resident: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq: int
    kv: KVBudget | None
    layers: int = 0
    others: tuple[str, ...] = ()


class Probe:
    """Loads of one model file without its weights. A load reads the vocabulary; a context takes milliseconds.

    Raises:
        ValueError: no such file, or no GGUF.
    """

    def __init__(self, model_path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(model_path)
        self._low = _native._low()
        self._low.llama_backend_init()
        self._model: Any = None
        self._layers: int | None = None
        self._known: dict[Setting, Measured] = {}

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model."""
        if self._model:
            self._low.llama_model_free(self._model)
        self._model, self._layers = None, None

    def measure(self, setting: Setting) -> Measured:
        """What a Llama with this setting would take.

        Raises:
            ValueError: parameters that do not fit together. RKVError: a model that cannot be loaded, or
            cannot have this context, with llama.cpp's reason.
        """
        if setting not in self._known:
            self._known[setting] = self._measure(setting)
        return self._known[setting]

    def _measure(self, setting: Setting) -> Measured:
        made = resolve(
            self.path,
            kv=setting.kv,
            n_ctx=setting.n_ctx,
            n_batch=setting.n_batch,
            n_ubatch=setting.n_ubatch,
            n_seq_max=setting.n_seq_max,
            flash_attn=setting.flash_attn,
            type_k=setting.type_k,
            type_v=setting.type_v,
            embedding=False,
            n_outputs=setting.n_outputs,
            swa_full=setting.swa_full,
        )
        with _quiet(self._low) as errors:
            self._load(setting.n_gpu_layers, errors)
            # as llama_cpp.Llama.__init__ fills them
            params = self._low.llama_context_default_params()
            params.n_ctx = made.n_ctx_total
            params.n_batch = min(made.n_ctx_total, made.width)
            params.n_ubatch = min(params.n_batch, made.n_ubatch)
            params.n_threads = setting.n_threads or max(multiprocessing.cpu_count() // 2, 1)
            params.n_threads_batch = setting.n_threads_batch or multiprocessing.cpu_count()
            params.offload_kqv = setting.offload_kqv
            params.flash_attn_type = _FLASH_ATTN[setting.flash_attn]
            params.type_k, params.type_v = made.type_k, made.type_v
            if setting.swa_full is not None:
                params.swa_full = setting.swa_full
            for name, value in made.forced.items():
                setattr(params, name, value)
            _native.clear_error()
            if made.kv is not None and made.active:
                ctx = _native.init_context(self._model, params, made.kv)
            else:
                ctx = self._low.llama_init_from_model(self._model, params)
            if not ctx:
                otherwise = f"llama.cpp could not make a context for {self.path}"
                raise RKVError(_native.last_error() or _reason(errors, otherwise))
            try:
                memory, stats, base = _native.memory(ctx), _native.stats(ctx), resident()
                layers, rings, others = self._geometry(
                    ctx, setting, made, bool(params.swa_full), sum(m.cache for m in memory)
                )
            finally:
                self._low.llama_free(ctx)
        parts: dict[str, Part] = {}
        copies = 0
        for m in memory:
            place = MAIN if m.host else m.device
            if m.host and m.device == MAIN and m.buffer != MAIN:
                copies += m.weights
            parts[place] = parts.get(place, Part()) + Part(m.weights, m.cache, m.compute + m.temporary)
        if setting.use_mmap:
            parts[MAIN] = parts.get(MAIN, Part()) + Part(weights=copies)
        return Measured(
            parts=parts,
            cells=int(stats.cells),
            rings=rings,
            copies=copies,
            resident=base,
            n_ctx=made.n_ctx,
            n_batch=made.n_batch,
            n_ubatch=made.n_ubatch,
            n_seq=made.n_seq_max,
            kv=made.kv if made.active else None,
            layers=layers,
            others=others,
        )

    def _geometry(
        self, ctx: Any, setting: Setting, made: Options, swa_full: bool, cache: int
    ) -> tuple[int, int, tuple[str, ...]]:
        """Measured's layers, rings and others."""
        low, model = self._low, self._model
        windowed = low.llama_model_n_swa(model) > 0 and not swa_full
        recurrent = low.llama_model_is_hybrid(model) or low.llama_model_is_recurrent(model)
        states = ("states",) if recurrent else ()
        shape = ModelShape.of(self.path)
        attention = sum(heads > 0 for heads in shape.n_head_kv)
        if made.kv is None or not made.active:
            full = KVBudget(policy="none").bytes_for(
                shape, made.n_seq_max, setting.type_k, setting.type_v, made.n_ctx
            )
            others = (*(["windows"] if windowed else []), *states)
            # else some layers have no cells of their own: llama.cpp does not say how many
            return attention if full in (cache, _native.stats(ctx).bytes_kv) else 0, 0, others
        governed = _native.governed_layers(ctx)
        rings = sum(
            made.kv.added_bytes(at.budget + made.kv.headroom, at.n_head, at.n_head_kv, at.n_embd_head_k)
            for at in governed.values()
        )
        windows = ("windows",) if windowed and len(governed) < attention else ()
        return len(governed), rings * made.n_seq_max, (*windows, *states)

    def _load(self, n_gpu_layers: int, errors: list[str]) -> None:
        if self._model and self._layers == n_gpu_layers:
            return
        self.close()
        params = self._low.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if n_gpu_layers < 0 else n_gpu_layers
        params.no_alloc, params.load_mode = True, self._low.LLAMA_LOAD_MODE_NONE
        self._model = self._low.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise RKVError(_reason(errors, f"llama.cpp could not load {self.path}"))
        self._layers = n_gpu_layers


def _reason(errors: list[str], otherwise: str) -> str:
    """llama.cpp's first error line without the names of its functions."""
    for text in errors:
        cleaned = " ".join(text.split()).split("error loading model: ")[-1]
        if cleaned:
            return cleaned
    return otherwise


@contextlib.contextmanager
def _quiet(low: Any) -> Iterator[list[str]]:
    """llama.cpp's log is not shown meanwhile; its error lines are gathered."""
    errors: list[str] = []

    def note(level: int, text: bytes, _: Any) -> None:
        if level == _ERROR:
            errors.append(text.decode("utf-8", errors="replace"))

    callback = low.llama_log_callback(note)
    before, data = low.llama_log_callback(), ctypes.c_void_p()
    low.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    low.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield errors
    finally:
        low.llama_log_set(before, data)
