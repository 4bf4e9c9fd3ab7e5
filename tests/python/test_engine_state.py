"""States, speculative decoding and interruptions of a Llama on SmolLM2."""

from __future__ import annotations

import ctypes
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as low
import numpy as np
import numpy.typing as npt
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from llamas import SMALL, TEXT, MakeLlama, fresh, greedy, under
from rkv_local import KVBudget, Llama, RKVError, Session, _native
from tiny_models import Shape, write_model

pytest_plugins = ["llamas"]

TINY = KVBudget(budget=48, buffer=16, batch=16, window=4, pin=2)
PROMPT = np.random.default_rng(3).integers(0, 96, size=90).tolist()


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf", Shape(n_ctx=4096))


MakeTiny = Callable[..., Llama]


@pytest.fixture
def make_tiny(tiny_path: Path) -> Iterator[MakeTiny]:
    """Llamas with random weights, float32 throughout: no two tokens are as near as a batch's rounding."""
    made: list[Llama] = []

    def build(kv: KVBudget | None = TINY, **more: Any) -> Llama:
        common = {"type_k": "f32", "type_v": "f32", "n_ctx": 4096, "n_threads": 1, "n_threads_batch": 1}
        made.append(Llama(tiny_path, kv=kv, verbose=False, **{**common, **more}))
        return made[-1]

    yield build
    for llama in made:
        llama.close()


def continued(llama: Llama, n: int = 40) -> list[int]:
    """Greedy tokens after the last one, which is decoded again: a state has no logits."""
    last = int(llama.input_ids[llama.n_tokens - 1])
    llama.n_tokens -= 1
    out: list[int] = []
    llama.eval([last])
    for _ in range(n):
        out.append(int(llama._scores[-1].argmax()))
        llama.eval([out[-1]])
    return out


# --- states ---


@pytest.mark.parametrize("policy", ["rkv", "latest"])
def test_state_continues_with_the_same_tokens(make_tiny: MakeTiny, policy: str) -> None:
    kv = under(TINY, policy)
    llama, other = make_tiny(kv), make_tiny(kv)
    llama.eval(PROMPT)
    state = pickle.loads(pickle.dumps(llama.save_state()))
    kept = llama.kv_kept(2, 1).tolist()
    first = continued(llama)
    other.load_state(state)
    assert (other.n_tokens, other.kv_kept(2, 1).tolist()) == (90, kept)
    assert continued(other) == first
    assert other.kv_stats().compactions > 0
    llama.load_state(state)  # also into the one that went on
    assert continued(llama) == first


def test_a_state_of_another_budget_is_refused_and_nothing_changes(make_tiny: MakeTiny) -> None:
    llama, other = make_tiny(), make_tiny(replace(TINY, budget=40))
    other.eval(PROMPT)
    state = other.save_state()
    llama.eval(PROMPT[:70])
    held = llama.kv_kept(1, 0).tolist()
    line = "the state was saved with a budget of 40 cells, this context has 48 cells"
    with pytest.raises(RKVError, match=line) as caught:
        llama.load_state(state)
    assert "\n" not in str(caught.value)
    assert (llama.n_tokens, llama.kv_kept(1, 0).tolist()) == (70, held)
    for cut in (state.llama_state[:-5], state.llama_state + b"x", b""):
        bad = pickle.loads(pickle.dumps(state))
        bad.llama_state, bad.llama_state_size = cut, len(cut)
        with pytest.raises(RKVError, match=r"damaged|end of buffer"):
            other.load_state(bad)
        assert other.n_tokens in (0, 90)
    state.n_tokens = 10**6
    with pytest.raises(RKVError, match="raise n_ctx"):
        other.load_state(state)
    state.n_tokens = 90
    other.load_state(state)
    assert other.n_tokens == 90


