"""rkv-local run: one prompt, one answer."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.chat import Conversation
from rkv_local.cli import ui
from rkv_local.cli.options import load_of, sampling_of
from rkv_local.cli.params import length_option, load_options, model_option, opt, sampling_options
from rkv_local.models import looks_like_model, resolve

if TYPE_CHECKING:
    from rkv_local.cli.session import Answer, KvReport


@click.command("run")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@model_option()
@opt("-p --prompt", "The prompt.", metavar="TEXT")
@opt("-f --file", "Read the prompt from a file.", click.Path(path_type=Path), metavar="FILE")
@opt("-sys --system-prompt", "The system prompt.", metavar="TEXT")
@length_option()
@sampling_options()
@load_options()
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would stop.")
@opt("--stop -r --reverse-prompt", "Stop before this text; may be repeated.", metavar="TEXT", multiple=True)
@opt("--grammar-file", "Restrict the answer to a GBNF grammar.", click.Path(path_type=Path), metavar="FILE")
@opt("-j --json-schema", "Restrict the answer to a JSON schema.", metavar="SCHEMA")
@click.option(
    "--raw", "--no-chat-template", "raw", is_flag=True, help="Feed the prompt without the chat template."
)
@click.option("--hide-thinking", is_flag=True, help="Do not show what the model thinks before it answers.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming the text.")
def run(words: tuple[str, ...], **values: Any) -> None:
    """Answer one prompt.

    MODEL is a GGUF file or a short name: reasoner, the default, is a small demonstration model that solves
    only its own kinds of problems; smollm2 is for other questions. One word alone is the prompt for the
    default model, unless it is a short name or a .gguf file: then the prompt comes from stdin. With - as the
    prompt it comes from stdin too. The text goes to stdout, statistics to stderr.
    """
    name, prompt = sort_words(words, values)
    model = resolve(name)  # before stdin is waited for
    prompt = checked_prompt(prompt, values["file"])
    max_tokens = values["max_tokens"]
    check_max_tokens(max_tokens)
    system = values["system_prompt"]
    if system is not None:
        check_text(system, "the system prompt")
    if values["raw"] and system is not None:
        raise click.UsageError("--raw feeds the prompt as it is: there is no place for --system-prompt")
    grammar = grammar_text(values["grammar_file"], values["json_schema"])
    if grammar is not None and values["ignore_eos"]:
        raise click.UsageError("--ignore-eos forbids the end that a grammar asks for")
    options = load_of(values, model)
    if name is None and model.note and ui.is_terminal(sys.stderr):
        ui.note(model.note)

    from rkv_local.cli.session import Answer, CliError, Interrupt, load

    answer = Answer()
    with Interrupt() as interrupt:
        session = load(options, interrupt)
        raw = values["raw"] or (not session.template.named and system is None)
        opened = None
        if not raw:
            prompt = session.template.render(Conversation(system or "").messages(prompt))
            opened = session.template.open_tag(prompt)
        if grammar is not None:
            session.check_grammar(grammar)
        tokens = session.tokenize(prompt)
        if not tokens:
            raise CliError("the prompt has no tokens")
        pieces = session.generate(
            tokens,
            sampling_of(values),
            answer,
            interrupt,
            max_tokens=max_tokens,
            stop=values["stop"],
            ignore_eos=values["ignore_eos"],
            grammar=grammar,
            split=not raw,
            opened=opened,
        )
        with ui.progress("reading the prompt", lambda: session.progress(len(tokens))):
            first = next(pieces, None)
        writer = None if values["as_json"] else ui.AnswerWriter(not values["hide_thinking"])
        try:
            for kind, text in itertools.chain([first] if first else [], pieces):
                if writer:
                    writer.write(kind, text)
        finally:
            if writer:
                writer.finish()
        kv = session.kv_report()
        if values["as_json"]:
            click.echo(json.dumps(report(answer, kv, options.model.name), ensure_ascii=False))
        else:
            ui.line(ui.stats_line(answer, kv, session.used()))
        session.close()
    if answer.finish_reason == "interrupted":
        click.get_current_context().exit(130)


def report(answer: Answer, kv: KvReport, model: str) -> dict[str, Any]:
    """What --json prints."""
    return {
        "text": answer.text,
        "thinking": answer.thinking.strip(),
        "finish_reason": answer.finish_reason,
        "model": model,
        "tokens": {"prompt": answer.n_prompt, "generated": answer.n_generated},
        "timings": {
            "prompt_tokens_per_second": answer.prompt_tps,
            "generated_tokens_per_second": answer.generated_tps,
            "seconds": answer.seconds,
        },
        "kv": {
            "policy": kv.policy,
            "budget": kv.budget,
            "buffer": kv.buffer,
            "recent": kv.recent,
            "pin": kv.pin,
            "cells_allocated": kv.cells,
            "bytes_allocated": kv.bytes,
            "compactions": kv.compactions,
            "compaction_seconds": kv.compaction_seconds,
        },
    }


def sort_words(words: tuple[str, ...], values: dict[str, Any]) -> tuple[str | None, str | None]:
    """Which of the words on the command line is the model and which the prompt; None: not among them."""
    model, prompt = values["model"], values["prompt"]
    elsewhere = prompt is not None or values["file"] is not None
    if prompt is not None and values["file"] is not None:
        raise click.UsageError("--prompt and --file both give a prompt")
    rest = list(words)
    lone_model = len(rest) == 1 and (elsewhere or looks_like_model(rest[0]))
    if model is None and (len(rest) == 2 or lone_model):
        model = rest.pop(0)
    if rest and not elsewhere:
        prompt = rest.pop(0)
        elsewhere = True
    if rest:
        raise click.UsageError(f"one word too many: {rest[0]!r} (put a prompt of several words in quotes)")
    return model, prompt


def checked_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt as text, read from the file or stdin where it is not on the command line.

    Raises:
        click.UsageError: there is none, it is empty, it cannot be read or is not UTF-8.
    """
    source = "the prompt"
    if file is not None and str(file) != "-":
        prompt, source = read_text(file, "the prompt"), str(file)
    elif prompt is None or prompt == "-":
        if sys.stdin is None:
            raise click.UsageError("no prompt, and stdin is closed")
        if prompt is None and file is None and ui.is_terminal(sys.stdin):
            raise click.UsageError('no prompt: rkv-local run "..." (for a conversation: rkv-local chat)')
        source = "the prompt on stdin"
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as err:
            raise click.UsageError(f"{source} is not UTF-8 (byte {err.start})") from err
    check_text(prompt, source)
    if file is not None or source.endswith("stdin"):
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt.strip():
        raise click.UsageError(f"{source} is empty")
    return prompt


