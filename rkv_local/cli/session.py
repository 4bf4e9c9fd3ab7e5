"""A loaded model that answers: loading with its errors in one line, sampling, streaming, stopping.

Importing this module loads the native library; commands import it when they run, so that --help stays fast.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from rkv_local import RKVError
from rkv_local.chat import Kind, StopMatcher, Template, ThinkingSplitter, Utf8Decoder, one_line
from rkv_local.cli import nativelog, ui
from rkv_local.cli.interrupt import Interrupt, Interrupted
from rkv_local.cli.llama import CliLlama, Loading
from rkv_local.cli.options import LoadOptions, Sampling
from rkv_local.tokenizer import PieceTokenizer

# after rkv_local, which says where its library is
from llama_cpp import llama_cpp as lib  # isort: skip
from llama_cpp.llama_grammar import LlamaGrammar  # isort: skip

__all__ = ["Answer", "CliError", "Interrupt", "KvReport", "Session", "load", "schema_grammar"]


class CliError(RuntimeError):
    """A failure at run time; str() is the line for the user."""


def schema_grammar(schema: str) -> str:
    """GBNF for a JSON schema.

    Raises:
        CliError: it uses what llama_cpp cannot turn into a grammar.
    """
    try:
        return str(LlamaGrammar.from_json_schema(schema)._grammar)
    except Exception as err:
        raise CliError(f"the JSON schema cannot be turned into a grammar: {one_line(err)}") from err


@dataclass(frozen=True)
class KvReport:
    """The cache of a session: policy and sizes in cells; None where policy `none` has no such number."""

    policy: str
    budget: int | None
    buffer: int | None
    recent: int | None
    pin: int | str | None
    cells: int
    bytes: int
    compactions: int
    compaction_seconds: float


@dataclass
class Answer:
    """One answer as it grows. Times in seconds, counts in tokens."""

    text: str = ""
    thinking: str = ""
    finish_reason: str = "length"  # stop, length, interrupted
    n_prompt: int = 0
    n_read: int = 0  # prompt tokens that had to be decoded; the rest was in the cache
    n_generated: int = 0
    prompt_seconds: float = 0.0
    generated_seconds: float = 0.0
    compactions: int = 0
    compaction_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Prompt and generation together."""
        return self.prompt_seconds + self.generated_seconds

    @property
    def prompt_tps(self) -> float | None:
        """Prompt tokens decoded per second."""
        return self.n_read / self.prompt_seconds if self.n_read and self.prompt_seconds else None

    @property
    def generated_tps(self) -> float | None:
        """Tokens per second after the first one, which the prompt's last decode gives."""
        if self.n_generated < 2 or not self.generated_seconds:
            return None
        return (self.n_generated - 1) / self.generated_seconds


