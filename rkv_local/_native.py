"""ctypes mirror of native/rkv.h, with numpy arrays at its edges. Shapes are written as in that header."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ._structs import (
    RKV_VERSION,
    RkvLayer,
    RkvMemory,
    RkvParams,
    RkvSelectArgs,
    RkvStats,
    float_p,
    int_p,
    signatures,
)
from .budget import POLICIES, KVBudget
from .errors import RKVError

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rope:
    """RoPE of the keys. n_rot: rotated elements of a head; freq_factors: [n_rot/2] or None."""

    n_rot: int
    neox: bool = False
    n_ctx_orig: int = 0
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: npt.ArrayLike | None = None


@functools.cache
def _low() -> Any:
    """llama_cpp's ctypes module, loaded with our libraries."""
    from . import _lib

    _lib.prepare()
    import llama_cpp.llama_cpp as low

    return low


@functools.cache
def library() -> Any:
    """The loaded libllama with the rkv_* functions declared.

    Raises:
        RKVError: the library has no rkv_* functions, or those of another version.
    """
    low = _low()
    lib = low._lib
    if not hasattr(lib, "rkv_version"):
        raise RKVError(f"libllama was built without rkv, reinstall rkv-local: {lib._name}")
    if lib.rkv_version() != RKV_VERSION:
        raise RKVError(
            f"the library has rkv interface {lib.rkv_version()}, not {RKV_VERSION}: reinstall rkv-local"
        )
    for name, (argtypes, restype) in signatures(low).items():
        function = getattr(lib, name)
        function.argtypes, function.restype = argtypes, restype
    return lib


def version() -> int:
    """RKV_VERSION of the library."""
    return int(library().rkv_version())


def build_info() -> str:
    """ "llama-cpp-python <version>, llama.cpp <commit>"."""
    return str(library().rkv_build_info().decode())


def policy_name(policy: int) -> str | None:
    """The name of an enum rkv_policy, None if there is none."""
    name = library().rkv_policy_name(policy)
    return None if name is None else str(name.decode())


def last_error() -> str:
    """What went wrong in this thread's last rkv call or decode, one line, "" if nothing did."""
    return str(library().rkv_last_error().decode("utf-8", errors="replace"))


def clear_error() -> None:
    """Make last_error "": what it says later is of a later call."""
    library().rkv_params_check(ctypes.byref(default_params()))


def default_params() -> RkvParams:
    """The library's defaults; KVBudget's are the same."""
    params: RkvParams = library().rkv_default_params()
    return params


def params(kv: KVBudget, n_layer: int | None = None) -> RkvParams:
    """KVBudget as struct rkv_params. n_layer is needed by named schedules of layer budgets."""
    result = RkvParams(
        policy=list(POLICIES).index(kv.policy),
        budget=kv.budget,
        buffer=kv.buffer,
        window=kv.window,
        pin=kv.n_pin,
        pool=kv.pool,
        lambda_=kv.lam,
        threshold=kv.threshold,
        n_sim=kv.n_sim,
        memory=kv.memory,
        chunk=kv.chunk,
        recent=kv.n_recent,
        growth=kv.growth,
        value_share=kv.value_share,
        value_weight=kv.value_weight,
        seed=kv.seed,
        shared_heads=kv.shared_heads,
        reference=kv.reference,
        n_batch_seq=kv.n_batch,
    )
    budgets: Sequence[int] = ()
    if isinstance(kv.layer_budgets, tuple):
        budgets = kv.layer_budgets
    elif kv.layer_budgets not in (None, "uniform"):
        if n_layer is None:
            raise ValueError(f"n_layer is None, must be given for layer_budgets {kv.layer_budgets}")
        budgets = kv.budgets(n_layer)
    if budgets:
        result.layer_budgets = (ctypes.c_uint32 * len(budgets))(*budgets)  # ctypes keeps the array alive
        result.n_layer_budgets = len(budgets)
    return result


def params_check(value: RkvParams) -> None:
    """rkv_params_check. Raises ValueError with the library's line."""
    if not library().rkv_params_check(ctypes.byref(value)):
        raise ValueError(last_error())


