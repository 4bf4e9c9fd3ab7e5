"""Which of a model's layers can do with few cells: each is tried by itself, while all others keep everything.

The model answers questions with a full cache. It then reads these traces again, once for each layer with few
cells in that one alone. How far the next token's distribution moves is the layer's damage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from . import _native
from .budget import KVBudget
from .calibration import Calibration, Curve
from .evals.decode import Batcher, Request
from .evals.model import Context, Model, Setting, Tokens
from .evals.runner import Stopped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["QUESTIONS", "SIZES", "Stopped", "Trace", "calibrate", "measure", "sizes_for", "traces_of"]

Floats = npt.NDArray[np.float32]

SIZES = (32, 48, 72, 108, 162, 243, 364, 547, 820, 1230, 1845, 2768)  # cells that are tried
SMALL = 0.001  # a layer with less than this share of the largest damage is not tried with more cells
_TOP = 256  # likeliest tokens that are told apart; the others are taken together

QUESTIONS = (
    "A farm has 17 hens, 5 goats and twice as many sheep as goats. Each hen lays 4 eggs a week, and every"
    " sheep gives 3 kg of wool a year. A third of the sheep are sold in March. How many legs, eggs in six"
    " weeks and kilograms of wool are there afterwards? Work it out step by step, then check each step "
    "again.",
    "Multiply 4,387 by 926 by hand, digit by digit, and verify the result in a second way.",
    "Five friends sit in a row. Ana is not beside Ben. Cleo sits at one end. Dan is two seats from Ana, "
    "and Eli is left of Ben. Find every possible order, and explain why no other one works.",
    "A train leaves at 9:40 at 72 km/h, another one follows at 10:25 at 96 km/h on the same line. When "
    "and where does the second catch up, and how does the answer change if it stops for 6 minutes "
    "halfway?",
    "Prove that the sum of the first n odd numbers is a square, and test it for n up to 8.",
    "A shop takes 15 % off, then adds 19 % tax, then gives back 5 euros. Which price before all this "
    "leads to 96.15 euros at the till? Try two ways, and say which of them is easier to check.",
    "Convert 2,745 to binary, to base 7 and to hexadecimal, with every division written down, and convert"
    " each back.",
    "There are 12 coins, one of which has another weight. Describe how three weighings on a balance find "
    "it, and whether it is lighter or heavier, for every case.",
)


class Trace(NamedTuple):
    """What is read: a prompt of n_prompt tokens and its answer."""

    tokens: Tokens
    n_prompt: int


def calibrate(
    model: Model,
    kv: KVBudget,
    prompts: Sequence[Sequence[int] | Tokens],
    n_tokens: int = 4096,
    *,
    length: int = 2048,
    temp: float = 0.8,
    seed: int = 0,
    setting: Setting | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Calibration:
    """Let a model answer prompts, and measure the damage that few cells do to each of its layers.

    Args:
        kv: the policy that chooses the cells, and its parameters; budget and layer_budgets are not used.
        prompts: tokens, with the chat template. They are answered in turn.
        n_tokens: of all traces; the last one is cut there.
        length: most tokens of a trace.
        temp, seed: of the answers.
        setting: threads, cache types and so on.
        progress: called with the tokens generated and read, and about how many there will be.
        stop: asked after every decode.

    Raises:
        ValueError: no prompts, or one that is too long; answers that are too short; a policy that chooses
            nothing. RKVError, RuntimeError: the engine refuses. Stopped: `stop` was true.
    """
    sizes_for(kv, length)
    told = progress or (lambda done, about: None)
    traces = traces_of(
        model,
        prompts,
        n_tokens,
        length=length,
        temp=temp,
        seed=seed,
        setting=setting,
        progress=lambda done: told(done, n_tokens * (2 + model.n_layer)),
        stop=stop,
    )
    n = sum(len(trace.tokens) for trace in traces)
    sizes, damage = measure(model, kv, traces, setting, lambda done, about: told(n + done, n + about), stop)
    return Calibration.of(model.path, kv, sizes, damage, n)


def sizes_for(kv: KVBudget, longest: int) -> list[int]:
    """Those of SIZES that can be tried on traces of which the longest has so many tokens.

    Raises:
        ValueError: none can, or the policy evicts nothing by itself.
    """
    if kv.policy in ("none", "given"):
        raise ValueError(f"policy is {kv.policy}, must be one that chooses cells by itself")
    possible = [size for size in SIZES if size >= kv.least_budget]
    if not possible:
        raise ValueError(f"window and pin are {kv.least_budget - 1} tokens, must be less than {SIZES[-1]:,}")
    least = possible[0] + 2 * kv.buffer
    if longest < least:
        raise ValueError(f"length is {longest:,}, must be at least {least:,} with buffer {kv.buffer:,}")
    return [size for size in possible if size + 2 * kv.buffer <= longest]


def traces_of(
    model: Model,
    prompts: Sequence[Sequence[int] | Tokens],
    n_tokens: int,
    *,
    length: int,
    temp: float = 0.8,
    seed: int = 0,
    setting: Setting | None = None,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Trace]:
    """Answers with a full cache, one after the other, until there are n_tokens; temp 0: each prompt once.

    Args and Raises: as for calibrate(). progress: called with the tokens generated.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("there must be prompts, none of them empty")
    longest = max(map(len, prompts))
    if longest >= length:
        raise ValueError(f"length is {length:,}, must be more than a prompt's {longest:,} tokens")
    traces: list[Trace] = []
    left = n_tokens

    def requests() -> Iterator[Request]:
        for i in itertools.count():
            if left <= 0 or (temp == 0 and i >= len(prompts)):
                return
            yield Request(str(i), prompts[i % len(prompts)])

    def look() -> bool:
        if stop():
            raise Stopped
        if progress is not None:
            progress(min(batcher.n_generated, n_tokens))
        return False

    with Context(model, replace(setting or Setting(), kv=None, n_ctx=length, n_seq=1)) as context:
        batcher = Batcher(context, length, temp=temp, seed=seed, stop=look)
        for done in batcher.run(requests()):
            prompt = np.asarray(prompts[int(done.id) % len(prompts)], np.int32)
            tokens = np.concatenate([prompt, done.tokens])[: min(length, left)]
            traces.append(Trace(tokens, len(prompt)))
            left -= len(tokens)
    return traces


