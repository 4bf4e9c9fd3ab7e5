"""KVBudget: validation of every field, schedules with exact totals, and the memory arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_local import CACHE_TYPES, POLICIES, SCHEDULES, KVBudget, ModelShape
from rkv_local.budget import pad_ctx
from rkv_local.shape import read_metadata

SMOL = ModelShape.uniform(n_layer=30, n_head=9, n_head_kv=3, n_embd_head=64)
SIZES: dict[str, int | float] = {
    "budget": 1024,
    "window": 8,
    "pin": 4,
    "pool": 7,
    "lam": 0.1,
    "threshold": 0.5,
}


@pytest.mark.parametrize(("policy", "own"), [("rkv", (128, 0, 1, 0.0)), ("latest", (256, 96, 2, 0.5))])
def test_sizes_are_the_published_ones(policy: str, own: tuple[int, int, int, float]) -> None:
    kv = KVBudget(policy=policy)
    assert {name: getattr(kv, name) for name in SIZES} == SIZES
    assert (kv.buffer, kv.recent, kv.n_sim, kv.value_weight) == own
    assert (kv.reference, kv.batch, kv.layer_budgets) == (False, None, None)
    assert KVBudget().policy == "latest"


def test_recent_tokens_of_a_layer() -> None:
    """At most half of the layer's budget, at least the window, never where pinned tokens are."""
    kv = KVBudget(budget=512)
    assert [kv.recent_of(n) for n in (1024, 192, 190, 16, 13)] == [96, 96, 95, 8, 8]
    assert KVBudget(budget=512, pin=450).recent_of(512) == 61
    assert KVBudget(budget=512, policy="rkv").recent_of(512) == 8
    assert KVBudget(budget=512, policy="rkv", recent=40).recent_of(512) == 40
    assert KVBudget(budget=512, recent=0).recent_of(512) == 8
    assert KVBudget(budget=128, pin="prompt").prompt_pin(1000) == 63
    assert KVBudget(budget=128, policy="rkv", pin="prompt").prompt_pin(1000) == 64
    for wrong in (-1, 4097, 1.5):
        with pytest.raises(ValueError, match=r"^recent is .*, must be an integer from 0 to 4096$"):
            KVBudget(recent=wrong)  # type: ignore[arg-type]


def test_frozen_hashable_and_picklable() -> None:
    kv = KVBudget(layer_budgets=[64, 32])
    with pytest.raises(dataclasses.FrozenInstanceError):
        kv.budget = 5  # type: ignore[misc]
    assert hash(kv) == hash(KVBudget(layer_budgets=(64, 32)))
    assert pickle.loads(pickle.dumps(kv)) == kv


BAD = [
    ("budget", 0),
    ("budget", -1),
    ("budget", 8),  # not larger than the window
    ("budget", 2**31),
    ("budget", 2**24 + 1),
    ("budget", 10.5),
    ("budget", "512"),
    ("budget", True),
    ("budget", None),
    ("buffer", 0),
    ("buffer", -128),
    ("buffer", 1.0),
    ("window", 0),
    ("window", 65),
    ("policy", "fifo"),
    ("policy", ""),
    ("policy", None),
    ("policy", ["rkv"]),
    ("lam", -0.01),
    ("lam", 1.01),
    ("lam", math.nan),
    ("lam", "0.1"),
    ("lam", True),
    ("pin", -1),
    ("pin", 1016),  # leaves none to choose: 1024 - 8 - 1 is the most
    ("pin", 4.0),
    ("pin", "all"),
    ("memory", 1.5),
    ("chunk", 0),
    ("chunk", 4097),
    ("growth", 0),
    ("value_share", -0.5),
    ("value_weight", -0.1),
    ("value_weight", 1.1),
    ("seed", -1),
    ("seed", 2**32),
    ("shared_heads", 1),
    ("pool", 0),
    ("pool", 8),
    ("pool", -7),
    ("threshold", -1.1),
    ("threshold", 1.1),
    ("threshold", math.inf),
    ("n_sim", 0),
    ("n_sim", 5),
    ("reference", 1),
    ("reference", None),
    ("batch", 0),
    ("batch", "all"),
    ("layer_budgets", "rising"),
    ("layer_budgets", []),
    ("layer_budgets", 512),
    ("layer_budgets", [512, 12]),  # below window + pin + 1
    ("layer_budgets", [512, "512"]),
    ("layer_budgets", [512, None]),
]


