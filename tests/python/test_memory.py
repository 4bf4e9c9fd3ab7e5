"""Memory plans: what is measured without allocating equals what is allocated, and limits are kept."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli_tools import (
    ROOT,
    environment,
    error_line,
    invoke,
    make_random_model,
    mute,
    one_thread,
    shell,
    talker,
)
from llamas import write_unsupported
from rkv_local import KVBudget, Llama, Plan, RKVError, Session, _native, devices, memory, plan
from rkv_local.devices import Device
from rkv_local.memory import FREE, Planner
from rkv_local.models import resolve
from rkv_local.probe import MAIN, Measured, Part, Probe, Setting
from rkv_local.sizes import GIB, MIB, parse_size, show
from rpc_client import has_rpc, started
from tiny_families import write_family

THREADS: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1}


# --- sizes ---


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 << 30), ("6gib", 6 << 30), ("6G", 6 << 30), ("6 g", 6 << 30), ("6GB", 6_000_000_000),
        ("1.5GiB", 3 << 29), (".5g", 1 << 29), ("800MiB", 800 << 20), ("800m", 800 << 20),
        ("800MB", 800_000_000), ("4096KiB", 4 << 20), ("4096K", 4 << 20), ("4000KB", 4_000_000),
        ("2TiB", 2 << 40), ("2T", 2 << 40), ("2TB", 2 * 10**12), ("1073741824", GIB), (GIB, GIB),
        ("6442450944B", 6 << 30), ("auto", None), (" AUTO ", None),
    ],
)  # fmt: skip
def test_sizes(text: str | int, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GiB", "-1", "-6GiB", "nan", "inf", "1e9", "6 apples", "6GiBs", "GiB", "6,5GiB", "6GiB 2",
     "6", "512", "1KiB", "9999999999TiB", "0x10"],
)  # fmt: skip
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"^memory is ") as caught:
        parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("6", "e.g. 6GiB"),
        (512, "e.g. 512GiB"),
        ("1.5 ", "e.g. 1.5GiB"),
        ("1KiB", "at least 1MiB is needed"),
        ("6B", "at least 1MiB is needed"),
    ],
)
def test_a_forgotten_unit_is_a_bare_numbers(value: str | int, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint) + "$"):
        parse_size(value)


@pytest.mark.parametrize("value", [None, True, 6.5, b"6GiB", -1, 0, 6])
def test_bad_values(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^memory is "):
        parse_size(value)


def test_shown_sizes() -> None:
    assert show(3 << 29) == "1.50 GiB"
    assert show(100 << 20) == "100.0 MiB"
    assert show(100 << 20, GIB) == "0.10 GiB"


# --- what is measured is what is allocated ---


SETTINGS: dict[str, dict[str, Any]] = {
    "budget": {"kv": KVBudget(budget=256, buffer=64)},
    "latest": {"kv": KVBudget(budget=256, buffer=64, policy="latest", n_sim=3)},
    "pyramid": {"kv": KVBudget(budget=256, buffer=64, layer_budgets="pyramid")},
    "sequences": {"kv": KVBudget(budget=256, buffer=64), "n_seq_max": 3, "n_outputs": 3},
    "quantised": {"kv": KVBudget(), "type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
    "all logits": {"kv": KVBudget(), "n_outputs": None},
    "full": {"kv": None, "n_ctx": 700},
    "read": {"kv": KVBudget(), "use_mmap": False},
}


@pytest.fixture(scope="module")
def repacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """q4_0, which ggml repacks on most processors; heads that q8_0 divides."""
    file = tmp_path_factory.mktemp("models") / "repacked.gguf"
    return Path(make_random_model(file, layers=3, heads=4, kv_heads=2, head_dim=64, ff=512, type="q4_0"))


def sums(entries: list[_native.Memory]) -> dict[str, int]:
    names = ("weights", "cache", "compute", "temporary")
    return {name: sum(getattr(e, name) for e in entries) for name in names}


@pytest.mark.parametrize("name", SETTINGS)
def test_measured_without_weights_is_what_a_context_takes(name: str, repacked: Path) -> None:
    setting = Setting(**SETTINGS[name], **THREADS)
    with Probe(repacked) as probe:
        measured = probe.measure(setting)
    with Llama(repacked, **setting.arguments(), verbose=False) as llama:
        real = sums(_native.memory(llama.ctx))
        stats = llama.kv_stats()
    part = measured.parts[MAIN]
    assert list(measured.parts) == [MAIN]
    assert part.kv == real["cache"]
    assert part.compute == real["compute"] + real["temporary"]
    if setting.use_mmap:  # all of the file is resident while it is loaded; its ends are unmapped afterwards
        assert 0 <= part.weights - real["weights"] <= measured.copies
    else:
        assert part.weights == real["weights"]
    assert measured.cells == stats.cells
    assert 0 <= part.kv - stats.bytes < 1 << 14  # alignment of tensors in a buffer
    assert measured.rings == stats.bytes - stats.bytes_kv
    assert (real["temporary"] > 0) == (setting.kv is not None)


def test_measuring_a_context_changes_nothing(repacked: Path) -> None:
    """rkv_get_memory between two decodes: the same logits, before and after a compaction."""
    setting = Setting(kv=KVBudget(budget=64, buffer=16, batch=16), **THREADS)
    found = []
    for looks in (False, True):
        with Llama(repacked, **setting.arguments(), verbose=False) as llama:
            session = Session(llama)
            for i in range(100):
                row = session.decode({0: [i % 50 + 1]})[0]
                if looks and i % 9 == 0:
                    assert sums(_native.memory(llama.ctx))["temporary"] > 0
            assert llama.kv_stats().compactions > 0
            found.append(row)
    assert np.array_equal(found[0], found[1])


def test_fewer_outputs_change_no_logits(repacked: Path) -> None:
    rows = []
    for n_outputs in (1, None):
        with Llama(repacked, kv=KVBudget(budget=64, buffer=16, batch=16), n_outputs=n_outputs, n_threads=1,
                   n_threads_batch=1, verbose=False) as llama:  # fmt: skip
            rows.append(Session(llama).decode({0: [i % 50 + 1 for i in range(90)]})[0])
            if n_outputs:
                with pytest.raises(RKVError, match="16 rows of logits in one decode, n_outputs is 1"):
                    Session(llama).decode({0: list(range(16))}, logits="all")
    assert np.array_equal(rows[0], rows[1])
    with pytest.raises(ValueError, match="n_outputs must be None with logits_all"):
        Llama(repacked, n_outputs=1, logits_all=True)
    with pytest.raises(ValueError, match="n_outputs is 0"):
        Llama(repacked, n_outputs=0)


# --- the search ---


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "list_devices", lambda: [])


def test_with_plenty_nothing_changes(repacked: Path) -> None:
    made = plan(repacked, **THREADS)
    assert made.fits
    assert made.reasons == ()
    assert made.setting == Setting(**THREADS)
    assert made.limit_bytes > made.total_bytes
    assert (made.kv_budget, made.cache_type, made.n_seq, made.n_batch) == (1024, "f16", 1, 256)
    parts = made.weights_bytes + made.kv_bytes + made.compute_bytes + made.other_bytes
    assert parts == made.total_bytes


def test_each_limit_is_kept_until_nothing_fits(repacked: Path, cpu_only: None) -> None:
    """From plenty down to nothing: what fits is below the limit, and what is given up comes in an order."""
    order = ["weights are read", "prompt batch", "cache q8_0", "buffer", "budget"]
    limit = plan(repacked, "20GiB", **THREADS).total_bytes + MIB
    seen: set[str] = set()
    while True:
        made = plan(repacked, limit, **THREADS)
        if not made.fits:
            break
        assert made.total_bytes <= made.limit_bytes * 0.98
        assert made.limit_bytes == limit
        assert made.lacking_bytes == 0
        given_up = [next(o for o in order if r.startswith(o)) for r in made.reasons]
        assert given_up == order[order.index(given_up[0]) if given_up else 0 :][: len(given_up)]
        seen |= set(given_up)
        limit -= MIB // 4
    assert seen >= set(order[1:])
    assert made.lacking_bytes == made.total_bytes - (limit - limit // 50)
    missing, near = made.reasons
    assert re.match(r"[\d.]+ MiB too much \(2 % stay in reserve\): model ", missing)
    least = re.search(
        r"the least that this model works with is ([\d.]+) MiB "
        r"\(budget 256, buffer 128, cache q8_0, batch 32\)",
        near,
    )
    assert least
    enough = plan(
        repacked, round((float(least[1]) + 2) * MIB), **THREADS
    )  # the process itself may have grown
    assert enough.fits


def test_what_is_given_is_kept(repacked: Path, cpu_only: None) -> None:
    common: dict[str, Any] = {"use_mmap": True, **THREADS}
    small = plan(repacked, "2GiB", kv=KVBudget(), n_batch=256, type_k="f16", **common)
    assert small.fits
    # 1 MiB too little beside the reserve, however large this process is; a batch of 64 takes 4 MiB less
    limit = round((small.total_bytes - MIB) / 0.98)
    made = plan(repacked, limit, kv=KVBudget(), n_batch=256, type_k="f16", **common)
    assert not made.fits
    assert (made.kv_budget, made.n_batch, made.cache_type) == (1024, 256, "f16")
    near = made.reasons[1]
    assert near.startswith("it would fit with ")
    assert "-b " in near or "-ctk q8_0" in near
    kept = plan(repacked, limit, kv=KVBudget(), **common)
    assert kept.fits
    assert kept.kv_budget == 1024
    off = plan(repacked, limit, n_batch=256, flash_attn=False, **common)
    assert off.setting.flash_attn is False
    assert off.setting.type_v == "f16"


def test_a_full_cache_gets_shorter_unless_its_length_is_given(repacked: Path, cpu_only: None) -> None:
    wanted = plan(repacked, "2GiB", kv=None, n_ctx=8192, **THREADS)
    assert wanted.fits
    assert wanted.kv_budget is None
    least = {"n_batch": 32, "type_k": "q8_0", "type_v": "q8_0", "flash_attn": True, "use_mmap": False}
    limit = plan(repacked, "2GiB", kv=None, n_ctx=2048, **least, **THREADS).total_bytes * 50 // 49 + MIB
    fixed = plan(repacked, limit, kv=None, n_ctx=8192, **THREADS)
    assert not fixed.fits
    assert fixed.n_ctx == 8192
    assert "-c 2048" in fixed.reasons[1]
    with Planner(repacked, limit) as planner:
        free = planner.search(Setting(kv=None, n_ctx=8192, n_threads=1, n_threads_batch=1), FREE)
    assert free.fits
    assert 1024 <= free.n_ctx < 8192
    assert free.reasons[-1] == f"context {free.n_ctx:,} instead of 8,192"


def test_as_many_sequences_as_fit(repacked: Path, cpu_only: None) -> None:
    kv = KVBudget(budget=256, buffer=64, batch=64)
    one = plan(repacked, "2GiB", kv=kv, use_mmap=False, **THREADS)
    made = plan(
        repacked, int((one.total_bytes + 6 * MIB) / 0.98), kv=kv, n_seq_max="auto", use_mmap=False, **THREADS
    )
    assert made.fits
    assert 1 < made.n_seq < 256
    assert made.total_bytes <= made.limit_bytes
    more = plan(
        repacked,
        one.total_bytes + 5 * MIB,
        kv=kv,
        n_seq_max=made.n_seq + 1,
        n_batch=64,
        use_mmap=False,
        **THREADS,
    )
    assert not more.fits or more.cache_type == "q8_0"
    with Llama(repacked, **made.arguments(), verbose=False) as llama:
        Session(llama).decode({s: [1, 2, 3] for s in range(made.n_seq)})
        assert made.kv_bytes == sums(_native.memory(llama.ctx))["cache"]


def test_bad_arguments(repacked: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unexpected parameter 'speed'"):
        plan(repacked, speed=3)
    with pytest.raises(ValueError, match="memory is '6 apples'"):
        plan(repacked, "6 apples")
    with pytest.raises(ValueError, match="cannot read the model file"):
        plan(tmp_path / "absent.gguf")
    with pytest.raises(ValueError, match="n_ctx is -1"):
        plan(repacked, n_ctx=-1)
    with pytest.raises(RKVError, match="ALiBi"):
        plan(write_unsupported(tmp_path / "alibi.gguf", "mpt"))
    assert plan(
        tmp_path / "alibi.gguf", kv=None, n_ctx=512
    ).fits  # without a budget it is a model like others
    for kind, write in (("window only", write_family), ("mamba", write_unsupported)):
        made = plan(write(tmp_path / f"{kind}.gguf", kind), kv=None, n_ctx=512)
        assert made.fits
        assert made.kv_bytes > 0


def test_the_line() -> None:
    made = Plan(
        fits=True, weights_bytes=round(4.58 * GIB), kv_bytes=round(0.14 * GIB), rings_bytes=0,
        compute_bytes=round(0.25 * GIB), other_bytes=0, total_bytes=round(4.97 * GIB), limit_bytes=6 * GIB,
        lacking_bytes=0, n_gpu_layers=0, n_layer=32, kv_layers=32, kv_others=(), kv_budget=1024,
        kv_buffer=128, cells=1152, cache_type="f16", n_seq=1, n_ctx=32768, n_batch=128, n_ubatch=128,
        use_mmap=True,
        devices=(memory.DevicePlan(MAIN, 0, 0, 0, 0, 0),), setting=Setting(),
    )  # fmt: skip
    text = "model 4.58 GiB + KV 0.14 GiB (1,152 cells × 32 layers) + compute 0.25 GiB = 4.97 of 6.00 GiB"
    assert made.line() == text
    made = replace(made, n_seq=2, other_bytes=GIB, total_bytes=round(5.97 * GIB))
    assert "(1,152 cells × 32 layers × 2 sequences)" in made.line()
    assert made.line().endswith("+ program 1.00 GiB = 5.97 of 6.00 GiB")
    assert json.loads(json.dumps(made.as_dict()))["total_bytes"] == made.total_bytes
    made = replace(made, n_seq=1, kv_layers=1, kv_others=("windows", "states"))
    assert "(1,152 cells × 1 layer + windows + states)" in made.line()
    assert "(1,152 cells + windows)" in replace(made, kv_layers=0, kv_others=("windows",)).line()


# --- GPUs: none is here, so that what they say is made up ---


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, repacked: Path) -> Iterator[Callable[[str], Planner]]:
    """Two GPUs of 10 and 6 GiB; each of 3 layers takes 2 GiB on the first, the output 1 GiB on the second."""
    gpus = [
        Device("CUDA0", "", "GPU", 9 * GIB, 10 * GIB),
        Device("CUDA1", "", "GPU", 6 * GIB, 6 * GIB),
        Device("CPU", "", "CPU", 64 * GIB, 64 * GIB),
        Device("BLAS", "", "accelerator", 0, 0),
        Device("Vulkan9", "", "iGPU", 9 * GIB, 9 * GIB),
        Device("GONE", "", "GPU", 0, 0),
    ]
    made: list[Planner] = []

    def measure(_: Probe, setting: Setting) -> Measured:
        layers = min(3, setting.n_gpu_layers % (1 << 31))
        budget = setting.kv.budget if setting.kv else 4096
        kv = budget * (1 << 20) // (2 if setting.type_k == "q8_0" else 1)
        batch = setting.n_batch or 256
        parts = {
            MAIN: Part((3 - layers) * 2 * GIB, kv * (3 - layers) // 3, MIB),
            "CUDA0": Part(layers * 2 * GIB, kv * layers // 3, batch * MIB) if layers else Part(),
            "CUDA1": Part(GIB, 0, batch * MIB) if setting.n_gpu_layers % (1 << 31) > 3 else Part(),
        }
        return Measured(parts, 1280, 0, 0, 50 * MIB, 4096, batch, batch, 1, setting.kv)

    monkeypatch.setattr(memory, "list_devices", lambda: gpus)
    monkeypatch.setattr(memory, "main_memory", lambda: (32 * GIB, 64 * GIB))
    monkeypatch.setattr(memory, "driver_used", lambda pid: 512 * MIB)
    monkeypatch.setattr(Probe, "measure", measure)

    def planner(limit: str) -> Planner:
        made.append(Planner(repacked, limit))
        return made[-1]

    yield planner
    for one in made:
        one.probe.close()


def test_auto_takes_all_layers_where_they_fit(two_gpus: Callable[[str], Planner]) -> None:
    made = two_gpus("auto").search(Setting(), FREE)
    assert made.fits
    assert made.reasons == ()
    assert made.n_gpu_layers == 4
    assert [d.name for d in made.devices] == ["CUDA0", "CUDA1", MAIN]
    # what is free and what the driver holds for this process already, less the margin
    assert made.devices[0].limit_bytes == 9 * GIB + 256 * MIB - GIB
    assert made.devices[1].limit_bytes == 6 * GIB + 256 * MIB - 6 * GIB // 10
    assert made.limit_bytes == sum(d.limit_bytes for d in made.devices[:2])
    assert made.other_bytes == 512 * MIB
    assert "driver 0.50 GiB" in made.line()
    assert made.weights_bytes == 7 * GIB  # of the GPUs alone


def test_fewer_layers_where_they_do_not(two_gpus: Callable[[str], Planner]) -> None:
    made = two_gpus("5GiB").search(Setting(), FREE)
    assert made.fits
    assert made.n_gpu_layers == 1  # 2: 4 GiB + 2/3 GiB + driver 0.5
    assert made.total_bytes <= 5 * GIB
    assert made.kv_budget == 1024  # speed goes before memory of the text
    assert made.reasons[-1] == "1 of 4 layers on the GPU"
    assert two_gpus("5.4GiB").search(Setting(), FREE).n_gpu_layers == 2
    assert two_gpus("1GiB").search(Setting(), FREE).n_gpu_layers == 0


def test_given_layers_are_kept(two_gpus: Callable[[str], Planner]) -> None:
    made = two_gpus("5GiB").search(Setting(n_gpu_layers=3), FREE - {"n_gpu_layers"})
    assert not made.fits
    assert made.n_gpu_layers == 3
    assert "-ngl 1" in made.reasons[1]
    none = two_gpus("7GiB").search(Setting(n_gpu_layers=0), FREE - {"n_gpu_layers"})
    assert none.fits  # in main memory, where the limit applies then
    assert none.devices[0].name == MAIN
    assert none.limit_bytes == 7 * GIB


def test_main_memory_limits_what_is_not_on_the_gpu(
    two_gpus: Callable[[str], Planner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "main_memory", lambda: (2 * GIB, 64 * GIB))
    made = two_gpus("3GiB").search(Setting(), FREE)
    assert not made.fits
    assert "too much (2 %" in made.reasons[0]  # it is the limit of both GPUs that is passed
    monkeypatch.setattr(memory, "main_memory", lambda: (2 * GIB, 64 * GIB))
    made = two_gpus("4GiB").search(Setting(n_gpu_layers=1), FREE - {"n_gpu_layers"})
    assert not made.fits
    assert "too much on CPU" in made.reasons[0]


ON_A_SERVER = """
import json, sys
import rpc_client
from rkv_local import Llama, _native, plan
rpc_client.register(sys.argv[2:])
common = {"n_threads": 1, "n_threads_batch": 1, "n_batch": 32}
full = plan(sys.argv[1], "20GiB", **common)
part = plan(sys.argv[1], full.total_bytes - 20000, **common)
with Llama(sys.argv[1], **part.arguments(), verbose=False) as llama:
    llama.eval(list(range(1, 90)))
    real = [vars(m) for m in _native.memory(llama.ctx)]
