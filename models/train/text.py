"""The reasoner's tokenizer and its documents: what a problem and its trace look like as tokens."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # rkv_local, where it is not installed
import traces
from rkv_local.evals.problems import FAMILIES, KINDS, SPLITS, Problem, gym_entry, problem

__all__ = [
    "CHAT_TEMPLATE",
    "FAMILIES",
    "KINDS",
    "Corpus",
    "Problem",
    "problem",
    "prompt_ids",
    "train_tokenizer",
]

# first ids of the vocabulary; the think tags are shown as text, the others are control tokens
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SHOWN = ("<think>", "</think>")
SPECIAL = CONTROL + SHOWN
END, IM_START, IM_END, THINK, THINK_END = range(5)

# words, single digits, punctuation: what llama.cpp calls "qwen2"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

# Only the last user message is read: the model was trained on single questions.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{{- '<|im_start|>user\\n' + asked[-1]['content'] + '<|im_end|>\\n' -}}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)

# Numbers of training problems: 4 bits of the run's seed, 20 of the step, 16 of the document in it. Together
# they stay below SPLITS["dev"].
SEEDS, STEPS, DOCUMENTS = 1 << 4, 1 << 20, 1 << 16

# How often each kind of problem is seen.
MIX = {
    ("chain", "dense"): 0.34,
    ("chain", "sparse"): 0.26,
    ("digits", "dense"): 0.13,
    ("digits", "sparse"): 0.10,
    ("gym", "dense"): 0.10,
    ("gym", "sparse"): 0.07,
}


def train_tokenizer(n_vocab: int, texts: list[str]) -> Any:
    """A byte-level BPE tokenizer (tokenizers.Tokenizer) of n_vocab tokens, special ones first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    return tok


class Corpus:
    """The training documents of one step; every one is another problem, and none is of another split.

    Args:
        tokenizer: from train_tokenizer().
        seed: of the run, below SEEDS.
        n_ctx: longest document, in tokens; longer ones are left out.
        gym: from gym_entries(); None makes entries when needed, with the package reasoning-gym.
        hints: see traces.trace().
        step: below STEPS.

    Raises:
        ValueError: seed or step is out of range.
    """

    def __init__(
        self,
        tokenizer: Any,
        seed: int,
        n_ctx: int,
        gym: dict[str, Any] | None = None,
        hints: bool = True,
        step: int = 0,
    ) -> None:
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seed is {seed}, must be from 0 to {SEEDS - 1}")
        if not 0 <= step < STEPS:
            raise ValueError(f"step is {step}, must be from 0 to {STEPS - 1}")
        self.tok, self.n_ctx, self.gym, self.hints = tokenizer, n_ctx, gym, hints
        self.rng = random.Random(f"corpus {seed} {step}")
        self.number = (seed * STEPS + step) * DOCUMENTS
        self.end = self.number + DOCUMENTS
        if gym:
            traces.LEGS.update(gym["legs"])
        else:
            traces.learn_legs()

    def problem(self) -> Problem:
        """The next problem of the mix. Raises ValueError when the step has had DOCUMENTS of them."""
        if self.number == self.end:
            raise ValueError(f"a step has at most {DOCUMENTS} documents: give it fewer tokens")
        family, kind = self.rng.choices(list(MIX), weights=list(MIX.values()))[0]
        number = self.number
        self.number += 1
        entry = None
        if family == "gym" and self.gym is not None:
            entry = self.rng.choice(self.gym[kind])
        return problem(family, kind, "train", number, entry)

    def prompt(self, p: Problem) -> list[int]:
        """Token ids up to and with `<think>\\n`."""
        return prompt_ids(self.tok, p.question)

    def document(self, p: Problem, cut: bool = False) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
        """A problem with its trace: tokens [n], and whether each is learned [n].

        cut: a chain ends when its facts are in order, and its end is not learned.
        """
        segments = traces.trace(p, self.rng, hints=self.hints)
        if cut and p.family == "chain":
            segments = segments[: next(i for i, s in enumerate(segments) if s[0].startswith(traces.ORDERED))]
        text = "".join(s for s, _ in segments)
        learned = np.repeat([ok for _, ok in segments], [len(s) for s, _ in segments])
        prompt = self.prompt(p)
        enc = self.tok.encode(text, add_special_tokens=False)
        starts = np.fromiter((a for a, _ in enc.offsets), np.int64, len(enc.ids))
        ids = np.array([*prompt, *enc.ids, IM_END], np.int16)
        mask = np.zeros(len(ids), np.bool_)
        mask[len(prompt) : -1] = learned[starts]
        mask[-1] = not (cut and p.family == "chain")
        return ids, mask

    def documents(
        self, longest: int | None = None, cut: float = 0.0
    ) -> Iterator[tuple[NDArray[np.int16], NDArray[np.bool_]]]:
        """Documents of at most `longest` tokens (None: n_ctx); see document() for what a share `cut` is."""
        limit = self.n_ctx if longest is None else longest
        while True:
            ids, mask = self.document(self.problem(), self.rng.random() < cut)
            if len(ids) <= limit:
                yield ids, mask


def prompt_ids(tok: Any, question: str) -> list[int]:
    """What the chat template makes of a question."""

    def plain(text: str) -> list[int]:
        ids: list[int] = tok.encode(text, add_special_tokens=False).ids
        return ids

    return [
        IM_START,
        *plain(f"user\n{question}"),
        IM_END,
        *plain("\n"),
        IM_START,
        *plain("assistant\n"),
        THINK,
        *plain("\n"),
    ]


def sample_texts(n: int, gym: dict[str, Any] | None) -> list[str]:
    """Questions and traces of n training problems, to train the tokenizer on."""
    corpus = Corpus(None, 0, 1 << 20, gym)
    texts = []
    for _ in range(n):
        p = corpus.problem()
        texts.append(f"user\n{p.question}")
        texts.append("".join(s for s, _ in traces.trace(p, corpus.rng)))
    texts += ["assistant\n", "\n"] * (n // 10)
    return texts


def gym_entries(n: int) -> dict[str, Any]:
    """n entries of each kind for training, and the table of legs: for a machine without reasoning-gym."""
    traces.learn_legs()
    made: dict[str, Any] = {k: [gym_entry(k, SPLITS["train"] + i) for i in range(n)] for k in KINDS}
    return {**made, "legs": dict(traces.LEGS)}