@contextmanager
def pending_budget(kv: KVBudget, n_layer: int | None = None) -> Iterator[None]:
    """The llama_init_from_model that the block calls on this thread makes a context with this budget.

    Raises:
        RKVError: the context could not be made, with the library's reason, or the block made none.
    """
    lib = library()
    lib.rkv_begin_init(ctypes.byref(params(kv, n_layer)))
    try:
        yield
    except BaseException:
        lib.rkv_end_init()  # forget the budget, so that it does not go to another context
        raise
    if not lib.rkv_end_init():
        raise RKVError(last_error())


def init_context(model: Any, cparams: Any, kv: KVBudget) -> Any:
    """rkv_init_from_model: a llama_context pointer, to be freed with llama_cpp.llama_free.

    Raises:
        RKVError: parameters out of range, or a model whose cache cannot be compacted.
    """
    low = _low()
    n_layer = low.llama_model_n_layer(model)
    ctx = library().rkv_init_from_model(model, cparams, ctypes.byref(params(kv, n_layer)))
    if not ctx:
        raise RKVError(last_error() or "llama_init_from_model failed")
    return ctx


def max_sequences() -> int:
    """Most sequences of a context: RKV_MAX_SEQ of the build."""
    library()
    from llama_cpp import llama_cpp as low

    return int(low.llama_max_parallel_sequences())


def stats(ctx: Any) -> RkvStats:
    """rkv_get_stats."""
    result: RkvStats = library().rkv_get_stats(ctx)
    return result


@dataclass(frozen=True)
class Memory:
    """struct rkv_memory: bytes of a context in one type of buffer."""

    device: str
    buffer: str
    host: bool
    weights: int
    cache: int
    compute: int
    temporary: int


def memory(ctx: Any) -> list[Memory]:
    """rkv_get_memory: what a context takes, or would take if its model was loaded with no_alloc.

    Raises:
        RKVError: it cannot be measured.
    """
    room = (RkvMemory * 64)()
    n = library().rkv_get_memory(ctx, room, len(room))
    if n < 0:
        raise RKVError(last_error())
    return [
        Memory(m.device.decode(), m.buffer.decode(), m.host, m.weights, m.cache, m.compute, m.pass_)
        for m in room[:n]
    ]


def seq_used(ctx: Any, seq: int = 0) -> int:
    """Cells in use by a sequence in the widest layer. Raises IndexError on a bad sequence."""
    return _count(library().rkv_seq_used(ctx, seq))


def seq_room(ctx: Any, seq: int = 0) -> int:
    """Tokens that a sequence takes before its next compaction. Raises IndexError on a bad sequence."""
    return _count(library().rkv_seq_room(ctx, seq))


def seq_compact(ctx: Any, seq: int = 0) -> bool:
    """Compact now. False if there was nothing to evict."""
    return bool(library().rkv_seq_compact(ctx, seq))


def seq_pin(ctx: Any, n: int, seq: int = 0) -> None:
    """The first n tokens of a sequence are never evicted, until it is cleared.

    Raises:
        RKVError: no such sequence, n leaves no room, or some of them may be gone already.
    """
    if not library().rkv_seq_pin(ctx, seq, n):
        raise RKVError(last_error())


def set_scores(ctx: Any, layer: int, head: int, z: npt.ArrayLike, seq: int = 0) -> None:
    """Policy given: what each cell is worth to the next compaction. z: [at most the cells that are held].

    Raises:
        RKVError: another policy, no such layer, head or sequence, or too many scores.
    """
    rows = np.ascontiguousarray(z, np.float32)
    if rows.ndim != 1:
        raise ValueError(f"z has shape {rows.shape}, must be [cells]")
    if not library().rkv_seq_set_scores(ctx, seq, layer, head, _floats(rows), len(rows)):
        raise RKVError(last_error())


def kept_positions(ctx: Any, layer: int, head: int, seq: int = 0) -> Ints:
    """True positions held by a layer and KV head, in cell order: int32 [n].

    Raises:
        IndexError: there is no such layer, head or sequence (all functions below that take them).
    """
    get = library().rkv_get_positions
    n = _count(get(ctx, seq, layer, head, None, 0))
    out = np.empty(n, np.int32)
    _count(get(ctx, seq, layer, head, _ints(out), n))
    return out


