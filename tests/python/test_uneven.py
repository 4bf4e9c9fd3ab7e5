"""Attention after compactions equals full attention restricted to what each layer and head keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import reference as ref
from compaction import compact_and_check
from engine_tools import Context, Model, NativeError, Options
from tiny_models import Forward, Shape, write_model

# What numpy's float64 and stock llama.cpp differ by on these models without a budget, times 4 or so: float32,
# and with flash attention a cache rounded to float16 before use.
TOLERANCE = {False: 2e-4, True: 6e-2}
UNIFORM: list[int] = []
UNEVEN = [24, 61, 36]
BUDGETS = {"uniform": UNIFORM, "uneven": UNEVEN, "first-widest": [70, 20, 30]}
SHAPES = {
    "llama": Shape(),
    "llama-factors": Shape(freq_factors=tuple(1 + 0.5 * i for i in range(16)), seed=1),
    "qwen2-mha": Shape(arch="qwen2", n_head_kv=4, d_head=16, seed=2),
    "qwen2-yarn": Shape(arch="qwen2", n_head_kv=1, yarn_factor=4, n_ctx_orig=64, n_ctx=4096, seed=3),
}


def follow(context: Context, forward: Forward, tokens: list[int], chunk: int, seq: int = 0) -> float:
    """Feed both in chunks, handing the engine's kept positions to numpy. Largest logit difference."""
    worst = 0.0
    for i in range(0, len(tokens), chunk):
        start, part = len(forward.keys[0]), tokens[i : i + chunk]
        got = context.feed(part, seq, chunk)
        for layer in range(context.model.n_layer):
            for h in range(context.model.n_head_kv):
                pos = context.positions(layer, h, seq)
                assert (np.diff(pos) > 0).all()
                old, new = pos[pos < start], pos[pos >= start]
                np.testing.assert_array_equal(new, np.arange(start, start + len(part)))
                assert set(old) <= set(forward.visible[layer][h]), "an evicted token came back"
                forward.restrict(layer, h, old)
        right = np.stack([forward.feed(t) for t in part])
        worst = max(worst, float(np.abs(got - right).max()))
    return worst


def expected_cells(budgets: list[int], buffer: int, cells: int, chunks: list[int]) -> list[int]:
    """What each layer holds: compacted when the narrowest is full, before the chunk is placed."""
    held = [0] * len(budgets)
    narrow = int(np.argmin(budgets))
    for n in chunks:
        if held[narrow] >= budgets[narrow] + buffer or held[narrow] + n > budgets[narrow] + cells:
            held = [min(h, b) for h, b in zip(held, budgets, strict=True)]
        held = [h + n for h in held]
    return held