@pytest.mark.parametrize("policy", ["latest", "rkv", "streaming", "h2o", "lagkv"])
def test_the_most_recent_tokens_stay(make_tiny: MakeTiny, policy: str) -> None:
    """In every head; of a layer half of its budget at most."""
    budgets = (30, 55, 48)
    kv = under(TINY, policy, recent=20, layer_budgets=budgets)
    llama = make_tiny(kv)
    llama.eval(PROMPT)
    assert llama.kv_stats().compactions > 0
    assert _native.seq_compact(llama.ctx)  # so that nothing came after the last one
    for layer, budget in enumerate(budgets):
        n = kv.recent_of(budget)
        assert n == min(20, budget // 2)
        for head in range(2):
            held = llama.kv_kept(layer, head)
            assert held[-n:].tolist() == list(range(llama.n_tokens - n, llama.n_tokens))
            assert held[:2].tolist() == [0, 1]
    state = llama.save_state()
    with pytest.raises(RKVError, match=r"the state was saved with recent .*, this context has .*4 tokens"):
        make_tiny(replace(kv, recent=4)).load_state(state)
    make_tiny(kv).load_state(state)


def test_values_decide_with_a_weight(make_tiny: MakeTiny) -> None:
    """Other cells are kept, and a state of another weight is refused."""
    kept = []
    for weight in (0.0, 0.5):
        llama = make_tiny(replace(TINY, recent=4, value_weight=weight))
        llama.eval(PROMPT)
        kept.append([llama.kv_kept(layer, head).tolist() for layer in range(3) for head in range(2)])
    assert kept[0] != kept[1]
    with pytest.raises(RKVError, match=r"saved with value_weight 0\.5, this context has 0\.25"):
        make_tiny(replace(TINY, recent=4, value_weight=0.25)).load_state(llama.save_state())


@pytest.mark.parametrize("policy", ["latest", "gkv", "lagkv", "chunkkv", "rkv"])
def test_what_a_policy_takes_unasked_is_the_same_on_both_sides(
    make_tiny: MakeTiny, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's own choice and KVBudget's make the same cache: states name what differs."""
    kv = KVBudget(budget=200, buffer=16, batch=16, window=4, pin=2, policy=policy)
    llama = make_tiny(kv)
    llama.eval(PROMPT)
    usual = _native.params

    def unasked(*args: Any) -> Any:
        params = usual(*args)
        params.n_sim = params.chunk = params.recent = 0
        params.memory = params.value_weight = -1.0
        return params

    monkeypatch.setattr(_native, "params", unasked)
    make_tiny(kv).load_state(llama.save_state())


@pytest.mark.parametrize("policy", ["latest", "rkv", "streaming", "value-aware"])
def test_the_window_is_recent_whatever_is_said(make_tiny: MakeTiny, policy: str) -> None:
    """0 and whatever is within the window make the same cache, whose states are the same."""
    kv = under(TINY, policy, recent=0)
    first = make_tiny(kv)
    first.eval(PROMPT)
    kept = [first.kv_kept(layer, head).tolist() for layer in range(3) for head in range(2)]
    assert all(rows[-4:] == [86, 87, 88, 89] for rows in kept)
    if policy != "streaming":
        assert any(rows[-24:] != list(range(66, 90)) for rows in kept)
    for recent in (1, 4):
        other = make_tiny(replace(kv, recent=recent))
        other.eval(PROMPT)
        assert [other.kv_kept(layer, head).tolist() for layer in range(3) for head in range(2)] == kept
        other.load_state(first.save_state())


def test_one_set_of_cells_for_all_holds_the_most_recent_tokens(make_tiny: MakeTiny) -> None:
    llama = make_tiny(replace(TINY, recent=20, shared_heads=True))
    llama.eval(PROMPT)
    held = llama.kv_kept(0, 0).tolist()
    assert held[-20:] == list(range(70, 90))
    assert held[:2] == [0, 1]
    assert all(llama.kv_kept(layer, head).tolist() == held for layer in range(3) for head in range(2))


@pytest.mark.parametrize(("recent", "pinned"), [(0, 24), (20, 24), (96, 23)])
def test_a_pinned_prompt_leaves_room_for_the_most_recent_tokens(
    make_tiny: MakeTiny, recent: int, pinned: int
) -> None:
    """Half of the budget of a long prompt, or what the recent tokens leave beside one cell."""
    kv = replace(TINY, pin="prompt", recent=recent)
    llama = make_tiny(kv)
    assert kv.prompt_pin(40, 3) == pinned
    for _ in zip(range(60), llama.generate(PROMPT[:40], temp=0.0), strict=False):
        pass
    assert llama.kv_stats().compactions > 0
    for layer in range(3):
        held, n = llama.kv_kept(layer, 1), kv.recent_of(48)
        assert held[:pinned].tolist() == list(range(pinned))
        assert held[-n:].tolist() == list(range(llama.n_tokens - n, llama.n_tokens))


def test_a_growing_target_has_room_for_the_most_recent_tokens(make_tiny: MakeTiny) -> None:
    """rpc in layers of different budgets: none may keep more recent tokens than the target has room for."""
    llama = make_tiny(under(TINY, "rpc", pin=2, window=4, recent=40, layer_budgets=(20, 90, 90)))
    llama.eval(PROMPT)
    assert llama.kv_stats().compactions > 1
    for layer, most in enumerate((20, 90, 90)):
        held = llama.kv_kept(layer, 0)
        assert 12 <= len(held) <= most + 16
        assert held[-10:].tolist() == list(range(80, 90))


@pytest.mark.parametrize("growth", [1, 4])
def test_recent_tokens_while_the_target_of_rpc_grows(make_tiny: MakeTiny, growth: int) -> None:
    """As many in all layers as in the narrowest: a wide layer keeps no more cells at first than that one."""
    llama = make_tiny(under(TINY, "rpc", recent=90, growth=growth, layer_budgets=(200, 48, 48)))
    llama.eval(PROMPT)
    assert llama.kv_stats().compactions > 0
    for layer in range(3):
        held = llama.kv_kept(layer, 0)
        assert held[:2].tolist() == [0, 1]
        assert held[-24:].tolist() == list(range(66, 90))


def test_pins_leave_room_for_the_most_recent_tokens(make_tiny: MakeTiny) -> None:
    llama = make_tiny(replace(TINY, recent=20))
    _native.seq_pin(llama.ctx, 48 - 20 - 1)
    with pytest.raises(RKVError, match="beside the 20 most recent ones: at most 27"):
        _native.seq_pin(llama.ctx, 48 - 20)


def test_states_with_and_without_a_budget_do_not_mix(make_tiny: MakeTiny) -> None:
    llama, stock = make_tiny(), make_tiny(None)
    for made in (llama, stock):
        made.eval(PROMPT)
    state, plain = llama.save_state(), stock.save_state()
    with pytest.raises(RKVError, match="saved without a budget"):
        llama.load_state(plain)
    with pytest.raises(RKVError, match="n_stream"):
        stock.load_state(state)
    first = continued(stock, 10)
    stock.load_state(plain)
    assert continued(stock, 10) == first


def test_state_with_logits_all_and_with_a_draft(make_tiny: MakeTiny) -> None:
    llama = make_tiny(logits_all=True, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=3))
    llama.eval(PROMPT)
    scores, state = llama.scores[:90].copy(), llama.save_state()
    llama.forget()
    llama.load_state(state)
    np.testing.assert_array_equal(llama.scores[:90], scores)
    copy = pickle.loads(pickle.dumps(llama))
    assert isinstance(copy.draft_model.draft, LlamaPromptLookupDecoding)
    copy.close()


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_cache_of_states_between_completions(make: MakeLlama, tmp_path: Path, kind: str) -> None:
    cache = LlamaRAMCache() if kind == "memory" else LlamaDiskCache(str(tmp_path))
    llama = make(kv=SMALL)
    one, two = TEXT[:350], "Once upon a time there was a small house."
    alone = {p: fresh(llama, p, 15) for p in (two, one)}
    more = [*llama.input_ids[: llama.n_tokens].tolist(), 330, 260]
    longer = greedy(llama, more, 10)
    llama.forget()
    llama.set_cache(cache)
    for prompt in (one, two, one, two):
        assert greedy(llama, prompt, 15) == alone[prompt]
    decoded = counted(llama)
    assert greedy(llama, more, 10) == longer  # the state of `one`, continued
    assert sum(decoded) < 30
    other = make(kv=KVBudget(budget=64, buffer=32, batch=64))
    other.set_cache(cache)
    with pytest.raises(RKVError, match="a budget of 96 cells"):
        greedy(other, more, 5)
    other.set_cache(None)
    assert greedy(other, one, 5)
    for made in (llama, other):
        made.close()


def counted(llama: Llama) -> list[int]:
    """The sizes of the batches that are decoded from now on."""
    sizes: list[int] = []
    put = llama._batch.set_batch

    def count(batch: list[int], **more: Any) -> None:
        sizes.append(len(batch))
        put(batch=batch, **more)

    llama._batch.set_batch = count
    return sizes


def test_session_saves_and_loads_a_sequence(make_tiny: MakeTiny) -> None:
    llama = make_tiny(n_seq_max=3)
    session = Session(llama)
    session.decode({0: PROMPT, 1: PROMPT[50:]})
    data = session.save(0)
    session.load(data, 2)
    assert session.pos(2) == 90 and session.kept(2, 1, 2).tolist() == session.kept(2, 1, 0).tolist()
    rows = [session.decode({s: PROMPT[:50]})[s] for s in (0, 2)]
    np.testing.assert_array_equal(rows[0], rows[1])
    for bad in (data[:-1], data[:30], b"", data + b"x"):
        with pytest.raises(RKVError, match=r"damaged|end of buffer"):
            session.load(bad, 1)
        assert session.pos(1) in (0, 40)
    with pytest.raises(IndexError, match="sequence is 3"):
        session.load(data, 3)
    session.close()


# --- prefixes and speculative decoding ---


class Exact(LlamaDraftModel):
    """Knows the answer, but every `wrong`-th token of it is wrong."""

    def __init__(self, answer: list[int], n: int, wrong: int) -> None:
        self.answer, self.n, self.wrong, self.calls = answer, n, wrong, 0

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        self.calls += 1
        ahead = self.answer[len(input_ids) : len(input_ids) + self.n]
        at = range(len(input_ids), len(input_ids) + self.n)
        drafts = [(t + 1) % 96 if i % self.wrong == 0 else t for i, t in zip(at, ahead, strict=False)]
        return np.array(drafts, np.intc)


class SecondLlama(LlamaDraftModel):
    """A second Llama, with a budget of its own."""

    def __init__(self, llama: Llama, n: int) -> None:
        self.llama, self.n = llama, n

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        tokens: list[int] = []
        for token in self.llama.generate(input_ids.tolist(), temp=0.0):
            tokens.append(token)
            if len(tokens) == self.n:
                break
        return np.array(tokens, np.intc)


def tokens_after(llama: Llama, prompt: list[int], n: int) -> list[int]:
    llama.forget()
    out: list[int] = []
    for token in llama.generate(prompt, temp=0.0):
        out.append(token)
        if len(out) == n:
            return out
    return out


@pytest.mark.parametrize(
    "budget",
    [
        under(TINY, "rkv"),
        TINY,
        under(TINY, "rkv", buffer=3),  # of `latest` two cells are a near-tie, which rounding decides
        replace(TINY, budget=40, layer_budgets=(30, 55, 40)),
    ],
    ids=["rkv", "latest", "buffer 3", "by layer"],
)
def test_drafts_change_no_token(make_tiny: MakeTiny, budget: KVBudget) -> None:
    """Rejected tokens leave no trace, and a compaction comes where it comes without a draft."""
    llama, n = make_tiny(budget), 200
    plain = tokens_after(llama, PROMPT, n)
    compactions = llama.kv_stats().compactions
    assert compactions > 8
    kept = [llama.kv_kept(layer, h).tolist() for layer in range(3) for h in range(2)]
    for draft in (
        LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=6),
        Exact([*PROMPT, *plain], 10, 10**9),
        Exact([*PROMPT, *plain], 10, 4),
        Exact([*PROMPT, *plain], 100, 3),  # longer than a batch
    ):
        llama.draft_model = draft
        before, sizes = llama.kv_stats().compactions, counted(llama)
        assert tokens_after(llama, PROMPT, n) == plain
        del llama._batch.set_batch
        assert llama.kv_stats().compactions - before == compactions
        assert sum(s > 1 for s in sizes) > 30  # drafts were decoded, and the prompt was read once
        llama.n_tokens = len(PROMPT) + n - 1  # what is left of the last draft goes
        assert llama._settle() == []
        assert [llama.kv_kept(layer, h).tolist() for layer in range(3) for h in range(2)] == kept


def test_a_draft_model_with_a_budget_of_its_own(make_tiny: MakeTiny) -> None:
    llama, draft = make_tiny(), make_tiny(KVBudget(budget=60, buffer=24, batch=16, window=8))
    plain = tokens_after(llama, PROMPT, 120)
    llama.draft_model = SecondLlama(draft, 5)
    sizes, drafted = counted(llama), counted(draft)
    assert tokens_after(llama, PROMPT, 120) == plain
    assert len(sizes) < 120  # some drafts were right
    assert sum(drafted) < len(PROMPT) + 7 * len(sizes)  # its rollbacks were exact: it read the prompt once
    assert draft.kv_stats().compactions > 5


def test_a_refused_rollback_reads_everything_again(make_tiny: MakeTiny) -> None:
    """Tokens taken back beyond the last compaction: never garbage, but what a fresh context gives."""
    llama = make_tiny()
    right = tokens_after(llama, PROMPT[:70], 20)
    tokens_after(llama, PROMPT, 40)
    sizes = counted(llama)
    llama.n_tokens = 69  # far before the last window
    llama.eval(PROMPT[69:70])
    assert sum(sizes) == 70
    out = []
    for _ in range(20):
        out.append(int(llama._scores[-1].argmax()))
        llama.eval([out[-1]])
    assert out == right


def test_without_a_budget_drafts_are_llama_cpps(make_tiny: MakeTiny) -> None:
    stock = make_tiny(None)
    plain = tokens_after(stock, PROMPT, 40)
    draft = stock.draft_model = LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=6)
    assert stock.draft_model is draft
    assert tokens_after(stock, PROMPT, 40) == plain


# --- interruptions ---


def test_an_aborted_decode_leaves_what_was_there(make_tiny: MakeTiny) -> None:
    """Stopped at any op of a graph, then gone on with: the tokens of an undisturbed run."""
    llama = make_tiny()
    right = tokens_after(llama, PROMPT, 60)
    callback_type = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)
    left = [0]

    def stop(_: Any) -> bool:
        left[0] -= 1
        return left[0] < 0

    callback, nothing = callback_type(stop), callback_type()
    set_callback = ctypes.CDLL(low._lib._name).llama_set_abort_callback
    set_callback.argtypes, set_callback.restype = [ctypes.c_void_p, callback_type, ctypes.c_void_p], None
    set_callback(llama.ctx, callback, None)
    rng, stops = np.random.default_rng(0), 0
    for _ in range(30):
        llama.forget()
        out: list[int] = []
        while len(out) < 60:
            left[0] = int(rng.integers(0, 2000))
            try:
                for token in llama.generate([*PROMPT, *out], temp=0.0):
                    out.append(token)
                    if len(out) == 60:
                        break
            except RKVError as error:
                assert str(error) == "decoding was aborted (llama_decode returned 2)"
                stops += 1
        assert out == right
    assert stops > 30
    set_callback(llama.ctx, nothing, None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in llama_cpp's log callback
@pytest.mark.parametrize("kind", ["generate", "draft", "load"])
def test_ctrl_c_at_any_moment(make_tiny: MakeTiny, kind: str) -> None:
    """Whatever it interrupts, what follows is right."""
    draft = LlamaPromptLookupDecoding(max_ngram_size=1, num_pred_tokens=5) if kind == "draft" else None
    llama = make_tiny(draft_model=draft)
    right = tokens_after(llama, PROMPT, 50)
    started = time.monotonic()
    tokens_after(llama, PROMPT, 50)
    took = time.monotonic() - started
    state = llama.save_state()
    after = continued(llama, 20)

    def act() -> None:
        stop = time.monotonic() + 2 * took  # a signal inside llama_cpp's log callback is lost
        while time.monotonic() < stop:
            if kind == "load":
                llama.load_state(state)
            else:
                tokens_after(llama, PROMPT, 50)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old, rng = signal.signal(signal.SIGALRM, interrupt), np.random.default_rng(1)
    hits = 0
    try:
        for _ in range(40):
            try:
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(0.001, took)))
                act()
            except KeyboardInterrupt:
                hits += 1
            known = llama.input_ids[: llama.n_tokens].tolist()
            llama.eval([])
            assert llama._pos_next(0) == llama.n_tokens == len(known)
            if kind == "load":
                assert not known or continued(llama, 20) == after
            elif kind == "generate":
                assert known == [*PROMPT, *right][: len(known)]
                llama.eval([*PROMPT, *right][len(known) :][:1])
                if len(known) >= len(PROMPT):
                    assert int(llama._scores[-1].argmax()) == [*PROMPT, *right, *after[1:]][len(known) + 1]
            assert tokens_after(llama, PROMPT, 50) == right
        assert hits > 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
