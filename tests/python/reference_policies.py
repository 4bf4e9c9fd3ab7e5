"""The scores of the policies beside rkv, snapkv, streaming and latest in numpy, float64, from docs/design.md.

Shapes as in reference.py; v [n, n_head_kv, d_v], stats [n_head, d + d // 2 + 1].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

import reference as ref
from reference import Floats, Ints, Spec

KEPT = 64.0  # value-aware: score of what is kept for its values
OFFSETS = [2**m for m in range(17)]


@dataclass(frozen=True)
class Scored:
    z: Floats  # [n_head_kv, n - window]
    aux: Floats | None = None  # as after the pass
    stats: Floats | None = None


@dataclass(frozen=True)
class Cells:
    """What a policy may look at."""

    k: Floats
    q: Floats
    v: Floats | None
    pos: Ints
    aux: Floats | None
    stats: Floats | None
    n_old: int
    keep: int

    @property
    def n(self) -> int:
        return int(self.k.shape[0])

    @property
    def n_head_kv(self) -> int:
        return int(self.k.shape[1])

    def slot(self, index: int) -> Floats:
        """A stored float [n_head_kv, n]; 0 of cells that are new."""
        out = np.zeros((self.n_head_kv, self.n))
        if self.aux is not None:
            out[:, : self.n_old] = self.aux[index, : self.n_old].T
        return out


def remembered(importance: Floats, before: Floats, n_old: int, memory: float) -> tuple[Floats, Floats]:
    """max(memory * before, importance) of old candidates; and what is stored then, [n_head_kv, n]."""
    past, after = importance.shape[1], before.copy()
    now = importance.copy()
    old = min(n_old, past)
    now[:, :old] = np.maximum(importance[:, :old], memory * before[:, :old])
    after[:, :past] = now
    return now, after


def h2o(c: Cells, spec: Spec) -> Scored:
    paid = ref.importance(c.k, c.q, replace(spec, pool=1)) * spec.window  # a sum over the window
    total = c.slot(0)
    total[:, : paid.shape[1]] += paid
    return Scored(total[:, : paid.shape[1]], total.T[None])


def gkv(c: Cells, spec: Spec) -> Scored:
    share = ref.importance(c.k, c.q, spec)
    share = share / share.max(axis=1, keepdims=True)
    kept, stored = remembered(share, c.slot(0), c.n_old, spec.memory)
    redundant = ref.redundancy(c.k, spec)[:, : share.shape[1]]
    redundant = redundant / redundant.max(axis=1, keepdims=True)
    return Scored(spec.lam * kept - (1 - spec.lam) * redundant, stored.T[None])


def rpc(c: Cells, spec: Spec) -> Scored:
    past, group = c.n - spec.window, c.q.shape[1] // c.n_head_kv
    paid = np.zeros(past)
    for head in range(c.q.shape[1]):
        keys = c.k[spec.pin : past, head // group].astype(np.float64)
        for query in c.q[:, head].astype(np.float64):
            logits = spec.scale * keys @ query
            if spec.softcap:
                logits = spec.softcap * np.tanh(logits / spec.softcap)
            sink = [] if spec.sinks is None else [float(spec.sinks[head])]
            shares = ref.softmax(np.concatenate([logits, sink]))[: past - spec.pin]
            paid[spec.pin :] += shares / c.q.shape[0] / c.q.shape[1]
    half = spec.pool // 2
    padded = np.concatenate([np.zeros(half), paid, np.zeros(half)])
    pooled = np.array([padded[j : j + spec.pool].sum() / spec.pool for j in range(past)])
    pooled[: spec.pin] = 0
    return Scored(np.tile(pooled, (c.n_head_kv, 1)))


def chunkkv(c: Cells, spec: Spec) -> Scored:
    importance = ref.importance(c.k, c.q, spec)
    z = np.zeros_like(importance)
    for start in range(spec.pin, z.shape[1], spec.chunk):
        part = slice(start, start + spec.chunk)
        z[:, part] = importance[:, part].mean(axis=1, keepdims=True)
    return Scored(z)


def noise(seed: int, layer: int, head: int, pos: int) -> float:
    """Gumbel noise of a cell: a function of these four numbers and nothing else."""
    x, full = seed, 2**32 - 1
    for word in (layer, head, pos):
        x = (x * 0x9E3779B9 + word) & full
        x = (x ^ (x >> 16)) * 0x85EBCA6B & full
        x = (x ^ (x >> 13)) * 0xC2B2AE35 & full
        x ^= x >> 16
    return float(-np.log(-np.log(((x >> 9) + 0.5) / 2**23)))


def value_aware(c: Cells, spec: Spec) -> Scored:
    assert c.v is not None
    importance = ref.importance(c.k, c.q, spec)
    z, past = np.zeros_like(importance), importance.shape[1]
    slots = min(c.keep - spec.window - spec.pin, past - spec.pin)
    count = int(np.floor(np.float32(spec.value_share) * np.float32(slots) + np.float32(0.5)))
    for h in range(c.n_head_kv):
        length = np.linalg.norm(c.v[spec.pin : past, h].astype(np.float64), axis=1)
        for j in range(spec.pin, past):
            z[h, j] = np.log(max(importance[h, j], 1e-20)) + noise(spec.seed, spec.layer, h, int(c.pos[j, h]))
        z[h, np.argsort(-length, kind="stable")[:count] + spec.pin] = KEPT
    return Scored(z)


def keydiff(c: Cells, spec: Spec) -> Scored:
    keys = ref.unit(c.k)  # [n, h, d]
    anchor = ref.unit(keys.mean(axis=0))
    return Scored(-np.einsum("jhd,hd->hj", keys, anchor)[:, : c.n - spec.window])


def lagkv(c: Cells, spec: Spec) -> Scored:
    assert c.v is not None
    past = c.n - spec.window
    size = max(1, min(spec.chunk, (c.n - spec.pin) // 4))
    chunks = (c.n - spec.pin) // size - 1
    z = np.tile(2 + np.arange(past) / c.n, (c.n_head_kv, 1))
    z[:, : spec.pin] = 0
    for i in range(chunks):
        here = slice(spec.pin + i * size, spec.pin + (i + 1) * size)
        there = slice(here.stop, here.stop + size)
        total = np.zeros((c.n_head_kv, size))
        for rows in (c.k.astype(np.float64), c.v.astype(np.float64)):
            low, high = rows[there].min(axis=0), rows[there].max(axis=0)
            reach = np.where(high > low, high - low, 1.0)
            relative = np.where(high > low, (rows[here] - low) / reach, 0.0)
            total += ref.softmax(relative.std(axis=-1, ddof=1).T)
        stop = min(here.stop, past)
        z[:, here.start : stop] = total[:, : max(0, stop - here.start)]
    return Scored(z)


def pairs(x: Floats, rope: ref.Rope) -> Floats:
    """The rotated elements of x [..., d] as complex numbers [..., n_rot / 2]."""
    half = rope.n_rot // 2
    first = np.arange(half) if rope.neox else 2 * np.arange(half)
    return x[..., first] + 1j * x[..., first + (half if rope.neox else 1)]


def triattention(c: Cells, spec: Spec) -> Scored:
    rope, (n, n_head_kv, d), n_head = spec.rope, c.k.shape, c.q.shape[1]
    past, group, half = n - spec.window, n_head // n_head_kv, spec.rope.n_rot // 2
    free = ref.unrotate(c.q, np.repeat(c.pos[n - spec.window :, :1], n_head, axis=1), rope)
    stats = np.zeros((n_head, d + d // 2 + 1)) if c.stats is None or c.n_old == 0 else c.stats.astype(float)
    count = stats[:, -1:].copy()
    stats[:, :d] = (stats[:, :d] * count + free.sum(axis=0)) / (count + len(free))
    lengths = np.abs(pairs(free, rope)).sum(axis=0)
    stats[:, d : d + half] = (stats[:, d : d + half] * count + lengths) / (count + len(free))
    stats[:, -1:] = count + len(free)

    # RoPE's magnitude, of a key and of a query
    magnitude = float(np.hypot(*(x[0] for x in ref.rope_cos_sin(0, rope)))) if half else 1.0
    z = np.zeros((n_head_kv, past))
    for head in range(n_head):
        h, mean = head // group, stats[head, :d]
        ahead = [ref.rotate(mean, c.pos[n - 1, h] + o, rope) for o in OFFSETS]
        keys = c.k[:past, h].astype(np.float64)
        series = np.mean([keys @ query for query in ahead], axis=0)
        spread = np.maximum(0, stats[head, d : d + half] - np.abs(pairs(mean, rope)))
        series += np.abs(pairs(ref.unrotate(keys, c.pos[:past, h], rope), rope)) @ spread * magnitude**2
        series -= series[spec.pin :].mean()
        series /= np.sqrt((series[spec.pin :] ** 2).mean())
        series[: spec.pin] = 0
        z[h] = series if head % group == 0 else np.maximum(z[h], series)
    return Scored(z, stats=stats)


def given(c: Cells, spec: Spec) -> Scored:
    assert c.aux is not None
    return Scored(c.aux[0].T[:, : c.n - spec.window].astype(np.float64), c.aux)


SCORES = {
    "h2o": h2o,
    "gkv": gkv,
    "rpc": rpc,
    "chunkkv": chunkkv,
    "value-aware": value_aware,
    "keydiff": keydiff,
    "lagkv": lagkv,
    "triattention": triattention,
    "given": given,
}
