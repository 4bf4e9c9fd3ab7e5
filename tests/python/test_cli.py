"""The command line as a whole: help, documentation, which word is what, speed of --help."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

import rkv_local
from cli_tools import COMMAND, ROOT, environment, error_line, invoke
from rkv_local import KVBudget, models
from rkv_local.cli import docs, options
from rkv_local.cli.eval import eval as evaluations
from rkv_local.cli.main import COMMANDS
from rkv_local.cli.run import run as run_command
from rkv_local.cli.run import sort_words
from rkv_local.options import DEFAULT_N_CTX
from rkv_local.shape import read_metadata


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name in result.stdout] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_no_arguments_is_wrong_usage_with_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "Commands:" in result.stderr


def test_help_does_not_load_the_library() -> None:
    code = (
        "import sys\nfrom rkv_local.cli import main\n"
        "main(['run', '--help'], standalone_mode=False)\n"
        "slow = {'llama_cpp', 'numpy', 'prompt_toolkit', 'jinja2'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(), capture_output=True)


def test_documentation_shows_the_help_as_it_is() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = [name for _, name, _ in docs.BLOCK.findall(text)]
    assert [name.split()[1] for name in shown[1:] if len(name.split()) == 2] == list(COMMANDS)
    assert {name.split()[2] for name in shown if len(name.split()) == 3} == set(evaluations.commands)
    assert docs.renewed(text) == text, "python -m rkv_local.cli.docs docs/cli.md"


def test_policy_list() -> None:
    result = invoke("run", "--kv-policy", "list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(rkv_local.POLICIES)
    assert "arXiv 2505.24133" in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout.startswith("rkv-local ")


@pytest.mark.parametrize(
    ("words", "given", "expected"),
    [
        ((), {}, (None, None)),
        (("why?",), {}, (None, "why?")),
        (("smollm2",), {}, ("smollm2", None)),
        (("SmolLM2",), {}, ("SmolLM2", None)),
        (("reasoner",), {}, ("reasoner", None)),
        (("absent.gguf",), {}, ("absent.gguf", None)),
        (("what is a .gguf",), {}, (None, "what is a .gguf")),
        (("-",), {}, (None, "-")),
        (("model", "why?"), {}, ("model", "why?")),
        (("why?",), {"model": "m"}, ("m", "why?")),
        ((), {"model": "m", "prompt": "why?"}, ("m", "why?")),
        (("m",), {"prompt": "why?"}, ("m", "why?")),
        (("m",), {"file": Path("f")}, ("m", None)),
    ],
)
def test_which_word_is_what(words: tuple[str, ...], given: dict[str, Any], expected: Any) -> None:
    assert sort_words(words, {"model": None, "prompt": None, "file": None, **given}) == expected


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (("a", "b", "c"), {}),
        (("a", "b"), {"model": "m"}),
        (("a", "b"), {"prompt": "p"}),
        (("a",), {"model": "m", "prompt": "p"}),
        ((), {"prompt": "p", "file": Path("f")}),
    ],
)
def test_too_many_words(words: tuple[str, ...], given: dict[str, Any]) -> None:
    with pytest.raises(click.UsageError):
        sort_words(words, {"model": None, "prompt": None, "file": None, **given})


def test_packaged_model_that_is_absent_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = models.Packaged("no_such_package", "x.gguf", "pip install no-such-package", "")
    monkeypatch.setitem(models.PACKAGED, "smollm2", absent)
    result = invoke("run", "smollm2", "hi")
    assert result.exit_code == 1
    assert error_line(result) == "the model 'smollm2' is not installed: pip install no-such-package"


def fake_gguf(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    return path


def test_default_model_is_found_in_a_wheel_and_in_a_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rkv_like").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    moved = replace(models.PACKAGED["reasoner"], package="rkv_like")
    monkeypatch.setitem(models.PACKAGED, "reasoner", moved)
    result = invoke("run", "hi")
    assert result.exit_code == 1
    assert error_line(result).startswith("the model 'reasoner' is not installed: install rkv-local again")
    in_source = fake_gguf(tmp_path / "models" / "rkv-reasoner.gguf")
    assert models.resolve().path == in_source
    in_wheel = fake_gguf(tmp_path / "rkv_like" / "rkv-reasoner.gguf")
    assert models.resolve().path == in_wheel


def test_default_model_is_the_one_in_the_repository() -> None:
    found = models.resolve()
    assert found.name == models.DEFAULT_MODEL == "reasoner"
    assert found.path.read_bytes() == (ROOT / "models" / "rkv-reasoner.gguf").read_bytes()


def test_default_model_reaches_as_far_as_it_was_trained() -> None:
    def reach(*words: str) -> int:
        context = click.Context(run_command)
        run_command.parse_args(context, list(words))
        model = models.resolve(sort_words(context.params.pop("words"), context.params)[0])
        return options.load_of(context.params, model).ctx_size

    trained = models.resolve()
    assert read_metadata(trained.path)["qwen3.context_length"] == trained.ctx
    assert reach("hi") == reach("hi", "--kv-policy", "none") == trained.ctx
    assert reach("hi", "-c", "100") == 100
    assert reach("smollm2", "hi") == DEFAULT_N_CTX


def test_budget_options_reach_the_budget() -> None:
    """What is not given is the policy's own; `none` is no budget."""

    def made(*words: str) -> KVBudget | None:
        context = click.Context(run_command)
        run_command.parse_args(context, [*words, "hi"])
        return options.budget_of(context.params)

    assert made() == KVBudget()
    assert made("--kv-policy", "none") is None
    assert made("--kv-policy", "rkv") == KVBudget(policy="rkv", recent=0)
    assert made("--kv-recent", "40") == KVBudget(recent=40)
    assert made("--kv-value-weight", "0.3") == KVBudget(value_weight=0.3)
    assert made("--kv-recent", "40", "--kv-policy", "snapkv") == KVBudget(policy="snapkv", recent=40)
    given = ("--kv-budget", "200", "--kv-buffer", "32", "--kv-window", "5", "--kv-lambda", "0.3")
    expected = KVBudget(budget=200, buffer=32, window=5, lam=0.3)
    assert made(*given) == expected
    for text, budgets in (("uniform", "uniform"), ("9,30", (9, 30)), ("a.json", "a.json")):
        found = made(*given, "--kv-layer-budgets", text, "--kv-pin", "2", "--kv-seed", "3")
        assert found == replace(expected, layer_budgets=budgets, pin=2, seed=3)