print(json.dumps({"full": full.as_dict(), "part": part.as_dict(), "real": real}))
"""


@pytest.mark.skipif(not has_rpc(), reason="the libraries were built without -DGGML_RPC=ON")
def test_layers_that_fit_on_a_server(tmp_path: Path) -> None:
    """What llama.cpp takes for a GPU: fewer layers go there, and what lies there is what was planned."""
    model = make_random_model(tmp_path / "model.gguf", layers=12, heads=16, kv_heads=16, head_dim=64, ff=2048)
    with started(1) as endpoints:
        done = subprocess.run(
            [sys.executable, "-c", ON_A_SERVER, str(model), *endpoints],
            env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'python'}"),
            capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    full, part = found["full"], found["part"]
    assert (full["n_gpu_layers"], full["reasons"]) == (13, [])
    assert 0 < part["n_gpu_layers"] < 13
    assert part["reasons"] == [f"{part['n_gpu_layers']} of 13 layers on the GPU"]
    assert part["fits"]
    there = [m for m in found["real"] if not m["host"]]
    assert [m["device"] for m in there] == [part["devices"][0]["name"]]
    assert there[0]["weights"] == part["weights_bytes"]
    assert there[0]["cache"] == part["kv_bytes"]
    assert there[0]["compute"] + there[0]["temporary"] == part["compute_bytes"]


def test_what_the_driver_says_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "--query-compute-apps=pid,used_memory": "12, 300\n34, 500\n12, 40\n56, [N/A]\n",
        "--query-gpu=memory.used": "1000\n20\n",
    }

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 0, answers[command[1]], "")

    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(devices.subprocess, "run", run)
    assert devices.driver_used(12) == 340 * MIB
    assert devices.driver_used(56) is None
    assert devices.driver_used(99) is None
    assert devices.device_used() == 1020 * MIB
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert devices.driver_used(12) is None
    assert devices.device_used() is None


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert devices._cgroup_limits(tmp_path) == []
    (tmp_path / "memory.max").write_text(f"{4 * GIB}\n")
    assert devices._cgroup_limits(tmp_path) == [(4 * GIB, 2 * GIB)]
    monkeypatch.setattr(devices, "_cgroup_limits", lambda: [(4 * GIB, 2 * GIB)])
    monkeypatch.setattr(devices, "_meminfo", lambda: (16 * GIB, 32 * GIB))
    assert devices.main_memory() == (2 * GIB, 4 * GIB)
    monkeypatch.setattr(devices, "_cgroup_limits", lambda: [])
    assert devices.main_memory() == (16 * GIB, 32 * GIB)


def test_a_driver_that_is_not_there_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert memory._driver_overhead() == 0


def test_main_memory_is_known() -> None:
    available, total = devices.main_memory()
    assert 0 < available <= total
    assert devices.resident() > 10 * MIB
    peak = devices.peak_resident()
    assert peak is None or peak >= devices.resident() - MIB


# --- the command line ---


def run(*args: str) -> Any:
    return invoke("run", str(talker()), "hello", "-n", "4", "--temp", "0", *args)


def test_run_says_what_it_chose() -> None:
    plain, told = run(), run("--memory", "2GiB")
    assert (plain.exit_code, told.exit_code) == (0, 0)
    assert plain.stdout == told.stdout
    assert len(plain.stderr.splitlines()) == 1  # nothing asked, nothing changed: statistics only
    line = told.stderr.splitlines()[0]
    assert re.fullmatch(
        r"model [\d.]+ MiB \+ KV [\d.]+ MiB \(1,280 cells × 2 layers\) \+ compute [\d.]+ MiB "
        r"\+ program [\d.]+ MiB = [\d.]+ MiB of 2\.00 GiB",
        line,
    )


def fitting(*options: str) -> dict[str, Any]:
    result = invoke(*one_thread(["fit", str(talker()), "--json", *options]))
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def too_little() -> str:
    """3 MiB less than the plan and its reserve; this process, a part of the plan, may be large by now."""
    return str(int((fitting()["plan"]["total_bytes"] - 3 * MIB) / 0.98))


def test_run_adapts_and_says_so() -> None:
    result = run("--memory", too_little(), "--json")
    assert result.exit_code == 0
    assert "so that it fits: " in result.stderr
    assert "prompt batch " in result.stderr
    assert json.loads(result.stdout)["kv"]["cells_allocated"] == 1280


def test_a_long_buffer_gives_way_unless_it_was_given(cpu_only: None) -> None:
    path = resolve("smollm2").path
    limit = round((plan(path, "20GiB", **THREADS).total_bytes - 20 * MIB) / 0.98)  # beside the reserve
    made = plan(path, limit, **THREADS)
    assert made.fits and (made.kv_buffer, made.cells, made.cache_type) == (256, 1280, "q8_0")
    while made.kv_buffer == 256:
        limit -= MIB // 2
        made = plan(path, limit, **THREADS)
    assert made.fits and (made.kv_buffer, made.cells) == (128, 1152)
    assert made.reasons[1:] == ("cache q8_0 instead of f16", "buffer 128 instead of 256")
    kept = plan(path, limit - MIB, kv=KVBudget(), **THREADS)
    assert not kept.fits and kept.kv_buffer == 256 and "--kv-buffer 128" in kept.reasons[1]
    args = one_thread(["run", "hi", "-m", "smollm2", "-n", "1", "--json", "--memory", str(limit - 4 * MIB)])
    result = invoke(*args, "--kv-buffer", "256")
    assert "cache q8_0 instead of f16; budget " in result.stderr, result.output
    assert json.loads(result.stdout)["kv"]["buffer"] == 256


def test_options_that_are_given_are_not_overruled() -> None:
    fixed = ("--memory", too_little(), "-b", "256", "-ctk", "f16", "--kv-budget", "1024")
    result = run(*fixed)
    assert result.exit_code == 1
    line = error_line(result)
    assert "MiB too much (2 % stay in reserve): model " in line
    assert "it would fit with -b " in line or "it would fit with -ctk" in line


@pytest.mark.parametrize(
    ("memory", "code", "says"),
    [
        ("0", 2, "must be more than 0"),
        ("-1GiB", 2, "must be a size like"),
        ("nan", 2, "must be a size like"),
        ("6 apples", 2, "must be a size like"),
        ("6", 2, "was a unit forgotten"),
        ("900TiB", 1, "is more than the"),
        ("20MiB", 1, "the least that this model works with is"),
    ],
)
def test_bad_memory_is_one_line(memory: str, code: int, says: str) -> None:
    result = run("--memory", memory)
    assert result.exit_code == code
    assert says in error_line(result)
    assert result.stdout == ""


def test_refusals_stay_what_they_are(tmp_path: Path) -> None:
    """A model that cannot have a budget is refused by the engine's reason, with and without a limit."""
    model = str(write_unsupported(tmp_path / "alibi.gguf", "mpt"))
    for options in ((), ("--memory", "2GiB")):
        result = invoke("run", model, "hi", *options)
        assert result.exit_code == 1
        assert "ALiBi" in error_line(result)


