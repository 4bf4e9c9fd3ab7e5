"""rkv-local inspect: the recording against the cache itself, JSON, the command, and the page in a browser."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pexpect
import pytest

import browser as web
from cli_tools import error_line, invoke, make_random_model, smollm2, talker, terminal
from rkv_local import KVBudget, Llama
from rkv_local.inspect import Recorder, Recording, record

KV = KVBudget(budget=48, buffer=16, batch=24, window=4, pin=3, layer_budgets=[48, 30, 64])
PROMPT = "Which lamp burned longest? 😀 <b>Count</b> them & answer."
NASTY = (
    b"</script><script>window.hacked = 1</script>",
    b"<img src=x onerror='window.hacked = 1'>",
    b"&lt;",
    b"<!--",
)
LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """Random weights, three layers with two KV heads, SmolLM2's vocabulary."""
    file = tmp_path_factory.mktemp("inspect") / "chatter.gguf"
    shape = {"layers": LAYERS, "heads": 4, "kv_heads": HEADS, "ff": 64, "type": "q4_0"}
    path = make_random_model(file, tokenizer=smollm2(), **shape)
    with Llama(path, kv=KV, n_ctx=4096, n_threads=1, n_threads_batch=1, verbose=False, n_outputs=1) as made:
        yield made


@pytest.fixture(scope="module")
def recording(llama: Llama) -> Recording:
    return record(llama, PROMPT, 200, temp=0.0)


def test_recording_is_what_the_cache_held(llama: Llama) -> None:
    """Against positions read from the cache itself after every token."""
    recorder = Recorder(llama, llama.tokenize(PROMPT.encode()))
    seen: dict[int, list[set[int]]] = {}
    for _ in recorder.generate(temp=0.0):
        step, end = recorder.n_steps - 1, llama.n_tokens
        held = [set(llama.kv_kept(layer, head).tolist()) for layer in range(LAYERS) for head in range(HEADS)]
        if step >= 0:
            since = set(range(recorder.recording().ends[step], end))
            assert all(since <= positions for positions in held)
            seen.setdefault(step, [positions - since for positions in held])
        if end > 150:
            break
    made = recorder.recording()
    assert made.n_steps > 5
    assert sorted(seen) == list(range(made.n_steps))
    for step, rows in seen.items():
        assert [set(np.flatnonzero(row).tolist()) for row in made.held(step)] == rows
    assert made.rows.tolist() == [[layer, head] for layer in range(LAYERS) for head in range(HEADS)]
    assert made.budgets.tolist() == [48, 48, 30, 30, 64, 64]
    assert len(np.unique(made.gone, axis=0)) == LAYERS * HEADS  # heads differ, or this says little


def test_rows_hold_their_budget_with_pin_and_window(recording: Recording) -> None:
    for step, end in enumerate(recording.ends):
        held = recording.held(step)
        assert held.shape == (LAYERS * HEADS, end)
        assert held[:, : KV.pin].all()
        assert all(row[-last:].all() for row, last in zip(held, recording.recent, strict=True))
        assert (held.sum(axis=1) == np.minimum(recording.budgets, end)).all()
        if step:
            before = recording.held(step - 1)
            assert not (held[:, : before.shape[1]] & ~before).any()  # nothing comes back


def test_given_trace_gives_the_same_recording(llama: Llama, recording: Recording) -> None:
    """Generated one token at a time, forced in chunks: the same compactions see the same cells."""
    prompt, trace = recording.tokens[: recording.n_prompt], recording.tokens[recording.n_prompt :]
    forced = record(llama, prompt.tolist(), trace=trace.tolist())
    assert forced.finish == "trace"
    assert forced.tokens.tolist() == recording.tokens.tolist()
    assert len(forced.ends) >= recording.n_steps  # the last generated token was not decoded
    assert forced.ends[: recording.n_steps].tolist() == recording.ends.tolist()
    for step in range(recording.n_steps):
        assert (forced.held(step) == recording.held(step)).mean() > 0.999  # chunks round differently


