"""A memory budget in bytes: what is loaded with, so that weights, cache and compute buffers fit.

Nothing is estimated: each setting that is considered is measured (probe.py). What has to give way does so in
an order of its own, see `Planner.cheaper`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .devices import driver_used, list_devices, main_memory, resident
from .errors import RKVError
from .probe import MAIN, Measured, Part, Probe, Setting
from .shape import ModelShape, is_quantised
from .sizes import GIB, parse_size, show, unit_of

MARGIN, MARGIN_SHARE = GIB, 10  # auto leaves a GiB of each device, or a tenth of a small one
LEAST_BATCH, LEAST_BUDGET, LEAST_CTX = 32, 256, 1024  # what is given up goes down to these
MOST_SEQ = 256  # LLAMA_MAX_SEQ
FREE = frozenset({"n_gpu_layers", "n_batch", "cache_type", "kv_budget", "n_ctx", "use_mmap", "flash_attn"})


@dataclass(frozen=True)
class DevicePlan:
    """What one device gets, in bytes. other: the program in main memory, the driver's on a GPU."""

    name: str
    weights_bytes: int
    kv_bytes: int
    compute_bytes: int
    other_bytes: int
    limit_bytes: int

    @property
    def total_bytes(self) -> int:
        """All that is there."""
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.other_bytes


