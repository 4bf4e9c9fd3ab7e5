"""One row for each configuration, computed from its problems."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rkv_local.budget import BY_ITSELF, CALIBRATED, POLICIES, KVBudget

from .results import Config, Results
from .stats import mean_interval, wilson

__all__ = ["Section", "column", "sections", "summaries", "variant"]

Row = dict[str, Any]
BUCKET = 256  # positions that one KL result is a mean over

_ORDER = [BY_ITSELF, *(name for name in POLICIES if name != BY_ITSELF)]
_SHORT = {"lam": "λ", "buffer": "S", "window": "α"}


def variant(kv: Row | None) -> str:
    """A policy and those of its parameters that are not KVBudget's defaults: "rkv λ=0.5"."""
    if kv is None:
        return "full cache"
    usual = defaults(kv["policy"])
    words = []
    fields: Row = {"value_weight": 0.0, **kv}
    for name, value in fields.items():
        if name == "schedule":
            if (kv["policy"], value) != (BY_ITSELF, CALIBRATED):
                words.append(f"layers={value}")
        elif name == "batch":
            if value != max(kv["buffer"], 256):
                words.append(f"batch={value}")
        elif name == "layer_budgets":
            if value == "uniform" and kv["policy"] == BY_ITSELF:
                words.append("layers=uniform")
        elif name not in ("policy", "budget") and value not in (usual.get(name, False), None, "uniform"):
            shown = f"={value:g}" if isinstance(value, float) else f"={value}"
            words.append(_SHORT.get(name, name) + ("" if value is True else shown))
    return " ".join([str(kv["policy"]), *words])


def rank(label: str) -> tuple[int, list[tuple[str, float, str]]]:
    """What variants are sorted by: the default policy first, others as POLICIES has them, then parameters."""
    policy, *words = label.split()
    parts = []
    for word in words:
        name, _, value = word.partition("=")
        try:
            parts.append((name, float(value), ""))
        except ValueError:
            parts.append((name, math.inf, value))
    return _ORDER.index(policy) if policy in _ORDER else len(_ORDER), parts


@functools.cache
def defaults(policy: str) -> Row:
    """KVBudget's fields under a policy where nothing else is said; of an unknown one those of the default."""
    return asdict(KVBudget(policy=policy)) if policy in POLICIES else asdict(KVBudget())


def summaries(results: Results) -> list[Row]:
    """Rows in the order in which their configurations were begun; those without problems are left out."""
    return [summary(results, config) for config in results.configs.values() if results.done(config)]


def summary(results: Results, config: Config) -> Row:
    """Everything about one configuration that a report shows."""
    problems = list(results.done(config).values())
    runs = results.runs.get(config.key, [])
    last = runs[-1] if runs else {}
    row: Row = {
        "config": config.key,
        "model": config.model,
        "sha256": config.sha256,
        "task": config.task,
        "policy": config.policy,
        "variant": variant(config.kv),
        "kv": config.kv,
        "type_k": config.type_k,
        "type_v": config.type_v,
        "budget": config.budget,
        "asked_percent": config.percent,
        "cells": last.get("cells"),
        "bytes": last.get("bytes"),
        "limit": config.max_tokens,
        "temp": config.temp,
        "seed": config.seed,
        "seconds": round(sum(p.get("s", 0.0) for p in problems), 1),
        "parallel": last.get("parallel"),
        "device": sorted({r["device"] for r in runs if "device" in r}),
        "versions": sorted({json.dumps(r.get("versions", {}), sort_keys=True) for r in runs}),
        "date": last.get("date"),
    }
    return row | (divergence(config, problems) if config.task["task"] == "kl" else answers(results, config))


def answers(results: Results, config: Config) -> Row:
    """Of tasks with right and wrong answers."""
    problems = results.done(config)
    rows = list(problems.values())
    n, correct = len(rows), sum(r["ok"] for r in rows)
    low, high = wilson(correct, n)
    mean = results.mean_trace(config) if config.task["task"] != "needles" else None
    full = results.full_accuracy(config)
    made: Row = {
        "problems": n,
        "correct": correct,
        "accuracy": correct / n,
        "low": low,
        "high": high,
        "full_accuracy": full,
        "mean_tokens": sum(r["n"] for r in rows) / n,
        "max_tokens": max(r["n"] for r in rows),
        "limit_share": sum(r.get("limit", 0) for r in rows) / n,
        "mean_trace": mean,
        "budget_percent": 100 * config.budget / mean if config.budget and mean else None,
    }
    if config.task["task"] == "reason" and len(config.task["families"]) > 1:
        made["families"] = counts((r["id"].split("/")[0], r["ok"]) for r in rows)
    if config.task["task"] == "needles":
        made["depths"] = counts((f"{r['depth']:.3f}", r["ok"]) for r in rows)
    return made