def test_choosing_layers_heads_and_steps(recording: Recording) -> None:
    n = recording.n_steps
    assert (recording.held(-1) == recording.held(n - 1)).all()
    assert (recording.held(n - 1, layer=1) == recording.held(n - 1)[2:4]).all()
    assert (recording.held(n - 1, head=1) == recording.held(n - 1)[1::2]).all()
    assert (recording.counts(2, layer=2, head=0) == recording.held(2)[4]).all()
    for wrong in (
        {"step": n},
        {"step": -n - 1},
        {"step": 0, "layer": 3},
        {"step": 0, "layer": -1},
        {"step": 0, "head": 2},
    ):
        with pytest.raises(IndexError):
            recording.held(**wrong)


def test_summary_against_pairs_of_heads(recording: Recording) -> None:
    step = recording.n_steps - 1
    held, n_prompt = recording.held(step), recording.n_prompt
    found = recording.summary(step)
    assert found.prompt == pytest.approx(held[:, :n_prompt].mean())
    assert found.trace == pytest.approx(held[:, n_prompt:].mean())
    assert recording.recent.tolist() == [24, 24, 15, 15, 32, 32]
    free = held[:, KV.pin : held.shape[1] - 32].astype(int)  # what some head had to hold is no choice
    both = free @ free.T
    np.fill_diagonal(both, 0)
    assert found.agreement == pytest.approx(both.sum() / (free.sum() * (len(free) - 1)))
    assert found.chance == pytest.approx(free.mean())
    narrow = recording.held(step, layer=1)[:, KV.pin : held.shape[1] - 15]
    assert recording.summary(step, layer=1).agreement == pytest.approx(
        2 * narrow.all(axis=0).sum() / narrow.sum()
    )
    alone = recording.summary(step, layer=0, head=0)
    assert (alone.agreement, alone.chance) == (None, None)


@pytest.mark.parametrize("trace", [None, "The keeper saw 41 ships. " * 12])
def test_pinned_prompt(llama: Llama, trace: str | None) -> None:
    kv = KVBudget(budget=64, buffer=16, batch=16, window=4, pin="prompt")
    with Llama(llama.model_path, kv=kv, n_ctx=512, n_threads=1, verbose=False) as pinning:
        made = record(pinning, PROMPT, 80, trace=trace, temp=0.0)
    assert 8 < made.n_prompt == made.n_pin
    assert made.n_steps > 1
    assert made.summary(-1).prompt == 1.0
    assert 0 < (made.summary(-1).trace or 0) < 1


def test_json_says_the_same(recording: Recording) -> None:
    found = json.loads(recording.to_json())
    assert (found["format"], found["version"]) == ("rkv-local recording", 1)
    keys = {
        "format",
        "version",
        "model",
        "kv",
        "n_prompt",
        "n_pin",
        "finish",
        "text",
        "ends",
        "rows",
        "budgets",
        "recent",
    }
    assert set(found) == {*keys, "tokens", "gone"}
    assert found["gone"] == recording.gone.tolist()
    assert found["tokens"] == recording.tokens.tolist()
    assert found["kv"]["layer_budgets"] == [48, 30, 64]
    assert found["recent"] == recording.recent.tolist()
    assert len(found["text"]) == len(found["tokens"])
    assert "".join(found["text"]).startswith("Which lamp burned longest? \\xf0\\x9f")  # a character in parts


def test_page_packs_what_was_dropped(recording: Recording) -> None:
    data = page_data(recording.to_html())
    packed = np.frombuffer(base64.b64decode(data["gone"]), np.uint8)
    assert (packed.reshape(recording.gone.shape) == recording.gone).all()
    many = replace(recording, ends=np.arange(1, 301, dtype=np.int32), gone=np.full((6, 300), 300, np.int32))
    assert page_data(many.to_html())["width"] == 2