def keys(ctx: Any, layer: int, head: int, seq: int = 0) -> Floats:
    """Keys as cached, after RoPE, dequantised: float32 [n, n_embd_head_k]."""
    return _rows(library().rkv_get_keys, (ctx, seq, layer, head), lambda s: (s.n_embd_head_k,))


def keys_unrotated(ctx: Any, layer: int, head: int, seq: int = 0) -> Floats:
    """Keys with RoPE, and the rotation of quantised caches, undone: float32 [n, n_embd_head_k]."""
    return _rows(library().rkv_get_keys_unrotated, (ctx, seq, layer, head), lambda s: (s.n_embd_head_k,))


def values(ctx: Any, layer: int, head: int, seq: int = 0) -> Floats:
    """Values: float32 [n, n_embd_head_v]."""
    return _rows(library().rkv_get_values, (ctx, seq, layer, head), lambda s: (s.n_embd_head_v,))


def scores(ctx: Any, layer: int, head: int, slot: int, seq: int = 0) -> Floats:
    """Stored float `slot` (0 to 4) of each cell: float32 [n]."""
    return _rows(library().rkv_get_scores, (ctx, seq, layer, head, slot), lambda s: ())


def queries(ctx: Any, layer: int, seq: int = 0) -> Floats:
    """The window's queries, oldest first: float32 [n, n_head, n_embd_head_k], n up to the window."""
    return _rows(library().rkv_get_queries, (ctx, seq, layer), lambda s: (s.n_head, s.n_embd_head_k))


def layer_of(ctx: Any, layer: int) -> RkvLayer:
    """Heads, sizes and budget of a layer. Raises IndexError where it has no cells under a budget."""
    out = RkvLayer()
    if not library().rkv_get_layer(ctx, layer, ctypes.byref(out)):
        raise IndexError(last_error())
    return out


def governed_layers(ctx: Any) -> dict[int, RkvLayer]:
    """The layers whose cells are under the context's budget, by number."""
    low = _low()
    found = {}
    for layer in range(low.llama_model_n_layer(low.llama_get_model(ctx))):
        out = RkvLayer()
        if library().rkv_get_layer(ctx, layer, ctypes.byref(out)) and out.budget > 0:
            found[layer] = out
    return found


def attn_scale(ctx: Any, layer: int) -> float:
    """The layer's attention scale. Raises IndexError on a bad layer."""
    scale = float(library().rkv_get_attn_scale(ctx, layer))
    if scale == 0.0:
        raise IndexError(last_error() or f"there is no layer {layer}")
    return scale


def select(
    kv: KVBudget,
    k: npt.ArrayLike,
    q: npt.ArrayLike,
    *,
    pos: npt.ArrayLike | None = None,
    v: npt.ArrayLike | None = None,
    aux: Floats | None = None,
    stats: Floats | None = None,
    n_old: int = 0,
    layer: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    n_threads: int = 1,
    type_k: int = 0,
    type_v: int = 0,
    rope: Rope | None = None,
) -> tuple[Ints, Floats]:
    """rkv_select: which rows one layer of one sequence keeps.

    Args:
        kv: policy and its parameters; layer_budgets are not used.
        k: [n, n_head_kv, d], q: [window, n_head, d].
        pos: [n, n_head_kv] true positions; default: the row number.
        v: [n, n_head_kv, d_v] (value-aware, lagkv, latest with a value_weight).
        aux: [kv.n_aux, n, n_head_kv] float32, C order, changed in place.
        stats: [n_head, kv.n_stats(d)] float32, C order, changed in place (triattention).
        n_old: cells [0, n_old) went through a compaction before.
        scale: attention scale, 1/sqrt(d) by default; softcap: 0 is none.
        type_k, type_v: the ggml type that keys and values are stored as.
        layer: whose sample is drawn (value-aware).

    Returns:
        idx int32 [n_head_kv, min(budget, n)], ascending; score float32 [n_head_kv, n].

    Raises:
        ValueError: arrays that do not fit together, or the library's reason.
    """
    k, q = np.ascontiguousarray(k, np.float32), np.ascontiguousarray(q, np.float32)
    args, keep = _select_args(k, pos, rope)
    n, n_head_kv, d = k.shape
    if q.ndim != 3 or q.shape[0] != kv.window or q.shape[2] != d or q.shape[1] % n_head_kv:
        raise ValueError(f"q has shape {q.shape}, must be [{kv.window}, a multiple of {n_head_kv}, {d}]")
    if aux is not None:
        args.aux = _stored("aux", aux, (kv.n_aux, n, n_head_kv))
    if stats is not None:
        args.stats = _stored("stats", stats, (q.shape[1], kv.n_stats(d)))
    if v is not None:
        v = np.ascontiguousarray(v, np.float32)
        if v.ndim != 3 or v.shape[:2] != (n, n_head_kv):
            raise ValueError(f"v has shape {v.shape}, must be [{n}, {n_head_kv}, n_embd_head_v]")
        args.v, args.n_embd_head_v, args.type_v = _floats(v), v.shape[2], type_v
    args.params, args.layer = params(kv.__class__(**{**kv.__dict__, "layer_budgets": None})), layer
    args.n_head, args.n_old, args.n_threads, args.type_k = q.shape[1], n_old, n_threads, type_k
    args.scale, args.softcap = d**-0.5 if scale is None else scale, softcap
    args.q = _floats(q)
    idx = np.empty((n_head_kv, min(kv.budget, n)), np.int32)
    score = np.empty((n_head_kv, n), np.float32)
    if library().rkv_select(ctypes.byref(args), _ints(idx), _floats(score)) != 0:
        raise ValueError(last_error())
    del keep
    return idx, score