def test_fit_shows_a_table() -> None:
    result = invoke("fit", str(talker()), "--memory", "200GiB", "-t", "1")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "talker.gguf in 200.00 GiB of main memory"
    rows = [line for line in lines if re.search(r"\b(f16|q8_0)\b.*(yes|no)$", line)]
    names = ["full, 8,192 cells", "full, 32,768 cells"]
    names += [f"budget {b:,}" for b in (512, 1024, 2048, 4096)]
    assert [re.split(r"\s{2,}", row)[0] for row in rows] == 2 * names
    assert lines[-1].startswith("rkv-local run would take: model ")


def test_fit_as_json() -> None:
    found = fitting("--memory", "1GiB", "-np", "2")
    names = {
        *("weights_bytes", "kv_bytes", "compute_bytes", "total_bytes", "limit_bytes"),
        *("n_gpu_layers", "kv_budget", "kv_buffer", "cache_type", "n_seq", "fits"),
    }
    assert names <= found["plan"].keys()
    assert found["limit_bytes"] == GIB
    assert found["plan"]["n_seq"] == 2
    assert len(found["table"]) == 12
    for row in found["table"]:
        assert names <= row.keys()
        assert row["fits"] == (row["total_bytes"] <= GIB)
    small, large = found["table"][2], found["table"][5]
    assert (small["kv_budget"], large["kv_budget"]) == (512, 4096)
    assert small["kv_bytes"] < large["kv_bytes"] < found["table"][0]["kv_bytes"]


