"""The cache of a Llama: its size by the formula, several sequences, and errors of every kind."""

from __future__ import annotations

import gc
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamas import N_LAYER, SMALL, TEXT, MakeLlama, fresh, greedy, write_unsupported
from rkv_local import KVBudget, Llama, ModelShape, RKVError, Session

pytest_plugins = ["llamas"]


# --- the cache ---


BYTES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"budget": 64, "buffer": 100, "batch": 32, "window": 16, "pin": 0}, {}),
    ({"budget": 200, "policy": "latest"}, {"flash_attn": True}),
    ({"budget": 200, "policy": "latest", "n_sim": 4}, {"n_seq_max": 2}),
    ({"budget": 128, "policy": "snapkv"}, {"n_seq_max": 3, "flash_attn": True}),
    ({"budget": 128, "policy": "streaming", "batch": 1, "buffer": 1}, {}),
    ({"budget": 100}, {"type_k": "q8_0"}),
    ({"budget": 100}, {"type_k": "f32", "type_v": "bf16"}),
    ({"budget": 100}, {"type_k": "q4_0", "type_v": "q5_1", "flash_attn": True}),
    ({"budget": 100}, {"type_k": "iq4_nl", "type_v": "q4_1", "flash_attn": True, "n_seq_max": 2}),
    ({"budget": 256, "layer_budgets": "pyramid"}, {}),
    (
        {"layer_budgets": [64 + i for i in range(30)], "policy": "latest"},
        {"n_seq_max": 2, "flash_attn": True},
    ),
    ({"policy": "none"}, {"n_ctx": 1000}),
]


@pytest.mark.parametrize(("budget", "context"), BYTES, ids=str)
def test_allocated_bytes_equal_the_formula(
    make: MakeLlama, smollm2_path: Path, budget: dict[str, Any], context: dict[str, Any]
) -> None:
    kv = KVBudget(**budget)
    llama = make(kv=kv, **context)
    stats = llama.kv_stats()
    sizes = {k: v for k, v in context.items() if k in ("type_k", "type_v", "n_ctx")}
    n_seq = context.get("n_seq_max", 1)
    assert stats.bytes == kv.bytes_for(smollm2_path, n_seq, **sizes) == kv.bytes_for(llama, n_seq, **sizes)
    assert stats.cells == max(kv.cells(N_LAYER, context.get("n_ctx")))
    assert 0 < stats.bytes_kv <= stats.bytes
    assert (stats.policy, stats.active) == (kv.policy, kv.active)
    if kv.active:
        assert (stats.budget, stats.buffer, stats.window, stats.pin) == (
            kv.budget,
            kv.buffer,
            kv.window,
            kv.pin,
        )
    llama.close()


def test_memory_is_constant_and_freed(make: MakeLlama) -> None:
    def resident() -> int:
        with Path("/proc/self/statm").open() as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    llama = make(kv=SMALL)
    tokens = llama.tokenize(TEXT.encode())
    llama.eval(tokens)
    before = resident()
    for _ in range(3):
        llama.eval(tokens)
    assert llama.n_tokens == 4 * len(tokens)
    assert resident() - before < 8 << 20
    llama.close()
    gc.collect()


def test_kept_and_used_refuse_what_does_not_exist(llama: Llama) -> None:
    for arguments, message in [
        ((30, 0), "layer is 30, must be from 0 to 29"),
        ((-1, 0), "layer is -1"),
        ((0, 3), "head is 3, must be from 0 to 2"),
        ((0, 0, 1), "seq_id is 1, must be from 0 to 0"),
    ]:
        with pytest.raises(IndexError, match=message):
            llama.kv_kept(*arguments)
    with pytest.raises(IndexError, match="seq_id is 7"):
        llama.kv_used(7)


def test_stock_reports_too(stock: Llama) -> None:
    stock.forget()
    stock.eval(stock.tokenize(b"one two three"))
    assert stock.kv_used() == stock.n_tokens == len(stock.kv_kept(0, 0))
    assert stock.kv is None
    assert stock.kv_stats().policy == "none"
    assert not stock.kv_stats().active
    assert stock.shape == ModelShape.uniform(30, 9, 3, 64)


# --- sessions ---


def test_sequences_side_by_side_equal_one_at_a_time(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_seq_max=3)
    session = Session(llama)
    tokens = llama.tokenize(TEXT.encode())
    prompts = {0: tokens[:300], 1: tokens[100:330], 2: tokens[50:120]}

    def run(seqs: list[int]) -> dict[int, list[int]]:
        session.clear()
        rows = {s: session.decode({s: prompts[s]})[s] for s in seqs}  # prompts alone: equal chunks
        out: dict[int, list[int]] = {s: [] for s in seqs}
        for _ in range(60):
            for s in seqs:
                out[s].append(int(rows[s].argmax()))
            rows = session.decode({s: [out[s][-1]] for s in seqs})
        return out

    together = run([0, 1, 2])
    assert session.pos(0) == 360 and session.used(1) <= 160
    agree = 0
    for s in prompts:
        alone = run([s])[s]
        agree += sum(a == b for a, b in zip(alone, together[s], strict=True))
    assert agree > 0.7 * 180  # batching changes the arithmetic; test_generation.py looks at each difference
    session.close()
    with pytest.raises(RKVError, match="this Session is closed"):
        session.decode({0: [1]})
    llama.close()


