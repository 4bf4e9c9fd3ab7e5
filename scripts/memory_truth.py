"""Does a memory plan keep its word? Plans, generates in another process, and compares the peak with the plan.

    python scripts/memory_truth.py                              # smollm2, 30,000 tokens, on the CPU
    python scripts/memory_truth.py MODEL.gguf --memory 24GiB    # on the GPU, where there is one

On the CPU the peak is the process's resident memory as the kernel counts it (VmHWM), on an NVIDIA GPU what
the driver says that the process holds (nvidia-smi, sampled twice a second; where it hides processes, by how
much the device's memory in use grew). The prompt fills the cache, so that all of the compute buffers is in
use; the end of the text does not stop the model. Prints JSON; exit code 1 if the peak is more than 5 % off
the plan, or above the limit. Needs the installed package only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

TOLERANCE = 0.05


def child(arguments: argparse.Namespace) -> None:
    """Plan, load, generate; one JSON object on stdout."""
    import rkv_local
    from rkv_local.devices import peak_resident

    made = rkv_local.plan(arguments.model, arguments.memory, **settings(arguments))
    report: dict[str, Any] = {"plan": made.as_dict(), "line": made.line()}
    if made.fits:
        start = time.monotonic()
        llama = rkv_local.Llama(arguments.model, **made.arguments(), verbose=False)
        n_vocab = llama.n_vocab()
        length = min(made.cells + 2 * made.n_batch + 7, made.n_ctx - arguments.tokens)
        prompt = [(i * 7919) % (n_vocab - 3) + 3 for i in range(length)]
        tokens = llama.generate(prompt, temp=0.8, top_k=40)
        for n in range(arguments.tokens):
            next(tokens)
            if arguments.verbose and n % 1000 == 0:
                print(f"{n} tokens, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        stats = llama.kv_stats()
        report |= {
            "prompt_tokens": length,
            "tokens": arguments.tokens,
            "seconds": time.monotonic() - start,
            "compactions": stats.compactions,
            "kv_bytes_allocated": stats.bytes,
            "peak_resident_bytes": peak_resident(),
        }
    print(json.dumps(report), flush=True)


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was decided on the command line."""
    from rkv_local import KVBudget

    found: dict[str, Any] = {}
    if arguments.threads:
        found |= {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    if arguments.gpu_layers is not None:
        found["n_gpu_layers"] = arguments.gpu_layers
    if arguments.policy == "none":
        found["kv"] = None
    elif arguments.budget or arguments.policy != "rkv":
        found["kv"] = KVBudget(budget=arguments.budget or 1024, policy=arguments.policy)
    return found | ({"n_ctx": arguments.ctx} if arguments.ctx else {})


class Sampler(threading.Thread):
    """The most device memory that a process was seen to hold, twice a second."""

    def __init__(self, before: int | None) -> None:
        super().__init__(daemon=True)
        self.before, self.pid = before, 0
        self.of_process, self.of_device, self.done = 0, 0, threading.Event()

    def run(self) -> None:
        """Until `done`."""
        from rkv_local.devices import device_used, driver_used

        while not self.done.wait(0.5):
            self.of_process = max(self.of_process, driver_used(self.pid) or 0)
            self.of_device = max(self.of_device, (device_used() or 0) - (self.before or 0))

    @property
    def peak(self) -> int:
        """By process where the driver says so."""
        return self.of_process or self.of_device


def measure(arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """The report."""
    from rkv_local.devices import device_used

    sampler = Sampler(device_used())
    with subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "--child", *argv],  # noqa: PTH100
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        sampler.pid = process.pid
        if sampler.before is not None:
            sampler.start()
        out, _ = process.communicate()
    sampler.done.set()
    if process.returncode != 0:
        raise SystemExit(f"the run failed with exit code {process.returncode}")
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    plan = report["plan"]
    on_gpu = plan["devices"][0]["name"] != "CPU"
    peak = sampler.peak if on_gpu else report.get("peak_resident_bytes")
    report |= {"measured": "device memory" if on_gpu else "resident memory", "peak_bytes": peak}
    if plan["fits"] and peak:
        report["ratio"] = peak / plan["total_bytes"]
        report["within_tolerance"] = abs(report["ratio"] - 1) <= TOLERANCE
        report["under_limit"] = peak <= plan["limit_bytes"]
        report["kept"] = report["within_tolerance"] and report["under_limit"]
    return report


def main(argv: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default="smollm2", help="a GGUF file or a short name (default: smollm2)"
    )
    parser.add_argument("--memory", default="auto")
    parser.add_argument("--tokens", type=int, default=30_000)
    parser.add_argument("--policy", default="rkv")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--ctx", type=int, help="default: Llama's")
    parser.add_argument("--gpu-layers", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    from rkv_local.models import resolve

    arguments.model = str(resolve(arguments.model).path)
    if arguments.child:
        child(arguments)
        return 0
    report = measure(arguments, argv)
    print(json.dumps(report, indent=2))
    if not report["plan"]["fits"]:
        print(f"nothing fits: {'; '.join(report['plan']['reasons'])}", file=sys.stderr)
    return 0 if report.get("kept") else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