@dataclass(frozen=True)
class Plan:
    """What a model is loaded with and what that takes, in bytes, where the limit applies: the GPUs, else main memory.

    weights, kv (K, V, rings, positions: rings_bytes are the last two), compute (graphs, logits, compactions) and
    other (the program itself, or the GPU driver's share) make up the total. n_gpu_layers: 0 without a GPU;
    n_layer + 1 is all, with the output. kv_budget: None for a full cache of n_ctx cells. cache_type: of K, and of
    V where that is another, as K/V. lacking_bytes: how much too much it is. reasons: what was changed, and why.
    """

    fits: bool
    weights_bytes: int
    kv_bytes: int
    rings_bytes: int
    compute_bytes: int
    other_bytes: int
    total_bytes: int
    limit_bytes: int
    lacking_bytes: int
    n_gpu_layers: int
    n_layer: int
    kv_budget: int | None
    cells: int
    cache_type: str
    n_seq: int
    n_ctx: int
    n_batch: int
    n_ubatch: int
    use_mmap: bool
    devices: tuple[DevicePlan, ...]
    setting: Setting = field(repr=False)
    reasons: tuple[str, ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for Llama that make what was planned."""
        return self.setting.arguments()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the setting."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("setting", "devices")}
        data["devices"] = [
            {f.name: getattr(d, f.name) for f in fields(d)} | {"total_bytes": d.total_bytes}
            for d in self.devices
        ]
        return data

    def line(self) -> str:
        """One line in llama.cpp's manner."""
        unit = unit_of(self.total_bytes)
        cells = f"{self.cells:,} cells × {self.n_layer} layers"
        if self.n_seq > 1:
            cells += f" × {self.n_seq} sequences"
        kv = f"KV {show(self.kv_bytes, unit)}" + (f" ({cells})" if self.cells else "")
        parts = [f"model {show(self.weights_bytes, unit)}", kv, f"compute {show(self.compute_bytes, unit)}"]
        if self.other_bytes:
            parts.append(
                f"{'program' if self.devices[0].name == MAIN else 'driver'} {show(self.other_bytes, unit)}"
            )
        total, limit = show(self.total_bytes, unit), show(self.limit_bytes)
        if unit_of(self.limit_bytes) == unit:
            total = total.split()[0]
        return " + ".join(parts) + f" = {total} of {limit}"


def plan(model_path: str | os.PathLike[str], memory: str | int = "auto", **settings: Any) -> Plan:
    """What to load a model with, so that it takes no more than `memory`. No weight is read.

    The limit holds for the GPUs together where layers are on one, else for this process's resident memory.

    Args:
        model_path: a GGUF file.
        memory: "6GiB", bytes, or "auto": what is free now on the device, less a margin of 1 GiB or a tenth of it.
        **settings: Llama's parameters that are decided already and are kept: kv, n_ctx, n_batch, n_ubatch,
            n_seq_max ("auto": as many as fit), type_k, type_v, flash_attn, n_gpu_layers, offload_kqv, use_mmap,
            n_threads, n_threads_batch, n_outputs. What is not given starts at Llama's default and may give way.

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
    for name, decides in (("kv", "kv_budget"), ("type_k", "cache_type"), ("type_v", "cache_type")):
        if name in settings:
            free.discard(decides)
    free -= {name for name, value in settings.items() if value is not None or name == "flash_attn"}
    with Planner(model_path, memory) as planner:
        return planner.search(setting, frozenset(free), many)


class Planner:
    """Plans for one model file and one limit."""

    def __init__(self, model_path: str | os.PathLike[str], memory: str | int = "auto") -> None:
        self.explicit = parse_size(memory)
        self.shape = ModelShape.of(os.fspath(model_path))
        self.probe = Probe(model_path)
        self.gpus = {d.name: d for d in list_devices() if d.is_gpu and d.memory_total > 0}
        available, self.main_total = main_memory()
        self.main_limit = max(0, available + resident() - _margin(self.main_total))
        self._driver: int | None = None

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: object) -> None:
        self.probe.close()

    @property
    def total(self) -> int:
        """Memory of the machine where the limit applies: its GPUs', or else its main memory."""
        return sum(d.memory_total for d in self.gpus.values()) if self.gpus else self.main_total

    # -- one setting ---------------------------------------------------------------------------------

    def evaluate(self, setting: Setting, reasons: tuple[str, ...] = ()) -> Plan:
        """What a setting takes, and whether that fits.

        Raises:
            ValueError, RKVError: as Probe.measure.
        """
        measured = self.probe.measure(setting)
        on_gpu = bool(self.gpus) and setting.n_gpu_layers != 0
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
        lacking = max(0, total - limit, *(d.total_bytes - d.limit_bytes for d in places))
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
            kv_budget=measured.kv.budget if measured.kv else None,
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

    def search(self, setting: Setting, free: frozenset[str], many: bool = False) -> Plan:
        """The first of the settings that fits; many: with as many sequences as fit.

        Where none fits: the least of them, with reasons that say what is missing and what would fit.

        Raises:
            ValueError, RKVError: as Probe.measure, for the setting itself.
        """
        start = plan = self.evaluate(setting)
        if not plan.fits:
            plan = self._first_fit(setting, free) or plan
        if not plan.fits:
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
        cache), and last what is remembered (the budget, or the reach of a full cache).
        """
        reasons: list[str] = []
        measured = self.probe.measure(setting)
        if "use_mmap" in free and measured.copies:
            setting = replace(setting, use_mmap=False)
            reasons = [*reasons, "weights are read, not mapped: repacked ones would be there twice"]
            yield setting, reasons
        if "n_batch" in free:
            least = max(LEAST_BATCH, setting.kv.buffer // 4 if setting.kv else 0)
            batch = measured.n_batch
            while batch // 2 >= least:
                batch //= 2
                setting = replace(setting, n_batch=batch, n_ubatch=None)
                yield setting, [*reasons, f"prompt batch {batch} instead of {measured.n_batch}"]
            if batch < measured.n_batch:
                reasons = [*reasons, f"prompt batch {batch} instead of {measured.n_batch}"]
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
        if setting.kv is not None and setting.kv.active:
            kv = setting.kv
            if "kv_budget" in free and not isinstance(kv.layer_budgets, tuple):
                for budget in (512, LEAST_BUDGET):
                    if kv.least_budget <= budget < kv.budget:
                        smaller_kv = replace(kv, budget=budget)
                        yield (
                            replace(setting, kv=smaller_kv),
                            [*reasons, f"budget {budget} instead of {kv.budget:,}"],
                        )
        elif "n_ctx" in free:
            n_ctx = measured.n_ctx
            while n_ctx // 2 >= LEAST_CTX:
                n_ctx //= 2
                yield (
                    replace(setting, n_ctx=n_ctx),
                    [*reasons, f"context {n_ctx:,} instead of {measured.n_ctx:,}"],
                )

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

        return _largest(fits, 0, self.shape.n_layer)

    def _most_sequences(self, plan: Plan) -> Plan:
        def fits(n: int) -> bool:
            return n == 1 or self.evaluate(replace(plan.setting, n_seq_max=n, n_outputs=n)).fits

        n = _largest(fits, 1, MOST_SEQ)
        return (
            plan if n == 1 else self.evaluate(replace(plan.setting, n_seq_max=n, n_outputs=n), plan.reasons)
        )

    # -- when nothing fits ---------------------------------------------------------------------------

    def _why_not(self, plan: Plan, setting: Setting, free: frozenset[str]) -> tuple[str, ...]:
        """What is missing, and the nearest thing that would fit."""
        tightest = max(plan.devices, key=lambda d: d.total_bytes - d.limit_bytes)
        where = "" if len(plan.devices) == 1 else f" on {tightest.name}"
        missing = f"{show(plan.lacking_bytes)} too much{where}: {plan.line()}"
        relaxed = replace(setting, n_seq_max=None, n_outputs=1) if plan.n_seq > 1 else setting
        near = self._first_fit(relaxed, FREE) if (relaxed != setting or free < FREE) else None
        if near is None and relaxed != setting and self.evaluate(relaxed).fits:
            near = self.evaluate(relaxed)
        if near is not None:
            return missing, f"it would fit with {' '.join(difference(plan, near))}"
        least = self._least(relaxed)
        return missing, (
            f"the least that this model works with is {show(least.total_bytes)} ({', '.join(differences(least))}): "
            f"more memory, or a smaller model"
        )

    def _least(self, setting: Setting) -> Plan:
        """The cheapest setting of all."""
        plans = [self.evaluate(setting)]
        for candidate, reasons in self.cheaper(setting, FREE):
            try:
                plans.append(self.evaluate(candidate, tuple(reasons)))
            except (ValueError, RKVError):
                continue
        return min(plans, key=lambda p: p.lacking_bytes)


def _margin(total: int) -> int:
    return min(MARGIN, total // MARGIN_SHARE)


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest n in [low, high] that fits; low is taken to."""
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _driver_overhead() -> int:
    """What a GPU's driver takes for a process, where it does not say so by process: seen in one of its own."""
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