def test_session_operations(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_seq_max=2)
    session = Session(llama)
    tokens = llama.tokenize(TEXT.encode())
    rows = session.decode({0: tokens[:50], 1: tokens[:20]}, logits="all")
    assert rows[0].shape == (50, llama.n_vocab()) and rows[1].shape == (20, llama.n_vocab())
    assert (session.pos(0), session.pos(1)) == (50, 20)
    assert session.remove(0, 40)  # nothing was compacted yet
    assert session.pos(0) == 40
    again = session.decode({0: tokens[40:50]}, logits="all")[0]
    np.testing.assert_allclose(again[-1], rows[0][-1], atol=0.15)
    assert session.decode({0: tokens[50:300]}, logits="none") == {}
    assert not session.remove(0, 30)
    assert session.pos(0) == 300
    session.copy(0, 1)
    assert session.pos(1) == 300
    assert session.kept(5, 1, 1).tolist() == session.kept(5, 1, 0).tolist()
    one, two = (session.decode({s: tokens[300:301]})[s] for s in (0, 1))
    np.testing.assert_array_equal(one, two)
    if session.used(0) > SMALL.budget:
        assert session.compact(0)
    assert session.used(0) == SMALL.budget
    assert not session.compact(0)
    session.clear(0)
    assert (session.pos(0), session.used(0), session.pos(1)) == (0, 0, 301)
    session.clear()
    assert (session.pos(1), session.used(1)) == (0, 0)
    assert session.decode({}) == {}
    for call, error, message in [
        (lambda: session.decode({2: [1]}), IndexError, "sequence is 2, must be from 0 to 1"),
        (lambda: session.decode({0: [1]}, logits="first"), ValueError, "logits is 'first'"),  # type: ignore[arg-type]
        (lambda: session.decode({0: [10**6]}), RKVError, "llama_decode returned -1"),
    ]:
        with pytest.raises(error, match=message):
            call()
    session.close()
    llama.close()


def test_session_keeps_to_n_ctx(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_ctx=300, n_seq_max=2)
    session = Session(llama)
    session.decode({1: [5] * 300})
    with pytest.raises(RKVError, match="the context is full: sequence 1 would have 301 tokens, n_ctx is 300"):
        session.decode({1: [5]})
    session.decode({0: [5] * 300})
    session.close()
    llama.close()


# --- errors ---


def test_context_limit(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_ctx=300)
    assert llama.n_ctx() == 300
    tokens = llama.tokenize(TEXT.encode())
    with pytest.raises(ValueError, match="exceed context window"):
        llama.create_completion(tokens[:300], max_tokens=1)
    with pytest.raises(RKVError, match="the context is full: 301 tokens, n_ctx is 300"):
        llama.eval(tokens[:301])
    assert llama.n_tokens == 0
    result: Any = llama.create_completion(tokens[:290], max_tokens=100, temperature=0.0)
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["completion_tokens"] == 10
    with pytest.raises(RKVError, match="the context is full"):
        for _ in llama.generate(tokens[:290]):
            pass
    assert llama.n_tokens == 300
    llama.close()


