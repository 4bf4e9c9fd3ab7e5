"""Saving and restoring a compressed cache: bit-exact, or refused with nothing half loaded."""

from __future__ import annotations

import ctypes
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import engine_tools as native
import reference as ref
from engine_tools import Context, Model, Options
from states import WHOLE, contents, is_empty, load, load_file, same, save, sealed, sealed_parts
from tiny_models import SMALL_SHAPE, Shape, write_model

SPEC = ref.Spec(budget=20, window=4, pin=2)
BASE = Options(SPEC, buffer=8, batch=8, n_ctx=256, n_seq=3, n_threads=1)
TOKENS = np.random.default_rng(5).integers(0, 32, size=400).tolist()


def filled(model: Model, options: Options = BASE) -> Context:
    """Sequence 0 compacted many times and cut, 1 ragged, 2 with a hole or empty."""
    context = Context(model, options)
    context.feed(TOKENS[:93], 0)
    assert context.remove(0, 91, -1)
    if options.n_seq > 1:
        context.feed(TOKENS[100:146], 1)
    if options.n_seq > 2:
        context.feed(TOKENS[200:212], 2)
        assert context.remove(2, 3, 5)
    return context


def continue_alike(a: Context, b: Context, seq_a: int, seq_b: int, n: int = 60) -> None:
    """The same tokens give the same bits, and later compactions keep the same cells."""
    for start in range(0, n, 6):
        part = TOKENS[300 + start : 306 + start]
        np.testing.assert_array_equal(a.feed(part, seq_a), b.feed(part, seq_b))
    for layer in range(a.model.n_layer):
        np.testing.assert_array_equal(a.all_positions(layer, seq_a), b.all_positions(layer, seq_b))


def as_before(context: Context) -> None:
    """A refusal changed nothing: it goes on as one that saw none."""
    with filled(context.model, context.options) as fresh:
        continue_alike(context, fresh, 0, 0)


