"""Every pair of cache types that flash attention takes on the CPU, with the rotation of quantised ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from engine_tools import GGML_TYPE, Context, Model, Options
from families import SMALL, Report, check_compactions

SHAPE = tiny_models.Shape(n_layer=2, n_head=2, n_head_kv=1, d_head=64, n_ff=32, seed=3)
TOKENS = [int(t) for t in np.random.default_rng(2).integers(1, SHAPE.n_vocab, 160)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Model, Path]]:
    """Heads of 64: quantised keys and values are rotated."""
    path = tiny_models.write_model(tmp_path_factory.mktemp("types") / "wide.gguf", SHAPE)
    model = Model(path)
    yield model, path
    model.close()


def options(type_k: str, type_v: str, **more: object) -> Options:
    return Options(SMALL, 8, 8, n_ctx=512, flash_attn=True, type_k=type_k, type_v=type_v, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("type_k", GGML_TYPE)
def test_every_pair_of_types(wide: tuple[Model, Path], type_k: str) -> None:
    """Kept sets, moved rows and the attention over them, for each V type."""
    for type_v in GGML_TYPE:
        report = Report()
        check_compactions(*wide, TOKENS, options(type_k, type_v), report)
        assert report.compactions >= 10 and report.near_ties <= 1, type_v


@pytest.mark.parametrize("type_k", GGML_TYPE)
def test_rotation_is_undone_on_every_type(wide: tuple[Model, Path], type_k: str) -> None:
    """Policy `latest`: both rotations undone, equal tokens have equal keys but for the type's rounding."""
    model, _ = wide
    spec = dataclasses.replace(SMALL, policy="latest", budget=240)
    latest = dataclasses.replace(options(type_k, "f32"), spec=spec, flash_attn=False)
    with (
        Context(model, latest) as context,
        Context(model, dataclasses.replace(latest, type_k="f32")) as exact,
    ):
        for c in (context, exact):
            c.feed([7] * 100)
        for il in context.layers:
            keys, right = context.per_head("keys_unrotated", il), exact.per_head("keys_unrotated", il)
            size = np.linalg.norm(right, axis=-1).mean()
            rounding = {"f32": 1e-3, "f16": 2e-3, "bf16": 1e-2, "q8_0": 2e-2}.get(type_k, 0.15)
            assert np.linalg.norm(keys - right, axis=-1).max() / size < rounding
            assert np.linalg.norm(right - right[0], axis=-1).max() / size < 1e-3