@pytest.mark.parametrize(("field", "value"), BAD, ids=lambda v: repr(v))
def test_bad_value_is_one_line_naming_field_value_and_rule(field: str, value: Any) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"^{field}\b.* (must|is empty)") as caught:
        KVBudget(**arguments)
    text = str(caught.value)
    assert "\n" not in text
    bad = value[-1] if isinstance(value, list) and value else value
    assert value == [] or str(bad) in text or f"{bad:g}" in text


@pytest.mark.parametrize(
    "values",
    [
        {"budget": 9, "pin": 0},
        {"budget": 13},
        {"pin": 1015},
        {"window": 64, "budget": 69},
        {"lam": 0},
        {"lam": 1},
        {"threshold": -1},
        {"pool": 1},
        {"batch": 1, "buffer": 1},
        {"layer_budgets": [13] * 30},
    ],
    ids=str,
)
def test_limits_are_allowed(values: dict[str, Any]) -> None:
    assert KVBudget(**values)


def test_every_policy_and_schedule_is_described() -> None:
    assert list(POLICIES) == [  # enum rkv_policy's order
        *("none", "rkv", "snapkv", "streaming", "latest", "h2o", "gkv", "rpc", "chunkkv", "value-aware"),
        *("keydiff", "lagkv", "triattention", "given"),
    ]
    assert all(KVBudget(policy=p).active == (p != "none") for p in POLICIES)
    assert all("\n" not in text and len(text) > 20 for text in (*POLICIES.values(), *SCHEDULES.values()))


@pytest.mark.parametrize(
    ("values", "batch", "cells"),
    [
        ({}, 256, 1024 + 256),
        ({"buffer": 512}, 512, 1024 + 512),
        ({"batch": 64}, 64, 1024 + 256),
        ({"batch": 64, "policy": "rkv"}, 64, 1024 + 128),
        ({"batch": 300}, 300, 1024 + 300),
        ({"budget": 512, "batch": 1, "buffer": 1}, 1, 513),
    ],
)
def test_cells_are_budget_and_room_for_the_larger_of_buffer_and_batch(
    values: dict[str, Any], batch: int, cells: int
) -> None:
    kv = KVBudget(**values)
    assert kv.n_batch == batch
    assert kv.cells(3) == [cells] * 3


def test_pyramid_falls_from_wide_to_narrow() -> None:
    budgets = KVBudget(budget=1024, layer_budgets="pyramid").budgets(30)
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (13 + 1971, 13 + 51)  # 1011 * (2 - 1/20) and 1011 / 20
    steps = [a - b for a, b in itertools.pairwise(budgets)]
    assert max(steps) - min(steps) <= 1


@given(
    n_layer=st.integers(1, 200),
    window=st.integers(1, 64),
    pin=st.integers(0, 50),
    extra=st.integers(0, 5000),
    schedule=st.sampled_from([None, *SCHEDULES]),
)
def test_schedules_sum_exactly_and_leave_room_in_every_layer(
    n_layer: int, window: int, pin: int, extra: int, schedule: str | None
) -> None:
    kv = KVBudget(budget=window + pin + 1 + extra, window=window, pin=pin, layer_budgets=schedule)
    budgets = kv.budgets(n_layer)
    assert len(budgets) == n_layer
    assert sum(budgets) == n_layer * kv.budget
    assert min(budgets) >= window + pin + 1
    assert budgets == sorted(budgets, reverse=True)
    assert kv.cells(n_layer) == [b + max(kv.buffer, kv.n_batch) for b in budgets]


def test_one_number_per_layer() -> None:
    kv = KVBudget(layer_budgets=[100, 200, 300])
    assert kv.budgets(3) == [100, 200, 300]
    with pytest.raises(ValueError, match="layer_budgets has 3 numbers, must have one per layer: 30"):
        kv.bytes_for(SMOL)
    with pytest.raises(ValueError, match="n_layer is 0"):
        kv.budgets(0)


# --- bytes ---