class Session:
    """A model, its cache and its chat template."""

    def __init__(self, options: LoadOptions, interrupt: Interrupt | None = None) -> None:
        """Load the model.

        Raises:
            KeyboardInterrupt: `interrupt` was pressed while it loaded.
            CliError: the model or the context cannot be made; one line with llama.cpp's own reason.
            ValueError: a budget that this model cannot have.
        """
        self.options = options
        nativelog.install(options.verbose)
        nativelog.clear()
        Loading.share, Loading.interrupt = 0.0, interrupt
        try:
            self.llama = CliLlama(
                str(options.model.path),
                kv=options.kv,
                n_ctx=options.ctx_size,
                n_batch=options.batch_size,
                n_outputs=1,
                n_gpu_layers=options.gpu_layers,
                use_mmap=options.mmap,
                offload_kqv=options.kv_offload,
                n_threads=options.threads,
                n_threads_batch=options.threads,
                flash_attn=options.flash_attn,
                type_k=options.cache_type_k,
                type_v=options.cache_type_v,
                verbose=options.verbose,
            )
        except (RuntimeError, ValueError, OSError) as err:
            if interrupt is not None and interrupt.pressed:
                raise KeyboardInterrupt from err
            raise CliError(nativelog.reason(one_line(err), options.model.name)) from err
        self.vocab = lib.llama_model_get_vocab(self.llama.model)
        if lib.llama_vocab_type(self.vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
            self.llama.close()
            raise CliError(f"{options.model.name} has no vocabulary: it can be measured, not talked to")
        self.n_ctx = self.llama.n_ctx()
        self.template = Template.of(
            self.llama.metadata,
            self._token_text(self.llama.token_bos()),
            self._token_text(self.llama.token_eos()),
        )
        self._tags = self._single_token_tags()
        assert isinstance(self.llama.tokenizer_, PieceTokenizer)
        self._tokenizer = self.llama.tokenizer_

    def close(self) -> None:
        """Free the context and the model."""
        self.llama.close()

    def tokenize(self, text: str, bos: bool = True, special: bool = True) -> list[int]:
        """Tokens of `text`. bos: with the vocabulary's beginning, unless the text starts with it."""
        first = self.template.bos
        if first and text.startswith(first):
            bos = False
        return list(self.llama.tokenize(text.encode("utf-8"), add_bos=bos, special=special))

    def piece(self, token: int) -> bytes:
        """The bytes of a token: none for control tokens, except those that mark thinking."""
        return self._tags.get(token) or self._tokenizer.piece(token)

    def check_grammar(self, text: str) -> None:
        """Raise CliError if llama.cpp cannot parse `text` as GBNF."""
        # the parser writes to stderr, not to the log
        sampler, said = nativelog.with_stderr(
            lambda: lib.llama_sampler_init_grammar(self.vocab, text.encode("utf-8"), b"root")
        )
        if not sampler:
            why = said.removeprefix("parse: error parsing grammar: ") or "there is no rule `root`"
            raise CliError(f"the grammar cannot be parsed: {why[:200]}")
        lib.llama_sampler_free(sampler)

    def generate(
        self,
        tokens: Sequence[int],
        sampling: Sampling,
        answer: Answer,
        interrupt: Interrupt,
        *,
        max_tokens: int = -1,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        grammar: str | None = None,
        split: bool = True,
        opened: tuple[str, str] | None = None,
    ) -> Iterator[tuple[Kind, str]]:
        """Stream the answer to a prompt as (kind, text) pieces and fill in `answer`.

        max_tokens: -1 = until the model stops or the context is full. split: tell thinking from text; opened:
        the thinking tags that the prompt ends in.

        Raises:
            CliError: the prompt does not fit in the context, or the engine refuses to decode.
        """
        answer.n_prompt = len(tokens)
        if len(tokens) >= self.n_ctx:
            raise CliError(
                f"the prompt has {len(tokens):,} tokens and the context {self.n_ctx:,}: raise -c/--ctx-size"
            )
        room = self.n_ctx - len(tokens)
        limit = room if max_tokens < 0 else min(max_tokens, room)
        llama = self.llama
        llama.sampling, llama.grammar_text, llama.interrupt = sampling, grammar, interrupt
        llama.banned = self.end_tokens if ignore_eos else ()
        llama.n_evaluated = 0
        decoder, matcher = Utf8Decoder(), StopMatcher(stop)
        splitter = ThinkingSplitter(opened) if split else None
        before = llama.kv_stats()
        start = time.perf_counter()
        first: float | None = None
        nativelog.clear()
        stream = llama.generate(list(tokens))
        try:
            if limit == 0:
                llama.reset()
                llama.eval(list(tokens))
            while answer.n_generated < limit:
                token = next(stream)
                if first is None:
                    first, answer.n_read = time.perf_counter(), llama.n_evaluated
                if not ignore_eos and lib.llama_vocab_is_eog(self.vocab, token):
                    answer.finish_reason = "stop"
                    break
                answer.n_generated += 1
                text = matcher.feed(decoder.feed(self.piece(token)))
                yield from self._note(answer, splitter, text)
                if matcher.stopped:
                    answer.finish_reason = "stop"
                    break
                if interrupt.pressed:
                    raise Interrupted
        except Interrupted:
            answer.finish_reason = "interrupted"
        except (RKVError, RuntimeError, ValueError) as err:
            raise CliError(nativelog.reason(one_line(err))) from err
        finally:
            stream.close()
            end = time.perf_counter()
            after = llama.kv_stats()
            answer.prompt_seconds = (first or end) - start
            answer.generated_seconds = end - (first or end)
            if first is None:
                answer.n_read = llama.n_evaluated
            answer.compactions = after.compactions - before.compactions
            answer.compaction_seconds = (after.t_compaction_us - before.t_compaction_us) / 1e6
        rest = matcher.feed(decoder.finish()) + matcher.finish()
        yield from self._note(answer, splitter, rest)
        if splitter:
            yield from self._keep(answer, splitter.finish())

    def used(self) -> int:
        """Cells in use; with policy none the tokens that the cache holds."""
        return self.llama.kv_used()

    @property
    def n_tokens(self) -> int:
        """Positions that the context holds."""
        return int(self.llama.n_tokens)

    def description(self) -> str:
        """llama.cpp's own words for the model, its size and parameters."""
        buf = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.llama.model, buf, len(buf))
        size, count = lib.llama_model_size(self.llama.model), lib.llama_model_n_params(self.llama.model)
        return (
            f"{buf.value.decode(errors='replace')}, {count / 1e6:,.1f} M parameters, {size / 2**20:,.1f} MiB"
        )

    def reset(self) -> None:
        """Forget everything that was decoded."""
        self.llama.reset()
        lib.llama_memory_clear(lib.llama_get_memory(self.llama.ctx), True)

    def progress(self, total: int) -> tuple[float, str]:
        """How much of a prompt of `total` tokens is read, for ui.progress."""
        done = self.llama.n_evaluated
        return done / total, f"{done:,}/{total:,} tokens"

    def kv_report(self) -> KvReport:
        """What the cache is and did so far."""
        stats, kv = self.llama.kv_stats(), self.options.kv
        return KvReport(
            policy=kv.policy if kv else "none",
            budget=kv.budget if kv else None,
            buffer=kv.buffer if kv else None,
            recent=stats.recent if kv else None,
            pin=kv.pin if kv else None,
            cells=stats.cells,
            bytes=stats.bytes,
            compactions=stats.compactions,
            compaction_seconds=stats.t_compaction_us / 1e6,
        )

    def _note(
        self, answer: Answer, splitter: ThinkingSplitter | None, text: str
    ) -> Iterator[tuple[Kind, str]]:
        pieces: Iterator[tuple[Kind, str]] = iter((("text", text),)) if text else iter(())
        yield from self._keep(answer, splitter.feed(text) if splitter else pieces)

    @staticmethod
    def _keep(answer: Answer, pieces: Iterator[tuple[Kind, str]]) -> Iterator[tuple[Kind, str]]:
        for kind, text in pieces:
            if kind == "thinking":
                answer.thinking += text
            else:
                answer.text += text
            yield kind, text

    @cached_property
    def end_tokens(self) -> list[int]:
        """Tokens that end a generation."""
        n = lib.llama_vocab_n_tokens(self.vocab)
        return [t for t in range(n) if lib.llama_vocab_is_eog(self.vocab, t)]

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return lib.llama_vocab_get_text(self.vocab, token).decode("utf-8", errors="replace")

    def _single_token_tags(self) -> dict[int, bytes]:
        from rkv_local.chat import THINK_TAGS

        found = {}
        for tag in (t.encode() for pair in THINK_TAGS for t in pair):
            tokens = self.llama.tokenize(tag, add_bos=False, special=True)
            if len(tokens) == 1:
                found[tokens[0]] = tag
        return found


def load(options: LoadOptions, interrupt: Interrupt) -> Session:
    """A session, with a progress line while the model loads."""
    with ui.progress(f"loading {options.model.name}", lambda: (Loading.share, "")):
        return Session(options, interrupt)
