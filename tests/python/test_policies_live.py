"""Each policy in a context: what it keeps over several passes, where it is refused, what a state holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine_tools as native
import reference as ref
import reference_policies as others
import states
from compaction import compact_and_check
from engine_tools import Context, Model, NativeError, Options
from families import sinks_of
from test_policies import NAMES, spec_of
from tiny_families import write_family
from tiny_models import Shape, write_model

WIDE = Shape(arch="qwen2", n_layer=2, n_head=4, n_head_kv=2, d_head=64)
TOKENS = np.random.default_rng(1).integers(0, 96, size=400).tolist()
VALUES = "latest, values"
EVERY = [*NAMES, "rkv", "snapkv", "latest", VALUES]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(write_model(tmp_path_factory.mktemp("wide") / "wide.gguf", WIDE))
    yield model
    model.close()


def options_of(policy: str, **change: Any) -> Options:
    """Small budgets; rkv, snapkv and latest with a memory, so that all three store floats; VALUES without."""
    if policy == VALUES:
        return options_of("latest", **{"memory": 0.0, "value_weight": 0.4, **change})
    memory: dict[str, Any] = {"memory": 0.9} if policy in ("rkv", "snapkv", "latest") else {}
    spec = spec_of(policy, budget=48, window=6, pin=2, **memory)
    own = {name: change.pop(name) for name in list(change) if hasattr(spec, name)}
    return Options(replace(spec, **own), **{"buffer": 16, "batch": 24, **change})


def begins(context: Context, layer: int, n: int, seq: int = 0) -> bool:
    """Does each head of the layer still hold the first n tokens?"""
    return bool((context.all_positions(layer, seq)[:n] == np.arange(n)[:, None]).all())


CACHES: list[dict[str, Any]] = [
    {"type_k": "f32", "type_v": "f32"},
    {"type_k": "f16", "type_v": "f16"},
    {"flash_attn": True, "type_k": "q8_0", "type_v": "q4_0"},
]


@pytest.mark.parametrize("cache", CACHES, ids=lambda c: c["type_v"])
@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("generic", ["0", "1"])
def test_kept_sets_over_several_compactions(
    wide: Model, policy: str, cache: dict[str, Any], generic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generic: as on a device without kernels."""
    monkeypatch.setenv("RKV_GENERIC", generic)
    tally = ref.Tally()
    stats: dict[int, np.ndarray] = {}
    with Context(wide, options_of(policy, **cache)) as context:
        held, fed = [0] * 2, 0
        for n in (60, 14, 15, 9):
            context.feed(TOKENS[fed : fed + n], last_only=True)
            fed += n
            held = compact_and_check(context, WIDE.rope, held, tally=tally, stats=stats)
    assert tally.heads == 4 * 2 * 2
    assert tally.near_ties <= 2