@pytest.mark.parametrize("flash_attn", [False, True])
@pytest.mark.parametrize("budgets", BUDGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_restricted_to_the_kept_cells(
    shape: str, budgets: str, flash_attn: bool, tmp_path: Path
) -> None:
    model = Model(write_model(tmp_path / "m.gguf", SHAPES[shape]))
    tokens = np.random.default_rng(0).integers(0, 96, size=150).tolist()
    spec = ref.Spec("latest" if budgets == "uneven" else "rkv", budget=40, window=6, pin=2)
    options = Options(
        spec,
        16,
        12,
        BUDGETS[budgets],
        flash_attn=flash_attn,
        n_threads=1 + (budgets == "uneven" and shape == "llama"),
    )
    try:
        with Context(model, options) as context:
            forward = Forward(SHAPES[shape])
            worst = follow(context, forward, tokens[:110], 11)
            worst = max(worst, follow(context, forward, tokens[110:], 1))
            assert context.stats.compactions >= 3
            assert worst < TOLERANCE[flash_attn]
            each = BUDGETS[budgets] or [40] * 3
            held = expected_cells(each, 16, 16, [11] * 10 + [1] * 40)
            assert [context.positions(layer, 0).size for layer in range(3)] == held
            assert context.used() == held[int(np.argmax(each))]
            assert context.stats.cells == max(each) + 16
            for layer in range(3):
                pos = context.all_positions(layer)
                np.testing.assert_array_equal(pos[:2], [[0] * model.n_head_kv, [1] * model.n_head_kv])
    finally:
        model.close()


def test_heads_keep_different_tokens(tiny: Model) -> None:
    """The premise: one shared set of cells would not do."""
    with Context(tiny, Options(ref.Spec(budget=40, window=6, pin=2))) as context:
        context.feed(np.random.default_rng(1).integers(0, 96, size=120).tolist())
        kept = {tuple(context.positions(layer, h)) for layer in range(3) for h in range(2)}
        assert len(kept) == 6


@pytest.mark.parametrize("batch", [5, 40])
def test_two_sequences_with_uneven_budgets(tiny: Model, batch: int) -> None:
    """Side by side in one batch, of different lengths, compacted at different times."""
    spec = ref.Spec(budget=0, window=4, pin=1)
    options = Options(replace(spec, budget=30), buffer=10, batch=batch, layer_budgets=[30, 22, 45], n_seq=2)
    rng = np.random.default_rng(5)
    with Context(tiny, options) as context:
        forwards = [Forward(Shape()), Forward(Shape())]
        assert (
            follow(context, forwards[1], rng.integers(0, 96, size=17).tolist(), 5, seq=1) < TOLERANCE[False]
        )
        for step in range(60):
            now = [len(f.keys[0]) for f in forwards]
            sizes = [1 + step % 3, 1 + step % 2]
            rows = [
                (int(rng.integers(96)), now[s] + i, s) for i in range(3) for s in range(2) if i < sizes[s]
            ]
            got = context.decode(rows)
            for s in range(2):
                for layer in range(3):
                    for h in range(2):
                        pos = context.positions(layer, h, s)
                        forwards[s].restrict(layer, h, pos[pos < now[s]])
                mine = [i for i, row in enumerate(rows) if row[2] == s]
                right = np.stack([forwards[s].feed(rows[i][0]) for i in mine])
                assert np.abs(got[mine] - right).max() < TOLERANCE[False]
        assert context.stats.compactions >= 10


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "streaming", "latest"])
@pytest.mark.parametrize("n_sim", [1, 3])
def test_kept_sets_with_uneven_budgets(tiny: Model, policy: str, n_sim: int) -> None:
    """First and later compactions; a layer whose budget exceeds what it holds keeps all."""
    if policy != "latest" and n_sim > 1:
        n_sim = 1
    spec = ref.Spec(policy, budget=30, window=5, pin=3, n_sim=n_sim)
    tally = ref.Tally()
    options = Options(spec, buffer=40, batch=40, layer_budgets=[30, 75, 33])
    with Context(tiny, options) as context:
        held, rng = [0, 0, 0], np.random.default_rng(6)
        for _ in range(4):
            context.feed(rng.integers(0, 96, size=35).tolist())
            held = compact_and_check(context, Shape().rope, held, tally=tally)
        assert held == [30, 75, 33]
    assert tally.near_ties <= 2


TYPES = ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl"]


@pytest.mark.parametrize("type_k", TYPES)
@pytest.mark.parametrize("budgets", ["uniform", "uneven"])
def test_allocation_is_the_formula(tiny: Model, type_k: str, budgets: str) -> None:
    def row(kind: str) -> int:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        return 2 * 32 // block * size

    for policy, n_sim in (("rkv", 0), ("latest", 3)):
        spec = ref.Spec(policy, budget=40, window=6, pin=2, n_sim=n_sim or 1)
        options = Options(
            spec, 16, 20, BUDGETS[budgets], n_seq=2, flash_attn=True, type_k=type_k, type_v="f16"
        )
        with Context(tiny, options) as context:
            cells = [b + 20 for b in BUDGETS[budgets] or [40] * 3]
            kv = sum(2 * c * (row(type_k) + row("f16")) for c in cells)
            rest = sum(2 * (7 * 4 * 32 * 4 + c * 2 * 4 + n_sim * c * 2 * 4) for c in cells)
            assert context.stats.bytes_kv == kv
            assert context.stats.bytes == kv + rest
            assert context.stats.cells == max(cells)


@pytest.mark.parametrize("budgets", [[40, 40], [40] * 4, [40, 7, 40], [40, 0, 40]], ids=str)
def test_bad_layer_budgets_are_refused(tiny: Model, budgets: list[int]) -> None:
    """Wrong number of layers, or no room beside the window and the pin."""
    with pytest.raises(NativeError, match=r"\w"):
        Context(tiny, Options(ref.Spec(budget=40, window=6, pin=2), layer_budgets=budgets))
