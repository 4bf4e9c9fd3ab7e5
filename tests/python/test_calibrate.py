"""rkv-local calibrate: the measurement, the budgets that follow, the file, and what uses it."""

from __future__ import annotations

import itertools
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
from llamas import under
from rkv_local import KVBudget, Llama, _native, calibrate
from rkv_local.calibration import Calibration, allocate, beside, fingerprint
from rkv_local.evals import model as evals_model
from rkv_local.evals.model import Context, Model, Setting
from rkv_local.models import resolve
from tiny_families import write_family

KV = KVBudget(budget=40, buffer=16, window=4, pin=3, batch=16, policy="latest")
LENGTH = 120
LAYERS = 3
SIZES = (32, 48, 72)  # that are tried on traces of LENGTH
Make = Callable[..., Llama]

# -- budgets from damage -------------------------------------------------------------------------------

curves = st.lists(
    st.none() | st.tuples(st.floats(0, 10), *[st.none() | st.floats(0, 10)] * 2), min_size=1, max_size=6
).filter(lambda damage: any(curve is not None for curve in damage))


def test_cells_go_where_they_help_most() -> None:
    sizes, damage = (100, 200, 400), [(9.0, 1.0, 0.0), (0.2, None, None), (4.0, 3.0, 0.0)]
    # layer 0: 100 cells less 8, then 200 less 1; layer 2: 300 less 4 (its first step alone is less steep)
    assert allocate(sizes, damage, 100, 100) == [100, 100, 100]
    assert allocate(sizes, damage, 130, 100) == [190, 100, 100]
    assert allocate(sizes, damage, 200, 10) == [200, 133, 267]  # two thirds are the least
    assert allocate(sizes, damage, 200, 190) == [200, 190, 210]
    assert allocate(sizes, damage, 300, 100) == [300, 200, 400]
    assert allocate(sizes, damage, 360, 100) == [414, 253, 413]  # what helps nowhere is dealt out evenly
    assert allocate(sizes, [(9.0, 1.0, 0.0), None, (4.0, 3.0, 0.0)], 200, 100) == [200, 200, 200]


