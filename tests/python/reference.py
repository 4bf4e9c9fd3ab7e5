"""The selection of docs/design.md section 2 in numpy, float64, written from its formulas.

Independent of native/: nothing here calls the library. Shapes: k [n, n_head_kv, d], q [a, n_head, d] (the a
last queries, oldest first), pos [n, n_head_kv], aux [n_sim, n, n_head_kv], scores [n_head_kv, n]. Query
head g belongs to KV head g // (n_head // n_head_kv).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

MISSING = -1.0  # stored similarity of a cell that has no later key yet


@dataclass(frozen=True)
class Rope:
    """RoPE as ggml defines it: `n_rot` dimensions turn (0: none), adjacent pairs, or halves if `neox`."""

    n_rot: int = 0
    neox: bool = False
    freq_base: float = 10000.0
    freq_scale: float = 1.0
    n_ctx_orig: int = 0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Spec:
    """What is selected and how; names as in rkv_params and rkv_select_args."""

    policy: str = "rkv"
    budget: int = 64
    window: int = 8
    pin: int = 4
    pool: int = 7
    lam: float = 0.1
    threshold: float = 0.5
    n_sim: int = 1
    memory: float = 0.0
    chunk: int = 10
    value_share: float = 0.1
    value_weight: float = 0.0
    seed: int = 0
    layer: int = 0
    reference: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    sinks: NDArray[np.float32] | None = None  # [n_head]
    rope: Rope = field(default_factory=Rope)
    recent: int = 0

    def tail(self, budget: int | None = None) -> int:
        """The most recent cells that are kept whatever their score."""
        cells = self.budget if budget is None else budget
        return max(self.window, min(self.recent, cells // 2, cells - self.pin - 1))

    @property
    def n_aux(self) -> int:
        """Floats stored with a cell."""
        own = {"latest": self.n_sim, "h2o": 1, "gkv": 1, "given": 1}.get(self.policy, 0)
        return own + (self.memory > 0 and self.policy in ("rkv", "snapkv", "latest"))

    def n_stats(self, d: int) -> int:
        """Floats stored with a query head of a layer."""
        return d + d // 2 + 1 if self.policy == "triattention" else 0


# --- importance and redundancy --------------------------------------------------------------------


def softmax(x: Floats) -> Floats:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def max_pool(x: Floats, width: int) -> Floats:
    """Max over `width` neighbours along the last axis, same length out, nothing beyond the ends."""
    half = width // 2
    pad = np.full((*x.shape[:-1], half), -np.inf)
    padded = np.concatenate([pad, x, pad], axis=-1)
    return np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1).max(axis=-1)


def importance(k: Floats, q: Floats, spec: Spec) -> Floats:
    """I [n_head_kv, n - window]: attention of the window's queries to the keys before the window."""
    n, n_head_kv, _ = k.shape
    group = q.shape[1] // n_head_kv
    past = k[: n - spec.window].astype(np.float64)
    grouped = q.astype(np.float64).reshape(q.shape[0], n_head_kv, group, -1)
    logits = spec.scale * np.einsum("ahgd,jhd->hagj", grouped, past)
    if spec.softcap > 0:
        logits = spec.softcap * np.tanh(logits / spec.softcap)
    logits = logits.max(axis=2)  # max over the group: [h, a, j]
    if spec.sinks is not None:  # one key more, of every query, that is no cell
        sink = spec.sinks.astype(np.float64).reshape(n_head_kv, 1, group).max(axis=2, keepdims=True)
        logits = np.concatenate([logits, np.broadcast_to(sink, (*logits.shape[:2], 1))], axis=2)
    attention = softmax(logits)[:, :, : past.shape[0]]
    return max_pool(attention.mean(axis=1), spec.pool)


def unit(x: Floats) -> Floats:
    """Rows scaled to length 1; a zero row stays zero (its cosines are 0)."""
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)


def redundancy(k: Floats, spec: Spec) -> Floats:
    """R [n_head_kv, n] with the n x n matrix spelled out, one head at a time."""
    n, n_head_kv, _ = k.shape
    out = np.empty((n_head_kv, n))
    for h in range(n_head_kv):
        khat = unit(k[:, h])
        c = khat @ khat.T
        np.fill_diagonal(c, 0.0)
        similar = c > spec.threshold
        most_recent = n - 1 - similar[:, ::-1].argmax(axis=1)  # p(i): the largest j with c[i, j] > T
        hit = similar.any(axis=1)
        c[hit, most_recent[hit]] = 0.0
        if spec.reference:
            c[~hit, 0] = 0.0
        out[h] = softmax(c.mean(axis=0))
    return out


