"""How the cells should be shared out over a model's layers: measured while it reasons with a full cache.

Evictions are simulated beside it, with the model's own keys and queries: at each one the scores of all layers
and heads are ranked together, and each layer gets as many cells as it won.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _native
from .budget import KVBudget
from .calibration import Calibration, share_out

if TYPE_CHECKING:
    from .engine import Llama

__all__ = ["QUESTIONS", "RANKINGS", "calibrate", "full_cache", "share_of_wins"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]

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


RANKINGS = ("latest", "rkv", "snapkv")  # policies whose scores come from keys and the window's queries alone


def _plain(kv: KVBudget) -> KVBudget:
    """A policy in RANKINGS with what decides its scores, and nothing else of a budget."""
    if kv.policy not in RANKINGS:
        raise ValueError(f"policy is {kv.policy}, must be one of {', '.join(RANKINGS)} to compare layers by")
    if kv.pin == "prompt":
        raise ValueError("pin is 'prompt', must be a number to calibrate with")
    names = ("budget", "buffer", "window", "policy", "lam", "pin", "pool", "threshold", "n_sim", "reference")
    return KVBudget(**{name: getattr(kv, name) for name in names})


def full_cache(kv: KVBudget, length: int) -> KVBudget:
    """The budget to make a Llama with, which calibrate() then watches: nothing of `length` tokens is evicted.

    Raises:
        ValueError: they are too few for an eviction with `kv`, or its policy is none of RANKINGS.
    """
    if length < kv.budget + 2 * kv.buffer:
        raise ValueError(
            f"length is {length}, must be at least {kv.budget + 2 * kv.buffer} with budget {kv.budget} and "
            f"buffer {kv.buffer}"
        )
    return replace(_plain(kv), budget=length, batch=kv.buffer)


def calibrate(
    llama: Llama,
    kv: KVBudget,
    prompts: Sequence[Sequence[int]],
    n_tokens: int = 4096,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **sampling: Any,
) -> Calibration:
    """Let a model answer prompts, and measure the share of the cells that each layer would win.

    Args:
        llama: made with `kv=full_cache(kv, length)`; its cache is emptied. A trace has `length` tokens: where
            the model ends an answer, the next prompt follows it.
        kv: a policy of RANKINGS and the sizes to measure for; layer_budgets are not used.
        prompts: tokens, with the chat template. They are used in turn, each trace starting at another one.
        n_tokens: tokens in all, rounded to whole traces.
        seed: of the first answer; each other one has the next.
        progress: called with the tokens done and in all, after each decode.
        **sampling: temp, top_k, ... as for Llama.generate.

    Raises:
        ValueError: a Llama with another budget, or no prompts. RKVError: the engine's reason.
    """
    length = llama.kv.budget if llama.kv is not None else 0
    if llama.kv != full_cache(kv, max(length, kv.budget + 2 * kv.buffer)):
        raise ValueError("the Llama must be made with kv=full_cache(kv, length)")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("there must be prompts, none of them empty")
    low = _native._low()
    vocab = low.llama_model_get_vocab(llama.model)
    simulation = _Simulation(llama, kv)
    traces, n_layer = max(1, round(n_tokens / length)), low.llama_model_n_layer(llama.model)
    done = 0

    def decoded(past: int) -> None:
        simulation.look()
        if progress is not None:
            progress(done + llama.n_tokens, traces * length)

    llama.on_decode = decoded
    try:
        for trace in range(traces):
            llama.forget()
            simulation.start()
            tokens: list[int] = []
            turn = trace * len(prompts) // traces
            while len(tokens) < length:
                tokens = [*tokens, *prompts[turn % len(prompts)]][:length]
                turn += 1
                llama.set_seed(seed)
                seed += 1
                stream = llama.generate(tokens, **sampling)
                for token in stream:
                    if len(tokens) >= length:
                        break
                    tokens.append(token)
                    if low.llama_vocab_is_eog(vocab, token):
                        break
                stream.close()
            simulation.end()
            done += length
    finally:
        llama.on_decode = None
    shares: list[float | None] = [None] * n_layer
    for layer, share in zip(simulation.layers, np.mean(simulation.shares, axis=0), strict=True):
        shares[layer] = float(share)
    return Calibration.of(llama.model_path, _plain(kv), shares, traces * length, len(simulation.shares))


def share_of_wins(scores: Sequence[Floats], slots: int) -> Floats:
    """Rank the scores of all layers and heads together: which share of the cells does each layer win?

    Args:
        scores: for each layer float32 [n_head_kv, n], of comparable size; n may differ.
        slots: how many win, over all layers and heads.

    Returns:
        float64 [n_layer] with sum 1: the layer's winners per head, which are cells, over those of all layers.
    """
    everyone = np.concatenate([score.ravel() for score in scores])
    winners = (
        np.argpartition(-everyone, slots - 1)[:slots] if slots < len(everyone) else np.arange(len(everyone))
    )
    ends = np.cumsum([score.size for score in scores])
    wins = np.bincount(np.searchsorted(ends, winners, side="right"), minlength=len(scores))
    cells = wins / np.array([len(score) for score in scores])
    shares: Floats = cells / cells.sum()
    return shares


def comparable(policy: str, score: Floats) -> Floats:
    """Scores [n_head_kv, n] on one scale: those of `latest` as they are, others from 0 to 1 in each head."""
    if policy == "latest":
        return score
    low, high = score.min(axis=1, keepdims=True), score.max(axis=1, keepdims=True)
    return (score - low) / np.maximum(high - low, np.finfo(np.float32).tiny)


class _Simulation:
    """Evictions with budgets that are shared out anew at each, beside a cache that keeps everything."""

    def __init__(self, llama: Llama, kv: KVBudget) -> None:
        self._llama, self._kv, self._pin = llama, _plain(kv), int(kv.pin)
        self.layers = _native.governed_layers(llama.ctx)
        self.shares: list[Floats] = []  # of each compaction that counts
        self.start()

    def start(self) -> None:
        """A new trace: nothing has been evicted."""
        self._seen = 0
        self._trace: list[Floats] = []
        self._kept = {i: np.empty((0, layer.n_head_kv), np.int32) for i, layer in self.layers.items()}
        self._aux = {i: self._no_aux(0, layer.n_head_kv) for i, layer in self.layers.items()}

    def end(self) -> None:
        """Count the second half of the trace's compactions; in the first the shares still settle."""
        self.shares += self._trace[len(self._trace) // 2 :]

    def look(self) -> None:
        """Evict, where the cache would be full."""
        room = self._kv.buffer + (self._kv.budget if self._seen == 0 else 0)
        n = self._llama.n_tokens
        if n - self._seen >= room:
            self._compact(n)

    def _compact(self, n: int) -> None:
        kv, first, last = self._kv, self._pin, -self._kv.window
        cells, scores = {}, {}
        for i, layer in self.layers.items():
            new = np.repeat(np.arange(self._seen, n, dtype=np.int32)[:, None], layer.n_head_kv, axis=1)
            cells[i] = np.concatenate([self._kept[i], new])
            self._aux[i] = np.concatenate([self._aux[i], self._no_aux(len(new), layer.n_head_kv)], axis=1)
            scores[i] = comparable(kv.policy, self._score(i, cells[i])[:, first:last])
        heads = sum(layer.n_head_kv for layer in self.layers.values())
        shares = share_of_wins(list(scores.values()), heads * (kv.budget - first + last))
        budgets = share_out(shares.tolist(), kv.budget, kv.least_budget)
        for i, budget in zip(self.layers, budgets, strict=True):
            keep = min(budget - first + last, scores[i].shape[1])
            best = np.argsort(-scores[i], axis=1, kind="stable")[:, :keep].T + first
            m = len(cells[i])
            always = [*range(first), *range(m + last, m)]
            rows = np.sort(np.concatenate([best, np.tile(np.array(always)[:, None], best.shape[1])]), axis=0)
            self._kept[i] = np.take_along_axis(cells[i], rows, axis=0)
            self._aux[i] = np.take_along_axis(self._aux[i], rows[None], axis=1)
        self._seen = n
        self._trace.append(shares)

    def _score(self, i: int, cells: Ints) -> Floats:
        """The policy's scores of a layer's cells: float32 [n_head_kv, n]. cells: [n, n_head_kv] positions."""
        ctx, layer, kv = self._llama.ctx, self.layers[i], self._kv
        q = _native.queries(ctx, i)

        def select(kv: KVBudget, get: Callable[[Any, int, int], Floats], aux: Floats | None) -> Floats:
            k = np.stack([get(ctx, i, h)[cells[:, h]] for h in range(layer.n_head_kv)], axis=1)
            return _native.select(
                kv,
                k,
                q,
                pos=cells,
                aux=aux,
                n_old=len(self._kept[i]),
                scale=layer.scale,
                softcap=layer.softcap,
                n_threads=self._llama.n_threads,
            )[1]

        if kv.policy != "latest":
            return select(kv, _native.keys, None)
        # Importance is judged on the keys as cached, similarity on those without their rotation.
        aux = np.ascontiguousarray(self._aux[i])
        importance = select(replace(kv, policy="snapkv"), _native.keys, None)
        peak = np.max(importance[:, : -kv.window], axis=1, keepdims=True, initial=np.finfo(np.float32).tiny)
        similarity = select(replace(kv, lam=0.0), _native.keys_unrotated, aux)
        self._aux[i] = aux
        return kv.lam * importance / peak + (1 - kv.lam) * similarity

    def _no_aux(self, n: int, n_head_kv: int) -> Floats:
        return np.full((self._kv.n_aux, n, n_head_kv), -1, np.float32)
