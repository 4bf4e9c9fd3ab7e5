"""What the options of a command are gathered into."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.models import Model
from rkv_local.options import DEFAULT_N_CTX
from rkv_local.shape import is_quantised

if TYPE_CHECKING:
    from rkv_local import KVBudget

DEFAULT_CTX_FULL = 8192  # a full cache is allocated at this size


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temp 0: always the likeliest. seed None: a new one each time."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def with_(self, **changes: Any) -> Sampling:
        """A copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class LoadOptions:
    """What a model is loaded with. flash_attn None: llama.cpp decides."""

    model: Model
    kv: KVBudget | None
    ctx_size: int
    batch_size: int | None = None
    threads: int = 1
    gpu_layers: int = 0
    mmap: bool = True
    kv_offload: bool = True
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attn: bool | None = False
    verbose: bool = False


def default_threads() -> int:
    """Physical cores that this process may use; cgroup quotas (containers) are honoured."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return max(1, (os.cpu_count() or 2) // 2) if os.name == "nt" else os.cpu_count() or 1
    cores = set()
    for cpu in cpus:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def sampling_of(values: dict[str, Any]) -> Sampling:
    """The sampling options among a command's values."""
    seed = values["seed"]
    return Sampling(
        temp=values["temp"],
        top_k=values["top_k"],
        top_p=values["top_p"],
        min_p=values["min_p"],
        repeat_penalty=values["repeat_penalty"],
        seed=None if seed < 0 else seed,
    )


def budget_of(values: dict[str, Any], batch: int | None = None) -> KVBudget | None:
    """The cache options among a command's values as a KVBudget; None for policy none.

    Raises:
        click.UsageError: they do not fit together, e.g. a pin that leaves no room.
    """
    from rkv_local.budget import KVBudget

    if values["kv_policy"] == "none":
        return None
    try:
        return KVBudget(
            budget=values["kv_budget"],
            buffer=values["kv_buffer"],
            window=values["kv_window"],
            recent=values["kv_recent"],
            policy=values["kv_policy"],
            lam=values["kv_lambda"],
            value_weight=values["kv_value_weight"],
            pin=values["kv_pin"],
            layer_budgets=values["kv_layer_budgets"],
            seed=values["kv_seed"],
            batch=batch,
        )
    except ValueError as err:
        raise click.UsageError(str(err)) from err


def load_of(values: dict[str, Any], model: Model) -> LoadOptions:
    """The load options among a command's values, adapted to --memory where they were not given.

    Raises:
        click.UsageError: options that do not fit together. click.ClickException: nothing fits in the memory.
    """
    kv = budget_of(values, values["batch_size"])
    ctx_size = values["ctx_size"]
    if ctx_size is None:
        ctx_size = model.ctx or (DEFAULT_N_CTX if kv else DEFAULT_CTX_FULL)
    gpu_layers = -1 if values["gpu_layers"] is None else values["gpu_layers"]
    flash_attn = flash_of(values["flash_attn"], gpu_layers, values["cache_type_v"])
    options = LoadOptions(
        model=model,
        kv=kv,
        ctx_size=ctx_size,
        batch_size=values["batch_size"] or (None if kv else 512),
        threads=values["threads"] or default_threads(),
        gpu_layers=gpu_layers,
        kv_offload=not values["no_kv_offload"],
        cache_type_k=values["cache_type_k"],
        cache_type_v=values["cache_type_v"],
        flash_attn=flash_attn,
        verbose=values["verbose"],
    )
    from rkv_local.cli.memory import fitted

    return fitted(options, values)


def flash_of(choice: str, gpu_layers: int, type_v: str) -> bool | None:
    """--flash-attn as True, False or None (llama.cpp decides)."""
    if choice != "auto":
        if choice == "off" and is_quantised(type_v):
            raise click.UsageError(f"-ctv {type_v} needs flash attention: -fa on, or -ctv f16")
        return choice == "on"
    if is_quantised(type_v):
        return True
    from rkv_local.devices import has_gpu

    return None if gpu_layers != 0 and has_gpu() else False