def check_max_tokens(number: int) -> None:
    """Refuse a negative count other than -1."""
    if number < -1:
        raise click.UsageError(f"--max-tokens {number} is not a count (-1 = until the model stops)")


def check_text(text: str, source: str) -> None:
    """Refuse text that came from bytes that are not UTF-8 (Python keeps such bytes as lone surrogates)."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise click.UsageError(f"{source} is not UTF-8 (character {err.start})") from err


def read_text(path: Path, what: str) -> str:
    """A file as UTF-8 text, or a usage error in one line."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as err:
        raise click.UsageError(f"{what} in {str(path)!r} is not UTF-8 (byte {err.start})") from err
    except OSError as err:
        raise click.UsageError(f"cannot read {what} from {str(path)!r}: {err.strerror}") from err


def grammar_text(file: Path | None, schema: str | None) -> str | None:
    """GBNF from a file or from a JSON schema."""
    if file is not None and schema is not None:
        raise click.UsageError("--grammar-file and --json-schema exclude each other")
    if file is not None:
        text = read_text(file, "the grammar")
        if not text.strip():
            raise click.UsageError(f"the grammar in {str(file)!r} is empty")
        return text
    if schema is None:
        return None
    check_text(schema, "the JSON schema")
    try:
        json.loads(schema)
    except ValueError as err:
        raise click.UsageError(f"--json-schema is not JSON: {err}") from err
    from rkv_local.cli.session import schema_grammar

    return schema_grammar(schema)
