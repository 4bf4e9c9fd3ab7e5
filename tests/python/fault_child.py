"""Run under fault.c by test_faults.py: what fails leaves each sequence as it was, or empty, and usable.

python fault_child.py MODEL POLICY FUNCTION
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import numpy as np

import engine_tools as native
import reference as ref
from engine_tools import Context, Model, Options
from states import contents, is_empty, same

TOKENS = np.random.default_rng(8).integers(0, 32, size=300).tolist()
STATUS = {"alloc": (1, -2), "compute": (1, -3), "late": (1, -3), "backend": (1,)}


def filled(model: Model, options: Options, holes: bool) -> Context:
    """Three sequences: the next token of 0 and 1 brings a compaction, 2 is not full."""
    context = Context(model, options)
    for seq in (0, 1):
        context.feed(TOKENS[100 * seq : 100 * seq + 28], seq)
        if context.used(seq) > 20 and not holes:
            assert context.compact(seq)
            context.feed(TOKENS[200:208], seq)
    if holes:
        for seq in (0, 1):
            assert context.remove(seq, 7, 9)
    context.feed(TOKENS[50:60], 2)
    return context


def main() -> None:
    path, policy, function = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    shim = ctypes.CDLL(None)
    arm, left = shim.rkv_fault_arm, shim.rkv_fault_left
    model = Model(path)
    spec = ref.Spec(policy, budget=20, window=4, pin=2)
    options = Options(spec, buffer=8, batch=8, n_ctx=256, n_seq=3, layer_budgets=(20, 24))
    name = ctypes.c_char_p(function.encode())
    struck, lost, kept = 0, 0, 0
    for holes in (False, True):
        size = 6 if holes else 1  # with holes: closed first, then compacted
        for nth in range(1, 9):
            with filled(model, options, holes) as a, filled(model, options, holes) as fresh:
                starts = [a.pos_max(s) + 1 for s in range(3)]
                rows = [(TOKENS[i], starts[s] + i, s) for s in range(3) for i in range(size)]
                before = [contents(a, s) for s in range(3)] if not holes else []  # reading closes holes
                arm(name, nth)
                status = a.try_decode(rows)
                if left() > 0:
                    arm(b"", 0)
                    assert status == 0
                    break
                if (
                    status == 0 and os.environ.get("RKV_GENERIC") == "1"
                ):  # a probe of the device failed: another way
                    continue
                struck += 1
                line = native.last_error()
                assert status in STATUS[function], (status, line)
                if status == 1:
                    assert line and "\n" not in line
                for s in range(3):
                    if is_empty(a, s):
                        lost += 1
                        assert status == 1 and "read them again" in line and s != 2
                    else:
                        kept += 1
                        assert a.pos_max(s) == starts[s] - 1
                        if status == 1 and not holes:
                            assert same(contents(a, s), before[s])
                right = fresh.decode(rows)
                again = [s for s in range(3) if not is_empty(a, s)]
                mine = [i for i, row in enumerate(rows) if row[2] in again]
                got = a.decode([rows[i] for i in mine])
                assert np.abs(got - right[mine]).max() < 1e-4
                for s in again:
                    assert [x.tolist() for x in contents(a, s)[:2]] == [
                        x.tolist() for x in contents(fresh, s)[:2]
                    ]
                for s in set(range(3)) - set(again):  # read again, from the start
                    with Context(model, options) as other:
                        np.testing.assert_array_equal(a.feed(TOKENS[:90], s), other.feed(TOKENS[:90], s))
    # the C API's own compaction
    with filled(model, options, False) as a:
        used = a.used(0)
        arm(name, 1)
        done = a.compact(0)
        if left() == 0:
            assert not done and native.last_error()
            assert a.used(0) in (0, used)
            a.feed(TOKENS[:40], 0)
        arm(b"", 0)
    print(struck, lost, kept)


if __name__ == "__main__":
    main()
