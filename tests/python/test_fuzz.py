"""The fuzzers of scripts/ for a few seconds, and the variable that forces a budget on programs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import SMALL_SHAPE, write_model

ROOT = Path(__file__).parents[2]


def fuzz(name: str, *arguments: str) -> list[int]:
    command = [sys.executable, str(ROOT / "scripts" / name), "--seed", "7", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return [int(n) for n in re.findall(r"\d+", run.stdout.splitlines()[-1])]


def test_damaged_states() -> None:
    loads, accepted, findings, _ = fuzz("fuzz_state.py", "--seconds", "4")
    assert loads >= 60 and 0 < accepted < loads and findings == 0


def test_damaged_states_of_several_parts() -> None:
    loads, accepted, findings, _ = fuzz("fuzz_state.py", "--seconds", "4", "--families")
    assert loads >= 60 and 0 < accepted < loads and findings == 0


def test_random_calls() -> None:
    sequences, calls, findings, _ = fuzz("fuzz_api.py", "--seconds", "0.1", "--examples", "4")
    assert sequences >= 4 and calls > 50 and findings == 0


def test_a_fuzzer_that_finds_something_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "RKV_LOCAL_LIB": str(tmp_path)}  # no library: every round fails
    command = [sys.executable, str(ROOT / "scripts" / "fuzz_state.py"), "--seed", "7", "--seconds", "0.6"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "seed 7: exit status" in run.stdout and " 0 findings" not in run.stdout


CHILD = """
import sys
from pathlib import Path
from engine_tools import Context, Model, NativeError, Options
try:
    with Context(Model(Path(sys.argv[1])), Options(n_ctx=256, batch=8)) as context:
        context.feed([1] * 100)
        stats = context.stats
        print(stats.active, stats.compactions > 0, context.used() <= 24 + 8, context.pos_max())
except NativeError as error:
    print(error)
"""
FORCED = {
    "24:8": "True True True 99",
    "": "False False False 99",
    "24": "RKV_FORCE_BUDGET is 24, must be two numbers, budget:buffer",
    "9:8": "RKV_FORCE_BUDGET: a budget of 9 cells leaves no room",
}


@pytest.mark.parametrize("value", FORCED)
def test_a_forced_budget(tmp_path: Path, value: str) -> None:
    model = write_model(tmp_path / "small.gguf", SMALL_SHAPE)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "python")])
    env = {**os.environ, "RKV_FORCE_BUDGET": value, "PYTHONPATH": paths}
    command = [sys.executable, "-c", CHILD, str(model)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert run.stdout.startswith(FORCED[value]), run.stdout + run.stderr
