"""Conversations: the text of a prompt from its messages, and an answer's thinking apart from its answer."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = [
    "THINK_TAGS",
    "Conversation",
    "Kind",
    "StopMatcher",
    "Template",
    "TemplateError",
    "ThinkingSplitter",
    "Utf8Decoder",
]

Kind = Literal["text", "thinking"]

# What reasoning models put around their thinking: DeepSeek and Qwen, Magistral, Seed-OSS.
THINK_TAGS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TemplateError(ValueError):
    """A chat template that cannot be rendered; str() is one line."""


@dataclass(frozen=True)
class Template:
    """A model's chat template (Jinja2, as in its GGUF file)."""

    source: str
    bos: str = ""
    eos: str = ""
    named: bool = True  # False: the model has none and ChatML stands in

    @classmethod
    def of(cls, metadata: dict[str, str], bos: str, eos: str) -> Template:
        """The template in a GGUF file's metadata, or ChatML if there is none (as llama.cpp does)."""
        source = metadata.get("tokenizer.chat_template")
        return cls(source or CHATML, bos, eos, named=bool(source))

    def render(self, messages: Sequence[dict[str, Any]], **extra: Any) -> str:
        """The prompt for these messages, with the opening of the assistant's turn at its end.

        Raises:
            TemplateError: the template refuses the messages, or is not valid Jinja2.
        """
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            formatter = Jinja2ChatFormatter(self.source, eos_token=self.eos, bos_token=self.bos)
            return formatter(messages=list(messages), **extra).prompt
        except Exception as err:  # a template is a program from the model's file: it may raise anything
            raise TemplateError(
                f"the model's chat template refuses this conversation: {one_line(err)}"
            ) from err

    @staticmethod
    def open_tag(prompt: str) -> tuple[str, str] | None:
        """The thinking tags that the template itself has opened at the end of `prompt`, if any."""
        tail = prompt.rstrip()
        return next((pair for pair in THINK_TAGS if tail.endswith(pair[0])), None)


def one_line(err: object) -> str:
    """An error's text without line breaks."""
    return " ".join(str(err).split()) or type(err).__name__


@dataclass
class Conversation:
    """The turns so far. Thinking is kept beside the answers, so that a template decides what a later turn
    sees.

    Templates that know `reasoning_content` (Qwen3 and later) take it from there where they want it; all
    others see the answer alone, so an earlier turn's thinking is dropped.
    """

    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self, user: str | None = None) -> list[dict[str, str]]:
        """The messages for a template: system prompt, turns, and a new user turn if there is one."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        tail = [] if user is None else [{"role": "user", "content": user}]
        return head + self.turns + tail

    def add(self, user: str, answer: str, thinking: str = "") -> None:
        """Append a finished turn."""
        reply = {"role": "assistant", "content": answer}
        if thinking:
            reply["reasoning_content"] = thinking
        self.turns += [{"role": "user", "content": user}, reply]

    def take_back(self) -> str | None:
        """Remove the last turn and return what the user had said; None if there is no turn."""
        if len(self.turns) < 2:
            return None
        user = self.turns[-2]["content"]
        del self.turns[-2:]
        return user

    def clear(self) -> None:
        """Forget all turns; the system prompt stays."""
        self.turns.clear()


class Utf8Decoder:
    """Bytes of tokens in, whole characters out; bytes that can never be UTF-8 become U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What an unfinished character leaves."""
        return self._decoder.decode(b"", final=True)


def held_back(text: str, words: Sequence[str]) -> int:
    """Length of the longest end of `text` that may still become one of `words`."""
    longest = max((len(w) for w in words), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(w.startswith(text[-n:]) for w in words):
            return n
    return 0


class StopMatcher:
    """Passes text on until one of the stop words appears; the stop word itself is not passed on."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [w for w in words if w]
        self.stopped = False
        self._held = ""

    def feed(self, text: str) -> str:
        """The text that is safe to show; "" from the stop word on."""
        if self.stopped:
            return ""
        text = self._held + text
        found = min((i for i in map(text.find, self.words) if i >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        keep = len(text) - held_back(text, self.words)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back as the possible start of a stop word."""
        text, self._held = self._held, ""
        return text


class ThinkingSplitter:
    """Splits a streamed answer into thinking and text. The tags are not passed on, nor the blank space around
    them.

    opened: the tag pair that the prompt's end has opened already (Template.open_tag), or None.
    """

    def __init__(self, opened: tuple[str, str] | None = None) -> None:
        self._close = opened[1] if opened else None
        self._held = ""
        self._strip = opened is not None  # drop blank space until the next visible character

    @property
    def kind(self) -> Kind:
        """What the next character will be."""
        return "thinking" if self._close else "text"

    def feed(self, text: str) -> Iterator[tuple[Kind, str]]:
        """Yield (kind, text) pieces as far as they are certain."""
        self._held += text
        while True:
            tags = [self._close] if self._close else [opening for opening, _ in THINK_TAGS]
            at, tag = min(((i, t) for t in tags if (i := self._held.find(t)) >= 0), default=(-1, ""))
            if at < 0:
                keep = len(self._held) - held_back(self._held, tags)
                yield from self._emit(self._held[:keep])
                self._held = self._held[keep:]
                return
            yield from self._emit(self._held[:at])
            self._held = self._held[at + len(tag) :]
            self._close = None if self._close else dict(THINK_TAGS)[tag]
            self._strip = True

    def finish(self) -> Iterator[tuple[Kind, str]]:
        """What was held back as the possible start of a tag."""
        yield from self._emit(self._held)
        self._held = ""

    def _emit(self, text: str) -> Iterator[tuple[Kind, str]]:
        if self._strip:
            text = text.lstrip()
        if text:
            self._strip = False
            yield self.kind, text
