"""rkv-local run: what it prints, where, and how it ends."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cli_tools import COMMAND, environment, error_line, invoke, last_line, mute, shell, start, talker

SMALL = ("--kv-budget", "64", "--kv-buffer", "32", "-b", "32")  # cells: 96


def run_json(*args: str, stdin: str | None = None) -> dict[str, Any]:
    result = invoke("run", *args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_object_of_a_packaged_model() -> None:
    found = run_json("smollm2", "The capital of France is", "--raw", "--temp", "0", "-n", "3", "-t", "1")
    assert set(found) == {"text", "thinking", "finish_reason", "model", "tokens", "timings", "kv"}
    assert "Paris" in found["text"]
    assert found["thinking"] == ""
    assert found["finish_reason"] in ("stop", "length")
    assert found["model"] == "smollm2"
    assert set(found["tokens"]) == {"prompt", "generated"}
    assert 1 <= found["tokens"]["generated"] <= 3
    timings = found["timings"]
    assert set(timings) == {"prompt_tokens_per_second", "generated_tokens_per_second", "seconds"}
    assert all(value > 0 for value in timings.values())
    kv = found["kv"]
    expected = {
        "policy": "latest",
        "budget": 1024,
        "buffer": 256,
        "recent": 96,
        "pin": 4,
        "cells_allocated": 1024 + 256,
    }
    assert {name: kv[name] for name in expected} == expected
    assert set(kv) == {*expected, "bytes_allocated", "compactions", "compaction_seconds"}


def test_compaction_and_memory_are_reported() -> None:
    from rkv_local import KVBudget

    found = run_json(str(talker()), "hi", "--ignore-eos", "-n", "300", "-t", "1", *SMALL)
    assert found["finish_reason"] == "length"
    assert found["tokens"]["generated"] == 300
    kv = found["kv"]
    assert kv["cells_allocated"] == 96
    assert kv["bytes_allocated"] == KVBudget(budget=64, buffer=32, batch=32).bytes_for(str(talker()))
    total = found["tokens"]["prompt"] + 299  # the last token is not decoded
    assert kv["compactions"] == pytest.approx((total - 64) / 32, abs=1.01)
    assert 0 < kv["compaction_seconds"] < found["timings"]["seconds"]


def test_no_budget() -> None:
    kv = run_json(str(talker()), "hi", "-n", "3", "--kv-policy", "none", "-c", "512")["kv"]
    assert (kv["policy"], kv["budget"], kv["cells_allocated"], kv["compactions"]) == ("none", None, 512, 0)


def test_text_on_stdout_statistics_on_stderr() -> None:
    result = invoke("run", str(talker()), "hi", "-n", "5", *SMALL)
    assert result.exit_code == 0
    assert result.stdout.endswith("\n")
    assert "tok/s" not in result.stdout
    assert result.stderr.count("\n") == 1
    assert "/96 cells" in result.stderr


def test_seed_repeats() -> None:
    texts = [run_json(str(talker()), "hi", "-n", "12", "--seed", seed)["text"] for seed in ("0", "0", "1")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("dash", [(), ("-",)])
def test_prompt_on_stdin(dash: tuple[str, ...]) -> None:
    args = ("-m", str(talker()), "-n", "8", "--temp", "0")
    assert run_json(*args, *dash, stdin="some words\n")["text"] == run_json(*args, "some words")["text"]


def test_model_word_and_prompt_on_stdin() -> None:
    assert run_json(str(talker()), "-n", "2", stdin="hi")["model"] == "talker.gguf"


def test_prompt_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("some words\n", encoding="utf-8")
    args = (str(talker()), "-n", "8", "--temp", "0")
    assert run_json(*args, "-f", str(file))["text"] == run_json(*args, "-p", "some words")["text"]


def test_raw_system_prompt_and_template_change_the_prompt() -> None:
    args = (str(talker()), "hi", "-n", "1")
    plain, raw = run_json(*args)["tokens"]["prompt"], run_json(*args, "--raw")["tokens"]["prompt"]
    assert raw == 1 < plain
    assert (
        run_json(*args, "-sys", "a system prompt that is much longer than the usual one " * 5)["tokens"][
            "prompt"
        ]
        > plain
    )


def test_stop_words() -> None:
    args = (str(talker()), "hi", "-n", "20", "--temp", "0")
    text = run_json(*args)["text"]
    word = text[len(text) // 2 :][:3]
    found = run_json(*args, "--stop", word)
    assert found["finish_reason"] == "stop"
    assert found["text"] == text[: text.index(word)]


def test_end_of_the_context() -> None:
    found = run_json(str(talker()), "hi", "--ignore-eos", "-c", "256", "-t", "1", *SMALL)
    assert found["finish_reason"] == "length"
    assert sum(found["tokens"].values()) == 256


def test_no_tokens_wanted() -> None:
    assert run_json(str(talker()), "hi", "-n", "0")["tokens"]["generated"] == 0


def test_grammar_and_schema(tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "yes" | "no"\n', encoding="utf-8")
    found = run_json(str(talker()), "hi", "--grammar-file", str(grammar))
    assert found["text"] in ("yes", "no")
    assert found["finish_reason"] == "stop"
    found = run_json(str(talker()), "hi", "-j", '{"type": "boolean"}', "-n", "40")
    assert found["text"].strip() in ("true", "false")


def test_characters_of_several_tokens_come_whole() -> None:
    # a random model writes any byte; what is shown must be UTF-8 with whole characters
    done = shell(
        "run", str(talker()), "hi", "-n", "200", "--seed", "3", "--ignore-eos", "--temp", "5", "--top-k", "0"
    )
    assert done.returncode == 0
    done.stdout.decode("utf-8")


def test_cache_types_and_flash_attention() -> None:
    model = str(talker())  # heads of 32
    found = run_json(model, "hi", "-n", "3", "-ctk", "q8_0", "-ctv", "q8_0", *SMALL)
    assert found["kv"]["bytes_allocated"] < run_json(model, "hi", "-n", "3", *SMALL)["kv"]["bytes_allocated"]


def test_broken_pipe_is_quiet() -> None:
    process = start("run", str(talker()), "hi", "-n", "4000", "--ignore-eos", "-t", "1", *SMALL)
    assert process.stdout and process.stderr
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c(as_json: bool) -> None:
    args = ["run", str(talker()), "hi", "-c", "1000000", "--ignore-eos", "-t", "1", *SMALL]
    process = start(*args, *(["--json", "-v"] if as_json else []))
    assert process.stdout and process.stderr
    if as_json:  # nothing on stdout until the end; the log says when the context is there
        while b"graph_reserve" not in process.stderr.readline():
            assert process.poll() is None
    else:
        process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    if as_json:
        assert json.loads(out)["finish_reason"] == "interrupted"
    else:
        assert last_line(err).startswith("[prompt ")


def test_verbose_shows_the_log_and_silence_is_usual() -> None:
    quiet = shell("run", str(talker()), "hi", "-n", "2")
    assert quiet.stderr.count(b"\n") == 1
    assert b"llama_model_loader" in shell("run", str(talker()), "hi", "-n", "2", "-v").stderr


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("",), 2, "empty"),
        (("   \n",), 2, "empty"),
        (("absent.gguf", "hi"), 1, "no model at 'absent.gguf'"),
        (("absent.gguf",), 1, "no model at 'absent.gguf'"),
        (("/", "hi"), 1, "folder"),
        (("hi", "--kv-budget", "12"), 2, "pin"),
        (("hi", "--kv-pin", "2000"), 2, "pin"),
        (("hi", "--kv-window", "65"), 2, "window"),
        (("hi", "--kv-budget", "-1"), 2, "kv-budget"),
        (("hi", "--kv-buffer", "0"), 2, "kv-buffer"),
        (("hi", "--kv-policy", "best"), 2, "best"),
        (("hi", "--kv-lambda", "1.5"), 2, "kv-lambda"),
        (("hi", "--kv-layer-budgets", "1,x"), 2, "1,x"),
        (("hi", "--kv-layer-budgets", "100,200"), 1, "layer_budgets"),
        (("hi", "-n", "-2"), 2, "-2"),
        (("hi", "-c", "-1"), 2, "ctx-size"),
        (("hi", "-t", "0"), 2, "threads"),
        (("hi", "-t", "100000"), 2, "threads"),
        (("hi", "--temp", "nan"), 2, "finite"),
        (("hi", "--top-p", "nan"), 2, "finite"),
        (("hi", "--repeat-penalty", "inf"), 2, "finite"),
        (("hi", "--kv-budget", "33554432"), 2, "budget"),
        (("hi", "--kv-buffer", "2000000"), 2, "buffer"),
        (("hi", "-ngl", "some"), 2, "some"),
        (("hi", "-ctk", "q3"), 2, "q3"),
        (("hi", "-ctv", "q8_0", "-fa", "off"), 2, "flash attention"),
        (("hi", "--temp", "-1"), 2, "temp"),
        (("hi", "--top-p", "2"), 2, "top-p"),
        (("hi", "--seed", "-2"), 2, "seed"),
        (("hi", "--json-schema", "{"), 2, "not JSON"),
        (("hi", "--json-schema", '{"type": "thing"}'), 1, "JSON schema"),
        (("hi", "--grammar-file", "absent.gbnf"), 2, "absent.gbnf"),
        (("-f", "absent.txt"), 2, "absent.txt"),
        (("hi", "--raw", "-sys", "x"), 2, "--raw"),
        (("hi", "-c", "8"), 1, "-c/--ctx-size"),
        (("\udcff\udcfe",), 2, "UTF-8"),
        (("hi", "-sys", "\udcff"), 2, "UTF-8"),
    ],
)
def test_bad_input_is_one_line(
    args: tuple[str, ...], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("run", *args)
    assert says in error_line(result)
    assert (result.exit_code, result.stdout) == (code, "")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"ok \xc3", b"", b"\n"])
def test_bad_prompts_on_stdin(data: bytes) -> None:
    result = invoke("run", "-", stdin=data)
    assert result.exit_code == 2
    assert "stdin" in error_line(result)


@pytest.mark.parametrize(
    ("command", "closed", "code", "says"),
    [
        ("run -n 2", "<&-", 2, "stdin is closed"),
        ("run hi -n 2", ">&-", 1, "stdout is closed"),
        ("chat -n 2", "<&-", 1, "stdin is closed"),
        ("chat -n 2", ">&-", 1, "stdout is closed"),
        ("fit --memory 1GiB", ">&-", 1, "stdout is closed"),
        ("devices", ">&-", 1, "stdout is closed"),
        ("bench", ">&-", 1, "stdout is closed"),
        ("--help", ">&-", 1, "stdout is closed"),
    ],
)
def test_closed_streams(command: str, closed: str, code: int, says: str) -> None:
    line = f"{shlex.join(COMMAND)} {command} {closed}"
    done = subprocess.run(line, shell=True, env=environment(), capture_output=True, timeout=60)
    assert done.returncode == code
    assert done.stderr.decode().startswith("rkv-local: error: ") and says in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_bad_prompt_file(tmp_path: Path) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes("straße".encode("latin-1"))
    result = invoke("run", "-f", str(file))
    assert result.exit_code == 2
    assert "not UTF-8 (byte 4)" in error_line(result)
    assert "cannot read" in error_line(invoke("run", "-f", str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("empty", "empty"),
        ("text", "not a GGUF file"),
        ("head", "truncated"),
        ("meta", "damaged"),
        ("data", "bounds"),
        ("version", "version 77"),
        ("big", "big-endian"),
        ("count", "number of tensors"),
    ],
)
@pytest.mark.parametrize("command", ["run", "bench"])
def test_bad_model_files(name: str, says: str, command: str, tmp_path: Path) -> None:
    whole = talker().read_bytes()
    contents = {
        "empty": b"",
        "text": b"once upon a time",
        "head": whole[:12],
        "meta": whole[:3000],
        "data": whole[: len(whole) - 100000],
        "version": b"GGUF" + (77).to_bytes(4, "little") + whole[8:],
        "big": b"GGUF" + (3).to_bytes(4, "big") + whole[8:],
        "count": whole[:8] + (2**62).to_bytes(8, "little") + whole[16:],
    }
    file = tmp_path / f"{name}.gguf"
    file.write_bytes(contents[name])
    args = ("run", str(file), "hi") if command == "run" else ("bench", "-m", str(file), "-d", "0", "-r", "1")
    result = invoke(*args)
    assert result.exit_code == 1
    if command == "run" or name != "meta":  # bench leaves a damaged header to llama.cpp
        assert says in error_line(result)
    else:
        error_line(result)


def test_model_without_a_vocabulary() -> None:
    result = invoke("run", str(mute()), "hi")
    assert result.exit_code == 1
    assert "no vocabulary" in error_line(result)


def test_grammar_that_cannot_be_parsed(tmp_path: Path) -> None:
    grammar = tmp_path / "g.gbnf"
    grammar.write_text("root = nothing", encoding="utf-8")
    done = shell("run", str(talker()), "hi", "--grammar-file", str(grammar))
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[0].startswith("rkv-local: error: the grammar cannot be parsed: ")
    assert done.stderr.count(b"\n") == 1


def test_unreadable_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything
    result = invoke("run", str(talker()), "hi")
    assert result.exit_code == 1
    assert error_line(result) == f"cannot read '{talker()}': Permission denied"
