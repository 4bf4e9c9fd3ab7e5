"""rkv-local eval: what a budget changes about answers, and the report on it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.cli import ui
from rkv_local.cli.eval_options import (
    EXISTING,
    FILE,
    Budget,
    Words,
    budgets_of,
    common_options,
    generation_options,
)
from rkv_local.cli.interrupt import Interrupt
from rkv_local.cli.options import default_threads, flash_of
from rkv_local.cli.params import AT_LEAST_1, opt
from rkv_local.evals.problems import FAMILIES, KINDS, SPLITS
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local.evals.results import Config, Store
    from rkv_local.evals.runner import Runner
    from rkv_local.evals.tasks import Task


class InOrder(click.Group):
    """Lists its commands as they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(self.commands)


@click.group("eval", cls=InOrder)
def eval() -> None:
    """Measure what a budget changes about a model's answers.

    Results go to a JSON Lines file (-o), one line for each problem as it is finished: a command that is
    repeated continues where it was stopped. `report` makes tables and plots of such files.
    """


@eval.command("reason")
@opt("--kind", f"Kinds of problems: {', '.join(KINDS)}, all.", Words(KINDS), "all", "KIND,...")
@opt(
    "--family",
    f"Families of problems: {', '.join(FAMILIES)}, all; gym needs reasoning-gym.",
    Words(tuple(FAMILIES)),
    "chain,digits",
    "NAME,...",
)
@opt(
    "--split",
    "Which problems: those for training, for development, or the final ones.",
    click.Choice(tuple(SPLITS)),
    "dev",
    None,
)
@opt("--n-problems", "Problems of each kind, in equal parts of the families.", AT_LEAST_1, 100)
@generation_options(4096)
@common_options()
def reason(**values: Any) -> None:
    """The embedded reasoner's problems: long traces, one right answer.

    The answer after </think> is compared with the right one, case and blanks aside.
    """
    from rkv_local.evals.tasks import reason_task

    tasks = [reason_task(k, values["family"], values["split"], values["n_problems"]) for k in values["kind"]]
    run_tasks(tasks, values)


@eval.command("jsonl")
@click.argument("file", type=EXISTING)
@opt("--n-problems", "The first N questions (default: all).", AT_LEAST_1)
@opt(
    "--compare",
    "math: the same mathematically (needs math-verify); text: case and blanks aside; mention: it occurs.",
    click.Choice(("math", "text", "mention")),
    "math",
    None,
)
@opt("--instruction", 'What follows each question ("": nothing).', str, None, "TEXT")
@opt("-sys --system-prompt", "The system prompt.", str, "", "TEXT")
@generation_options(8192)
@common_options()
def jsonl(file: Path, **values: Any) -> None:
    """Questions of a JSON Lines FILE: MATH-500, AIME, GSM8K, your own.

    Each line has question, problem or prompt, and answer or solution: plain, after ####, or in a \\boxed{}.
    """
    from rkv_local.evals.tasks import INSTRUCTION, jsonl_task

    instruction = values["instruction"]
    if instruction is None:
        instruction = INSTRUCTION if values["compare"] == "math" else ""
    task = jsonl_task(file, values["n_problems"], values["compare"], instruction, values["system_prompt"])
    run_tasks([task], values)


@eval.command("needles")
@opt("--text", "A UTF-8 text to read (default: Python's language reference).", EXISTING, None, "FILE")
@opt("--tokens", "Length of a text without its facts.", AT_LEAST_1, 2048)
@opt("--depths", "Facts in a text, at as many depths.", click.IntRange(1, 12), 6)
@opt("--n-texts", "Texts, one after the other.", AT_LEAST_1, 4)
@generation_options(48)
@common_options(percent=False)
def needles(text: Path | None, **values: Any) -> None:
    """Facts planted in a long text, each asked for in other words after all of it.

    A text is read once; each question continues a copy of what the cache then holds.
    """
    from rkv_local.evals import texts

    def tasks(runner: Runner) -> list[Task]:
        source = texts.source(text)
        lengths = [len(runner.model.tokenize(p + "\n\n", start=False)) for p in source.paragraphs()]
        counts = values["tokens"], values["depths"], values["n_texts"]
        return [texts.needles(source, lengths, *counts, seed=values["seed"])]

    run_tasks(tasks, values)


@eval.command("kl")
@opt("--text", "A UTF-8 text to read (default: Python's language reference).", EXISTING, None, "FILE")
@opt("--tokens", "Length of a text.", click.IntRange(2), 4096)
@opt("--n-texts", "Texts, one after the other.", AT_LEAST_1, 4)
@opt("--step", "Tokens in one decode; divides 256.", AT_LEAST_1, 16)
@common_options(percent=False)
def kl(text: Path | None, **values: Any) -> None:
    """Next-token distributions against the full cache's, over a long text.

    Mean KL divergence in nats and the share of positions with the same likeliest token. Full cache (f16) and
    all budgets read the text side by side, a few tokens at a time.
    """
    from rkv_local.evals import divergence, texts

    def work(runner: Runner) -> list[Config]:
        plan = divergence.Texts(texts.source(text), values["tokens"], values["n_texts"], values["step"])
        budgets = [made for made, _ in budgets_of(values, lambda b: int(b.value))]
        return divergence.measure(runner, plan, budgets)

    run({**values, "max_tokens": 1, "temp": 0.0, "seed": 0, "parallel": 1}, work)


