"""Runs tasks under budgets and stores what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

from rkv_local import _native
from rkv_local.budget import CALIBRATED, KVBudget
from rkv_local.devices import list_devices

from .decode import Batcher, Request
from .model import Context, Model, Setting, Tokens
from .results import Config, Store, kv_fields
from .tasks import Group, Item, Task

__all__ = ["Progress", "Runner", "Stopped"]

_MARK = "\x1e"  # record separator: stands where a group's text ends while its template is rendered


class Stopped(Exception):
    """A measurement that something else needs was stopped."""


@dataclass
class Progress:
    """How far a run is; all counts are of the configuration that runs now.

    done, total: problems, or tokens of a text; correct: None where nothing is right or wrong.
    """

    label: str = ""
    done: int = 0
    total: int = 0
    correct: int | None = None
    started: float = 0.0
    batcher: Batcher | None = None

    def state(self) -> tuple[float, str]:
        """For ui.progress."""
        if not self.total:
            return 0.0, "starting"
        seconds = max(time.monotonic() - self.started, 1e-9)
        tokens = self.batcher.n_generated if self.batcher else 0
        speed = f", {tokens / seconds:,.0f} tok/s" if tokens else ""
        right = f", {self.correct} right" if self.done and self.correct is not None else ""
        return self.done / self.total, f"{self.label}: {self.done:,}/{self.total:,}{right}{speed}"


@dataclass
class Runner:
    """A model and everything that configurations have in common.

    setting: of every context, but for kv, n_ctx and n_seq. parallel: sequences at once. stop: asked often;
    True ends a run early, with what is finished stored.
    """

    model: Model
    store: Store
    setting: Setting
    name: str
    parallel: int = 1
    max_tokens: int = 4096
    temp: float = 0.0
    seed: int = 0
    device: str = "CPU"
    progress: Progress = field(default_factory=Progress)
    stop: Callable[[], bool] = lambda: False

    def config(self, task: dict[str, Any], kv: KVBudget | None, percent: float | None = None) -> Config:
        """The configuration of a task under a budget.

        Raises:
            ValueError: layer budgets are calibrated, and there is no calibration of this model.
        """
        found = self.resolved(kv)
        fields = kv_fields(found, self.model.n_layer)
        if fields and found is not kv:
            fields["schedule"] = CALIBRATED
        return Config(
            model=self.name,
            sha256=self.model.sha256,
            task=task,
            kv=fields,
            type_k=self.setting.type_k,
            type_v=self.setting.type_v,
            max_tokens=self.max_tokens,
            temp=self.temp,
            seed=self.seed,
            percent=percent,
        )

    def resolved(self, kv: KVBudget | None) -> KVBudget | None:
        """With numbers in place of calibrated layer budgets."""
        return kv.for_model(self.model.path, self.model.n_layer) if kv is not None else None

    def context(
        self, config: Config, kv: KVBudget | None, n_ctx: int, n_seq: int, n_outputs: int | None = None
    ) -> Context:
        """A context of this configuration, told to the store."""
        setting = replace(self.setting, kv=kv, n_ctx=n_ctx, n_seq=n_seq, n_outputs=n_outputs)
        context = Context(self.model, setting)
        try:
            self.store.begin(config, self.about(context))
        except BaseException:
            context.close()
            raise
        return context

    def about(self, context: Context) -> dict[str, Any]:
        """What a configuration runs on."""
        try:
            version = metadata.version("rkv-local")
        except metadata.PackageNotFoundError:
            version = "source"
        return {
            "bytes": context.bytes,
            "cells": context.cells,
            "parallel": context.n_seq,
            "device": self.device,
            "flash_attn": {True: "on", False: "off", None: "auto"}[context.setting.flash_attn],
            "versions": {"rkv-local": version, "build": _native.build_info()},
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
        }

    def cells(self, task: Task, percent: float) -> int:
        """A share of the full f16 cache's mean trace, which is measured first where it is not known.

        Raises:
            Stopped: `stop` was true before it was known. ValueError: the answers have no tokens.
        """
        plain = replace(self, setting=replace(self.setting, type_k="f16", type_v="f16"))
        full = plain.config(task.name, None)
        mean = self.store.mean_trace(full, task.ids)
        if mean is None:
            plain.run(task, None)
            mean = self.store.mean_trace(full, task.ids)
        if mean is None:
            raise Stopped
        if mean == 0:
            raise ValueError(
                f"{task.title}: the full cache's answers have no tokens, of which no share can be taken"
            )
        return max(1, round(mean * percent / 100))

    def run(self, task: Task, kv: KVBudget | None, percent: float | None = None) -> Config:
        """Answer what the store has no result for.

        Raises:
            ValueError: a prompt without tokens. RKVError, RuntimeError: the engine refuses.
        """
        config = self.config(task.name, kv, percent)
        done = self.store.done(config)
        rows = [done[id] for id in task.ids if id in done]
        todo = [(group, [item for item in group.items if item.id not in done]) for group in task.groups]
        todo = [(group, items) for group, items in todo if items]
        self.progress.total, self.progress.done = len(task.ids), len(rows)
        self.progress.correct = sum(row["ok"] for row in rows)
        self.progress.label = describe(config)
        self.progress.started, self.progress.batcher = time.monotonic(), None
        if not todo:
            return config
        prompts = [self._prompts(task, group, items) for group, items in todo]
        longest = max(len(base) + len(p) for base, tails in prompts for p in tails)
        based = int(any(len(base) for base, _ in prompts))
        n_seq = based + min(self.parallel, max(len(items) for _, items in todo))
        with self.context(config, kv, longest + self.max_tokens, n_seq) as context:
            self.progress.batcher = batcher = Batcher(
                context, self.max_tokens, self.temp, self.seed, based, self.stop
            )
            for (_, items), (base, tails) in zip(todo, prompts, strict=True):
                if len(base):
                    batcher.base(0, base)
                source = 0 if len(base) else None
                by_id = {item.id: item for item in items}
                opened = self.model.opened(tails[0])
                requests = [Request(i.id, t, source) for i, t in zip(items, tails, strict=True)]
                for answer in batcher.run(requests):
                    item = by_id[answer.id]
                    self._store(config, task, item, opened + answer.text, answer.n_tokens, answer.stopped)
                if self.stop():
                    break
        return config

    def _store(self, config: Config, task: Task, item: Item, text: str, n: int, stopped: bool) -> None:
        right, said = task.grade(text, item.answer)
        fields: dict[str, Any] = {"ok": int(right), "n": n, "answer": said, **item.fields}
        if not stopped:
            fields["limit"] = 1
        self.store.add(config, item.id, **fields)
        self.progress.done += 1
        self.progress.correct = (self.progress.correct or 0) + right

    def _prompts(self, task: Task, group: Group, items: Sequence[Item]) -> tuple[Tokens, list[Tokens]]:
        """Tokens of what the questions have in common, and of what follows it for each."""
        if not group.text:
            return self.model.tokenize("", start=False), [
                self.model.prompt(item.question, task.system) for item in items
            ]
        head, tails = "", []
        for item in items:
            messages = [{"role": "system", "content": task.system}] if task.system else []
            user = {"role": "user", "content": f"{group.text}{_MARK}{item.question}"}
            head, _, tail = self.model.template.render([*messages, user]).partition(_MARK)
            tails.append(self.model.tokenize(tail, start=False))
        return self.model.tokenize(head), tails


def describe(config: Config) -> str:
    """A configuration in a few words: policy, cells, cache type where it is not f16."""
    text = config.policy if config.kv is None else f"{config.policy} {config.budget:,}"
    if (config.type_k, config.type_v) != ("f16", "f16"):
        text += f" {config.type_k}" if config.type_k == config.type_v else f" {config.type_k}/{config.type_v}"
    return text


def device_name(gpu_layers: int) -> str:
    """What the model is computed on, in words."""
    gpus = [d.description for d in list_devices() if d.is_gpu] if gpu_layers else []
    return ", ".join(gpus) or "CPU"