def measure(
    model: Model,
    kv: KVBudget,
    traces: Sequence[Trace],
    setting: Setting | None = None,
    progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[list[int], list[Curve | None]]:
    """The damage of each layer under several sizes.

    Args:
        kv, setting, stop: as for calibrate(). progress: called with the tokens read, and about how many.

    Returns:
        (sizes, damage) as in Calibration. The damage is the mean over all positions behind the first
        compaction with the smallest size.

    Raises:
        ValueError: the traces are too short, or no layer has cells under the budget. RKVError, RuntimeError:
            the engine refuses. Stopped: `stop` was true.
    """
    reading = _Reading(model, kv, traces, setting or Setting(), progress, stop)
    sizes, layers = reading.sizes, reading.layers
    curves: dict[int, list[float | None]] = {i: [reading.damage(i, sizes[0])] for i in layers}
    enough = SMALL * max(curve[0] or 0.0 for curve in curves.values())
    suffering = [i for i in layers if (curves[i][0] or 0.0) >= enough > 0]
    reading.expect(len(suffering) if len(sizes) > 1 else 0)
    for n, i in enumerate(suffering, 1):
        for size in sizes[1:]:
            nats = reading.damage(i, size)
            curves[i].append(nats)
            if nats < enough:
                break
            reading.expect(len(suffering) - n + (size != sizes[-1]))
    found: list[Curve | None] = [None] * model.n_layer
    for i, curve in curves.items():
        found[i] = (*curve, *[None] * (len(sizes) - len(curve)))
    return sizes, found


class _Reading:
    """The traces, and what the full cache says about the next tokens: the likeliest ones of each position."""

    def __init__(
        self,
        model: Model,
        kv: KVBudget,
        traces: Sequence[Trace],
        setting: Setting,
        progress: Callable[[int, int], None] | None,
        stop: Callable[[], bool],
    ) -> None:
        self._model, self._kv, self._progress, self._stop = model, kv, progress, stop
        self._longest = max((len(trace.tokens) for trace in traces), default=0)
        try:
            self.sizes = sizes_for(kv, self._longest)
        except ValueError as err:
            raise ValueError(
                f"the answers are too short: {err} (other prompts, or a smaller buffer)"
            ) from None
        self._first = (self.sizes[0] // kv.buffer + 1) * kv.buffer  # the smallest size evicts before it
        self._traces = [trace for trace in traces if len(trace.tokens) > self._first]
        self._n = sum(len(trace.tokens) for trace in self._traces)
        self._done, self._about = 0, self._n * (1 + model.n_layer)
        self._setting = replace(setting, n_ctx=self._longest, n_seq=1, n_outputs=kv.buffer)
        self._full: list[tuple[NDArray[np.int32], Floats]] = []
        with self._context() as context:
            self.layers = tuple(_native.governed_layers(context.raw))
            if not self.layers:
                raise ValueError("no layer of this model has cells under the budget")
            self._about = self._n * (1 + len(self.layers))
            for logits in self._read(context):
                n = min(_TOP, logits.shape[1] - 1)
                top = np.argpartition(-logits, n, axis=1)[:, :n].astype(np.int32)
                self._full.append((top, _coarse(logits, top)))

    def expect(self, passes: int) -> None:
        """At least so many passes over all traces are left."""
        self._about = self._done + self._n * passes

    def damage(self, layer: int, size: int) -> float:
        """Mean KL divergence from the full cache in nats; a lower bound, nearly tight."""
        nats, n = 0.0, 0
        with self._context(layer, size) as context:
            for (top, p), logits in zip(self._full, self._read(context), strict=True):
                kl = (np.exp(p) * (p - _coarse(logits, top))).sum(axis=1, dtype=np.float64)
                nats += float(np.maximum(kl, 0).sum())
                n += len(kl)
        if not math.isfinite(nats):
            raise RuntimeError("the model's logits are not finite")
        return nats / n

    def _context(self, layer: int | None = None, size: int = 0) -> Context:
        """One in which all layers have cells for everything, but for one."""
        budgets = [self._longest] * self._model.n_layer
        if layer is not None:
            budgets[layer] = size
        kv = replace(self._kv, budget=self._longest, layer_budgets=tuple(budgets), batch=self._kv.buffer)
        return Context(self._model, replace(self._setting, kv=kv))

    def _read(self, context: Context) -> Iterator[Floats]:
        """Logits [n, n_vocab] of the positions that count, a buffer's tokens at a time."""
        step = self._kv.buffer
        for tokens, n_prompt in self._traces:
            context.clear(0)
            if context.kv is not None and context.kv.pin == "prompt":
                pin = context.kv.prompt_pin(n_prompt, self._model.n_layer)
                _native.seq_pin(context.raw, pin or 0)
            for start in range(0, len(tokens), step):
                part, counts = tokens[start : start + step], start >= self._first
                context.feed(0, part, start, outputs=counts)
                if counts:
                    yield context.logits(len(part))
                if self._stop():
                    raise Stopped
                self._done += len(part)
                if self._progress is not None:
                    self._progress(self._done, max(self._done, self._about))


def _coarse(logits: Floats, top: NDArray[np.int32]) -> Floats:
    """Log-probabilities of the tokens `top` [n, k], and of all others together: float32 [n, k + 1]."""
    peak = logits.max(axis=1, keepdims=True)
    whole = peak + np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    chosen = np.take_along_axis(logits, top, axis=1) - whole
    rest = np.log(np.maximum(1 - np.exp(chosen).sum(axis=1, keepdims=True), 1e-7))
    return np.concatenate([chosen, rest.astype(np.float32)], axis=1)
