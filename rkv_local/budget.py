"""How large the cache is and what is kept in it: parameters and their memory arithmetic."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

from .shape import ModelShape, row_bytes

if TYPE_CHECKING:
    from os import PathLike

    from llama_cpp import Llama as StockLlama

# Names as in enum rkv_policy of native/rkv.h, in its order.
POLICIES: dict[str, str] = {
    "none": "stock llama.cpp: the cache has n_ctx cells and nothing is evicted",
    "rkv": "important and not redundant: Z = lam*I - (1 - lam)*R (R-KV, arXiv 2505.24133)",
    "snapkv": "what the last tokens attend to: Z = I (SnapKV, arXiv 2404.14469)",
    "streaming": "the pinned first tokens and the most recent ones (StreamingLLM, arXiv 2309.17453)",
    "latest": "the latest copy, keys compared without their rotation: "
    "Z = lam*I/max(I) - (1 - lam)*L, and by how far values are from their mean (docs/design.md, section 2)",
    "h2o": "what all windows so far attended to, added up (H2O, arXiv 2306.14048)",
    "gkv": "what any window attended to, fading, and not redundant: "
    "Z = lam*F - (1 - lam)*R/max(R), F = max(0.8*F, I/max(I)) (G-KV, arXiv 2512.00504)",
    "rpc": "what all heads of a layer attend to on average; the prompt is pinned (RPC, arXiv 2505.13866)",
    "chunkkv": "groups of adjacent tokens that the last ones attend to (ChunkKV, arXiv 2502.00299)",
    "value-aware": "the largest values, and a random sample by attention (VaSE, arXiv 2606.03928)",
    "keydiff": "keys that differ from the mean key (KeyDiff, arXiv 2504.15364)",
    "lagkv": "keys and values that differ from those of the next chunk (LagKV, arXiv 2504.04704)",
    "triattention": "what the model's mean query will look at, by distance; its statistics are gathered "
    "while it runs (TriAttention, arXiv 2604.04921)",
    "given": "what scores from outside say; for research (rkv_seq_set_scores)",
}

# What a policy takes where nothing else is said, beside the defaults of KVBudget.
POLICY_DEFAULTS: dict[str, dict[str, Any]] = {
    "latest": {"buffer": 256, "recent": 96, "n_sim": 2, "value_weight": 0.5},
    "gkv": {"lam": 0.5, "pool": 1, "memory": 0.8},
    "rpc": {"window": 32, "pin": "prompt"},
    "chunkkv": {"pool": 1, "chunk": 10},
    "lagkv": {"chunk": 128},
}
_DEFAULTS: dict[str, Any] = {
    "buffer": 128,
    "window": 8,
    "lam": 0.1,
    "pin": 4,
    "pool": 7,
    "memory": 0.0,
    "chunk": 10,
    "recent": 0,  # the window
    "n_sim": 1,
    "value_weight": 0.0,
}
_OWN: Any = None  # the policy's own default

SCHEDULES: dict[str, str] = {
    "uniform": "the same budget in every layer",
    "pyramid": "wide first layers, narrow last ones, linear in between (PyramidKV, arXiv 2406.02069)",
}
CALIBRATED = "calibrated"  # or the name of a calibration's file, see calibration.py
BY_ITSELF = "latest"  # the policy whose layer budgets are calibrated without being asked

# PyramidKV's beta: the last layer keeps 1/20 of the average (section 4.2 of the paper).
_PYRAMID_BETA = 20
# the same limits as rkv_params_check in native/rkv-init.cpp
_MAX_BUDGET = 2**24
_MAX_TOKENS = 2**20  # buffer, batch
_MAX_WINDOW = 64
_MAX_POOL = 255
_MAX_CHUNK = 4096
_MAX_RECENT = 4096
_SINKS = 4  # pinned where pin is "prompt" and no prompt has been seen


@dataclass(frozen=True)
class KVBudget:
    """Size and policy of a compressed KV cache. All counts are in cells: one token in one layer and KV head.

    Args:
        budget: B, cells that a sequence keeps after a compaction; window and pinned cells are inside it.
        buffer: S, tokens admitted between two compactions. Like window, recent, lam, pin, pool, n_sim,
            memory, chunk and value_weight it has a default of its own under some policies: POLICY_DEFAULTS.
        window: the most recent tokens, always kept; their queries judge importance (1 to 64).
        policy: a key of POLICIES.
        recent: the most recent tokens that are kept whatever their score, the window among them; in each
            layer at most half of its budget, but at least the window. 0: the window; at most 4096.
        lam: weight of importance against redundancy, 0 to 1 (the paper's lambda).
        pin: the first tokens of a sequence, never evicted; at most budget - window - 1. "prompt": of each
            sequence its first prompt, or the first budget // 2 tokens of a longer one.
        pool: width of the max-pool (`rpc`: mean) over importance, odd, at most 255; 1 is none.
        threshold: cosine above which two keys count as copies, -1 to 1.
        n_sim: how many of the highest similarities `latest` averages, 1 to 4.
        memory: importance is max(memory * what it was, new), 0 to 1; 0 is none. rkv, snapkv, latest, gkv.
        chunk: `chunkkv`: adjacent tokens that are kept together; `lagkv`: tokens of a chunk; 1 to 4096.
        growth: `rpc`: of each buffer's tokens one in so many is kept, until the budget is reached.
        value_share: `value-aware`: the share of cells that is kept for the length of their values, 0 to 1.
        value_weight: `latest`: weight of how far a cell's value is from the mean value, beside the score of
            its key, 0 to 1; 0: values do not count. Without effect where a model caches no values (MLA).
        seed: `value-aware`: of its sample.
        shared_heads: one set of cells for all layers and heads, by the mean of their scores; to compare with.
        reference: `rkv` only: a key without a copy zeroes column 0, as the authors' code does.
        batch: most tokens of one sequence in one decode; None stands for max(buffer, 256).
        layer_budgets: a key of SCHEDULES, "calibrated" (by the file beside the model), the name of such a
            file (.json), or one budget per layer, each at least window + pin + 1. None: with policy `latest`
            calibrated if there is a file beside the model, else uniform.

    Raises:
        ValueError: a value out of range; one line with the field, the value and what is allowed.
    """

    budget: int = 1024
    buffer: int = _OWN
    window: int = _OWN
    policy: str = "latest"
    lam: float = _OWN
    pin: int | str = _OWN
    pool: int = _OWN
    threshold: float = 0.5
    n_sim: int = _OWN
    memory: float = _OWN
    chunk: int = _OWN
    growth: int = 4
    value_share: float = 0.1
    seed: int = 0
    shared_heads: bool = False
    reference: bool = False
    batch: int | None = None
    recent: int = _OWN
    value_weight: float = _OWN
    layer_budgets: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str) or self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}, must be one of {', '.join(POLICIES)}")
        for field, value in (_DEFAULTS | POLICY_DEFAULTS.get(self.policy, {})).items():
            if getattr(self, field) is None:
                self._set(field, value)
        self._set("window", _integer("window", self.window, 1, _MAX_WINDOW))
        self._set("budget", _integer("budget", self.budget, 1, _MAX_BUDGET))
        if self.budget <= self.window:
            raise ValueError(f"budget is {self.budget}, must be larger than window, {self.window}")
        why = f"with budget {self.budget} and window {self.window}"
        if self.pin != "prompt":
            if isinstance(self.pin, str):
                raise ValueError(f"pin is {self.pin!r}, must be a number of tokens or 'prompt'")
            self._set("pin", _integer("pin", self.pin, 0, self.budget - self.window - 1, why))
        self._set("buffer", _integer("buffer", self.buffer, 1, _MAX_TOKENS))
        self._set("recent", _integer("recent", self.recent, 0, _MAX_RECENT))
        self._set("pool", _integer("pool", self.pool, 1, _MAX_POOL))
        if self.pool % 2 == 0:
            raise ValueError(f"pool is {self.pool}, must be odd (1 is no pooling)")
        self._set("n_sim", _integer("n_sim", self.n_sim, 1, 4))
        self._set("lam", _real("lam", self.lam, 0.0, 1.0))
        self._set("threshold", _real("threshold", self.threshold, -1.0, 1.0))
        self._set("memory", _real("memory", self.memory, 0.0, 1.0))
        if self.memory > 0 and self.policy not in ("none", "rkv", "snapkv", "latest", "gkv"):
            raise ValueError(
                f"memory is {self.memory:g}, must be 0 with policy {self.policy}, which has none"
            )
        self._set("chunk", _integer("chunk", self.chunk, 1, _MAX_CHUNK))
        self._set("growth", _integer("growth", self.growth, 1, _MAX_TOKENS))
        self._set("value_share", _real("value_share", self.value_share, 0.0, 1.0))
        self._set("value_weight", _real("value_weight", self.value_weight, 0.0, 1.0))
        if self.value_weight > 0 and self.policy not in ("none", "latest"):
            raise ValueError(
                f"value_weight is {self.value_weight:g}, must be 0 with policy {self.policy}: it is latest's "
                f"(KVBudget(policy={self.policy!r}) takes the policy's own values)"
            )
        self._set("seed", _integer("seed", self.seed, 0, 2**32 - 1))
        for field in ("reference", "shared_heads"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} is {getattr(self, field)!r}, must be True or False")
        if self.reference and self.policy not in ("rkv", "none"):
            raise ValueError(f"reference is True, must be False with policy {self.policy}: it is rkv's")
        if self.batch is not None:
            self._set("batch", _integer("batch", self.batch, 1, _MAX_TOKENS))
        self._set("layer_budgets", self._checked_layer_budgets())
        if self.shared_heads and self.layer_budgets not in (None, "uniform"):
            raise ValueError(
                "shared_heads is True, layer_budgets must be uniform: all layers keep the same cells"
            )

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)  # the dataclass is frozen

    def _checked_layer_budgets(self) -> str | tuple[int, ...] | None:
        given = self.layer_budgets
        allowed = f"must be one of {', '.join(SCHEDULES)}, {CALIBRATED}, a .json file or one number per layer"
        if given is None:
            return None
        if isinstance(given, str):
            if given not in (*SCHEDULES, CALIBRATED) and not given.endswith(".json"):
                raise ValueError(f"layer_budgets is {given!r}, {allowed}")
            return given
        try:
            values = list(given)
        except TypeError:
            raise ValueError(f"layer_budgets is {given!r}, {allowed}") from None
        if not values:
            raise ValueError("layer_budgets is empty, must have one number per layer")
        why = f"with window {self.window} and pin {self.n_pin}"
        return tuple(
            _integer(f"layer_budgets[{i}]", v, self.least_budget, _MAX_BUDGET, why)
            for i, v in enumerate(values)
        )

    @property
    def active(self) -> bool:
        """False for policy `none`: a stock cache."""
        return self.policy != "none"

    @property
    def n_batch(self) -> int:
        """Most tokens of one sequence in one decode (rkv_params.n_batch_seq)."""
        return max(self.buffer, 256) if self.batch is None else self.batch

    @property
    def headroom(self) -> int:
        """Cells per layer beyond the budget, for tokens that arrive before the next compaction."""
        return max(self.buffer, self.n_batch)

    @property
    def least_budget(self) -> int:
        """Cells that a layer cannot do without: window, pin and one to choose."""
        return self.window + self.n_pin + 1

    @property
    def n_pin(self) -> int:
        """First tokens that are never evicted where no prompt has been seen."""
        return min(_SINKS, self.budget - self.window - 1) if isinstance(self.pin, str) else self.pin

    @property
    def n_recent(self) -> int:
        """The most recent tokens that a layer with room for them always keeps: `recent`, or the window."""
        return max(self.recent, self.window)

    def recent_of(self, budget: int) -> int:
        """The most recent tokens that a layer of so many cells always keeps; rpc: those of the narrowest."""
        return max(self.window, min(self.recent, budget // 2, budget - self.n_pin - 1))

    def prompt_pin(self, n_tokens: int, n_layer: int = 1) -> int | None:
        """Tokens to pin of a sequence that begins with a prompt of n_tokens; None: as it is."""
        if self.pin != "prompt":
            return None
        least = min(self.budgets(n_layer))
        return min(n_tokens, self.budget // 2, least - self.recent_of(least) - 1)

    @property
    def n_aux(self) -> int:
        """Floats stored with each cell."""
        own = {"latest": self.n_sim, "h2o": 1, "given": 1}.get(self.policy, 0)
        return own + (self.memory > 0 or self.policy == "gkv")

    def n_stats(self, n_embd_head_k: int) -> int:
        """Floats stored with each query head of a layer."""
        return n_embd_head_k + n_embd_head_k // 2 + 1 if self.policy == "triattention" else 0

    def budgets(self, n_layer: int) -> list[int]:
        """Cells that each layer keeps. A named schedule sums to exactly n_layer * budget.

        Raises:
            ValueError: layer_budgets has another length than n_layer, or is calibrated: see for_model().
        """
        if n_layer < 1:
            raise ValueError(f"n_layer is {n_layer}, must be at least 1")
        if isinstance(self.layer_budgets, tuple):
            if len(self.layer_budgets) != n_layer:
                raise ValueError(
                    f"layer_budgets has {len(self.layer_budgets)} numbers, must have one per layer: {n_layer}"
                )
            return list(self.layer_budgets)
        if self.layer_budgets == "pyramid":
            return _pyramid(n_layer, self.budget, self.least_budget)
        if self.is_calibrated:
            raise ValueError(
                f"layer_budgets is {self.layer_budgets!r}: for_model() tells what it is for a model"
            )
        return [self.budget] * n_layer

    @property
    def is_calibrated(self) -> bool:
        """Whether layer_budgets are a calibration's, so that they depend on the model."""
        return isinstance(self.layer_budgets, str) and self.layer_budgets not in SCHEDULES

    def for_model(self, model: str | PathLike[str], n_layer: int | None = None) -> KVBudget:
        """The same with a calibration's layer_budgets as numbers; itself where they are not calibrated.

        Args:
            model: the GGUF file. n_layer: its layers, if the number is to be checked.

        Raises:
            ValueError: there is no calibration, it is damaged, or of another model.
        """
        from .calibration import beside, layer_budgets

        given = self.layer_budgets
        if given is None and self.policy == BY_ITSELF and not self.shared_heads and beside(model).is_file():
            given = CALIBRATED
        if not self.active or not isinstance(given, str) or given in SCHEDULES:
            return self
        try:
            found = layer_budgets(model, given, self.budget, self.least_budget, n_layer)
        except ValueError as err:
            if self.layer_budgets is not None:
                raise
            without = "layer_budgets='uniform' (--kv-layer-budgets uniform) goes without"
            raise ValueError(f"{err}; {without}") from None
        return replace(self, layer_budgets=tuple(found))

    def cells(self, n_layer: int, n_ctx: int | None = None) -> list[int]:
        """Cells allocated per sequence in each layer: B_l + max(buffer, batch).

        Args:
            n_layer: layers of the model.
            n_ctx: needed with policy `none` only, whose cache has n_ctx cells (a multiple of 256).

        Raises:
            ValueError: layer_budgets does not fit n_layer, or n_ctx is missing.
        """
        if not self.active:
            if n_ctx is None:
                raise ValueError("n_ctx is None, must be given with policy none: it sizes the cache")
            return [pad_ctx(n_ctx)] * n_layer
        return [b + self.headroom for b in self.budgets(n_layer)]

    def bytes_for(
        self,
        model: ModelShape | StockLlama | str | PathLike[str],
        n_seq: int = 1,
        type_k: str | int = "f16",
        type_v: str | int = "f16",
        n_ctx: int | None = None,
    ) -> int:
        """Bytes of K, V, query rings, positions and stored scores if all KV heads are under the budget.

        Of a model whose every layer attends to everything that is KVStats.bytes. Where layers have a sliding
        window, share a cache or are recurrent it is no bound in either direction: plan() measures those.

        Args:
            model: a ModelShape, a loaded Llama, or the path of a GGUF file (only its header is read).
            n_seq: sequences, each with a cache of its own (n_seq_max).
            type_k, type_v: cache types, by name or ggml type number.
            n_ctx: needed with policy `none` only.

        Raises:
            ValueError: an unknown type, one whose blocks do not divide the head size, a file that is no GGUF.
        """
        shape = ModelShape.of(model)
        path = model if isinstance(model, (str, os.PathLike)) else getattr(model, "model_path", None)
        kv = self if path is None else self.for_model(path, shape.n_layer)
        n_seq = _integer("n_seq", n_seq, 1, 2**31 - 1)
        total = 0
        for layer, cells in enumerate(kv.cells(shape.n_layer, n_ctx)):
            heads, d_k = shape.n_head_kv[layer], shape.n_embd_head_k[layer]
            total += cells * row_bytes(type_k, heads, d_k, "type_k")
            total += cells * row_bytes(type_v, heads, shape.n_embd_head_v[layer], "type_v")
            if heads > 0:  # else it has no cells, but maybe a recurrent state
                total += self.added_bytes(cells, shape.n_head[layer], heads, d_k)
        return total * n_seq

    def added_bytes(self, cells: int, n_head: int, n_head_kv: int, n_embd_head_k: int) -> int:
        """Bytes that the budget adds to K and V of a layer with so many cells, per sequence."""
        if not self.active:
            return 0
        # the window's queries and a row for all others, a policy's statistics; positions and stored floats
        by_head = (self.window + 1) * n_embd_head_k + self.n_stats(n_embd_head_k)
        return n_head * by_head * 4 + (1 + self.n_aux) * cells * n_head_kv * 4


def pad_ctx(n_ctx: int) -> int:
    """llama.cpp rounds the context of a sequence up to a multiple of 256 (llama-context.cpp)."""
    return -(-n_ctx // 256) * 256


def _pyramid(n_layer: int, budget: int, least: int) -> list[int]:
    """Linear from 2 - 1/beta to 1/beta times the average above `least`; the sum is n_layer * budget."""
    if n_layer == 1:
        return [budget]
    # In integers: layer l gets spare * (lo + (hi - lo) * (n - 1 - l) / (n - 1)), lo = 1/beta, hi = 2 - lo.
    spare, steps = budget - least, n_layer - 1
    parts = [spare * (steps + 2 * (_PYRAMID_BETA - 1) * (steps - layer)) for layer in range(n_layer)]
    whole = _PYRAMID_BETA * steps
    cells = [part // whole for part in parts]
    # Largest remainders first, earlier layers first among equals, so that the sequence still never rises.
    left = n_layer * spare - sum(cells)
    for layer in sorted(range(n_layer), key=lambda i: (-(parts[i] % whole), i))[:left]:
        cells[layer] += 1
    return [least + c for c in cells]


def _integer(field: str, value: SupportsIndex, low: int, high: int, why: str = "") -> int:
    allowed = f"an integer from {low} to {high}" + (f" {why}" if why else "")
    if isinstance(value, bool):
        raise ValueError(f"{field} is {value!r}, must be {allowed}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{field} is {value!r}, must be {allowed}") from None
    if not low <= number <= high:
        raise ValueError(f"{field} is {number}, must be {allowed}")
    return number


def _real(field: str, value: float, low: float, high: float) -> float:
    allowed = f"a number from {low:g} to {high:g}"
    if isinstance(value, (bool, str, bytes)):
        raise ValueError(f"{field} is {value!r}, must be {allowed}")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{field} is {value!r}, must be {allowed}") from None
    if math.isnan(number) or not low <= number <= high:
        raise ValueError(f"{field} is {number:g}, must be {allowed}")
    return number