def test_fit_where_nothing_fits_and_where_a_budget_is_refused(tmp_path: Path) -> None:
    result = invoke("fit", str(mute()), "--memory", "20MiB")
    assert result.exit_code == 1
    assert "does not fit: " in result.stdout.splitlines()[-1]
    model = write_unsupported(tmp_path / "alibi.gguf", "mpt")
    result = invoke("fit", str(model), "--memory", "8GiB")
    assert result.exit_code == 0
    assert "ALiBi position biases: full caches only" in result.stdout
    assert "budget 512" not in result.stdout
    assert invoke("fit", "a.gguf", "-m", "b.gguf").exit_code == 2


def test_bench_counts_all_its_caches() -> None:
    options = (
        "bench",
        "-m",
        str(mute()),
        "-d",
        "0,128",
        "-n",
        "32",
        "-r",
        "1",
        "-fa",
        "off",
        "--kv-budget",
        "64",
    )
    more = ("--kv-buffer", "32", "-o", "json")
    result = invoke(*options, *more, "--memory", "2GiB")
    assert result.exit_code == 0, result.stderr
    total = re.search(r" = ([\d.]+) MiB of 2\.00 GiB", result.stderr)
    assert total
    limit = f"{(float(total[1]) + 6) / 0.98:.1f}MiB"
    many = invoke(*options, *more, "--memory", limit, "-np", "auto")
    assert many.exit_code == 0, many.stderr
    found = re.search(r"(\d+) sequences fit", many.stderr)
    assert found
    assert json.loads(many.stdout)["params"]["parallel"] == int(found[1]) > 1
    none = invoke(*options, *more, "--memory", "20MiB")
    assert none.exit_code == 1
    assert "MiB too much for 3 caches at once" in error_line(none)


