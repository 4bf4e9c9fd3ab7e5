"""rkv-local chat without a terminal, and the logic of conversations."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_tools import invoke, shell, smollm2, talker
from rkv_local.chat import (
    CHATML,
    THINK_TAGS,
    Conversation,
    StopMatcher,
    Template,
    TemplateError,
    ThinkingSplitter,
    Utf8Decoder,
)
from rkv_local.cli import commands, nativelog, reader
from rkv_local.cli.options import Sampling

QWEN_LIKE = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if loop.last and m.reasoning_content is defined %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


def split(chunks: list[str], opened: tuple[str, str] | None = None) -> tuple[str, str]:
    splitter, found = ThinkingSplitter(opened), {"text": "", "thinking": ""}
    for chunk in chunks:
        for kind, text in splitter.feed(chunk):
            found[kind] += text
    for kind, text in splitter.finish():
        found[kind] += text
    return found["thinking"], found["text"]


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({p % (len(text) + 1) for p in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("no thoughts", None, ("", "no thoughts")),
        ("<think>a</think>b", None, ("a", "b")),
        ("<think>\na\n</think>\n\nb", None, ("a\n", "b")),
        ("<think>\n\n</think>\n\nb", None, ("", "b")),
        ("<think>never ends", None, ("never ends", "")),
        ("a</think>b", THINK_TAGS[0], ("a", "b")),
        ("\na <b </thin </think>\n\nb", THINK_TAGS[0], ("a <b </thin ", "b")),
        ("[THINK]a[/THINK]b", None, ("a", "b")),
        ("<think>a [/THINK] b</think>c", None, ("a [/THINK] b", "c")),
        ("1 < 2 and <thin", None, ("", "1 < 2 and <thin")),
        ("<think>a</think>b<think>c</think>d", None, ("ac", "bd")),
    ],
)
@given(places=st.lists(st.integers(0, 100)))
def test_thinking_is_split_wherever_the_stream_is_cut(
    text: str, opened: tuple[str, str] | None, expected: tuple[str, str], places: list[int]
) -> None:
    assert split(cut(text, places), opened) == expected


@given(text=st.text(), places=st.lists(st.integers(0, 400)))
def test_utf8_is_whole_wherever_the_bytes_are_cut(text: str, places: list[int]) -> None:
    data, decoder = text.encode(), Utf8Decoder()
    ends = sorted({p % (len(data) + 1) for p in places} | {0, len(data)})
    pieces = [decoder.feed(data[a:b]) for a, b in itertools.pairwise(ends)]
    assert "".join([*pieces, decoder.finish()]) == text


def test_broken_bytes_become_replacement_characters() -> None:
    decoder = Utf8Decoder()
    assert decoder.feed(b"a\xff") == "a\ufffd"
    assert decoder.feed("é".encode()[:1]) == ""
    assert decoder.finish() == "\ufffd"


@given(
    text=st.text("abc"),
    words=st.lists(st.text("abc", min_size=1), max_size=3),
    places=st.lists(st.integers(0, 40)),
)
def test_stop_words_stop_wherever_the_stream_is_cut(text: str, words: list[str], places: list[int]) -> None:
    matcher, shown = StopMatcher(words), ""
    for chunk in cut(text, places):
        shown += matcher.feed(chunk)
    shown += matcher.finish()
    found = [text.index(w) for w in words if w in text]
    if found:
        # the first word to be complete ends the text; all of it up to there is shown, nothing of the word is
        assert matcher.stopped
        assert shown in {text[:i] for i in found}
    else:
        assert shown == text


def test_template_gets_thinking_apart_from_the_answer() -> None:
    conversation = Conversation(system="s")
    conversation.add("q1", "a1", "t1")
    assert conversation.messages("q2") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "t1"},
        {"role": "user", "content": "q2"},
    ]
    template = Template(QWEN_LIKE)
    prompt = template.render(conversation.messages("q2"))
    assert prompt == "<system>s<user>q1<assistant>a1<user>q2<assistant><think>\n"
    assert template.open_tag(prompt) == ("<think>", "</think>")
    assert conversation.take_back() == "q1"
    assert conversation.take_back() is None


def test_thinking_of_earlier_turns_is_dropped_by_smollm2s_template() -> None:
    from rkv_local.shape import read_metadata

    source = str(read_metadata(smollm2())["tokenizer.chat_template"])
    conversation = Conversation()
    conversation.add("q1", "a1", "secret")
    assert "secret" not in Template(source).render(conversation.messages("q2"))


def test_templates_that_fail_and_that_are_absent() -> None:
    with pytest.raises(TemplateError, match="no system role"):
        Template("{{ raise_exception('no system role') }}").render([])
    with pytest.raises(TemplateError):
        Template("{% if %}").render([])
    absent = Template.of({}, "", "")
    assert (absent.source, absent.named) == (CHATML, False)
    assert (
        absent.render([{"role": "user", "content": "q"}])
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/help", ("help", "")),
        (" /set temp 1 ", ("set", "temp 1")),
        ("/set system a\nb", ("set", "system a\nb")),
        ("/?", ("?", "")),
        ("/usr/bin is a folder", None),
        ("/", None),
        ("a /help", None),
    ],
)
def test_what_is_a_command(text: str, expected: Any) -> None:
    assert commands.parse(text) == expected


def test_settings() -> None:
    state = commands.State(session=None, sampling=Sampling())  # type: ignore[arg-type]
    for line in (
        "temperature 0.5",
        "parameter top_k 7",
        "top-p 0.5",
        "min-p 0",
        "repeat-penalty 1.1",
        "seed 3",
    ):
        commands.change(state, line)
    assert state.sampling == Sampling(temp=0.5, top_k=7, top_p=0.5, min_p=0, repeat_penalty=1.1, seed=3)
    commands.change(state, "seed -1")
    assert state.sampling.seed is None
    commands.change(state, 'system "be brief"')
    assert state.conversation.system == "be brief"
    commands.change(state, "think hide")
    commands.change(state, "max-tokens 5")
    assert (state.show_thinking, state.max_tokens) == (False, 5)
    listed = commands.change(state, "")
    assert "temperature" in listed and "0.5" in listed
    for bad in (
        "temperature hot",
        "temperature -1",
        "top-k 1.5",
        "seed",
        "mood good",
        "think loudly",
        "top-p nan",
    ):
        with pytest.raises(commands.CommandError):
            commands.change(state, bad)


def test_messages_of_several_lines() -> None:
    def feed(*lines: str) -> tuple[str, bool]:
        source = iter(lines)
        return reader.read_message(lambda _: next(source))

    assert feed("one") == ("one", False)
    assert feed('"""one', 'two"""') == ("one\ntwo", True)
    assert feed('"""', "one", "", "two", '"""') == ("one\n\ntwo", True)
    assert feed('"""one"""') == ("one", True)


def test_history_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert reader.history_file() == tmp_path / "rkv-local" / "history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reader.history_file() == tmp_path / ".local" / "state" / "rkv-local" / "history"


def test_reason_is_llama_cpps_own() -> None:
    nativelog.clear()
    nativelog._log(3, b"careful: not this\n", None)
    nativelog._log(4, b"llama_model_load: error loading model: tensor 'x' is ", None)
    nativelog._log(5, b"cut short\n", None)
    assert (
        nativelog.reason("Failed to load model from file: x", "x") == "cannot load x: tensor 'x' is cut short"
    )
    assert nativelog.reason("a clear message", "x") == "a clear message"
    nativelog.clear()
    assert nativelog.reason("Failed to load model from file: x", "x") == "Failed to load model from file: x"


SMALL = ("--kv-budget", "64", "--kv-buffer", "32", "-b", "32", "-n", "8")


def test_chat_from_a_pipe() -> None:
    lines = 'hello\n/stats\n"""/two\nlines\n"""\n/regen\n/show\n/clear\n/stats\n/bye\nnever read\n'
    result = invoke("chat", str(talker()), "--seed", "1", *SMALL, stdin=lines)
    assert result.exit_code == 0
    assert result.stderr.count("[prompt ") == 3
    assert "/96 cells" in result.stderr
    assert (
        "talker.gguf" in result.stdout
        and "policy latest, budget 64, buffer 32, pin 4: 96 cells" in result.stdout
    )
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("turns ")] == ["1", "0"]


def test_the_end_of_the_input_leaves() -> None:
    assert invoke("chat", str(talker()), *SMALL, stdin="").exit_code == 0
    assert invoke("chat", str(talker()), *SMALL, stdin="hello").exit_code == 0
    assert invoke("chat", str(talker()), *SMALL, stdin='"""never closed\n').exit_code == 0


