"""rkv_local.evals with models: batching, runs that are resumed, distances, and the command."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_tools import error_line, invoke, make_random_model, mute, shell, smollm2, start, talker
from llamas import under
from rkv_local import KVBudget, Llama, RKVError, Session
from rkv_local.evals import divergence, texts
from rkv_local.evals.decode import Batcher, Done, Request
from rkv_local.evals.model import Context, Model, Setting, sha256
from rkv_local.evals.results import Config, Store, read
from rkv_local.evals.runner import Progress, Runner, Stopped
from rkv_local.evals.summary import summaries
from rkv_local.evals.tasks import Group, Item, Task

SMALL = KVBudget(budget=24, buffer=8, window=4, batch=16)
BUDGETS = [None, SMALL, under(SMALL, "streaming")]
NAMES = ["full", "rkv", "streaming"]
if hasattr(KVBudget, "prompt_pin"):  # until every branch has it
    BUDGETS.append(replace(SMALL, pin="prompt"))  # type: ignore[arg-type, unused-ignore]
    NAMES.append("pinned prompt")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Random weights in f32, so that numbers hardly depend on the size of a batch; SmolLM2's vocabulary."""
    path = tmp_path_factory.mktemp("exact") / "exact.gguf"
    shape = {"layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 32, "ff": 64, "type": "f32"}
    with Model(make_random_model(path, tokenizer=smollm2(), **shape)) as made:
        yield made


def requests(model: Model, lengths: Sequence[int]) -> list[Request]:
    """Made-up prompts, every one of other tokens."""
    rng = np.random.default_rng(0)
    return [Request(str(i), rng.integers(20, model.n_vocab, n, np.int32)) for i, n in enumerate(lengths)]


def answered(
    model: Model, setting: Setting, wanted: Sequence[Request], limit: int, **more: Any
) -> dict[str, Done]:
    with Context(model, setting) as context:
        return {done.id: done for done in Batcher(context, limit, **more).run(wanted)}


# -- batching ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", BUDGETS, ids=NAMES)
def test_a_sequence_among_others_says_what_it_says_alone(model: Model, kv: KVBudget | None) -> None:
    """Prompts of all lengths, ends at many times (of every fiftieth token), slots that move."""
    ends = model.ends
    model.ends = np.random.default_rng(1).random(model.n_vocab) < 0.015
    try:
        wanted = requests(model, (1, 5, 16, 17, 40, 90, 3, 3, 33, 2, 64, 7))
        setting = Setting(kv=kv, n_ctx=200)
        alone = answered(model, setting, wanted, 60)
        for n_seq in (2, 5, 12, 13):
            together = answered(model, replace(setting, n_seq=n_seq), wanted, 60)
            assert {i: d.tokens.tolist() for i, d in together.items()} == {
                i: d.tokens.tolist() for i, d in alone.items()
            }
        assert len({d.n_tokens for d in alone.values()}) > 6
        assert {d.stopped for d in alone.values()} == {True, False}
        for id, done in alone.items():
            assert done.n_prompt == len(wanted[int(id)].tokens)
            assert done.stopped == (done.n_tokens < 60)
            assert not model.ends[done.tokens].any()
    finally:
        model.ends = ends


@pytest.mark.parametrize("kv", BUDGETS, ids=NAMES)
def test_it_says_what_a_session_says(model: Model, kv: KVBudget | None) -> None:
    wanted = requests(model, (9, 50))
    found = answered(model, Setting(kv=kv, n_ctx=128, n_seq=2), wanted, 40)
    n_batch = kv.n_batch if kv else 512
    with Llama(
        str(model.path), kv=kv, n_ctx=128, n_batch=min(n_batch, 128), n_threads=1, verbose=False
    ) as llama:
        for request in wanted:
            session = Session(llama)
            row = session.decode({0: [int(t) for t in request.tokens]})[0]
            said: list[int] = []
            while len(said) < 40 and not model.ends[row.argmax()]:
                said.append(int(row.argmax()))
                row = session.decode({0: said[-1:]})[0]
            assert found[request.id].tokens.tolist() == said


@pytest.mark.parametrize("kv", BUDGETS, ids=NAMES)
def test_a_base_is_read_once_and_continued(model: Model, kv: KVBudget | None) -> None:
    base, *tails = (np.asarray(r.tokens) for r in requests(model, (48, 5, 9, 16)))
    chunks = Setting(kv=kv, n_ctx=160, n_seq=3)
    whole = [Request(str(i), np.concatenate([base, t])) for i, t in enumerate(tails)]
    with Context(model, chunks) as context:
        batcher = Batcher(context, 30, first=1)
        batcher.base(0, base)
        with_base = {d.id: d for d in batcher.run(Request(str(i), t, 0) for i, t in enumerate(tails))}
        batcher.base(0, base[:20])
        (shorter,) = batcher.run([Request("x", np.concatenate([base[20:], tails[0]]), 0)])
    # 48 tokens are three chunks of 16, so that both ways feed the same chunks
    without = answered(model, replace(chunks, n_seq=2), whole, 30)
    for id, done in without.items():
        assert with_base[id].tokens.tolist() == done.tokens.tolist()
        assert with_base[id].n_prompt == done.n_prompt
    if kv is None:
        assert shorter.tokens.tolist() == without["0"].tokens.tolist()


def test_sampling_depends_on_seed_and_id_alone(model: Model) -> None:
    wanted = requests(model, (4, 4, 4, 4))
    setting = Setting(n_ctx=64, n_seq=4)
    one = answered(model, setting, wanted, 12, temp=1.0, seed=3)
    other = answered(model, replace(setting, n_seq=2), wanted[::-1], 12, temp=1.0, seed=3)
    assert {i: d.tokens.tolist() for i, d in one.items()} == {i: d.tokens.tolist() for i, d in other.items()}
    again = answered(model, setting, wanted, 12, temp=1.0, seed=4)
    assert all(again[i].tokens.tolist() != d.tokens.tolist() for i, d in one.items())
    cold = answered(model, setting, wanted, 12, temp=1e-4, seed=4)
    greedy = answered(model, setting, wanted, 12)
    assert {i: d.tokens.tolist() for i, d in cold.items()} == {
        i: d.tokens.tolist() for i, d in greedy.items()
    }


def test_draws_follow_the_softmax(model: Model) -> None:
    with Context(model, Setting(n_ctx=64)) as context:
        batcher = Batcher(context, 4, temp=2.0)
        batcher._begin(0, requests(model, (4,))[0])
        logits = np.array([[0.0, 2.0, 4.0, -30.0]], np.float32)
        draws = [int(batcher._choose(logits, np.array([0], np.int32))[0]) for _ in range(4000)]
    weights = np.exp([0.0, 1.0, 2.0])
    share = np.bincount(draws, minlength=4) / 4000
    assert share[:3] == pytest.approx(weights / weights.sum(), abs=0.03)  # about four standard errors
    assert share[3] == 0


def test_leaving_early_leaves_the_context_clean(model: Model) -> None:
    wanted = requests(model, (5, 6, 7, 8))
    with Context(model, Setting(kv=SMALL, n_ctx=200, n_seq=2)) as context:
        steps = iter(range(1000))
        stopped = Batcher(context, 50, stop=lambda: next(steps) == 20)
        assert list(stopped.run(wanted)) == []
        assert stopped.n_steps == 20
        batcher = Batcher(context, 50)
        first = next(answers := batcher.run(wanted))
        answers.close()
        again = {d.id: d for d in batcher.run(wanted)}
        assert again[first.id].tokens.tolist() == first.tokens.tolist()


def test_requests_that_cannot_be(model: Model) -> None:
    with Context(model, Setting(n_ctx=256)) as context:
        batcher = Batcher(context, 5)
        with pytest.raises(ValueError, match="a: the prompt has no tokens"):
            list(batcher.run([Request("a", [])]))
        with pytest.raises(ValueError, match="b: the prompt has 256 tokens, n_ctx is 256"):
            list(batcher.run([Request("b", [5] * 256)]))
        (last,) = batcher.run([Request("c", [5] * 255)])
        assert last.n_tokens == 2  # the prompt's and that of position 255
        for bad in ({"max_tokens": 0}, {"first": 1}, {"temp": -1.0}):
            with pytest.raises(ValueError, match=next(iter(bad))):
                Batcher(context, **{"max_tokens": 1, **bad})  # type: ignore[arg-type]
    with pytest.raises(RKVError):
        Context(model, Setting(n_ctx=2**24, n_seq=256))


def test_models_that_cannot_talk() -> None:
    with pytest.raises(RuntimeError, match="has no vocabulary"):
        Model(mute())


# -- runs --------------------------------------------------------------------------------------------


def questions(n: int = 6) -> Task:
    items = [Item(f"q{i}", f"What is {i} and {i}?", str(2 * i)) for i in range(n)]
    return Task({"task": "jsonl", "file": "made-up"}, "made up", [Group(items)])


def runner(model: Model, store: Store, **more: Any) -> Runner:
    return Runner(model, store, Setting(), "exact", parallel=4, max_tokens=20, **more)


def test_a_run_that_is_killed_continues_where_it_was(model: Model, tmp_path: Path) -> None:
    task, file, other = questions(), tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    with Store(other) as store:
        whole = runner(model, store).run(task, SMALL)
    with Store(file) as store:
        first = runner(model, store)
        first.stop = lambda: len(store.done(whole)) >= 2
        assert first.run(task, SMALL) == whole
        n = len(store.done(whole))
        assert 2 <= n < 6
    file.write_bytes(file.read_bytes()[:-7])  # the last result is torn
    with Store(file) as store:
        done = dict(store.done(whole))
        assert len(done) == n - 1
        second = runner(model, store)
        second.run(task, SMALL)
        assert second.progress.batcher is not None
        assert second.progress.done == second.progress.total == 6
        third = runner(model, store)
        third.run(task, SMALL)
        assert third.progress.batcher is None  # nothing was left to do
        assert all(store.done(whole)[id] == row for id, row in done.items())

    def said(path: Path) -> list[tuple[Any, ...]]:
        return sorted((r["id"], r["ok"], r["n"], r["answer"]) for r in read([path]).done(whole).values())

    assert said(file) == said(other)
    assert len(read([file]).runs[whole.key]) == 2


def test_what_a_run_tells(model: Model) -> None:
    store = Store()
    made = runner(model, store)
    made.run(questions(3), None)
    made.run(questions(3), SMALL, 12.5)
    full, small = summaries(store)
    assert small["problems"] == 3 and small["kv"]["budget"] == 24 and small["asked_percent"] == 12.5
    assert small["cells"] == 24 + 16 and small["bytes"] == SMALL.bytes_for(str(model.path))
    assert small["budget_percent"] == pytest.approx(100 * 24 / full["mean_tokens"])
    assert full["sha256"] == sha256(model.path) == model.sha256 and len(full["sha256"]) == 64
    assert full["limit_share"] == sum(r["n"] == 20 for r in store.problems[full["config"]].values()) / 3
    assert "llama.cpp" in full["versions"][0]
    assert full["device"] == ["CPU"]


def test_what_is_told_meanwhile(model: Model) -> None:
    told: list[tuple[float, str]] = []
    made = runner(model, Store())

    def listen() -> bool:
        told.append(made.progress.state())
        return False

    made.stop = listen
    made.run(questions(), SMALL)
    assert told[0] == (0.0, "latest 24: 0/6")
    assert Progress().state() == (0.0, "starting")
    assert told[-1][0] >= 2 / 6 and re.match(r"latest 24: [2-6]/6, \d right, [\d,]+ tok/s$", told[-1][1])
    assert made.progress.state()[0] == 1


def test_budgets_in_percent_measure_the_full_cache_first(model: Model) -> None:
    store = Store()
    made = runner(model, store)
    made.setting = replace(made.setting, type_k="q8_0")
    task = questions(4)
    cells = made.cells(task, 50)
    (full,) = store.configs.values()
    assert full.kv is None
    rows = store.done(full).values()
    assert cells == round(sum(r["n"] for r in rows) / 4 / 2)
    assert (full.type_k, full.type_v) == ("f16", "f16")
    made.stop = lambda: pytest.fail("nothing is to be run")
    assert made.cells(task, 50) == cells
    made.stop = lambda: True
    with pytest.raises(Stopped):
        made.cells(questions(5), 50)


def test_needles_continue_one_reading(model: Model) -> None:
    """The model has no idea, but each question's answer is what the whole prompt gives."""
    text = texts.Source("words", "\n\n".join(f"Paragraph {i} says nothing." for i in range(40)))
    lengths = [len(model.tokenize(p + "\n\n", start=False)) for p in text.paragraphs()]
    task = texts.needles(text, lengths, 100, 3, 2)
    store = Store()
    made = runner(model, store)
    config = made.run(task, None)
    rows = store.done(config)
    assert sorted(rows) == sorted(task.ids) and {r["depth"] for r in rows.values()} == {0.167, 0.5, 0.833}
    whole = {i.id: model.prompt(g.text + i.question) for g in task.groups for i in g.items}
    said = answered(model, Setting(n_ctx=1024), [Request(i, t) for i, t in whole.items()], 20)
    for id, row in rows.items():
        assert task.grade(said[id].text, "x")[1] == row["answer"]


# -- distance from the full cache --------------------------------------------------------------------


def distances(model: Model, kv: Sequence[KVBudget | None], **more: Any) -> tuple[Store, list[Config]]:
    words = " ".join(f"Line {i} has {i * i % 97} words." for i in range(400))
    plan = divergence.Texts(texts.Source("words", words), **{"tokens": 512, "n": 1, "step": 4, **more})
    store = Store()
    return store, divergence.measure(runner(model, store), plan, kv)


def test_distances_of_equal_and_of_smaller_caches(model: Model) -> None:
    large = KVBudget(budget=2048)
    store, configs = distances(model, (None, large, SMALL))
    none, all_of_it, small = (list(store.done(c).values()) for c in configs)
    assert [r["id"] for r in none] == ["0@0", "0@256"] and [r["n"] for r in none] == [256, 255]
    for row in none + all_of_it:
        assert row["kl"] < 1e-4 and row["top1"] > 0.98
        assert row["nll"] == pytest.approx(row["nll_full"], abs=1e-3)
    for row in small:
        assert row["kl"] > 0.01 and row["top1"] < 0.98


def test_the_size_of_a_step_changes_nothing(model: Model) -> None:
    """It divides buffer and budget + buffer: passes come at the same positions."""
    found = []
    for step in (1, 4, 8):
        store, (config,) = distances(model, (SMALL,), step=step, tokens=300)
        found.append([(r["n"], r["kl"], r["nll"]) for r in store.done(config).values()])
    assert found[0][1][0] == 300 - 256 - 1
    for other in found[1:]:
        assert np.allclose(found[0], other, rtol=2e-3)


def test_distance_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]), np.array([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]])
    found = divergence.distance(np.log(p), np.log(q), np.array([0, 2], np.int32))
    assert found.kl == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    assert (found.n, found.top1) == (2, 1)
    assert found.nll == pytest.approx(-np.log(0.25) - np.log(0.7))
    assert found.nll_full == pytest.approx(-np.log(0.5) - np.log(0.7))
    logits = np.array([[1000.0, 1000.0], [-5.0, -5.0]], np.float32)
    assert divergence.log_softmax(logits) == pytest.approx(np.log(0.5))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tokens": 10**6}, "are needed"),
        ({"step": 3}, "must divide 256"),
        ({"step": 32}, "the budget's batch, 16"),
    ],
)
def test_distances_that_cannot_be_measured(model: Model, more: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        distances(model, (SMALL,), **more)


# -- the command -------------------------------------------------------------------------------------

TINY = ("--kv-budget", "24", "--kv-buffer", "8", "--kv-window", "4")


def ask(tmp_path: Path, n: int = 3) -> str:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": f"Say {i}.", "answer": "x"} for i in range(n)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(file)


def asked(tmp_path: Path, limit: int, n: int = 3) -> tuple[str, ...]:
    """A task of n questions with answers of so many tokens."""
    return ("jsonl", ask(tmp_path, n), "--compare", "text", "-m", str(talker()), "-n", str(limit))


def evaluate(*args: str) -> list[dict[str, Any]]:
    result = invoke("eval", *args, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no progress in a pipe
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def test_a_weight_of_values_is_for_the_policy_that_has_one(tmp_path: Path) -> None:
    args = (*asked(tmp_path, 8), *TINY)
    rows = evaluate(*args, "--kv-policy", "none,latest,rkv", "--kv-value-weight", "0.3")
    assert [r["policy"] for r in rows] == ["full", "latest", "rkv"]
    assert [r["kv"] and r["kv"].get("value_weight") for r in rows] == [None, 0.3, None]
    result = invoke("eval", *args, "--kv-set", "value_weight=0.0,0.3", "--json")
    assert result.exit_code == 0
    assert "left out: rkv: --kv-set: value_weight is 0.3, must be 0 with policy rkv" in result.stderr
    found = [(r["policy"], (r["kv"] or {}).get("value_weight", 0)) for r in json.loads(result.stdout)]
    assert found == [("full", 0), ("latest", 0), ("latest", 0.3), ("rkv", 0)]
    result = invoke("eval", *args, "--kv-policy", "rkv", "--kv-value-weight", "0.3")
    assert result.exit_code == 2
    assert "value_weight is 0.3, must be 0 with policy rkv" in result.stderr


def test_policies_budgets_and_variations(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    args = (
        *asked(tmp_path, 40), *TINY,
        "--kv-policy", "none,rkv,snapkv", "--kv-budget", "100%,24", "--kv-set", "lam=0.1,0.5", "-o", str(out),
    )  # fmt: skip
    rows = evaluate(*args)
    cells = round(rows[0]["mean_tokens"])
    expected = [("full", None, None)]
    expected += [(p, b, x) for b in (cells, 24) for p in ("rkv", "snapkv") for x in (0.1, 0.5)]  # type: ignore[misc]
    assert [(r["policy"], r["budget"], r["kv"] and r["kv"]["lam"]) for r in rows] == expected
    assert [r["asked_percent"] for r in rows] == [None] + [100] * 4 + [None] * 4
    size = out.stat().st_size
    assert evaluate(*args) == rows
    assert out.stat().st_size == size  # nothing was run again
    more = evaluate(*args, "-ctk", "q8_0")
    assert {r["type_k"] for r in more} == {"q8_0"} and out.stat().st_size > size


def test_a_share_that_is_too_small_is_left_out_with_a_word(tmp_path: Path) -> None:
    args = asked(tmp_path, 40)
    result = invoke(
        "eval", *args, "--kv-buffer", "8", "--kv-policy", "rkv", "--kv-budget", "10%,100%", "--json"
    )
    assert result.exit_code == 0
    assert result.stderr.startswith("left out: rkv with 4 cells (10 %): budget is 4, must be larger")
    assert [row["budget"] for row in json.loads(result.stdout)] == [40]


def test_reason(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    args = ("reason", "-m", str(talker()), "--family", "chain,digits", "-n", "16", *TINY, "-o", str(out))
    few = evaluate(*args, "--kind", "dense", "--n-problems", "2")
    policies = ("full", "latest", "rkv")
    assert [(r["policy"], r["problems"], r["correct"]) for r in few] == [(p, 2, 0) for p in policies]
    many = evaluate(*args, "--n-problems", "4")
    assert [r["problems"] for r in many] == [4] * 6
    assert [r["config"] for r in many[:3]] == [r["config"] for r in few]
    assert many[0]["families"] == {"chain": [0, 2], "digits": [0, 2]}
    assert len(read([out]).runs[few[0]["config"]]) == 2  # the first two problems were not run again


def test_needles_and_kl(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"This is part {i} of it." for i in range(200)))
    shared = ("-m", str(talker()), "--text", str(text), "--n-texts", "1", *TINY)
    rows = evaluate("needles", *shared, "--tokens", "300", "--depths", "3", "-n", "8")
    assert [r["problems"] for r in rows] == [3, 3, 3]
    assert list(rows[0]["depths"]) == ["0.167", "0.500", "0.833"]
    rows = evaluate("kl", *shared, "--tokens", "512", "--step", "8", "--kv-policy", "rkv")
    assert rows[0]["kl"] > 0 and rows[0]["positions"] == 255 and rows[0]["from_position"] == 256


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    args = (*asked(tmp_path, 8), *TINY, "-o", str(out))
    table = invoke("eval", *args).stdout
    assert table.startswith("questions.jsonl: talker.gguf\n\n| policy")
    result = invoke("eval", "report", str(out), "-o", str(page))
    assert (result.exit_code, result.output) == (0, "")
    text = page.read_text()
    assert "## questions.jsonl: talker.gguf" in text and "| rkv S=8 α=4 batch" not in text
    assert invoke("eval", "report", str(out)).stdout == text
    assert [r["policy"] for r in json.loads(invoke("eval", "report", str(out), "--json").stdout)] == [
        "full",
        "latest",
        "rkv",
    ]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    result = invoke("eval", "report", str(out), "--plots", str(tmp_path / "plots"))
    assert result.exit_code == 0 and "matplotlib is not installed" in result.stderr
    assert "Without plots: matplotlib is not installed" in result.stdout
    assert not (tmp_path / "plots").exists()


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    args = ("eval", *asked(tmp_path, 300, 400), *TINY)
    process = start(*args, "-np", "2", "-o", str(out))
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and (not out.exists() or out.read_bytes().count(b'"id"') < 3):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        said, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == b"" and err.decode() == f"stopped; the same command continues {out}\n"
    (kept,) = (r for r in summaries(read([out])))
    assert 3 <= kept["problems"] < 400


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("reason", "--kv-policy", "rkv,best"), 2, "'best' is not one of none, rkv"),
        (("reason", "--kv-budget", "10%,x"), 2, "'x' is neither a number of cells"),
        (("reason", "--kv-budget", "0"), 2, "'0' is neither"),
        (("reason", "--kind", "thick"), 2, "'thick' is not one of dense, sparse, all"),
        (("reason", "--family", "poems"), 2, "'poems' is not one of"),
        (("reason", "--split", "test"), 2, "'test' is not one of"),
        (("reason", "--kv-set", "lamda=1"), 2, "does not begin with one of"),
        (("reason", "--kv-set", "lam=2"), 2, "--kv-set: lam is 2"),
        (("reason", "--kv-policy", "rkv", "--kv-value-weight", "1"), 2, "value_weight is 1"),
        (("reason", "--kv-budget", "8"), 2, "budget is 8, must be larger"),
        (("reason", "-np", "0"), 2, "0 is not in the range"),
        (("kl", "--kv-budget", "10%"), 2, "percent is for tasks with traces"),
        (("needles", "--kv-budget", "10%"), 2, "percent is for tasks with traces"),
        (("kl", "--step", "3"), 1, "step is 3, must divide 256"),
        (("jsonl", "absent.jsonl"), 2, "absent.jsonl"),
        (("report",), 2, "FILES"),
        (("answer",), 2, "No such command 'answer'"),
        (("reason", "-m", "absent.gguf"), 1, "no model at 'absent.gguf'"),
        (("reason", "-o", "absent/r.jsonl"), 1, "absent/r.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(args: tuple[str, ...], code: int, says: str) -> None:
    has_model = "-m" in args or args[0] in ("report", "answer")
    result = invoke("eval", *args, *(() if has_model else ("-m", str(talker()))))
    assert says in error_line(result)
    assert (result.exit_code, result.stdout) == (code, "")


def test_a_model_without_a_vocabulary_is_one_line() -> None:
    result = invoke("eval", "reason", "-m", str(mute()))
    assert "has no vocabulary" in error_line(result) and result.exit_code == 1


def test_policies_are_listed() -> None:
    result = shell("eval", "reason", "--kv-policy", "list")
    assert result.returncode == 0 and b"streaming" in result.stdout