def test_n_ctx_zero_is_the_models_training_length(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_ctx=0)
    assert llama.n_ctx() == 8192
    llama.close()
    assert make(kv=SMALL).n_ctx() == 32768


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kv": 512}, ValueError, "kv is 512, must be a KVBudget or None"),
        ({"kv": SMALL, "embedding": True}, ValueError, "embedding=True needs .* pass kv=None"),
        ({"kv": SMALL, "n_ctx": -5}, ValueError, "n_ctx is -5, must be an integer of at least 1"),
        ({"kv": SMALL, "n_ctx": 1.5}, ValueError, "n_ctx is 1.5"),
        ({"kv": SMALL, "n_batch": 0}, ValueError, "n_batch is 0, must be an integer of at least 1"),
        ({"kv": SMALL, "n_batch": 65}, ValueError, "n_batch is 65, must be at most the budget's batch, 64"),
        ({"kv": SMALL, "n_ubatch": 0}, ValueError, "n_ubatch is 0"),
        ({"kv": SMALL, "n_seq_max": 0}, ValueError, "n_seq_max is 0"),
        ({"kv": SMALL, "n_seq_max": 257}, ValueError, "n_seq_max is 257, must be from 1 to 256"),
        ({"kv": SMALL, "n_ctx": 2**31, "n_seq_max": 4}, ValueError, "n_ctx is 2147483648 for 4 sequences"),
        ({"kv": SMALL, "type_k": "q9"}, ValueError, "type_k is 'q9', must be one of f32"),
        ({"kv": SMALL, "type_v": "q8_0"}, ValueError, "type_v is q8_0, a quantised V needs flash_attn=True"),
        ({"kv": SMALL, "flash_attn": "on"}, ValueError, "flash_attn is 'on'"),
        (
            {"kv": KVBudget(layer_budgets=[64] * 3)},
            ValueError,
            "layer_budgets has 3 numbers, must have one per layer: 30",
        ),
        ({"kv_budget": 512}, TypeError, "unexpected parameter 'kv_budget'"),
    ],
    ids=lambda v: str(v)[:50],
)
def test_bad_parameters_are_one_line(
    make: MakeLlama, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        make(**arguments)
    assert "\n" not in str(caught.value)


def test_bad_model_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the model file does not exist"):
        Llama(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(ValueError, match="not a GGUF file"):
        Llama(tmp_path / "text.gguf")
    with pytest.raises(ValueError, match="does not exist"):
        Llama(tmp_path)


def test_failed_init_leaves_no_budget_behind(make: MakeLlama, smollm2_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smollm2_path.read_bytes()[: 4 << 20])
    with pytest.raises(ValueError, match="Failed to load model"):
        Llama(cut, kv=SMALL, verbose=False)
    stock = make(kv=None, n_ctx=512)
    assert not stock.kv_stats().active
    stock.close()


@pytest.mark.parametrize("kind", ["mpt", "mamba"])
def test_models_whose_cache_cannot_be_compacted(tmp_path: Path, kind: str) -> None:
    path = write_unsupported(tmp_path / f"{kind}.gguf", kind)
    with pytest.raises(RKVError, match=r"^[^\n]{20,}$"):
        Llama(path, kv=KVBudget(budget=64), n_ctx=512, verbose=False)
    with Llama(path, kv=None, n_ctx=512, verbose=False) as llama:
        llama.eval([1, 2, 3])


def test_embeddings_are_refused(llama: Llama) -> None:
    with pytest.raises(RuntimeError, match="embedding=True"):
        llama.embed("text")


def test_stock_keeps_state_cache_and_embeddings(make: MakeLlama) -> None:
    from llama_cpp import LlamaRAMCache

    stock = make(kv=None, n_ctx=512)
    first = fresh(stock, "The sea is", 20)
    stock.eval([100, 200])
    state = stock.save_state()
    n = stock.n_tokens
    stock.forget()
    stock.load_state(state)
    assert stock.n_tokens == n
    stock.set_cache(LlamaRAMCache())
    stock.forget()
    assert greedy(stock, "The sea is", 20) == first
    stock.close()
    embedder = make(kv=None, n_ctx=512, embedding=True)
    vector: Any = embedder.embed("The sea")
    assert np.isfinite(np.asarray(vector)).all()
    embedder.close()


def test_empty_prompt(llama: Llama) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        llama.create_completion("", max_tokens=1)
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(llama.generate([]))


def test_closed(make: MakeLlama) -> None:
    with make(kv=SMALL) as llama:
        greedy(llama, "Hi", 2)
    calls: list[Callable[[], Any]] = [
        lambda: llama.eval([1]),
        lambda: next(llama.generate([1])),
        lambda: llama.create_completion("Hi"),
        lambda: llama.tokenize(b"Hi"),
        lambda: llama.detokenize([1]),
        llama.kv_stats,
        llama.kv_used,
        lambda: llama.kv_kept(0, 0),
        llama.forget,
        lambda: llama.ctx,
        lambda: Session(llama),
    ]
    for call in calls:
        with pytest.raises(RKVError, match="this Llama is closed"):
            call()
    llama.close()


def test_pickle_makes_an_equal_llama(make: MakeLlama) -> None:
    llama = make(kv=KVBudget(budget=64, batch=32), n_ctx=700, n_seq_max=2, type_k="q8_0")
    copy = pickle.loads(pickle.dumps(llama))
    assert (copy.kv, copy.n_ctx(), copy.n_seq_max) == (llama.kv, 700, 2)
    assert copy.kv_stats().bytes == llama.kv_stats().bytes
    assert fresh(copy, "The sea", 10) == fresh(llama, "The sea", 10)
    copy.close()
    llama.close()


# --- the text of tokens ---


def test_text_of_tokens_equals_llama_cpps(llama: Llama) -> None:
    from llama_cpp.llama_tokenizer import LlamaTokenizer

    theirs = LlamaTokenizer(llama)
    tokens = llama.tokenize("naïve 日本語 🙂 <|im_start|> end".encode(), special=True)
    for special in (False, True):
        assert llama.detokenize(tokens, special=special) == theirs.detokenize(tokens, special=special)
    assert llama.detokenize([]) == b""
    trace = llama.tokenize(TEXT.encode())
    changed = [*trace[:100], *trace[150:300]]
    for part in (trace[:70], trace[:71], trace[:200], trace[:150], changed, trace, trace[:70]):
        assert llama.detokenize(part) == theirs.detokenize(part)  # also where it remembers the last one
    for token in (-1, llama.n_vocab()):
        with pytest.raises(ValueError, match=f"token is {token}, must be from 0 to 49151"):
            llama.detokenize([token])
