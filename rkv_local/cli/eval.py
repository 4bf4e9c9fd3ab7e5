"""rkv-local eval: what a budget changes about answers, and the report on it."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.budget import POLICIES
from rkv_local.cli import ui
from rkv_local.cli.interrupt import Interrupt
from rkv_local.cli.options import budget_of, default_threads, flash_of
from rkv_local.cli.params import (
    AT_LEAST_1,
    Decorator,
    FiniteRange,
    Sequences,
    cache_options,
    context_options,
    list_policies,
    model_option,
    opt,
    stack,
)
from rkv_local.models import resolve

if TYPE_CHECKING:
    from rkv_local.budget import KVBudget
    from rkv_local.evals.results import Config, Store
    from rkv_local.evals.runner import Runner
    from rkv_local.evals.tasks import Task

FILE = click.Path(path_type=Path, dir_okay=False)
EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)


class Policies(click.ParamType):
    """Names of policies with commas between them, or `list`."""

    name = "policy,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of names; 'list' as it is."""
        if value == "list" or not isinstance(value, str):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in names:
            if name not in POLICIES:
                self.fail(f"{name!r} is not one of {', '.join(POLICIES)}, list", param, ctx)
        return names


@dataclass(frozen=True)
class Budget:
    """Cells, or a percentage of the mean trace."""

    value: float
    percent: bool = False


class Budgets(click.ParamType):
    """Numbers of cells, or percentages of the mean trace, with commas between them."""

    name = "n|n%,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of Budget."""
        if not isinstance(value, str):
            return value
        found = []
        for part in (p.strip() for p in value.split(",")):
            try:
                share = part.endswith("%")
                number = float(part[:-1]) if share else int(part)
                if not 0 < number < (10_000 if share else 2**31):
                    raise ValueError
            except ValueError:
                self.fail(
                    f"{part!r} is neither a number of cells nor a percentage of the mean trace", param, ctx
                )
            found.append(Budget(number, share))
        return tuple(dict.fromkeys(found))


class Field(click.ParamType):
    """NAME=VALUE,...: a field of KVBudget and one value or several."""

    name = "name=value,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(name, tuple of values)."""
        from rkv_local.budget import KVBudget

        if not isinstance(value, str):
            return value
        name, _, text = value.partition("=")
        names = [f.name for f in fields(KVBudget) if f.name not in ("policy", "budget", "batch")]
        if name not in names:
            self.fail(f"{value!r} does not begin with one of {', '.join(names)} and =", param, ctx)
        return name, tuple(dict.fromkeys(literal(part.strip()) for part in text.split(",")))


def literal(text: str) -> Any:
    """A number, true, false, or the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Words(click.ParamType):
    """Names with commas between them; all: those that there are."""

    name = "name,..."

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A tuple of names."""
        if not isinstance(value, str):
            return value
        if value == "all":
            return tuple(self.names)
        found = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in found:
            if name not in self.names:
                self.fail(f"{name!r} is not one of {', '.join(self.names)}, all", param, ctx)
        return found


def other_cache_options() -> Decorator:
    """The options of a budget but for policy and size, which are lists here."""

    def bare() -> None: ...

    options = reversed(cache_options()(bare).__click_params__)
    kept = [p for p in options if p.name not in ("kv_policy", "kv_budget")]

    def decorate(function: Any) -> Any:
        params = function.__dict__.setdefault("__click_params__", [])
        params.extend(reversed(kept))
        return function

    return decorate


def common_options(percent: bool = True) -> Decorator:
    """What all measurements have. percent: whether budgets may be shares of the mean trace."""
    sizes = "Cells that a sequence keeps, with commas between them"
    if percent:
        sizes += "; N%: of the full cache's mean trace, which is measured where it is not known"
    return stack(
        model_option(),
        opt(
            "--kv-policy",
            "What is kept, with commas between them; none: a full cache; `list` explains them.",
            Policies(),
            "none,rkv",
            "POLICY,...",
            callback=list_policies,
            is_eager=True,
        ),
        opt("--kv-budget", f"{sizes}.", Budgets(), "1024", "N,..."),
        other_cache_options(),
        opt(
            "--kv-set",
            "Set a field of KVBudget, for ablations; several values or fields make all combinations.",
            Field(),
            None,
            "NAME=VALUE,...",
            multiple=True,
        ),
        opt(
            "-b --batch-size",
            "Most tokens of a prompt in one decode (default: the larger of the buffer and 256).",
            AT_LEAST_1,
        ),
        context_options(),
        opt(
            "-o --output",
            "JSON Lines file to which every result is appended; what is in it already is not run again.",
            FILE,
            None,
            "FILE",
        ),
        click.option("--json", is_flag=True, help="Print the summary as JSON instead of a table."),
    )


def generation_options(limit: int, parallel: int = 8) -> Decorator:
    """How answers are made."""
    return stack(
        opt("-np --parallel", "Sequences at once.", Sequences(), parallel),
        opt("-n --max-tokens --predict --n-predict --limit", "Most tokens in an answer.", AT_LEAST_1, limit),
        opt("--temp --temperature", "0 = always the likeliest token.", FiniteRange(min=0), 0.0, "X"),
        opt("-s --seed", "Of the sampling.", click.IntRange(0, 2**32 - 1), 0),
    )


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
@opt("--kind", "Kinds of problems: dense, sparse, all.", Words(("dense", "sparse")), "all", "KIND,...")
@opt(
    "--family",
    "Families of problems: chain, digits, gym (needs reasoning-gym), all.",
    Words(("chain", "digits", "gym")),
    "chain,digits",
    "NAME,...",
)
@opt(
    "--split",
    "Which problems: those for training, for development, or the final ones.",
    click.Choice(("train", "dev", "final")),
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


def budgets_of(
    values: dict[str, Any], cells: Callable[[Budget], int]
) -> list[tuple[KVBudget | None, float | None]]:
    """(budget, percentage asked for) of every configuration, the full cache first.

    Raises:
        click.UsageError: a budget that a policy cannot have.
    """
    made: list[tuple[KVBudget | None, float | None]] = []
    if "none" in values["kv_policy"]:
        made.append((None, None))
    policies = [p for p in values["kv_policy"] if p != "none"]
    for budget in values["kv_budget"] if policies else ():
        n = cells(budget)
        for policy in policies:
            try:
                kv = budget_of({**values, "kv_policy": policy, "kv_budget": n}, values["batch_size"])
                assert kv is not None
                changed = variations(kv, values["kv_set"])
            except click.UsageError as err:
                if not budget.percent:
                    raise
                ui.line(f"left out: {policy} with {n} cells ({budget.value:g} %): {err.message}")
                continue
            made += [(each, budget.value if budget.percent else None) for each in changed]
    return made


def variations(kv: KVBudget, sets: Sequence[tuple[str, tuple[Any, ...]]]) -> list[KVBudget]:
    """A budget with all combinations of --kv-set."""
    names = [name for name, _ in sets]
    try:
        return [
            replace(kv, **dict(zip(names, combination, strict=True)))
            for combination in itertools.product(*(choices for _, choices in sets))
        ]
    except (ValueError, TypeError) as err:
        raise click.UsageError(f"--kv-set: {err}") from err


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
