"""Llamas on SmolLM2, and what tests ask of them; a plugin of the test files that use them.

PYTEST_DONT_REWRITE: there is nothing to rewrite, and the test files import it before pytest does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rkv_local import KVBudget, Llama

SMALL = KVBudget(budget=96, buffer=32, batch=64)  # compacts every few tokens of a test
THREADS = int(os.environ.get("RKV_TEST_THREADS", "2"))  # 1 where others use the machine too
N_LAYER, N_HEAD_KV = 30, 3
TEXT = "The history of the lighthouse keepers. " + " ".join(
    f"In {1700 + i} the keeper of tower {i} saw {i * 7 % 100} ships, and the lamp burned {i % 9} nights."
    for i in range(18)
)

MakeLlama = Callable[..., Llama]


def under(kv: KVBudget, policy: str, **fields: Any) -> KVBudget:
    """The same under another policy, with what that one takes of `latest`'s own."""
    own = {"recent": None, "n_sim": None, "value_weight": None}
    return replace(kv, **{"policy": policy, **own, **fields})


def open_llama(path: Path, **arguments: Any) -> Llama:
    """A Llama with the tests' number of threads, which says nothing."""
    common = {"n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False}
    return Llama(path, **{**common, **arguments})


@pytest.fixture(scope="module")
def make(smollm2_path: Path) -> Iterator[MakeLlama]:
    """Llamas on SmolLM2, two threads, closed at the end of the module."""
    made: list[Llama] = []

    def build(**arguments: Any) -> Llama:
        llama = open_llama(smollm2_path, **arguments)
        made.append(llama)
        return llama

    yield build
    for llama in made:
        llama.close()


@pytest.fixture(scope="module")
def llama(make: MakeLlama) -> Llama:
    return make(kv=SMALL)


@pytest.fixture(scope="module")
def stock(make: MakeLlama) -> Llama:
    return make(kv=None, n_ctx=4096)


def greedy(llama: Llama, prompt: str | list[int], n: int = 40, **more: Any) -> str:
    result: Any = llama.create_completion(prompt, max_tokens=n, temperature=0.0, **more)
    return str(result["choices"][0]["text"])


def fresh(llama: Llama, prompt: str | list[int], n: int = 40, **more: Any) -> str:
    """The same from an empty cache."""
    llama.forget()
    return greedy(llama, prompt, n, **more)


def write_unsupported(path: Path, kind: str) -> Path:
    """A random model with ALiBi (mpt) or no attention at all (mamba)."""
    d, n_ff, n_vocab = 64, 96, 40
    writer = gguf.GGUFWriter(path, kind)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(n_vocab)
    writer.add_context_length(2048)
    writer.add_block_count(4)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(2 if kind != "mamba" else 0)
    writer.add_layer_norm_eps(1e-5)
    shapes: dict[str, tuple[int, ...]] = {"attn_norm.weight": (d,)}
    if kind == "mpt":
        writer.add_max_alibi_bias(8.0)
        shapes |= {"attn_qkv.weight": (3 * d, d), "attn_output.weight": (d, d), "ffn_norm.weight": (d,)}
        shapes |= {"ffn_up.weight": (n_ff, d), "ffn_down.weight": (d, n_ff)}
    else:
        inner, state, rank, conv = 2 * d, 16, 4, 4
        writer.add_ssm_conv_kernel(conv)
        writer.add_ssm_inner_size(inner)
        writer.add_ssm_state_size(state)
        writer.add_ssm_time_step_rank(rank)
        writer.add_layer_norm_rms_eps(1e-5)
        shapes |= {"ssm_in.weight": (2 * inner, d), "ssm_conv1d.weight": (inner, conv)}
        shapes |= {"ssm_conv1d.bias": (inner,), "ssm_x.weight": (rank + 2 * state, inner)}
        shapes |= {"ssm_dt.weight": (inner, rank), "ssm_dt.bias": (inner,), "ssm_a": (inner, state)}
        shapes |= {"ssm_d": (inner,), "ssm_out.weight": (d, inner)}
    tensors = {f"blk.{i}.{name}": shape for i in range(4) for name, shape in shapes.items()}
    tensors |= {"token_embd.weight": (n_vocab, d), "output_norm.weight": (d,)}  # tied output
    rng = np.random.default_rng(0)
    for name, shape in tensors.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