def redundancy_linear(k: Floats, spec: Spec) -> Floats:
    """R again by the design's linear identity (non-zero keys, threshold >= 0 only): checks the above."""
    n, n_head_kv, _ = k.shape
    out = np.empty((n_head_kv, n))
    for h in range(n_head_kv):
        khat = unit(k[:, h])
        total = khat @ khat.sum(axis=0) - 1.0
        for i in range(n):
            spared = 0 if spec.reference else -1
            for j in range(n - 1, -1, -1):
                if j != i and khat[i] @ khat[j] > spec.threshold:
                    spared = j
                    break
            if spared >= 0 and spared != i:
                total[spared] -= khat[i] @ khat[spared]
        out[h] = softmax(total / n)
    return out


# --- keys with their rotation undone --------------------------------------------------------------


def rope_cos_sin(pos: ArrayLike, rope: Rope, dtype: type = np.float64) -> tuple[Floats, Floats]:
    """cos, sin [*pos.shape, n_rot / 2], magnitude included. dtype float32 rounds where ggml rounds.

    The ratio of two frequencies is ggml's float32 `theta_scale` in either case.

    RoFormer (arXiv 2104.09864) angles pos * base^(-2i/n_rot), divided by freq_factors; YaRN (arXiv
    2309.00071) blends position interpolation (freq_scale) and the untouched angle by a ramp over i, and
    scales the magnitude.
    """
    p: Floats = np.asarray(pos).astype(dtype)
    half = rope.n_rot // 2
    step = dtype(np.float32(float(rope.freq_base) ** float(np.float32(-2.0 / rope.n_rot))))
    theta: Floats = np.empty((*p.shape, half), dtype=dtype)
    running = p.copy()
    for i in range(half):  # a running product, as ggml accumulates it
        theta[..., i] = running
        running = (running * step).astype(dtype)
    if rope.freq_factors is not None:
        theta = (theta / rope.freq_factors.astype(dtype)).astype(dtype)
    angle = (dtype(rope.freq_scale) * theta).astype(dtype)
    magnitude = float(rope.attn_factor)
    if rope.ext_factor != 0.0:

        def turns_to_dim(turns: float) -> float:
            return rope.n_rot * np.log(rope.n_ctx_orig / (turns * 2 * np.pi)) / (2 * np.log(rope.freq_base))

        low = max(0.0, np.floor(turns_to_dim(rope.beta_fast)))
        high = min(rope.n_rot - 1.0, np.ceil(turns_to_dim(rope.beta_slow)))
        ramp = np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
        mix = ((1.0 - ramp) * rope.ext_factor).astype(dtype)
        angle = (angle * (1 - mix) + theta * mix).astype(dtype)
        magnitude *= 1.0 + 0.1 * np.log(1.0 / rope.freq_scale)
    return np.cos(angle) * dtype(magnitude), np.sin(angle) * dtype(magnitude)


def _pairs(rope: Rope) -> tuple[Ints, Ints]:
    half = rope.n_rot // 2
    if rope.neox:
        return np.arange(half), np.arange(half) + half
    return 2 * np.arange(half), 2 * np.arange(half) + 1


def rotate(x: Floats, pos: ArrayLike, rope: Rope, dtype: type = np.float64) -> Floats:
    """RoPE on x [..., d] at positions pos [...]."""
    out: Floats = np.array(x, dtype=dtype)
    if rope.n_rot == 0:
        return out
    cos, sin = rope_cos_sin(pos, rope, dtype)
    first, second = _pairs(rope)
    a, b = out[..., first].copy(), out[..., second].copy()
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def unrotate(x: Floats, pos: ArrayLike, rope: Rope, dtype: type = np.float64) -> Floats:
    """The inverse of `rotate`, magnitude included."""
    out: Floats = np.array(x, dtype=dtype)
    if rope.n_rot == 0:
        return out
    cos, sin = rope_cos_sin(pos, rope, dtype)
    first, second = _pairs(rope)
    a, b = out[..., first].copy(), out[..., second].copy()
    size = cos**2 + sin**2  # the square of the magnitude
    out[..., first], out[..., second] = (a * cos + b * sin) / size, (b * cos - a * sin) / size
    return out