@pytest.mark.parametrize("value", ["0", "4097", "x"])
def test_a_bad_number_of_recent_tokens_is_one_line(value: str) -> None:
    result = invoke("run", "hi", "--kv-recent", value)
    assert result.exit_code == 2
    assert "recent" in error_line(result)


def test_unknown_command_and_option() -> None:
    assert error_line(invoke("walk")) == "No such command 'walk'."
    result = invoke("run", "--no-such-option", "hi")
    assert result.exit_code == 2
    assert "--no-such-option" in error_line(result)


def test_devices_table_and_json() -> None:
    found = json.loads(invoke("devices", "--json").stdout)
    assert set(found[0]) == {"name", "description", "type", "memory_free", "memory_total"}
    cpu = next(d for d in found if d["type"] == "CPU")
    assert 0 < cpu["memory_total"] < 2**50
    table = invoke("devices")
    assert table.exit_code == 0
    head, *rows = table.stdout.splitlines()
    assert head.split()[:2] == ["NAME", "TYPE"]
    assert len(rows) == len(found)


def test_devices_that_loads_the_library_alone() -> None:
    done = subprocess.run([*COMMAND, "devices"], capture_output=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_relative_path_that_is_called_like_a_short_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gguf(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("./smollm2").path == Path("smollm2")
    assert models.resolve("smollm2").path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_default_threads_are_within_the_machine() -> None:
    import os

    assert 1 <= options.default_threads() <= (os.cpu_count() or 1)