def test_page_of_a_long_recording_is_a_few_megabytes(recording: Recording) -> None:
    """4,000 tokens, 30 layers, 8 heads, 30 compactions: one byte for each row and token."""
    rng, n = np.random.default_rng(0), 4000
    rows = np.array([(layer, head) for layer in range(30) for head in range(8)], np.int32)
    long = replace(
        recording,
        tokens=np.zeros(n, np.int32),
        pieces=(b" lamp",) * n,
        ends=np.linspace(130, n, 30).astype(np.int32),
        rows=rows,
        budgets=np.full(len(rows), 1024, np.int32),
        gone=rng.integers(0, 31, (len(rows), n), np.int32),
    )
    assert len(long.to_html().encode()) < 1.5 * 2**20


def test_refusals(llama: Llama) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        record(llama, [])
    stock = Llama(str(talker()), kv=None, n_ctx=512, verbose=False)
    with stock, pytest.raises(ValueError, match="nothing to inspect without a budget"):
        record(stock, "hi")


def page_data(page: str) -> Any:
    """The JSON inside a page."""
    return json.loads(page.split('id="data">', 1)[1].split("</script>", 1)[0])


# -- the command ---------------------------------------------------------------------------------------

SMALL = ("--kv-budget", "48", "--kv-buffer", "16", "-b", "16", "-t", "1")


def test_command_writes_a_page(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    args = (str(talker()), "hi", "-n", "150", "--ignore-eos", "--seed", "1", *SMALL)
    result = invoke("inspect", *args, "-o", str(file))
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    data = page_data(file.read_text(encoding="utf-8"))
    assert data["model"] == "talker.gguf"
    assert len(data["text"]) - data["n_prompt"] == 150
    assert f"{len(data['text'])} tokens, {len(data['ends'])} compactions" in result.stderr
    again = invoke("inspect", *args, "-o", "-", "--format", "json")
    assert json.loads(again.stdout)["ends"] == data["ends"]  # the same seed
    assert json.loads(again.stdout)["text"] == data["text"]


def test_command_reads_a_given_trace(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.txt", tmp_path / "out.json"
    trace.write_text("The keeper saw 41 ships. " * 20, encoding="utf-8")
    result = invoke("inspect", str(talker()), "hi", "--raw", "--trace", str(trace), "-o", str(file), *SMALL)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert "".join(found["text"]) == "hi" + "The keeper saw 41 ships. " * 20
    assert (found["finish"], found["n_prompt"]) == ("trace", 1)
    assert len(found["ends"]) > 3


def test_command_pins_a_prompt_of_several_batches(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.txt", tmp_path / "out.json"
    trace.write_text("The keeper saw 41 ships. " * 20, encoding="utf-8")
    budget = ("--kv-budget", "96", "--kv-buffer", "16", "-b", "16", "--kv-pin", "prompt")
    prompt = ("which lamp burned longest of all?", "--raw", "--trace", str(trace))
    result = invoke(
        "inspect", str(talker()), "The keeper asks " + prompt[0] * 4, *prompt[1:], "-o", str(file), *budget
    )
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text(encoding="utf-8"))
    assert 16 < found["n_prompt"] == found["n_pin"] < 48
    assert all(row[t] == len(found["ends"]) for row in found["gone"] for t in range(found["n_pin"]))


def test_command_says_when_nothing_was_evicted(tmp_path: Path) -> None:
    result = invoke("inspect", str(talker()), "hi", "-n", "5", "-t", "1", "-o", str(tmp_path / "x.html"))
    assert result.exit_code == 0
    assert "nothing was evicted; a smaller --kv-budget shows more" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "line"),
    [
        (("hi", "--kv-policy", "none"), 2, "policy none evicts nothing"),
        (("hi", "-o", "no/such/folder/x.html"), 2, "there is no folder 'no/such/folder'"),
        (("hi", "-o", "."), 2, "it is a folder"),
        (("hi", "--trace", "absent.txt", "-o", "-"), 2, "cannot read the trace"),
        (("hi", "--raw", "-sys", "x", "-o", "-"), 2, "no place for --system-prompt"),
        (("hello there", "-c", "1", "-o", "-"), 1, "raise -c/--ctx-size"),
    ],
)
def test_wrong_usage(args: tuple[str, ...], code: int, line: str) -> None:
    result = invoke("inspect", str(talker()), *args, "-t", "1")
    assert result.exit_code == code, result.output
    assert line in error_line(result)


