#!/usr/bin/env python3
"""Random sequences of calls on a context with a budget, against a model of what it must hold.

    export RKV_LOCAL_LIB=...                      # as scripts/dev_build.sh prints it
    python scripts/fuzz_api.py --seconds 600 [--seed N]

The calls (decode, remove, copy, keep, clear, shift, compact, save, load), the rules and the model, which
computes every logit in numpy over the cells that each head kept, are those of test_rules_property.py in
tests/python. Each round runs in a process of its own, so that a crash is found; its seed is printed with what
it found.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "python")]

EXAMPLES, STEPS = 40, 50  # of one process: sequences of calls, and calls in each
TIMEOUT = 600


def one_round(seed: int, model_path: Path, examples: int) -> None:
    """Prints how many sequences and calls were made."""
    import hypothesis
    from hypothesis import HealthCheck, settings
    from hypothesis.stateful import run_state_machine_as_test

    from engine_tools import Model
    from test_rules_property import Rules

    calls = [0, 0]

    class Counted(Rules):
        def __init__(self) -> None:
            super().__init__()
            calls[0] += 1

        def check_invariants(self, *args: Any, **kwargs: Any) -> None:
            calls[1] += 1
            super().check_invariants(*args, **kwargs)

    Rules.model = Model(model_path)
    few = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(seed)(Counted), settings=few)
    print(*calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="sequences of calls per process")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    if arguments.child:
        one_round(seed, arguments.child, arguments.examples)
        return

    from tiny_models import SMALL_SHAPE, write_model

    with tempfile.TemporaryDirectory() as folder:
        path = write_model(Path(folder) / "small.gguf", SMALL_SHAPE)
        stop, findings, sequences, calls = time.monotonic() + arguments.seconds, 0, 0, 0
        while time.monotonic() < stop:
            command = [sys.executable, __file__, "--child", str(path), "--seed", str(seed)]
            command += ["--examples", str(arguments.examples)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
                status, output, errors = done.returncode, done.stdout, done.stderr
            except subprocess.TimeoutExpired:
                status, output, errors = 124, "", f"no end after {TIMEOUT} s"
            if status != 0:
                findings += 1
                print(f"seed {seed}: exit status {status}\n{output[-2500:]}\n{errors[-2500:]}", flush=True)
            else:
                counts = output.split()
                sequences, calls = sequences + int(counts[-2]), calls + int(counts[-1])
            seed += 1
        print(f"{sequences} sequences, {calls} calls, {findings} findings, seeds up to {seed - 1}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
