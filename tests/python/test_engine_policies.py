"""Policies and pins through rkv_local.Llama, Session, KVBudget and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_tools import invoke
from llamas import TEXT, MakeLlama
from rkv_local import POLICIES, KVBudget, Llama, ModelShape, RKVError, Session, _native
from rkv_local.budget import POLICY_DEFAULTS

pytest_plugins = ["llamas"]


def small(policy: str = "snapkv", **values: Any) -> KVBudget:
    return KVBudget(**{"budget": 96, "buffer": 32, "batch": 64, "policy": policy, **values})


def begins(llama: Llama, n: int, seq: int = 0) -> bool:
    """Do the heads of some layers still hold the first n tokens?"""
    return all(
        llama.kv_kept(layer, head, seq)[:n].tolist() == list(range(n))
        for layer in (0, 7, 29)
        for head in range(3)
    )


def grow(llama: Llama, prompt: list[int], n: int) -> None:
    """A prompt and n tokens after it, whatever they are."""
    for _ in zip(range(n), llama.generate(prompt, temp=0.0), strict=False):
        pass


# --- KVBudget ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_defaults_of_a_policy_give_way_to_what_is_said(policy: str) -> None:
    usual = {
        "buffer": 128,
        "window": 8,
        "recent": 0,
        "n_sim": 1,
        "value_weight": 0.0,
        "lam": 0.1,
        "pin": 4,
        "pool": 7,
        "memory": 0.0,
        "chunk": 10,
    }
    kv = KVBudget(policy=policy)
    assert {name: getattr(kv, name) for name in usual} == usual | POLICY_DEFAULTS.get(policy, {})
    said = KVBudget(policy=policy, buffer=99, window=5, recent=30, lam=0.3, pin=3, pool=9, chunk=20)
    found = (said.buffer, said.window, said.recent, said.lam, said.pin, said.pool, said.chunk)
    assert found == (99, 5, 30, 0.3, 3, 9, 20)


def test_gkv_without_memory_is_possible() -> None:
    assert KVBudget(policy="gkv", memory=0).memory == 0
    params = _native.params(KVBudget(policy="gkv", memory=0))
    assert (params.memory, params.pool, round(params.lambda_, 6)) == (0.0, 1, 0.5)


@pytest.mark.parametrize("policy", ["streaming", "h2o", "lagkv", "given"])
def test_memory_is_refused_where_there_is_none(policy: str) -> None:
    with pytest.raises(ValueError, match=f"memory is 0.5, must be 0 with policy {policy}"):
        KVBudget(policy=policy, memory=0.5)


def test_prompt_pin() -> None:
    kv = KVBudget(budget=100, pin="prompt", policy="rkv")
    assert (kv.n_pin, kv.least_budget) == (4, 13)
    assert [kv.prompt_pin(n) for n in (0, 30, 50, 5000)] == [0, 30, 50, 50]
    uneven = KVBudget(budget=100, pin="prompt", policy="rkv", layer_budgets=[160, 40])
    assert uneven.prompt_pin(5000, 2) == 40 - 8 - 1
    recent = KVBudget(budget=100, pin="prompt")
    assert [recent.prompt_pin(n) for n in (30, 5000)] == [30, 100 - 50 - 1]
    assert KVBudget(pin=7).prompt_pin(30) is None


def test_shared_heads_need_equal_budgets() -> None:
    with pytest.raises(ValueError, match=r"^shared_heads is True, layer_budgets must"):
        KVBudget(shared_heads=True, layer_budgets="pyramid")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "none"])
def test_bytes_are_what_is_allocated(make: MakeLlama, policy: str, smollm2_path: Path) -> None:
    memory = {"memory": 0.5} if policy == "latest" else {}
    kv = small(policy, budget=64, **memory)
    with make(kv=kv, n_ctx=1024) as llama:
        stats = llama.kv_stats()
        assert stats.bytes == kv.bytes_for(ModelShape.of(smollm2_path))
        llama.eval(llama.tokenize(TEXT.encode())[:200])
        assert llama.kv_stats().compactions > 0
        assert llama.kv_stats().policy == policy


# --- pin="prompt" -----------------------------------------------------------------------------------


def test_the_first_prompt_is_pinned(make: MakeLlama) -> None:
    llama = make(kv=small(pin="prompt"), n_ctx=2048)
    tokens = llama.tokenize(TEXT.encode())
    grow(llama, tokens[:40], 150)
    assert llama.kv_stats().compactions >= 2
    assert begins(llama, 40)
    grow(llama, [*llama.input_ids[: llama.n_tokens].tolist(), *tokens[:9]], 50)
    assert begins(llama, 40)  # the same sequence, a second prompt
    llama.reset()
    grow(llama, tokens[60:80], 150)
    assert begins(llama, 20)
    assert not begins(llama, 40)
    llama.reset()
    grow(llama, tokens[:300], 40)  # longer than half the budget
    assert begins(llama, 48)


def test_prompts_of_a_session_are_pinned_each(make: MakeLlama) -> None:
    llama = make(kv=small("rpc", window=8), n_ctx=2048, n_seq_max=2)
    assert llama.kv is not None
    assert llama.kv.pin == "prompt"
    tokens = llama.tokenize(TEXT.encode())
    session = Session(llama)
    session.decode({0: tokens[:30], 1: tokens[:12]})
    for start in range(40, 240, 20):
        part = tokens[start : start + 20]
        session.decode({0: part, 1: part})
    assert begins(llama, 30, 0)
    assert begins(llama, 12, 1)
    assert not begins(llama, 30, 1)
    session.clear(1)
    session.decode({1: tokens[:20]})
    session.decode({1: tokens[20:240]})
    assert begins(llama, 20, 1)
    session.close()


def test_pins_and_scores_by_hand(make: MakeLlama) -> None:
    llama = make(kv=small("given"), n_ctx=2048)
    tokens = llama.tokenize(TEXT.encode())
    _native.seq_pin(llama.ctx, 10)
    llama.eval(tokens[:120])
    z = np.arange(120.0)[::-1]
    _native.set_scores(llama.ctx, 3, 1, z)
    assert _native.seq_compact(llama.ctx)
    assert llama.kv_kept(3, 1).tolist() == [*range(88), *range(112, 120)]  # the oldest are worth most
    assert llama.kv_kept(3, 0).tolist() == [*range(10), *range(34, 120)]
    with pytest.raises(RKVError, match=r"97 scores for 96 cells"):
        _native.set_scores(llama.ctx, 3, 1, np.zeros(97))
    with pytest.raises(RKVError, match="compacted with 10 pinned"):
        _native.seq_pin(llama.ctx, 11)
    with pytest.raises(ValueError, match=r"z has shape \(2, 2\)"):
        _native.set_scores(llama.ctx, 3, 1, np.zeros((2, 2)))


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["gkv", "value-aware", "rpc", "triattention"])
def test_run_with_a_policy(policy: str) -> None:
    result = invoke(
        *("run", TEXT[:900], "--kv-policy", policy, "--kv-budget", "128", "--kv-buffer", "32"),
        *("-n", "80", "--temp", "0", "--json", "--raw", "--kv-seed", "3"),
    )
    assert result.exit_code == 0, result.stderr
    kv = json.loads(result.stdout)["kv"]
    assert kv["policy"] == policy
    assert kv["pin"] == ("prompt" if policy == "rpc" else 4)
    assert kv["compactions"] > 0


@pytest.mark.parametrize("value", ["-1", "all", "1.5"])
def test_a_bad_pin_is_one_line(value: str) -> None:
    result = invoke("run", "hi", "--kv-pin", value)
    assert result.exit_code == 2
    assert "--kv-pin" in result.stderr