# --- the truth ---


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="VmHWM is Linux's")
def test_a_plan_keeps_its_word(tmp_path: Path) -> None:
    """Peak resident memory within 5 % of the plan and below the limit: mapped weights, and repacked ones."""
    file = tmp_path / "model.gguf"
    make_random_model(file, layers=4, heads=16, kv_heads=4, head_dim=64, ff=4096, vocab=32000, type="q4_0")
    limit = "auto"
    for changed in (False, True):
        command = [sys.executable, str(ROOT / "scripts" / "memory_truth.py"), str(file), "--memory", limit]
        done = subprocess.run(
            [*command, "--tokens", "200", "--threads", "1", "--budget", "256"],
            env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        assert done.returncode == 0, (found["line"], found.get("ratio"), done.stderr)
        assert found["kept"]
        assert 0.95 <= found["ratio"] <= 1.05
        assert found["compactions"] > 0
        assert bool(found["plan"]["reasons"]) == changed
        limit = str(found["plan"]["total_bytes"] * 7 // 10)  # weights have to be read, batches to be small


def test_without_a_gpu_nothing_is_asked_of_a_driver() -> None:
    done = shell("run", str(talker()), "hello", "-n", "2", "--memory", "2GiB")
    assert done.returncode == 0
    assert b"driver" not in done.stderr
