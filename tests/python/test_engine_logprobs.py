"""Log probabilities: as llama_cpp reports them, without its n_ctx * n_vocab floats."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamas import SMALL, TEXT, MakeLlama, greedy
from rkv_local import Llama, Session

pytest_plugins = ["llamas"]


# --- logprobs ---


@pytest.fixture(scope="module")
def reference_logprobs(smollm2_path: Path, llama: Llama) -> Any:
    """llama_cpp's own answer, with logits_all and a small context."""
    import llama_cpp

    theirs = llama_cpp.Llama(
        str(smollm2_path), n_ctx=256, logits_all=True, n_threads=2, n_threads_batch=2, verbose=False
    )
    arguments: Any = {"max_tokens": 12, "temperature": 0.0, "logprobs": 3}
    whole: Any = theirs.create_completion("The capital of France is", **arguments)
    echo: Any = theirs.create_completion("The capital of France is", echo=True, **arguments)
    stream: Any = list(theirs.create_completion("The capital of France is", stream=True, **arguments))
    theirs.close()
    return whole["choices"][0], echo["choices"][0], [c["choices"][0] for c in stream]


def close_logprobs(ours: Any, theirs: Any) -> None:
    assert ours["tokens"] == theirs["tokens"]
    assert ours["text_offset"] == theirs["text_offset"]
    for a, b in zip(ours["top_logprobs"], theirs["top_logprobs"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert list(a) == list(b)
            np.testing.assert_allclose(list(a.values()), [float(v) for v in b.values()], atol=2e-3)
    for x, y in zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True):
        assert (x is None) == (y is None)
        assert x is None or x == pytest.approx(float(y), abs=2e-3)


def test_logprobs_equal_llama_cpps(llama: Llama, reference_logprobs: Any) -> None:
    whole, _, stream = reference_logprobs
    arguments: Any = {"max_tokens": 12, "temperature": 0.0, "logprobs": 3}
    llama.forget()
    ours: Any = llama.create_completion("The capital of France is", **arguments)
    assert ours["choices"][0]["text"] == whole["text"]
    close_logprobs(ours["choices"][0]["logprobs"], whole["logprobs"])
    llama.forget()
    chunks: Any = list(llama.create_completion("The capital of France is", stream=True, **arguments))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["text"]
    streamed = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    joined = {key: [x for part in streamed for x in part[key]] for key in whole["logprobs"]}
    close_logprobs(joined, whole["logprobs"])
    assert len(streamed) == sum(1 for c in stream if c["logprobs"])


def test_logprobs_with_echo(llama: Llama, reference_logprobs: Any) -> None:
    whole, theirs, _ = reference_logprobs
    prompt = llama.tokenize(b"The capital of France is", add_bos=False)
    ours: Any = llama.create_completion(
        "The capital of France is", max_tokens=12, temperature=0.0, logprobs=3, echo=True
    )
    mine = ours["choices"][0]["logprobs"]
    assert ours["choices"][0]["text"] == theirs["text"]
    assert mine["tokens"][:-1] == theirs["logprobs"]["tokens"]  # llama_cpp leaves out the last one
    assert "".join(mine["tokens"]) == ours["choices"][0]["text"]
    assert mine["token_logprobs"][0] is None
    # each prompt token's probability comes from the token before it
    llama.forget()
    rows = Session(llama).decode({0: prompt}, logits="all")[0].astype(np.float64)
    rows -= np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True)) + rows.max(
        -1, keepdims=True
    )
    expected = [rows[i - 1, prompt[i]] for i in range(1, len(prompt))]
    np.testing.assert_allclose(mine["token_logprobs"][1 : len(prompt)], expected, atol=1e-3)
    close_logprobs({k: v[len(prompt) :] for k, v in mine.items()}, whole["logprobs"])


def test_logprobs_of_a_long_trace_take_little_memory(make: MakeLlama) -> None:
    llama = make(kv=SMALL, n_ctx=32768)
    greedy(llama, "Once", 5, logprobs=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result: Any = llama.create_completion(TEXT, max_tokens=300, temperature=1.0, logprobs=5, seed=1)
    entries = result["choices"][0]["logprobs"]
    assert len(entries["tokens"]) == result["usage"]["completion_tokens"] > 50
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    full = len(entries["tokens"]) * llama.n_vocab() * 4
    assert grown * 1024 < full // 2, f"{grown} KiB"
    llama.close()


def test_chat_logprobs(llama: Llama) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    result: Any = llama.create_chat_completion(messages, max_tokens=5, logprobs=True, top_logprobs=2)
    content = result["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    assert all(2 <= len(c["top_logprobs"]) <= 3 and c["logprob"] <= 0 for c in content)


@pytest.mark.parametrize("k", [-1, 1.5, "3", True])
def test_bad_logprobs(llama: Llama, k: Any) -> None:
    with pytest.raises(ValueError, match=r"logprobs is .* must be a number from 0, or None"):
        llama.create_completion("Hi", max_tokens=1, logprobs=k)


def test_zero_logprobs_reports_the_token_alone(llama: Llama) -> None:
    result: Any = llama.create_completion("Hi", max_tokens=2, logprobs=0)
    assert [len(t) for t in result["choices"][0]["logprobs"]["top_logprobs"]] == [1, 1]


def test_logits_all_grows_with_what_is_read(make: MakeLlama) -> None:
    llama = make(kv=SMALL, logits_all=True)
    tokens = llama.tokenize(TEXT.encode())[:200]
    llama.eval(tokens)
    assert llama._scores.shape == (200, llama.n_vocab())
    assert len(llama.scores) < 600
    rows = Session(llama).decode({0: tokens}, logits="all")[0]
    np.testing.assert_array_equal(rows, llama.scores[:200])
    llama.close()
