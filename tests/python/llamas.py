"""Llamas on the default model, and what tests ask of them; a plugin of the test files that use them.

PYTEST_DONT_REWRITE: there is nothing to rewrite, and the test files import it before pytest does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def make(smollm2_path: Path) -> Iterator[MakeLlama]:
    """Llamas on the default model, two threads, closed at the end of the module."""
    made: list[Llama] = []

    def build(**arguments: Any) -> Llama:
        common = {"n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False}
        llama = Llama(smollm2_path, **{**common, **arguments})
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