def hadamard(x: Floats) -> Floats:
    """The orthonormal Walsh-Hadamard rotation of a quantised cache, on x [..., d]; its own inverse.

    In blocks of the largest power of two (at least 64) that divides d; d not a multiple of 64: none.
    """
    d = x.shape[-1]
    if d % 64:
        return x
    block = d & -d
    matrix = np.ones((1, 1))
    while matrix.shape[0] < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], d // block, block)
    return (blocks @ (matrix / np.sqrt(block))).reshape(x.shape)


# --- `latest`: similarity to later keys -----------------------------------------------------------


def empty_aux(n_sim: int, n: int, n_head_kv: int) -> Floats:
    """Stored floats of cells without a later key."""
    return np.full((n_sim, n, n_head_kv), MISSING)


def latest_update(k: Floats, pos: Ints, aux: Floats, n_old: int, rope: Rope) -> Floats:
    """aux after comparing every cell j with each later new key i >= max(n_old, j + 1): highest first."""
    n_sim, n, n_head_kv = aux.shape
    out = np.empty(aux.shape)
    later_and_new = np.triu(np.ones((n, n), bool), 1)  # [j, i]: i is later than j ...
    later_and_new[:, :n_old] = False  # ... and has not been compared before
    for h in range(n_head_kv):
        u = unit(unrotate(k[:, h], pos[:, h], rope))
        s = np.where(later_and_new, u @ u.T, MISSING)
        seen = np.concatenate([aux[:, :, h].T, s], axis=1)
        highest = -np.partition(-seen, n_sim - 1, axis=1)[:, :n_sim]
        out[:, :, h] = -np.sort(-highest, axis=1).T
    return out


def value_distances(v: Floats) -> Floats:
    """[n_head_kv, n]: how far each value of v [n, n_head_kv, d] is from the head's mean value."""
    return np.linalg.norm(v - v.mean(axis=0), axis=-1).T


def logistic(x: Floats) -> Floats:
    """Rows [.., n] as shares of a logistic distribution with their mean and deviation."""
    deviation = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-12)
    return 1 / (1 + np.exp(-1.702 * (x - x.mean(axis=-1, keepdims=True)) / deviation))


# --- scores and selection -------------------------------------------------------------------------


@dataclass(frozen=True)
class Selection:
    kept: list[Ints]  # per KV head, ascending rows
    score: Floats  # [n_head_kv, n - window]; empty if all was kept
    aux: Floats | None  # updated, before the gather
    stats: Floats | None = None  # triattention's, updated


def select(
    k: Floats,
    q: Floats,
    spec: Spec,
    pos: Ints | None = None,
    aux: Floats | None = None,
    n_old: int = 0,
    v: Floats | None = None,
    stats: Floats | None = None,
) -> Selection:
    """Rows kept by each KV head. n <= budget keeps everything."""
    import reference_policies as others

    n, n_head_kv, _ = k.shape
    past = n - spec.window
    similar = stored = new_stats = None
    if spec.policy == "latest":
        assert pos is not None
        before = empty_aux(spec.n_sim, n, n_head_kv) if aux is None else aux[: spec.n_sim]
        similar = latest_update(k, pos, before, n_old, spec.rope)
    if past <= 0:
        return Selection([np.arange(n)] * n_head_kv, np.empty((n_head_kv, 0)), similar)
    cells = others.Cells(
        k, q, v, np.zeros((n, n_head_kv), int) if pos is None else pos, aux, stats, n_old, min(n, spec.budget)
    )
    if spec.policy == "streaming":
        z = np.tile(np.arange(past, dtype=np.float64), (n_head_kv, 1))
    elif spec.policy in others.SCORES:
        scored = others.SCORES[spec.policy](cells, spec)
        z, stored, new_stats = scored.z, scored.aux, scored.stats
    elif spec.policy in ("rkv", "snapkv", "latest"):
        z = importance(k, q, spec)
        if spec.memory > 0:
            z, kept = others.remembered(z, cells.slot(spec.n_aux - 1), n_old, spec.memory)
            stored = kept.T[None]
        if spec.policy == "rkv":
            z = spec.lam * z - (1 - spec.lam) * redundancy(k, spec)[:, :past]
        elif similar is not None:
            late = similar.mean(axis=0).T[:, :past]
            z = spec.lam * z / z.max(axis=-1, keepdims=True) - (1 - spec.lam) * late
            if spec.value_weight > 0:
                assert v is not None
                z = logistic(z) + spec.value_weight * logistic(value_distances(v)[:, :past])
    else:
        raise ValueError(f"no such policy: {spec.policy}")
    parts = [x for x in (similar, stored) if x is not None]
    new_aux = np.concatenate(parts) if parts else None
    if n <= spec.budget:
        return Selection([np.arange(n)] * n_head_kv, np.empty((n_head_kv, 0)), new_aux, new_stats)
    return Selection([top_rows(row, n, spec) for row in z], z, new_aux, new_stats)