@eval.command("report")
@click.argument("files", nargs=-1, required=True, type=EXISTING)
@opt("-o --output", "Where the Markdown goes (default: stdout).", FILE, None, "FILE")
@opt(
    "--plots",
    "A folder for plots; needs matplotlib.",
    click.Path(path_type=Path, file_okay=False),
    None,
    "DIR",
)
@opt(
    "--default",
    "What the verdict is about, named as in the tables (default: KVBudget's policy).",
    str,
    None,
    "NAME",
)
@opt("--published", "What it is compared with.", str, "rkv", "NAME")
@click.option("--json", is_flag=True, help="Print the summary rows as JSON instead.")
def report(files: Sequence[Path], **values: Any) -> None:
    """Tables and plots of result files, as Markdown."""
    from rkv_local.evals import report as made
    from rkv_local.evals.results import read
    from rkv_local.evals.summary import summaries

    results = read(files)
    rows = summaries(results)
    if values["json"]:
        click.echo(json.dumps(rows, indent=2))
        return
    plots, note = None, ""
    if values["plots"] is not None:
        from rkv_local.evals import plots as drawn

        if drawn.available():
            plots = drawn.draw(rows, values["plots"], values["output"])
        else:
            note = made.NO_PLOTS
            ui.line(note)
    text = made.page(rows, values["default"], plots, values["published"], note)
    if values["output"] is None:
        click.echo(text, nl=False)
    else:
        values["output"].write_text(text, encoding="utf-8")


def run_tasks(tasks: Sequence[Task] | Callable[[Runner], Sequence[Task]], values: dict[str, Any]) -> None:
    """Run tasks under every policy and budget; tasks: or what makes them once the model is loaded."""

    def work(runner: Runner) -> list[Config]:
        configs: list[Config] = []
        for task in tasks(runner) if callable(tasks) else tasks:
            choices = budgets_of(values, lambda b, task=task: sized(runner, task, b))  # type: ignore[misc]
            for kv, percent in choices:
                config = runner.run(task, kv, percent)
                if config not in configs:
                    configs.append(config)
                if runner.stop():
                    return configs
        return configs

    run(values, work)


def sized(runner: Runner, task: Task, budget: Budget) -> int:
    """Cells of a budget; a share of the mean trace may have to be measured first."""
    if not budget.percent:
        return int(budget.value)
    if task.name["task"] == "needles":
        raise click.UsageError("--kv-budget in percent is for tasks with traces: give cells")
    return runner.cells(task, budget.value)


def run(values: dict[str, Any], work: Callable[[Runner], list[Config]]) -> None:
    """Load the model, do the work with progress on stderr, print the summary.

    After Ctrl-C the exit code is 130, and what is finished is stored.
    """
    if any(b.percent for b in values["kv_budget"]) and "kind" not in values and "compare" not in values:
        raise click.UsageError("--kv-budget in percent is for tasks with traces: give cells")
    gpu_layers = -1 if values["gpu_layers"] is None else values["gpu_layers"]
    flash_attn = flash_of(values["flash_attn"], gpu_layers, values["cache_type_v"])
    found = resolve(values["model"])

    from rkv_local.cli import nativelog
    from rkv_local.evals.model import Model, Setting
    from rkv_local.evals.results import Store
    from rkv_local.evals.runner import Progress, Runner, Stopped, device_name

    nativelog.install(values["verbose"])
    nativelog.clear()
    configs: list[Config] = []
    with Interrupt() as interrupt, Store(values["output"]) as store:
        try:
            with Model(found.path, gpu_layers) as model:
                runner = Runner(
                    model,
                    store,
                    Setting(
                        type_k=values["cache_type_k"],
                        type_v=values["cache_type_v"],
                        flash_attn=flash_attn,
                        threads=values["threads"] or default_threads(),
                        kv_offload=not values["no_kv_offload"],
                    ),
                    found.name,
                    parallel=values["parallel"],
                    max_tokens=values["max_tokens"],
                    temp=values["temp"],
                    seed=values["seed"],
                    device=device_name(gpu_layers),
                    progress=Progress(),
                    stop=lambda: interrupt.pressed,
                )
                with ui.progress("eval", runner.progress.state), contextlib.suppress(Stopped):
                    configs = work(runner)
        except RuntimeError as err:
            raise RuntimeError(nativelog.reason(str(err), found.name)) from err
        if interrupt.pressed:
            if values["output"]:
                ui.line(f"stopped; the same command continues {values['output']}")
            click.get_current_context().exit(130)
        say(store, configs, values["json"])


def say(store: Store, configs: Sequence[Config], as_json: bool) -> None:
    """The summary of these configurations on stdout."""
    from rkv_local.evals.report import overview
    from rkv_local.evals.summary import summaries

    keys = [config.key for config in configs]
    rows = sorted((r for r in summaries(store) if r["config"] in keys), key=lambda r: keys.index(r["config"]))
    click.echo(json.dumps(rows, indent=2) if as_json else overview(rows))