def counts(pairs: Any) -> dict[str, list[int]]:
    """{what: [right, of how many]}, sorted."""
    found: dict[str, list[int]] = {}
    for key, ok in pairs:
        entry = found.setdefault(key, [0, 0])
        entry[0] += ok
        entry[1] += 1
    return dict(sorted(found.items()))


def divergence(config: Config, rows: Sequence[Row]) -> Row:
    """Of KL results: means over the second half of the texts, with intervals over buckets."""
    half = config.task["tokens"] // 2
    late = [r for r in rows if int(r["id"].split("@")[1]) >= half] or list(rows)
    kl, kl_low, kl_high = mean_interval([r["kl"] for r in late])
    top1, low, high = mean_interval([r["top1"] for r in late])
    return {
        "positions": sum(r["n"] for r in late),
        "from_position": half,
        "kl": kl,
        "kl_low": max(0.0, kl_low),
        "kl_high": kl_high,
        "top1": top1,
        "top1_low": low,
        "top1_high": min(1.0, high),
        "nll": mean_interval([r["nll"] for r in late])[0],
        "nll_full": mean_interval([r["nll_full"] for r in late])[0],
    }


def column(row: Row) -> tuple[int, float]:
    """What rows of the same budget have in common, in ascending order; a full cache comes last."""
    if row["kv"] is None:
        return 2, 0.0
    asked = row["asked_percent"]
    return (0, float(asked)) if asked is not None else (1, float(row["budget"]))


class Section:
    """Rows of one task, model and way of sampling, which may be compared with each other."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.task: Row = rows[0]["task"]
        self.kind = str(self.task["task"])

    @property
    def columns(self) -> list[tuple[int, float]]:
        """The budgets that there are, without the full cache."""
        return sorted({column(r) for r in self.rows if r["kv"] is not None})

    @property
    def full(self) -> Row | None:
        """The full cache, f16 if there is one."""
        found = [r for r in self.rows if r["kv"] is None]
        return min(found, key=lambda r: (r["type_k"], r["type_v"]) != ("f16", "f16"), default=None)

    def of_types(self, type_k: str = "f16", type_v: str = "f16") -> list[Row]:
        """Rows with these types of keys and values."""
        return [r for r in self.rows if (r["type_k"], r["type_v"]) == (type_k, type_v)]

    @functools.cached_property
    def variants(self) -> dict[str, set[tuple[int, float]]]:
        """Budgets of every variant with f16 keys and values, in the order of rank()."""
        seen: dict[str, set[tuple[int, float]]] = {}
        for row in sorted(self.of_types(), key=lambda row: rank(row["variant"])):
            if row["kv"] is not None:
                seen.setdefault(row["variant"], set()).add(column(row))
        return seen

    def base(self, label: str) -> str:
        """The variant of a policy that others are compared with: its defaults, else the most measured.

        Of as many measured that with the fewest changes.
        """
        policy = label.partition(" ")[0]
        seen = {name: cols for name, cols in self.variants.items() if name.partition(" ")[0] == policy}
        if policy in seen or not seen:
            return policy
        return max(seen, key=lambda name: (len(seen[name]), -len(name.split())))

    def find(self, label: str, column_: tuple[int, float], rows: Sequence[Row] | None = None) -> Row | None:
        """The row of a variant and a budget, with f16 keys and values unless rows are given."""
        found = [
            row
            for row in (self.of_types() if rows is None else rows)
            if row["variant"] == label and column(row) == column_
        ]
        # a share of mean traces that differ a little is two budgets: the one that was measured more
        return max(found, key=lambda row: row.get("problems", 0), default=None)

    @property
    def problems(self) -> int:
        """How many the rows have, at most; 0 where nothing is right or wrong."""
        return max(row.get("problems", 0) for row in self.rows)


def sections(rows: Sequence[Row]) -> list[Section]:
    """Rows by task, in a fixed order: reason, jsonl, needles, kl; then as they came."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        shared = [row["sha256"], row["task"], row["limit"], row["temp"], row["seed"]]
        groups.setdefault(json.dumps(shared, sort_keys=True), []).append(row)
    order = ["reason", "jsonl", "needles", "kl"]
    return sorted((Section(g) for g in groups.values()), key=lambda s: order.index(s.kind))
