#!/usr/bin/env python3
"""Damaged state files against a context with a budget: refused, or harmless, and never half loaded.

    export RKV_LOCAL_LIB=...                      # as scripts/dev_build.sh prints it
    python scripts/fuzz_state.py --seconds 600 [--seed N]

A random context is filled and saved, whole or one sequence, through memory or a file. The bytes are cut,
changed, moved about or mixed with another state's, sealed again with right checksums or not, and loaded into
a context that holds something. Then each sequence is what it was before, what was saved, or empty (with right
checksums: usable), and the context goes on as it should. Each round runs in a process of its own, so that a
crash is found; its seed is printed with what it found.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "python")]

ROUND = 15.0  # seconds per process


def mutated(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One damage, or a few."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        n = len(out)
        if n == 0:
            break
        early = rng.random() < 0.6  # headers and metadata are at the front
        at = rng.randrange(min(n, 700)) if early else rng.randrange(n)
        kind = rng.randrange(9)
        if kind == 0:
            del out[at:]
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            word = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 4, n, rng.getrandbits(32)))
            out[at : at + 4] = word.to_bytes(4, "little")
        elif kind == 3:
            out[at : at + rng.randrange(64)] = b""
        elif kind == 4:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 5:
            end = min(n, at + rng.randrange(1, 256))
            out[at:end] = rng.randbytes(end - at)
        elif kind == 6:
            end = min(n, at + rng.randrange(1, 256))
            to = rng.randrange(n)
            out[to : to + end - at] = out[at:end]
        elif kind == 7:
            cut = rng.randrange(len(other) + 1)
            out[at:] = other[cut:]
        else:
            out += rng.randbytes(rng.randrange(1, 64))
    return bytes(out)


def rounds(seed: int, seconds: float, model_path: Path) -> None:
    """Prints the number of loads and of those that went through."""
    import numpy as np

    import reference as ref
    from engine_tools import Context, Model, Options, llama_cpp
    from states import WHOLE, contents, is_empty, load, load_file, same, save, sealed, sealed_parts

    rng = random.Random(seed)
    model = Model(model_path)
    stop = time.monotonic() + seconds
    loads = accepted = 0
    folder = Path(tempfile.mkdtemp())

    def tokens(n: int) -> list[int]:
        return [rng.randrange(32) for _ in range(n)]

    def fill(context: Context) -> None:
        for seq in range(3):
            if rng.random() < 0.85:
                context.feed(tokens(rng.choice((1, 7, 25, 60, 130))), seq)
                if rng.random() < 0.3:
                    context.remove(seq, context.pos_max(seq) - rng.randrange(3), -1)
                if rng.random() < 0.3:
                    low = max(1, context.pos_max(seq) - 4)
                    context.remove(seq, low, low + 2)

    def load_as_file(context: Context, data: bytes, seq: int) -> int:
        path = folder / "state"
        path.write_bytes(data)
        return load_file(context, path, seq)

    def file_of(context: Context, seq: int) -> bytes:
        path, prompt = folder / "saved", (ctypes.c_int32 * 2)(1, 2)
        if seq == WHOLE:
            llama_cpp.llama_state_save_file(context.ctx, str(path).encode(), prompt, 2)
        else:
            llama_cpp.llama_state_seq_save_file(context.ctx, str(path).encode(), seq, prompt, 2)
        return path.read_bytes()

    while time.monotonic() < stop:
        policy = rng.choice(
            ("rkv", "snapkv", "streaming", "latest", "h2o", "gkv", "lagkv", "triattention", "given")
        )
        weight = rng.choice((0.0, 0.5)) if policy == "latest" else 0.0
        spec = ref.Spec(
            policy, budget=20, window=4, pin=rng.randrange(3), n_sim=rng.randrange(1, 3), value_weight=weight
        )
        budgets = rng.choice(((20, 20), (20, 29), (33, 20)))
        flash = rng.random() < 0.3
        kind = "f16" if flash else rng.choice(("f32", "f16"))
        options = Options(spec, 8, 8, budgets, n_ctx=256, n_seq=3, flash_attn=flash, type_k=kind, type_v=kind)
        with (
            Context(model, options) as source,
            Context(model, options) as target,
            Context(model, options) as one,
        ):
            fill(source)
            fill(target)
            one.feed([1] * 40, 0)
            for _ in range(60):
                seq = rng.choice((WHOLE, WHOLE, 0, 1, 2))
                to = seq if seq == WHOLE else rng.randrange(3)
                in_file, resealed = rng.random() < 0.25, False
                take = file_of if in_file else save
                data, other = take(source, seq), take(one, seq)
                if not in_file and rng.random() < 0.5:
                    parts = list(sealed_parts(data, seq, spec.window))
                    start, end = rng.choice(parts)
                    bad = mutated(rng, data[start:end], other)[: end - start]
                    bad += data[start + len(bad) : end]
                    data = sealed(data[:start] + bad + data[end:], parts)
                    resealed = True
                else:
                    data = mutated(rng, data, other)
                before = [contents(target, s) for s in range(3)]
                done = (load_as_file if in_file else load)(target, data, to)
                loads += 1
                accepted += done > 0
                saved = {to: seq} if seq != WHOLE else {s: s for s in range(3)}
                for s in range(3):
                    now = contents(target, s)
                    if same(now, before[s]) or is_empty(target, s):
                        continue
                    if s in saved and (
                        same(now, contents(source, saved[s]))
                        or same(now, contents(one, saved[s]))
                        or (resealed and done)
                    ):
                        continue
                    raise AssertionError(f"sequence {s} is half loaded (status {done})")
                if done:
                    for s in range(3):
                        n = target.pos_max(s) + 1
                        if n + 40 < 256:
                            row = target.feed(tokens(40), s)
                            if not resealed:
                                assert np.isfinite(row).all()
                        target.compact(s)
                    llama_cpp.llama_memory_clear(target.memory, True)  # a forged state may hold NaN
                    fill(target)
            part = tokens(8)
            for s in range(3):
                target.feed(part, s)
    print(f"{loads} {accepted}")


def family_rounds(seed: int, seconds: float, folder: Path) -> None:
    """The same on memories of several parts; those that are llama.cpp's own have no checksum."""
    import numpy as np

    from engine_tools import Context, Model, Options, llama_cpp
    from families import SMALL, governed
    from states import WHOLE, load, same, save
    from tiny_families import N_VOCAB, write_family

    rng = random.Random(seed)
    kind = rng.choice(("window, sinks", "window, shared layers", "hybrid", "MLA"))
    model = Model(write_family(folder / f"{seed}.gguf", kind))
    options = Options(SMALL, 8, 8, n_ctx=256, n_seq=2)
    stop = time.monotonic() + seconds
    loads = accepted = 0
    empty = Context(model, options)
    nothing = governed(empty)
    with empty, Context(model, options) as source, Context(model, options) as target:
        while time.monotonic() < stop:
            for context in (source, target):
                llama_cpp.llama_memory_clear(context.memory, True)
                for seq in range(2):
                    n = rng.choice((0, 3, 20, 60, 120))
                    context.feed([rng.randrange(1, N_VOCAB) for _ in range(n)], seq) if n else None
            for _ in range(20):
                seq = rng.choice((WHOLE, 0, 1))
                data = mutated(rng, save(source, seq), save(target, seq))
                before = [governed(target, s) for s in range(2)]
                done = load(target, data, seq)
                loads += 1
                accepted += done > 0
                for s in range(2):
                    now = governed(target, s)
                    if not any(same(now, x) for x in (before[s], governed(source, s), nothing)):
                        raise AssertionError(f"{kind}: sequence {s} is half loaded (status {done})")
                    if target.used(s) == 0 and target.pos_max(s) != -1 and not done:
                        raise AssertionError(f"{kind}: of sequence {s} a part is left (status {done})")
                if done:
                    target.try_decode([(1, target.pos_max(0) + 1, 0)])
                    llama_cpp.llama_memory_clear(target.memory, True)
                    for s in range(2):
                        assert np.isfinite(target.feed([1] * 30, s)).all()
    print(f"{loads} {accepted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=None, help="default: from the clock")
    parser.add_argument("--families", action="store_true", help="sliding windows, hybrids, MLA instead")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    if arguments.child:
        (family_rounds if arguments.families else rounds)(seed, arguments.seconds, arguments.child)
        return

    from tiny_models import SMALL_SHAPE, write_model

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if not arguments.families:
            path = write_model(path / "small.gguf", SMALL_SHAPE)
        stop, findings, loads, accepted = time.monotonic() + arguments.seconds, 0, 0, 0
        while (left := stop - time.monotonic()) > 0.5:
            command = [sys.executable, __file__, "--child", str(path), "--seed", str(seed)]
            command += ["--seconds", str(min(ROUND, left))] + ["--families"] * arguments.families
            env = {**os.environ, "TMPDIR": folder}
            done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                findings += 1
                print(f"seed {seed}: exit status {done.returncode}\n{done.stderr[-2500:]}", flush=True)
            else:
                counts = done.stdout.split()
                loads, accepted = loads + int(counts[-2]), accepted + int(counts[-1])
            seed += 1
        print(f"{loads} loads, {accepted} went through, {findings} findings, seeds up to {seed - 1}")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
