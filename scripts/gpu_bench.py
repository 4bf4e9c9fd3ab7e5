#!/usr/bin/env python3
"""The speed tables of docs/benchmarks.md, measured on a GPU and written as JSON.

    python scripts/gpu_bench.py OUT.json --f16 MODEL [--q4 MODEL] [--part NAME ...] [--quick]

Contexts that are compared take turns within one run, so that a machine that gets slower slows all of them.
The model is any GGUF file; scripts/gpu_report.sh makes one of Llama-8B's shape with random weights. Parts
that are measured again replace their rows in OUT.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rkv_local import KVBudget, _native
from rkv_local import bench as rb
from rkv_local.cli import nativelog

BUDGET, BUFFER = 1024, 128
NO_CAPTURE = "RKV_BENCH_NO_CAPTURE"  # native/rkv-graph.cpp
Q8_0 = 8
Row = dict[str, Any]


class Bench:
    """A model, and contexts over it that are closed when a part is done."""

    def __init__(self, model: Path, quick: bool) -> None:
        self.quick = quick
        rb.lib.llama_backend_init()
        params = rb.lib.llama_model_default_params()
        params.n_gpu_layers = 0x7FFFFFFF
        params.use_mmap = False
        self.model = rb.lib.llama_model_load_from_file(os.fsencode(model), params)
        if not self.model:
            raise RuntimeError(f"Failed to load model from file: {model}")
        self.name = model.name
        self.tokens = rb.trace(self.model, 40_000, 0)
        self.arms: list[rb.Arm] = []

    def arm(
        self, kv: KVBudget | None, n_ctx: int, parallel: int = 1, chunk: int = 0, cache: int = 1
    ) -> rb.Arm:
        """A context; kv None is stock. chunk: tokens of a prompt in one decode."""
        plan = rb.Plan(Path(self.name), kv, parallel=parallel, type_k=cache, type_v=cache, threads=4)
        old, rb.STOCK_BATCH = rb.STOCK_BATCH, chunk or rb.STOCK_BATCH
        try:
            arm = rb.Arm(self.model, plan, kv, True, n_ctx, self.tokens)
        finally:
            rb.STOCK_BATCH = old
        self.arms.append(arm)
        return arm

    def close(self) -> None:
        """Free all contexts."""
        while self.arms:
            self.arms.pop().close()


def budget(batch: int = 256) -> KVBudget:
    """B = 1,024, S = 128; 1,280 cells: CUDA's flash attention wants a multiple of 256."""
    return KVBudget(budget=BUDGET, buffer=BUFFER, batch=batch)


def sizes(arm: rb.Arm) -> Row:
    """Bytes of K and V, and of everything that belongs to them."""
    return {"kv_bytes": int(_native.stats(arm.ctx).bytes_kv), "all_bytes": arm.kv_bytes}


def speed(arm: rb.Arm, n: int) -> float:
    """Tokens per second of all sequences together, n tokens each."""
    return n * arm.parallel / arm.stretch(n)


def at_depth(arm: rb.Arm, depth: int, n: int) -> float:
    """The same from a depth on; the cache is cut back to it first."""
    arm.at(depth)
    arm.stretch(2)  # a graph of the new shape
    return speed(arm, n)


def spent(arm: rb.Arm, run: Callable[[], float]) -> tuple[float, Row]:
    """A measurement and what compactions took of it."""
    count, seconds = arm.compactions()
    start = time.perf_counter()
    value = run()
    total = time.perf_counter() - start
    now = arm.compactions()
    passes = now[0] - count
    row = {
        "compactions": passes,
        "compaction_share": (now[1] - seconds) / total,
        "us_per_compaction": 1e6 * (now[1] - seconds) / passes if passes else None,
    }
    return value, row


def one_sequence(b: Bench) -> Iterator[Row]:
    """A long trace against stock at two depths, all in turns."""
    total = 4096 if b.quick else 32_768
    ours = b.arm(budget(), 40_000)
    stock = b.arm(None, 32_768 + 512, chunk=2048)
    short = b.arm(None, 2048)
    warm = [at_depth(a, 512, 32) for a in (ours, short)]
    assert warm
    shallow, deep, seconds, shares = [], [], 0.0, []
    parts = 4
    for _ in range(parts):
        n = total // parts
        value, row = spent(ours, lambda n=n: speed(ours, n))  # type: ignore[misc]
        seconds += n / value
        shares.append((row, n / value))
        shallow.append(at_depth(short, 1024, 128))
        deep.append(at_depth(stock, 32_768, 128))
    share = sum(r["compaction_share"] * s for r, s in shares) / seconds
    passes = sum(r["compactions"] for r, _ in shares)
    yield {
        "part": "one",
        "what": f"1 sequence, {total:,} tokens",
        "ours": total / seconds,
        "stock_1024": statistics.median(shallow),
        "stock_32768": statistics.median(deep),
        "ratio_1024": total / seconds / statistics.median(shallow),
        "ratio_32768": total / seconds / statistics.median(deep),
        "compaction_share": share,
        "compactions": passes,
        "us_per_compaction": 1e6 * share * seconds / passes,
        **sizes(ours),
        "stock_kv_bytes_32768": stock.kv_bytes,
    }


