"""Random sequences of operations against a model of the rules of design section 3."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace

import llama_cpp
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import engine_tools as native
import reference as ref
from engine_tools import Context, Model, Options
from states import WHOLE, load, save
from tiny_models import SMALL_SHAPE as SHAPE
from tiny_models import Forward

SEQS = st.integers(0, 2)
N_CTX = 256  # llama.cpp rounds up to a multiple of this
EXAMPLES = int(os.environ.get("RKV_TEST_EXAMPLES", "60"))
TOLERANCE = 2e-4  # float32 against numpy's float64


@dataclass
class Sequence:
    """What the rules say about one sequence.

    sealed: tokens that were there at its last compaction; exact: first position of the window then.
    """

    forward: Forward = field(default_factory=lambda: Forward(SHAPE))
    held: list[int] = field(default_factory=lambda: [0] * SHAPE.n_layer)  # cells per layer
    sealed: int = 0
    exact: int = 0
    gone: set[int] = field(default_factory=set)  # positions that were removed, not evicted

    @property
    def n(self) -> int:
        return len(self.forward.keys[0])

    def forget(self, first: int, last: int) -> None:
        """Positions [first, last) are no longer attended to."""
        self.gone |= set(range(first, last))
        for layer in range(SHAPE.n_layer):
            for head in range(SHAPE.n_head_kv):
                seen = self.forward.visible[layer][head]
                self.forward.restrict(layer, head, [p for p in seen if not first <= p < last])
            self.held[layer] -= len(seen) - len(self.forward.visible[layer][head])

    def truncate(self, n: int) -> None:
        """Positions from n on go; what then ends the sequence decides where it goes on."""
        self.forget(n, self.n)
        n = max((p + 1 for p in range(n) if p not in self.gone), default=0)
        self.gone = {p for p in self.gone if p < n}
        for layer in range(SHAPE.n_layer):
            del self.forward.keys[layer][n:], self.forward.values[layer][n:]


class Rules(RuleBasedStateMachine):
    """decode, remove, copy, keep, clear and compact on three sequences."""

    model: Model
    context: Context | None = None

    @initialize(
        policy=st.sampled_from(["rkv", "snapkv", "streaming", "latest"]),
        budgets=st.sampled_from([(20, 20), (20, 29), (33, 20)]),
        buffer=st.sampled_from([6, 12]),
        batch=st.sampled_from([5, 9]),
        pin=st.integers(0, 3),
    )
    def create(self, policy: str, budgets: tuple[int, int], buffer: int, batch: int, pin: int) -> None:
        spec = ref.Spec(policy, budget=20, window=4, pin=pin)
        self.options = Options(spec, buffer, batch, budgets, n_ctx=N_CTX, n_seq=3, n_threads=1)
        self.budgets, self.narrow = budgets, int(np.argmin(budgets))
        self.context = Context(self.model, self.options)
        self.allocated = self.context.stats.bytes
        self.seqs = [Sequence() for _ in range(3)]
        self.compactions = 0
        self.saved: list[tuple[bytes, int, list[Sequence]]] = []  # a state, of which sequence, what it holds

    def teardown(self) -> None:
        if self.context:
            self.context.close()

    def compacted(self, s: Sequence) -> None:
        s.held = [min(h, b) for h, b in zip(s.held, self.budgets, strict=True)]
        s.sealed = s.n
        s.exact = s.forward.visible[0][0][-self.options.spec.window :][0]  # all heads still have these
        self.compactions += 1

    @rule(data=st.data())
    def decode(self, data: st.DataObject) -> None:
        context, options = self.context, self.options
        assert context
        fits = [s for s in range(3) if self.seqs[s].n + options.batch <= N_CTX]
        chosen = data.draw(st.lists(st.sampled_from(fits), min_size=1, unique=True)) if fits else []
        if not chosen:
            return
        sizes = {s: data.draw(st.integers(1, options.batch)) for s in chosen}
        rows = []
        for s, size in sizes.items():
            tokens = data.draw(st.lists(st.integers(0, 31), min_size=size, max_size=size))
            rows += [(t, self.seqs[s].n + i, s) for i, t in enumerate(tokens)]
        cells = max(options.buffer, options.batch)
        for s, size in sizes.items():
            seq = self.seqs[s]
            held, budget = seq.held[self.narrow], self.budgets[self.narrow]
            if held >= budget + options.buffer or held + size > budget + cells:
                self.compacted(seq)
        starts = {s: self.seqs[s].n for s in sizes}
        logits = context.decode(rows)
        for s, size in sizes.items():
            seq = self.seqs[s]
            for layer in range(SHAPE.n_layer):
                for head in range(SHAPE.n_head_kv):
                    pos = context.positions(layer, head, s)
                    old = pos[pos < starts[s]]
                    seen = seq.forward.visible[layer][head]
                    assert set(old) <= set(seen)
                    if starts[s] != seq.sealed:
                        assert old.tolist() == seen  # nothing went without a compaction
                    seq.forward.restrict(layer, head, old)
            mine = [i for i, row in enumerate(rows) if row[2] == s]
            right = np.stack([seq.forward.feed(rows[i][0]) for i in mine])
            assert np.abs(logits[mine] - right).max() < TOLERANCE
            seq.held = [h + size for h in seq.held]

    @rule(seq=SEQS)
    def compact(self, seq: int) -> None:
        assert self.context
        s = self.seqs[seq]
        evicts = any(h > b for h, b in zip(s.held, self.budgets, strict=True))
        assert self.context.compact(seq) == evicts
        if evicts:
            self.compacted(s)
            for layer in range(SHAPE.n_layer):
                for head in range(SHAPE.n_head_kv):
                    pos, seen = self.context.positions(layer, head, seq), s.forward.visible[layer][head]
                    assert set(pos) <= set(seen)
                    fixed = seen[: self.options.spec.pin] + seen[-self.options.spec.window :]
                    assert set(fixed) <= set(pos)
                    s.forward.restrict(layer, head, pos)

    @rule(seq=SEQS, back=st.integers(-3, 30), to_end=st.booleans())
    def remove_suffix(self, seq: int, back: int, to_end: bool) -> None:
        """[n - back, end): exact from the last compaction's window on, refused before it."""
        assert self.context
        s = self.seqs[seq]
        p0 = max(0, s.n - back)
        done = self.context.remove(seq, p0, -1 if to_end else s.n + 10)
        if p0 >= s.n:
            assert done
        elif p0 == 0:
            assert done
            self.seqs[seq] = Sequence()
        else:
            assert done == (p0 >= s.exact)
            if not done:
                return
            s.truncate(p0)
            s.sealed = min(s.sealed, s.n)
            if s.n == 0:
                self.seqs[seq] = Sequence()

    @rule(seq=SEQS, p0=st.integers(-1, 40), length=st.integers(1, 20))
    def remove_from_the_front_or_middle(self, seq: int, p0: int, length: int) -> None:
        """Refused where it reaches what was compacted before the window; else the rest closes up."""
        assert self.context
        s = self.seqs[seq]
        first, last = max(p0, 0), max(p0, 0) + length
        if last >= s.n or s.n == 0:
            return
        done = self.context.remove(seq, p0, last)
        assert done == (first >= s.exact)
        if done:
            s.forget(first, last)

    @rule(seq=st.integers(-1, 2))
    def remove_whole(self, seq: int) -> None:
        assert self.context
        assert self.context.remove(seq, -1, -1)
        for s in range(3):
            if seq in (-1, s):
                self.seqs[s] = Sequence()

    @rule(src=SEQS, dst=SEQS)
    def copy_sequence(self, src: int, dst: int) -> None:
        assert self.context
        llama_cpp.llama_memory_seq_cp(self.context.memory, src, dst, -1, -1)
        if src != dst:
            self.seqs[dst] = copy.deepcopy(self.seqs[src])

    @rule(seq=SEQS)
    def keep_one(self, seq: int) -> None:
        assert self.context
        llama_cpp.llama_memory_seq_keep(self.context.memory, seq)
        self.seqs = [s if i == seq else Sequence() for i, s in enumerate(self.seqs)]

    @rule(data=st.booleans())
    def clear(self, data: bool) -> None:
        assert self.context
        llama_cpp.llama_memory_clear(self.context.memory, data)
        self.seqs = [Sequence() for _ in range(3)]

    @rule(seq=st.integers(WHOLE, 2))
    def save_state(self, seq: int) -> None:
        assert self.context
        held = self.seqs if seq == WHOLE else self.seqs[seq : seq + 1]
        self.saved.append((save(self.context, seq), seq, copy.deepcopy(held)))

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), to=SEQS)
    def load_state(self, data: st.DataObject, to: int) -> None:
        assert self.context
        state, seq, held = data.draw(st.sampled_from(self.saved))
        assert load(self.context, state, WHOLE if seq == WHOLE else to) == len(state)
        if seq == WHOLE:
            self.seqs = copy.deepcopy(held)
        else:
            self.seqs[to] = copy.deepcopy(held[0])

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), to=SEQS, share=st.floats(0, 0.999))
    def load_a_cut_state(self, data: st.DataObject, to: int, share: float) -> None:
        """Refused: nothing changes, or all that it would have replaced is empty."""
        assert self.context
        state, seq, _ = data.draw(st.sampled_from(self.saved))
        cut = state[: int(share * len(state))]
        assert load(self.context, cut, WHOLE if seq == WHOLE else to) == 0
        if seq == WHOLE and all(self.context.used(s) == 0 for s in range(3)):
            self.seqs = [Sequence() for _ in range(3)]

    @rule(seq=SEQS, delta=st.sampled_from([-3, 4]))
    def shift(self, seq: int, delta: int) -> None:
        """K-shift is off: refused, and nothing changes (the invariants and the next decode look)."""
        assert self.context
        llama_cpp.llama_memory_seq_add(self.context.memory, seq, 0, -1, delta)
        llama_cpp.llama_memory_seq_div(self.context.memory, seq, 0, -1, 2)

    @rule(seq=SEQS, kind=st.sampled_from(["gap", "again", "too many", "beyond n_ctx"]))
    def decode_what_is_refused(self, seq: int, kind: str) -> None:
        assert self.context
        n, room = self.seqs[seq].n, max(self.options.batch, self.options.buffer)
        if kind in ("gap", "again") and n == 0:  # an empty sequence may start anywhere
            return
        start = {"gap": n + 2, "again": max(0, n - 1), "too many": n, "beyond n_ctx": N_CTX}[kind]
        count = room + 1 if kind == "too many" else 1
        assert self.context.try_decode([(1, start + i, seq) for i in range(count)]) != 0

    @precondition(lambda self: self.context is not None)
    @invariant()
    def state_is_as_the_rules_say(self) -> None:
        assert self.context
        assert not llama_cpp.llama_memory_can_shift(self.context.memory)
        stats = self.context.stats
        assert stats.bytes == self.allocated and stats.compactions == self.compactions
        widest = int(np.argmax(self.budgets))
        for i, s in enumerate(self.seqs):
            assert self.context.used(i) == s.held[widest]
            assert self.context.pos_max(i) == s.n - 1
            low = self.context.pos_min(i)
            if s.n == 0:
                assert low == -1
            elif s.sealed == 0 or self.options.spec.pin:
                assert low == s.forward.visible[0][0][0]
            else:
                assert 0 <= low <= s.n - 1
            for layer in range(SHAPE.n_layer):
                assert self.context.positions(layer, 0, i).size == s.held[layer]


