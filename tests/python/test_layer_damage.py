"""Budgets by layer from the damage that few cells do to each (scripts/layer_damage.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layer_damage import allocate, measure, shares_of, traces_of
from rkv_local import KVBudget
from rkv_local.calibration import share_out
from rkv_local.evals.model import Model, Setting
from rkv_local.models import resolve

NAN = float("nan")


def test_cells_go_where_they_help_most() -> None:
    damage = np.array([[9.0, 1.0, 0.0], [0.2, NAN, NAN], [4.0, 3.0, 0.0]])
    # layer 0: 100 cells less 8, then 200 less 1; layer 2: 300 less 4 (its first step alone is less steep)
    assert allocate([100, 200, 400], damage, 300) == [100, 100, 100]
    assert allocate([100, 200, 400], damage, 400) == [200, 100, 100]
    assert allocate([100, 200, 400], damage, 500) == [200, 100, 200]
    assert allocate([100, 200, 400], damage, 800) == [300, 100, 400]
    assert allocate([100, 200, 400], damage, 960) == [420, 120, 420]


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 999)
)
def test_all_cells_are_dealt_out_and_come_back_from_shares(damage: list[list[float]], spare: int) -> None:
    n = len(damage)
    cells = allocate([20, 40, 80], np.array(damage), 20 * n + spare)
    assert sum(cells) == 20 * n + spare
    assert min(cells) >= 20
    if sum(cells) % n == 0:
        assert share_out(shares_of(cells, 13), sum(cells) // n, 13) == pytest.approx(cells, abs=1)


def test_the_reasoner_has_its_budgets_beside_it() -> None:
    path = resolve("reasoner").path
    found = KVBudget(380, policy="latest", layer_budgets="calibrated").for_model(path, 10).layer_budgets
    assert isinstance(found, tuple)
    assert sum(found) == 3800
    assert found[3] == max(found) > 4 * max(found[:3] + found[4:])


@pytest.mark.slow
def test_the_reasoner_looks_facts_up_in_one_layer() -> None:
    """Layer 3 loses far more than any other (docs/lab-log.md, 2026-11-28)."""
    path = Path(resolve("reasoner").path)
    with Model(path) as model:
        question = (
            "Ann has 17 more coins than Tom. Tom has 25 coins. Mia has 9 fewer coins than Leo. Leo has 3"
            " times as many coins as Ann. Sam has half as many coins as Zoe. Zoe has 13 more coins than Mia."
            " How many coins do they have in all? Check 12 times."
        )
        traces = traces_of(model, [question], 700, 2, 0)
        kv = KVBudget(128, policy="latest", buffer=64)
        sizes, damage = measure(model, kv, traces, (2, 3, 5), Setting(threads=2))
    assert sizes[0] == 64
    assert damage[1, 0] > 5 * max(damage[0, 0], damage[2, 0])
    assert (np.diff(damage[1]) < 0).all()
