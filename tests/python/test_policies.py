"""rkv_select against numpy under the policies beside the first four, and what the new parameters do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import reference as ref
import reference_policies as others
from engine_tools import NativeError, native_select
from test_selection import SHAPES, compactions, random_kq, random_v, same_positions

ROPE = ref.Rope(n_rot=64, neox=True)
NAMES = [name for name in others.SCORES if name != "given"]


def spec_of(policy: str, d: int = 64, **change: Any) -> ref.Spec:
    """A policy as its paper has it, at a small scale."""
    own: dict[str, dict[str, Any]] = {
        "gkv": {"lam": 0.5, "pool": 1, "memory": 0.8},
        "chunkkv": {"pool": 1},
        "lagkv": {"chunk": 24},
        "value-aware": {"seed": 7, "layer": 3},
        "triattention": {"rope": replace(ROPE, n_rot=d)},
    }
    base = {"scale": 1 / math.sqrt(d), **own.get(policy, {}), **change}
    return ref.Spec(policy, **base)


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize(("n", "n_head_kv", "group", "d", "type_k"), SHAPES)
def test_first_and_later_compactions(
    n: int, n_head_kv: int, group: int, d: int, type_k: str, policy: str
) -> None:
    tally, worst = compactions(spec_of(policy, d, budget=n * 2 // 3), n, n_head_kv, group, d, type_k)
    assert max(worst) < 1e-5
    assert tally.near_ties <= tally.heads / 8


CHANGES: list[tuple[str, dict[str, Any]]] = [
    *[(policy, change) for policy in NAMES for change in ({"pin": 0}, {"pin": 60}, {"window": 1})],
    *[(policy, {"budget": 13}) for policy in NAMES],  # one slot beside 8 + 4
    *[(policy, {"recent": 40}) for policy in NAMES],
    *[(policy, {"recent": 50, "pin": 100}) for policy in NAMES],  # 27 of them: what the pinned rows leave
    *[(policy, {"softcap": 1.5}) for policy in ("h2o", "gkv", "rpc", "chunkkv", "value-aware")],
    *[("gkv", change) for change in ({"lam": 0.0}, {"lam": 1.0}, {"memory": 0.0}, {"memory": 1.0})],
    *[("rpc", change) for change in ({"pool": 1}, {"pool": 15}, {"window": 32})],
    *[("chunkkv", change) for change in ({"chunk": 1}, {"chunk": 7}, {"chunk": 500}, {"pool": 7})],
    *[("lagkv", change) for change in ({"chunk": 1}, {"chunk": 2}, {"chunk": 500})],
    *[("value-aware", {"value_share": share}) for share in (0.0, 0.5, 1.0)],
    ("value-aware", {"seed": 2**32 - 1, "layer": 300}),
    ("triattention", {"rope": replace(ROPE, neox=False)}),
    ("triattention", {"rope": replace(ROPE, n_rot=32)}),
    ("triattention", {"rope": ref.Rope()}),
    ("triattention", {"rope": replace(ROPE, ext_factor=1.0, freq_scale=0.25, n_ctx_orig=4096)}),
    *[(policy, {"memory": share}) for policy in ("rkv", "snapkv", "latest") for share in (0.5, 1.0)],
    ("latest", {"memory": 0.9, "n_sim": 4, "rope": ROPE}),
    *[("latest", {"value_weight": weight, "rope": ROPE}) for weight in (0.2, 1.0)],
    ("latest", {"value_weight": 0.2, "memory": 0.9, "n_sim": 2, "rope": ROPE, "pin": 60}),
]


@pytest.mark.parametrize(("policy", "change"), CHANGES, ids=str)
def test_parameters(policy: str, change: dict[str, Any]) -> None:
    spec = spec_of(policy, **{"budget": 128, **change})
    tally, worst = compactions(spec, 200, 2, 4, 64, "f32")
    assert max(worst) < 1e-5
    assert tally.near_ties <= 2


@pytest.mark.parametrize("policy", ["h2o", "gkv", "rpc", "chunkkv", "keydiff", "triattention"])
def test_equal_scores_keep_the_lower_index(policy: str) -> None:
    spec = spec_of(policy, budget=40, rope=ref.Rope())
    k, q = np.ones((90, 2, 64), np.float32), np.ones((8, 4, 64), np.float32)
    got = native_select(k, q, spec, pos=same_positions(90, 2))
    if policy not in ("rpc", "gkv"):  # mean pooling knows the ends; the sparing of copies the window
        assert np.ptp(got.score[:, 4:82]) < 1e-6
    ref_kept = [ref.top_rows(got.score[h, :82], 90, spec).tolist() for h in range(2)]
    assert [rows.tolist() for rows in got.kept] == ref_kept
    if policy in ("h2o", "chunkkv"):
        assert ref_kept == [list(range(32)) + list(range(82, 90))] * 2


@pytest.mark.parametrize("policy", NAMES)
def test_threads_do_not_change_the_result(policy: str) -> None:
    spec = spec_of(policy, budget=200)
    rng = np.random.default_rng(9)
    k, q = random_kq(rng, 300, 3, 3, 64, 8)
    v = random_v(rng, 300, 3, 64, "f32")
    runs = [native_select(k, q, spec, same_positions(300, 3), n_threads=t, v=v) for t in (1, 2, 5)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.kept, runs[0].kept)
        np.testing.assert_array_equal(run.score, runs[0].score)
        np.testing.assert_array_equal(run.aux, runs[0].aux)
        np.testing.assert_array_equal(run.stats, runs[0].stats)


@pytest.mark.parametrize("policy", NAMES)
def test_zero_and_huge_keys_stay_finite(policy: str) -> None:
    spec = spec_of(policy, budget=60)
    rng = np.random.default_rng(10)
    k, q = random_kq(rng, 90, 2, 2, 64, 8)
    v = random_v(rng, 90, 2, 64, "f32")
    k[10:20], v[5:25] = 0, 0
    k[30] *= 1e4
    got = native_select(k, q, spec, same_positions(90, 2), v=v)
    assert np.isfinite(got.score[:, 4:82]).all()
    ref.check_kept(got.kept, k, q, spec, same_positions(90, 2), rel=1e-4, v=v)


@pytest.mark.parametrize("policy", NAMES)
@pytest.mark.parametrize("n", [1, 8, 9, 12, 13, 64])
def test_all_is_kept_up_to_the_budget(policy: str, n: int) -> None:
    rng = np.random.default_rng(n)
    k, q = random_kq(rng, n, 2, 2, 64, 8)
    got = native_select(
        k, q, spec_of(policy, budget=64), same_positions(n, 2), v=random_v(rng, n, 2, 64, "f32")
    )
    assert [rows.tolist() for rows in got.kept] == [list(range(n))] * 2


def test_memory_keeps_what_one_window_looked_at() -> None:
    """A cell that only the first window's queries ask for: without a memory the second pass drops it."""
    for policy in ("snapkv", "gkv", "h2o"):
        spec = spec_of(policy, budget=40, pin=0, pool=1, scale=1.0, lam=1.0)
        k = np.zeros((80, 1, 64), np.float32)
        k[:, 0, 0] = 1e-3 * np.arange(80)
        k[20, 0, 1] = 12.0
        first, second = np.zeros((2, 8, 1, 64), np.float32)
        first[:, 0, 1] = 1.0
        second[:, 0, 0] = 1.0  # prefers later cells, a little
        kept = {}
        for memory in (0.0, 1.0):
            mine = replace(spec, memory=0.0 if policy == "h2o" else memory)
            got = native_select(k, first, mine, same_positions(80, 1))
            assert 20 in got.kept[0]
            rows = got.kept[0]
            again = np.concatenate([k[rows], k[40:]])
            aux = np.concatenate([got.aux[:, rows], ref.empty_aux(mine.n_aux, 40, 1)], axis=1)
            got = native_select(again, second, mine, same_positions(80, 1), aux, n_old=40)
            kept[memory] = int(np.flatnonzero(rows == 20)[0]) in got.kept[0]
        assert kept == {0.0: policy == "h2o", 1.0: True}, policy


