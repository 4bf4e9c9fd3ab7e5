"""Runs the jobs of quality_plan.py, one after the other, with each model loaded once."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quality_plan import KINDS, LONG, Job
from rkv_local.budget import CALIBRATED, KVBudget
from rkv_local.cli import nativelog, ui
from rkv_local.cli.interrupt import Interrupt
from rkv_local.cli.options import default_threads, flash_of
from rkv_local.evals import divergence, texts
from rkv_local.evals.model import Model, Setting
from rkv_local.evals.results import Config, Results, Store
from rkv_local.evals.runner import Progress, Runner, Stopped, device_name
from rkv_local.evals.tasks import Item, Task, named_reason_task, parts, reason_task
from rkv_local.models import resolve

_NEEDLE_TOKENS = 48  # of an answer
_WAVES = 2  # a job with fewer rounds of sequences is not begun where it would be cut off


@dataclass
class Worker:
    """What the jobs of one process have in common."""

    args: argparse.Namespace
    base: int
    store: Store
    interrupt: Interrupt
    progress: Progress = field(default_factory=Progress)
    started: float = field(default_factory=time.monotonic)
    failed: int = 0
    left_out: int = 0

    def __post_init__(self) -> None:
        self._models: dict[str, Runner] = {}
        self._rates: dict[str, float] = {}  # tokens a second by kind of task
        self._questions: dict[str, Item] | None = None
        self._tasks: dict[tuple[str, str, int], Task] = {}

    def close(self) -> None:
        """Free the models."""
        for runner in self._models.values():
            runner.model.close()

    @property
    def remaining(self) -> float:
        """Seconds until the limit."""
        if self.args.limit_seconds is None:
            return float("inf")
        return float(self.args.limit_seconds - (time.monotonic() - self.started))

    def stop(self) -> bool:
        """Whether to leave off."""
        return self.interrupt.pressed or self.remaining <= 0

    def runner(self, job: Job) -> Runner:
        """The runner of a job's model and cache type."""
        args = self.args
        if job.model not in self._models:
            found = resolve(args.long if job.model == LONG else args.reasoner)
            self._models[job.model] = Runner(
                Model(found.path, args.gpu_layers),
                self.store,
                Setting(threads=args.threads or default_threads()),
                found.name,
                parallel=args.parallel or (256 if args.gpu_layers else 8),
                max_tokens=_NEEDLE_TOKENS if job.model == LONG else args.max_tokens,
                device=device_name(args.gpu_layers),
                progress=self.progress,
                stop=self.stop,
            )
        runner = self._models[job.model]
        flash = flash_of(args.flash_attn, args.gpu_layers, job.cache)
        return replace(
            runner, setting=replace(runner.setting, type_k=job.cache, type_v=job.cache, flash_attn=flash)
        )

    def task(self, job: Job, runner: Runner, n: int) -> Task:
        """What is asked: n problems, or needles."""
        if job.task not in KINDS:
            source, (n_texts, length, n_facts) = texts.source(self.args.text), self.args.needles
            lengths = [len(runner.model.tokenize(p + "\n\n", start=False)) for p in source.paragraphs()]
            return texts.needles(source, lengths, length, n_facts, n_texts)
        key = (job.task, job.split, n)
        if key not in self._tasks:
            self._tasks[key] = self.problems(*key)
        return self._tasks[key]

    def problems(self, kind: str, split: str, n: int) -> Task:
        """n problems of a kind and split. Raises ValueError where the file of questions has fewer."""
        if self.args.questions is None:
            return reason_task(kind, self.families, split, n)
        if self._questions is None:
            self._questions = read_questions(self.args.questions)
        ids = self.ids(kind, split, n)
        for id in ids:
            if id not in self._questions:
                raise ValueError(f"{self.args.questions} has no problem {id}: make it with more --n-problems")
        return named_reason_task(kind, self.families, split, [self._questions[id] for id in ids])

    @property
    def families(self) -> list[str]:
        """Of the reasoner's problems."""
        return [name.strip() for name in self.args.families.split(",")]

    def ids(self, kind: str, split: str, n: int) -> list[str]:
        """The ids of n problems of a kind and split, as reason_task() has them."""
        return [f"{name}/{kind}/{split}/{i}" for name, share in parts(self.families, n) for i in range(share)]

    def budget(self, job: Job, runner: Runner, cells: int) -> KVBudget | None:
        """A job's budget of so many cells. Raises ValueError where the policy cannot have it."""
        if job.policy is None:
            return None
        more: dict[str, Any] = dict(job.fields)
        if job.calibrated:  # the reasoner's lies beside it
            file = self.args.calibrations / f"{Path(runner.name).stem}.rkv.json"
            more["layer_budgets"] = str(file) if job.model == LONG else CALIBRATED
        return KVBudget(budget=cells, policy=job.policy, **more)

    def cells(self, job: Job, runner: Runner) -> int:
        """Cells of a share of the mean trace: of `base` problems, or of those that there are.

        Raises:
            ValueError: a shard does not know it.
        """
        assert job.percent is not None
        f16 = replace(runner, setting=replace(runner.setting, type_k="f16", type_v="f16"))
        n = min(self.args.n_problems, self.base)
        for wanted in (self.base, n):
            items = [Item(id, "", "") for id in self.ids(job.task, "final", wanted)]
            known = named_reason_task(job.task, self.families, "final", items)
            if self.store.mean_trace(f16.config(known.name, None), known.ids) is not None:
                return runner.cells(known, job.percent)
        if self.args.shard[1] > 1:
            raise ValueError(
                f"the full cache's results on {n:,} {job.task} problems are needed: run stage full first, "
                "and give its file with --known"
            )
        return runner.cells(self.task(replace(job, split="final"), runner, n), job.percent)

    def do(self, job: Job) -> str:
        """One job; what came out, in words, or "" where nothing was to be done."""
        runner = self.runner(job)
        if job.task == "kl":
            n_texts, length = self.args.kl
            budgets = [self.budget(job, runner, n) for n in job.cells]
            plan = divergence.Texts(texts.source(self.args.text), length, n_texts)
            return self._timed(job, lambda: divergence.measure(runner, plan, budgets), n_texts * length)
        if job.task == "needles":
            task = self.task(job, runner, 0)
            sizes: Sequence[int] = job.cells or (0,)
        else:
            task = self.task(job, runner, self.args.n_problems)
            sizes = [self.cells(job, runner) if job.percent else 0]
        said = []
        for n in sizes:
            kv = self.budget(job, runner, n)
            done = self.store.done(runner.config(task.name, kv))
            todo = sum(id not in done for id in task.ids)
            estimate = replace(job, cells=()).tokens(todo, self.args.needles, self.args.kl)
            rate = self._rates.get(job.task)
            if todo and todo < _WAVES * runner.parallel and rate and estimate / rate > self.remaining:
                self.left_out += 1
                continue

            def measure(kv: KVBudget | None = kv) -> list[Config]:
                return [runner.run(task, kv, job.percent)]

            said.append(self._timed(job, measure, estimate) if todo else "")
            if self.stop():
                break
        return "; ".join(filter(None, said))

    def _timed(self, job: Job, measure: Callable[[], list[Config]], tokens: int) -> str:
        begun = time.monotonic()
        configs = measure()
        seconds = time.monotonic() - begun
        if not self.stop() and seconds > 0:
            self._rates[job.task] = tokens / seconds
        words = []
        for config in configs:
            rows = list(self.store.done(config).values())
            if rows and "ok" in rows[0]:
                words.append(f"{sum(r['ok'] for r in rows)}/{len(rows)} right")
            elif rows:
                words.append(f"{config.budget or 'full'}: {sum(r['kl'] for r in rows) / len(rows):.4f} nats")
        return f"{', '.join(words)}, {seconds:.0f} s"


