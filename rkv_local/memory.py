"""A memory budget in bytes: what is loaded with, so that weights, cache and compute buffers fit.

Nothing is estimated: each setting that is considered is measured (probe.py). What has to give way does so in
an order of its own, see `Planner.cheaper`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

from ._native import max_sequences
from .devices import driver_used, list_devices, main_memory, resident, return_large_blocks
from .errors import RKVError
from .memory_plan import DevicePlan, Plan, cache_name, difference, differences
from .probe import MAIN, Measured, Part, Probe, Setting
from .shape import ModelShape
from .sizes import GIB, parse_size, show

__all__ = ["DevicePlan", "Plan", "Planner", "plan"]

MARGIN, MARGIN_SHARE = GIB, 10  # auto leaves a GiB of each device, or a tenth of a small one
RESERVE = (
    50  # a 50th of the limit stays free: code pages, stacks, what libraries take when they first compute
)
LEAST_BATCH, LEAST_BUFFER, LEAST_BUDGET, LEAST_CTX = 32, 128, 256, 1024  # what is given up goes down to these
FREE = frozenset(
    {"n_gpu_layers", "n_batch", "kv_buffer", "cache_type", "kv_budget", "n_ctx", "use_mmap", "flash_attn"}
)


def plan(model_path: str | os.PathLike[str], memory: str | int = "auto", **settings: Any) -> Plan:
    """What to load a model with, so that it takes no more than `memory`. No weight is read.

    The limit holds for the GPUs together where layers are on one, else for this process's resident memory.

    Args:
        model_path: a GGUF file.
        memory: "6GiB", bytes, or "auto": what is free now on the device, less 1 GiB or a tenth of it.
        **settings: Llama's parameters that are decided already and are kept: kv, n_ctx, n_batch, n_ubatch,
            n_seq_max ("auto": as many as fit), type_k, type_v (names), flash_attn, n_gpu_layers, offload_kqv,
            use_mmap, swa_full, n_threads, n_threads_batch, n_outputs. What is not given starts at Llama's
            default and may give way.

    Returns:
        The plan; `fits` is False where nothing fits, and `reasons` then says what is missing.

    Raises:
        ValueError: a bad size, parameter or model file. RKVError: the engine refuses the model or the budget.
        TypeError: no such setting.
    """
    many = settings.get("n_seq_max") == "auto"
    wanted = {name: value for name, value in settings.items() if not (name == "n_seq_max" and many)}
    try:
        setting = Setting(**wanted)
    except TypeError:
        known = {f.name for f in fields(Setting)}
        unknown = next(name for name in settings if name not in known)
        raise TypeError(f"plan() got an unexpected parameter {unknown!r}") from None
    free = set(FREE)
    for name, decides in (
        ("kv", "kv_budget"),
        ("kv", "kv_buffer"),
        ("type_k", "cache_type"),
        ("type_v", "cache_type"),
    ):
        if name in settings:
            free.discard(decides)
    free -= {name for name, value in settings.items() if value is not None or name == "flash_attn"}
    with Planner(model_path, memory) as planner:
        return planner.search(setting, frozenset(free), many)


class Planner:
    """Plans for one model file and one limit."""

    def __init__(self, model_path: str | os.PathLike[str], memory: str | int = "auto") -> None:
        self.explicit = parse_size(memory)
        return_large_blocks()
        self.shape = ModelShape.of(os.fspath(model_path))
        self.probe = Probe(model_path)
        gpus = [d for d in list_devices() if d.is_gpu and d.memory_total > 0]
        discrete = [d for d in gpus if d.type == "GPU"]  # llama.cpp leaves integrated ones aside then
        self.gpus = {d.name: d for d in discrete or gpus}
        available, self.main_total = main_memory()
        self.main_available = available + resident()
        self.main_limit = max(0, self.main_available - _margin(self.main_total))
        self.for_gpus = False  # the limit is the GPUs' though no layer may fit there
        self._driver: int | None = None

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.probe.close()

    @property
    def total(self) -> int:
        """Memory of the machine where the limit applies: its GPUs', or else its main memory."""
        return sum(d.memory_total for d in self.gpus.values()) if self.gpus else self.main_total

    @property
    def available(self) -> int:
        """What of it is free now, with what this process has already."""
        return sum(d.memory_free for d in self.gpus.values()) if self.gpus else self.main_available

    # -- one setting ---------------------------------------------------------------------------------

    def evaluate(self, setting: Setting, reasons: tuple[str, ...] = ()) -> Plan:
        """What a setting takes, and whether that fits.

        Raises:
            ValueError, RKVError: as Probe.measure.
        """
        return self._plan(setting, self.probe.measure(setting), reasons)

    def together(self, settings: Sequence[Setting]) -> Plan:
        """What several contexts over one model take at once; shown as the first of them.

        Raises:
            ValueError, RKVError: as Probe.measure.
        """
        found = [self.probe.measure(s) for s in settings]
        parts: dict[str, Part] = {}
        for place in {p for m in found for p in m.parts}:
            here = [m.parts.get(place, Part()) for m in found]
            parts[place] = Part(
                max(p.weights for p in here), sum(p.kv for p in here), sum(p.compute for p in here)
            )
        most = max(m.resident for m in found)
        all_of_them = replace(found[0], parts=parts, resident=most, cells=0, layers=0, others=())
        return self._plan(settings[0], all_of_them, ())

    def _plan(self, setting: Setting, measured: Measured, reasons: tuple[str, ...]) -> Plan:
        on_gpu = bool(self.gpus) and (setting.n_gpu_layers != 0 or self.for_gpus)
        main = self._device(MAIN, measured.parts.get(MAIN, Part()), measured.resident, self.main_limit)
        if on_gpu:
            limited = self._gpus(measured)
            limit = sum(d.limit_bytes for d in limited) if self.explicit is None else self.explicit
            places = (*limited, main)
        else:
            limit = self.main_limit if self.explicit is None else self.explicit
            limited = (replace(main, limit_bytes=limit),)
            places = limited
        total = sum(d.total_bytes for d in limited)
        needs = [(total, limit), *((d.total_bytes, d.limit_bytes) for d in places)]
        lacking = max(0, *(need - (most - most // RESERVE) for need, most in needs))
        layers = self.shape.n_layer + 1
        return Plan(
            fits=lacking == 0,
            weights_bytes=sum(d.weights_bytes for d in limited),
            kv_bytes=sum(d.kv_bytes for d in limited),
            rings_bytes=measured.rings,
            compute_bytes=sum(d.compute_bytes for d in limited),
            other_bytes=sum(d.other_bytes for d in limited),
            total_bytes=total,
            limit_bytes=limit,
            lacking_bytes=lacking,
            n_gpu_layers=min(setting.n_gpu_layers % (1 << 31), layers) if on_gpu else 0,
            n_layer=self.shape.n_layer,
            kv_layers=measured.layers,
            kv_others=measured.others,
            kv_budget=measured.kv.budget if measured.kv else None,
            kv_buffer=measured.kv.buffer if measured.kv else None,
            cells=measured.cells,
            cache_type=cache_name(setting),
            n_seq=measured.n_seq,
            n_ctx=measured.n_ctx,
            n_batch=measured.n_batch,
            n_ubatch=measured.n_ubatch,
            use_mmap=setting.use_mmap,
            devices=places,
            setting=setting,
            reasons=reasons,
        )

    @staticmethod
    def _device(name: str, part: Part, other: int, limit: int) -> DevicePlan:
        return DevicePlan(name, part.weights, part.kv, part.compute, other, limit)

    def _gpus(self, measured: Measured) -> tuple[DevicePlan, ...]:
        """Each GPU with what the driver holds there for this process already, shared out equally."""
        share = self._driver_bytes() // len(self.gpus)
        plans = []
        for name, device in self.gpus.items():
            limit = device.memory_free + share
            if self.explicit is None:
                limit = max(0, limit - _margin(device.memory_total))
            plans.append(self._device(name, measured.parts.get(name, Part()), share, limit))
        return tuple(plans)

    def _driver_bytes(self) -> int:
        if self._driver is None:
            self._driver = driver_used(os.getpid()) if any("CUDA" in name for name in self.gpus) else 0
            if self._driver is None:
                self._driver = _driver_overhead() if self.explicit is not None else 0
        return self._driver

    # -- the search ----------------------------------------------------------------------------------

    def search(
        self, setting: Setting, free: frozenset[str], many: bool = False, explain: bool = True
    ) -> Plan:
        """The first of the settings that fits; many: with as many sequences as fit.

        Where none fits: the setting itself with reasons that say what is missing and what would fit; explain
        False: the one that comes nearest.

        Raises:
            ValueError, RKVError: as Probe.measure, for the setting itself.
        """
        self.for_gpus = setting.n_gpu_layers != 0
        start = plan = self.evaluate(setting)
        if not plan.fits:
            plan = self._first_fit(setting, free) or plan
        if not plan.fits:
            if not explain:
                return self._least(setting, free)
            return replace(start, reasons=self._why_not(start, setting, free))
        if many:
            plan = self._most_sequences(plan)
        return plan

    def _first_fit(self, setting: Setting, free: frozenset[str]) -> Plan | None:
        """The first that fits, or None."""
        for candidate, reasons in self.cheaper(setting, free):
            try:
                found = self.evaluate(candidate, tuple(reasons))
            except (ValueError, RKVError):
                continue  # this model or context cannot have that
            if found.fits:
                return found
        return None

    def cheaper(self, setting: Setting, free: frozenset[str]) -> Iterator[tuple[Setting, list[str]]]:
        """Settings that take less and less, each with what was given up.

        First what costs nothing but time at the start (reading weights instead of mapping them where they are
        repacked), then speed (a smaller prompt batch, fewer layers on the GPU), then precision (a quantised
        cache), and last what is remembered (first cells beside the budget, by a shorter buffer and batch; the
        budget, or the reach of a full cache).
        """
        reasons: list[str] = []
        measured = self.probe.measure(setting)
        if "use_mmap" in free and measured.copies:
            setting = replace(setting, use_mmap=False)
            reasons = [*reasons, "weights are read, not mapped: repacked ones would be there twice"]
            yield setting, reasons
        before = reasons
        for smaller, batch in self._batches(setting, free, measured.n_batch):
            setting, reasons = smaller, [*before, batch]
            yield setting, reasons
        if "n_gpu_layers" in free and self.gpus:
            layers = self._most_layers(setting)
            setting = replace(setting, n_gpu_layers=layers)
            reasons = [*reasons, f"{layers} of {self.shape.n_layer + 1} layers on the GPU"]
            yield setting, reasons
        if "cache_type" in free:
            for smaller in self._quantised(setting, free):
                setting = smaller
                yield setting, [*reasons, f"cache {cache_name(setting)} instead of f16"]
            if setting.type_k != "f16":
                reasons = [*reasons, f"cache {cache_name(setting)} instead of f16"]
        kv = setting.kv
        if "kv_buffer" in free and kv is not None and kv.active:
            shorter = max(LEAST_BUFFER, kv.n_batch if setting.n_batch is None else setting.n_batch)
            if shorter < kv.buffer:
                setting = replace(setting, kv=replace(kv, buffer=shorter))
                reasons = [*reasons, f"buffer {shorter} instead of {kv.buffer}"]
                yield setting, reasons
                for smaller, batch in self._batches(setting, free, measured.n_batch):
                    setting = smaller
                    reasons = [batch if reason.startswith("prompt batch") else reason for reason in reasons]
                    yield setting, reasons
        if setting.kv is not None and setting.kv.active:
            kv = setting.kv
            if "kv_budget" in free and not isinstance(kv.layer_budgets, tuple):
                budget = kv.budget
                while budget // 2 >= max(LEAST_BUDGET, kv.least_budget):
                    budget //= 2
                    smaller_budget = f"budget {budget:,} instead of {kv.budget:,}"
                    yield replace(setting, kv=replace(kv, budget=budget)), [*reasons, smaller_budget]
        elif "n_ctx" in free:
            n_ctx = measured.n_ctx
            while n_ctx // 2 >= LEAST_CTX:
                n_ctx //= 2
                yield (
                    replace(setting, n_ctx=n_ctx),
                    [*reasons, f"context {n_ctx:,} instead of {measured.n_ctx:,}"],
                )

    @staticmethod
    def _batches(setting: Setting, free: frozenset[str], n_batch: int) -> Iterator[tuple[Setting, str]]:
        """Smaller and smaller prompt batches than n_batch, each with what to say."""
        kv = setting.kv
        batch = min(n_batch, setting.n_batch or n_batch)
        while "n_batch" in free and batch // 2 >= max(LEAST_BATCH, kv.buffer // 4 if kv else 0):
            batch //= 2
            if kv is not None and kv.batch is not None:
                kv = replace(kv, batch=batch)
            setting = replace(setting, kv=kv, n_batch=batch, n_ubatch=None)
            yield setting, f"prompt batch {batch} instead of {n_batch}"

    @staticmethod
    def _quantised(setting: Setting, free: frozenset[str]) -> Iterator[Setting]:
        """q8_0, and where flash attention is free or on for V as well."""
        if setting.type_k != "f16" or setting.type_v != "f16":
            return
        if "flash_attn" in free or setting.flash_attn is not False:
            yield replace(setting, type_k="q8_0", type_v="q8_0", flash_attn=True)
        else:
            yield replace(setting, type_k="q8_0")

    def _most_layers(self, setting: Setting) -> int:
        """The most layers that fit on the GPUs; 0 where none does."""

        def fits(layers: int) -> bool:
            return layers == 0 or self.evaluate(replace(setting, n_gpu_layers=layers)).fits

        return largest(fits, 0, self.shape.n_layer)

    def _most_sequences(self, plan: Plan) -> Plan:
        def fits(n: int) -> bool:
            return n == 1 or self.evaluate(replace(plan.setting, n_seq_max=n, n_outputs=n)).fits

        n = largest(fits, 1, max_sequences())
        return (
            plan if n == 1 else self.evaluate(replace(plan.setting, n_seq_max=n, n_outputs=n), plan.reasons)
        )

    # -- when nothing fits ---------------------------------------------------------------------------

    def _why_not(self, plan: Plan, setting: Setting, free: frozenset[str]) -> tuple[str, ...]:
        """What is missing, and the nearest thing that would fit."""
        over = [d for d in plan.devices if d.total_bytes > d.limit_bytes and len(plan.devices) > 1]
        where = f" on {max(over, key=lambda d: d.total_bytes - d.limit_bytes).name}" if over else ""
        missing = f"{show(plan.lacking_bytes)} too much{where} (2 % stay in reserve): {plan.line()}"
        relaxed = replace(setting, n_seq_max=None) if plan.n_seq > 1 else setting
        near = self._first_fit(relaxed, FREE) if (relaxed != setting or free < FREE) else None
        if near is None and relaxed != setting and self.evaluate(relaxed).fits:
            near = self.evaluate(relaxed)
        if near is not None:
            fixed = FREE - free
            return missing, f"it would fit with {' '.join(difference(plan, near, fixed))}"
        least = self._least(relaxed, FREE)
        return missing, (
            f"the least that this model works with is {show(least.total_bytes * RESERVE // (RESERVE - 1))} "
            f"({', '.join(differences(least))}): more memory, or a smaller model"
        )

    def _least(self, setting: Setting, free: frozenset[str]) -> Plan:
        """The setting that comes nearest to fitting."""
        plans = [self.evaluate(setting)]
        for candidate, reasons in self.cheaper(setting, free):
            try:
                plans.append(self.evaluate(candidate, tuple(reasons)))
            except (ValueError, RKVError):
                continue
        return min(plans, key=lambda p: p.lacking_bytes)


def _margin(total: int) -> int:
    return min(MARGIN, total // MARGIN_SHARE)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n in [low, high] that fits; low is taken to."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _driver_overhead() -> int:
    """What a GPU's driver takes for a process, where it does not say whose memory is whose."""
    code = (
        "from rkv_local.devices import device_used, list_devices\n"
        "before = device_used(); list_devices(); after = device_used()\n"
        "print(max(0, after - before) if before is not None and after is not None else 0)"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
        )
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0
