"""The shipped reasoner on 20 short problems: its weights, template, batching and eviction at work together.

Bounds leave room for what other processors' rounding changes. Measured on x86-64 with AVX2: full cache 20,
`latest` with 320 cells, 28 % of the mean trace, and its budgets by layer 19 (uniform: 16), `streaming` with
128 cells 0 of 20.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli_tools import shell
from rkv_local import KVBudget
from rkv_local.cli.options import default_threads
from rkv_local.evals.model import Model, Setting
from rkv_local.evals.problems import problem
from rkv_local.evals.results import Store
from rkv_local.evals.runner import Runner
from rkv_local.evals.summary import Row, summaries
from rkv_local.evals.tasks import Group, Item, Task
from rkv_local.evals.verdict import candidate

REASONER = Path(__file__).parents[2] / "models" / "rkv-reasoner.gguf"
# the shortest traces among the first 300 problems of the dev seeds: 1,150 tokens on average
NUMBERS = {
    ("chain", "dense"): (126, 118, 175, 46, 148),
    ("digits", "dense"): (111, 121, 106, 199, 126),
    ("chain", "sparse"): (208, 264, 178, 234, 249),
    ("digits", "sparse"): (149, 169, 237, 17, 87),
}
LONGEST = 1600  # tokens of an answer


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Model(REASONER) as model:
        setting = Setting(threads=default_threads(), flash_attn=False)
        yield Runner(model, Store(), setting, "rkv-reasoner", parallel=20, max_tokens=LONGEST)


def answered(runner: Runner, kv: KVBudget | None) -> Row:
    """The 20 problems under a budget."""
    found = [problem(family, kind, "dev", n) for (family, kind), ns in NUMBERS.items() for n in ns]
    items = [Item(p.id, p.question, p.answer) for p in found]
    name = {"task": "reason", "kind": "short", "families": ["chain", "digits"], "split": "dev"}
    key = runner.run(Task(name, "short", [Group(items)]), kv).key
    (row,) = (row for row in summaries(runner.store) if row["config"] == key)
    assert row["problems"] == len(items) == 20
    return row


@pytest.mark.slow
def test_the_full_cache_is_right(runner: Runner) -> None:
    row = answered(runner, None)
    assert row["correct"] >= 18
    assert 1000 < row["mean_tokens"] < 1300 and row["limit_share"] <= 0.1


@pytest.mark.slow
def test_the_policy_keeps_what_is_needed(runner: Runner) -> None:
    row = answered(runner, KVBudget(budget=320, policy=candidate()))
    assert row["variant"] == candidate() and max(row["kv"]["layer_budgets"]) > 600  # the calibration was used
    assert sum(row["kv"]["layer_budgets"]) == 10 * 320
    assert row["correct"] >= 16


@pytest.mark.slow
def test_what_keeps_the_latest_tokens_alone_does_not(runner: Runner) -> None:
    row = answered(runner, KVBudget(budget=128, policy="streaming"))
    assert row["correct"] <= 4


def test_run_prints_a_trace_that_ends_in_the_answer() -> None:
    asked = problem("digits", "dense", "dev", 111)
    done = shell(
        "run", str(REASONER), asked.question, "--temp", "0", "--kv-budget", "1024", "-n", str(LONGEST)
    )
    assert done.returncode == 0, done.stderr
    trace, end, answer = done.stdout.decode().partition("</think>")
    assert trace.startswith("<think>") and end and len(trace) > 1000
    assert re.search(r"The answer is (\S+)\.", answer), answer
    assert f"The answer is {asked.answer}." in answer