def many_sequences(b: Bench, parallel: int = 256) -> Iterator[Row]:
    """Steady state of many sequences against as many stock ones, and against 30 deep stock ones."""
    n = BUFFER if b.quick else 2 * BUFFER
    ours = b.arm(budget(), 40_000, parallel)
    stock = b.arm(None, 1024 + 2 * BUFFER, parallel)
    ours.at(BUDGET + 256)
    ours.stretch(BUFFER)
    speeds, stocks, shares = [], [], []
    for _ in range(1 if b.quick else 2):
        value, row = spent(ours, lambda: speed(ours, n))
        speeds.append(value)
        shares.append(row)
        stocks.append(at_depth(stock, 1024, 64))
    row = {
        "part": "many",
        "what": f"{parallel} sequences",
        "ours": statistics.median(speeds),
        "stock_1024": statistics.median(stocks),
        "ratio_1024": statistics.median(speeds) / statistics.median(stocks),
        "compaction_share": statistics.median([s["compaction_share"] for s in shares]),
        "us_per_compaction": statistics.median([s["us_per_compaction"] for s in shares]),
        **sizes(ours),
        "stock_kv_bytes_1024": stock.kv_bytes,
    }
    b.arms.remove(stock)
    stock.close()
    deep = b.arm(None, 8192 + 256, 30, chunk=2048)
    row["stock_30_8192"] = at_depth(deep, 8192, 64)
    row["ratio_30_8192"] = row["ours"] / row["stock_30_8192"]
    yield row


def many_512(b: Bench) -> Iterator[Row]:
    """256 sequences again, in a build with RKV_MAX_SEQ=512."""
    for row in many_sequences(b):
        yield {**row, "part": "many-512", "what": f"{row['what']}, a build for 512"}


def quantised(b: Bench) -> Iterator[Row]:
    """A q8_0 cache."""
    ours = b.arm(budget(), 40_000, cache=Q8_0)
    stock = b.arm(None, 2048, cache=Q8_0)
    deep = b.arm(None, 32_768 + 512, chunk=2048, cache=Q8_0)
    ours.at(BUDGET + BUFFER)
    value, row = spent(ours, lambda: speed(ours, 512 if b.quick else 2048))
    yield {
        "part": "q8_0",
        "what": "1 sequence, q8_0 cache",
        "ours": value,
        "stock_1024": at_depth(stock, 1024, 128),
        "stock_32768": at_depth(deep, 32_768, 128),
        **sizes(ours),
        "stock_kv_bytes_32768": deep.kv_bytes,
        **row,
    }


def policies(b: Bench) -> Iterator[Row]:
    """The other policies, one sequence."""
    for policy in ("snapkv", "streaming", "latest"):
        kv = KVBudget(budget=BUDGET, buffer=BUFFER, policy=policy)
        ours = b.arm(kv, 40_000)
        ours.at(BUDGET + BUFFER)
        value, row = spent(ours, lambda ours=ours: speed(ours, 512))  # type: ignore[misc]
        yield {"part": "policies", "what": f"1 sequence, {policy}", "ours": value, **row}
        b.close()


def prompt(b: Bench) -> Iterator[Row]:
    """8,192 tokens of prompt in chunks."""
    length = 8192
    for chunk in (512, 2048):
        ours = b.arm(budget(chunk), 40_000)
        stock = b.arm(None, length + 64, chunk=chunk)
        ratios, speeds, shares = [], [], []
        for i in range(3):
            seconds = []
            for arm in (ours, stock):
                rb.lib.llama_memory_clear(arm.memory, True)
                arm.pos = 0
                count, before = arm.compactions()
                start = time.perf_counter()
                arm.at(length)
                seconds.append(time.perf_counter() - start)
                if arm is ours:
                    shares.append((arm.compactions()[1] - before) / seconds[0])
                    passes = arm.compactions()[0] - count
            if i > 0:  # the first round warms up
                ratios.append(seconds[1] / seconds[0])
                speeds.append((length / seconds[0], length / seconds[1]))
        yield {
            "part": "prompt",
            "what": f"prompt of {length:,} tokens in chunks of {chunk}",
            "ours": statistics.median([s[0] for s in speeds]),
            "stock": statistics.median([s[1] for s in speeds]),
            "ratio": statistics.median(ratios),
            "compactions": passes,
            "compaction_share": statistics.median(shares[1:]),
        }
        b.close()


