"""Decode speed at logical depths, with a budget and without, in one interleaved run.

Every arm is a context of its own over one model: the full cache, the budget, and the full cache at the
budget's mean depth (budget + buffer / 2), which shows the price of everything that the budget adds. At each
depth the arms take turns, one stretch of n tokens each per repetition, so that a machine that gets slower
slows all of them. A stretch is a whole number of compaction periods. A full cache goes back to its depth
after each stretch; a compacted one cannot, so it continues: repetition i starts at depth + i * n, where its
cells are as full as before.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rkv_local import KVBudget, RKVError, _lib, _native
from rkv_local.devices import resident
from rkv_local.options import WITH_BUDGET
from rkv_local.probe import Setting
from rkv_local.shape import CACHE_TYPES

_lib.prepare()

from llama_cpp import llama_cpp as lib  # noqa: E402

__all__ = ["Plan", "Row", "bench"]

STOCK_BATCH = 512  # llama.cpp's physical batch


@dataclass(frozen=True)
class Plan:
    """What is measured. Depths and n in tokens per sequence; types are ggml numbers.

    kv: None measures the full cache alone. flash_attn: the settings to try.
    """

    model: Path
    kv: KVBudget | None
    depths: tuple[int, ...] = (0, 2048, 6144)
    n: int = 128
    repetitions: int = 5
    flash_attn: tuple[bool, ...] = (True, False)
    parallel: int = 1
    threads: int = 1
    gpu_layers: int = 0
    kv_offload: bool = True
    type_k: int = 1
    type_v: int = 1
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens that a sequence may reach."""
        return max(max(self.depths) + self.n * self.repetitions + 1, self.mean_start + self.n)

    @property
    def cells(self) -> int:
        """Cells of the full caches, all sequences together."""
        return self.longest * self.parallel

    @property
    def mean_depth(self) -> int:
        """Cells in use on average between two compactions, 0 without a budget."""
        return self.kv.budget + self.kv.buffer // 2 if self.kv else 0

    @property
    def mean_start(self) -> int:
        """Where a full cache starts a stretch that has the mean depth in its middle."""
        return max(0, self.mean_depth - self.n // 2)

    def arms(self) -> list[tuple[KVBudget | None, bool, int]]:
        """Budget, flash attention and n_ctx of each context; the last of them are those at the mean depth."""
        first: list[tuple[KVBudget | None, bool, int]] = []
        means: list[tuple[KVBudget | None, bool, int]] = []
        for flash_attn in self.flash_attn:
            first.append((None, flash_attn, max(self.depths) + self.n))
            if self.kv:
                first.append((self.kv, flash_attn, self.longest))
                means.append((None, flash_attn, self.mean_start + self.n))
        return [*first, *means]

    def settings(self) -> list[Setting]:
        """What the contexts are measured as by a memory plan; they are all there at once."""
        types = {number: name for name, (number, _, _) in CACHE_TYPES.items()}
        chunks = [kv.n_batch if kv else STOCK_BATCH for kv, _, _ in self.arms()]
        return [
            Setting(
                kv=kv,
                n_ctx=n_ctx,
                n_batch=min(chunk, n_ctx),
                n_ubatch=max(chunk, self.parallel),
                n_seq_max=self.parallel,
                n_outputs=self.parallel,
                type_k=types[self.type_k],
                type_v=types[self.type_v],
                flash_attn=flash_attn,
                n_gpu_layers=self.gpu_layers,
                offload_kqv=self.kv_offload,
                n_threads=self.threads,
                n_threads_batch=self.threads,
            )
            for (kv, flash_attn, n_ctx), chunk in zip(self.arms(), chunks, strict=True)
        ]

    def whole_periods(self) -> Plan:
        """The same with n rounded up to whole compaction periods."""
        if self.kv is None or self.n % self.kv.buffer == 0:
            return self
        return replace(self, n=(self.n // self.kv.buffer + 1) * self.kv.buffer)


@dataclass
class Row:
    """One arm at one depth; all sequences together. spread: interquartile range, tokens per second.

    tokens and seconds: of one stretch (median). ratio_to_full: median over the repetitions of the speed
    divided by the full cache's at the same depth and flash attention setting in the same repetition.
    memory_bytes: by how much the process grew while this arm was made and used.
    """

    cache: str
    flash_attn: bool
    depth: int
    parallel: int
    cells: int
    kv_bytes: int
    tokens: int
    samples: list[float] = field(default_factory=list)
    compaction_seconds: float = 0.0
    compactions: int = 0
    memory_bytes: int = 0
    ratio_to_full: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range; 0 for a single repetition."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    @property
    def seconds(self) -> float:
        """A stretch at the median speed."""
        return self.tokens / self.tokens_per_second

    @property
    def compaction_share(self) -> float:
        """Compaction seconds of all stretches over their decode seconds."""
        return self.compaction_seconds / sum(self.tokens / s for s in self.samples)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        names = (
            *("cache", "flash_attn", "depth", "parallel", "tokens_per_second", "spread", "kv_bytes", "cells"),
            *(
                "compaction_share",
                "compactions",
                "tokens",
                "seconds",
                "ratio_to_full",
                "memory_bytes",
                "samples",
            ),
        )
        return {name: getattr(self, name) for name in names}


class Arm:
    """A context that is fed and timed. All sequences hold the same tokens."""

    def __init__(
        self, model: Any, plan: Plan, kv: KVBudget | None, flash_attn: bool, n_ctx: int, tokens: Sequence[int]
    ) -> None:
        before = resident()
        self.kv, self.flash_attn, self.parallel, self.tokens = kv, flash_attn, plan.parallel, tokens
        self.name = kv.policy if kv else "full"
        self.chunk = kv.n_batch if kv else STOCK_BATCH
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx * plan.parallel
        params.n_batch = params.n_ubatch = max(self.chunk, plan.parallel)
        params.n_seq_max, params.kv_unified, params.n_outputs_max = plan.parallel, False, plan.parallel
        params.n_threads = params.n_threads_batch = plan.threads
        params.flash_attn_type = (
            lib.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash_attn else lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        params.offload_kqv = plan.kv_offload
        params.type_k, params.type_v, params.no_perf = plan.type_k, plan.type_v, True
        if kv:
            for name, value in WITH_BUDGET.items():
                setattr(params, name, value)
        _native.clear_error()
        self.ctx = _native.init_context(model, params, kv) if kv else lib.llama_init_from_model(model, params)
        if not self.ctx:
            raise RuntimeError(_native.last_error() or "Failed to create llama_context")
        self.memory = lib.llama_get_memory(self.ctx)
        self.batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self.pos = 0
        self.grown = resident() - before
        stats = _native.stats(self.ctx)
        self.cells, self.kv_bytes = int(stats.cells), int(stats.bytes)

    def close(self) -> None:
        """Free the context."""
        lib.llama_batch_free(self.batch)
        lib.llama_free(self.ctx)

    def at(self, depth: int) -> None:
        """Bring all sequences to `depth`: cut, or feed what is missing; start anew where neither is exact."""
        before = resident()
        if self.pos > depth and not self._cut(depth):
            lib.llama_memory_clear(self.memory, True)
            self.pos = 0
        if self.pos < depth:
            for seq in range(1, self.parallel):
                lib.llama_memory_seq_rm(self.memory, seq, -1, -1)
            while self.pos < depth:
                n = min(self.chunk, depth - self.pos)
                self._fill([(self.tokens[self.pos + i], self.pos + i, 0, i == n - 1) for i in range(n)])
                self._decode()
                self.pos += n
            for seq in range(1, self.parallel):
                lib.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)
        self.grown += resident() - before

    def _cut(self, depth: int) -> bool:
        if depth == 0:
            return False
        if not all(lib.llama_memory_seq_rm(self.memory, seq, depth, -1) for seq in range(self.parallel)):
            return False
        self.pos = depth
        return True

    def stretch(self, n: int) -> float:
        """Decode n tokens per sequence, one at a time; seconds."""
        before, batch = resident(), self.batch
        self._fill([(0, 0, seq, True) for seq in range(self.parallel)])
        start = time.perf_counter()
        for _ in range(n):
            token, pos = self.tokens[self.pos], self.pos
            for i in range(self.parallel):
                batch.token[i] = token
                batch.pos[i] = pos
            self._decode()
            self.pos += 1
        seconds = time.perf_counter() - start
        self.grown += resident() - before
        return seconds

    def _fill(self, entries: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, pos, seq, output) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, 1, output
            batch.seq_id[i][0] = seq

    def _decode(self) -> None:
        code = lib.llama_decode(self.ctx, self.batch)
        if code != 0:
            reason = _native.last_error() if self.kv else ""
            raise RKVError(reason or f"llama_decode returned {code}")
        lib.llama_synchronize(self.ctx)

    def compactions(self) -> tuple[int, float]:
        """(count, seconds) so far."""
        stats = _native.stats(self.ctx)
        return int(stats.compactions), stats.t_compaction_us / 1e6


def bench(plan: Plan, report: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Measure and return a row per arm and depth, in the order of depths.

    report: told what is going on.

    Raises:
        RuntimeError: the model cannot be loaded, or a context cannot be made (RKVError: by the engine).
    """
    plan = replace(plan, kv=plan.kv and plan.kv.for_model(plan.model))
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0x7FFFFFFF if plan.gpu_layers < 0 else plan.gpu_layers
    report("loading the model")
    model = lib.llama_model_load_from_file(os.fsencode(plan.model), params)
    if not model:
        raise RuntimeError(f"Failed to load model from file: {plan.model}")
    arms: list[Arm] = []
    try:
        deepest = max(plan.depths)
        tokens = trace(model, plan.longest, plan.seed)
        warm_up(model, plan, tokens)
        for kv, flash_attn, n_ctx in plan.arms():
            arms.append(Arm(model, plan, kv, flash_attn, n_ctx, tokens))
        n_means = len(plan.flash_attn) if plan.kv else 0
        depth_arms, means, rows = arms[: len(arms) - n_means], arms[len(arms) - n_means :], []
        for depth in sorted(set(plan.depths)):
            # the mean depth says something about depths that lie in the steady state; once is enough
            extra = means if depth == deepest and all(steady(arm, depth) for arm in depth_arms) else []
            rows += at_depth(plan, depth, depth_arms, extra, report)
        return rows
    finally:
        for arm in arms:
            arm.close()
        lib.llama_model_free(model)


def at_depth(
    plan: Plan, depth: int, arms: Sequence[Arm], means: Sequence[Arm], report: Callable[[str], None]
) -> list[Row]:
    """All repetitions of all arms at one depth."""
    goals = [(arm, depth, depth) for arm in arms] + [(arm, plan.mean_depth, plan.mean_start) for arm in means]
    rows = [
        Row(arm.name, arm.flash_attn, shown, plan.parallel, arm.cells, arm.kv_bytes, plan.n * plan.parallel)
        for arm, shown, _ in goals
    ]
    for arm, _, start in goals:
        report(f"reading to depth {start} ({label(arm)})")
        arm.at(start)
    for repetition in range(plan.repetitions):
        order = list(range(len(goals)))
        order = order[repetition % len(order) :] + order[: repetition % len(order)]
        for i in order:
            arm, shown, start = goals[i]
            if not (arm.kv and steady(arm, start)):
                arm.at(start)
            report(f"depth {shown}, repetition {repetition + 1}/{plan.repetitions} ({label(arm)})")
            count, spent = arm.compactions()
            seconds = arm.stretch(plan.n)
            rows[i].samples.append(rows[i].tokens / seconds)
            now = arm.compactions()
            rows[i].compactions += now[0] - count
            rows[i].compaction_seconds += now[1] - spent
            rows[i].memory_bytes = max(0, arm.grown)
    for row in rows[: len(arms)]:
        full = next(r for r in rows if r.cache == "full" and r.flash_attn == row.flash_attn)
        row.ratio_to_full = paired_ratio(row, full)
    return rows


def steady(arm: Arm, depth: int) -> bool:
    """True unless there is a budget that a sequence of that depth has not reached yet."""
    return arm.kv is None or depth >= arm.cells


def paired_ratio(row: Row, other: Row) -> float:
    """Median over the repetitions of the quotient of speeds."""
    return statistics.median(a / b for a, b in zip(row.samples, other.samples, strict=True))


def label(arm: Arm) -> str:
    """For progress."""
    return f"{arm.name}, flash attention {'on' if arm.flash_attn else 'off'}"


def warm_up(model: Any, plan: Plan, tokens: Sequence[int]) -> None:
    """Touch all weights once: they count for no arm's memory and slow down no first stretch."""
    arm = Arm(model, replace(plan, parallel=1), None, plan.flash_attn[0], 64, tokens)
    arm.at(8)
    arm.stretch(8)
    arm.close()


def trace(model: Any, length: int, seed: int) -> list[int]:
    """Tokens like a reasoning trace's, with numbers drawn by `seed`; noise where there is no vocabulary."""
    rng = random.Random(seed)
    vocab = lib.llama_model_get_vocab(model)
    if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        return [rng.randrange(n_vocab) for _ in range(length)]
    forms = (
        "Step {i}: add {a} and {b}, which makes {c}. ",
        "Wait, is {c} right? {a} plus {b} is {c}, so yes.\n",
        "Let me check the value of x{a} again: it was {b}.\n",
        "So far we know that box {a} holds {b} red balls and {c} blue ones. ",
        "Therefore the answer to part {i} cannot be {a}; it must be {c}.\n\n",
    )
    tokens: list[int] = []
    i = 0
    while len(tokens) < length:
        text = ""
        for _ in range(200):
            i += 1
            a, b = rng.randrange(1, 1000), rng.randrange(1, 1000)
            text += rng.choice(forms).format(i=i, a=a, b=b, c=a + b)
        data = text.encode()
        buffer = (lib.llama_token * len(data))()
        n = lib.llama_tokenize(vocab, data, len(data), buffer, len(buffer), not tokens, False)
        tokens += buffer[:n]
    return tokens[:length]