@given(damage=curves, least=st.integers(2, 80), extra=st.integers(0, 5000))
def test_budgets_add_up_and_leave_no_layer_without(damage: list[Any], least: int, extra: int) -> None:
    budget = least + extra
    cells = allocate((20, 40, 80), damage, budget, least)
    assert sum(cells) == len(damage) * budget
    assert min(cells) >= max(least, 2 * budget // 3)
    assert all(n == budget for n, curve in zip(cells, damage, strict=True) if curve is None)
    # not tried is as if it had been found flat
    flat = [c and list(itertools.accumulate(c, lambda a, b: a if b is None else b)) for c in damage]
    assert allocate((20, 40, 80), flat, budget, least) == cells


@given(nats=st.floats(0.1, 10), factor=st.floats(1.01, 10), budget=st.integers(21, 79))
def test_the_steeper_curve_gets_more(nats: float, factor: float, budget: int) -> None:
    gentle = [nats, nats / 2, nats / 4]
    cells = allocate((20, 40, 80), [gentle, [x * factor for x in gentle]], budget, 10)
    assert cells[1] >= budget >= cells[0]
    assert sum(cells) == 2 * budget


def test_the_reasoner_has_its_budgets_beside_it() -> None:
    found = KVBudget(380, policy="latest", layer_budgets="calibrated").for_model(resolve("reasoner").path, 10)
    assert isinstance(found.layer_budgets, tuple)
    assert sum(found.layer_budgets) == 3800
    assert found.layer_budgets[3] == max(found.layer_budgets) > 2 * 380


# -- the measurement -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, three layers with two KV heads, SmolLM2's vocabulary."""
    file = tmp_path_factory.mktemp("calibrate") / "chatter.gguf"
    shape = {"layers": LAYERS, "heads": 4, "kv_heads": 2, "ff": 64, "type": "q4_0", "gain": 3.0}
    return Path(make_random_model(file, tokenizer=smollm2(), **shape))


@pytest.fixture(scope="module")
def loaded(model: Path) -> Iterator[Model]:
    """It, for measurements."""
    with Model(model) as made:
        yield made


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


def random_trace(n: int, seed: int = 1, n_prompt: int = 5) -> calibrate.Trace:
    tokens = np.random.default_rng(seed).integers(0, 4000, n, dtype=np.int32)
    return calibrate.Trace(tokens, n_prompt)


def probabilities(model: Model, kv: KVBudget | None, trace: calibrate.Trace) -> Any:
    """float64 [n, n_vocab] of the next token, read a buffer at a time."""
    with Context(model, Setting(kv=kv, n_ctx=LENGTH, n_outputs=KV.buffer)) as context:
        found = []
        for start in range(0, len(trace.tokens), KV.buffer):
            part = trace.tokens[start : start + KV.buffer]
            context.feed(0, part, start, outputs=True)
            found.append(np.exp(context.logits(len(part)).astype(np.float64)))
    every = np.concatenate(found)
    return every / every.sum(axis=1, keepdims=True)


def test_damage_against_contexts_of_its_own(loaded: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The divergence over the 256 likeliest tokens and all others together, counted out."""
    monkeypatch.setattr(calibrate, "SMALL", 1e-9)
    traces = [random_trace(LENGTH), random_trace(90, 2)]
    sizes, damage = calibrate.measure(loaded, KV, traces)
    assert tuple(sizes) == SIZES
    full = [probabilities(loaded, None, trace) for trace in traces]
    for layer, curve in enumerate(damage):
        assert curve is not None
        assert None not in curve
        for size, found in zip(SIZES, curve, strict=True):
            budgets = [LENGTH] * LAYERS
            budgets[layer] = size
            kv = replace(KV, budget=LENGTH, layer_budgets=tuple(budgets))
            nats: list[float] = []
            for trace, p in zip(traces, full, strict=True):
                q = probabilities(loaded, kv, trace)
                assert np.abs(p[:48] - q[:48]).max() < 1e-4  # 32 cells are full after three buffers
                for a, b in zip(p[48:], q[48:], strict=True):
                    top = np.argsort(-a)[:256]
                    a, b = (np.append(x[top], np.delete(x, top).sum()) for x in (a, b))
                    nats.append(float((a * np.log(a / b)).sum()))
            assert found == pytest.approx(np.mean(nats), rel=0.02, abs=1e-5)


def test_layers_that_hardly_suffer_are_not_tried_with_more(
    loaded: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {(0, 32): 1.0, (0, 48): 0.5, (0, 72): 0.4, (1, 32): 0.2, (1, 48): 0.0009, (2, 32): 0.0005}
    asked: list[tuple[int, int]] = []

    def damage(self: Any, layer: int, size: int) -> float:
        asked.append((layer, size))
        return said[layer, size]

    monkeypatch.setattr(calibrate._Reading, "damage", damage)
    sizes, found = calibrate.measure(loaded, KV, [random_trace(LENGTH)])
    assert asked == [(0, 32), (1, 32), (2, 32), (0, 48), (0, 72), (1, 48)]
    assert (tuple(sizes), found) == (SIZES, [(1.0, 0.5, 0.4), (0.2, 0.0009, None), (0.0005, None, None)])


def test_calibration_of_a_model(loaded: Model, model: Path) -> None:
    prompts = [loaded.prompt("How many ships?"), loaded.prompt("And how many lamps are there?")]
    seen: list[tuple[int, int]] = []

    def made(n_tokens: int, **more: Any) -> Calibration:
        return calibrate.calibrate(loaded, KV, prompts, n_tokens, length=LENGTH, **more)

    first = made(200, progress=lambda *now: seen.append(now))
    assert (first.tokens, first.policy, first.sizes) == (200, "latest", SIZES)
    assert (first.model, (first.bytes, first.fingerprint)) == (model.name, fingerprint(model))
    assert first.settings["buffer"] == 16
    assert "budget" not in first.settings
    assert len(first.damage) == LAYERS
    assert all(curve and curve[0] and curve[0] > 0 for curve in first.damage)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done <= about for done, about in seen)
    assert seen[-1][0] == seen[-1][1]
    assert made(200) == first
    assert made(200, seed=1).damage != first.damage
    assert made(10_000, temp=0.0).tokens <= 2 * LENGTH  # each prompt once


@pytest.mark.parametrize("policy", ["rpc", "streaming", "value-aware"])
def test_any_policy_can_be_measured(loaded: Model, policy: str) -> None:
    kv = KVBudget(400, buffer=16, policy=policy)
    sizes, damage = calibrate.measure(loaded, kv, [random_trace(LENGTH, n_prompt=60)])
    assert sizes == [size for size in SIZES if size >= kv.least_budget]
    assert all(curve and curve[0] and curve[0] > 0 for curve in damage)


def test_layers_without_cells_have_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evals_model.low, "llama_vocab_type", lambda vocab: 1)  # it has none
    path = write_family(tmp_path / "windows.gguf", "window, soft-cap")
    trace = calibrate.Trace(np.arange(LENGTH, dtype=np.int32) * 7 % 96, 5)
    with Model(path) as loaded:
        sizes, damage = calibrate.measure(loaded, KV, [trace])
        setting = Setting(kv=KV, n_ctx=LENGTH)
        with Context(loaded, setting) as context:
            governed = set(_native.governed_layers(context.raw))
    assert {i for i, curve in enumerate(damage) if curve is not None} == governed
    assert None in damage
    Calibration.of(path, KV, sizes, damage, LENGTH).save(beside(path))
    budgets = replace(KV, layer_budgets="calibrated").for_model(path).budgets(len(damage))
    assert sum(budgets) == len(budgets) * KV.budget
    assert all(budgets[i] == KV.budget for i in range(len(budgets)) if i not in governed)


@pytest.mark.parametrize(
    ("kv", "length", "line"),
    [
        (KVBudget(policy="given"), 4096, "policy is given, must be one that chooses"),
        (KVBudget(policy="none"), 4096, "policy is none, must be one that chooses"),
        (KVBudget(), 543, "length is 543, must be at least 544 with buffer 256"),
        (KVBudget(policy="rpc"), 303, "must be at least 304"),
        (KVBudget(3000, pin=2900), 4096, "window and pin are 2908 tokens, must be less than 2,768"),
    ],
)
def test_what_cannot_be_measured(loaded: Model, kv: KVBudget, length: int, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        calibrate.calibrate(loaded, kv, [[1]], length=length)


def test_wrong_prompts_and_short_answers(loaded: Model) -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="none of them empty"):
            calibrate.calibrate(loaded, KV, prompts, length=LENGTH)
    with pytest.raises(ValueError, match="length is 120, must be more than a prompt's 120 tokens"):
        calibrate.calibrate(loaded, KV, [[1], [1] * 120], length=LENGTH)
    with pytest.raises(ValueError, match="the answers are too short: length is 30, must be at least 64"):
        calibrate.calibrate(loaded, KV, [[1]], 30, length=LENGTH)


@pytest.mark.parametrize("limit", [50, 250])  # while it answers, while it reads
def test_it_can_be_stopped(loaded: Model, limit: int) -> None:
    seen = [0]

    def stop() -> bool:
        return seen[-1] >= limit

    with pytest.raises(calibrate.Stopped):
        calibrate.calibrate(
            loaded, KV, [[1]], 120, length=LENGTH, progress=lambda now, _: seen.append(now), stop=stop
        )
    assert limit <= seen[-1] < limit + 2 * KV.buffer


@pytest.mark.slow
def test_the_reasoner_looks_facts_up_in_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 3 loses far more than any other (docs/lab-log.md, 2026-11-28)."""
    monkeypatch.setattr(calibrate, "SIZES", (64, 128, 256))
    question = (
        "Ann has 17 more coins than Tom. Tom has 25 coins. Mia has 9 fewer coins than Leo. Leo has 3"
        " times as many coins as Ann. Sam has half as many coins as Zoe. Zoe has 13 more coins than Mia."
        " How many coins do they have in all? Check 12 times."
    )
    with Model(resolve("reasoner").path) as loaded:
        kv = KVBudget(policy="latest", recent=0, buffer=64)
        made = calibrate.calibrate(loaded, kv, [loaded.prompt(question)], 700, length=700)
    first = [curve[0] or 0.0 for curve in made.damage if curve is not None]
    assert first[3] > 3 * max(first[:3] + first[4:])
    assert made.damage[3] is not None
    assert (np.diff([x or 0.0 for x in made.damage[3]]) < 0).all()


# -- the file ------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(model: Path, tmp_path: Path) -> tuple[Path, Path, Calibration]:
    """A copy of the model, its calibration's file, and what that holds."""
    path = tmp_path / "a model.gguf"
    shutil.copy(model, path)
    size, digest = fingerprint(path)
    damage = ((0.9, 0.1, 0.05), (0.001, None, None), (0.3, 0.2, 0.0))
    made = Calibration(path.name, size, digest, "latest", {"buffer": 16}, SIZES, damage, 240, "0.1.0")
    made.save(beside(path))
    return path, beside(path), made


def test_file_comes_back(calibrated: tuple[Path, Path, Calibration]) -> None:
    path, file, made = calibrated
    assert file.name == "a model.rkv.json"
    assert Calibration.load(file, path) == made
    found = json.loads(file.read_text())
    assert (found.pop("format"), found.pop("version")) == ("rkv-local calibration", 2)
    assert found == {**asdict(made), "sizes": list(SIZES), "damage": [list(c or ()) for c in made.damage]}
    assert list(path.parent.iterdir()) == [path, file] or list(path.parent.iterdir()) == [file, path]


def test_budgets_in_use(calibrated: tuple[Path, Path, Calibration], make: Make) -> None:
    path, file, made = calibrated
    for where in ("calibrated", str(file)):
        kv = under(KV, "rkv", layer_budgets=where)  # any policy
        assert kv.is_calibrated
        expected = allocate(SIZES, made.damage, 40, 8)
        assert expected == [48, 26, 46]
        assert kv.for_model(path).layer_budgets == (48, 26, 46)
        llama = make(kv, path)
        assert [_native.layer_of(llama.ctx, i).budget for i in range(LAYERS)] == expected
        assert llama.kv is not None
        assert llama.kv.budgets(LAYERS) == expected
        assert kv.bytes_for(path) == llama.kv_stats().bytes == kv.bytes_for(llama)


def test_the_default_policy_uses_what_lies_beside_the_model(
    calibrated: tuple[Path, Path, Calibration], make: Make
) -> None:
    path, file, _ = calibrated
    usual = replace(KV, policy="latest", layer_budgets=None)
    assert usual.for_model(path).layer_budgets == (48, 26, 46)
    assert [_native.layer_of(make(usual, path).ctx, i).budget for i in range(LAYERS)] == [48, 26, 46]
    for other in (
        under(usual, "rkv"),
        replace(usual, layer_budgets="uniform"),
        replace(usual, shared_heads=True),
    ):
        assert other.for_model(path) is other
    assert usual.bytes_for(path) == make(usual, path).kv_stats().bytes
    damaged = json.loads(file.read_text())
    file.write_text(json.dumps({**damaged, "version": 1}))
    line = (
        r"has version 1, not 2; .* makes it anew; layer_budgets='uniform' \(--kv-layer-budgets uniform\) goes"
    )
    with pytest.raises(ValueError, match=line) as caught:
        make(usual, path)
    assert "\n" not in str(caught.value)
    file.unlink()
    assert usual.for_model(path) is usual


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
        (changed(version=1), "has version 1, not 2"),
        (changed(more=1), "this key is missing or unknown: more"),
        (
            lambda found: json.dumps({"format": found["format"], "version": 2}),
            "these keys are missing or unknown",
        ),
        (changed(tokens="many"), "tokens is 'many'"),
        (changed(bytes=True), "bytes is 'True'"),
        (changed(sizes=[]), "sizes is []"),
        (changed(sizes=[32, 32, 72]), "sizes is [32, 32, 72]"),
        (changed(sizes=[32, 48, 72.5]), "sizes is [32, 48, 72.5]"),
        (changed(sizes=[32, 48]), "a layer's damage is [0.9, 0.1, 0.05]"),
        (changed(damage=[None, None, None]), "there is no damage"),
        (changed(damage=[0.5, None, None]), "a layer's damage is 0.5"),
        (changed(damage=[[None, 0.5, 0.1], None, None]), "a layer's damage is [None, 0.5, 0.1]"),
        (changed(damage=[[0.5, 0.1, -0.1], None, None]), "a damage is -0.1"),
        (changed(damage=[[0.5, float("nan"), 0.1], None, None]), "a damage is nan"),
        (changed(damage=[[0.5, "0", 0.1], None, None]), "a damage is '0'"),
        (changed(damage=[[0.5, 0.2, 0.1], None]), "2 curves for 3 layers"),
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
    assert re.search(re.escape(f"{beside(path)}: ") + "[1-9][0-9]+ tokens, 3 sizes", result.stderr)
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["LAYER", "NATS", "AT", "32", "48", "72", "CELLS", "OF", "40"]
    assert sum(int(row[-1]) for row in rows[1:]) == LAYERS * 40
    made = Calibration.load(beside(path), path)
    assert (made.policy, made.settings["buffer"]) == ("latest", 16)
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
        (("--kv-policy", "given"), 2, "policy is given, must be one that chooses cells by itself"),
        (("--kv-layer-budgets", "pyramid"), 2, "--kv-layer-budgets"),
        (("--length", "287"), 2, "--length is 287, must be at least 288"),
        (("--kv-budget", "8"), 2, "budget is 8, must be larger than window"),
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


def test_models_and_prompts_that_do_not_serve(tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("why? " * 400, encoding="utf-8")
    for args, line in (
        ((str(mute()),), "has no vocabulary"),
        ((str(talker()), "--prompts", str(prompts), "--length", "300"), "length is 300, must be more than"),
    ):
        result = invoke("calibrate", *args, "-o", str(file))
        assert result.exit_code == 1, result.output
        assert line in error_line(result)
    assert not file.exists()


def test_interrupt_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    process = terminal("calibrate", str(talker()), "-o", str(file), "-n", "10000000")
    process.expect("calibrating .* [1-9][0-9,]*/")
    process.kill(signal.SIGINT)
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130, process.before
    assert list(tmp_path.iterdir()) == []
