"""The reasoner's problems, their traces and their tokens: what models/train learns from. No PyTorch here."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pexpect
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import traces
from cli_tools import ROOT, invoke, terminal
from rkv_local import Llama
from rkv_local.chat import Template
from rkv_local.evals.problems import FAMILIES, KINDS, SPLITS, Problem, problem, problems
from text import CHAT_TEMPLATE, DOCUMENTS, IM_END, MIX, SEEDS, STEPS, Corpus, prompt_ids

TOKENIZER = ROOT / "models" / "train" / "tokenizer.json"
N_CTX = 4096  # of the shipped model
EVERY = [(family, kind) for family in FAMILIES for kind in KINDS]
NUMBERS = st.integers(0, SEEDS - 1), st.integers(0, STEPS - 1), st.integers(0, DOCUMENTS - 1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(TOKENIZER))


@pytest.fixture(scope="module")
def corpus(tokenizer: Any) -> Corpus:
    return Corpus(tokenizer, 0, N_CTX)


@pytest.fixture(scope="module")
def reasoner() -> Iterator[Llama]:
    """The shipped model, for its vocabulary and template."""
    llama = Llama(ROOT / "models" / "rkv-reasoner.gguf", kv=None, vocab_only=True, verbose=False)
    yield llama
    llama.close()


def written(p: Problem, seed: int = 0, **how: Any) -> list[tuple[str, bool]]:
    """A trace's segments."""
    traces.learn_legs()
    return traces.trace(p, random.Random(seed), **how)


# --- which problems --------------------------------------------------------------------------------------


def test_splits_have_room_between_them() -> None:
    firsts = sorted(SPLITS.values())
    assert firsts[0] == SPLITS["train"] == 0
    assert all(b - a == 1 << 40 for a, b in itertools.pairwise(firsts))