def test_bytes_of_smollm2_by_hand() -> None:
    # 512 + 256 cells; per layer K and V rows of 3 heads * 64 * 2 bytes, 9 queries of 9 heads * 64 * 4 bytes,
    # positions of 3 heads * 4 bytes
    per_layer = 768 * (384 + 384) + 9 * 9 * 64 * 4 + 768 * 3 * 4
    kv = KVBudget(budget=512, policy="rkv")
    assert kv.bytes_for(SMOL) == 30 * per_layer == 18_593_280
    assert kv.bytes_for(SMOL, n_seq=4) == 4 * 30 * per_layer


def test_bytes_of_stored_similarities() -> None:
    rkv, usual, three = (
        KVBudget(budget=512, policy="rkv"),
        KVBudget(budget=512),
        KVBudget(budget=512, n_sim=3),
    )
    per_slot = 30 * 768 * 3 * 4
    assert usual.bytes_for(SMOL) - rkv.bytes_for(SMOL) == 2 * per_slot
    assert three.bytes_for(SMOL) - rkv.bytes_for(SMOL) == 3 * per_slot


ROW_64 = {
    "f32": 256,
    "f16": 128,
    "bf16": 128,
    "q8_0": 68,
    "q4_0": 36,
    "q4_1": 40,
    "q5_0": 44,
    "q5_1": 48,
    "iq4_nl": 36,
}


@pytest.mark.parametrize("name", CACHE_TYPES)
def test_bytes_of_every_cache_type(name: str) -> None:
    kv = KVBudget(budget=512)
    cells = 30 * 768 * 3
    expected = kv.bytes_for(SMOL) + cells * (ROW_64[name] - 128)
    assert kv.bytes_for(SMOL, type_k=name) == expected
    assert kv.bytes_for(SMOL, type_v=CACHE_TYPES[name][0]) == expected  # by number
    assert kv.bytes_for(SMOL, type_k=name.upper(), type_v=name) == expected + cells * (ROW_64[name] - 128)


@given(
    layers=st.lists(
        st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)),
        min_size=1,
        max_size=6,
    ),
    n_seq=st.integers(1, 300),
    types=st.tuples(st.sampled_from(list(CACHE_TYPES)), st.sampled_from(list(CACHE_TYPES))),
    window=st.integers(1, 64),
    buffer=st.integers(1, 600),
    batch=st.none() | st.integers(1, 600),
    policy=st.sampled_from(["rkv", "snapkv", "streaming", "latest"]),
    n_sim=st.integers(1, 4),
    data=st.data(),
)
def test_bytes_are_the_sum_over_layers(
    layers: list[tuple[int, int, int, int]],
    n_seq: int,
    types: tuple[str, str],
    window: int,
    buffer: int,
    batch: int | None,
    policy: str,
    n_sim: int,
    data: st.DataObject,
) -> None:
    """layers: heads per KV head, KV heads, K head size / 32, V head size / 32."""
    budgets = data.draw(st.lists(st.integers(window + 5, 4000), min_size=len(layers), max_size=len(layers)))
    heads, heads_kv, d_k, d_v = zip(*[(g * h, h, 32 * k, 32 * v) for g, h, k, v in layers], strict=True)
    shape = ModelShape(len(layers), heads, heads_kv, d_k, d_v)
    kv = KVBudget(
        budget=window + 5,
        window=window,
        buffer=buffer,
        batch=batch,
        policy=policy,
        n_sim=n_sim,
        layer_budgets=budgets,
    )
    total = 0.0
    for b, h, h_kv, k, v in zip(budgets, heads, heads_kv, d_k, d_v, strict=True):
        cells = b + max(buffer, max(buffer, 256) if batch is None else batch)
        total += cells * h_kv * (k * ROW_64[types[0]] / 64 + v * ROW_64[types[1]] / 64)
        total += (window + 1) * h * k * 4 + cells * h_kv * 4 * (1 + (n_sim if policy == "latest" else 0))
    assert kv.bytes_for(shape, n_seq, *types) == n_seq * total


