"""rkv-local bench: what its rows say, and that they say what was measured."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli_tools import error_line, invoke, mute, talker
from rkv_local import KVBudget, _native
from rkv_local.bench import Arm, Plan, Row, bench, lib, paired_ratio, trace
from rkv_local.probe import MAIN, Probe
from tiny_families import write_family

KEYS = {
    *(
        "cache",
        "flash_attn",
        "depth",
        "parallel",
        "tokens_per_second",
        "spread",
        "kv_bytes",
        "compaction_share",
    ),
    *("cells", "tokens", "seconds", "ratio_to_full", "compactions", "memory_bytes", "samples"),
}
SMALL = ("--kv-budget", "64", "--kv-buffer", "32")


def report(*args: str) -> dict[str, Any]:
    result = invoke("bench", *args, "-o", "json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_rows_and_their_keys() -> None:
    found = report("-m", str(talker()), *SMALL, "-d", "256,0", "-n", "64", "-r", "3")
    rows = found["rows"]
    assert all(set(row) == KEYS for row in rows)
    assert [(r["cache"], r["flash_attn"], r["depth"]) for r in rows] == [
        ("full", False, 0),
        ("latest", False, 0),
        ("full", True, 0),
        ("latest", True, 0),
        ("full", False, 256),
        ("latest", False, 256),
        ("full", True, 256),
        ("latest", True, 256),
        ("full", False, 80),
        ("full", True, 80),
    ]
    kv = KVBudget(budget=64, buffer=32, batch=32)
    for row in rows:
        assert len(row["samples"]) == 3
        assert row["tokens_per_second"] == statistics.median(row["samples"])
        assert row["tokens"] == 64
        assert row["seconds"] == pytest.approx(64 / row["tokens_per_second"])
        assert row["spread"] >= 0
        if row["cache"] == "latest":
            assert row["cells"] == 96
            assert row["kv_bytes"] == kv.bytes_for(str(talker()))
            # two periods in each stretch at depth 256; from an empty cache 64 tokens do not fill 96 cells
            assert row["compactions"] == (6 if row["depth"] else 0)
            assert (0 < row["compaction_share"] < 1) if row["depth"] else row["compaction_share"] == 0
        else:
            assert row["cells"] >= row["depth"] + 64
            assert row["compaction_share"] == 0
        if row["depth"] != 80 and row["cache"] == "full":
            assert row["ratio_to_full"] == 1
    assert [r["ratio_to_full"] for r in rows if r["depth"] == 80] == [None, None]
    assert {s["flash_attn"] for s in found["summary"]} == {True, False}
    for line in found["summary"]:
        assert line["depth"] == 256
        assert line["ratio_to_faster_full"] > 0 and line["ratio_to_full_at_mean_depth"] > 0
    assert found["params"]["mean_depth"] == 80
    assert found["peak_rss_bytes"] > 2**20


def test_several_sequences() -> None:
    args = ("-m", str(talker()), *SMALL, "-d", "200", "-n", "32", "-r", "2", "--fa", "off")
    one, three = report(*args)["rows"], report(*args, "--parallel", "3")["rows"]
    for single, triple in zip(one, three, strict=True):
        assert triple["parallel"] == 3
        assert triple["tokens"] == 3 * single["tokens"]
        assert triple["cells"] == single["cells"]
        if single["cache"] == "latest":
            assert triple["kv_bytes"] == 3 * single["kv_bytes"]
            assert triple["compactions"] == 3 * single["compactions"] == 6


def test_markdown() -> None:
    result = invoke("bench", "-m", str(talker()), *SMALL, "-d", "128", "-n", "32", "-r", "1", "-fa", "off")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert table[0].split("|")[1].strip() == "cache"
    assert [row.split("|")[1].strip() for row in table[2:]] == ["full", "latest", "full"]
    assert any("of the full cache at depth 80" in line for line in lines)
    assert "batch 32" in lines[0]


def test_stretches_are_whole_periods() -> None:
    args = ("bench", "-m", str(talker()), *SMALL, "-d", "0", "-r", "1", "-fa", "off", "-o", "json")
    result = invoke(*args, "-n", "40")
    assert "-n 40 becomes 64" in result.stderr
    assert json.loads(result.stdout)["params"]["n"] == 64
    result = invoke(*args)
    assert "becomes" not in result.stderr
    assert json.loads(result.stdout)["params"]["n"] == 128
    plan = Plan(talker(), KVBudget(budget=64, buffer=32, batch=32), n=32)
    assert plan.whole_periods() == plan
    assert replace(plan, n=1).whole_periods().n == 32
    assert replace(plan, kv=None, n=5).whole_periods().n == 5


def test_without_a_budget_and_without_a_vocabulary() -> None:
    found = report("-m", str(mute()), "--kv-policy", "none", "-d", "0,64", "-n", "8", "-r", "1", "--fa", "on")
    assert [r["cache"] for r in found["rows"]] == ["full", "full"]
    assert found["summary"] == []
    report("-m", str(mute()), *SMALL, "-d", "200", "-n", "8", "-r", "1", "--fa", "on")


def test_quantised_values_are_measured_with_flash_attention() -> None:
    args = ("-m", str(talker()), *SMALL, "-d", "0", "-n", "32", "-r", "1", "-ctk", "q8_0", "-ctv", "q8_0")
    assert {r["flash_attn"] for r in report(*args)["rows"]} == {True}
    result = invoke("bench", *args, "-fa", "off")
    assert result.exit_code == 2
    assert "flash attention" in error_line(result)


def test_arms_stand_where_they_should() -> None:
    plan = Plan(talker(), KVBudget(budget=64, buffer=32, batch=32), parallel=2)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(plan.model).encode(), lib.llama_model_default_params())
    tokens = trace(model, 600, 0)
    assert trace(model, 600, 0) == tokens != trace(model, 600, 1)
    full, small = (Arm(model, plan, kv, False, 512, tokens) for kv in (None, plan.kv))
    for arm in (full, small):
        for depth in (100, 40, 300, 0, 200):
            arm.at(depth)
            assert arm.pos == depth
            ends = [lib.llama_memory_seq_pos_max(arm.memory, seq) for seq in (0, 1)]
            assert ends == [depth - 1] * 2
        arm.stretch(10)
        assert arm.pos == 210
    full.at(200)
    small.at(200)  # cannot be cut: read again
    assert [lib.llama_memory_seq_pos_max(a.memory, 1) for a in (full, small)] == [199, 199]
    full.close()
    small.close()
    lib.llama_model_free(model)


def test_statistics_of_a_row() -> None:
    row = Row("rkv", True, 0, 1, 96, 1, 10, samples=[1.0, 2.0, 3.0, 4.0, 10.0], compaction_seconds=1.0)
    assert (row.tokens_per_second, row.spread, row.seconds) == (3.0, 2.0, 10 / 3)
    assert row.compaction_share == pytest.approx(1 / sum(10 / s for s in row.samples))
    assert replace(row, samples=[5.0]).spread == 0
    assert paired_ratio(row, replace(row, samples=[1.0, 1.0, 1.0, 1.0, 1.0])) == 3.0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("-d", "-1"), 2, "-1"),
        (("-d", "1,,2"), 2, "1,,2"),
        (("-d", ""), 2, "depth"),
        (("-d", "5000000000"), 2, "out of reach"),
        (("-n", "0"), 2, "n-gen"),
        (("-r", "0"), 2, "repetitions"),
        (("-np", "0"), 2, "parallel"),
        (("-np", "257"), 2, "256"),
        (("-o", "csv"), 2, "csv"),
        (("-fa", "maybe"), 2, "maybe"),
        (("--kv-budget", "12"), 2, "pin"),
        (("extra",), 2, "extra"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], code: int, says: str) -> None:
    result = invoke("bench", "-m", str(talker()), *args)
    assert says in error_line(result)
    assert (result.exit_code, result.stdout) == (code, "")


def test_model_that_is_absent() -> None:
    result = invoke("bench", "-m", "absent.gguf")
    assert result.exit_code == 1
    assert "absent.gguf" in error_line(result)


def test_bench_as_a_function_tells_what_it_does() -> None:
    told: list[str] = []
    kv = KVBudget(budget=64, buffer=32, batch=32)
    rows = bench(Plan(Path(talker()), kv, (0,), 32, 2, (False,)), told.append)
    assert [row.cache for row in rows] == ["full", "latest"]
    assert told[0] == "loading the model"
    assert told[-1] == "depth 0, repetition 2/2 (full, flash attention off)"


def test_windows_take_what_was_planned(tmp_path: Path) -> None:
    """Of a model with sliding windows: each arm's cache is the one that its setting was measured with."""
    model = write_family(tmp_path / "windows.gguf", "window, soft-cap")
    plan = Plan(model, KVBudget(budget=64, buffer=32, batch=32), (1500,), 32, 1, (False,))
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    try:
        found = []
        for kv, flash_attn, n_ctx in plan.arms():
            arm = Arm(loaded, plan, kv, flash_attn, n_ctx, [])
            found.append(sum(m.cache for m in _native.memory(arm.ctx)))
            arm.close()
    finally:
        lib.llama_model_free(loaded)
    with Probe(model) as probe:
        assert found == [probe.measure(setting).parts[MAIN].kv for setting in plan.settings()]
    full, small, _ = found
    assert small < full / 5  # no window of n_ctx cells