def test_bad_lines_do_not_end_the_chat() -> None:
    lines = b"/walk\n/set temp hot\n\xff\xfe\n/regen\n\n/set temp 0\n/bye\n"
    result = invoke("chat", str(talker()), *SMALL, stdin=lines)
    assert result.exit_code == 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("rkv-local: error: ")]
    assert [
        "/walk" in errors[0],
        "temperature" in errors[1],
        "UTF-8" in errors[2],
        "no answer" in errors[3],
    ] == [True] * 4
    assert len(errors) == 4
    assert "temperature = 0" in result.stdout


def test_regen_raises_a_fixed_seed_and_replaces_the_turn() -> None:
    result = invoke("chat", str(talker()), "--seed", "5", *SMALL, stdin="hello\n/regen\n/regen\n/stats\n")
    answers = [
        line for line in result.stdout.splitlines() if not line.startswith(("turns", "context", "cells"))
    ][:3]
    assert len(set(answers)) == 3
    assert "turns           1\n" in result.stdout


def test_full_context_is_one_line_and_loses_nothing() -> None:
    long = "word " * 200
    lines = f"hello\n{long}\n/stats\nhi\n/stats\n"
    result = invoke("chat", str(talker()), "-c", "150", *SMALL, stdin=lines)
    assert result.exit_code == 0
    assert result.stderr.count("nothing was lost") == 1
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("turns ")] == ["1", "2"]


