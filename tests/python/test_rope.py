"""RoPE undone: rkv_unrotate against numpy, and against what real contexts cache."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference as ref
from engine_tools import Context, Model, NativeError, Options, native_unrotate
from tiny_models import Shape, write_model

FACTORS = tuple(1.0 + 0.25 * i for i in range(32))
ROPES = {
    "norm": ref.Rope(n_rot=64),
    "neox": ref.Rope(n_rot=64, neox=True),
    "norm-partial": ref.Rope(n_rot=24),
    "neox-partial": ref.Rope(n_rot=16, neox=True),
    "linear": ref.Rope(n_rot=64, freq_scale=0.25),
    "base-1e6": ref.Rope(n_rot=64, neox=True, freq_base=1e6),
    "yarn": ref.Rope(n_rot=64, neox=True, freq_scale=1 / 4, n_ctx_orig=4096, ext_factor=1.0),
    "yarn-norm-betas": ref.Rope(
        n_rot=64,
        freq_scale=1 / 16,
        n_ctx_orig=2048,
        ext_factor=0.7,
        beta_fast=20,
        beta_slow=2,
        attn_factor=1.3,
    ),
    "yarn-partial": ref.Rope(n_rot=32, neox=True, freq_scale=1 / 8, n_ctx_orig=1024, ext_factor=1.0),
    "factors": ref.Rope(n_rot=64, freq_factors=np.array(FACTORS, np.float32)),
    "factors-yarn": ref.Rope(
        n_rot=64,
        neox=True,
        freq_scale=1 / 4,
        n_ctx_orig=8192,
        ext_factor=1.0,
        attn_factor=0.9,
        freq_factors=np.array(FACTORS, np.float32),
    ),
    "none": ref.Rope(),
}


def angle_error(pos: Any) -> Any:
    """Radians between ggml's float32 product of angles and the engine's (docs/design.md, Undoing RoPE)."""
    return 2.0**-22 * pos


def test_numpy_rope_is_a_rotation_by_relative_position() -> None:
    """q at i times k at j depends on i - j alone; lengths grow by the magnitude alone."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 64))
    for rope in ROPES.values():
        dots = [ref.rotate(q, i, rope) @ ref.rotate(k, i - 7, rope) for i in (7, 100, 5000)]
        np.testing.assert_allclose(dots, dots[0])
        magnitude = rope.attn_factor * (1 + 0.1 * math.log(1 / rope.freq_scale) if rope.ext_factor else 1)
        turned = ref.rotate(q, 123, rope)
        assert np.linalg.norm(turned[: rope.n_rot]) == pytest.approx(
            magnitude * np.linalg.norm(q[: rope.n_rot])
        )
        np.testing.assert_array_equal(turned[rope.n_rot :], q[rope.n_rot :])


def test_numpy_yarn_leaves_fast_dimensions_and_interpolates_slow_ones() -> None:
    rope = ROPES["yarn"]
    plain = ref.Rope(n_rot=64)
    fast = np.array(ref.rope_cos_sin(100, rope))[:, 0] / (1 + 0.1 * math.log(4))
    np.testing.assert_allclose(fast, np.array(ref.rope_cos_sin(100, plain))[:, 0])
    slow = np.array(ref.rope_cos_sin(100, rope))[:, -1] / (1 + 0.1 * math.log(4))
    np.testing.assert_allclose(slow, np.array(ref.rope_cos_sin(25, plain))[:, -1])


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_undone_gives_the_keys_back(name: str, d: int) -> None:
    """Rotated as ggml rounds, undone by the engine. Each head has positions of its own."""
    rope, rng = ROPES[name], np.random.default_rng(1)
    keys = rng.normal(size=(200, 3, d)).astype(np.float32)
    pos = np.sort(rng.integers(0, 32769, size=(200, 3)), axis=0).astype(np.int32)
    pos[0], pos[-1] = 0, 32768
    turned = ref.rotate(keys, pos, rope, np.float32).astype(np.float32)
    if rope.n_rot:
        assert np.abs(turned - keys).max() > 0.5
    error = np.abs(native_unrotate(turned, pos, rope) - keys)
    pair = np.sqrt(2) * np.abs(keys).max(axis=-1, keepdims=True)  # no pair of a row is longer
    assert (error <= 2e-5 + pair * angle_error(pos[..., None])).all(), error.max()
    np.testing.assert_array_equal(error[..., rope.n_rot :], 0)


