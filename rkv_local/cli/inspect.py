"""rkv-local inspect: what every layer and KV head still holds after each compaction."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.chat import Conversation
from rkv_local.cli import ui
from rkv_local.cli.options import load_of, sampling_of
from rkv_local.cli.params import length_option, load_options, model_option, opt, sampling_options
from rkv_local.cli.run import check_max_tokens, check_text, checked_prompt, read_text, sort_words
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local.cli.session import Session
    from rkv_local.inspect import Recorder

FORMATS = {"html": ".html", "json": ".json"}


@click.command("inspect")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@model_option()
@opt("-p --prompt", "The prompt.", metavar="TEXT")
@opt("-f --file", "Read the prompt from a file.", click.Path(path_type=Path), metavar="FILE")
@opt("-sys --system-prompt", "The system prompt.", metavar="TEXT")
@opt("-o --output", "The file to write; - is stdout (default: inspect.html or inspect.json).", metavar="FILE")
@opt("--format", "html or json (default: as FILE ends, else html).", click.Choice(tuple(FORMATS)), None, None)
@opt("--trace", "The text that follows, instead of generating it.", click.Path(path_type=Path), None, "FILE")
@length_option()
@sampling_options()
@load_options()
@click.option("--ignore-eos", is_flag=True, help="Go on where the model would stop.")
@click.option(
    "--raw", "--no-chat-template", "raw", is_flag=True, help="Feed the prompt without the chat template."
)
def inspect(words: tuple[str, ...], **values: Any) -> None:
    """Show which tokens each layer and KV head still holds after each compaction.

    Answers the prompt as `run` does, without showing the answer, and writes a page with the text coloured by
    how many heads hold each token, for every compaction, or the same as JSON. Ctrl-C writes what there is.
    """
    name, prompt = sort_words(words, values)
    model = resolve(name)
    prompt = checked_prompt(prompt, values["file"])
    check_max_tokens(values["max_tokens"])
    system = values["system_prompt"]
    if system is not None:
        check_text(system, "the system prompt")
    if values["raw"] and system is not None:
        raise click.UsageError("--raw feeds the prompt as it is: there is no place for --system-prompt")
    trace = None if values["trace"] is None else read_text(values["trace"], "the trace")
    kind, path = destination(values["output"], values["format"])
    if values["kv_policy"] == "none":
        raise click.UsageError("policy none evicts nothing: there is nothing to inspect")
    options = load_of(values, model)

    from rkv_local.cli.session import Interrupt, load
    from rkv_local.inspect import Recorder

    with Interrupt() as interrupt:
        session = load(options, interrupt)
        llama = session.llama
        if not (values["raw"] or (not session.template.named and system is None)):
            prompt = session.template.render(Conversation(system or "").messages(prompt))
        llama.sampling, llama.interrupt = sampling_of(values), interrupt
        llama.banned = session.end_tokens if values["ignore_eos"] else ()
        recorder = Recorder(llama, session.tokenize(prompt), model.name)
        forced = None if trace is None else session.tokenize(trace, bos=False)

        def so_far() -> str:
            return f"{llama.n_tokens:,} tokens, {ui.plural(recorder.n_steps, 'compaction')}"

        with ui.progress("reading" if forced else "generating", text=so_far):
            watch(session, recorder, values["max_tokens"], forced, lambda: interrupt.pressed)
        recording = recorder.recording()
        session.close()
    text = recording.to_html() if kind == "html" else recording.to_json() + "\n"
    if path is None:
        click.echo(text, nl=False)
    else:
        path.write_text(text, encoding="utf-8", newline="\n")
        size = len(text.encode("utf-8"))
        ui.line(f"{path}: {ui.mib(size)}, {len(recording.tokens):,} tokens, {compactions(recording.n_steps)}")
    if recording.finish == "interrupted":
        click.get_current_context().exit(130)


def watch(
    session: Session,
    recorder: Recorder,
    max_tokens: int,
    forced: list[int] | None,
    stopped: Callable[[], bool],
) -> None:
    """Generate, or read a given text, until its end or Ctrl-C.

    Raises:
        CliError: the text does not fit in the context, or the engine refuses to decode.
    """
    from rkv_local import RKVError
    from rkv_local.chat import one_line
    from rkv_local.cli import nativelog
    from rkv_local.cli.interrupt import Interrupted
    from rkv_local.cli.session import CliError

    n = len(recorder.tokens) + len(forced or ())
    if n > session.n_ctx:
        raise CliError(f"the text has {n:,} tokens and the context {session.n_ctx:,}: raise -c/--ctx-size")
    room = session.n_ctx - n
    limit = room if max_tokens < 0 else min(max_tokens, room)
    nativelog.clear()
    steps = recorder.generate() if forced is None and limit > 0 else recorder.force(forced or [])
    try:
        for done, _ in enumerate(steps, 1):
            if stopped():
                raise Interrupted
            if forced is None and done >= limit:
                break
    except Interrupted:
        recorder.finish = "interrupted"
    except (RKVError, RuntimeError, ValueError) as err:
        raise CliError(nativelog.reason(one_line(err))) from err
    finally:
        steps.close()


def compactions(n: int) -> str:
    """How many there were; what to do about none."""
    return ui.plural(n, "compaction") + (
        "" if n else ": nothing was evicted; a smaller --kv-budget shows more"
    )


def destination(output: str | None, kind: str | None) -> tuple[str, Path | None]:
    """Format, and file to write; None is stdout.

    Raises:
        click.UsageError: it cannot be written.
    """
    if kind is None:
        kind = next((k for k, end in FORMATS.items() if str(output).lower().endswith(end)), "html")
    if output == "-":
        return kind, None
    path = Path(output or f"inspect{FORMATS[kind]}")
    why = None
    try:
        if path.is_dir():
            why = "it is a folder"
        elif not path.parent.is_dir():
            why = f"there is no folder {str(path.parent)!r}"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            why = "no permission"
    except (OSError, ValueError) as err:
        why = str(err)
    if why:
        raise click.UsageError(f"cannot write {str(path)!r}: {why}")
    return kind, path