@settings(deadline=None)
@given(st.tuples(*NUMBERS), st.tuples(*NUMBERS))
def test_training_problems_are_numbered_within_their_split_and_once(
    one: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    def number(seed: int, step: int, document: int) -> int:
        return Corpus(None, seed, N_CTX, step=step).number + document

    assert 0 <= number(*one) < SPLITS["dev"]
    assert (number(*one) == number(*other)) == (one == other)


def test_last_training_problem_and_what_lies_beyond() -> None:
    last = Corpus(None, SEEDS - 1, N_CTX, step=STEPS - 1)
    last.number = last.end - 1
    assert SPLITS["train"] + last.number == SPLITS["dev"] - 1
    assert last.problem().id.split("/")[2:] == ["train", str(SPLITS["dev"] - 1)]
    with pytest.raises(ValueError, match="give it fewer tokens"):
        last.problem()
    for seed, step in ((SEEDS, 0), (-1, 0), (0, STEPS), (0, -1)):
        with pytest.raises(ValueError, match="must be from 0 to"):
            Corpus(None, seed, N_CTX, step=step)


def test_corpus_follows_its_mix_and_repeats_itself() -> None:
    made = [Corpus(None, 3, N_CTX, step=5) for _ in range(2)]
    first, again = ([c.problem() for _ in range(300)] for c in made)
    assert [p.question for p in first] == [p.question for p in again]
    assert len({p.id for p in first}) == 300
    assert {p.id.split("/")[2] for p in first} == {"train"}
    for (family, kind), share in MIX.items():
        seen = sum((p.family, p.kind) == (family, kind) for p in first) / 300
        assert abs(seen - share) < 0.1
    assert sum(MIX.values()) == pytest.approx(1)


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_splits_have_other_problems(family: str, kind: str) -> None:
    questions = {split: {p.question for p in problems(family, kind, split, 25)} for split in SPLITS}
    assert len(set.union(*questions.values())) == sum(map(len, questions.values()))
    assert all(len(q) > 20 for q in questions.values())


# --- answers ---------------------------------------------------------------------------------------------


def solved(question: str) -> int:
    """The answer to a chain's question, from its words alone."""
    number, known = r"(\d+)", dict[str, int]()
    forms: dict[str, Any] = {
        rf"(\w+) has {number} \w+": lambda k: int(k),
        rf"(\w+) has {number} more \w+ than (\w+)": lambda k, a: known[a] + int(k),
        rf"(\w+) has {number} fewer \w+ than (\w+)": lambda k, a: known[a] - int(k),
        rf"(\w+) has {number} times as many \w+ as (\w+)": lambda k, a: known[a] * int(k),
        r"(\w+) has half as many \w+ as (\w+)": lambda a: known[a] / 2,
        r"(\w+) has as many \w+ as (\w+) and (\w+) together": lambda a, b: known[a] + known[b],
    }
    facts, asked, _ = re.split(r" (?=How many)|(?<=\?) ", question)
    left = facts.rstrip(".").split(". ")
    while left:
        before = len(left)
        for said in list(left):
            form, match = next((f, m) for f in forms if (m := re.fullmatch(f, said)))
            who, *rest = match.groups()
            try:
                known[who] = forms[form](*rest)
            except KeyError:
                continue
            left.remove(said)
        assert len(left) < before, left
    pair = re.search(r"do (\w+) and (\w+) have together", asked)
    total = known[pair[1]] + known[pair[2]] if pair else sum(known.values())
    assert total == int(total)
    return int(total)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_chains_follow_from_their_words(kind: str) -> None:
    for p in problems("chain", kind, "dev", 100):
        assert str(solved(p.question)) == p.answer


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_long_arithmetic(kind: str) -> None:
    for p in problems("digits", kind, "dev", 100):
        terms = [int(x) for x in re.findall(r"\d+", p.question)[:-1]]  # the last is the checks
        product = p.question.startswith("Multiply")
        assert p.answer == str(terms[0] * terms[1] if product else sum(terms))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_reasoning_gym_are_what_it_scores_as_right(kind: str) -> None:
    import reasoning_gym

    seen = set()
    for p in problems("gym", kind, "dev", 60):
        entry = p.data["entry"]
        task = entry["metadata"]["source_dataset"]
        scorer = reasoning_gym.create_dataset(task, size=1, seed=0)
        assert scorer.score_answer(p.answer, entry) == 1.0
        assert scorer.score_answer("no answer", entry) < 1.0
        seen.add(task)
    assert seen == {"chain_sum", "leg_counting", "number_sorting"}


# --- traces ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_traces_end_with_the_right_answer(family: str, kind: str) -> None:
    for p in problems(family, kind, "dev", 30):
        for hints in (True, False):
            segments = written(p, hints=hints)
            text = "".join(s for s, _ in segments)
            assert text.endswith(f"</think>\nThe answer is {p.answer}.")
            assert text.count("</think>") == 1
            assert segments[-1][1]
            assert ("After " in text) == (hints and family == "chain")


def equations(text: str) -> list[tuple[str, str]]:
    """Sums in a text, and what it says that they are."""
    return re.findall(r"(\d+(?: [-+*/] \d+)+) = (-?\d+)", text)


@pytest.mark.parametrize(("family", "kind"), EVERY)
@pytest.mark.parametrize("slips", [0.0, 0.3])
def test_what_is_learned_is_right_and_what_is_wrong_is_mended(family: str, kind: str, slips: float) -> None:
    learned, wrong = 0, 0
    for p in problems(family, kind, "dev", 12):
        segments = written(p, slips=slips)
        for said, value in equations("".join(s for s, ok in segments if ok)):
            assert eval(said) == int(value), (p.id, said, value)
            learned += 1
        for before, (slip, ok), after in zip(segments, segments[1:], segments[2:], strict=False):
            if ok:
                continue
            assert before[1] and after[0].startswith(" Wait, that is wrong. ")
            (found,) = equations(before[0] + slip)[-1:]
            assert eval(found[0]) != int(found[1])
            wrong += 1
    assert learned > 12
    assert (wrong > 0) == (slips > 0 and family != "digits")  # long arithmetic is written without slips


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_slips_are_exactly_the_tokens_that_are_not_learned(
    tokenizer: Any, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    made: list[list[tuple[str, bool]]] = []

    def with_slips(p: Problem, rng: random.Random, hints: bool = True) -> list[tuple[str, bool]]:
        made.append(trace(p, rng, 0.3, hints))
        return made[-1]

    trace = traces.trace
    monkeypatch.setattr(traces, "trace", with_slips)
    for p in problems(family, kind, "dev", 8):
        ids, learned = corpus.document(p)
        prompt = corpus.prompt(p)
        assert ids[: len(prompt)].tolist() == prompt
        assert not learned[: len(prompt)].any()
        assert ids[-1] == IM_END and learned[-1]
        body, ok = ids[len(prompt) : -1], learned[len(prompt) : -1]
        for flag in (True, False):
            text = tokenizer.decode(body[ok == flag].tolist(), skip_special_tokens=False)
            assert text == "".join(s for s, learn in made[-1] if learn == flag)


def test_a_cut_chain_ends_in_order_and_its_end_is_not_learned(tokenizer: Any, corpus: Corpus) -> None:
    for p in problems("chain", "dense", "dev", 5):
        ids, learned = corpus.document(p, cut=True)
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        listed = re.findall(r"\n\d+\. (?:After \w+: )?(\w+) has", text)
        assert listed == [f.who for f in p.data["facts"]]
        assert "Step 1" not in text
        assert not learned[-1]


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_every_trace_fits_the_context(corpus: Corpus, family: str, kind: str) -> None:
    lengths = [len(corpus.document(p)[0]) for p in problems(family, kind, "final", 60)]
    assert max(lengths) <= N_CTX
    assert max(lengths) > 300


# --- tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kind"), EVERY)
def test_shipped_tokenizer_is_that_of_the_training(
    tokenizer: Any, reasoner: Llama, family: str, kind: str
) -> None:
    for p in problems(family, kind, "dev", 5):
        text = p.question + "\n" + "".join(s for s, _ in written(p))
        ids = reasoner.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
        assert reasoner.detokenize(ids, special=True).decode() == text


def test_chat_template_makes_the_prompts_of_the_training(tokenizer: Any, reasoner: Llama) -> None:
    template = Template.of(reasoner.metadata, "", "")
    assert template.source == CHAT_TEMPLATE
    for family, kind in EVERY:
        question = problem(family, kind, "dev", 3).question
        earlier = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "The answer is 0."},
        ]
        for before in ([], earlier):
            prompt = template.render([*before, {"role": "user", "content": question}])
            ids = reasoner.tokenize(prompt.encode(), add_bos=True, special=True)
            assert ids == prompt_ids(tokenizer, question)
        assert template.open_tag(prompt) == ("<think>", "</think>")