def test_interrupt_writes_what_is_there(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    process = terminal("inspect", str(talker()), "hi", "--ignore-eos", *SMALL, "-o", str(file))
    process.expect("generating .* [1-9][0-9]* compactions")
    process.kill(signal.SIGINT)
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 130, process.before
    data = page_data(file.read_text(encoding="utf-8"))
    assert data["finish"] == "interrupted"
    assert len(data["ends"]) > 0


# -- the page ------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not web.available(), reason="Chromium and its driver are not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Browser]:
    with web.browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def shown(page: web.Browser, recording: Recording, tmp_path: Path) -> web.Browser:
    """The recording's page, as it opens: all layers and heads, last compaction."""
    show(page, recording, tmp_path)
    return page


def show(page: web.Browser, recording: Recording, folder: Path) -> None:
    file = folder / "page.html"
    file.write_text(recording.to_html(), encoding="utf-8")
    page.open(file)
    assert page.log() == []  # nothing refused, nothing fetched, no error


def classes(page: web.Browser) -> list[str]:
    """The first class of each token: c0 to c8, or later."""
    found = page.js("return [...document.querySelectorAll('#text span')].map(s => s.classList[0])")
    return list(found)


def expected(recording: Recording, step: int, layer: int | None = None, head: int | None = None) -> list[str]:
    counts, rows = recording.counts(step, layer, head), len(recording.held(step, layer, head))
    later = len(recording.tokens) - len(counts)
    return [f"c{-(-8 * c // rows)}" for c in counts.tolist()] + ["later"] * later


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


@needs_browser
def test_page_opens_with_everything(shown: web.Browser, recording: Recording) -> None:
    last = recording.n_steps - 1
    assert shown.text("#where") == f"{last + 1} of {last + 1}, after {recording.ends[last]} tokens"
    assert classes(shown) == expected(recording, last)
    texts = shown.js("return [...document.querySelectorAll('#text span')].map(s => s.textContent)")
    assert texts == [text.replace("\n", "↵\n") for text in recording.texts]
    total = recording.summary(last)
    assert shown.text("#prompt-share") == percent(total.prompt)
    assert shown.text("#trace-share") == percent(total.trace)
    assert shown.text("#agreement") == percent(total.agreement)
    table = shown.js(
        "return [...document.querySelectorAll('#layers tr')].map(r => [...r.cells].map(c => c.innerText))"
    )
    assert [row[:2] for row in table] == [["0", "48"], ["1", "30"], ["2", "64"]]
    for layer, row in enumerate(table):
        one = recording.summary(last, layer)
        assert [row[i] for i in (2, 3, 5, 6)] == [
            percent(x) for x in (one.prompt, one.trace, one.agreement, one.chance)
        ]


@needs_browser
def test_page_layer_head_and_step(shown: web.Browser, recording: Recording) -> None:
    last = recording.n_steps - 1
    shown.choose("#layer", "1")
    assert classes(shown) == expected(recording, last, 1)
    shown.choose("#head", "0")
    assert classes(shown) == expected(recording, last, 1, 0)
    assert shown.text("#agreement") == "–"
    shown.click("#back")
    assert classes(shown) == expected(recording, last - 1, 1, 0)
    assert shown.text("#trace-share") == percent(recording.summary(last - 1, 1, 0).trace)
    shown.js("document.activeElement.blur()")
    shown.press("ArrowLeft")
    shown.press("ArrowLeft")
    assert shown.text("#where").startswith(f"{last - 2} of ")
    assert classes(shown) == expected(recording, last - 3, 1, 0)
    shown.press("ArrowRight")
    assert classes(shown) == expected(recording, last - 2, 1, 0)
    shown.choose("#layer", "all")
    shown.js("const s = document.querySelector('#step'); s.value = 1; s.dispatchEvent(new Event('input'))")
    assert classes(shown) == expected(recording, 0, None, 0)
    shown.js("document.activeElement.blur()")
    shown.press("ArrowLeft")  # there is nothing before the first
    assert shown.text("#where").startswith("1 of ")
    assert shown.log() == []


@needs_browser
def test_page_pointer_and_keys_tell_the_token(shown: web.Browser, recording: Recording) -> None:
    last, counts = recording.n_steps - 1, recording.counts(-1)
    dropped = int(np.flatnonzero(counts == 0)[-1])
    for token in (2, dropped):
        shown.point(f"#text span:nth-child({token + 1})")
        detail = shown.text("#detail")
        assert detail.startswith(
            json.dumps(recording.texts[token], ensure_ascii=False) + f" · position {token} ("
        )
        assert f"held by {counts[token]} of 6 heads" in detail
    assert f"by none since compaction {recording.gone[:, dropped].max() + 1}" in shown.text("#detail")
    shown.js("document.querySelector('#text').focus({preventScroll: true}); window.scrollTo(0, 0)")
    shown.press("Shift", "ArrowRight")
    assert f"· position {dropped + 1} " in shown.text("#detail")
    on_top = """const box = document.querySelector(".at").getClientRects()[0];
                return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).className"""
    assert "at" in shown.js(on_top).split()  # scrolled to, and not below a bar
    assert shown.text("#where").startswith(f"{last + 1} of ")


@needs_browser
def test_page_takes_tokens_for_text(page: web.Browser, recording: Recording, tmp_path: Path) -> None:
    pieces = (*NASTY, b"\xf0\x9f", b"\x98\x80", b"{{data}}", b"\x00", "\u2028".encode())
    made = replace(recording, model="<b>{{data}}</b>", pieces=(*pieces, *recording.pieces[len(pieces) :]))
    show(page, made, tmp_path)
    assert page.js("return window.hacked === undefined")
    assert page.js("return document.querySelectorAll('#text *').length") == len(made.tokens)
    texts = page.js("return [...document.querySelectorAll('#text span')].map(s => s.textContent)")
    assert texts[: len(pieces)] == [
        *(p.decode() for p in NASTY),
        "\\xf0\\x9f",
        "\\x98\\x80",
        "{{data}}",
        "\x00",
        "\u2028",
    ]
    assert page.js("return document.title") == "What the cache holds: <b>{{data}}</b>"


@needs_browser
def test_page_without_compactions(page: web.Browser, llama: Llama, tmp_path: Path) -> None:
    made = record(llama, "hi", 5, temp=0.0)
    show(page, made, tmp_path)
    assert page.text("#where") == "no compaction: nothing was evicted"
    assert classes(page) == ["later"] * len(made.tokens)
    page.press("ArrowLeft")
    assert page.log() == []


# relative luminance and contrast as in WCAG 2.2, section 1.4.3
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = c => rgb(c).slice(0, 3).map(x => x / 255)
  .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor;
  if (rgb(c)[3] !== 0) return c; } return "rgb(255, 255, 255)"; };
return [...document.querySelectorAll("#legend span, p, dt, dd, label, th, td, output")].map(e => {
  const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
  return [e.className || e.tagName, (a + 0.05) / (b + 0.05)]; });
"""


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_can_be_read(shown: web.Browser, scheme: str) -> None:
    shown.js(
        "for (let k = 1; k <= 8; k++) { const s = document.createElement('span'); s.className = 'c' + k; "
        "document.querySelector('#legend').append(s); }"
    )  # levels that six heads do not have
    shown.scheme(scheme)
    found = shown.js(CONTRAST)
    assert {f"c{k}" for k in range(9)} <= {name for name, _ in found}
    assert [(name, ratio) for name, ratio in found if ratio < 4.5] == []
    dark = shown.js("return getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")


@needs_browser
def test_page_names_its_controls(shown: web.Browser) -> None:
    unnamed = shown.js(
        "return [...document.querySelectorAll('select, button, input, meter, [tabindex]')].filter(e => "
        "!(e.labels && e.labels.length) && !e.ariaLabel && !e.getAttribute('aria-labelledby')).map(e => e.id)"
    )
    assert unnamed == []
    assert shown.js("return document.documentElement.lang") == "en"