def cache_name(setting: Setting) -> str:
    """The cache's type: 'f16', or 'q8_0/f16' where K and V differ."""
    k, v = setting.type_k, setting.type_v
    return k if k == v else f"{k}/{v}"


def difference(wanted: Plan, other: Plan) -> list[str]:
    """Options of the command line that turn one plan into another."""
    options = []
    if other.n_seq != wanted.n_seq:
        options.append(f"-np {other.n_seq}")
    if other.kv_budget != wanted.kv_budget:
        options.append(f"--kv-budget {other.kv_budget}")
    if other.n_ctx != wanted.n_ctx:
        options.append(f"-c {other.n_ctx}")
    if other.cache_type != wanted.cache_type:
        options.append(f"-ctk {other.setting.type_k} -ctv {other.setting.type_v}")
        if is_quantised(other.setting.type_v) and wanted.setting.flash_attn is False:
            options.append("-fa on")
    if other.n_batch != wanted.n_batch:
        options.append(f"-b {other.n_batch}")
    if other.n_gpu_layers != wanted.n_gpu_layers:
        options.append(f"-ngl {other.n_gpu_layers}")
    return options


def differences(plan: Plan) -> list[str]:
    """A plan in a few words."""
    words = [f"budget {plan.kv_budget}" if plan.kv_budget else f"context {plan.n_ctx:,}"]
    words += [f"cache {plan.cache_type}", f"batch {plan.n_batch}"]
    return words
