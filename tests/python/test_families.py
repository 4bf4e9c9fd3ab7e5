"""Model families: eviction in the full-attention part, refusals, operations on memories of several parts."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Iterator
from ctypes import byref
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import arch_report
import engine_tools as native
import reference as ref
import states
import tiny_models
from compaction import compact_and_check
from engine_tools import Context, Model, NativeError, Options
from families import SMALL, Report, check_compactions, check_model, governed, sinks_of
from llamas import under, write_unsupported
from rkv_local import KVBudget, Llama, ModelShape, RKVError, _native, plan
from rkv_local.probe import MAIN, Probe, Setting
from tiny_families import KINDS, LFM2, N_HEAD, N_VOCAB, write_family

import llama_cpp  # isort: skip  (engine_tools says which library it loads)

RIGHT = {
    "window, soft-cap": "sliding window",
    "window, sinks": "sliding window",
    "window, shared layers": "sliding window, shared layers",
    "hybrid": "hybrid",
    "MLA": "MLA",
    "M-RoPE": "attention",
    "norm after RoPE": "attention",
    "draft head": "MLA",
}
REFUSED = {
    "window only": "every attention layer has a sliding window",
    "indexer": "has an indexer",
    "diffusion": "not causal",
    "encoder": "has an encoder",
    "mpt": "ALiBi",
    "mamba": "recurrent",
}
TOKENS = [int(t) for t in np.random.default_rng(5).integers(1, N_VOCAB, 500)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Model, Path]]]:
    """Every kind of tiny_families.py, and two of llamas.py."""
    folder, out = tmp_path_factory.mktemp("families"), {}
    for kind in [*KINDS, "mpt", "mamba"]:
        write = write_family if kind in KINDS else write_unsupported
        path = write(folder / f"{kind.replace(' ', '_')}.gguf", kind)
        out[kind] = (Model(path), path)
    yield out
    for model, _ in out.values():
        model.close()


@pytest.mark.parametrize("kind", RIGHT)
def test_family_is_right(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """families.py says what is checked; scripts/arch_report.py does the same on llama.cpp's own models."""
    report = check_model(*models[kind])
    assert report.kind == RIGHT[kind]
    assert report.compactions >= 20 and report.heads >= 20 and report.near_ties <= 2
    assert (report.latest == "right") == (kind != "norm after RoPE"), report.latest


