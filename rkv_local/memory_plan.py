"""What a memory plan says: a setting, what it takes, and how that is shown."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from .probe import MAIN, Setting
from .shape import is_quantised
from .sizes import show, unit_of


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
    """What a model is loaded with, and what that takes where the limit applies: the GPUs, else main memory.

    weights, kv (K, V, windows and states, and rings_bytes, which a budget adds), compute (graphs, logits,
    compactions) and other (the program itself, or the GPU driver's share) make up the total; all in bytes.
    n_gpu_layers: 0 without a GPU; n_layer + 1 is all, with the output. kv_layers: layers with `cells`, 0
    if not known; kv_others: what else is in kv_bytes, "windows" (caches of sliding windows) and "states" (of
    recurrent layers). kv_budget, kv_buffer: None for a full cache of n_ctx cells. cache_type: of K, and of V
    where that is another, as K/V. lacking_bytes: how much too much it is. reasons: what was changed, or why
    none fits.
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
    kv_layers: int
    kv_others: tuple[str, ...]
    kv_budget: int | None
    kv_buffer: int | None
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
        cells = f"{self.cells:,} cells"
        if self.kv_layers:
            cells += f" × {self.kv_layers} layer{'s' * (self.kv_layers > 1)}"
        if self.n_seq > 1:
            cells += f" × {self.n_seq} sequences"
        inside = " + ".join([*([cells] if self.cells else []), *self.kv_others])
        kv = f"KV {show(self.kv_bytes, unit)}" + (f" ({inside})" if inside else "")
        parts = [f"model {show(self.weights_bytes, unit)}", kv, f"compute {show(self.compute_bytes, unit)}"]
        if self.other_bytes:
            parts.append(
                f"{'program' if self.devices[0].name == MAIN else 'driver'} {show(self.other_bytes, unit)}"
            )
        total, limit = show(self.total_bytes, unit), show(self.limit_bytes)
        if unit_of(self.limit_bytes) == unit:
            total = total.split()[0]
        return " + ".join(parts) + f" = {total} of {limit}"


def cache_name(setting: Setting) -> str:
    """The cache's type: 'f16', or 'q8_0/f16' where K and V differ."""
    k, v = setting.type_k, setting.type_v
    return k if k == v else f"{k}/{v}"


def difference(wanted: Plan, other: Plan, fixed: Collection[str]) -> list[str]:
    """Options of the command line, among those that fix something, that turn one plan into another."""
    k, v = other.setting.type_k, other.setting.type_v
    flash = ["-fa on"] if is_quantised(v) and "flash_attn" in fixed else []
    changes = [
        ("n_seq", other.n_seq != wanted.n_seq, [f"-np {other.n_seq}"]),
        ("kv_budget", other.kv_budget != wanted.kv_budget, [f"--kv-budget {other.kv_budget}"]),
        ("kv_buffer", other.kv_buffer != wanted.kv_buffer, [f"--kv-buffer {other.kv_buffer}"]),
        ("n_ctx", other.n_ctx != wanted.n_ctx, [f"-c {other.n_ctx}"]),
        ("cache_type", other.cache_type != wanted.cache_type, [f"-ctk {k} -ctv {v}", *flash]),
        ("n_batch", other.n_batch != wanted.n_batch, [f"-b {other.n_batch}"]),
        ("n_gpu_layers", other.n_gpu_layers != wanted.n_gpu_layers, [f"-ngl {other.n_gpu_layers}"]),
    ]
    return [o for name, differs, options in changes if differs and name in {*fixed, "n_seq"} for o in options]


def differences(plan: Plan) -> list[str]:
    """A plan in a few words."""
    words = [f"budget {plan.kv_budget}" if plan.kv_budget else f"context {plan.n_ctx:,}"]
    words += [f"buffer {plan.kv_buffer}"] if plan.kv_buffer else []
    words += [f"cache {plan.cache_type}", f"batch {plan.n_batch}"]
    return words
