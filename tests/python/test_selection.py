"""rkv_select against the numpy reference, and the reference against a second, naive writing of it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reference as ref
from engine_tools import NativeError, dequantised, native_select

POLICIES = ("rkv", "snapkv", "streaming", "latest")


def random_kq(
    rng: np.random.Generator, n: int, n_head_kv: int, group: int, d: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Keys with near-copies at all distances and a common direction; queries that prefer some of them."""
    centres = rng.normal(size=(n_head_kv, max(2, n // 6), d))
    which = rng.integers(centres.shape[1], size=(n, n_head_kv))
    k = centres[np.arange(n_head_kv), which] + rng.uniform(0.1, 1.2, size=(n, n_head_kv, 1)) * rng.normal(
        size=(n, n_head_kv, d)
    )
    k += 0.3 * rng.normal(size=(n_head_kv, d))
    q = rng.normal(size=(window, n_head_kv * group, d)) + 0.2 * np.repeat(centres[:, 0], group, axis=0)
    return k.astype(np.float32), q.astype(np.float32)


def random_v(rng: np.random.Generator, n: int, n_head_kv: int, d: int, type_v: str) -> np.ndarray:
    """Values as the cache gives them back, some of them long."""
    v = rng.normal(size=(n, n_head_kv, d)) * np.exp(rng.normal(size=(n, n_head_kv, 1)))
    return dequantised(v.astype(np.float32), type_v)


def same_positions(n: int, n_head_kv: int) -> np.ndarray:
    return np.repeat(np.arange(n, dtype=np.int32)[:, None], n_head_kv, axis=1)


# --- the reference itself -------------------------------------------------------------------------


def naive_scores(k: np.ndarray, q: np.ndarray, spec: ref.Spec, h: int) -> tuple[list[float], list[float]]:
    """I and R of head h, loop by loop as section 2 reads."""
    n, n_head_kv, d = k.shape
    group, past = q.shape[1] // n_head_kv, n - spec.window
    attention = [0.0] * past
    for i in range(spec.window):
        logits = []
        for j in range(past):
            best = -math.inf
            for g in range(group):
                dot = spec.scale * sum(float(q[i, h * group + g, x]) * float(k[j, h, x]) for x in range(d))
                best = max(best, spec.softcap * math.tanh(dot / spec.softcap) if spec.softcap else dot)
            logits.append(best)
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        for j in range(past):
            attention[j] += weights[j] / sum(weights) / spec.window
    half = spec.pool // 2
    pooled = [max(attention[max(0, j - half) : j + half + 1]) for j in range(past)]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        dot = sum(float(x) * float(y) for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(float(x) ** 2 for x in a)) / math.sqrt(sum(float(y) ** 2 for y in b))

    c = [[0.0 if i == j else cosine(k[i, h], k[j, h]) for j in range(n)] for i in range(n)]
    for row in c:
        above = [j for j in range(n) if row[j] > spec.threshold]
        if above:
            row[above[-1]] = 0.0
        elif spec.reference:
            row[0] = 0.0
    m = [math.exp(sum(c[i][j] for i in range(n)) / n) for j in range(n)]
    return pooled, [x / sum(m) for x in m]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_reference_equals_naive_loops(reference: bool, softcap: float) -> None:
    spec = ref.Spec(window=3, pool=5, threshold=0.4, scale=0.3, softcap=softcap, reference=reference)
    k, q = random_kq(np.random.default_rng(1), 24, 2, 3, 8, spec.window)
    for h in range(2):
        pooled, redundant = naive_scores(k, q, spec, h)
        np.testing.assert_allclose(ref.importance(k, q, spec)[h], pooled, rtol=1e-12)
        np.testing.assert_allclose(ref.redundancy(k, spec)[h], redundant, rtol=1e-12)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_reference_matrix_equals_linear_form(reference: bool, threshold: float) -> None:
    spec = ref.Spec(threshold=threshold, reference=reference)
    k, _ = random_kq(np.random.default_rng(2), 150, 2, 1, 32, 8)
    np.testing.assert_allclose(ref.redundancy(k, spec), ref.redundancy_linear(k, spec), rtol=1e-10)


def test_reference_mode_zeroes_column_0_like_a_masked_argmax() -> None:
    """The published code takes max(j if c > T else 0) per row, so no hit means column 0: written so here."""
    spec = ref.Spec(threshold=0.5, reference=True)
    k, _ = random_kq(np.random.default_rng(3), 120, 3, 1, 64, 8)
    for h in range(3):
        khat = k[:, h].astype(np.float64)
        khat /= np.linalg.norm(khat, axis=1, keepdims=True)
        c = khat @ khat.T * (1 - np.eye(120))
        last = np.where(c > 0.5, np.arange(120), 0).max(axis=1)
        assert (last == 0).any() and (last > 0).any()  # the case is exercised
        c[np.arange(120), last] = 0
        e = np.exp(c.mean(axis=0))
        np.testing.assert_allclose(ref.redundancy(k, spec)[h], e / e.sum(), rtol=1e-12)
    sane = ref.redundancy(k, replace(spec, reference=False))
    assert (np.abs(ref.redundancy(k, spec) - sane)[:, 0] > 1e-6).all()


def test_reference_ties_keep_the_lower_index() -> None:
    spec = ref.Spec(budget=8, window=2, pin=1)
    assert ref.top_rows(np.zeros(10), 12, spec).tolist() == [0, 1, 2, 3, 4, 5, 10, 11]


def test_latest_memory_survives_the_later_key() -> None:
    """A similarity seen at an earlier compaction stays although that later key is gone."""
    rng = np.random.default_rng(4)
    k = rng.normal(size=(10, 1, 8))
    k[5] = 2 * k[1]
    pos = same_positions(10, 1)
    aux = ref.latest_update(k, pos, ref.empty_aux(2, 10, 1), 0, ref.Rope())
    assert aux[0, 1, 0] == pytest.approx(1) and aux[0, 9, 0] == ref.MISSING and aux[1, 8, 0] == ref.MISSING
    kept = np.array([0, 1, 2, 3, 4, 6, 7, 8, 9])
    more = np.concatenate([k[kept], rng.normal(size=(3, 1, 8))])
    grown = np.concatenate([aux[:, kept], ref.empty_aux(2, 3, 1)], axis=1)
    again = ref.latest_update(more, np.zeros((12, 1), int), grown, 9, ref.Rope())
    assert again[0, 1, 0] == pytest.approx(1)
    assert (np.diff(again, axis=0) <= 0).all()


def test_comparison_accepts_near_ties_only() -> None:
    spec = ref.Spec(policy="streaming", budget=6, window=2, pin=1)
    k, q = np.ones((20, 1, 4)), np.ones((2, 1, 4))
    good = ref.select(k, q, spec).kept
    ref.check_kept(good, k, q, spec)
    for bad in (
        [0, 14, 16, 17, 18, 19],
        [0, 15, 16, 17, 17, 19],
        [1, 15, 16, 17, 18, 19],
        [0, 15, 16, 17, 18],
    ):
        with pytest.raises(AssertionError):
            ref.check_kept([np.array(bad)], k, q, spec)
    tied = ref.Spec(policy="snapkv", budget=6, window=2, pin=1)
    tally = ref.Tally()
    ref.check_kept([np.array([0, 4, 5, 6, 18, 19])], k, q, tied, tally=tally)
    assert (tally.heads, tally.near_ties) == (1, 1)


# --- the engine's selection -----------------------------------------------------------------------

ROPE_64 = ref.Rope(n_rot=64, neox=True)

# n, n_head_kv, group, d, key type
SHAPES = [
    (65, 1, 1, 64, "f32"),
    (192, 3, 3, 64, "f16"),
    (257, 2, 8, 128, "bf16"),
    (300, 2, 5, 80, "f32"),
    (333, 4, 4, 96, "q8_0"),
    (384, 2, 7, 64, "q4_0"),
    (640, 3, 3, 64, "q8_0"),
    (511, 1, 6, 128, "q4_0"),
    (200, 5, 2, 80, "bf16"),
    (129, 2, 1, 96, "f16"),
]


def compactions(
    spec: ref.Spec, n: int, n_head_kv: int, group: int, d: int, type_k: str, rounds: int = 3
) -> tuple[ref.Tally, list[float]]:
    """Compact, append new keys, compact again: engine against reference each time, on the same inputs."""
    rng = np.random.default_rng([n, d, group])
    k, q = random_kq(rng, n, n_head_kv, group, d, spec.window)
    k = dequantised(k, type_k)
    pos, n_old, next_pos = same_positions(n, n_head_kv), 0, n
    aux = ref.empty_aux(spec.n_aux, n, n_head_kv).astype(np.float32)
    stats = np.zeros((n_head_kv * group, spec.n_stats(d)), np.float32)
    v = random_v(rng, n, n_head_kv, d, type_k)
    tally, worst = ref.Tally(), []
    for _ in range(rounds):
        got = native_select(
            k, q, spec, pos, aux, n_old, type_k=type_k, v=v, stats=stats, type_v=type_k, n_threads=2
        )
        right = ref.check_kept(got.kept, k, q, spec, pos, aux, n_old, tally=tally, v=v, stats=stats)
        if right.aux is not None:
            np.testing.assert_allclose(got.aux, right.aux, atol=3e-6)
        if right.stats is not None:
            np.testing.assert_allclose(got.stats, right.stats, rtol=1e-5, atol=1e-5)
            stats = got.stats
        past = slice(spec.pin, n - spec.window)
        scale = np.abs(right.score).max(axis=1, keepdims=True)
        worst.append(float(np.max(np.abs(got.score[:, past] - right.score[:, past]) / scale)))
        heads = np.arange(n_head_kv)
        rows = got.kept.T  # [budget, n_head_kv]
        n_old, grow = spec.budget, n - spec.budget
        fresh, q = random_kq(rng, grow, n_head_kv, group, d, spec.window)
        fresh[: grow // 2] += k[:: max(1, n // grow)][: grow // 2]  # relatives of older keys
        k = np.concatenate([k[rows, heads], dequantised(fresh, type_k)])
        pos = np.concatenate([pos[rows, heads], same_positions(grow, n_head_kv) + next_pos]).astype(np.int32)
        v = np.concatenate([v[rows, heads], random_v(rng, grow, n_head_kv, d, type_k)])
        aux = np.concatenate([got.aux[:, rows, heads], ref.empty_aux(spec.n_aux, grow, n_head_kv)], axis=1)
        next_pos += grow
    return tally, worst


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("n", "n_head_kv", "group", "d", "type_k"), SHAPES)
def test_first_and_later_compactions(
    n: int, n_head_kv: int, group: int, d: int, type_k: str, policy: str
) -> None:
    rope = replace(ROPE_64, n_rot=d) if policy == "latest" else ref.Rope()
    spec = ref.Spec(policy, budget=n * 2 // 3, scale=1 / math.sqrt(d), rope=rope, n_sim=1 + n % 4)
    tally, worst = compactions(spec, n, n_head_kv, group, d, type_k)
    assert max(worst) < 1e-5
    assert tally.near_ties <= tally.heads / 8


@pytest.mark.parametrize(
    "change",
    [
        {"reference": True, "pin": 0},
        {"reference": True, "pin": 4},
        {"window": 1},
        {"window": 64, "budget": 100},
        {"recent": 40},
        {"recent": 4096},  # half of the budget
        {"recent": 64, "pin": 100},  # what the pinned rows leave
        {"recent": 3},  # the window
        {"pin": 0},
        {"pin": 100},
        {"pool": 1},
        {"pool": 21},
        {"budget": 13},  # one slot beside 8 + 4
        {"lam": 0.0},
        {"lam": 1.0},
        {"lam": 0.5, "threshold": 0.3},
        {"threshold": 0.95},
        {"threshold": 0.0},
        {"softcap": 1.5},
        {"scale": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("policy", ["rkv", "latest"])
def test_parameters(policy: str, change: dict[str, object]) -> None:
    base = ref.Spec(policy, budget=128, scale=0.125, rope=ROPE_64)
    if policy == "latest" and "reference" in change:
        k, q = random_kq(np.random.default_rng(0), 200, 2, 4, 64, 8)
        with pytest.raises(NativeError, match="reference"):  # the authors' code knows no `latest`
            native_select(k, q, replace(base, reference=True), pos=same_positions(200, 2))
        return
    tally, worst = compactions(replace(base, **change), 200, 2, 4, 64, "f32", rounds=2)  # type: ignore[arg-type]
    assert max(worst) < (1e-4 if change == {"scale": 3.0} else 1e-5)
    assert tally.near_ties <= 1


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    policy = data.draw(st.sampled_from(POLICIES))
    window = data.draw(st.integers(1, 12))
    pin = data.draw(st.integers(0, 6))
    budget = window + pin + data.draw(st.integers(1, 60))
    n = data.draw(st.integers(1, 160))
    n_head_kv, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    d = data.draw(st.sampled_from([8, 24, 64, 80, 96, 128, 256]))
    seed = data.draw(st.integers(0, 2**31))
    n_old = data.draw(st.integers(0, min(n, budget)))
    n_sim = data.draw(st.integers(1, 4))
    rope = ref.Rope(n_rot=data.draw(st.sampled_from([0, 8, d])), neox=data.draw(st.booleans()))
    spec = ref.Spec(
        policy,
        budget,
        window,
        pin,
        data.draw(st.sampled_from([1, 3, 7])),
        scale=d**-0.5,
        rope=rope,
        n_sim=n_sim,
    )
    rng = np.random.default_rng(seed)
    k, q = random_kq(rng, n, n_head_kv, group, d, window)
    pos = np.sort(rng.integers(0, 3000, size=(n, n_head_kv)), axis=0).astype(np.int32)
    aux = ref.empty_aux(n_sim, n, n_head_kv).astype(np.float32)
    aux[:, :n_old] = -np.sort(-rng.uniform(-0.5, 0.9, size=(n_sim, n_old, n_head_kv)), axis=0)
    got = native_select(k, q, spec, pos=pos, aux=aux, n_old=n_old, n_threads=data.draw(st.integers(1, 3)))
    right = ref.check_kept(got.kept, k, q, spec, pos, aux, n_old)
    if right.aux is not None and n > budget:
        np.testing.assert_allclose(got.aux, right.aux, atol=5e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 64])
def test_all_is_kept_up_to_the_budget(policy: str, n: int) -> None:
    spec = ref.Spec(policy, budget=64, scale=0.1)
    k, q = random_kq(np.random.default_rng(n), n, 2, 2, 32, 8)
    got = native_select(k, q, spec, pos=same_positions(n, 2))
    assert [rows.tolist() for rows in got.kept] == [list(range(n))] * 2


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "latest"])
def test_equal_scores_keep_the_lower_index(policy: str) -> None:
    """All keys equal: importance and (for `latest`) similarity are the same for all; rkv penalises alike."""
    spec = ref.Spec(policy, budget=40, scale=0.1)
    k, q = np.ones((90, 2, 64), np.float32), np.ones((8, 4, 64), np.float32)
    got = native_select(k, q, spec, pos=same_positions(90, 2))
    if policy == "rkv":  # the newest copy is spared in every row, but it lies in the window
        assert np.ptp(got.score[:, 4:82]) == 0
    assert [rows.tolist() for rows in got.kept] == [list(range(32)) + list(range(82, 90))] * 2


@pytest.mark.parametrize("policy", POLICIES)
def test_kept_rows_follow_from_the_engines_own_scores(policy: str) -> None:
    """Top by score, ties to the lower index, exactly (pooling makes runs of equal importance)."""
    spec = ref.Spec(policy, budget=100, scale=0.125, pool=15)
    k, q = random_kq(np.random.default_rng(7), 220, 4, 2, 64, 8)
    got = native_select(k, q, spec, pos=same_positions(220, 4))
    for h in range(4):
        np.testing.assert_array_equal(got.kept[h], ref.top_rows(got.score[h, :212], 220, spec))


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "streaming"])
def test_policies_without_memory_ignore_age(policy: str) -> None:
    spec = ref.Spec(policy, budget=100, scale=0.125)
    k, q = random_kq(np.random.default_rng(8), 160, 2, 2, 64, 8)
    first = native_select(k, q, spec, n_old=0)
    later = native_select(k, q, spec, n_old=100)
    np.testing.assert_array_equal(first.kept, later.kept)


def test_threads_do_not_change_the_result() -> None:
    for policy in POLICIES:
        spec = ref.Spec(policy, budget=200, scale=0.125, rope=ROPE_64)
        k, q = random_kq(np.random.default_rng(9), 300, 3, 3, 64, 8)
        runs = [native_select(k, q, spec, pos=same_positions(300, 3), n_threads=t) for t in (1, 2, 5)]
        for run in runs[1:]:
            np.testing.assert_array_equal(run.kept, runs[0].kept)
            np.testing.assert_array_equal(run.score, runs[0].score)


@pytest.mark.parametrize("policy", POLICIES)
def test_zero_and_huge_keys_stay_finite(policy: str) -> None:
    spec = ref.Spec(policy, budget=60, scale=0.125)
    k, q = random_kq(np.random.default_rng(10), 90, 2, 2, 64, 8)
    k[10:20] = 0
    k[30] *= 1e4
    got = native_select(k, q, spec, pos=same_positions(90, 2))
    assert np.isfinite(got.score[:, 4:82]).all()
    ref.check_kept(got.kept, k, q, spec, same_positions(90, 2), rel=1e-4)


BAD_ARGS: list[dict[str, int]] = [
    {"n": 0},
    {"n": -5},
    {"n_head_kv": 0},
    {"n_head": 3},  # not a multiple of 2 KV heads
    {"n_head": 0},
    {"n_embd_head": 0},
    {"n_embd_head": -64},
    {"n_old": -1},
    {"n_old": 91},
    {"type_k": 9999},
    {"type_k": 16},  # IQ2_XXS: no cache type, and ggml aborts without an importance matrix
    {"rope_n_rot": 66},  # wider than the head
    {"rope_n_rot": 7},
]


@pytest.mark.parametrize("change", BAD_ARGS, ids=str)
def test_bad_arguments_are_refused_with_a_message(change: dict[str, int]) -> None:
    spec = ref.Spec("latest" if "rope_n_rot" in change or "n_old" in change else "rkv", budget=60, scale=0.1)
    k, q = random_kq(np.random.default_rng(11), 90, 2, 2, 64, 8)
    with pytest.raises(NativeError, match=r"\w"):
        native_select(k, q, spec, pos=same_positions(90, 2), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["k", "q", "pos", "idx"])
def test_missing_arrays_are_refused(missing: str) -> None:
    spec = ref.Spec("latest", budget=60, scale=0.1, rope=ROPE_64)
    k, q = random_kq(np.random.default_rng(12), 90, 2, 2, 64, 8)
    with pytest.raises(NativeError, match=r"\w"):
        native_select(k, q, spec, pos=same_positions(90, 2), missing=missing)
