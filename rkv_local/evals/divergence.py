"""How far the next-token distributions under a budget are from the full cache's, teacher-forced over a text.

Both read the same text in steps of a few tokens, side by side. With a step that divides budget + buffer and
buffer, passes come at the same positions as token by token; a step's own tokens see what was there before
the next pass, as they would one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from rkv_local.budget import KVBudget

from .model import Context, Setting, Tokens
from .results import Config
from .runner import Runner, describe
from .summary import BUCKET
from .texts import Source

__all__ = ["BUCKET", "Distance", "Texts", "distance", "measure"]

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Texts:
    """n parts of `tokens` tokens each, from the beginning of a source; step: tokens in one decode."""

    source: Source
    tokens: int = 4096
    n: int = 4
    step: int = 16

    def name(self) -> dict[str, Any]:
        """The task's name in results."""
        return {"task": "kl", **self.source.as_name(), "tokens": self.tokens, "step": self.step}


@dataclass
class Distance:
    """Sums over positions: KL divergence and negative log-likelihoods in nats, equal likeliest tokens."""

    n: int = 0
    kl: float = 0.0
    top1: int = 0
    nll: float = 0.0
    nll_full: float = 0.0

    def add(self, other: Distance) -> None:
        """Take more positions in."""
        for name in ("n", "kl", "top1", "nll", "nll_full"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def fields(self) -> dict[str, Any]:
        """Means, and top1 as a share, for a result."""
        mean = {name: round(getattr(self, name) / self.n, 5) for name in ("kl", "top1", "nll", "nll_full")}
        return {"n": self.n, **mean}


def log_softmax(logits: Floats) -> Floats:
    """Row by row, float32 [n, n_vocab]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def distance(full: Floats, other: Floats, following: Tokens) -> Distance:
    """Of log-probabilities [n, n_vocab]: KL(full || other), summed; following: the tokens that came, [n]."""
    rows = np.arange(len(following))
    kl = (np.exp(full) * (full - other)).sum(axis=1)
    return Distance(
        n=len(following),
        kl=float(np.maximum(kl, 0).sum(dtype=np.float64)),
        top1=int((full.argmax(axis=1) == other.argmax(axis=1)).sum()),
        nll=float(-other[rows, following].sum(dtype=np.float64)),
        nll_full=float(-full[rows, following].sum(dtype=np.float64)),
    )


def measure(runner: Runner, texts: Texts, budgets: Sequence[KVBudget | None]) -> list[Config]:
    """Read each text under all budgets at once and store what is missing; the configurations.

    The reference is the full cache with f16 keys and values. Results are of BUCKET positions each, with id
    text@position.

    Raises:
        ValueError: the source is too short, or a step does not fit a budget's batch. RKVError, RuntimeError:
            the engine refuses.
    """
    if texts.step < 1 or BUCKET % texts.step:
        raise ValueError(f"step is {texts.step}, must divide {BUCKET}")
    tokens = runner.model.tokenize(texts.source.text)
    if len(tokens) < texts.n * texts.tokens:
        raise ValueError(
            f"{texts.source.name} has {len(tokens):,} tokens, {texts.n} x {texts.tokens:,} are needed"
        )
    for kv in budgets:
        if kv and texts.step > kv.n_batch:
            raise ValueError(f"a step of {texts.step} tokens is more than the budget's batch, {kv.n_batch}")
    configs = [replace(runner.config(texts.name(), kv), max_tokens=0, temp=0.0, seed=0) for kv in budgets]
    ids = [f"{t}@{start}" for t in range(texts.n) for start in range(0, texts.tokens, BUCKET)]
    wanted = [
        (config, kv)
        for config, kv in zip(configs, budgets, strict=True)
        if not all(id in runner.store.done(config) for id in ids)
    ]
    progress = runner.progress
    progress.label = ", ".join(describe(config) for config, _ in wanted[:3]) + (" ..." if wanted[3:] else "")
    progress.total, progress.done, progress.batcher = texts.n * texts.tokens, 0, None
    if not wanted:
        return configs
    with contextlib.ExitStack() as stack:
        plain = Setting(
            n_ctx=texts.tokens,
            flash_attn=runner.setting.flash_attn,
            threads=runner.setting.threads,
            kv_offload=runner.setting.kv_offload,
            n_outputs=texts.step,
        )
        full = stack.enter_context(Context(runner.model, plain))
        others = [stack.enter_context(runner.context(c, kv, texts.tokens, 1, texts.step)) for c, kv in wanted]
        for t in range(texts.n):
            part = tokens[t * texts.tokens : (t + 1) * texts.tokens]
            if all(id in runner.store.done(c) for c, _ in wanted for id in ids if id.startswith(f"{t}@")):
                progress.done += len(part)
                continue
            for context in (full, *others):
                context.clear(0)
            if not _read(runner, t, part, texts.step, full, others, [c for c, _ in wanted]):
                break
    return configs


def _read(
    runner: Runner,
    text: int,
    part: Tokens,
    step: int,
    full: Context,
    others: Sequence[Context],
    configs: Sequence[Config],
) -> bool:
    """One text; False where it was stopped."""
    sums = [Distance() for _ in others]
    bucket = 0
    for start in range(0, len(part) - 1, step):
        if runner.stop():
            return False
        fed, following = part[start : start + step], part[start + 1 : start + step + 1]
        full.feed(0, fed, start, outputs=True)
        truth = log_softmax(full.logits(len(fed))[: len(following)])
        for context, total in zip(others, sums, strict=True):
            context.feed(0, fed, start, outputs=True)
            total.add(distance(truth, log_softmax(context.logits(len(fed))[: len(following)]), following))
        runner.progress.done += len(fed)
        if start + step == bucket + BUCKET or start + step >= len(part) - 1:
            for config, total in zip(configs, sums, strict=True):
                id = f"{text}@{bucket}"
                if id not in runner.store.done(config):
                    runner.store.add(config, id, **total.fields())
            sums, bucket = [Distance() for _ in others], bucket + BUCKET
    return True
