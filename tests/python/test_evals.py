"""rkv_local.evals without a model: intervals, answers, result files, tasks, reports."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkv_local import KVBudget
from rkv_local.evals import answers, report, texts
from rkv_local.evals.results import Config, Results, Store, kv_fields, read
from rkv_local.evals.stats import apart, mean_interval, wilson
from rkv_local.evals.summary import sections, summaries, variant
from rkv_local.evals.tasks import Task, jsonl_task, reason_task

DENSE = {"task": "reason", "kind": "dense", "families": ["chain"], "split": "final"}


def config(kv: KVBudget | None = None, task: dict[str, Any] = DENSE, **more: Any) -> Config:
    return Config("m", "00" * 32, task, kv_fields(kv), max_tokens=100, **more)


def filled(store: Store, of: Config, right: int, n: int, tokens: int = 1000) -> Config:
    store.begin(of, {"bytes": 2**20, "cells": 320, "device": "CPU", "versions": {}, "date": "2026-01-01"})
    for i in range(n):
        store.add(of, f"chain/dense/final/{i}", ok=int(i < right), n=tokens, answer="1")
    return of


# -- intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # from the roots of (p - share)^2 = z^2 p (1 - p) / n, solved by hand with z = 1.96
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (380, 400, 0.9241, 0.9674)],
)
def test_wilson(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_the_ends_of_wilsons_interval_are_where_the_score_test_turns() -> None:
    for correct, n in ((1, 7), (3, 50), (49, 50)):
        share = correct / n
        for p in wilson(correct, n, z=2.0):
            assert abs(share - p) / math.sqrt(p * (1 - p) / n) == pytest.approx(2.0)


def test_intervals_of_nothing_and_of_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="correct is 3, must be from 0 to 2"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="empty"):
        mean_interval([])
    assert mean_interval([2.5]) == (2.5, 2.5, 2.5)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, high - mean, mean - low) == pytest.approx(
        (2, 1.96 / math.sqrt(3), 1.96 / math.sqrt(3)), abs=1e-4
    )
    assert apart((0.1, 0.2), (0.3, 0.4)) and apart((0.3, 0.4), (0.1, 0.2))
    assert not apart((0.1, 0.3), (0.3, 0.4))


# -- answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>\n1 + 1\n</think>\nThe answer is 2.", "The answer is 2."),
        ("1 + 1\n</think>\n\n2", "2"),
        ("<think>without an end: 2", ""),
        (" no thinking: 2 ", "no thinking: 2"),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("[THINK]x[/THINK] y", "y"),
    ],
)
def test_what_follows_the_thinking(text: str, said: str) -> None:
    assert answers.final_part(text) == said


def test_text_answers() -> None:
    assert answers.text_equal(" Tom  and\nMia. ", "tom and mia")
    assert not answers.text_equal("12", "2")
    assert answers.mentions("It is pier 47, I think.", "47")
    assert not answers.mentions("It is pier 147.", "47")
    assert not answers.mentions("It is pier 4.", "47")


@pytest.mark.parametrize(
    ("text", "right", "ok"),
    [
        ("<think>x</think>\nThe answer is 42.", "42", True),
        ("<think>x</think>\nthe final answer is: 42", "42", True),
        ("<think>x</think>\n42", "42", True),
        ("<think>x</think>\nThe answer is 421.", "42", False),
        ("<think>42", "42", False),
        ("<think>42</think>", "42", False),
    ],
)
def test_grades_of_the_reasoner(text: str, right: str, ok: bool) -> None:
    task = reason_task("dense", ["chain"], "dev", 1)
    assert task.grade(text, right)[0] is ok


def test_answers_in_files_of_questions() -> None:
    for row, answer in (
        ({"answer": "so 6 * 7 = <<6*7=42>>42\n#### 42"}, "42"),
        ({"answer": 204}, "204"),
        ({"solution": "Thus $x = \\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
        (
            {"solution": "long", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)"},
            "\\left( 3, \\frac{\\pi}{2} \\right)",
        ),
        ({"answer": " ", "solution": "7"}, "7"),
    ):
        assert answers.expected(row, "here") == answer
    with pytest.raises(ValueError, match=r"^here has no answer"):
        answers.expected({"answer": None}, "here")
    assert answers.boxed("\\boxed{a} \\boxed{b{c}d} e") == "b{c}d"
    assert answers.boxed("\\boxed{never closed") is None


def test_mathematical_answers() -> None:
    pytest.importorskip("math_verify")
    for said, right in (
        ("So it is \\boxed{\\frac{1}{2}}.", "0.5"),
        ("\\boxed{1/2}", "\\frac{1}{2}"),
        ("The answer is $x = 42$.", "42"),
        ("\\boxed{\\{1, 2\\}}", "\\{2, 1\\}"),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
        ("\\boxed{90^\\circ}", "90"),
    ):
        assert answers.math_equal(said, right), (said, right)
    for said, right in (("\\boxed{3}", "2"), ("I don't know.", "2"), ("\\boxed{x+1}", "x-1")):
        assert not answers.math_equal(said, right), (said, right)
    task = Task({}, "", [], "math")
    assert task.grade("<think>\\boxed{1}</think>First 2, then \\boxed{\\frac{6}{3}}.", "2") == (
        True,
        "\\frac{6}{3}",
    )
    assert task.grade("word " * 100 + "so it is 12", "12") == (
        True,
        ("word " * 100 + "so it is 12")[-80:].strip(),
    )


def test_without_math_verify_there_is_a_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "1+1?", "answer": "2"}\n')
    with pytest.raises(RuntimeError, match="math-verify, which is not installed: pip install"):
        jsonl_task(file)
    assert jsonl_task(file, compare="text").groups[0].items[0].answer == "2"


# -- tasks -------------------------------------------------------------------------------------------


def test_problems_are_shared_among_the_families() -> None:
    task = reason_task("sparse", ["chain", "digits"], "dev", 5)
    assert [i.split("/")[0] for i in task.ids] == ["chain"] * 3 + ["digits"] * 2
    assert len(set(task.ids)) == 5
    assert set(reason_task("sparse", ["chain", "digits"], "dev", 3).ids) < set(
        task.ids
    )  # more of it: the rest is run
    assert not set(task.ids) & set(reason_task("sparse", ["chain", "digits"], "final", 5).ids)


def test_files_of_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [
        {"problem": "P", "answer": "1", "unique_id": "a/1"},
        {"question": " Q ", "answer": "#### 2"},
        {"prompt": "R", "solution": "3"},
    ]
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    task = jsonl_task(file, compare="text", instruction="Go.")
    assert [(i.id, i.question, i.answer) for i in task.groups[0].items] == [
        ("a/1", "P\n\nGo.", "1"),
        ("3", "Q\n\nGo.", "2"),
        ("5", "R\n\nGo.", "3"),
    ]
    assert len(jsonl_task(file, 2, "text").ids) == 2
    assert jsonl_task(file, 2, "text").name == jsonl_task(file, 3, "text").name


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "has no questions"),
        (b"{\n", "line 1, is not JSON"),
        (b"[1]\n", "line 1, is not an object"),
        (b'{"answer": "1"}\n', "line 1, has no question"),
        (b'{"question": "a", "answer": "1"}\n{"question": "b"}\n', "line 2, has no answer"),
        (
            b'{"question": "a", "answer": "1", "id": 1}\n{"question": "b", "answer": "1", "id": "1"}',
            "another line has",
        ),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_files_of_questions(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        jsonl_task(file, compare="text")


def test_needles_lie_at_their_depths() -> None:
    source = texts.source()
    assert source.name.startswith("pydoc topics of Python 3.")
    paragraphs = [f"paragraph {i}" for i in range(100)]
    text = texts.Source("made up", "\n\n".join(paragraphs))
    task = texts.needles(text, [10] * 100, 400, 4, 2, seed=1)
    assert len(task.groups) == 2 and len(task.ids) == len(set(task.ids)) == 8
    for group in task.groups:
        parts = group.text.split("\n\n")[1:]
        assert len(parts) == 44
        planted = [i for i, part in enumerate(parts) if not part.startswith("paragraph")]
        assert planted == [5, 16, 27, 38]  # 12.5 %, 37.5 % ... of 40, and the facts before each
        for at, item in zip(planted, group.items, strict=True):
            assert answers.mentions(parts[at], item.answer)
            assert parts[at] not in item.question
        assert [item.fields["depth"] for item in group.items] == [0.125, 0.375, 0.625, 0.875]
    assert (
        task.groups[0].items[0].question
        != texts.needles(text, [10] * 100, 400, 4, 2, seed=2).groups[0].items[0].question
    )
    with pytest.raises(ValueError, match="has 2 parts of 400 tokens, 3 are needed"):
        texts.needles(text, [10] * 100, 400, 4, 3)


# -- result files ------------------------------------------------------------------------------------


def test_a_store_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    with Store(file) as store:
        full = filled(store, config(), 3, 4)
        small = filled(store, config(KVBudget(budget=100, policy="rkv"), percent=10.0), 1, 4)
    with Store(file) as again:
        assert again.configs == {full.key: full, small.key: small}
        assert set(again.done(small)) == {f"chain/dense/final/{i}" for i in range(4)}
        assert again.mean_trace(small) == again.mean_trace(full, ["chain/dense/final/0"]) == 1000
        assert again.mean_trace(small, ["chain/dense/final/9"]) is None
        filled(again, small, 1, 5)
    rows = summaries(read([file]))
    assert [(r["policy"], r["correct"], r["problems"]) for r in rows] == [("full", 3, 4), ("rkv", 1, 5)]
    assert rows[1]["budget_percent"] == 10
    packed = tmp_path / "r.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert summaries(read([packed])) == rows


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    with Store(file) as store:
        of = filled(store, config(), 2, 3)
    whole = file.read_bytes()
    for cut in (1, 2, 10, 40):
        file.write_bytes(whole[:-cut])
        kept = 3 if cut == 1 else 2
        assert len(read([file]).done(of)) == kept
        with Store(file) as store:
            assert len(store.done(of)) == kept
            store.add(of, "new", ok=1, n=1, answer="")
        lines = file.read_bytes().splitlines()
        assert all(json.loads(line) for line in lines)
        assert len(lines) == 2 + kept + 1
    file.write_bytes(b'{"c": "torn')
    with Store(file) as store:
        assert not store.configs
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    "content", [b"hello\nworld\n", b'{"a": 1}\n', b"[]\n", b'{"row": "config", "c": "x"}\n']
)
def test_a_file_of_something_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt, line 1, is not"):
        Store(file)
    assert file.read_bytes() == content
    with pytest.raises(ValueError, match="absent"):
        read([tmp_path / "absent"])


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    code = f"from pathlib import Path; from rkv_local.evals.results import Store; Store(Path({str(file)!r}))"
    with Store(file):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing" in run.stderr
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_configuration_is() -> None:
    one = config(KVBudget(budget=100, policy="rkv"))
    assert one.key == config(KVBudget(budget=100, policy="rkv"), percent=5.0).key
    others = [
        config(KVBudget(budget=101, policy="rkv")),
        config(KVBudget(budget=100, policy="snapkv")),
        config(KVBudget(budget=100, lam=0.5, policy="rkv")),
        config(KVBudget(budget=100, batch=64, policy="rkv")),
        config(KVBudget(budget=100, policy="rkv"), type_k="q8_0"),
        config(KVBudget(budget=100, policy="rkv"), task={**DENSE, "split": "dev"}),
        config(KVBudget(budget=100, policy="rkv"), seed=1),
        config(),
    ]
    assert len({one.key, *(c.key for c in others)}) == 1 + len(others)
    assert kv_fields(KVBudget(policy="none")) is None
    pyramid = kv_fields(KVBudget(budget=100, layer_budgets="pyramid", policy="rkv"), 4)
    assert pyramid and pyramid["schedule"] == "pyramid" and sum(pyramid["layer_budgets"]) == 400
    assert variant(pyramid) == "rkv layers=pyramid"
    assert variant(kv_fields(KVBudget(lam=0.5, buffer=64, policy="latest"))) == "latest S=64 λ=0.5"
    assert variant(kv_fields(KVBudget(reference=True, batch=32, policy="rkv"))) == "rkv reference batch=32"
    assert variant(None) == "full cache"


# -- reports -----------------------------------------------------------------------------------------


def example(store: Store) -> None:
    """400 problems of traces of 1,000 tokens: full cache 95 %; latest beats rkv clearly at 16 and 25 %."""
    filled(store, config(), 380, 400)
    filled(store, config(type_k="q8_0", type_v="q8_0"), 379, 400)
    for percent, rkv, latest in ((10, 100, 110), (16, 160, 352), (25, 200, 379), (34, 380, 340)):
        for policy, right in (("rkv", rkv), ("latest", latest)):
            kv = KVBudget(budget=10 * percent, policy=policy)
            filled(store, config(kv, percent=float(percent)), right, 400)
    kv = KVBudget(budget=250, lam=0.5, policy="rkv")
    filled(store, config(kv, percent=25.0), 120, 400)
    filled(
        store,
        config(KVBudget(budget=250, policy="rkv"), type_k="q8_0", type_v="q8_0", percent=25.0),
        201,
        400,
    )


def table(text: str, start: str) -> list[list[str]]:
    """Cells of the first table after a line."""
    lines = text[text.index(start) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_verdict() -> None:
    store = Store()
    example(store)
    rows = summaries(store)
    text = report.page(rows, default="latest")
    verdict = table(text, "## Verdict")
    assert [(r[0], r[-1]) for r in verdict[1:]] == [
        ("10 %", "better, intervals overlap"),
        ("16 %", "better, intervals apart"),
        ("25 %", "better, intervals apart"),
        ("34 %", "**worse**, intervals apart"),
    ]
    assert "Better at 3 of 4 budgets, with intervals apart at 2." in text
    assert (
        "**Dense problems, final seeds**: `latest` is better at 3 of 4 budgets, with intervals apart at 2; "
        "at 10 %: " in text
    )
    assert "Aim at 25 %: 97 % of the full cache's accuracy. 99.7 % on 400 problems: reached." in text
    assert "Aim at 16 %: 90 % of the full cache's accuracy. 92.6 % on 400 problems: reached." in text
    assert (
        "25 %: 97 % of the full cache's accuracy. 52.6 % on 400 problems: missed by 44.4 points."
        in report.page(rows, default="rkv")
    )
    assert "The default policy is rkv itself." in report.page(rows, default="rkv")
    assert "snapkv and rkv were not measured" in report.page(rows, default="snapkv")


def test_tables_of_a_page() -> None:
    store = Store()
    example(store)
    text = report.page(summaries(store))
    main = table(text, "Right answers of 400 problems, with 95 % intervals:")
    assert main[0] == [
        "policy",
        "10 % (100 cells)",
        "16 % (160 cells)",
        "25 % (250 cells)",
        "34 % (340 cells)",
    ]
    assert [r[0] for r in main[1:]] == ["latest", "rkv"]
    assert "Memory of a sequence: 1.00 MiB at 10 % (100 cells), 1.00 MiB at 16 %" in text
    assert main[1][2] == "88.0 % (84.4–90.8)"
    assert "Full cache: 94.8 % (92.1–96.5) [95.0 % (92.4–96.7)]." in text
    assert table(text, "**Cache type q8_0** (f16 in brackets):") == [
        ["policy", "25 % (250 cells)"],
        ["rkv", "50.2 % (45.4–55.1) [50.0 % (45.1–54.9)]"],
    ]
    assert table(text, "**Ablations of rkv:**") == [
        ["rkv", "25 % (250 cells)"],
        ["as above", "50.0 % (45.1–54.9)"],
        ["λ=0.5", "30.0 % (25.7–34.7)"],
    ]
    assert "380" not in report.page([]) and "There are no results." in report.page([])


def test_shared_heads_are_compared_with_heads_of_their_own() -> None:
    store = Store()
    filled(store, config(), 380, 400)
    for shared in (False, True):
        fields = {**(kv_fields(KVBudget(budget=250, policy="rkv")) or {}), "shared_heads": shared}
        of = Config("m", "00" * 32, DENSE, fields, max_tokens=100)
        filled(store, of, 20 if shared else 200, 400)
    rows = summaries(store)
    text = report.page(rows)
    assert table(
        text,
        "**One index set for all heads and layers, against one for each (every layer the same budget):**",
    )[1:] == [
        ["rkv: each layer and head its own cells", "50.0 % (45.1–54.9)"],
        ["rkv: one index set for all", "5.0 % (3.3–7.6)"],
    ]
    assert "Ablations" not in text


def test_a_variant_without_its_counterpart_is_shown_all_the_same() -> None:
    store = Store()
    filled(store, config(), 380, 400)
    usual = kv_fields(KVBudget(budget=250, policy="rkv")) or {}
    for more in ({}, {"lam": 0.5, "schedule": "calibrated", "layer_budgets": [200, 300]}):
        filled(store, Config("m", "00" * 32, DENSE, {**usual, **more}, max_tokens=100), 200, 400)
    text = report.page(summaries(store))
    assert [row[0] for row in table(text, "**Ablations of rkv:**")[1:]] == [
        "as above",
        "λ=0.5 layers=calibrated",
    ]
    assert "Calibrated budgets by layer" not in text


def test_sections_hold_what_can_be_compared() -> None:
    store = Store()
    filled(store, config(), 1, 2)
    filled(store, config(task={**DENSE, "kind": "sparse"}), 1, 2)
    filled(store, config(seed=1, temp=0.5), 1, 2)
    kl = config(
        KVBudget(budget=64, policy="rkv"),
        task={"task": "kl", "text": "t", "text_sha256": "0", "tokens": 512, "step": 16},
    )
    store.begin(kl, {})
    for id, value in (("0@0", 9.0), ("0@256", 0.5), ("1@0", 9.0), ("1@256", 0.7)):
        store.add(kl, id, n=256, kl=value, top1=0.9, nll=3.0, nll_full=2.9)
    found = sections(summaries(store))
    assert [s.kind for s in found] == ["reason"] * 3 + ["kl"]
    row = found[-1].rows[0]
    assert (row["kl"], row["top1"], row["positions"]) == pytest.approx((0.6, 0.9, 512))
    assert "0.6000 (" in report.page(summaries(store))
    titles = [report.title(s) for s in found]
    assert len(set(titles)) == 4 and "temperature 0.5, seed 1" in titles[2]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rkv_local.evals import plots

    store = Store()
    example(store)
    task = {"task": "needles", "text": "t", "text_sha256": "0", "tokens": 512, "depths": 2, "seed": 0}
    for kv in (None, KVBudget(budget=64, policy="rkv"), KVBudget(budget=128, policy="rkv")):
        of = config(kv, task=task)
        store.begin(of, {})
        for i in range(4):
            store.add(of, str(i), ok=i % 2, n=3, answer="", depth=(0.25, 0.75)[i // 2])
    rows = summaries(store)
    drawn = plots.draw(rows, tmp_path / "docs" / "plots", tmp_path / "docs" / "page.md")
    paths = [path for found in drawn.values() for _, path in found]
    assert len(paths) == 4
    for path in paths:
        assert path.startswith("plots/")
        assert (tmp_path / "docs" / path).read_text().startswith("<?xml")
    text = report.page(rows, plots=drawn)
    assert all(f"]({path})" in text for path in paths)
    before = [(tmp_path / "docs" / p).read_bytes() for p in paths]
    plots.draw(rows, tmp_path / "docs" / "plots", tmp_path / "docs" / "page.md")
    assert before == [(tmp_path / "docs" / p).read_bytes() for p in paths]


def test_the_terminals_table() -> None:
    store = Store()
    example(store)
    lines = report.overview(summaries(store)).splitlines()
    assert lines[0] == "Dense problems (final seeds: chain): m"
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert len(lines) == 2 + 2 + len(summaries(store))
    assert report.overview([]) == "no results"


@pytest.mark.parametrize("make", [Results().take, Config.of_row])
def test_rows_that_are_none(make: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        make({"row": "config", "c": "1"})