def test_first_command_solves_a_problem_in_a_small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import bootstrap

    p = problem("chain", "sparse", "dev", 1)
    assert p.question == bootstrap.QUESTION
    result = invoke(*bootstrap.DEMO, bootstrap.QUESTION, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["text"].strip() == f"The answer is {p.answer}."
    # layers have different numbers of cells; a full cache takes 10 KiB per token (models/README.md)
    assert found["tokens"]["generated"] * 10 * 1024 > 2 * found["kv"]["bytes_allocated"]
    assert found["kv"]["compactions"] > 5


@pytest.mark.parametrize(
    ("words", "told"),
    [(("run", "hi", "-n", "3"), True), (("run", "reasoner", "hi", "-n", "3"), False), (("chat",), True)],
)
def test_terminal_says_that_the_default_model_is_a_demonstration(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: bool
) -> None:
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody answers where the cursor is
    child = terminal(*words)
    if words[0] == "chat":
        child.expect("Ctrl-D leaves")
        child.expect("to use another model, name it")
        child.expect(r">>>[^\n]*\x1b\[\?25h")  # the cursor is shown when the prompt is ready
        child.send("/bye\r")
    child.expect(pexpect.EOF)
    shown = " ".join(child.before.split())
    if words[0] == "run":
        assert ("the reasoner is a demonstration" in shown) == told
        assert "generated 3 tokens" in shown
    child.close()
    assert child.exitstatus == 0