def _stored(name: str, array: Floats, shape: tuple[int, ...]) -> Any:
    """A pointer to floats that the library changes in place."""
    if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
        raise ValueError(f"{name} must be a contiguous float32 array {list(shape)}")
    return _floats(array)


def unrotate(k: npt.ArrayLike, pos: npt.ArrayLike, rope: Rope) -> Floats:
    """rkv_unrotate on a copy: k [n, n_head_kv, d] after RoPE, pos [n, n_head_kv] → float32, as k."""
    out = np.array(k, np.float32, order="C")
    args, keep = _select_args(out, pos, rope)
    args.params = default_params()
    if library().rkv_unrotate(ctypes.byref(args), _floats(out)) != 0:
        raise ValueError(last_error())
    del keep
    return out


def _select_args(k: Floats, pos: npt.ArrayLike | None, rope: Rope | None) -> tuple[RkvSelectArgs, list[Any]]:
    """Sizes, keys, positions and RoPE; the list keeps the arrays alive that the struct points to."""
    if k.ndim != 3:
        raise ValueError(f"k has shape {k.shape}, must be [n, n_head_kv, n_embd_head]")
    n, n_head_kv, d = k.shape
    if pos is None:
        pos = np.repeat(np.arange(n, dtype=np.int32)[:, None], n_head_kv, axis=1)
    positions = np.ascontiguousarray(pos, np.int32)
    if positions.shape != (n, n_head_kv):
        raise ValueError(f"pos has shape {positions.shape}, must be [{n}, {n_head_kv}]")
    args = RkvSelectArgs(
        n=n, n_head_kv=n_head_kv, n_head=n_head_kv, n_embd_head=d, k=_floats(k), pos=_ints(positions)
    )
    keep: list[Any] = [k, positions]
    if rope is not None:
        for name in Rope.__dataclass_fields__:
            if name != "freq_factors":
                setattr(args, f"rope_{name}", getattr(rope, name))
        if rope.freq_factors is not None:
            factors = np.ascontiguousarray(rope.freq_factors, np.float32)
            if factors.shape != (rope.n_rot // 2,):
                raise ValueError(f"freq_factors has shape {factors.shape}, must be [{rope.n_rot // 2}]")
            args.rope_freq_factors = _floats(factors)
            keep.append(factors)
    return args, keep


def _rows(get: Any, where: tuple[Any, ...], row: Callable[[RkvLayer], tuple[int, ...]]) -> Floats:
    n = _count(get(*where, None, 0))
    out = np.empty((n, *row(layer_of(where[0], where[2]))), np.float32)
    _count(get(*where, _floats(out), n))
    return out


def _count(n: int) -> int:
    if n < 0:
        raise IndexError(last_error() or "there is no such layer, head or sequence")
    return int(n)


def _floats(array: Floats) -> Any:
    return array.ctypes.data_as(float_p)


def _ints(array: Ints) -> Any:
    return array.ctypes.data_as(int_p)
