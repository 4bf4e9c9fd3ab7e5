"""The commands inside a chat: /help, /set and the like."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from rkv_local.chat import Conversation
from rkv_local.cli import ui
from rkv_local.cli.options import Sampling

if TYPE_CHECKING:
    from rkv_local.cli.session import Answer, Session

COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL)  # /usr/bin is text, not a command
SHORT_TEMPLATE = 12  # lines

HELP = '''\
/set NAME VALUE   change a setting (/set alone lists them)
/show             model, cache, settings, system prompt, template (/show template: all of it)
/stats            tokens, cells, memory, compactions, speeds
/regen            answer the last message again
/clear            forget the conversation
/bye              leave (or Ctrl-D)
"""               begin and end a message of several lines
Ctrl-C            stop the answer'''

# name: field of Sampling, type, lowest, highest
NUMBERS: dict[str, tuple[str, type[int] | type[float], float, float]] = {
    "temperature": ("temp", float, 0, 100),
    "top-k": ("top_k", int, 0, 2**31 - 1),
    "top-p": ("top_p", float, 0, 1),
    "min-p": ("min_p", float, 0, 1),
    "repeat-penalty": ("repeat_penalty", float, 1e-6, 100),
    "seed": ("seed", int, -1, 2**32 - 1),
}
ALIASES = {"temp": "temperature", "system-prompt": "system", "predict": "max-tokens", "thinking": "think"}


class Leave(Exception):
    """The user wants to leave."""


class CommandError(ValueError):
    """A command that makes no sense; str() is the line for the user."""


@dataclass
class State:
    """A chat: what the commands look at and change."""

    session: Session
    sampling: Sampling
    conversation: Conversation = field(default_factory=Conversation)
    max_tokens: int = -1
    show_thinking: bool = True
    last: Answer | None = None
    regenerated: int = 0


def parse(text: str) -> tuple[str, str] | None:
    """(name, rest) if `text` is a command, else None."""
    match = COMMAND.fullmatch(text.strip())
    return (match[1], (match[2] or "").strip()) if match else None


def execute(state: State, name: str, rest: str) -> str | None:
    """Carry out a command and return what it says. /regen is the caller's.

    Raises:
        CommandError: unknown, or used wrongly.
        Leave: /bye.
    """
    if name in ("bye", "exit", "quit"):
        raise Leave
    actions: dict[str, Callable[[State, str], str]] = {
        "help": lambda *_: HELP,
        "?": lambda *_: HELP,
        "clear": clear,
        "set": change,
        "show": show,
        "stats": stats,
    }
    if name not in actions:
        raise CommandError(f"there is no command /{name}; /help lists them")
    return actions[name](state, rest)


def clear(state: State, rest: str) -> str:
    """/clear"""
    state.conversation.clear()
    state.session.reset()
    state.last = None
    return "the conversation is forgotten"


def change(state: State, rest: str) -> str:
    """/set NAME VALUE; `/set parameter NAME VALUE` as in Ollama works too."""
    words = rest.split(maxsplit=1)
    if words and words[0] == "parameter":
        words = words[1].split(maxsplit=1) if len(words) > 1 else []
    if not words:
        return settings(state)
    name = words[0].lower().replace("_", "-")
    name, value = ALIASES.get(name, name), words[1].strip() if len(words) > 1 else ""
    if name == "system":
        state.conversation.system = value.strip('"')
        return "system prompt set" if state.conversation.system else "system prompt removed"
    if name == "think":
        if value not in ("show", "hide"):
            raise CommandError("/set think show, or /set think hide")
        state.show_thinking = value == "show"
    elif name == "max-tokens":
        state.max_tokens = int(number(name, value, int, -1, 2**31 - 1))
    elif name in NUMBERS:
        target, kind, low, high = NUMBERS[name]
        found: float | None = number(name, value, kind, low, high)
        state.sampling = state.sampling.with_(**{target: None if name == "seed" and found == -1 else found})
    else:
        raise CommandError(f"there is no setting {words[0]!r}; /set lists them")
    return f"{name} = {value}"


def number(name: str, value: str, kind: type[int] | type[float], low: float, high: float) -> float:
    """A number in [low, high]."""
    try:
        found = kind(value)
        if low <= found <= high:
            return found
    except ValueError:
        pass
    what = "a whole number" if kind is int else "a number"
    raise CommandError(f"{name} must be {what} from {low:g} to {high:g}, not {value!r}")


def settings(state: State) -> str:
    """All settings with their values."""
    values = {f.name: getattr(state.sampling, f.name) for f in fields(state.sampling)}
    values["seed"] = -1 if values["seed"] is None else values["seed"]
    lines = [(name, str(values[target])) for name, (target, *_) in NUMBERS.items()]
    lines.append(("max-tokens", str(state.max_tokens)))
    lines.append(("think", "show" if state.show_thinking else "hide"))
    lines.append(("system", state.conversation.system or "(none)"))
    return "\n".join(f"{name:<15} {value}" for name, value in lines)


def show(state: State, rest: str) -> str:
    """/show, /show template"""
    template = state.session.template
    if rest == "template":
        return template.source
    if rest:
        raise CommandError("/show, or /show template")
    model, kv = state.session.options.model, state.session.kv_report()
    budget = f"policy {kv.policy}"
    if kv.policy != "none":
        budget += f", budget {kv.budget}, buffer {kv.buffer}, pin {kv.pin}"
    source = template.source.splitlines()
    shown = source if len(source) <= SHORT_TEMPLATE else [*source[:3], "... (/show template)"]
    head = "template" if template.named else "template (the model has none; ChatML is used)"
    return "\n".join(
        [
            f"model           {model.name} ({model.path})",
            f"                {state.session.description()}",
            f"cache           {budget}: {kv.cells} cells, {ui.mib(kv.bytes)}",
            f"context         {state.session.n_ctx:,} tokens",
            settings(state),
            head,
            *(f"    {line[:160]}" for line in shown),
        ]
    )


def stats(state: State, rest: str) -> str:
    """/stats"""
    kv, session = state.session.kv_report(), state.session
    lines = [
        f"turns           {len(state.conversation.turns) // 2}",
        f"context         {session.n_tokens:,} of {session.n_ctx:,} tokens",
        f"cells           {session.used()} of {kv.cells} in use, {ui.mib(kv.bytes)} allocated",
        f"compactions     {kv.compactions}, {kv.compaction_seconds:.3f} s",
    ]
    if state.last is not None:
        lines.append(f"last answer     {ui.speeds(state.last)}")
    return "\n".join(lines)
