"""The compaction out of other ops (docs/backends.md): forced on the CPU, and over RPC servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import reference as ref
from compaction import compact_and_check
from engine_tools import THREADS, Context, Model
from llamas import TEXT
from rpc_client import budget_options, greedy, has_rpc, logged, started

ROPE = ref.Rope(n_rot=64, freq_base=100_000.0)  # SmolLM2's
CLIENT = Path(__file__).with_name("rpc_client.py")
N = 300


def _built_from_other_ops(log: str) -> str:
    lines = [line for line in log.splitlines() if "built from other ops" in line]
    return lines[0].partition("kernels for ")[2].partition(":")[0] if lines else ""


@pytest.mark.parametrize("policy", ["rkv", "snapkv"])
def test_forced_on_the_cpu(
    smollm2: Model, prose: list[int], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """The same greedy tokens as the kernels, over many compactions, and the same cells kept."""
    results = []
    for forced, layers in (("0", ""), ("1", "30 of 30 layers")):
        monkeypatch.setenv("RKV_GENERIC", forced)
        with logged() as lines, Context(smollm2, budget_options(policy, THREADS)) as context:
            tokens = greedy(context, prose[:300], N)
            assert context.stats.compactions >= 5
            results.append((tokens, [context.all_positions(il).tolist() for il in range(smollm2.n_layer)]))
        assert _built_from_other_ops("".join(lines)) == layers
    assert len(set(results[0][0])) > 20  # it does not repeat one token
    assert results[0] == results[1]


@pytest.mark.parametrize(("flash", "type_k", "type_v"), [(0, "f16", "f16"), (1, "q8_0", "q4_0")])
def test_kept_sets_of_latest(
    smollm2: Model, prose: list[int], monkeypatch: pytest.MonkeyPatch, flash: int, type_k: str, type_v: str
) -> None:
    """Each pass by itself: copies of a token tie in layer 0 to the last bits, and greedy tokens part."""
    monkeypatch.setenv("RKV_GENERIC", "1")
    options = replace(budget_options("latest", THREADS), flash_attn=bool(flash), type_k=type_k, type_v=type_v)
    tally = ref.Tally()
    with Context(smollm2, options) as context:
        held, fed = [0] * smollm2.n_layer, 0
        for n in (320, 64, 47):
            context.feed(prose[fed : fed + n], last_only=True)
            fed += n
            held = compact_and_check(context, ROPE, held, tally=tally)
    assert tally.heads == 3 * 30 * 3
    assert tally.near_ties <= 8


@pytest.fixture
def servers() -> Iterator[list[str]]:
    """Two server processes on loopback."""
    with started(2) as endpoints:
        yield endpoints


@pytest.mark.skipif(not has_rpc(), reason="the libraries were built without -DGGML_RPC=ON")
def test_layers_on_two_servers(smollm2: Model, smollm2_path: Path, servers: list[str]) -> None:
    """Half of the layers on each; the same tokens as in this process."""
    command = [sys.executable, str(CLIENT), str(smollm2_path), "rkv", TEXT, str(N), *servers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    remote = json.loads(done.stdout.splitlines()[-1])
    assert remote["compactions"] >= 5
    assert _built_from_other_ops(remote["log"]) == "30 of 30 layers"
    for endpoint in servers:
        assert f"[{endpoint}] KV buffer size" in remote["log"]

    with Context(smollm2, budget_options("rkv", THREADS)) as context:
        assert remote["tokens"] == greedy(context, smollm2.tokenize(TEXT), N)
        here = [context.all_positions(il).tolist() for il in range(smollm2.n_layer)]
    assert remote["positions"] == here
    print(f"{remote['ms'] / remote['compactions']:.0f} ms a compaction")
