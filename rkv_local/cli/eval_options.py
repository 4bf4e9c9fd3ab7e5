"""The options of rkv-local eval, and the budgets that they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkv_local.budget import POLICIES
from rkv_local.cli import ui
from rkv_local.cli.options import budget_of
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

if TYPE_CHECKING:
    from rkv_local.budget import KVBudget

FILE = click.Path(path_type=Path, dir_okay=False)
EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)
_ANY = 1 << 20  # cells: more than any field asks for


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
            "none,latest,rkv",
            "POLICY,...",
            callback=list_policies,
            is_eager=True,
        ),
        opt("--kv-budget", f"{sizes}.", Budgets(), "1024", "N,..."),
        cache_options("kv_policy", "kv_budget"),
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


def budgets_of(
    values: dict[str, Any], cells: Callable[[Budget], int]
) -> list[tuple[KVBudget | None, float | None]]:
    """(budget, percentage asked for) of every configuration, the full cache first.

    Raises:
        click.UsageError: a budget that a policy cannot have, or a field's value that no policy takes.
    """
    made: list[tuple[KVBudget | None, float | None]] = []
    if "none" in values["kv_policy"]:
        made.append((None, None))
    policies = [p for p in values["kv_policy"] if p != "none"]
    takes = variations(values, policies)
    for budget in values["kv_budget"] if policies else ():
        n = cells(budget)
        for policy in policies:
            try:
                changed = [with_fields(values, policies, policy, n, fields) for fields in takes[policy]]
            except click.UsageError as err:
                if not budget.percent:
                    raise
                ui.line(f"left out: {policy} with {n} cells ({budget.value:g} %): {err.message}")
                continue
            made += [(each, budget.value if budget.percent else None) for each in changed]
    return made


def variations(values: dict[str, Any], policies: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The combinations of --kv-set that each policy takes, whatever the budget; what one refuses is told.

    Raises:
        click.UsageError: all policies refuse a combination.
    """
    names = [name for name, _ in values["kv_set"]]
    takes: dict[str, list[dict[str, Any]]] = {policy: [] for policy in policies}
    for combination in itertools.product(*(choices for _, choices in values["kv_set"])):
        fields, refused = dict(zip(names, combination, strict=True)), {}
        for policy in policies:
            try:
                with_fields(values, policies, policy, _ANY, fields)
                takes[policy].append(fields)
            except click.UsageError as err:
                refused[policy] = err.message
        if refused and len(refused) == len(policies):
            raise click.UsageError(next(iter(refused.values())))
        for policy, why in refused.items():
            ui.line(f"left out: {policy}: {why}")
    return takes


def with_fields(
    values: dict[str, Any], policies: Sequence[str], policy: str, cells: int, fields: dict[str, Any]
) -> KVBudget:
    """A policy's budget with the options and these fields. Raises click.UsageError."""
    own: dict[str, Any] = {"kv_policy": policy, "kv_budget": cells}
    if policy != "latest" and "latest" in policies:
        own["kv_value_weight"] = None  # it is for the one that has it
    kv = budget_of({**values, **own}, values["batch_size"])
    assert kv is not None
    try:
        return replace(kv, **fields)
    except (ValueError, TypeError) as err:
        raise click.UsageError(f"--kv-set: {err}") from err