@pytest.mark.parametrize("policy", EVERY)
def test_uneven_budgets(wide: Model, policy: str) -> None:
    """A layer that loses nothing yet still updates what it stores."""
    tally = ref.Tally()
    stats: dict[int, np.ndarray] = {}
    with Context(wide, options_of(policy, layer_budgets=(64, 24))) as context:
        held, fed = [0] * 2, 0
        for n in (30, 14, 15, 14):
            context.feed(TOKENS[fed : fed + n], last_only=True)
            fed += n
            held = compact_and_check(context, WIDE.rope, held, tally=tally, stats=stats)
    assert held == [64, 24]  # 73 in the last pass
    assert tally.near_ties <= 2


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("generic", ["0", "1"])
def test_most_recent_tokens_of_each_layer(
    wide: Model, policy: str, generic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a narrow layer half of its budget; `rpc` has one number for all layers."""
    monkeypatch.setenv("RKV_GENERIC", generic)
    tally = ref.Tally()
    stats: dict[int, np.ndarray] = {}
    with Context(wide, options_of(policy, recent=20, layer_budgets=(64, 24))) as context:
        held, fed = [0] * 2, 0
        for n in (30, 14, 15, 14):
            context.feed(TOKENS[fed : fed + n], last_only=True)
            fed += n
            held = compact_and_check(context, WIDE.rope, held, tally=tally, stats=stats)
            for layer, n_recent in enumerate((12, 12) if policy == "rpc" else (20, 12)):
                last = np.arange(fed - n_recent, fed)[:, None]
                assert (context.all_positions(layer)[-n_recent:] == last).all()
    assert held == [64, 24]
    assert tally.near_ties <= 2


@pytest.mark.parametrize("policy", EVERY)
def test_sequences_side_by_side(wide: Model, policy: str) -> None:
    """Three in one pass, each with its own pin, keep what each keeps alone."""
    alone = []
    for seq in range(3):
        with Context(wide, options_of(policy, batch=1)) as context:
            assert context.pin(seq * 4)
            context.feed(TOKENS[seq * 90 : seq * 90 + 150])
            alone.append([context.all_positions(il).tolist() for il in range(2)])
    with Context(wide, options_of(policy, batch=1, n_seq=3)) as context:
        assert all(context.pin(seq * 4, seq) for seq in range(3))
        for i in range(150):
            context.decode([(TOKENS[seq * 90 + i], i, seq) for seq in range(3)])
        for seq in range(3):
            assert [context.all_positions(il, seq).tolist() for il in range(2)] == alone[seq]
        assert context.stats.compactions == 3 * 6


@pytest.mark.parametrize("policy", ["h2o", "gkv", "rpc", "chunkkv", "value-aware"])
def test_attention_sinks(policy: str, tmp_path: Path) -> None:
    path = write_family(tmp_path / "sinks.gguf", "window, sinks")
    model, tally = Model(path), ref.Tally()
    try:
        with Context(model, options_of(policy, n_ctx=256)) as context:
            held = [0] * len(context.layers)
            for start in (0, 60, 75):
                context.feed([t % model.n_vocab for t in TOKENS[start : start + (15 if start else 60)]])
                sinks = sinks_of(path)
                held = compact_and_check(context, ref.Rope(), held, tally=tally, sinks=sinks, rotated=False)
    finally:
        model.close()
    assert tally.heads > 0
    assert tally.near_ties <= 1


@pytest.mark.parametrize("policy", ["h2o", "gkv", "rpc", "chunkkv", "keydiff"])
def test_one_latent_key_without_values(policy: str, tmp_path: Path) -> None:
    model, tally = Model(write_family(tmp_path / "mla.gguf", "MLA")), ref.Tally()
    try:
        with Context(model, options_of(policy, n_ctx=256)) as context:
            held = [0] * len(context.layers)
            for start in (0, 60, 75):
                context.feed([t % model.n_vocab for t in TOKENS[start : start + (15 if start else 60)]])
                held = compact_and_check(context, ref.Rope(), held, tally=tally, rotated=False)
    finally:
        model.close()
    assert tally.heads == 9
    assert tally.near_ties <= 1


@pytest.mark.parametrize("policy", EVERY)
def test_a_state_continues_alike(wide: Model, policy: str) -> None:
    """Stored floats, statistics and pins are in it: the next compactions keep the same."""
    options = options_of(policy, n_seq=2, pin=1)
    with Context(wide, options) as a, Context(wide, options) as b:
        assert a.pin(5, 0)
        a.feed(TOKENS[:150], 0)
        a.feed(TOKENS[50:90], 1)
        data = states.save(a, 0)
        assert states.load(b, data, 1) == len(data)
        for seq in (0, 1):  # a sequence of another context, and a copy
            context = (b, a)[seq]
            if seq:
                native.llama_cpp.llama_memory_seq_cp(a.memory, 0, 1, -1, -1)
        a.feed(TOKENS[150:240], 0)
        a.feed(TOKENS[150:240], 1)
        b.feed(TOKENS[150:240], 1)
        mine = states.contents(a, 0)
        assert states.same(mine, states.contents(a, 1))
        assert states.same(mine, states.contents(b, 1))
        assert all(begins(context, il, 5, 1) for il in range(2))


@pytest.mark.parametrize("policy", ["value-aware", "lagkv"])
def test_values_are_refused_where_there_are_none(policy: str, tmp_path: Path) -> None:
    model = Model(write_family(tmp_path / "mla.gguf", "MLA"))
    try:
        with pytest.raises(NativeError, match=f"the policy {policy} is not supported here: .*MLA"):
            Context(model, options_of(policy, n_ctx=256))
    finally:
        model.close()


def test_values_do_not_count_where_there_are_none(tmp_path: Path) -> None:
    model = Model(write_family(tmp_path / "mla.gguf", "MLA"))
    try:
        held = []
        for weight in (0.0, 0.5):
            options = options_of("latest", n_ctx=256, memory=0.0, value_weight=weight)
            with Context(model, options) as context:
                context.feed(TOKENS[:120])
                held.append([context.all_positions(il).tolist() for il in context.layers])
        assert held[0] == held[1]
        assert held[0][0][0] != held[0][0][1]
    finally:
        model.close()


# --- pin ------------------------------------------------------------------------------------------


def test_pin_of_a_sequence(wide: Model) -> None:
    with Context(wide, options_of("snapkv", n_seq=2)) as context:
        assert context.pin(20, 1)
        context.feed(TOKENS[:200], 0)
        context.feed(TOKENS[:200], 1)
        for il in range(2):
            assert begins(context, il, 20, 1)
            assert not begins(context, il, 20, 0)
        assert not context.pin(30, 1)
        assert "compacted with 20 pinned" in native.last_error()
        assert context.pin(3, 1)  # fewer is always possible
        assert context.remove(1, 0, -1)
        context.feed(TOKENS[:200], 1)  # params.pin again
        assert not begins(context, 0, 20, 1)
        assert begins(context, 0, 2, 1)


def test_a_pin_is_forgotten_with_a_single_batch(wide: Model) -> None:
    with Context(wide, options_of("streaming")) as context:
        assert context.pin(20)
        context.feed(TOKENS[:10])
        assert context.remove(0, 0, -1)
        context.feed(TOKENS[:200])
        assert context.positions(0, 0)[2] > 2
        assert context.remove(0, 0, -1)
        assert context.pin(20)
        native.llama_cpp.llama_memory_clear(context.memory, True)
        context.feed(TOKENS[:200])
        assert context.positions(0, 0)[2] > 2


def test_bad_pins_are_refused(wide: Model) -> None:
    with Context(wide, options_of("snapkv", layer_budgets=(60, 30))) as context:
        assert context.pin(30 - 6 - 1)
        assert not context.pin(30 - 6)
        assert native.last_error().startswith("24 pinned cells leave no room in a budget of 30")
        assert not context.pin(1, 5)
        assert "no sequence 5" in native.last_error()
        context.feed(TOKENS[:200])
        assert all(begins(context, il, 23) for il in range(2))


# --- rpc's growth -----------------------------------------------------------------------------------


def test_rpc_grows_to_the_budget(wide: Model) -> None:
    """After each buffer of 16 tokens one in 4 of them more is kept: 12 + 6 + 4, then + 4, up to 48."""
    with Context(wide, options_of("rpc", growth=4, batch=1)) as context:
        assert context.pin(12)
        sizes, count = [], 0
        for token in TOKENS:
            context.feed([token])
            if context.stats.compactions > count:
                count = context.stats.compactions
                sizes.append(context.used() - 1)
                assert begins(context, 1, 12)
                assert len(context.positions(0, 1)) == context.used()
        assert sizes[:8] == [22, 26, 30, 34, 38, 42, 46, 48]
        assert set(sizes[8:]) == {48}
        assert context.stats.cells == 48 + 16


def test_rpc_growth_over_states_and_long_batches(wide: Model) -> None:
    options = options_of("rpc", growth=4, batch=24)
    with Context(wide, options) as a, Context(wide, options) as b:
        assert a.pin(12)
        a.feed(TOKENS[:70])
        data = states.save(a, 0)
        assert states.load(b, data, 0) == len(data)
        for context in (a, b):
            context.feed(TOKENS[70:200])
            assert context.used() <= 48 + 24
        assert states.same(states.contents(a, 0), states.contents(b, 0))


def test_rpc_compacts_now_while_it_grows(wide: Model) -> None:
    with Context(wide, options_of("rpc", growth=4)) as context:
        context.feed(TOKENS[:10])
        assert not context.compact()
        context.feed(TOKENS[10:18])
        assert context.compact()
        assert context.used() == 6 + 2 + 4
        assert all(len(context.positions(il, 0)) == 12 for il in range(2))


# --- one set for all heads --------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["rkv", "h2o", "streaming", "value-aware"])
def test_shared_heads_keep_the_mean_of_normalised_scores(wide: Model, policy: str) -> None:
    options = options_of(policy, shared_heads=True)
    spec, n_old = options.spec, 0
    with Context(wide, options) as context:
        for start, n in ((0, 60), (60, 15), (75, 15)):
            context.feed(TOKENS[start : start + n])
            before = context.all_positions(0)
            total = np.zeros(context.used() - spec.window)
            for il in range(2):
                mine = replace(spec, scale=context.layers[il].scale, layer=il)
                aux = context.stored(il, spec.n_aux) if spec.n_aux else None
                k, q, v = context.per_head("keys", il), context.queries(il), context.per_head("values", il)
                z = ref.select(k, q, mine, context.all_positions(il), aux, n_old, v).score
                free = z[:, spec.pin :]
                deviation = free.std(axis=1, keepdims=True)
                total += ((z - free.mean(axis=1, keepdims=True)) / deviation).sum(axis=0)
            assert context.compact()
            rows = ref.top_rows(total, len(before), spec)
            for il in range(2):
                np.testing.assert_array_equal(context.all_positions(il), before[rows])
            n_old = len(rows)
        assert context.stats.compactions == 3


def test_shared_heads_need_equal_budgets(wide: Model) -> None:
    with pytest.raises(NativeError, match="budgets must be equal"):
        Context(wide, options_of("rkv", shared_heads=True, layer_budgets=(60, 30)))


# --- given scores -----------------------------------------------------------------------------------


def test_given_scores_are_taken_once(wide: Model) -> None:
    options = options_of("given")
    with Context(wide, options) as context:
        context.feed(TOKENS[:60])
        z = np.random.default_rng(3).normal(size=60)
        assert context.give(1, 0, z)
        assert context.give(1, 1, z[:50])  # the last 10 have none
        context.feed(TOKENS[60:63])
        assert context.compact()
        recent = [0, 1, *range(63 - 46, 63)]
        assert context.positions(0, 0).tolist() == recent
        late = np.concatenate([z[:57], np.zeros(0)])
        kept = ref.top_rows(late, 63, options.spec)
        assert context.positions(1, 0).tolist() == kept.tolist()
        assert set(range(50, 63)) <= set(context.positions(1, 1).tolist())
        best = ref.top_rows(np.concatenate([z[:50], np.full(7, 99.0)]), 63, options.spec)
        assert context.positions(1, 1).tolist() == best.tolist()
        context.feed(TOKENS[63:70])
        before = context.positions(1, 0)
        assert context.compact()
        assert context.positions(1, 0).tolist() == [*before[:2], *before[-46:]]


def test_given_scores_are_checked(wide: Model) -> None:
    with Context(wide, options_of("given")) as context:
        context.feed(TOKENS[:20])
        for layer, head, n, text in (
            (0, 0, 21, "21 scores for 20 cells"),
            (2, 0, 5, "layer 2"),
            (0, 2, 5, "head 2"),
        ):
            assert not context.give(layer, head, np.zeros(n))
            assert text in native.last_error()
    with Context(wide, options_of("rkv")) as context:
        assert not context.give(0, 0, np.zeros(1))
        assert "not to rkv" in native.last_error()


def test_every_policy_is_tested() -> None:
    assert {*others.SCORES, "none", "rkv", "snapkv", "streaming", "latest"} == set(native.POLICY)
