"""rkv-local calibrate: the ranking and the simulation against references, the file, and what uses it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli_tools import error_line, invoke, make_random_model, mute, smollm2, talker, terminal
from rkv_local import KVBudget, Llama, _native, calibrate
from rkv_local.calibration import Calibration, beside, fingerprint, share_out
from tiny_families import write_family

KV = KVBudget(budget=40, buffer=16, window=4, pin=3, batch=16, policy="latest")
LENGTH = 120
LAYERS = 3
Make = Callable[..., Llama]

share_lists = st.lists(st.none() | st.floats(0, 1, width=32), min_size=1, max_size=60).filter(
    lambda shares: sum(s or 0 for s in shares) > 0.01
)


@given(shares=share_lists, least=st.integers(2, 80), extra=st.integers(0, 5000))
def test_budgets_add_up_and_leave_no_layer_without(
    shares: list[float | None], least: int, extra: int
) -> None:
    budget = least + extra
    cells = share_out(shares, budget, least)
    assert sum(cells) == len(shares) * budget
    assert min(cells) >= least
    own = [(share, c) for share, c in zip(shares, cells, strict=True) if share is not None]
    assert all(c == budget for share, c in zip(shares, cells, strict=True) if share is None)
    spare, whole = len(own) * extra, sum(share for share, _ in own)
    assert all(abs(c - least - share / whole * spare) < 1 for share, c in own)


def test_budgets_by_hand() -> None:
    # 3 * (20 - 5) = 45 cells to share: 22.5, 13.5 and 9; the one that rounding leaves goes to the first layer
    assert share_out([0.5, 0.3, None, 0.2], 20, 5) == [28, 18, 20, 14]


@pytest.mark.parametrize("seed", range(5))
def test_share_of_wins_against_a_sorted_list(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = [
        rng.normal(loc, 1, (heads, n)).astype(np.float32)
        for loc, heads, n in [(0, 2, 30), (1, 4, 20), (-1, 1, 9)]
    ]
    slots = 60
    ranking = sorted(((z, layer) for layer, s in enumerate(scores) for z in s.ravel()), reverse=True)
    wins = [sum(1 for _, layer in ranking[:slots] if layer == i) / len(s) for i, s in enumerate(scores)]
    found = calibrate.share_of_wins(scores, slots)
    np.testing.assert_allclose(found, np.array(wins) / sum(wins))
    all_win = calibrate.share_of_wins(scores, 1000)
    np.testing.assert_allclose(all_win, np.array([30, 20, 9]) / 59)


def test_scores_are_made_comparable() -> None:
    score = np.array([[1, 3, 2], [-10, -10, -10]], np.float32)
    assert calibrate.comparable("snapkv", score).tolist() == [[0, 1, 0.5], [0, 0, 0]]
    assert (calibrate.comparable("latest", score) == score).all()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, three layers with two KV heads, SmolLM2's vocabulary."""
    file = tmp_path_factory.mktemp("calibrate") / "chatter.gguf"
    shape = {"layers": LAYERS, "heads": 4, "kv_heads": 2, "ff": 64, "type": "q4_0", "gain": 3.0}
    return Path(make_random_model(file, tokenizer=smollm2(), **shape))


@pytest.fixture
def make(model: Path) -> Iterator[Make]:
    """Llamas on it, closed at the end."""
    made: list[Llama] = []

    def build(kv: KVBudget, path: Path = model, **more: Any) -> Llama:
        common: Any = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False, "n_outputs": 1}
        made.append(Llama(path, kv=kv, **{**common, **more}))
        return made[-1]

    yield build
    for llama in made:
        llama.close()


def simulated(llama: Llama, kv: KVBudget, tokens: list[int]) -> calibrate._Simulation:
    """A simulation that saw these tokens."""
    simulation = calibrate._Simulation(llama, kv)
    llama.on_decode = lambda past: simulation.look()
    for token in tokens:
        llama.eval([token])
    return simulation


