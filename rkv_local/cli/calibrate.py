"""rkv-local calibrate: how a model's layers should share the cells."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.calibration import beside, share_out
from rkv_local.chat import Conversation
from rkv_local.cli import ui
from rkv_local.cli.options import Sampling, budget_of, load_of
from rkv_local.cli.params import (
    AT_LEAST_1,
    FiniteRange,
    cache_options,
    context_options,
    memory_option,
    model_option,
    opt,
)
from rkv_local.cli.run import check_text, read_text
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local import KVBudget
    from rkv_local.calibration import Calibration
    from rkv_local.cli.session import Session

POLICY, BUDGET = "latest", 512  # docs/calibrate.md tells why; a quarter of a trace


@click.command("calibrate")
@click.argument("name", metavar="[MODEL]", required=False)
@model_option()
@opt("-o --output", "The file to write (default: MODEL.rkv.json beside MODEL.gguf).", metavar="FILE")
@opt("-n --tokens", "Tokens in all, rounded to whole traces.", AT_LEAST_1, 4096)
@opt("--length", "Tokens of a trace; it needs memory for a full cache of them.", AT_LEAST_1, 2048)
@opt("--prompts", "Questions, one per line, instead of ours.", click.Path(path_type=Path), None, "FILE")
@opt("--temp --temperature", "0 = always the likeliest token.", FiniteRange(min=0), 0.8, "X")
@opt("-s --seed", "Of the first answer; each other one has the next.", click.IntRange(0, 2**31), 0)
@memory_option()
@cache_options(POLICY, BUDGET)
@context_options()
@click.option("--json", "as_json", is_flag=True, help="Print what is written instead of a table.")
def calibrate(name: str | None, as_json: bool, **values: Any) -> None:
    """Measure which share of the cells each layer of a model should get.

    MODEL is a GGUF file or a short name (default: reasoner). It answers questions with a full cache; beside
    that, evictions are simulated in which the scores of all layers and heads are ranked together. What each
    layer wins on average is stored beside the model, for --kv-layer-budgets calibrated with any policy.
    """
    if name is not None and values["model"] is not None:
        raise click.UsageError(f"two models: {name!r} and --model {values['model']!r}")
    if values["kv_layer_budgets"] is not None:
        raise click.UsageError("--kv-layer-budgets is what is measured here")
    model = resolve(name or values["model"])
    kv = budget_of(values)
    if kv is None:
        raise click.UsageError("policy none keeps everything: there is nothing to share out")
    path = destination(values["output"], model.path)
    questions = lines(values["prompts"])

    from rkv_local.calibrate import QUESTIONS, full_cache
    from rkv_local.calibrate import calibrate as measure
    from rkv_local.cli import nativelog
    from rkv_local.cli.interrupt import Interrupted
    from rkv_local.cli.session import CliError, Interrupt, load

    try:
        full_cache(kv, values["length"])
    except ValueError as err:
        raise click.UsageError(str(err).replace("length is", "--length is")) from err
    held = {"kv_budget": values["length"], "ctx_size": values["length"], "batch_size": kv.buffer}
    options = load_of({**values, **held}, model)
    with Interrupt() as interrupt:
        session = load(options, interrupt)
        llama = session.llama
        if llama.kv is None or llama.kv.budget != values["length"]:
            raise CliError(f"a full cache of {values['length']:,} tokens does not fit: a smaller --length")
        llama.sampling, llama.interrupt = Sampling(temp=values["temp"]), interrupt
        prompts = [prompt_of(session, question) for question in questions or QUESTIONS]
        done = [0, 1]
        nativelog.clear()
        try:
            with ui.progress("calibrating", lambda: (done[0] / done[1], f"{done[0]:,}/{done[1]:,} tokens")):
                made = measure(
                    llama,
                    kv,
                    prompts,
                    values["tokens"],
                    progress=lambda *now: done.__setitem__(slice(2), now),
                )
        except Interrupted:
            raise KeyboardInterrupt from None
        session.close()
    made.save(path)
    click.echo(json.dumps(asdict(made), indent=1) if as_json else table(made, kv))
    ui.line(f"{path}: {made.tokens:,} tokens, {ui.plural(made.compactions, 'compaction')}")
    if path != beside(model.path):
        ui.line(f"use it with --kv-layer-budgets {path}")


def prompt_of(session: Session, question: str) -> list[int]:
    """A question as the model is asked it. Raises CliError."""
    tokens = session.tokenize(session.template.render(Conversation().messages(question)))
    if not tokens:
        from rkv_local.cli.session import CliError

        raise CliError("a prompt has no tokens")
    return tokens


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
    """Shares and budgets by layer."""
    cells = share_out(made.shares, kv.budget, kv.least_budget)
    rows = [
        [str(i), "-", "-"] if share is None else [str(i), f"{share:.1%}", f"{cells[i]:,}"]
        for i, share in enumerate(made.shares)
    ]
    return ui.table(["LAYER", "SHARE", f"CELLS OF {kv.budget:,}"], rows, [True] * 3)