def test_samples_depend_on_the_seed_and_follow_importance() -> None:
    """With one key 4 times as likely as another it is drawn first 4 times as often (Gumbel-top-1)."""
    k, q = np.zeros((11, 1, 64), np.float32), np.zeros((1, 1, 64), np.float32)
    v = np.ones((11, 1, 64), np.float32)
    q[0, 0, 0], k[4, 0, 0] = 1.0, math.log(4.0)
    spec = ref.Spec("value-aware", budget=2, window=1, pin=0, pool=1, value_share=0.0)
    drawn = [
        int(native_select(k, q, replace(spec, seed=seed), same_positions(11, 1), v=v).kept[0, 0])
        for seed in range(2600)
    ]
    counts = np.bincount(drawn, minlength=10)
    assert abs(counts[4] - 800) < 4 * math.sqrt(800)  # 4 of 13
    assert (np.abs(np.delete(counts, 4) - 200) < 4 * math.sqrt(200)).all()
    by_layer = [
        native_select(k, q, replace(spec, layer=i), same_positions(11, 1), v=v).score for i in range(2)
    ]
    assert (by_layer[0][:, :10] != by_layer[1][:, :10]).all()


def test_noise_belongs_to_a_token_not_to_its_row() -> None:
    rng = np.random.default_rng(4)
    k, q = random_kq(rng, 120, 2, 2, 64, 8)
    k[:112] = k[0]  # the same importance everywhere
    v = np.ones((120, 2, 64), np.float32)
    spec = spec_of("value-aware", budget=60, value_share=0.0)
    pos = same_positions(120, 2)
    got = native_select(k, q, spec, pos, v=v).score[:, :112]
    flipped = native_select(k, q, spec, pos[::-1].copy(), v=v).score[:, :112]
    np.testing.assert_allclose(got[:, 8:], flipped[:, 8:][:, ::-1], rtol=1e-6)