def test_operations_follow_the_rules(small: Model) -> None:
    Rules.model = small
    few = settings(
        max_examples=EXAMPLES, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
    )
    run_state_machine_as_test(Rules, settings=few)


# --- fixed cases that the random ones might miss ----------------------------------------------------


SMALL = Options(ref.Spec(budget=20, window=4, pin=2), buffer=8, batch=8, n_ctx=N_CTX, n_seq=2, n_threads=1)


def test_copy_then_both_continue_identically(small: Model) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, size=120).tolist()
    with Context(small, SMALL) as context:
        context.feed(tokens[:61], 0)
        context.feed(tokens[:30], 1)  # overwritten
        llama_cpp.llama_memory_seq_cp(context.memory, 0, 1, -1, -1)
        for start in range(61, 120, 7):
            part = tokens[start : start + 7]
            a, b = context.feed(part, 0), context.feed(part, 1)
            np.testing.assert_array_equal(a, b)
            for layer in range(2):
                np.testing.assert_array_equal(
                    context.all_positions(layer, 0), context.all_positions(layer, 1)
                )
                np.testing.assert_array_equal(context.queries(layer, 0), context.queries(layer, 1))
        assert context.stats.compactions >= 10


@pytest.mark.parametrize("policy", ["rkv", "latest"])
def test_removed_suffix_leaves_no_trace(small: Model, policy: str) -> None:
    """Text that was taken back: logits as if it had never been, and later the same kept sets."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 32, size=60).tolist()
    options = replace(SMALL, spec=replace(SMALL.spec, policy=policy))
    with Context(small, options) as context:
        context.feed(tokens[:28], 0)
        context.feed(tokens[:28], 1)
        assert context.compact(0) and context.compact(1)
        context.feed([3, 1, 4], 1)
        assert context.remove(1, 28, -1)
        assert context.pos_max(1) == 27
        for start in range(28, 60, 4):
            part = tokens[start : start + 4]
            np.testing.assert_array_equal(context.feed(part, 0), context.feed(part, 1))
        for layer in range(2):
            np.testing.assert_array_equal(context.all_positions(layer, 0), context.all_positions(layer, 1))


def test_a_sequence_used_again_is_as_new(small: Model) -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 32, size=80).tolist()
    with Context(small, SMALL) as context:
        first = context.feed(tokens)
        kept = context.all_positions(1)
        assert context.remove(0, 0, -1)
        assert context.used() == 0 and context.positions(0, 0).size == 0
        np.testing.assert_array_equal(context.feed(tokens), first)
        np.testing.assert_array_equal(context.all_positions(1), kept)
        llama_cpp.llama_memory_clear(context.memory, True)
        np.testing.assert_array_equal(context.feed(tokens), first)


def test_n_ctx_is_the_limit_of_positions(small: Model) -> None:
    with Context(small, SMALL) as context:
        context.feed([1] * 256)
        assert context.pos_max() == 255
        assert context.try_decode([(1, 256, 0)]) == 1
        assert "256" in native.last_error() or "n_ctx" in native.last_error()
        assert context.pos_max() == 255
        context.feed([1] * 10, 1)  # the other sequence goes on


def test_too_large_a_batch_is_refused_also_on_an_empty_cache(small: Model) -> None:
    with Context(small, SMALL) as context:
        assert context.try_decode([(1, i, 0) for i in range(9)]) == 1
        assert native.last_error()
        assert context.pos_max() == -1 and context.used() == 0
        context.feed([1] * 8)
