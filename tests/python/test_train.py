"""The training of the reasoner at toy size: learn, stop, go on, export, and the same tokens from llama.cpp.

Needs PyTorch. RKV_TEST_TRAIN says that it has to be there (.ci/run, docs/building.md).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("torch") is None and not os.environ.get("RKV_TEST_TRAIN"):
    pytest.skip(
        "PyTorch is not installed: RKV_TEST_TRAIN=1 python3 bootstrap.py --test", allow_module_level=True
    )

import torch

import export
import generate
import train
from rkv_local import KVBudget, Llama, Session
from text import SEEDS, Corpus, problem, prompt_ids

SIZES = {
    "n-vocab": 512,
    "n-layer": 2,
    "n-embd": 64,
    "n-head": 4,
    "n-head-kv": 2,
    "n-embd-head": 16,
    "n-ff": 128,
}
TOY = [*itertools.chain.from_iterable((f"--{k}", str(v)) for k, v in SIZES.items()), "--n-ctx", "1024"]
TOY += ["--tokens", "1024", "--lr", "1e-2", "--warmup", "10", "--workers", "0", "--tokenizer-problems", "40"]
STEPS, STOP = 60, 25


@dataclass
class Trained:
    """A finished run, what its log said when it was stopped, and its files as GGUF."""

    folder: Path
    stopped: dict[str, Any]
    f32: Path
    q8: Path


def log_of(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((folder / "train.json").read_text())
    return about


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(2)
    folder = tmp_path_factory.mktemp("trained")
    arguments = ["--out", str(folder), "--steps", str(STEPS), *TOY]
    train.main([*arguments, "--until", str(STOP)])
    stopped = log_of(folder)
    train.main(arguments)
    f32, q8 = folder / "f32.gguf", folder / "q8.gguf"
    export.main(["--model", str(folder), "--out", str(f32), "--f32"])
    export.main(["--model", str(folder), "--out", str(q8)])
    return Trained(folder, stopped, f32, q8)


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(trained.folder / "tokenizer.json"))


# --- learning --------------------------------------------------------------------------------------------


def test_loss_falls_and_a_stopped_run_goes_on(trained: Trained) -> None:
    before, after = trained.stopped["log"], log_of(trained.folder)["log"]
    assert trained.stopped["steps"] == STOP
    assert [entry["step"] for entry in after] == [1, STOP, STOP + 1, 50, STEPS]
    assert after[: len(before)] == before
    first, *_, last = (entry["loss"] for entry in after)
    assert first == pytest.approx(np.log(SIZES["n-vocab"]), rel=0.1)  # knows nothing
    assert last < 3.5
    assert after[2]["loss"] < first - 1  # the weights were there when it went on
    assert after[-1]["lr"] == pytest.approx(0.01 * 1e-2, rel=0.1)


def test_a_finished_run_is_left_alone(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    weights = (trained.folder / "model.pt").read_bytes()
    train.main(["--out", str(trained.folder), "--steps", str(STEPS), *TOY])
    assert "finished" in capsys.readouterr().out
    assert (trained.folder / "model.pt").read_bytes() == weights
    assert log_of(trained.folder)["steps"] == STEPS


def test_stopping_changes_nothing(tmp_path: Path, trained: Trained) -> None:
    weights = []
    for name, stops in (("through", ()), ("stopped", ("2",))):
        arguments = ["--out", str(tmp_path / name), "--init", str(trained.folder), "--steps", "4", *TOY]
        arguments += ["--tokens", "512"]
        for stop in stops:
            train.main([*arguments, "--until", stop])
        train.main(arguments)
        weights.append(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"])
    start = torch.load(trained.folder / "model.pt", weights_only=True)
    for key, through in weights[0].items():
        torch.testing.assert_close(weights[1][key], through, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights[0]["token_embd.weight"], start["token_embd.weight"].float())
    given = [(folder / "tokenizer.json").read_bytes() for folder in (trained.folder, tmp_path / "through")]
    assert given[0] == given[1]
    losses = [entry["loss"] for entry in log_of(tmp_path / "through")["log"]]
    assert len(losses) == 2 and min(losses) > 0
    assert losses[0] < 5  # it began with the weights of --init


def test_batches_depend_on_seed_and_step_alone(tmp_path: Path, trained: Trained) -> None:
    tokenizer = (trained.folder / "tokenizer.json").read_text()
    entries = tmp_path / "entries.json"
    base = ["--out", str(tmp_path), "--steps", "6", *TOY, "--gym", str(entries), "--gym-entries", "4"]
    alone = train.arguments(base)
    gym = train.training_entries(alone)
    assert gym == train.training_entries(alone)  # made, then read
    want = list(train.batches(alone, tokenizer, gym, 3))
    team = list(train.batches(train.arguments([*base, "--workers", "2"]), tokenizer, gym, 3))
    assert len(want) == len(team) == 3
    for one, other in zip(want, team, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    other_seed = next(train.batches(train.arguments([*base, "--seed", "2"]), tokenizer, gym, 3))
    assert not np.array_equal(want[0][0], other_seed[0])
    assert not np.array_equal(want[0][0], want[1][0])


def test_a_batch_with_nothing_to_learn_changes_nothing() -> None:
    model = train.Reasoner(train.Config(n_vocab=8, n_layer=1, n_embd=8, n_head=1, n_head_kv=1, n_embd_head=8))
    tokens = torch.arange(4)
    loss = train.loss_of(model, tokens, torch.full((4,), -1), tokens, train.one_by_one, [0, 4])
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    learned = train.loss_of(model, tokens, torch.tensor([-1, 3, -1, 5]), tokens, train.one_by_one, [0, 4])
    logits = model.logits(model(tokens, tokens, train.one_by_one, [0, 4]))
    want = -logits.log_softmax(-1)[[1, 3], [3, 5]].mean()
    torch.testing.assert_close(learned, want)


def test_targets_are_the_next_learned_tokens(trained: Trained, tokenizer: Any, tmp_path: Path) -> None:
    a = train.arguments(["--out", str(tmp_path), "--steps", "6", *TOY, "--cut", ""])
    tokens, target, starts = train.batch(0, a, tokenizer, None)
    assert starts[0] == 0 and starts[-1] == a.tokens == len(tokens) == len(target)
    documents = Corpus(tokenizer, a.seed, a.n_ctx).documents(a.n_ctx)
    for start, end in itertools.pairwise(starts):
        ids, learned = next(documents)
        np.testing.assert_array_equal(tokens[start:end], ids[: end - start])
        want = np.where(learned, ids, -1)[1 : end - start]
        np.testing.assert_array_equal(target[start : end - 1], want)
        assert target[end - 1] == -1  # nothing is learned across documents
    assert (target >= 0).sum() > a.tokens / 3


# --- what llama.cpp makes of it --------------------------------------------------------------------------


def test_logits_are_pytorchs(trained: Trained, tokenizer: Any) -> None:
    corpus = Corpus(tokenizer, 0, 1024)
    ids = corpus.document(problem("chain", "sparse", "dev", 4))[0][:300].tolist()
    f32, q8 = (export.check(trained.folder, path, ids) for path in (trained.f32, trained.q8))
    assert f32 < export.FAR["F32"]
    assert f32 < q8 < export.FAR["Q8_0"]
    other = [*ids[:-1], ids[-1] + 1]
    assert export.check(trained.folder, trained.f32, other) < export.FAR["F32"]


def test_check_notices_other_weights(trained: Trained, tmp_path: Path) -> None:
    state = torch.load(trained.folder / "checkpoint.pt", weights_only=True)
    state["model"]["layers.1.attn_q.weight"][0] *= 2
    torch.save(state, tmp_path / "checkpoint.pt")
    assert export.check(tmp_path, trained.f32, list(range(5, 105))) > export.FAR["F32"]


def test_greedy_tokens_are_pytorchs(trained: Trained, tokenizer: Any) -> None:
    model = generate.load(trained.folder, "cpu")
    questions = [problem(family, "sparse", "dev", 7).question for family in ("chain", "digits", "gym")]
    prompts = [prompt_ids(tokenizer, question) for question in questions]
    n = 24
    want = [generate.greedy(model, [prompt], len(prompt) + n - 1)[0] for prompt in prompts]
    together = generate.greedy(model, prompts, max(map(len, prompts)) + n - 1)
    llama = Llama(trained.f32, kv=None, n_ctx=1024, n_seq_max=1, type_k="f32", type_v="f32", verbose=False)
    session = Session(llama)
    for prompt, one, beside in zip(prompts, want, together, strict=True):
        session.clear()
        logits = session.decode({0: prompt})[0]
        got: list[int] = []
        while len(got) < len(one):
            got.append(int(logits.argmax()))
            logits = session.decode({0: got[-1:]})[0]
        assert got == one == beside[: len(one)]
    assert min(map(len, want)) == n
    session.close()
    llama.close()


@pytest.mark.parametrize("kind", ["f32", "q8"])
def test_exported_file_answers_through_its_chat_template(trained: Trained, tokenizer: Any, kind: str) -> None:
    path = {"f32": trained.f32, "q8": trained.q8}[kind]
    kv = KVBudget(budget=64, buffer=32, batch=32)
    with_budget = Llama(path, kv=kv, n_ctx=1024, verbose=False)
    question = problem("digits", "dense", "dev", 2).question
    reply = with_budget.create_chat_completion(
        [{"role": "user", "content": question}], temperature=0, max_tokens=60
    )
    assert reply["usage"]["prompt_tokens"] == len(prompt_ids(tokenizer, question))
    text = reply["choices"][0]["message"]["content"]
    assert len(text) > 20
    assert tokenizer.encode(text).ids  # its own words
    assert with_budget.kv_stats().compactions > 0
    with_budget.close()


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--seed", str(SEEDS)], f"--seed {SEEDS} is not from 0 to {SEEDS - 1}"),
        (["--steps", "0"], "--steps 0 is not from 1 to"),
        (["--tokens", "0"], "--tokens 0 is not above 0"),
        (["--short", "half:1"], "--short 'half:1' is not of the form SHARE:VALUE"),
        (["--cut", "0.3"], "--cut '0.3' is not of the form SHARE:VALUE"),
    ],
)
def test_bad_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], line: str) -> None:
    with pytest.raises(SystemExit) as left:
        train.main(["--out", str(tmp_path / "new"), *more])
    assert left.value.code == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_weights_that_do_not_fit_or_are_absent(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(SystemExit, match=r"there is no model\.pt in it"):
        train.main(["--out", str(tmp_path), "--init", str(tmp_path), *TOY])
    with pytest.raises(SystemExit, match="is of a model with other sizes: give them, or another --out"):
        train.main(["--out", str(trained.folder), *TOY, "--n-ff", "64"])
    with pytest.raises(SystemExit, match="is of a model with other sizes: give them"):
        train.main(["--out", str(tmp_path), "--init", str(trained.folder), *TOY, "--n-ff", "64"])
    with pytest.raises(SystemExit, match=r"checkpoint\.pt does not exist: train\.py writes it"):
        export.main(["--model", str(tmp_path), "--out", str(tmp_path / "x.gguf")])