def test_the_longest_values_are_kept() -> None:
    rng = np.random.default_rng(5)
    k, q = random_kq(rng, 120, 2, 2, 64, 8)
    v = random_v(rng, 120, 2, 64, "f32")
    spec = spec_of("value-aware", budget=62, value_share=0.2)  # 10 of 50
    for seed in range(5):
        got = native_select(k, q, replace(spec, seed=seed), same_positions(120, 2), v=v)
        for h in range(2):
            longest = 4 + np.argsort(-np.linalg.norm(v[4:112, h], axis=1))[:10]
            assert set(longest) <= set(got.kept[h])


def test_given_scores_decide() -> None:
    k, q = random_kq(np.random.default_rng(6), 90, 2, 2, 64, 8)
    z = np.random.default_rng(7).normal(size=(1, 90, 2)).astype(np.float32)
    spec = ref.Spec("given", budget=40)
    got = native_select(k, q, spec, same_positions(90, 2), z)
    for h in range(2):
        np.testing.assert_array_equal(got.kept[h], ref.top_rows(z[0, :82, h].astype(float), 90, spec))


@pytest.mark.parametrize(
    ("change", "native", "text"),
    [
        ({"policy": "h2o", "memory": 0.5}, {}, "h2o has no memory"),
        ({"policy": "streaming", "memory": 0.5}, {}, "streaming has no memory"),
        ({"policy": "rkv", "memory": 1.5}, {}, "memory must be 0 to 1"),
        ({"policy": "chunkkv", "chunk": 5000}, {}, "chunk must be"),
        ({"policy": "value-aware", "value_share": 2.0}, {"v": True}, "value_share must be"),
        ({"policy": "value-aware"}, {}, "values are missing"),
        ({"policy": "lagkv"}, {}, "values are missing"),
        ({"policy": "lagkv"}, {"v": True, "n_embd_head_v": 0}, "values of length 0"),
        ({"policy": "lagkv"}, {"v": True, "type_v": "q8_0", "n_embd_head_v": 33}, "values of length 33"),
        ({"policy": "triattention", "rope": ROPE}, {"missing": "pos"}, "positions are missing"),
    ],
    ids=str,
)
def test_refusals_are_one_line(change: dict[str, Any], native: dict[str, Any], text: str) -> None:
    k, q = random_kq(np.random.default_rng(11), 90, 2, 2, 64, 8)
    if native.pop("v", False):
        native["v"] = k
    with pytest.raises(NativeError, match=text) as caught:
        native_select(k, q, ref.Spec(**{"budget": 60, **change}), same_positions(90, 2), **native)
    assert "\n" not in str(caught.value)
