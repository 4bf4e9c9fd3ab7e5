"""rkv-local chat: a conversation on the terminal."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from rkv_local.chat import Conversation, TemplateError
from rkv_local.cli import commands, reader, ui
from rkv_local.cli.commands import State
from rkv_local.cli.options import load_of, sampling_of
from rkv_local.cli.params import length_option, load_options, model_option, opt, sampling_options
from rkv_local.cli.run import check_max_tokens, check_text
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local.cli.session import Answer


@click.command("chat")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option()
@opt("-sys --system-prompt", "The system prompt.", metavar="TEXT")
@length_option()
@sampling_options()
@load_options()
@click.option("--hide-thinking", is_flag=True, help="Do not show what the model thinks before it answers.")
def chat(name: str | None, **values: Any) -> None:
    """Talk with a model.

    MODEL is a GGUF file or a short name: reasoner, the default, is a small demonstration model that answers
    each message by itself, and solves only its own kinds of problems; smollm2 converses. /help lists the
    commands, Ctrl-C stops an answer, Ctrl-D leaves. When stdin is not a terminal each line (or block between
    triple quotes) is a message.
    """
    if sys.stdin is None:
        raise click.ClickException("stdin is closed: there is nobody to talk with")
    if name is not None and values["model"] is not None:
        raise click.UsageError(f"two models: {name!r} and --model {values['model']!r}")
    check_max_tokens(values["max_tokens"])
    system = values["system_prompt"] or ""
    check_text(system, "the system prompt")
    options = load_of(values, resolve(name or values["model"]))

    from rkv_local.cli.session import Interrupt, load

    with Interrupt() as interrupt:
        session = load(options, interrupt)
    state = State(
        session,
        sampling_of(values),
        Conversation(system),
        max_tokens=values["max_tokens"],
        show_thinking=not values["hide_thinking"],
    )
    if ui.is_terminal(sys.stdin):
        ui.note(f"{options.model.name}: /help lists the commands, Ctrl-D leaves")
        if options.model.note:
            ui.note(options.model.note)
    if not session.template.named:
        ui.note("the model has no chat template; ChatML is used")
    try:
        loop(state, reader.line_reader())
    finally:
        session.close()


def loop(state: State, read: Callable[[str], str]) -> None:
    """Read and answer until the input ends."""
    while True:
        try:
            text, quoted = reader.read_message(read)
            check_text(text, "the message")
            command = None if quoted else commands.parse(text)  # quotes let a message begin with a slash
            if command is None:
                if text.strip():
                    turn(state, text)
            elif command[0] == "regen":
                regenerate(state)
            else:
                click.echo(commands.execute(state, *command))
        except (EOFError, commands.Leave):
            return
        except KeyboardInterrupt:
            ui.note("Ctrl-D or /bye leaves")
        except UnicodeDecodeError as err:
            ui.error(f"the message is not UTF-8 (byte {err.start})")
        except commands.CommandError as err:
            ui.error(str(err))
        except click.ClickException as err:
            ui.error(err.format_message())


def regenerate(state: State) -> None:
    """/regen: the last message once more. A fixed seed is raised, else the text would be the same."""
    before = list(state.conversation.turns)
    user = state.conversation.take_back()
    if user is None:
        raise commands.CommandError("there is no answer to repeat yet")
    state.regenerated += 1
    if not turn(state, user, state.regenerated):
        state.conversation.turns[:] = before


def turn(state: State, user: str, raise_seed: int = 0) -> bool:
    """Answer a message; True if the conversation grew. What goes wrong is one line and changes nothing."""
    from rkv_local.cli.session import Answer, CliError

    if not raise_seed:
        state.regenerated = 0
    answer = Answer()
    try:
        stream(state, user, answer, raise_seed)
    except (CliError, TemplateError) as err:
        ui.error(str(err))
        if not isinstance(err, TemplateError) and answer.n_read:
            state.session.reset()  # a refused decode: the next turn reads everything again
    if not answer.text and not answer.thinking:
        if answer.finish_reason == "interrupted":
            ui.note("stopped before the answer began; the message is not part of the conversation")
        return False
    state.conversation.add(user, answer.text.strip(), answer.thinking.strip())
    state.last = answer
    kv = state.session.kv_report()
    ui.note(ui.stats_line(answer, kv, state.session.used()))
    if answer.finish_reason == "length":
        full = state.session.n_tokens + 1 >= state.session.n_ctx
        ui.note("the context is full: /clear starts over" if full else "stopped at --max-tokens")
    return True


def stream(state: State, user: str, answer: Answer, raise_seed: int) -> None:
    """Show the answer as it comes."""
    from rkv_local.cli.session import CliError, Interrupt

    session, sampling = state.session, state.sampling
    if raise_seed and sampling.seed is not None:
        sampling = sampling.with_(seed=(sampling.seed + raise_seed) % 2**32)
    prompt = session.template.render(state.conversation.messages(user))
    tokens = session.tokenize(prompt)
    if len(tokens) >= session.n_ctx:
        raise CliError(
            f"with this message the conversation has {len(tokens):,} tokens, and the context ends at "
            f"{session.n_ctx:,}: shorten it, /clear, or start with a larger -c (nothing was lost)"
        )
    writer = ui.AnswerWriter(state.show_thinking)
    with Interrupt() as interrupt:
        pieces = session.generate(
            tokens,
            sampling,
            answer,
            interrupt,
            max_tokens=state.max_tokens,
            opened=session.template.open_tag(prompt),
        )
        try:
            with ui.progress("reading", lambda: session.progress(len(tokens))):
                first = next(pieces, None)
            for kind, text in itertools.chain([first] if first else [], pieces):
                writer.write(kind, text)
        finally:
            writer.finish()