@pytest.mark.parametrize("name", ROPES)
def test_undone_gives_the_keys_back_in_float64_too(name: str) -> None:
    """Against angles exact but for ggml's float32 `theta_scale` (and YaRN's float32 ramp)."""
    rope, rng = ROPES[name], np.random.default_rng(2)
    keys = rng.normal(size=(64, 2, 64)).astype(np.float32)
    pos = np.repeat(np.geomspace(1, 32768, 64).astype(np.int32)[:, None], 2, axis=1)
    back = native_unrotate(ref.rotate(keys, pos, rope).astype(np.float32), pos, rope)
    ramp = 3e-8 if rope.ext_factor else 0.0
    assert (np.abs(back - keys) <= 3e-6 + ramp * pos[..., None]).all()


@pytest.mark.parametrize("change", [{"n_rot": 66}, {"n_rot": 7}, {"n_rot": -2}, {"freq_base": 0.0}], ids=str)
def test_impossible_rope_is_refused(change: dict[str, float]) -> None:
    rope = replace(ROPES["norm"], **change)  # type: ignore[arg-type]
    with pytest.raises(NativeError, match=r"\w"):
        native_unrotate(np.ones((4, 1, 64), np.float32), np.zeros((4, 1), np.int32), rope)


MODELS = {
    "norm": Shape(d_head=64, n_head=2, n_head_kv=1),
    "norm-factors": Shape(d_head=64, n_head=2, n_head_kv=1, freq_factors=FACTORS),
    "norm-yarn": Shape(d_head=64, n_head=2, n_head_kv=2, yarn_factor=4, n_ctx_orig=2048),
    "neox": Shape(arch="qwen2", d_head=64, n_head=4, n_head_kv=2, freq_base=1e6),
    "neox-yarn": Shape(arch="qwen2", d_head=128, n_head=2, n_head_kv=1, yarn_factor=8, n_ctx_orig=1024),
    "neox-partial": Shape(arch="stablelm", d_head=64, n_head=2, n_head_kv=2, n_rot=16),
}


@pytest.mark.parametrize(
    ("name", "type_k", "n"),
    [
        *((name, type_k, 2000) for name in MODELS for type_k in ("f32", "f16", "q8_0")),
        ("norm-factors", "f32", 20_000),
    ],
)
def test_context_undoes_the_models_own_rope(name: str, type_k: str, n: int, tmp_path: Path) -> None:
    """In layer 0 a token's key without RoPE is the same at every position: that needs no RoPE formula.

    The same token n times, with compactions: first and last positions, and what lies between, side by side.
    """
    shape = replace(MODELS[name], n_layer=1)
    model = Model(write_model(tmp_path / "m.gguf", shape))
    spec = ref.Spec("latest", budget=24, window=4, pin=2)
    noise = {"f32": 2e-4, "f16": 4e-3, "q8_0": 4e-2}[type_k]
    try:
        options = Options(spec, buffer=100, batch=100, n_ctx=32768, type_k=type_k)
        with Context(model, options) as context:
            context.feed([5] * n)
            assert context.compact() and context.stats.compactions >= n // 100 - 1
            pos = context.all_positions(0)
            assert pos.shape[0] == 24 and (pos[0] == 0).all() and (pos[-1] == n - 1).all()
            u = context.per_head("keys_unrotated", 0)
            size = np.abs(u).max()
            np.testing.assert_allclose(
                u, np.broadcast_to(u[:1], u.shape), atol=noise * size * (1 + n / 10_000)
            )
            k = context.per_head("keys", 0)
            assert np.abs(k - k[:1]).max() > 0.3 * size  # as cached they do differ
            back = ref.hadamard(k) if type_k == "q8_0" else k
            numpy_u = ref.unrotate(back, pos, shape.rope, np.float32)
            tolerance = 2e-5 * max(1, size) + np.sqrt(2) * size * angle_error(n)
            np.testing.assert_allclose(u, numpy_u, atol=tolerance)
    finally:
        model.close()