@pytest.mark.parametrize("policy", ["latest", "rkv", "snapkv"])
def test_simulation_evicts_as_the_engine_does(
    make: Make, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal shares the first eviction is the engine's: the same keys, queries, pins and window."""
    kv = replace(KV, policy=policy)
    tokens = np.random.default_rng(1).integers(0, 4000, kv.budget + kv.buffer + 1).tolist()
    monkeypatch.setattr(calibrate, "share_of_wins", lambda scores, slots: np.full(LAYERS, 1 / LAYERS))
    simulation = simulated(make(calibrate.full_cache(kv, LENGTH)), kv, tokens)
    engine = make(kv)
    for token in tokens:
        engine.eval([token])
    assert engine.kv_stats().compactions == 1
    for layer in range(LAYERS):
        for head in range(2):
            kept = engine.kv_kept(layer, head)[:-1]
            assert len(kept) == kv.budget
            assert simulation._kept[layer][:, head].tolist() == kept.tolist()


def test_similarities_survive_evictions(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`latest` looks at all later keys, also those that have gone: against all keys of the full cache."""
    llama, kv = make(calibrate.full_cache(KV, LENGTH)), replace(KV, lam=0.0)
    tokens = np.random.default_rng(2).integers(0, 4000, LENGTH - 1).tolist()
    scores: list[tuple[int, Any, Any]] = []
    simulation = calibrate._Simulation(llama, kv)
    score = simulation._score

    def noted(layer: int, cells: Any) -> Any:
        scores.append((layer, cells, score(layer, cells)))
        return scores[-1][2]

    monkeypatch.setattr(simulation, "_score", noted)
    llama.on_decode = lambda past: simulation.look()
    for token in tokens:
        llama.eval([token])
    assert len(simulation._trace) == 4
    for layer, cells, got in scores[-LAYERS:]:
        assert len(np.unique(np.diff(cells[:, 0]))) > 1  # some have gone
        for head in range(2):
            k = _native.keys_unrotated(llama.ctx, layer, head)[: cells.max() + 1].astype(np.float64)
            k /= np.linalg.norm(k, axis=1, keepdims=True)
            rows = cells[: -kv.window, head]
            best = [(k[p + 1 :] @ k[p]).max() for p in rows]
            np.testing.assert_allclose(got[head, : len(rows)], -np.array(best), atol=2e-3)  # the cache is f16


def test_layers_whose_keys_repeat_win_less(make: Make) -> None:
    """Scores that differ by layer: the layer that is always ahead fills up, the others share the rest."""
    simulation = calibrate._Simulation(make(calibrate.full_cache(KV, LENGTH)), KV)
    llama = simulation._llama
    rng = np.random.default_rng(0)
    ahead = {0: 0.0, 1: 9.0, 2: 0.0}
    simulation._score = lambda i, cells: rng.normal(ahead[i], 1, cells.T.shape).astype(np.float32)  # type: ignore[method-assign]
    llama.on_decode = lambda past: simulation.look()
    for token in range(LENGTH - 1):
        llama.eval([token])
    widest = [len(simulation._kept[i]) for i in range(LAYERS)]
    assert widest[1] > 90  # of 104 tokens; budgets allow 120 less 8 for each of the others
    assert sum(widest) <= LAYERS * KV.budget
    assert min(widest) >= KV.least_budget
    for i in range(LAYERS):
        kept = simulation._kept[i]
        assert (kept[: KV.pin] == np.arange(KV.pin)[:, None]).all()
        assert (np.diff(kept, axis=0) > 0).all()
        end = simulation._seen
        assert (kept[-KV.window :] == np.arange(end - KV.window, end)[:, None]).all()


def test_calibration_of_a_model(make: Make, model: Path) -> None:
    llama = make(calibrate.full_cache(KV, LENGTH), n_ctx=LENGTH)
    prompts = [llama.tokenize(b"How many ships?"), llama.tokenize(b"And how many lamps are there?")]
    seen: list[tuple[int, int]] = []
    made = calibrate.calibrate(
        llama, KV, prompts, 2 * LENGTH, progress=lambda *now: seen.append(now), temp=0.0
    )
    assert len(made.shares) == LAYERS
    assert sum(share or 0 for share in made.shares) == pytest.approx(1)
    assert (made.tokens, made.compactions, made.policy) == (2 * LENGTH, 2 * 3, "latest")
    assert (made.model, (made.bytes, made.fingerprint)) == (model.name, fingerprint(model))
    assert seen[-1][1] == 2 * LENGTH
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert llama.kv_stats().compactions == 0
    assert calibrate.calibrate(llama, KV, prompts, 2 * LENGTH, temp=0.0) == made
    drawn = [calibrate.calibrate(llama, KV, prompts, LENGTH, temp=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1]
    assert drawn[0].shares != drawn[2].shares
    one, two = (calibrate.calibrate(llama, KV, prompts[:1], n * LENGTH, temp=2.0) for n in (1, 2))
    assert one.shares != two.shares  # the second trace is another one


def test_layers_without_cells_take_no_share(make: Make, tmp_path: Path) -> None:
    kv = replace(KV, policy="snapkv")
    path = write_family(tmp_path / "windows.gguf", "window, soft-cap")
    llama = make(calibrate.full_cache(kv, LENGTH), path)
    made = calibrate.calibrate(llama, kv, [[1, 2, 3]], LENGTH, temp=0.0)
    governed = set(_native.governed_layers(llama.ctx))
    assert {i for i, share in enumerate(made.shares) if share is not None} == governed
    assert None in made.shares
    made.save(beside(path))
    budgets = replace(kv, layer_budgets="calibrated").for_model(path).budgets(len(made.shares))
    assert sum(budgets) == len(budgets) * kv.budget
    assert all(budgets[i] == kv.budget for i in range(len(budgets)) if i not in governed)


@pytest.mark.parametrize(
    ("kv", "length", "line"),
    [
        (KVBudget(policy="streaming"), 4096, "policy is streaming, must be one of latest, rkv, snapkv"),
        (KVBudget(policy="none"), 4096, "policy is none, must be one of"),
        (KVBudget(budget=512), 767, "length is 767, must be at least 768"),
    ],
)
def test_what_cannot_be_measured(kv: KVBudget, length: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        calibrate.full_cache(kv, length)


def test_wrong_llama_or_prompts(make: Make) -> None:
    for kv in (KV, replace(calibrate.full_cache(KV, LENGTH), lam=0.5)):
        with pytest.raises(ValueError, match="must be made with kv=full_cache"):
            calibrate.calibrate(make(kv), KV, [[1]])
    llama = make(calibrate.full_cache(KV, LENGTH))
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="none of them empty"):
            calibrate.calibrate(llama, KV, prompts)


# -- the file ------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(model: Path, tmp_path: Path) -> tuple[Path, Path, Calibration]:
    """A copy of the model, its calibration's file, and what that holds."""
    path = tmp_path / "a model.gguf"
    shutil.copy(model, path)
    size, digest = fingerprint(path)
    made = Calibration(path.name, size, digest, "latest", {"budget": 40}, (0.5, 0.2, 0.3), 240, 4, "0.1.0")
    made.save(beside(path))
    return path, beside(path), made


def test_file_comes_back(calibrated: tuple[Path, Path, Calibration]) -> None:
    path, file, made = calibrated
    assert file.name == "a model.rkv.json"
    assert Calibration.load(file, path) == made
    found = json.loads(file.read_text())
    assert (found.pop("format"), found.pop("version")) == ("rkv-local calibration", 1)
    assert found == {**asdict(made), "shares": list(made.shares)}
    assert list(path.parent.iterdir()) == [path, file] or list(path.parent.iterdir()) == [file, path]


def test_budgets_in_use(calibrated: tuple[Path, Path, Calibration], make: Make) -> None:
    path, file, made = calibrated
    for where in ("calibrated", str(file)):
        kv = replace(KV, policy="rkv", layer_budgets=where)  # any policy
        assert kv.is_calibrated
        expected = share_out(made.shares, 40, 8)
        assert expected == [56, 27, 37]
        assert kv.for_model(path).layer_budgets == (56, 27, 37)
        llama = make(kv, path)
        assert [_native.layer_of(llama.ctx, i).budget for i in range(LAYERS)] == expected
        assert llama.kv is not None
        assert llama.kv.budgets(LAYERS) == expected
        assert kv.bytes_for(path) == llama.kv_stats().bytes == kv.bytes_for(llama)


def test_budgets_without_a_model(model: Path) -> None:
    kv = KVBudget(layer_budgets="calibrated")
    with pytest.raises(ValueError, match="for_model\\(\\) tells what it is for a model"):
        kv.budgets(3)
    assert KVBudget().for_model(model) == KVBudget()
    assert KVBudget(layer_budgets="pyramid").for_model(model).layer_budgets == "pyramid"
    assert KVBudget(policy="none", layer_budgets="calibrated").for_model(model).layer_budgets == "calibrated"
    with pytest.raises(
        ValueError, match=r"there is no calibration at .*chatter.rkv.json: rkv-local calibrate"
    ):
        Llama(model, kv=kv, verbose=False)


def changed(**changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda found: json.dumps({**found, **changes})


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda found: "{", "it is not JSON"),
        (lambda found: "\xff", "it is not JSON"),
        (lambda found: "[1]", "is no calibration"),
        (changed(format="x"), "is no calibration"),
        (changed(version=2), "has version 2, not 1"),
        (changed(more=1), "this key is missing or unknown: more"),
        (
            lambda found: json.dumps({"format": found["format"], "version": 1}),
            "these keys are missing or unknown",
        ),
        (changed(tokens="many"), "tokens is 'many'"),
        (changed(bytes=True), "bytes is 'True'"),
        (changed(shares=[0.5, 0.2, 0.4]), "the shares add up to 1.1"),
        (changed(shares=[0.5, 0.8, -0.3]), "a share is -0.3"),
        (changed(shares=[0.5, 0.5, float("nan")]), "a share is nan"),
        (changed(shares=[0.5, 0.5, "0"]), "a share is '0'"),
        (changed(shares=[None, None, None]), "the shares add up to 0"),
        (changed(shares=[0.5, 0.5]), "2 shares for 3 layers"),
        (changed(bytes=17), "belongs to another model, a model.gguf of 17 bytes"),
        (changed(fingerprint="sha256:0"), "belongs to another model"),
    ],
)
def test_damage_is_told_in_one_line(
    calibrated: tuple[Path, Path, Calibration], damage: Callable[[dict[str, Any]], str], line: str
) -> None:
    path, file, _ = calibrated
    file.write_bytes(damage(json.loads(file.read_text())).encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        Llama(path, kv=replace(KV, layer_budgets="calibrated"), verbose=False)
    assert line in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    file = tmp_path / "x"
    found = set()
    for at in (None, 0, 5_000_000, 29_999_999):
        data = bytearray(30_000_000)
        if at is not None:
            data[at] = 1
        file.unlink(missing_ok=True)
        file.write_bytes(data)
        found.add(fingerprint(file))
    # the byte at 5,000,000 lies between two pieces
    assert len(found) == 3
    file.write_bytes(b"short")
    assert fingerprint(file)[0] == 5


# -- the command ---------------------------------------------------------------------------------------

SMALL = ("--kv-budget", "40", "--kv-buffer", "16", "--length", "120", "-n", "240", "--temp", "0")


def test_command_writes_what_run_uses(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(model, path)
    result = invoke("calibrate", str(path), *SMALL)
    assert result.exit_code == 0, result.output
    assert re.search(re.escape(f"{beside(path)}: 240 tokens, ") + "[1-9]+ compactions", result.stderr)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["LAYER", "SHARE", "CELLS", "OF", "40"]
    assert sum(int(row[2]) for row in rows[1:]) == LAYERS * 40
    made = Calibration.load(beside(path), path)
    assert (made.policy, made.settings["budget"]) == ("latest", 40)
    run = (
        "run",
        str(path),
        "hi",
        "-n",
        "3",
        "--kv-budget",
        "40",
        "--kv-layer-budgets",
        "calibrated",
        "--json",
    )
    result = invoke(*run)
    assert result.exit_code == 0, result.output
    kv = KVBudget(budget=40, layer_budgets="calibrated")
    assert json.loads(result.stdout)["kv"]["cells_allocated"] == max(kv.for_model(path).cells(LAYERS))


def test_command_elsewhere_with_own_prompts(tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("How many?\n\n  Why?  \n", encoding="utf-8")
    args = (
        str(talker()),
        "-o",
        str(file),
        "--prompts",
        str(prompts),
        "--kv-policy",
        "snapkv",
        "--json",
        *SMALL,
    )
    result = invoke("calibrate", *args)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["policy"] == Calibration.load(file, talker()).policy == "snapkv"
    assert f"use it with --kv-layer-budgets {file}" in result.stderr
    assert not beside(talker()).exists()
    kv = ("--kv-budget", "40", "--kv-layer-budgets", str(file))
    assert invoke("run", str(talker()), "hi", "-n", "3", *kv).exit_code == 0
    bench = ("-d", "0", "-n", "16", "-r", "1", "-fa", "off", "--kv-buffer", "16", "-o", "json")
    assert invoke("bench", "-m", str(talker()), *bench, *kv).exit_code == 0
    wrong = invoke("run", str(mute()), "hi", *kv)
    assert wrong.exit_code == 1
    assert "belongs to another model" in error_line(wrong)


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (("--kv-policy", "none"), 2, "there is nothing to share out"),
        (("--kv-policy", "streaming"), 2, "must be one of latest, rkv, snapkv to compare layers by"),
        (("--kv-layer-budgets", "pyramid"), 2, "is what is measured here"),
        (("--length", "700"), 2, "--length is 700, must be at least 768"),
        (("-o", "no/such/x.json"), 2, "there is no folder 'no/such'"),
        (("-o", "model.gguf"), 2, "must end in .json"),
        (("-o", "."), 2, "it is a folder"),
        (("--prompts", "absent"), 2, "cannot read the prompts"),
        (("--prompts", "/dev/null"), 2, "there are no prompts"),
        (("-m", "other.gguf"), 2, "two models"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], code: int, line: str) -> None:
    result = invoke("calibrate", str(talker()), *args)
    assert result.exit_code == code, result.output
    assert line in error_line(result)
    assert not beside(talker()).exists()


def test_interrupt_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    process = terminal("calibrate", str(talker()), "-o", str(file), "-n", "10000000")
    process.expect("calibrating .* [1-9][0-9,]*/")
    process.kill(signal.SIGINT)
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130, process.before
    assert list(tmp_path.iterdir()) == []
