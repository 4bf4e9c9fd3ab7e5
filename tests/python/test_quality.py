"""scripts/quality.py: the plan, runs in pieces, and that docs/quality.md is made from what is committed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quality
from cli_tools import talker
from quality_plan import KINDS, OTHERS, STAGES, jobs_of
from rkv_local import KVBudget
from rkv_local.calibration import Calibration, beside, fingerprint
from rkv_local.evals import report
from rkv_local.evals.results import Results, Store, lines, read
from rkv_local.evals.summary import Row, summaries
from rkv_local.evals.verdict import PUBLISHED, candidate
from test_evals import config, filled, table

ROOT = Path(__file__).parents[2]
SMALL = ("--needles", "1,300,2", "--kl", "1,512")


def toy() -> list[str]:
    """Options that make a run take seconds."""
    model = str(talker())
    return [
        "--reasoner",
        model,
        "--long",
        model,
        "-n",
        "300",
        "--families",
        "chain,digits",
        "-t",
        "1",
        *SMALL,
    ]


def run(out: Path, stage: str, *more: str, n: int = 2) -> int:
    return quality.main(["run", "--stage", stage, "-o", str(out), "--n-problems", str(n), *toy(), *more])


def rows(*files: Path) -> list[Row]:
    return summaries(read(files))


def what(row: Row) -> tuple[Any, ...]:
    return row["task"]["kind"], row["variant"], row["asked_percent"], row["type_k"]


# -- the plan ----------------------------------------------------------------------------------------


def test_the_plan_has_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    jobs = [job for stage in STAGES for job in jobs_of(stage)]
    plain = [(j.task, j.split, j.policy, j.percent, j.cells, j.cache, j.calibrated, j.fields) for j in jobs]
    assert len(set(plain)) == len(plain)
    for cache in ("f16", "q8_0"):
        for kind in KINDS:
            found = {(j.policy, j.percent) for j in jobs if (j.task, j.cache, j.fields) == (kind, cache, ())}
            for policy in (candidate(), PUBLISHED, *OTHERS):
                assert {(policy, p) for p in (5, 10, 16, 25, 34, 54)} <= found, (kind, cache, policy)
            assert (None, None) in found
    for job in jobs:
        for name, value in job.fields:  # every one is a budget, and none is what it is without
            made = KVBudget(budget=512, policy=job.policy or "none", **{name: value})
            assert getattr(made, name) == value != getattr(KVBudget(policy=job.policy or "none"), name)
    assert quality.main(["plan"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(STAGES)
    assert quality.main(["plan", "--stage", "full", "--n-problems", "100"]) == 0
    assert " ".join(capsys.readouterr().out.splitlines()[0].split()) == "full 220,000 tokens dense full cache"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["plan", "--stage", "best"], "--stage: 'best' is not one of full, core"),
        (["plan", "--n-problems", "0"], "--n-problems must be at least 1"),
        (["plan", "--kl", "4"], "'4' must be TEXTS,TOKENS"),
        (["run", "--stage", "full", "-o", "x.jsonl", "--shard", "2/2"], "--shard: '2/2' must be I/K"),
        (["run", "--stage", "full", "-o", "x.jsonl", "--known", "absent"], "cannot read absent"),
        (["merge", "absent", "-o", "x"], "cannot read absent"),
    ],
)
def test_bad_arguments(
    args: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert quality.main(args) == 1
    err = capsys.readouterr().err
    assert err.startswith("quality.py: error: ") and says in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# -- runs --------------------------------------------------------------------------------------------


def test_a_run_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.jsonl"
    assert run(out, "core", "--limit-seconds", "0") == 0
    assert "the time is over" in capsys.readouterr().err and out.stat().st_size == 0
    assert run(out, "core") == 0
    assert "1/16 core: dense" in capsys.readouterr().err
    found = rows(out)
    # the full cache was measured because budgets are shares of it
    assert sorted(map(what, found), key=str) == sorted(
        [(k, "full cache", None, "f16") for k in KINDS]
        + [
            (k, p, x, "f16")
            for k in KINDS
            for p in (candidate(), PUBLISHED)
            for x in (10.0, 16.0, 25.0, 34.0)
        ],
        key=str,
    )
    assert {r["problems"] for r in found} == {2}
    for row in found[1:]:
        if row["budget"]:
            assert row["budget"] == round(row["mean_trace"] * row["asked_percent"] / 100)
    data = out.read_bytes()
    assert run(out, "full,core") == 0
    assert out.read_bytes() == data and capsys.readouterr().err == ""
    # the questions of a file are the same problems
    asked = tmp_path / "questions.jsonl"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "FAMILIES", {"chain": "", "digits": ""})
        assert quality.main(["questions", "-o", str(asked), "--n-problems", "4"]) == 0
    assert run(out, "full,core", "--questions", str(asked)) == 0
    assert out.read_bytes() == data
    assert run(out, "full", "--questions", str(asked), n=6) == 1
    assert "has no problem chain/dense/final/2" in capsys.readouterr().err


def test_fresh_problems_have_the_budgets_of_the_final_ones(tmp_path: Path) -> None:
    out, asked = tmp_path / "r.jsonl", tmp_path / "questions.txt"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "FAMILIES", {"chain": "", "digits": ""})
        assert quality.main(["questions", "-o", str(asked), "--n-problems", "2"]) == 0
    assert run(out, "full,fresh", "--questions", str(asked)) == 0
    found = rows(out)
    mean = {
        r["task"]["kind"]: r["mean_tokens"] for r in found if not r["kv"] and r["task"]["split"] == "final"
    }
    fresh = [r for r in found if r["task"]["split"] == "fresh"]
    assert len(fresh) == 2 + 16 + 8 and {r["problems"] for r in fresh} == {2}
    for row in fresh:
        if row["kv"]:
            assert row["budget"] == round(mean[row["task"]["kind"]] * row["asked_percent"] / 100)
    text = quality.page(tmp_path, tmp_path / "q.md", tmp_path / "none", draw=False)
    assert "(fresh seeds: chain, digits)" in text and "(final seeds: chain, digits)" in text


def test_shards_need_what_budgets_are_shares_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, halves = tmp_path / "full.jsonl", [tmp_path / f"{i}.jsonl" for i in range(2)]
    assert run(halves[0], "core", "--shard", "0/2") == 1
    err = capsys.readouterr().err
    assert "quality.py: error: the full cache's results on 2 dense problems are needed" in err
    assert run(full, "full") == 0
    for i, half in enumerate(halves):
        assert run(half, "core", "--shard", f"{i}/2", "--known", str(full)) == 0
        assert len(rows(half)) == 8 and all(r["kv"] for r in rows(half))
    # a file by itself is whole: its configurations stand in it
    one, other = (set(read([half]).configs) for half in halves)
    assert not one & other
    merged = [tmp_path / "all.jsonl.gz", tmp_path / "again.jsonl.gz"]
    for path in merged:
        assert quality.main(["merge", *map(str, (full, *halves)), "-o", str(path)]) == 0
    assert len(rows(merged[0])) == 18 and merged[0].read_bytes() == merged[1].read_bytes()
    # what others have done is not done again, and what is lacking is added to one's own file
    third = tmp_path / "third.jsonl"
    assert run(third, "full,core", "--known", str(merged[0])) == 0
    assert third.stat().st_size == 0
    assert run(third, "full", "--known", str(merged[0]), n=3) == 0
    assert [r["problems"] for r in rows(third)] == [1, 1]
    assert [r["problems"] for r in rows(merged[0], third) if r["kv"] is None] == [3, 3]


def test_budgets_stay_what_they_are_when_problems_are_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.jsonl"
    monkeypatch.setattr(quality, "BASE", 3)
    assert run(out, "full", n=5) == 0
    # the last two problems had other traces
    data = [line.replace(b'"n":300', b'"n":900') if b"final/1" in line else line for line in lines_of(out)]
    out.write_bytes(b"".join(data))
    for n in (1, 4):
        assert run(out, "core", n=n) == 0
        found = rows(out)
        budgets = {r["asked_percent"]: r["budget"] for r in found if what(r)[:2] == ("dense", PUBLISHED)}
        mean = (300 + 900 + 300) / 3  # chain 0 and 1, digits 0
        assert budgets == {p: round(mean * p / 100) for p in (10, 16, 25, 34)}
        assert {r["problems"] for r in found if r["kv"]} == {n}


def lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines(keepends=True)


def test_a_job_that_cannot_be_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "r.jsonl", "edges", "-n", "80", n=1) == 0
    err = capsys.readouterr().err
    assert "edges: dense rkv 5 %: left out: budget is 4, must be larger than window, 8" in err
    assert any(r["asked_percent"] == 54 for r in rows(tmp_path / "r.jsonl"))


def test_layers_are_calibrated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.gguf"
    shutil.copy(talker(), model)
    out = tmp_path / "r.jsonl"
    more = ("--reasoner", str(model), "--long", str(model), "--calibrations", str(tmp_path))
    assert run(out, "layers", *more) == 1
    assert f"{beside(model)}" in capsys.readouterr().err
    size, digest = fingerprint(model)
    curves = ((3.0, 1.0, 0.1), (0.1, 0.0, 0.0))
    made = Calibration("m", size, digest, "latest", {}, (16, 64, 512), curves, 1, "0")
    made.save(beside(model))
    assert run(out, "layers", *more) == 0
    found = [r for r in rows(out) if r["kv"]]
    assert {r["variant"] for r in found} == {
        f"{PUBLISHED} layers=calibrated",
        f"{PUBLISHED} S=256 layers=calibrated",
        f"{candidate()} layers=uniform",
    }
    for row in found:
        if row["policy"] == PUBLISHED:
            budgets = row["kv"]["layer_budgets"]
            assert budgets[0] > budgets[1] and sum(budgets) == 2 * row["budget"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="a shell script")
def test_the_script_for_gpus(tmp_path: Path) -> None:
    """Two processes without a GPU; a second call continues the first."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "GPUS": "2",
        "N": "2",
        "ARGS": " ".join(toy()),
        "PYTHONPATH": str(ROOT),
    }

    def call(out: str, known: str, *stages: str, limit: int = 300) -> str:
        script = [str(ROOT / "scripts" / "gpu_quality.sh"), *stages]
        more = {"OUT": str(tmp_path / out), "KNOWN": known, "LIMIT": str(limit)}
        done = subprocess.run(
            script, env={**environment, **more}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = call("a", "", "full", "core")
    assert "[0] 1/1 full: dense full cache" in said and "[1] 1/1 full: sparse full cache" in said
    (first,) = (tmp_path / "a").iterdir()
    assert first.name.startswith("gpu-") and len(rows(first)) == 18
    assert "full:" not in call("b", str(first), "full", "core")
    (second,) = (tmp_path / "b").iterdir()
    assert rows(second) == []
    assert "no time is left" in call("c", "", "core", limit=1)
    # a daemon of NVIDIA's for the time of the call, here one that only notes what it is told
    asked, daemon = tmp_path / "asked", tmp_path / "bin" / "nvidia-cuda-mps-control"
    daemon.parent.mkdir()
    daemon.write_text(f'#!/bin/sh\necho "${{1:-$(cat)}} $CUDA_MPS_PIPE_DIRECTORY" >> {asked}\n')
    daemon.chmod(0o755)
    environment |= {"MPS": "yes", "PATH": f"{daemon.parent}:{environment['PATH']}"}
    assert "no time is left" in call("d", "", "core", limit=1)
    told, pipes = zip(*(line.split() for line in asked.read_text().splitlines()), strict=True)
    assert told == ("-d", "quit") and len(set(pipes)) == 1 and not Path(pipes[0]).exists()


# -- the page ----------------------------------------------------------------------------------------


def test_the_page_is_made_from_what_is_committed() -> None:
    """Text byte by byte. Plots depend on matplotlib's version: they must be there."""
    assert quality.main(["report", "--check"]) == 0


def test_a_page_that_is_not_up_to_date(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    data, page, notes = tmp_path / "quality", tmp_path / "quality.md", tmp_path / "notes.md"
    data.mkdir()
    paths = ["report", "--data", str(data), "-o", str(page), "--notes", str(notes)]
    assert quality.main(paths) == 0
    assert "There are no results." in page.read_text() and "## How to repeat" in page.read_text()
    assert run(data / "r.jsonl", "full,core") == 0
    capsys.readouterr()
    assert quality.main([*paths, "--check"]) == 1
    assert "is not what its data gives" in capsys.readouterr().err
    notes.write_text("## Tried\n\nThis and that.\n")
    assert quality.main(paths) == 0
    text = page.read_text()
    assert "\n\n## Tried\n\nThis and that.\n\n## Dense problems" in text
    assert f"**Dense problems, final seeds**: `{candidate()}` is better at 0 of 4 budgets" in text
    assert quality.main([*paths, "--check"]) == 0
    plots = sorted((tmp_path / "plots").iterdir())
    assert len(plots) == 4
    plots[0].unlink()
    assert quality.main([*paths, "--check"]) == 1
    assert "a plot is missing" in capsys.readouterr().err


def test_results_of_two_machines_lie_in_one_column() -> None:
    """Mean traces that differ a little give budgets that differ a little."""
    store, other = Store(), Store()
    filled(store, config(), 380, 400)
    filled(store, config(KVBudget(budget=250, policy="rkv"), percent=25.0), 200, 400)
    filled(other, config(KVBudget(budget=251, policy="rkv"), percent=25.0), 60, 100)
    filled(other, config(KVBudget(budget=251, policy="snapkv"), percent=25.0), 30, 100)
    both = Results()
    for results in (other, store):
        for line in lines(results):
            both.take(line)
    text = report.page(summaries(both))
    assert "Right answers of 400 problems; “of n” where it is another number" in text
    assert table(text, "Right answers of")[:3] == [
        ["policy", "25 %"],
        ["rkv", "50.0 % (45.1–54.9)"],
        ["snapkv", "30.0 % (21.9–39.6) of 100"],
    ]