def test_policy_none_is_sized_by_n_ctx() -> None:
    kv = KVBudget(policy="none")
    with pytest.raises(ValueError, match="n_ctx is None, must be given with policy none"):
        kv.bytes_for(SMOL)
    assert pad_ctx(1000) == 1024
    assert kv.cells(2, n_ctx=1000) == [1024, 1024]
    assert kv.bytes_for(SMOL, n_ctx=1000) == 30 * 1024 * 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"type_k": "q3_k"}, "type_k is 'q3_k', must be one of f32, f16"),
        ({"type_v": 12}, "type_v is 12, must be one of"),
        ({"type_v": True}, "type_v is True, must be one of"),
        ({"n_seq": 0}, "n_seq is 0, must be an integer from 1"),
    ],
)
def test_bad_cache_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVBudget().bytes_for(SMOL, **arguments)


def test_head_size_that_a_block_does_not_divide() -> None:
    shape = ModelShape.uniform(2, 4, 2, 80)
    assert KVBudget().bytes_for(shape) > 0
    with pytest.raises(
        ValueError, match="type_v is q8_0, whose blocks of 32 do not divide the head size, 80"
    ):
        KVBudget().bytes_for(shape, type_v="q8_0")


# --- shapes from GGUF metadata ---


def _gguf(*pairs: tuple[str, Any], n_pairs: int | None = None) -> bytes:
    """A GGUF header: int → uint32, str → string, lists → arrays of int32 or strings."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs) if n_pairs is None else n_pairs)
    for key, value in pairs:
        out += string(key)
        if isinstance(value, int):
            out += struct.pack("<II", 4, value)
        elif isinstance(value, str):
            out += struct.pack("<I", 8) + string(value)
        elif value and isinstance(value[0], str):
            out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(string, value))
        else:
            out += struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return out


LLAMA = [
    ("general.architecture", "llama"),
    ("tokenizer.ggml.tokens", ["a", "b"]),
    ("tokenizer.ggml.token_type", [1] * 5000),
    ("llama.block_count", 3),
    ("llama.embedding_length", 256),
    ("llama.attention.head_count", 4),
]


def test_shape_from_a_file_header(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(_gguf(*LLAMA, ("llama.attention.head_count_kv", 2)))
    assert ModelShape.of(file) == ModelShape.uniform(3, 4, 2, 64)
    assert ModelShape.of(str(file)) == ModelShape.of(file)
    assert "tokenizer.ggml.token_type" not in read_metadata(file)  # long arrays are skipped
    file.write_bytes(_gguf(*LLAMA))
    assert ModelShape.of(file) == ModelShape.uniform(3, 4, 4, 64)  # no grouping without head_count_kv


def test_shape_with_numbers_per_layer_and_explicit_head_sizes(tmp_path: Path) -> None:
    more = [("llama.attention.head_count_kv", [4, 2, 1]), ("llama.attention.key_length", 96)]
    more.append(("llama.attention.value_length", 32))
    file = tmp_path / "model.gguf"
    file.write_bytes(_gguf(*LLAMA, *more))
    expected = ModelShape(3, (4, 4, 4), (4, 2, 1), (96,) * 3, (32,) * 3)
    assert ModelShape.of(file) == expected
    text = {key: str(value) for key, value in (*LLAMA, *more)}  # as llama.cpp hands metadata out
    assert ModelShape.from_metadata(text) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged|not a GGUF"),
        (b"GGML" + b"\0" * 30, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 2 or later"),
        (_gguf(*LLAMA)[:-6], "damaged or cut short"),
        (_gguf(*LLAMA, n_pairs=99), "damaged or cut short"),
        (_gguf() + struct.pack("<Q", 2**60), "metadata has no"),
        (_gguf(n_pairs=1) + struct.pack("<Q", 2**60), "damaged or cut short"),
        (_gguf(*LLAMA[:3]), "metadata has no llama.block_count"),
        (_gguf(*LLAMA[:5]), "metadata has no llama.attention.head_count"),
        (_gguf(*LLAMA, ("llama.attention.head_count_kv", [4, 2])), "has 2 numbers for 3 layers"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        KVBudget().bytes_for(file)
    assert "\n" not in str(caught.value)


def test_missing_file_and_wrong_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the model file"):
        KVBudget().bytes_for(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="model is int, must be a Llama, a path or a ModelShape"):
        KVBudget().bytes_for(7)
    with pytest.raises(ValueError, match="n_head has 1 numbers, must have one per layer: 2"):
        ModelShape(2, (1,), (1, 1), (8, 8), (8, 8))
