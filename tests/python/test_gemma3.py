"""A real model with sliding windows: Gemma 3 270M, of whose 18 layers three see everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference as ref
from compaction import compact_and_check
from engine_tools import THREADS, Context, Model, Options
from llamas import open_llama
from rkv_local import KVBudget, _native, plan

PROMPT = (
    "The lighthouse stood on a small island off the coast of Norway. Its keeper, an old man named Erik, "
    "lit the lamp every evening and wrote the names of the ships that passed into a book. One winter night,"
)


@pytest.fixture(scope="module")
def gemma3(gemma3_path: Path) -> Iterator[Model]:
    model = Model(gemma3_path)
    yield model
    model.close()


def test_only_full_attention_has_the_budget(gemma3: Model) -> None:
    """Kept sets of the layers 5, 11 and 17 against the reference, and a window cache of stock's size."""
    spec = ref.Spec(budget=96)
    options = Options(spec, 32, 32, n_ctx=32768, n_threads=THREADS, type_k="f16", type_v="f16")
    tokens = gemma3.tokenize(PROMPT + " the storm came." * 80)[:400]
    tally = ref.Tally()
    with Context(gemma3, options) as context:
        assert list(context.layers) == [5, 11, 17]
        held, fed = [0] * 3, 0
        for n in (128, 32, 20, 100):
            context.feed(tokens[fed : fed + n], last_only=True)
            fed += n
            if context.used() > spec.budget:
                # what was compacted on the way has been through it before
                held = [96] * 3 if context.stats.compactions else held
                held = compact_and_check(context, ref.Rope(), held, tally=tally)
        assert context.stats.cells == 96 + 32
        assert context.pos_max() == fed - 1
    assert tally.heads >= 9 and tally.near_ties <= 2


def test_equal_to_stock_until_the_budget_is_reached(gemma3: Model) -> None:
    common: dict[str, Any] = {
        "batch": 64,
        "n_ctx": 1024,
        "n_threads": THREADS,
        "type_k": "f16",
        "type_v": "f16",
    }
    tokens = gemma3.tokenize(PROMPT)
    with Context(gemma3, Options(**common)) as stock:
        expected = stock.feed(tokens, last_only=True)
    with Context(gemma3, Options(ref.Spec(budget=192), buffer=64, **common)) as context:
        np.testing.assert_array_equal(context.feed(tokens, last_only=True), expected)


def test_text_past_several_compactions(gemma3_path: Path) -> None:
    """Words, not noise: mean log-probability of its own greedy text stays near that of a full cache."""
    with open_llama(gemma3_path, kv=KVBudget(budget=96, buffer=32, batch=64)) as small:
        text: Any = small.create_completion(PROMPT, max_tokens=200, temperature=0.0, repeat_penalty=1.2)
        stats, text = small.kv_stats(), text["choices"][0]["text"]
        assert stats.compactions >= 4 and stats.cells == 160
        assert small.kv_used() <= 160
        with pytest.raises(IndexError, match="no layer 0 with a KV cache"):
            small.kv_kept(0, 0)  # a window's layer
    words = text.split()
    assert len(words) > 80 and sum(w.strip(".,;:\"'!?()").isalpha() for w in words) > 0.8 * len(words)
    tokens: list[int] = []
    with open_llama(gemma3_path, kv=None, n_ctx=1024, logits_all=True) as stock:
        tokens = stock.tokenize(text.encode())
        stock.eval(tokens)
        logits = np.array(stock.scores[: len(tokens) - 1], np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert log_p[np.arange(len(tokens) - 1), tokens[1:]].mean() > -4


@pytest.mark.parametrize("kv", [KVBudget(), None])
def test_a_plan_is_what_it_takes(gemma3_path: Path, kv: KVBudget | None) -> None:
    made = plan(gemma3_path, "3GiB", kv=kv, n_ctx=4096, use_mmap=True, n_gpu_layers=0)
    with open_llama(gemma3_path, **made.arguments()) as loaded:
        assert sum(m.cache for m in _native.memory(loaded.ctx)) == made.kv_bytes
    cells = "1,280 cells × 3 layers + windows" if kv else "4,096 cells × 18 layers"
    assert f"({cells})" in made.line()


def test_prefix_reuse_reads_the_prompt_again(gemma3_path: Path) -> None:
    """A shorter prompt after a long one: removing the rest is refused, and the text is right."""
    kv = KVBudget(budget=512, buffer=64, batch=64)
    question = PROMPT + " the sea"
    with open_llama(gemma3_path, kv=kv) as used, open_llama(gemma3_path, kv=kv) as fresh:
        used.create_completion(PROMPT + " the waves" * 330, max_tokens=4, temperature=0.0)
        got: Any = used.create_completion(question, max_tokens=24, temperature=0.0)
        want: Any = fresh.create_completion(question, max_tokens=24, temperature=0.0)
        assert got["choices"][0]["text"] == want["choices"][0]["text"]