VARIANTS = {
    "rkv": BASE,
    "latest": replace(BASE, spec=replace(SPEC, policy="latest", n_sim=2)),
    "snapkv, by layer": replace(BASE, spec=replace(SPEC, policy="snapkv"), layer_budgets=(20, 31)),
    "latest, by layer": replace(BASE, spec=replace(SPEC, policy="latest"), layer_budgets=(33, 20)),
    "streaming": replace(BASE, spec=replace(SPEC, policy="streaming", pin=0)),
    "flash attention": replace(BASE, flash_attn=True, type_k="f16", type_v="f16"),
    "f16": replace(BASE, type_k="f16", type_v="bf16"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_state_comes_back_bit_exact(small: Model, name: str) -> None:
    options = VARIANTS[name]
    with filled(small, options) as a, Context(small, options) as b:
        b.feed(TOKENS[7:60], 1)  # replaced
        data = save(a)
        assert load(b, data) == len(data)
        assert save(b) == data
        for seq in range(3):
            assert same(contents(a, seq), contents(b, seq))
        for seq in range(3):
            continue_alike(a, b, seq, seq)
        assert a.stats.compactions > b.stats.compactions > 0


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("type_k", ["q8_0", "q4_0"])
def test_quantised_caches(tiny: Model, type_k: str, flash_attn: bool) -> None:
    type_v = type_k if flash_attn else "f16"
    options = replace(BASE, n_seq=1, type_k=type_k, type_v=type_v, flash_attn=flash_attn)
    with filled(tiny, options) as a, Context(tiny, options) as b:
        data = save(a)
        assert load(b, data) == len(data)
        assert same(contents(a, 0), contents(b, 0))
        continue_alike(a, b, 0, 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sequence_goes_to_another_id_beside_others(small: Model, name: str) -> None:
    options = VARIANTS[name]
    with (
        filled(small, options) as a,
        Context(small, replace(options, n_seq=4)) as b,
        Context(small, replace(options, n_seq=4)) as undisturbed,
    ):
        for context in (b, undisturbed):
            context.feed(TOKENS[50:99], 0)
            context.feed(TOKENS[60:170], 3)
        before = contents(b, 0)
        for seq in range(3):
            data = save(a, seq)
            assert load(b, data, 3) == len(data)
            assert same(contents(a, seq), contents(b, 3))
            assert same(contents(b, 0), before)
        assert load(b, save(a, 1), 2) > 0
        continue_alike(a, b, 2, 3)
        continue_alike(a, b, 1, 2)
        continue_alike(b, undisturbed, 0, 0)


def test_files(small: Model, tmp_path: Path) -> None:
    whole, single = str(tmp_path / "whole").encode(), str(tmp_path / "single").encode()
    prompt = (ctypes.c_int32 * 3)(7, 8, 9)
    with filled(small) as a, Context(small, BASE) as b:
        assert llama_cpp.llama_state_save_file(a.ctx, whole, prompt, 3)
        assert (
            llama_cpp.llama_state_seq_save_file(a.ctx, single, 0, prompt, 3)
            == Path(single.decode()).stat().st_size
        )
        read, n = (ctypes.c_int32 * 8)(), ctypes.c_size_t()
        assert llama_cpp.llama_state_load_file(b.ctx, whole, read, 8, ctypes.byref(n))
        assert read[: n.value] == [7, 8, 9]
        assert all(same(contents(a, s), contents(b, s)) for s in range(3))
        assert llama_cpp.llama_state_seq_load_file(b.ctx, single, 2, read, 8, ctypes.byref(n)) > 0
        assert same(contents(a, 0), contents(b, 2))
        continue_alike(a, b, 0, 2)


def test_a_damaged_file_is_refused(small: Model, tmp_path: Path) -> None:
    path = tmp_path / "state"
    prompt, name = (ctypes.c_int32 * 1)(1), str(path).encode()
    with filled(small) as a, filled(small) as b:
        for seq in (WHOLE, 0):
            if seq == WHOLE:
                assert llama_cpp.llama_state_save_file(a.ctx, name, prompt, 1)
            else:
                assert llama_cpp.llama_state_seq_save_file(a.ctx, name, seq, prompt, 1) > 0
            good = path.read_bytes()
            for bad in (good[:-1], good[: len(good) // 2], good[:40], good[:20], good[:13], b""):
                path.write_bytes(bad)
                assert not load_file(b, path, seq)
                assert whole_or_empty(b, a, range(3))
            if seq == WHOLE:
                path.write_bytes(good + b"more")
                assert not load_file(b, path, seq)
                assert native.last_error() == "the state is damaged: more bytes follow it"
                assert all(is_empty(b, s) for s in range(3))
            path.write_bytes(good)
            assert load_file(b, path, seq)
            assert load(b, save(a)) > 0


def whole_or_empty(b: Context, a: Context, seqs: range) -> bool:
    """Each sequence of b is as a's, or it is empty."""
    return all(is_empty(b, s) or same(contents(b, s), contents(a, s)) for s in seqs)


# --- refused by name --------------------------------------------------------------------------------


def spec(**changes: Any) -> dict[str, Any]:
    return {"spec": replace(SPEC, **changes)}


# what differs, and the words of the refusal: saved with ..., this context has ...
CHANGES: dict[str, tuple[dict[str, Any], str, str]] = {
    "budget": (spec(budget=24), "a budget of 20 cells", "24 cells"),
    "layers": ({"layer_budgets": (20, 22)}, "a budget of 20 cells", "layers 0-0: 20, layers 1-1: 22 cells"),
    "buffer": ({"buffer": 6}, "a buffer of 8 tokens", "6 tokens"),
    "policy": (spec(policy="snapkv"), "the policy rkv", "snapkv"),
    "window": (spec(window=5), "a window of 4 tokens", "5 tokens"),
    "pin": (spec(pin=1), "pin 2", "1"),
    "pool": (spec(pool=5), "pool 7", "5"),
    "lambda": (spec(lam=0.5), "lambda 0.100000001", "0.5"),
    "threshold": (spec(threshold=0.25), "threshold 0.5", "0.25"),
    "n_sim": (spec(n_sim=3), "n_sim 1", "3"),
    "reference": (spec(reference=True), "reference off", "on"),
    "K": ({"type_k": "f16"}, "the K cache type f32", "f16"),
    "V": ({"type_v": "f16"}, "the V cache type f32", "f16"),
    "flash attention": ({"flash_attn": True}, "flash attention off", "on"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_setting_is_refused_by_name(small: Model, name: str) -> None:
    change, saved, here = CHANGES[name]
    options = replace(BASE, **change)
    line = f"the state was saved with {saved}, this context has {here}"
    with filled(small) as a, filled(small, options) as b:
        before = [contents(b, s) for s in range(options.n_seq)]
        assert load(b, save(a)) == 0
        assert native.last_error() == line
        assert load(b, save(a, 0), 1) == 0
        assert native.last_error() == line
        assert all(same(contents(b, s), x) for s, x in enumerate(before))
        b.feed(TOKENS[:40], 0)


def test_another_number_of_sequences_is_refused(small: Model) -> None:
    with filled(small) as a, Context(small, replace(BASE, n_seq=2)) as b:
        assert load(b, save(a)) == 0
        assert native.last_error() == "the state holds 3 sequences, this context has 2"
        assert load(b, save(a, 0), 1) > 0


def test_another_model_is_refused_by_name(small: Model, tmp_path: Path) -> None:
    others = {
        "the model shape": replace(SMALL_SHAPE, n_head_kv=1),
        "the RoPE": replace(SMALL_SHAPE, freq_base=500.0),
        "the model llama": replace(SMALL_SHAPE, seed=9),
    }
    with filled(small) as a:
        for words, shape in others.items():
            model = Model(write_model(tmp_path / "other.gguf", shape))
            with filled(model) as b:
                assert load(b, save(a)) == 0
                assert native.last_error().startswith(f"the state was saved with {words} ")
                assert load(b, save(a, 1), 1) == 0
                b.feed(TOKENS[:40], 0)
            model.close()


def test_another_architecture_is_refused(small: Model, tmp_path: Path) -> None:
    model = Model(write_model(tmp_path / "other.gguf", Shape(arch="qwen2")))
    with filled(small) as a, filled(model) as b:
        assert load(b, save(a)) == 0
        assert native.last_error() == "wrong model arch: 'llama' instead of 'qwen2'"
    model.close()


def test_states_with_and_without_a_budget_do_not_mix(small: Model) -> None:
    stock_options = replace(BASE, spec=ref.Spec("none"))
    with filled(small) as a, filled(small, stock_options) as stock:
        for seq in (WHOLE, 0):
            assert load(a, save(stock, seq), seq) == 0
            assert "saved without a budget" in native.last_error()
            assert load(stock, save(a, seq), seq) == 0
            assert native.last_error()
        as_before(a)
        with filled(small, stock_options) as fresh:
            np.testing.assert_array_equal(stock.feed(TOKENS[:8], 1), fresh.feed(TOKENS[:8], 1))


def test_whole_and_single_do_not_mix_and_sequences_are_checked(small: Model) -> None:
    with filled(small) as a:
        single, whole = save(a, 0), save(a)
        body = whole[4 + len("llama") :]
        assert load(a, single[:8] + body, 1) == 0
        assert native.last_error() == "the state holds a whole context, not a single sequence"
        assert load(a, whole[: 4 + len("llama")] + single[8:]) == 0
        assert native.last_error() == "the state holds a single sequence, not a whole context"
        for seq in (3, 99, -5):
            assert load(a, single, seq) == 0
            assert native.last_error() == f"there is no sequence {seq}: the context has 3"
            assert llama_cpp.llama_state_seq_get_size(a.ctx, seq) == 0
        for n in (0, 7, 100, len(single) - 1):
            buffer = (ctypes.c_uint8 * (n + 1))()
            assert llama_cpp.llama_state_seq_get_data(a.ctx, buffer, n, 0) == 0
        as_before(a)


def test_another_n_ctx_or_batch_is_taken_where_it_fits(small: Model) -> None:
    with filled(small) as a:
        with Context(small, replace(BASE, n_ctx=1024, batch=32)) as wider:
            assert load(wider, save(a)) > 0
            assert all(same(contents(a, s), contents(wider, s)) for s in range(3))
            wider.feed(TOKENS[:30], 0, chunk=8)
            wider.feed(TOKENS[:30], 1)
            data = save(wider, 1)
        assert load(a, data, 1) == 0
        assert "the state needs" in native.last_error() and "this context has 28" in native.last_error()
        with Context(small, replace(BASE, n_ctx=512)) as longer:
            longer.feed(TOKENS[:300], 0)
            data = save(longer, 0)
        assert load(a, data, 0) == 0
        assert native.last_error() == "the state reaches position 299, this context ends at 256: raise n_ctx"
        as_before(a)


def test_a_copy_that_still_waits_is_saved_and_not_undone_by_a_restore(small: Model) -> None:
    with filled(small) as a, Context(small, BASE) as b:
        data = save(a, 1)
        llama_cpp.llama_memory_seq_cp(a.memory, 0, 1, -1, -1)
        assert load(b, save(a, 1), 0) > 0
        assert same(contents(b, 0), contents(a, 0))
        llama_cpp.llama_memory_seq_cp(a.memory, 0, 2, -1, -1)
        assert load(a, data, 2) > 0  # the copy must not come later
        a.feed([1], 0)
        with filled(small) as fresh:
            assert same(contents(a, 2), contents(fresh, 1))


def test_a_restored_context_that_never_decoded(small: Model) -> None:
    """Everything works on it: saving, removing, compacting, reading."""
    with filled(small) as a:
        with Context(small, BASE) as b:
            assert load(b, save(a)) > 0 and save(b) == save(a)
            assert b.remove(2, 6, 7) and len(save(b)) == len(save(a))
        with Context(small, BASE) as b:
            assert load(b, save(a)) > 0
            assert b.compact(0) == a.compact(0)
            assert same(contents(a, 0), contents(b, 0))
        with Context(small, BASE) as b:
            assert is_empty(b, 0) and load(b, save(b)) > 0 and is_empty(b, 2)


# --- damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seq", [WHOLE, 0])
def test_every_truncation_is_refused(small: Model, seq: int) -> None:
    with filled(small) as a, filled(small) as b:
        data = save(a, seq)
        lengths = [*range(0, 600), *range(600, len(data), 997), *range(len(data) - 9, len(data))]
        for n in lengths:
            assert load(b, data[:n], seq) == 0, n
            assert native.last_error()
        assert whole_or_empty(b, a, range(3))
        assert load(b, data, seq) == len(data)
        continue_alike(a, b, 0, 0)


@pytest.mark.parametrize("seq", [WHOLE, 0])
def test_every_damaged_byte_is_found(small: Model, seq: int) -> None:
    rng = random.Random(seq)
    with filled(small) as a, filled(small) as b:
        data = save(a, seq)
        start = 8 if seq != WHOLE else 4  # the single sequence's id is not used
        places = [*range(start, 500), *(rng.randrange(500, len(data)) for _ in range(300))]
        for i in places:
            bad = bytearray(data)
            bad[i] ^= 1 << rng.randrange(8)
            assert load(b, bytes(bad), seq) == 0, i
        assert whole_or_empty(b, a, range(3))


def test_a_false_state_with_right_checksums_is_refused(small: Model) -> None:
    """Rows, positions and counters out of range never get in, whatever the checksums say."""
    with filled(small) as a, filled(small) as b:
        data = save(a, 0)
        parts = list(sealed_parts(data, 0, SPEC.window))
        assert sealed(data, parts) == data
        cells, rows = parts[1], parts[2]
        first, end, old = np.frombuffer(data, "<u4", 3, cells[0])
        at_pos = cells[0] + 28 + 4 * SPEC.window
        changes = {
            cells[0]: [1, end, end + 1, 2**31, 2**32 - 1],  # first
            cells[0] + 4: [0, first, end + 1, 2**20, 2**32 - 1],  # end
            cells[0] + 8: [0, end + 1, 2**32 - 1],  # old_end
            cells[0] + 12: [2**31, 2**32 - 1],  # exact
            cells[0] + 16: [2, 2**32 - 1],  # compacted
            cells[0] + 20: [2**31, 2**32 - 2, SPEC.budget],  # pin
            cells[0] + 28: [1, 2**31, 2**32 - 2],  # ring
            at_pos: [2**32 - 1, 2**31, 255],
            at_pos + 8: [0, 255, 2**30, 2**32 - 2],
            cells[1] - 4: [0, 256, 2**32 - 1],
        }
        for at, values in changes.items():
            for value in values:
                bad = bytearray(data)
                bad[at : at + 4] = int(value).to_bytes(4, "little")
                assert load(b, sealed(bytes(bad), parts), 0) == 0, (at - cells[0], value)
        k_and_v = int(end - first) * 2 * SMALL_SHAPE.n_head_kv * SMALL_SHAPE.d_head * 4
        at = rows[0] + k_and_v  # a head's true positions
        assert np.frombuffer(data, "<i4", int(old - first), at)[0] == 0
        for offset, value in ((0, 300), (4, 0), (8, 2**32 - 7), (16, 2**31 - 1)):
            bad = bytearray(data)
            bad[at + offset : at + offset + 4] = value.to_bytes(4, "little")
            assert load(b, sealed(bytes(bad), parts), 0) == 0
            assert native.last_error() == "the state is damaged: a head's positions are not ascending"
        assert same(contents(b, 0), contents(a, 0))
        bad = bytearray(data)
        bad[rows[0] : rows[0] + 64] = b"\xff" * 64  # NaN in K: no crash, whatever it says
        assert load(b, sealed(bytes(bad), parts), 0) == len(data)
        b.feed(TOKENS[:60], 0)
        assert b.compact(0) in (True, False)
        assert same(contents(b, 1), contents(a, 1))
        llama_cpp.llama_memory_clear(b.memory, True)
        assert load(b, data, 0) == len(data)
        continue_alike(a, b, 0, 0)