def read_questions(path: Path) -> dict[str, Item]:
    """Items of a file that `quality.py questions` wrote. Raises ValueError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["id"]: Item(row["id"], row["question"], row["answer"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no file of `quality.py questions`") from None


def work(jobs: Sequence[Job], args: argparse.Namespace, base: int, known: Results) -> int:
    """Do jobs until all are done or the time is over; 1 where one failed, 130 after Ctrl-C."""
    nativelog.install(False)
    with Interrupt() as interrupt, Store(args.output, known) as store:
        worker = Worker(args, base, store, interrupt)
        try:
            with ui.progress("quality", worker.progress.state):
                for i, job in enumerate(jobs, 1):
                    if worker.stop():
                        break
                    one(worker, job, f"{i}/{len(jobs)} {job.stage}: {job}")
        finally:
            worker.close()
        if interrupt.pressed:
            say(f"stopped; the same command continues {args.output}")
            return 130
        if worker.remaining <= 0 or worker.left_out:
            say(f"the time is over; the same command continues {args.output}")
    return 1 if worker.failed else 0


def one(worker: Worker, job: Job, label: str) -> None:
    """A job; what its policy or the engine refuses is told, and the others go on."""
    try:
        with contextlib.suppress(Stopped):
            said = worker.do(job)
            if said:
                say(f"{label}: {said}")
    except RuntimeError as err:  # what the engine refuses, or has no room for
        worker.failed += 1
        say(f"{label}: error: {err}")
    except ValueError as err:
        if job.calibrated:  # there is no calibration
            worker.failed += 1
            say(f"{label}: error: {err}")
            return
        if not str(err).startswith(("budget is", "pin is")):
            raise
        say(f"{label}: left out: {err}")


def say(text: str) -> None:
    """A line that stays, above the progress."""
    if ui.is_terminal(sys.stderr):
        sys.stderr.write(ui.ERASE)
    ui.line(text)