@contextmanager
def no_capture(on: bool) -> Iterator[None]:
    """Graphs that are built inside store no queries."""
    if on:
        os.environ[NO_CAPTURE] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_CAPTURE, None)


def capture(b: Bench) -> Iterator[Row]:
    """What storing the window's queries costs a decode."""
    n, rounds = BUFFER, 3 if b.quick else 8
    arms = [b.arm(budget(), 40_000) for _ in range(2)]
    for off, arm in enumerate(arms):
        with no_capture(bool(off)):
            arm.at(BUDGET + BUFFER)
            arm.stretch(BUFFER)
    speeds: list[list[float]] = [[], []]
    for i in range(rounds):
        for off in (i % 2, 1 - i % 2):
            with no_capture(bool(off)):
                speeds[off].append(speed(arms[off], n))
    yield {
        "part": "capture",
        "what": "1 sequence, queries stored against not stored",
        "ours": statistics.median(speeds[0]),
        "without": statistics.median(speeds[1]),
        "ratio": statistics.median([a / b for a, b in zip(*speeds, strict=True)]),
        "samples": speeds,
    }


def q4_weights(b: Bench) -> Iterator[Row]:
    """Weights as Q4_0."""
    ours, stock = b.arm(budget(), 40_000), b.arm(None, 2048)
    deep = b.arm(None, 32_768 + 512, chunk=2048)
    ours.at(BUDGET + BUFFER)
    value, row = spent(ours, lambda: speed(ours, 512 if b.quick else 4096))
    yield {
        "part": "q4",
        "what": "1 sequence, Q4_0 weights",
        "ours": value,
        "stock_1024": at_depth(stock, 1024, 256),
        "stock_32768": at_depth(deep, 32_768, 256),
        **row,
    }


def beyond_256(b: Bench) -> Iterator[Row]:
    """402 sequences, as in the paper; needs a build with RKV_MAX_SEQ=512."""
    ours = b.arm(budget(), 40_000, 402)
    ours.at(BUDGET + 256)
    ours.stretch(16)
    value, row = spent(ours, lambda: speed(ours, BUFFER))
    yield {"part": "402", "what": "402 sequences", "ours": value, **sizes(ours), **row}


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "one": one_sequence,
    "many": many_sequences,
    "capture": capture,
    "q8_0": quantised,
    "policies": policies,
    "prompt": prompt,
    "402": beyond_256,
    "many-512": many_512,
    "q4": q4_weights,
}


def environment() -> Row:
    """GPU, driver, toolkit and pins."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        name, driver, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split(
            ", "
        )
    except (OSError, ValueError, subprocess.CalledProcessError):
        name = driver = memory = "?"
    pin = Path(__file__).resolve().parent.parent / "rkv_local" / "llama-cpp.pin"
    lines = [
        line for line in pin.read_text(encoding="utf-8").splitlines() if "=" in line and "SHA" not in line
    ]
    return {
        "gpu": name,
        "driver": driver,
        "memory": memory.strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "pins": ", ".join(lines),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--f16", type=Path)
    parser.add_argument("--q4", type=Path)
    parser.add_argument("--part", action="append", choices=PARTS, default=[])
    parser.add_argument("--quick", action="store_true", help="shorter, for trying it out")
    args = parser.parse_args(argv)
    parts = args.part or [p for p in PARTS if p not in ("402", "many-512")]
    report: Row = {"rows": []}
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
    report.update(environment())
    report["command"] = "scripts/gpu_report.sh build models bench many512"
    failed = 0
    nativelog.install(verbose=False)
    q4 = [p for p in parts if p == "q4"]
    for model, names in ((args.f16, [p for p in parts if p not in q4]), (args.q4, q4)):
        if model is None or not names:
            continue
        b = Bench(model, args.quick)
        for name in names:
            report["rows"] = [r for r in report["rows"] if r["part"] != name]
            try:
                for row in PARTS[name](b):
                    row["model"] = b.name
                    report["rows"].append(row)
                    print(json.dumps(row), flush=True)
            except Exception as err:  # the other parts are still worth their time
                failed += 1
                print(f"gpu_bench: {name}: {type(err).__name__}: {err}", file=sys.stderr, flush=True)
            b.close()
            args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        rb.lib.llama_model_free(b.model)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
