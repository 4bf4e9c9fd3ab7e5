"""Bad input at the C level: refused with one line, nothing written, nothing lost."""

from __future__ import annotations

import ctypes
from ctypes import byref

import llama_cpp
import numpy as np
import pytest

import engine_tools as native
import reference as ref
from engine_tools import Context, Model, Options

SMALL = Options(ref.Spec(budget=20, window=4, pin=2), buffer=8, batch=8, n_ctx=256, n_seq=2, n_threads=1)

BAD_PARAMS: list[dict[str, float]] = [
    {"policy": -1},
    {"policy": 14},
    {"budget": 0},
    {"budget": 12},  # window 8 + pin 4 leave no room
    {"buffer": 0},
    {"window": 0},
    {"window": 65},
    {"pin": 1016},
    {"pool": 0},
    {"pool": 6},
    {"lambda_": -0.1},
    {"lambda_": 1.5},
    {"lambda_": float("nan")},
    {"threshold": 1.1},
    {"threshold": -1.1},
    {"threshold": float("nan")},
    {"policy": 4, "n_sim": 5},
    {"budget": 2**31},
    {"buffer": 2**32 - 1},
]


@pytest.mark.parametrize("change", BAD_PARAMS, ids=str)
def test_bad_parameters_are_named(small: Model, change: dict[str, float]) -> None:
    params = native.rkv_default_params()
    assert native.rkv_params_check(byref(params))
    for name, value in change.items():
        setattr(params, name, value)
    assert not native.rkv_params_check(byref(params))
    line = native.last_error()
    assert line and "\n" not in line
    assert any(name.strip("_") in line for name in change) or "policy" in line
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx = 512
    assert not native.rkv_init_from_model(small.model, cparams, byref(params))
    assert native.last_error()


def test_good_parameters_pass() -> None:
    for change in (
        {"window": 1},
        {"window": 64},
        {"pin": 0},
        {"pin": 1015},
        {"pool": 1},
        {"lambda_": 0},
        {"lambda_": 1},
    ):
        params = native.rkv_default_params()
        for name, value in change.items():
            setattr(params, name, value)
        assert native.rkv_params_check(byref(params)), native.last_error()


def test_bad_places_are_refused_without_writing(small: Model) -> None:
    with Context(small, SMALL) as context:
        context.feed([1] * 30)
        out = np.full(64, -7, np.int32)
        rows = np.full((64, 16), -7, np.float32)
        for seq, layer, head in ((-1, 0, 0), (2, 0, 0), (0, -1, 0), (0, 2, 0), (0, 0, -1), (0, 0, 2)):
            assert native.rkv_get_positions(context.ctx, seq, layer, head, out.ctypes.data, 64) == -1
            assert native.last_error()
            for function in (native.rkv_get_keys, native.rkv_get_keys_unrotated, native.rkv_get_values):
                assert function(context.ctx, seq, layer, head, rows.ctypes.data, 64) == -1
        for slot in (-1, 4):
            assert native.rkv_get_scores(context.ctx, 0, 0, 0, slot, rows.ctypes.data, 64) == -1
        assert native.rkv_get_queries(context.ctx, 0, 2, rows.ctypes.data, 64) == -1
        assert native.rkv_get_queries(context.ctx, 5, 0, rows.ctypes.data, 64) == -1
        assert native.rkv_get_attn_scale(context.ctx, -1) == native.rkv_get_attn_scale(context.ctx, 2) == 0
        assert native.rkv_seq_used(context.ctx, -1) == native.rkv_seq_used(context.ctx, 2) == -1
        assert not native.rkv_seq_compact(context.ctx, 7)
        assert (out == -7).all() and (rows == -7).all()
        n = native.rkv_get_positions(context.ctx, 0, 0, 0, out.ctypes.data, 3)  # too little room
        assert n == -1 or n == context.used()
        assert (out[3:] == -7).all()


def test_unified_streams_are_refused(small: Model) -> None:
    params = native.params(SMALL.spec, 8, 8)
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx, cparams.n_seq_max, cparams.kv_unified = 512, 2, True
    assert not native.rkv_init_from_model(small.model, cparams, byref(params))
    assert native.last_error()


def test_refused_parameters_make_no_context(small: Model) -> None:
    """Between begin and end too, where the caller makes the context."""
    params = native.params(SMALL.spec, 8, 8)
    params.pool = 6
    native.rkv_begin_init(byref(params))
    cparams = llama_cpp.llama_context_default_params()
    cparams.n_ctx = 512
    context = llama_cpp.llama_init_from_model(small.model, cparams)
    assert not native.rkv_end_init() and not context
    assert "pool" in native.last_error()


LIMITS = {
    "window": 64,
    "budget": 2**24,
    "buffer": 2**20,
    "n_batch_seq": 2**20,
    "pool": 255,
    "n_sim": 4,
    "recent": 4096,
}


@pytest.mark.parametrize("name", LIMITS)
def test_python_and_native_limits_agree(name: str) -> None:
    from rkv_local import KVBudget, _native

    field = "batch" if name == "n_batch_seq" else name
    highest = KVBudget(**{field: LIMITS[name], "policy": "latest"})  # type: ignore[arg-type]
    step = 2 if name == "pool" else 1
    with pytest.raises(ValueError, match=field):
        KVBudget(**{field: LIMITS[name] + step})  # type: ignore[arg-type]
    for beyond in (0, step):
        params = native.RkvParams.from_buffer_copy(_native.params(highest))
        setattr(params, name, LIMITS[name] + beyond)
        assert native.rkv_params_check(byref(params)) == (beyond == 0)
        assert (name in native.last_error()) == (beyond > 0)


def test_python_wrapper_agrees_with_this_transcription(small: Model) -> None:
    from rkv_local import KVBudget, _native

    assert ctypes.sizeof(_native.RkvParams) == ctypes.sizeof(native.RkvParams)
    assert ctypes.sizeof(_native.RkvSelectArgs) == ctypes.sizeof(native.RkvSelectArgs)
    ours, theirs = native.rkv_default_params(), _native.params(KVBudget())
    for name in [field[0] for field in native.RkvParams._fields_][:8]:
        assert getattr(ours, name) == getattr(theirs, name), name
    rng = np.random.default_rng(3)
    k, q = rng.normal(size=(90, 2, 16)).astype(np.float32), rng.normal(size=(8, 4, 16)).astype(np.float32)
    v = rng.normal(size=(90, 2, 24)).astype(np.float32)
    with pytest.raises(ValueError, match=r"^values are missing: the policy latest looks at them$"):
        _native.select(KVBudget(budget=60), k, q)
    for policy in ("rkv", "snapkv", "streaming", "latest"):
        kv = KVBudget(budget=60, policy=policy)
        idx, score = _native.select(kv, k, q, v=v)
        pos = np.repeat(np.arange(90, dtype=np.int32)[:, None], 2, axis=1)
        spec = ref.Spec(
            policy, budget=60, scale=0.25, recent=kv.recent, n_sim=kv.n_sim, value_weight=kv.value_weight
        )
        got = native.native_select(k, q, spec, pos=pos, v=v)
        np.testing.assert_array_equal(idx, got.kept)
        np.testing.assert_array_equal(score[:, 4:82], got.score[:, 4:82])