def test_context_that_fills_up_while_answering() -> None:
    args = ("-c", "64", "--kv-budget", "64", "--kv-buffer", "32", "-b", "32", "--top-k", "1")
    result = invoke("chat", str(talker()), *args, stdin="hello\nhello\n/clear\nhello\n")
    assert result.exit_code == 0
    assert "the context is full: /clear starts over" in result.stderr
    assert "nothing was lost" in result.stderr
    assert result.stderr.count("[prompt ") == 2


def test_a_later_turn_is_that_of_a_fresh_context() -> None:
    """With a compacted cache the second turn reads everything again: its text is that of a fresh process."""
    from rkv_local.cli.options import LoadOptions
    from rkv_local.cli.session import Answer, Interrupt, Session
    from rkv_local.models import resolve

    def options() -> LoadOptions:
        from rkv_local import KVBudget

        return LoadOptions(resolve(str(talker())), KVBudget(budget=64, buffer=32, batch=32), 4096, 32)

    def answer(session: Session, conversation: Conversation, user: str) -> Answer:
        tokens, found = session.tokenize(session.template.render(conversation.messages(user))), Answer()
        list(session.generate(tokens, Sampling(temp=0), found, Interrupt(), max_tokens=120))
        return found

    conversation, session = Conversation(), Session(options())
    first = answer(session, conversation, "hello")
    assert first.compactions > 0
    conversation.add("hello", first.text)
    second = answer(session, conversation, "and now?")
    assert second.n_read == second.n_prompt  # nothing of a compacted cache is reused
    session.close()
    fresh = Session(options())
    assert answer(fresh, conversation, "and now?").text == second.text
    # where nothing was compacted only what is new is read
    fresh.reset()
    short, found = fresh.tokenize("one two three four five"), Answer()
    list(fresh.generate(short, Sampling(temp=0), found, Interrupt(), max_tokens=2))
    again = Answer()
    list(fresh.generate([*short, *short], Sampling(temp=0), again, Interrupt(), max_tokens=2))
    assert again.n_read <= len(short) + 1
    fresh.close()


def test_ctrl_c_while_the_model_loads() -> None:
    from rkv_local.cli.options import LoadOptions
    from rkv_local.cli.session import Interrupt, Session
    from rkv_local.models import resolve

    interrupt = Interrupt()
    interrupt.pressed = True
    with pytest.raises(KeyboardInterrupt):
        Session(LoadOptions(resolve(str(talker())), None, 64), interrupt)


def test_wrong_usage() -> None:
    assert invoke("chat", "a", "-m", "b").exit_code == 2
    assert invoke("chat", "a", "b").exit_code == 2
    assert invoke("chat", "absent.gguf").exit_code == 1
    assert invoke("chat", "-n", "-3").exit_code == 2


def test_chat_in_a_process_of_its_own() -> None:
    done = shell("chat", str(talker()), *SMALL, stdin=b"hello\n/bye\n")
    assert done.returncode == 0
    assert done.stdout.count(b"\n") >= 1
    assert b">>>" not in done.stdout
