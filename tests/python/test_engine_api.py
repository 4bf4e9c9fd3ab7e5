"""rkv_local.Llama on SmolLM2: what llama_cpp.Llama does, in a cache of fixed size."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from llamas import N_HEAD_KV, N_LAYER, SMALL, TEXT, MakeLlama, fresh, greedy
from rkv_local import KVBudget, Llama

REPETITION = "A B C D E F G A B C D E F G A B C D"

pytest_plugins = ["llamas"]


# --- completions ---


def test_budget_that_is_never_reached_changes_nothing(make: MakeLlama, stock: Llama) -> None:
    roomy = make(kv=KVBudget(budget=1024, batch=512))
    prompt = roomy.tokenize(TEXT.encode())[:300]
    assert fresh(roomy, prompt, 60) == fresh(stock, prompt, 60)
    assert roomy.kv_stats().compactions == 0
    assert roomy.kv_kept(29, 2).tolist() == list(range(roomy.n_tokens))


def test_generation_far_beyond_the_budget(llama: Llama) -> None:
    llama.forget()
    before = llama.kv_stats()
    tokens = llama.tokenize(b"Once upon a time", add_bos=True)
    for n, _ in enumerate(llama.generate(tokens, temp=0.8, top_k=40), 1):
        assert llama.kv_used() <= 96 + 64
        if n == 400:
            break
    after = llama.kv_stats()
    assert llama.n_tokens == len(tokens) + 399
    assert after.bytes == before.bytes
    # from 96 cells to 128 and back: at least one compaction in 32 tokens once the cache is full
    assert after.compactions - before.compactions >= (llama.n_tokens - 160) // 64
    assert after.tokens_evicted > before.tokens_evicted
    assert after.compaction_seconds > before.compaction_seconds


def test_prompt_of_any_length_is_fed_in_chunks(llama: Llama) -> None:
    tokens = llama.tokenize(TEXT.encode())
    assert len(tokens) > 5 * SMALL.n_batch
    llama.forget()
    llama.eval(tokens)
    assert llama.n_tokens == len(tokens)
    assert llama.input_ids[: len(tokens)].tolist() == tokens
    kept = llama.kv_kept(3, 1)
    assert kept[-1] == len(tokens) - 1
    assert kept[:4].tolist() == [0, 1, 2, 3]  # pinned
    assert np.all(np.diff(kept) > 0)
    assert len(kept) == llama.kv_used()


def test_heads_keep_different_tokens(llama: Llama) -> None:
    llama.forget()
    llama.eval(llama.tokenize(TEXT.encode()))
    kept = {
        tuple(llama.kv_kept(layer, head).tolist()) for layer in range(N_LAYER) for head in range(N_HEAD_KV)
    }
    assert len(kept) > N_LAYER


def test_chat_and_streaming_agree(llama: Llama) -> None:
    messages: Any = [{"role": "user", "content": "Describe a lighthouse, in detail."}]
    arguments: Any = {"messages": messages, "max_tokens": 120, "temperature": 0.0}
    llama.forget()
    whole: Any = llama.create_chat_completion(**arguments)
    llama.forget()
    chunks: Any = list(llama.create_chat_completion(stream=True, **arguments))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert len(text) > 100
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


def test_stop_words(llama: Llama) -> None:
    text = fresh(llama, "Count: one, two, three,", 60)
    stop = text[20:24]
    llama.forget()
    result: Any = llama.create_completion(
        "Count: one, two, three,", max_tokens=60, temperature=0.0, stop=[stop]
    )
    assert result["choices"][0]["text"] == text[: text.index(stop)]
    assert result["choices"][0]["finish_reason"] == "stop"


def test_grammar_beyond_the_budget(llama: Llama) -> None:
    from llama_cpp import LlamaGrammar

    grammar = LlamaGrammar.from_string('root ::= ([a-z]+ " ")+', verbose=False)
    text = fresh(llama, TEXT, 100, grammar=grammar)
    assert re.fullmatch(r"[a-z ]+", text)
    assert llama.kv_stats().compactions > 0


def test_logits_processor_and_bias(llama: Llama) -> None:
    from llama_cpp import LogitsProcessorList

    seen: list[int] = []

    def only_seven(ids: Any, scores: Any) -> Any:
        seen.append(len(ids))
        scores[:] = -np.inf
        scores[llama.tokenize(b"7", add_bos=False)[0]] = 0.0
        return scores

    assert fresh(llama, "Say", 5, logits_processor=LogitsProcessorList([only_seven])) == "77777"
    assert seen == sorted(seen) and len(seen) == 5
    eight = llama.tokenize(b"8", add_bos=False)[0]
    assert fresh(llama, "Say", 3, logit_bias={eight: 100.0}) == "888"


def test_stopping_criteria_see_the_logits_that_were_sampled_from(llama: Llama) -> None:
    from llama_cpp import StoppingCriteriaList

    agree: list[bool] = []
    llama.forget()
    tokens = llama.tokenize(TEXT.encode())[:100]

    def watch(ids: Any, logits: Any) -> bool:
        agree.append(int(np.argmax(logits)) == current[-1] if current else True)
        return len(agree) > 20

    current: list[int] = []
    sample = llama.sample

    def spy(*args: Any, **kwargs: Any) -> int:
        current.append(sample(*args, **kwargs))
        return current[-1]

    llama.sample = spy  # type: ignore[method-assign]
    try:
        list(llama.generate(tokens, temp=0.0, stopping_criteria=StoppingCriteriaList([watch])))
    finally:
        del llama.sample
    assert len(agree) == 21 and all(agree)


def test_speculative_decoding_rolls_back_within_the_buffer(make: MakeLlama) -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding(num_pred_tokens=5)
    roomy, plain = (
        make(kv=KVBudget(budget=512, batch=512), draft_model=draft),
        make(kv=None, draft_model=draft),
    )
    assert greedy(roomy, REPETITION, 100) == greedy(plain, REPETITION, 100)
    small = make(kv=SMALL, draft_model=draft)
    result: Any = small.create_completion(
        REPETITION, max_tokens=150, temperature=0.0, logit_bias={small.token_eos(): -1000.0}
    )
    n = len(small.tokenize(REPETITION.encode())) + result["usage"]["completion_tokens"]
    assert n > 150
    assert small.kv_stats().compactions > 0
    assert small._pos_next(0) == small.n_tokens
    kept = small.kv_kept(7, 1)
    assert kept[-8:].tolist() == list(range(small.n_tokens - 8, small.n_tokens))  # no hole was left
    for llama in (roomy, plain, small):
        llama.close()


# --- seeds ---


def test_greedy_and_seeded_sampling_reproduce(llama: Llama) -> None:
    assert fresh(llama, TEXT, 30) == fresh(llama, TEXT, 30)

    def sampled(seed: int | None) -> str:
        llama.forget()
        result: Any = llama.create_completion("Once", max_tokens=40, temperature=1.2, seed=seed)
        return str(result["choices"][0]["text"])

    assert sampled(7) == sampled(7)
    assert sampled(0) == sampled(0)
    assert sampled(7) != sampled(8)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_constructors_seed_reproduces(make: MakeLlama, seed: int) -> None:
    def texts() -> list[str]:
        llama = make(kv=SMALL, seed=seed)
        arguments: Any = {"max_tokens": 12, "temperature": 1.5}
        out = [llama.create_completion("Once", **arguments)["choices"][0]["text"] for _ in range(2)]
        llama.close()
        return out

    first = texts()
    assert first == texts()
    assert first[0] != first[1]


# --- prefixes ---


def test_prefix_inside_the_compacted_part_is_read_again(llama: Llama) -> None:
    tokens = llama.tokenize(TEXT.encode())
    alone = fresh(llama, tokens[:250], 30)
    fresh(llama, tokens[:330], 3)
    assert greedy(llama, tokens[:250], 30) == alone  # a prefix of what the cache holds
    fresh(llama, [*tokens[:200], *tokens[:100]], 3)
    assert greedy(llama, tokens[:250], 30) == alone  # differs after 200
    assert llama.kv_used() < 96 + 64


def test_cached_prompt_is_continued_without_reading_it_again(llama: Llama) -> None:
    tokens = llama.tokenize(TEXT.encode())[:300]
    llama.forget()
    llama.eval(tokens)
    before = llama.kv_stats().compactions
    decoded: list[int] = []
    put = llama._batch.set_batch

    def counted(batch: list[int], **more: Any) -> None:
        decoded.append(len(batch))
        put(batch=batch, **more)

    llama._batch.set_batch = counted
    try:
        greedy(llama, [*tokens, *tokens[:5]], 3)
    finally:
        del llama._batch.set_batch
    assert sum(decoded) == 5 + 2
    assert llama.kv_stats().compactions - before <= 1


def test_n_tokens_set_back_by_hand(llama: Llama) -> None:
    tokens = llama.tokenize(TEXT.encode())[:400]
    llama.forget()
    llama.eval(tokens[:210])
    llama.eval(tokens[300:])
    expected = llama._last_logits()[-1].copy()
    llama.forget()
    llama.eval(tokens)
    llama.n_tokens = 210  # the compacted cache cannot go back there
    llama.eval(tokens[300:])
    assert llama.n_tokens == 310
    # the same tokens, read in other chunks: other compactions, so near but not equal
    assert (
        int(llama._last_logits()[-1].argmax()) == int(expected.argmax())
        or np.corrcoef(llama._last_logits()[-1], expected)[0, 1] > 0.9
    )


def test_interrupt_leaves_the_object_usable(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = llama.tokenize(TEXT.encode())[:200]
    expected = fresh(llama, tokens, 10)
    from rkv_local import engine

    decode = engine.decode
    for when in (1, 3, 7):
        for after in (False, True):  # before or after the C call that Ctrl-C interrupts
            calls = 0

            def interrupted(ctx: Any, batch: Any, when: int = when, after: bool = after) -> None:
                nonlocal calls
                calls += 1
                if calls == when and not after:
                    raise KeyboardInterrupt
                decode(ctx, batch)
                if calls == when:
                    raise KeyboardInterrupt

            llama.forget()
            with monkeypatch.context() as patch:
                patch.setattr(engine, "decode", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    greedy(llama, tokens, 10)
            assert fresh(llama, tokens, 10) == expected  # a new start
            llama.forget()
            with monkeypatch.context() as patch:
                patch.setattr(engine, "decode", interrupted)
                calls = 0
                with pytest.raises(KeyboardInterrupt):
                    greedy(llama, tokens, 10)
            assert greedy(llama, tokens, 10)  # and going on from where it stopped
            assert llama._pos_next(0) == llama.n_tokens


def test_interrupted_stream_can_be_followed(llama: Llama) -> None:
    expected = fresh(llama, TEXT, 30)
    llama.forget()
    stream: Any = llama.create_completion(TEXT, max_tokens=30, temperature=0.0, stream=True, logprobs=1)
    for _ in range(5):
        next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)
    assert llama._recorder is None
    assert fresh(llama, TEXT, 30) == expected