@pytest.mark.parametrize("kind", ["window, sinks", "window, soft-cap"])
def test_sinks_and_soft_cap_decide_what_is_kept(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """The reference agrees with them and, in some text of six, not without."""
    model, path = models[kind]
    differs = 0
    for with_them in (True, False):
        for seed in range(6):
            with Context(model, Options(SMALL, 8, 8, n_ctx=512)) as context:
                context.feed([int(t) for t in np.random.default_rng(seed).integers(1, N_VOCAB, 40)])
                if not with_them:
                    for layer in context.layers.values():
                        layer.softcap = 0.0
                sinks = sinks_of(path) if with_them else None
                try:
                    compact_and_check(
                        context, ref.Rope(), [0] * len(context.layers), sinks=sinks, rotated=False
                    )
                except AssertionError:
                    assert not with_them
                    differs += 1
    assert differs > 0


@pytest.mark.parametrize("kind", REFUSED)
def test_family_is_refused_by_name(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    model, _ = models[kind]
    with pytest.raises(NativeError, match=REFUSED[kind]) as caught:
        Context(model, Options(SMALL))
    assert "\n" not in str(caught.value)
    if kind != "encoder":  # nothing of the budget stays behind
        Context(model, Options()).close()


def refusal(model: Model, spec: ref.Spec = SMALL, **cparams: Any) -> str:
    """The reason for which a context with these llama_context_params is refused; "" if it is made."""
    c = llama_cpp.llama_context_default_params()
    c.n_ctx = 512
    for name, value in cparams.items():
        setattr(c, name, value)
    made = native.rkv_init_from_model(model.model, c, byref(native.params(spec, 8, 8)))
    if made:
        llama_cpp.llama_free(made)
        return ""
    return native.last_error()


def test_contexts_that_are_refused(small: Model, models: dict[str, tuple[Model, Path]]) -> None:
    assert not refusal(small)
    assert "draft head" in refusal(models["draft head"][0], ctx_type=1)
    assert "embeddings" in refusal(small, embeddings=True)
    assert "not causal" in refusal(small, attention_type=1)
    assert "set kv_unified to false" in refusal(small, n_seq_max=2, kv_unified=True)


def test_latest_is_refused_where_rope_cannot_be_undone(models: dict[str, tuple[Model, Path]]) -> None:
    """This architecture multiplies its keys by weights after RoPE."""
    model, _ = models["norm after RoPE"]
    assert "the policy latest" in refusal(model, dataclasses.replace(SMALL, policy="latest"))
    with Context(model, Options(SMALL)) as context:
        context.feed(TOKENS[:8])
        with pytest.raises(NativeError, match="cannot be undone"):
            context.per_head("keys_unrotated", 0)


# --- operations on memories of several parts ---


@pytest.mark.parametrize("kind", ["window, soft-cap", "hybrid"])
def test_a_refusal_changes_no_part(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """Copy, shift and removal: what the part with the budget refuses leaves the others as they were."""
    model, _ = models[kind]
    options = Options(SMALL, buffer=8, batch=8, n_ctx=512, n_seq=2)
    with Context(model, options) as one, Context(model, options) as two:
        for context in (one, two):
            for seq in (0, 1):
                context.feed(TOKENS[:60], seq)
        low = llama_cpp
        assert not one.remove(0, 20, -1)
        assert not one.remove(0, 3, 30)
        low.llama_memory_seq_cp(one.memory, 0, 1, 5, 20)
        low.llama_memory_seq_add(one.memory, 0, 0, -1, 4)
        low.llama_memory_seq_div(one.memory, 0, 0, -1, 2)
        assert not low.llama_memory_can_shift(one.memory)
        assert (one.pos_max(0), one.pos_max(1)) == (59, 59)
        for seq in (0, 1):
            np.testing.assert_array_equal(one.feed(TOKENS[60:70], seq), two.feed(TOKENS[60:70], seq))


@pytest.mark.parametrize("kind", ["window, soft-cap", "hybrid"])
def test_copy_and_keep_reach_every_part(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    model, _ = models[kind]
    options = Options(SMALL, buffer=8, batch=8, n_ctx=512, n_seq=3)
    with Context(model, options) as context:
        context.feed(TOKENS[:60], 0)
        context.feed(TOKENS[100:130], 2)
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, 0, 60)  # all of it, spelled out
        assert context.pos_max(1) == 59
        a, b = context.feed(TOKENS[60:100], 0), context.feed(TOKENS[60:100], 1)
        np.testing.assert_array_equal(a, b)
        llama_cpp.llama_memory_seq_keep(context.memory, 1)
        assert [context.pos_max(s) for s in range(3)] == [-1, 99, -1]
        after = context.feed(TOKENS[100:110], 1)
        assert np.isfinite(after).all()
        fresh = context.feed(TOKENS[:8], 0)
    with Context(model, options) as context:
        np.testing.assert_array_equal(context.feed(TOKENS[:8], 0), fresh)


def test_removal_into_a_gone_window_is_refused(models: dict[str, tuple[Model, Path]]) -> None:
    """Before any compaction: the window cache drops what it no longer needs, and says so."""
    model, _ = models["window, soft-cap"]
    spec = dataclasses.replace(SMALL, budget=480)
    options = Options(spec, buffer=16, batch=16, n_ctx=1024)
    with (
        Context(model, options) as context,
        Context(model, dataclasses.replace(options, swa_full=True)) as full,
    ):
        for c in (context, full):
            c.feed(TOKENS[:400])
        assert context.remove(0, 395, -1) and full.remove(0, 395, -1)
        np.testing.assert_allclose(context.feed(TOKENS[395:400]), full.feed(TOKENS[395:400]), atol=1e-4)
        assert full.remove(0, 60, -1)  # a window of full size still has it all
        assert not context.remove(0, 60, -1)
        assert "window" in native.last_error()
        assert context.pos_max() == 399
        assert context.remove(0, 0, -1)
        np.testing.assert_array_equal(context.feed(TOKENS[:8]), Context(model, options).feed(TOKENS[:8]))


@pytest.mark.parametrize("kind", RIGHT)
def test_uneven_budgets(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """Groups of layers with budgets of their own, with cells of the widest never reached by the narrowest."""
    model, path = models[kind]
    budgets = [24 + 8 * (il % 3) for il in range(model.n_layer)]
    options = Options(SMALL, 8, 8, budgets, n_ctx=512)
    check_compactions(model, path, TOKENS, options, Report())


def test_an_image_under_m_rope_is_refused_at_decode(models: dict[str, tuple[Model, Path]]) -> None:
    """Text as embeddings passes; tokens that share a position do not, and nothing changes."""
    model, _ = models["M-RoPE"]
    n, d = 4, 64
    with Context(model, Options(SMALL, buffer=8, batch=8, n_ctx=512)) as context:
        context.feed(TOKENS[:40])
        batch = llama_cpp.llama_batch_init(n * 4, d, 1)
        positions = (llama_cpp.llama_pos * (4 * n))()
        kept, batch.pos = ctypes.cast(batch.pos, ctypes.c_void_p).value, positions
        batch.n_tokens = n
        for i in range(n):
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            positions[i] = 40
            positions[n + i], positions[2 * n + i] = 40 + i // 2, 40 + i % 2
        for i in range(n * d):
            batch.embd[i] = 0.01 * i
        assert llama_cpp.llama_decode(context.ctx, batch) == 1
        assert "image" in native.last_error()
        assert context.pos_max() == 39
        for i, dim in itertools.product(range(n), range(4)):
            positions[dim * n + i] = 40 + i if dim < 3 else 0
        assert llama_cpp.llama_decode(context.ctx, batch) == 0
        assert context.pos_max() == 43
        batch.pos = ctypes.cast(kept or 0, ctypes.POINTER(llama_cpp.llama_pos))
        llama_cpp.llama_batch_free(batch)
        assert np.isfinite(context.feed(TOKENS[:20])).all()


# --- adapters ---


def test_lora_adapter_equals_merged_weights(tmp_path: Path) -> None:
    """Keys and queries come after the adapter: numpy on merged weights, restricted to the kept cells."""
    shape = tiny_models.SMALL_SHAPE
    model = Model(tiny_models.write_model(tmp_path / "base.gguf", shape))
    rng, names = np.random.default_rng(9), [f"blk.{il}.attn_{x}.weight" for il in range(2) for x in "qkv"]
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    merged = tiny_models.weights(shape)
    for name in names:
        out, inp = merged[name].shape
        a, b = (
            rng.normal(size=(4, inp)).astype(np.float32) / 4,
            rng.normal(size=(out, 4)).astype(np.float32) / 4,
        )
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
        merged[name] += b @ a  # alpha over rank is 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    adapter = llama_cpp.llama_adapter_lora_init(model.model, str(tmp_path / "lora.gguf").encode())
    assert adapter
    forward = tiny_models.Forward(shape)
    plain = tiny_models.Forward(shape)
    forward.w = {name: tensor.astype(np.float64) for name, tensor in merged.items()}
    tokens = [t % shape.n_vocab for t in TOKENS[:120]]
    with Context(model, Options(SMALL, buffer=8, batch=8, n_ctx=512)) as context:
        adapters = (type(adapter) * 1)(adapter)
        scales = (native.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context.ctx, adapters, 1, scales) == 0
        differs = False
        for token in tokens:
            got = context.feed([token])[0]
            for il, head in itertools.product(range(2), range(2)):  # the newest is added by feed()
                forward.restrict(il, head, context.positions(il, head)[:-1])
            want = forward.feed(token)
            np.testing.assert_allclose(got, want, atol=2e-3)
            differs = differs or not np.allclose(got, plain.feed(token), atol=2e-2)
        assert differs and context.stats.compactions >= 8
    model.close()


# --- scripts/arch_report.py ---


def test_report_names_each_result(models: dict[str, tuple[Model, Path]], tmp_path: Path) -> None:
    found = {kind: arch_report.run_one(models[kind][1]) for kind in ("hybrid", "mpt")}
    (tmp_path / "garbage.gguf").write_bytes(b"GGUF" + bytes(100))
    found["garbage"] = arch_report.run_one(tmp_path / "garbage.gguf")
    assert [r["result"] for r in found.values()] == ["right", "refused", "not loaded"]
    rows = arch_report.rows_of(arch_report.report(found))
    assert "| hybrid | hybrid | 2 of 3 | right |" in rows
    assert "| mpt |  |  | refused: the model has ALiBi position biases |" in rows


def test_the_table_has_nothing_wrong() -> None:
    """Of llama.cpp's own models; `arch_report.py --check` says whether it is still so."""
    rows = [row.split(" | ") for row in arch_report.rows_of(arch_report.TABLE.read_text(encoding="utf-8"))]
    results = [row[3].split(" |")[0] for row in rows if len(row) == 4 and row[3] != "result |"]
    assert len(results) >= 128
    assert all(result.startswith(("right", "refused: ")) for result in results)


# --- sizes ---

TINY = KVBudget(budget=64, buffer=32, batch=32)
OTHERS = {  # layers under the budget, and the rest of the cache
    "window, soft-cap": "2 layers + windows",
    "window, sinks": "1 layer + windows",
    "window, shared layers": "2 layers + windows",
    "hybrid": "2 layers + states",
    "draft head": "2 layers",
    "MLA": "3 layers",
}


@pytest.mark.parametrize("setting", [Setting(kv=TINY), Setting(kv=TINY, swa_full=True), Setting(kv=None)])
@pytest.mark.parametrize("kind", RIGHT)
def test_a_plan_is_what_a_llama_takes(
    models: dict[str, tuple[Model, Path]], kind: str, setting: Setting
) -> None:
    path, setting = models[kind][1], dataclasses.replace(setting, n_ctx=2048, n_threads=1, n_threads_batch=1)
    if kind == "norm after RoPE" and setting.kv is not None:  # the default policy is refused
        setting = dataclasses.replace(setting, kv=under(setting.kv, "rkv"))
    with Probe(path) as probe:
        measured = probe.measure(setting)
    with Llama(path, verbose=False, **setting.arguments()) as llama:
        real, stats = _native.memory(llama.ctx), llama.kv_stats()
        full_windows = llama.context_params.swa_full
    part = measured.parts[MAIN]
    assert part.kv == sum(m.cache for m in real)
    assert part.compute == sum(m.compute + m.temporary for m in real)
    assert full_windows == (setting.kv is None or setting.swa_full is True)
    # K, V and rings of what the budget governs, and the other parts
    governed = stats.bytes_kv + measured.rings
    assert governed <= part.kv and (governed == part.kv or kind.startswith(("window", "hybrid")))
    if setting.kv is not None:
        assert 0 < measured.rings < stats.bytes_kv


@pytest.mark.parametrize("kind", OTHERS)
def test_the_line_counts_the_layers_under_the_budget(
    models: dict[str, tuple[Model, Path]], kind: str
) -> None:
    path = models[kind][1]
    assert f"(96 cells × {OTHERS[kind]})" in plan(path, "2GiB", kv=TINY).line()
    full = plan(path, "2GiB", kv=None, n_ctx=2048)
    known = kind not in ("window, shared layers", "draft head")
    assert full.kv_layers == (2 if kind == "hybrid" else KINDS[kind][1]) * known
    assert ("windows" in full.kv_others, "states" in full.kv_others) == (False, kind == "hybrid")


@pytest.mark.parametrize("n_head", [[N_HEAD, 0, N_HEAD], N_HEAD])
def test_heads_that_differ_from_layer_to_layer(
    n_head: int | list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's metadata has no arrays: the shape of a Llama comes from its file."""
    arch, n_layer, _, layer, globally = KINDS["hybrid"]
    monkeypatch.setitem(
        KINDS, "hybrid", (arch, n_layer, LFM2 | {"attention.head_count": n_head}, layer, globally)
    )
    path = write_family(tmp_path / "hybrid.gguf", "hybrid")
    with Llama(path, kv=TINY, n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False) as llama:
        assert llama.shape == ModelShape.of(path)
        assert llama.shape.n_head_kv == (N_HEAD, 0, N_HEAD)
        llama.eval(TOKENS[:150])
        stats = llama.kv_stats()
        assert stats.compactions > 0
        assert llama.kv_kept(0, 0).size == llama.kv_kept(2, N_HEAD - 1).size == llama.kv_used()
        with pytest.raises(IndexError, match="layer 1 has no KV heads"):
            llama.kv_kept(1, 0)
        assert stats.bytes_kv < TINY.bytes_for(llama) == TINY.bytes_for(path) <= stats.bytes
        rings = TINY.bytes_for(llama) - stats.bytes_kv
    with Probe(path) as probe:
        assert probe.measure(Setting(kv=TINY)).rings == rings


@pytest.mark.parametrize(
    ("value", "says"),
    [("x", "must be two numbers, budget:buffer"), ("10:5", "a budget of 10 cells leaves no")],
)
def test_a_bad_forced_budget_says_why(
    models: dict[str, tuple[Model, Path]], monkeypatch: pytest.MonkeyPatch, value: str, says: str
) -> None:
    path = models["hybrid"][1]
    monkeypatch.setenv("RKV_FORCE_BUDGET", value)
    with pytest.raises(RKVError, match=f"RKV_FORCE_BUDGET.*{says}"):
        Llama(path, kv=None, verbose=False)
    with Probe(path) as probe, pytest.raises(RKVError, match=f"RKV_FORCE_BUDGET.*{says}"):
        probe.measure(Setting(kv=None))
    monkeypatch.delenv("RKV_FORCE_BUDGET")
    with pytest.raises(RKVError, match="could not make a context for"):  # not that reason again
        Llama(path, kv=None, type_k="q8_0", flash_attn=True, verbose=False)  # heads of 16, blocks of 32


# --- states ---


def _after(context: Context) -> bytes:
    """Logits of tokens that follow, through further compactions."""
    return context.feed(TOKENS[200:260], chunk=1).tobytes()


@pytest.mark.parametrize("seq", [states.WHOLE, 0])
@pytest.mark.parametrize("kind", [k for k in RIGHT if k != "draft head"])
def test_a_compressed_state_comes_back(models: dict[str, tuple[Model, Path]], kind: str, seq: int) -> None:
    """All parts of the memory: what the budget governs bit by bit; cut short anywhere, nothing or all.

    llama.cpp restores a window's cells in another order than they lay in, so that sums round differently.
    """
    model, _ = models[kind]
    options = Options(SMALL, 8, 8, n_ctx=512)

    def same_logits(context: Context) -> bool:
        got = context.feed(TOKENS[200:260], chunk=1)
        if not kind.startswith("window"):
            return got.tobytes() == expected.tobytes()
        return np.allclose(got, expected, atol=2e-3) and bool((got.argmax(1) == expected.argmax(1)).all())

    with Context(model, options) as context, Context(model, options) as other:
        context.feed(TOKENS[:200], chunk=8, last_only=True)
        assert context.stats.compactions > 5
        data, held, last = states.save(context, seq), governed(context), context.pos_max()
        expected = context.feed(TOKENS[200:260], chunk=1)
        assert np.std(expected) > 0.01 and len(set(expected.argmax(1).tolist())) > 3
        assert states.load(other, data, seq) == len(data)
        assert states.same(governed(other), held) and other.pos_max() == last
        assert same_logits(other)
        for cut in np.linspace(1, len(data) - 1, 23).astype(int):
            before = other.pos_max()
            assert states.load(other, data[:cut], seq) == 0
            assert other.pos_max() in (-1, before)
            if other.pos_max() == -1:  # empty in all parts: it can be used
                assert other.used() == 0
                other.feed(TOKENS[:8])
            assert other.remove(0, -1, -1)
            assert states.load(other, data, seq) == len(data)
        assert same_logits(other)


COMPOSITE = ["window, sinks", "hybrid"]


def _two(model: Model) -> Context:
    context = Context(model, Options(SMALL, 8, 8, n_ctx=512, n_seq=2))
    for seq in range(2):
        context.feed(TOKENS[seq : 150 + seq], seq, chunk=8, last_only=True)
    return context


@pytest.mark.parametrize("kind", COMPOSITE)
def test_damage_in_a_later_sequence_leaves_nothing(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """Each single byte of the second sequence's head: as it was, or empty in every part."""
    model, _ = models[kind]
    with _two(model) as context, Context(model, context.options) as new:
        data, before = states.save(context), [governed(context, s) for s in range(2)]
        fresh = [new.feed(TOKENS[:9], s) for s in range(2)]
        at = [start for start, _ in states.sealed_parts(data, states.WHOLE, SMALL.window)][3]
        for i in range(at, at + 40):
            damaged = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
            assert states.load(context, damaged) == 0
            for s in range(2):
                assert context.used(s) == 0 and context.pos_max(s) == -1
                np.testing.assert_array_equal(context.feed(TOKENS[:9], s), fresh[s])
        assert states.load(context, data) == len(data)
        assert all(states.same(governed(context, s), before[s]) for s in range(2))


@pytest.mark.parametrize("kind", COMPOSITE)
def test_a_copy_is_saved_as_it_will_be(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """llama.cpp copies rows at the next decode; a state before that holds, or replaces, what they will be."""
    model, _ = models[kind]
    with _two(model) as context, _two(model) as other:
        for each in (context, other):
            each.remove(1, -1, -1)
            llama_cpp.llama_memory_seq_cp(each.memory, 0, 1, -1, -1)
        data = states.save(context, 1)
        expected = context.feed(TOKENS[150:160], 1, chunk=1)
        assert states.load(other, data, 1) == len(data)
        np.testing.assert_allclose(other.feed(TOKENS[150:160], 1, chunk=1), expected, atol=2e-3)


@pytest.mark.parametrize("kind", COMPOSITE)
def test_a_damaged_part_of_a_state_leaves_nothing(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    model, _ = models[kind]
    flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
    with _two(model) as context:
        size = llama_cpp.llama_state_seq_get_size_ext(context.ctx, 0, flags)
        buffer = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(context.ctx, buffer, size, 0, flags) == size
        held = governed(context, 1)
        assert llama_cpp.llama_state_seq_set_data_ext(context.ctx, buffer, size - 50, 0, flags) == 0
        assert "the state's window or recurrent part" in native.last_error()
        assert context.used(0) == 0 and context.pos_max(0) == -1
        assert states.same(governed(context, 1), held)


@pytest.mark.parametrize("kind", COMPOSITE)
def test_part_of_a_compressed_state(models: dict[str, tuple[Model, Path]], kind: str) -> None:
    """LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY: the window or the recurrent part by itself, to go back."""
    model, _ = models[kind]
    with Context(model, Options(SMALL, 8, 8, n_ctx=512)) as context:
        context.feed(TOKENS[:200], chunk=8, last_only=True)
        while context.used() > SMALL.budget + 1:  # compacted just before the last token
            context.feed(TOKENS[:1])
        start = context.pos_max() + 1
        flags = llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        size = llama_cpp.llama_state_seq_get_size_ext(context.ctx, 0, flags)
        buffer = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_seq_get_data_ext(context.ctx, buffer, size, 0, flags) == size
        first = context.feed(TOKENS[200:208], chunk=8)
        assert llama_cpp.llama_state_seq_set_data_ext(context.ctx, buffer, size, 0, flags) == size
        removed = context.remove(0, start, -1)
        assert removed, native.last_error()
        np.testing.assert_allclose(context.feed(TOKENS[200:208], chunk=8), first, atol=2e-3)
