"""What must hold in a context with a budget whatever the model's architecture, checked against numpy.

Nothing here knows an architecture. Every key and value is recorded when its token arrives; after compactions
the attention of a token, as the graph computed it, is compared with full attention over the recorded rows of
the positions that each layer and head says it keeps.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import reference as ref
from compaction import compact_and_check
from engine_tools import Context, Model, NativeError, Options, ggml_op_name, last_error

import llama_cpp  # isort: skip  (engine_tools says which library it loads)

SMALL = ref.Spec(budget=32, window=4, pin=2, pool=3)


class Tensor(ctypes.Structure):
    """The head of struct ggml_tensor (ggml.h)."""

    _fields_ = [
        ("type", c_int32),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int32),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
    ]


CALLBACK = ctypes.CFUNCTYPE(c_bool, POINTER(Tensor), c_bool, c_void_p)


class Watched(Context):
    """A context whose attention outputs are there after each decode: output[layer], [n_tokens, n_head, d_v].

    Without flash attention they are the tensors `kqv`, with it its nodes; their keys' names tell the layer.
    """

    def __init__(self, model: Model, options: Options) -> None:
        self.output: dict[int, NDArray[np.float32]] = {}
        self.watching = False
        self._callback = CALLBACK(self._see)
        super().__init__(model, options)

    def adjust(self, cparams: llama_cpp.llama_context_params) -> None:
        cparams.cb_eval = ctypes.cast(self._callback, type(cparams.cb_eval))

    def _see(self, tensor: Any, ask: bool, _: Any) -> bool:
        if not self.watching:
            return False
        t = tensor.contents
        flash = ggml_op_name(t.op) == b"FLASH_ATTN_EXT"
        if flash:
            keys = t  # back to the cache, through views and casts
            while keys.op != 0:
                keys = ctypes.cast(keys.view_src or keys.src[int(keys is t)], POINTER(Tensor)).contents
            layer = keys.name.decode().removeprefix("cache_k_l")
        else:  # a model may have none although it was asked for
            kind, _, layer = t.name.decode().partition("-")
            if kind != "kqv":
                return False
        if not layer.isdigit() or int(layer) in self.output:  # the first reader of a shared cache owns it
            return False
        if not ask:
            ne, nb = list(t.ne), list(t.nb)
            raw = np.ctypeslib.as_array((ctypes.c_char * (nb[3] * ne[3])).from_address(t.data))
            x = np.lib.stride_tricks.as_strided(raw.view(np.float32), ne[::-1], nb[::-1]).copy()
            # [streams, tokens, heads, d], or heads first
            self.output[int(layer)] = x[0] if flash else x[0].transpose(1, 0, 2)
        return True


@dataclass
class History:
    """Keys and values of a sequence as they were cached: [layer][position] -> [heads, d]."""

    keys: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)
    values: dict[int, list[NDArray[np.float32]]] = field(default_factory=dict)

    def check(self, context: Context, n_new: int, seq: int = 0) -> dict[int, NDArray[np.int32]]:
        """Record the n_new newest cells; all others must be what was recorded. Returns positions by layer."""
        n_past = context.pos_max(seq) + 1
        positions = {}
        for il, shape in context.layers.items():
            pos = positions[il] = context.all_positions(il, seq)
            rows = {"keys": self.keys.setdefault(il, []), "values": self.values.setdefault(il, [])}
            assert (np.diff(pos, axis=0) > 0).all(), f"layer {il}: positions are not ascending"
            np.testing.assert_array_equal(pos[-n_new:, 0], np.arange(n_past - n_new, n_past))
            assert pos.shape[0] <= shape.budget + max(context.options.buffer, context.options.batch)
            pin = min(context.options.spec.pin, pos.shape[0])
            np.testing.assert_array_equal(pos[:pin], np.arange(pin)[:, None].repeat(pos.shape[1], 1))
            for what, past in rows.items():
                now = context.per_head(what, il, seq)
                past.extend(now[-n_new:])
                heads = np.arange(shape.n_head_kv)
                np.testing.assert_array_equal(
                    now, np.stack(past)[pos, heads], f"layer {il}: {what} are not those of their positions"
                )
        return positions

    def attention(
        self, context: Context, il: int, q: NDArray[np.float32], pos: NDArray[np.int32], sinks: Any
    ) -> NDArray[np.float64]:
        """Full attention of one query [n_head, d_k] over the kept positions only: [n_head, d_v]."""
        shape = context.layers[il]
        group = q.shape[0] // shape.n_head_kv
        out = np.empty((q.shape[0], shape.n_embd_head_v))
        for h in range(shape.n_head_kv):
            k = np.stack(self.keys[il])[pos[:, h], h].astype(np.float64)
            v = np.stack(self.values[il])[pos[:, h], h].astype(np.float64)
            mine = slice(h * group, (h + 1) * group)
            logits = shape.scale * (q[mine].astype(np.float64) @ k.T)
            if shape.softcap > 0:
                logits = shape.softcap * np.tanh(logits / shape.softcap)
            if sinks is not None:
                logits = np.concatenate([logits, sinks[mine, None]], axis=1)
            out[mine] = ref.softmax(logits)[:, : k.shape[0]] @ v
        return out


def sinks_of(path: Path) -> dict[int, NDArray[np.float32]]:
    """Attention sinks of each layer, read from the file."""
    tensors = gguf.GGUFReader(path).tensors
    named = {t.name: np.asarray(t.data, np.float32) for t in tensors if t.name.endswith("attn_sinks.weight")}
    return {int(name.split(".")[1]): data for name, data in named.items()}


def check_attention(
    context: Watched, history: History, token: int, sinks: dict[int, NDArray[np.float32]], seq: int = 0
) -> None:
    """One more token: its attention in each layer is full attention restricted to the kept cells."""
    context.watching, context.output = True, {}
    context.feed([token], seq)
    context.watching = False
    positions = history.check(context, 1, seq)
    for il, shape in context.layers.items():
        # the newest query; heads of all readers of a KV head lie side by side
        q = context.queries(il, seq)[-1].reshape(shape.n_head_kv, shape.n_readers, -1, shape.n_embd_head_k)
        got = context.output[il]
        want = history.attention(
            context, il, q[:, 0].reshape(-1, shape.n_embd_head_k), positions[il], sinks.get(il)
        )
        options = context.options
        # the CPU multiplies quantised keys with 8-bit queries, f16 ones (flash attention's f32 too) with f16
        bound = 6e-2 if options.type_k.startswith(("q", "iq")) else 2e-2
        if not options.flash_attn and (options.type_k, options.type_v) == ("f32", "f32"):
            bound = 2e-4
        size = max(1e-6, float(np.abs(want).max()))
        worst = float(np.abs(got[-1] - want).max()) / size
        assert worst < bound, f"layer {il}: attention is {worst:.1e} off, relative to its largest value"


@dataclass
class Report:
    """What came out for one model."""

    kind: str = ""
    layers: int = 0  # with cells under the budget
    compactions: int = 0
    heads: int = 0  # kept sets compared with the reference
    near_ties: int = 0
    latest: str = "right"  # or why the policy is refused


def kind_of(model: Model, context: Context) -> str:
    """How the table calls this kind of memory."""
    low = llama_cpp.llama_cpp
    parts = ["hybrid"] if low.llama_model_is_hybrid(model.model) else []
    if low.llama_model_n_swa(model.model) > 0 and len(context.layers) < model.n_layer:
        parts.append("sliding window")
    if any(layer.v_in_k for layer in context.layers.values()):
        parts.append("MLA")
    if any(layer.n_readers > 1 for layer in context.layers.values()):
        parts.append("shared layers")
    return ", ".join(parts) or "attention"


def check_budget_not_reached(model: Model, tokens: Sequence[int], flash_attn: bool) -> None:
    """Logits bit-identical to stock."""
    common: dict[str, Any] = {
        "batch": 16,
        "n_ctx": 512,
        "flash_attn": flash_attn,
        "type_k": "f16",
        "type_v": "f16",
    }
    with Context(model, Options(**common)) as stock:
        expected = stock.feed(tokens)
    assert np.isfinite(expected).all(), "stock llama.cpp's logits are not finite"
    with Context(model, Options(dataclasses.replace(SMALL, budget=240), buffer=16, **common)) as context:
        np.testing.assert_array_equal(context.feed(tokens), expected)
        assert context.stats.compactions == 0


def check_compactions(
    model: Model, path: Path, tokens: Sequence[int], options: Options, report: Report
) -> None:
    """Many compactions: kept sets against the reference, rows against positions, attention against numpy."""
    sinks, history, tally = sinks_of(path), History(), ref.Tally()
    context = Watched(model, options)
    with context:
        held = [0] * len(context.layers)
        spec, n_fed = options.spec, 0
        for n in (40, 8, 8, 3, 8):
            for start in range(n_fed, n_fed + n, 8):
                part = tokens[start : min(start + 8, n_fed + n)]
                assert np.isfinite(context.feed(part)).all(), "logits are not finite"
                history.check(context, len(part))
            n_fed += n
            if context.used() > spec.budget and spec.policy == "rkv":
                held = compact_and_check(context, ref.Rope(), held, tally=tally, sinks=sinks, rotated=False)
        before = context.stats.compactions
        for token in tokens[n_fed : n_fed + 40]:  # those that the engine decides on itself
            check_attention(context, history, token, sinks)
        n_fed += 40
        assert context.pos_max() == n_fed - 1
        assert context.stats.compactions >= before + 4, "too few compactions"
        check_removal(context, tokens, n_fed)
        report.compactions += context.stats.compactions
        report.heads += tally.heads
        report.near_ties += tally.near_ties


def check_removal(context: Context, tokens: Sequence[int], n_past: int) -> None:
    """A removal from the compacted part is refused and changes nothing; all of it goes without a trace."""
    probe = list(tokens[:12])
    kept = {il: context.all_positions(il) for il in context.layers}
    for p0, p1 in ((5, -1), (3, n_past - 20)):
        assert not context.remove(0, p0, p1), f"removing [{p0}, {p1}) was not refused"
        assert last_error()
        assert context.pos_max() == n_past - 1
    for il, pos in kept.items():
        np.testing.assert_array_equal(context.all_positions(il), pos)
    context.feed(probe)
    assert context.remove(0, -1, -1)
    assert context.pos_max() == -1 and context.used() == 0
    first = context.feed(probe)
    llama_cpp.llama_memory_clear(context.memory, True)
    np.testing.assert_array_equal(context.feed(probe), first)


def check_unrotated(model: Model, token: int) -> None:
    """Keys with RoPE undone, of one token repeated: every position projects it to the same key."""
    options = Options(dataclasses.replace(SMALL, policy="latest", budget=240), batch=16, n_ctx=512)
    with Context(model, options) as context:
        context.feed([token] * 192)
        for il, shape in context.layers.items():
            raw, keys = context.per_head("keys", il), context.per_head("keys_unrotated", il)
            turned = slice(shape.rope_begin, shape.rope_begin + shape.n_rot)
            size = np.abs(raw).max()
            # only the rotated share; the rest may carry learned positions
            late = keys[96:, :, turned]
            if shape.n_rot == 0:
                np.testing.assert_array_equal(raw, keys)
                continue
            worst = float(np.abs(late - late[-1]).max() / size)
            assert worst < 5e-3, f"layer {il}: with RoPE undone, equal tokens' keys differ by {worst:.1e}"


def check_model(model: Model, path: Path) -> Report:
    """All of it on one model file.

    Raises:
        NativeError: the engine refuses the model, with its reason. AssertionError: something is not right.
    """
    report = Report()
    rng = np.random.default_rng(1)
    n_vocab = min(model.n_vocab, 128)
    tokens = [int(t) for t in rng.integers(1, n_vocab, 160)]
    options = Options(SMALL, buffer=8, batch=8, n_ctx=512)
    with Context(model, options) as context:
        report.kind, report.layers = kind_of(model, context), len(context.layers)
    for flash_attn in (False, True):
        check_budget_not_reached(model, tokens[:96], flash_attn)
    check_compactions(model, path, tokens, options, report)
    flash = dataclasses.replace(options, flash_attn=True, type_k="f16", type_v="f16")
    check_compactions(model, path, tokens, flash, report)
    latest = dataclasses.replace(
        options, spec=dataclasses.replace(SMALL, policy="latest", n_sim=2, value_weight=0.5)
    )
    try:
        Context(model, latest).close()
    except NativeError as error:
        report.latest = str(error)
        return report
    check_compactions(model, path, tokens, latest, report)
    check_unrotated(model, tokens[0])
    return report


def governed(context: Context, seq: int = 0) -> list[NDArray[Any]]:
    """Positions, queries and keys that a sequence holds in the layers which have a budget."""
    layers = [il for il in range(context.model.n_layer) if (at := context.layer(il)) and at.budget > 0]
    assert layers
    out: list[NDArray[Any]] = [np.array(context.used(seq))]
    for il in layers:
        out += [
            context.all_positions(il, seq),
            context.queries(il, seq),
            context.per_head("keys", il, seq),
        ]
    return out