def top_rows(z: Floats, n: int, spec: Spec) -> Ints:
    """Pinned rows, the best others by z (ties: the lower index) and the tail: budget rows, ascending."""
    slots = spec.budget - spec.tail() - spec.pin
    order = np.argsort(-z[spec.pin : n - spec.tail()], kind="stable") + spec.pin
    return np.sort(np.concatenate([np.arange(spec.pin), order[:slots], np.arange(n - spec.tail(), n)]))


# --- comparing a float32 selection with this one --------------------------------------------------


@dataclass
class Tally:
    """How many heads were compared, and how many differed by near-ties only."""

    heads: int = 0
    near_ties: int = 0


def check_kept(
    kept: Sequence[Ints] | Ints,
    k: Floats,
    q: Floats,
    spec: Spec,
    pos: Ints | None = None,
    aux: Floats | None = None,
    n_old: int = 0,
    rel: float = 1e-5,
    tally: Tally | None = None,
    v: Floats | None = None,
    stats: Floats | None = None,
) -> Selection:
    """Assert that `kept` is what `select` keeps, but for rows with scores within `rel` of the boundary.

    A cosine within float32 rounding of the threshold may fall on either side of it; those heads are
    compared with thresholds 2e-6 lower and higher too. Both kinds count as near-ties in `tally`.
    """
    tally = tally if tally is not None else Tally()
    right = select(k, q, spec, pos, aux, n_old, v, stats)
    nudged: list[Selection] = []
    for h, rows in enumerate(right.kept):
        tally.heads += 1
        got = np.asarray(kept[h])
        assert got.shape == rows.shape, f"head {h}: {got.shape[0]} rows kept, {rows.shape[0]} expected"
        assert (np.diff(got) > 0).all(), f"head {h}: rows not ascending"
        if np.array_equal(got, rows):
            continue
        complaint = _boundary_complaint(got, rows, right.score[h], spec, rel)
        if complaint and spec.policy in ("rkv", "gkv"):
            if not nudged:
                nudged = [
                    select(k, q, replace(spec, threshold=spec.threshold + e), pos, aux, n_old)
                    for e in (-2e-6, 2e-6)
                ]
            if any(not _boundary_complaint(got, s.kept[h], s.score[h], spec, rel) for s in nudged):
                complaint = ""
        assert not complaint, f"head {h}: {complaint}"
        tally.near_ties += 1
    return right


# scores around 0 are differences of numbers of this size
SIZE = {"keydiff": 0.5, "triattention": 5.0, "value-aware": 10.0}


def _boundary_complaint(got: Ints, rows: Ints, z: Floats, spec: Spec, rel: float) -> str:
    """Why `got` is no near-tie of `rows` under scores z; "" if it is one."""
    extra, lost = np.setdiff1d(got, rows), np.setdiff1d(rows, got)
    fixed = (lost < spec.pin) | (lost >= z.size + spec.window - spec.tail())
    if extra.size != lost.size or fixed.any() or (extra >= z.size).any():
        return f"kept {extra}, dropped {lost}: pinned or window rows differ"
    if extra.size == 0:
        return ""
    worst, best = z[extra].min(), z[lost].max()
    if best - worst > rel * max(abs(best), abs(worst), SIZE.get(spec.policy, 0.0)):
        return f"kept {extra} (z {z[extra]}) instead of {lost} (z {z[lost]})"
    return ""
