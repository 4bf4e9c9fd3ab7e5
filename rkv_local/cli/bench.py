"""rkv-local bench: what a budget changes about decode speed and memory."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from rkv_local.cli import ui
from rkv_local.cli.memory import fitted_bench, given
from rkv_local.cli.options import budget_of, default_threads
from rkv_local.cli.params import (
    AT_LEAST_1,
    Parallel,
    cache_options,
    context_options,
    memory_option,
    model_option,
    opt,
)
from rkv_local.models import resolve
from rkv_local.shape import CACHE_TYPES, is_quantised

if TYPE_CHECKING:
    from rkv_local.bench import Plan, Row


class Depths(click.ParamType):
    """Numbers with commas between them."""

    name = "n,n,..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """A tuple of counts."""
        try:
            depths = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            depths = (-1,)
        if min(depths) < 0:
            self.fail(f"{value!r}: depths are counts of tokens with commas between them", param, ctx)
        return depths


@click.command("bench")
@model_option()
@opt("-d --depth", "Tokens before the measured ones.", Depths(), "0,2048,6144", "N,N,...")
@opt("-n --n-gen", "Tokens in a stretch, rounded up to a multiple of --kv-buffer.", AT_LEAST_1, 128)
@opt("-r --repetitions", "Stretches of each kind, in turns.", AT_LEAST_1, 5)
@opt("-np --parallel", "Sequences at once; auto: as many as fit in --memory.", Parallel(), 1, "N|auto")
@memory_option()
@cache_options()
@context_options(
    opt("-fa --fa --flash-attn", "Settings to measure.", click.Choice(("on", "off", "both")), "both", None)
)
@opt("-o --output", "Format of the report.", click.Choice(("md", "json")), "md", None)
def bench(**values: Any) -> None:
    """Measure decode speed at logical depths, with eviction and without, in one interleaved run.

    For each depth and flash attention setting: tokens per second of the full cache and of the budget (median
    and interquartile range of the repetitions), the memory allocated for the cache, by how much the process
    grew, and the share of the time that compactions took. The last rows are the full cache at the budget's
    mean depth (budget + buffer / 2): the speed that the budget would have if eviction cost nothing. On the
    CPU the budget's batch is its buffer, so that budget + buffer cells are allocated, on a GPU the usual one.
    """
    from rkv_local.devices import has_gpu, peak_resident

    # CUDA's flash attention is slow where the cells are no multiple of 256, as they are by default
    gpu_layers = -1 if values["gpu_layers"] is None else values["gpu_layers"]
    on_gpu = gpu_layers != 0 and not values["no_kv_offload"] and has_gpu()
    kv = budget_of(values)
    if kv and not on_gpu:
        kv = replace(kv, batch=kv.buffer)
    settings = {"on": (True,), "off": (False,), "both": (False, True)}[values["fa"]]
    if is_quantised(values["cache_type_v"]):
        if values["fa"] == "off":
            raise click.UsageError(f"-ctv {values['cache_type_v']} needs flash attention: -fa on")
        settings = (True,)
    model = resolve(values["model"])
    kv = kv and kv.for_model(model.path)

    from rkv_local.bench import Plan
    from rkv_local.bench import bench as measure
    from rkv_local.cli import nativelog

    nativelog.install(values["verbose"])
    nativelog.clear()
    plan = Plan(
        model=model.path,
        kv=kv,
        depths=values["depth"],
        n=values["n_gen"],
        repetitions=values["repetitions"],
        flash_attn=settings,
        parallel=values["parallel"] or 1,
        threads=values["threads"] or default_threads(),
        gpu_layers=gpu_layers,
        kv_offload=not values["no_kv_offload"],
        type_k=CACHE_TYPES[values["cache_type_k"]][0],
        type_v=CACHE_TYPES[values["cache_type_v"]][0],
    ).whole_periods()
    if plan.cells >= 2**31:
        raise click.UsageError(
            f"--depth {max(plan.depths)} is out of reach: {plan.cells:,} cells for --parallel {plan.parallel}"
        )
    plan = fitted_bench(plan, values)
    if plan.kv and plan.n != values["n_gen"] and given("n_gen"):
        ui.line(f"-n {values['n_gen']} becomes {plan.n}: whole periods of {plan.kv.buffer} tokens")
    doing = [""]
    start = time.monotonic()
    try:
        with ui.progress("bench", text=lambda: doing[0]):
            rows = measure(plan, lambda text: doing.__setitem__(0, text))
    except RuntimeError as err:
        raise RuntimeError(nativelog.reason(str(err), model.name)) from err
    result = {
        "model": model.name,
        "params": parameters(plan, values),
        "seconds": time.monotonic() - start,
        "peak_rss_bytes": peak_resident(),
        "rows": [row.as_dict() for row in rows],
        "summary": summary(plan, rows),
    }
    if values["output"] == "json":
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(markdown(result))
    sys.stdout.flush()


def parameters(plan: Plan, values: dict[str, Any]) -> dict[str, Any]:
    """What was measured, for the report."""
    kv = plan.kv
    return {
        "n": plan.n,
        "repetitions": plan.repetitions,
        "threads": plan.threads,
        "gpu_layers": plan.gpu_layers,
        "parallel": plan.parallel,
        "type_k": values["cache_type_k"],
        "type_v": values["cache_type_v"],
        "policy": kv.policy if kv else "none",
        "budget": kv.budget if kv else None,
        "buffer": kv.buffer if kv else None,
        "batch": kv.n_batch if kv else None,
        "mean_depth": plan.mean_depth if kv else None,
    }


def summary(plan: Plan, rows: list[Row]) -> list[dict[str, Any]]:
    """For each budget row in the steady state: its speed against stock's best setting and at the mean depth.

    Quotients are medians over the repetitions. Empty where no depth lies in the steady state.
    """
    from rkv_local.bench import paired_ratio

    found = []
    means = {r.flash_attn: r for r in rows if r.cache == "full" and r.depth == plan.mean_depth}
    for row in rows:
        if row.cache == "full" or row.depth < row.cells:
            continue
        full = max(
            (r for r in rows if r.cache == "full" and r.depth == row.depth), key=lambda r: r.tokens_per_second
        )
        mean = means.get(row.flash_attn) if row.depth == max(plan.depths) else None
        found.append(
            {
                "depth": row.depth,
                "flash_attn": row.flash_attn,
                "tokens_per_second": row.tokens_per_second,
                "full_faster_flash_attn": full.flash_attn,
                "ratio_to_faster_full": paired_ratio(row, full),
                "ratio_to_full_at_mean_depth": paired_ratio(row, mean) if mean else None,
                "compaction_share": row.compaction_share,
                "kv_bytes_share": row.kv_bytes / full.kv_bytes,
            }
        )
    return found


def markdown(result: dict[str, Any]) -> str:
    """The report as a Markdown table and the lines that follow from it."""
    p = result["params"]
    head = [
        "cache",
        "fa",
        "depth",
        "seqs",
        "tok/s",
        "spread",
        "x full",
        "cells",
        "KV MiB",
        "grown MiB",
        "compaction",
    ]
    rows = []
    for r in result["rows"]:
        ratio = "" if r["ratio_to_full"] is None else f"{r['ratio_to_full']:.2f}"
        share = "" if r["cache"] == "full" else f"{r['compaction_share']:.2%}"
        rows.append(
            [
                r["cache"],
                onoff(r["flash_attn"]),
                str(r["depth"]),
                str(r["parallel"]),
                f"{r['tokens_per_second']:.1f}",
                f"{r['spread']:.1f}",
                ratio,
                str(r["cells"]),
                f"{r['kv_bytes'] / ui.MIB:.1f}",
                f"{r['memory_bytes'] / ui.MIB:.1f}",
                share,
            ]
        )
    lines = [
        f"{result['model']}: {p['n']} tokens x {p['repetitions']}, {ui.plural(p['threads'], 'thread')}, "
        f"cache {p['type_k']}/{p['type_v']}"
        + (
            f", {p['policy']} budget {p['budget']} + buffer {p['buffer']} (batch {p['batch']})"
            if p["budget"]
            else ""
        ),
        "",
        ui.markdown_table(head, rows, [False, False] + [True] * 9),
        "",
    ]
    for s in result["summary"]:
        text = (
            f"depth {s['depth']}, fa {onoff(s['flash_attn'])}: {s['tokens_per_second']:.1f} tok/s = "
            f"{s['ratio_to_faster_full']:.2f}x the full cache's faster setting "
            f"(fa {onoff(s['full_faster_flash_attn'])})"
        )
        if s["ratio_to_full_at_mean_depth"] is not None:
            text += f", {s['ratio_to_full_at_mean_depth']:.1%} of the full cache at depth {p['mean_depth']}"
        lines.append(f"- {text}; compactions {s['compaction_share']:.2%} of the time")
    if result["peak_rss_bytes"]:
        lines.append(f"- peak memory of the process {result['peak_rss_bytes'] / ui.MIB:,.0f} MiB")
    return "\n".join(lines)


def onoff(value: bool) -> str:
    """on or off."""
    return "on" if value else "off"
