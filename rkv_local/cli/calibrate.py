"""rkv-local calibrate: how many cells each layer of a model should get."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.calibration import allocate, beside
from rkv_local.cli import ui
from rkv_local.cli.interrupt import Interrupt
from rkv_local.cli.options import budget_of, default_threads, flash_of
from rkv_local.cli.params import (
    AT_LEAST_1,
    FiniteRange,
    cache_options,
    context_options,
    model_option,
    opt,
)
from rkv_local.cli.run import check_text, read_text
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local import KVBudget
    from rkv_local.calibration import Calibration

COLUMNS = 6  # sizes in the table
BUFFER = 128  # answers of chat models are short: with more there would be few compactions in one


@click.command("calibrate")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option()
@opt("-o --output", "The file to write (default: MODEL.rkv.json beside MODEL.gguf).", metavar="FILE")
@opt("-n --tokens", "Tokens of all traces.", AT_LEAST_1, 4096)
@opt("--length", "Most tokens of a trace; it needs memory for a full cache of them.", AT_LEAST_1, 2048)
@opt("--prompts", "Questions, one per line, instead of ours.", click.Path(path_type=Path), None, "FILE")
@opt("--temp --temperature", "0 = always the likeliest token.", FiniteRange(min=0), 0.8, "X")
@opt("-s --seed", "Of the answers.", click.IntRange(0, 2**31), 0)
@opt("--kv-budget", "Mean cells of a layer in the table; what is written serves any.", AT_LEAST_1, 1024)
@opt(
    "--kv-buffer",
    "Tokens between two compactions while it measures, whatever the policy.",
    AT_LEAST_1,
    BUFFER,
)
@cache_options("kv_budget", "kv_buffer", "kv_layer_budgets")
@context_options()
@click.option("--json", "as_json", is_flag=True, help="Print what is written instead of a table.")
def calibrate(name: str | None, as_json: bool, **values: Any) -> None:
    """Measure which layers of a model can do with few cells.

    MODEL is a GGUF file or a short name (default: reasoner). It answers questions with a full cache, and
    reads the answers again with few cells in one layer at a time. How far the next token's distribution moves
    is that layer's damage. It is stored beside the model, for --kv-layer-budgets calibrated with any policy.
    """
    if name is not None and values["model"] is not None:
        raise click.UsageError(f"two models: {name!r} and --model {values['model']!r}")
    kv = budget_of({**values, "kv_layer_budgets": None})
    if kv is None:
        raise click.UsageError("policy none keeps everything: there is nothing to share out")
    gpu_layers = -1 if values["gpu_layers"] is None else values["gpu_layers"]
    flash_attn = flash_of(values["flash_attn"], gpu_layers, values["cache_type_v"])
    found = resolve(name or values["model"])
    path = destination(values["output"], found.path)
    questions = lines(values["prompts"])

    from rkv_local import calibrate as measured
    from rkv_local.cli import nativelog
    from rkv_local.evals.model import Model, Setting

    try:
        measured.sizes_for(kv, values["length"])
    except ValueError as err:
        raise click.UsageError(str(err).replace("length is", "--length is")) from err
    setting = Setting(
        type_k=values["cache_type_k"],
        type_v=values["cache_type_v"],
        flash_attn=flash_attn,
        threads=values["threads"] or default_threads(),
        kv_offload=not values["no_kv_offload"],
    )
    nativelog.install(values["verbose"])
    nativelog.clear()
    done = (0, 1)

    def progress(*now: int) -> None:
        nonlocal done
        done = now[0], now[1]

    def state() -> tuple[float, str]:
        n, about = done
        return n / about, f"{n:,}/{about:,} tokens"

    with Interrupt() as interrupt:
        try:
            with ui.progress("calibrating", state), Model(found.path, gpu_layers) as model:
                made = measured.calibrate(
                    model,
                    kv,
                    [model.prompt(question) for question in questions or measured.QUESTIONS],
                    values["tokens"],
                    length=values["length"],
                    temp=values["temp"],
                    seed=values["seed"],
                    setting=setting,
                    progress=progress,
                    stop=lambda: interrupt.pressed,
                )
        except measured.Stopped:
            raise KeyboardInterrupt from None
        except RuntimeError as err:
            raise RuntimeError(nativelog.reason(str(err), found.name)) from err
    made.save(path)
    click.echo(json.dumps(asdict(made), indent=1) if as_json else table(made, kv))
    ui.line(f"{path}: {ui.plural(made.tokens, 'token')}, {ui.plural(len(made.sizes), 'size')}")
    if path != beside(found.path):
        ui.line(f"use it with --kv-layer-budgets {path}")


def lines(file: Path | None) -> list[str]:
    """The lines of a file that are not blank; none without a file.

    Raises:
        click.UsageError: it cannot be read, or has none.
    """
    if file is None:
        return []
    found = [line.strip() for line in read_text(file, "the prompts").splitlines() if line.strip()]
    if not found:
        raise click.UsageError(f"there are no prompts in {str(file)!r}")
    return found


def destination(output: str | None, model: Path) -> Path:
    """The file to write.

    Raises:
        click.UsageError: it cannot be written.
    """
    path = beside(model) if output is None else Path(output)
    check_text(str(path), "the output's name")
    folder = path.parent
    if path.is_dir() or not folder.is_dir():
        why = "it is a folder" if path.is_dir() else f"there is no folder {str(folder)!r}"
    elif not os.access(folder, os.W_OK):
        why = f"no permission for {str(folder)!r}" + (
            "; -o FILE.json writes elsewhere" if output is None else ""
        )
    elif path.suffix != ".json":
        why = "its name must end in .json"
    else:
        return path
    raise click.UsageError(f"cannot write {str(path)!r}: {why}")


def table(made: Calibration, kv: KVBudget) -> str:
    """Damage under some of the sizes, and budgets by layer."""
    cells = allocate(made.sizes, made.damage, kv.budget, kv.least_budget)
    shown = range(0, len(made.sizes), -(-len(made.sizes) // COLUMNS))
    sizes = [f"{made.sizes[i]:,}" for i in shown]
    head = ["LAYER", f"NATS AT {sizes[0]}", *sizes[1:], f"CELLS OF {kv.budget:,}"]
    rows = [
        [str(layer), *("-" * (len(sizes) + 1))]
        if curve is None
        else [str(layer), *("-" if curve[i] is None else f"{curve[i]:.4f}" for i in shown), f"{n:,}"]
        for layer, (curve, n) in enumerate(zip(made.damage, cells, strict=True))
    ]
    return ui.table(head, rows, [True] * len(head))
