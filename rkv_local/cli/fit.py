"""rkv-local fit: what a model takes with a few caches, and which of them fit in a memory limit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from rkv_local.cli import ui
from rkv_local.cli.options import DEFAULT_CTX_FULL, default_threads, flash_of
from rkv_local.cli.params import THREADS, GpuLayers, Sequences, memory_option, model_option, opt
from rkv_local.models import resolve
from rkv_local.options import DEFAULT_N_CTX
from rkv_local.sizes import MIB, show

if TYPE_CHECKING:
    from rkv_local.memory import Planner
    from rkv_local.memory_plan import Plan

FULL = (DEFAULT_CTX_FULL, DEFAULT_N_CTX)
BUDGETS = (512, 1024, 2048, 4096)
TYPES = ("f16", "q8_0")


@click.command("fit")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option()
@memory_option()
@opt("-np --parallel", "Sequences at once.", Sequences(), 1, "N")
@opt("-t --threads", "CPU threads (default: the physical cores).", THREADS)
@opt("-ngl --gpu-layers --n-gpu-layers", "Layers on the GPU.", GpuLayers(), "auto", "N|all|auto")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def fit(name: str | None, as_json: bool, **values: Any) -> None:
    """Show what fits in memory, without loading the weights.

    MODEL is a GGUF file or a short name (default: reasoner). For full caches and budgets, f16 and q8_0: what
    weights, cache and compute buffers take, as llama.cpp measures it, and what `run` would choose. More than
    this machine has may be given, to plan for another. Exit code 1 if not even the smallest setting fits.
    """
    if name is not None and values["model"] is not None:
        raise click.UsageError(f"two models: {name!r} and --model {values['model']!r}")
    model = resolve(name or values["model"])

    from rkv_local.memory import Planner

    with Planner(model.path, values["memory"]) as planner:
        chosen, rows, refused = planned(planner, values)
        where = ", ".join(d.name for d in chosen.devices if d.name != "CPU" or len(chosen.devices) == 1)
        result = {
            "model": model.name,
            "device": where,
            "limit_bytes": chosen.limit_bytes,
            "available_bytes": planner.available,
            "plan": chosen.as_dict(),
            "table": [{"cache": cache, **plan.as_dict()} for cache, plan in rows],
            "refused": refused,
        }
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(report(model.name, where, chosen, rows, refused))
    if not chosen.fits:
        click.get_current_context().exit(1)


def planned(planner: Planner, values: dict[str, Any]) -> tuple[Plan, list[tuple[str, Plan]], str | None]:
    """What `run` would choose, the table, and why a budget is refused, if it is."""
    from rkv_local import KVBudget, RKVError
    from rkv_local.memory import FREE
    from rkv_local.probe import Setting

    layers = values["gpu_layers"]
    free = FREE if layers is None else FREE - {"n_gpu_layers"}
    threads = values["threads"] or default_threads()
    n_seq = None if values["parallel"] == 1 else values["parallel"]

    def setting(kv: KVBudget | None, n_ctx: int, cache_type: str = "f16") -> Setting:
        return Setting(
            kv=kv,
            n_ctx=n_ctx,
            n_batch=None if kv else 512,
            n_seq_max=n_seq,
            type_k=cache_type,
            type_v=cache_type,
            flash_attn=flash_of("auto", -1 if layers is None else layers, cache_type),
            n_gpu_layers=-1 if layers is None else layers,
            n_threads=threads,
            n_threads_batch=threads,
        )

    refused, usual = None, KVBudget()
    try:
        chosen = planner.search(setting(usual, DEFAULT_N_CTX), free)
    except (RKVError, ValueError) as err:  # of the default policy, or of the calibration beside the model
        refused, usual = str(err), KVBudget(policy="rkv")
        try:
            chosen = planner.search(setting(usual, DEFAULT_N_CTX), free)
            refused += "; these are with --kv-policy rkv"
        except RKVError as other:
            refused, usual = f"{other}: full caches only", KVBudget(policy="none")
            chosen = planner.search(setting(None, DEFAULT_CTX_FULL), free)
    rows = []
    for cache_type in TYPES:
        wanted: list[tuple[str, KVBudget | None, int]] = [(f"full, {n:,} cells", None, n) for n in FULL]
        if usual.active:
            wanted += [(f"budget {b:,}", replace(usual, budget=b), DEFAULT_N_CTX) for b in BUDGETS]
        for cache, kv, n_ctx in wanted:
            try:
                row = setting(kv, n_ctx, cache_type)
                rows.append((cache, planner.search(row, free & {"n_gpu_layers", "use_mmap"}, explain=False)))
            except (ValueError, RKVError):
                continue  # blocks of q8_0 that do not divide this model's heads
    return chosen, rows, refused


def report(name: str, where: str, chosen: Plan, rows: list[tuple[str, Plan]], refused: str | None) -> str:
    """The table, and what `run` would choose."""
    gpu = where != "CPU"
    head = ["CACHE", "TYPE", "MODEL", "KV", "COMPUTE", "OTHER", "TOTAL MiB", "FITS"]
    head += ["GPU LAYERS"] if gpu else []
    lines = []
    for cache, p in rows:
        sizes = (p.weights_bytes, p.kv_bytes, p.compute_bytes, p.other_bytes, p.total_bytes)
        line = [cache, p.cache_type, *(f"{size / MIB:,.1f}" for size in sizes), "yes" if p.fits else "no"]
        lines.append(line + ([f"{p.n_gpu_layers} of {p.n_layer + 1}"] if gpu else []))
    text = [
        f"{name} in {show(chosen.limit_bytes)} of {'main memory' if not gpu else where}",
        "",
        ui.table(head, lines, [False, False, *[True] * 5, False, *[True] * gpu]),
        "",
    ]
    if refused:
        text.append(refused)
    if chosen.fits:
        text.append(f"rkv-local run would take: {chosen.line()}")
        text += [f"  {reason}" for reason in chosen.reasons]
    else:
        text.append(f"does not fit: {'; '.join(chosen.reasons)}")
    return "\n".join(text)
