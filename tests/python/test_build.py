"""The build: one pin, idempotent patches, and one clear line for each thing that can go wrong."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import patches as patches_script
import rkv_patch
from rkv_local import _lib
from rkv_pin import PIN_FILE, read_pin

ROOT = Path(__file__).resolve().parents[2]
FILE = "src/llama-context.cpp"
SOURCE = "".join(f"line {n}\n" for n in range(1, 31)).encode()
REASON = (
    "Calls into native/ where a batch is placed.\nNo hook exists upstream.\nGoes when upstream has one.\n" * 2
)
PIN_KEYS = {"LLAMA_CPP_PYTHON_VERSION", "LLAMA_CPP_COMMIT", "LLAMA_CPP_PYTHON_SHA256"}


def make_patch(old: bytes, new: bytes, path: str = FILE) -> str:
    return f"{REASON}\n{patches_script.file_diff(path, old, new)}"


def edited(source: bytes, **lines: str) -> bytes:
    """Source with a line added behind the line of each number: line_3="text"."""
    out = source.splitlines(keepends=True)
    for name, text in sorted(lines.items(), key=lambda item: -int(item[0][5:])):
        out.insert(int(name[5:]), text.encode() + b"\n")
    return b"".join(out)


class Fake:
    """A small archive in a cache of its own, with its pin and a folder of patches."""

    def __init__(self, folder: Path) -> None:
        self.patches = folder / "patches"
        self.patches.mkdir()
        self.dest = folder / "build" / "llama.cpp"
        self.dest.parent.mkdir()
        self.cache = folder / "cache"
        archive = folder / "llama_cpp_python-9.9.9.tar.gz"
        files = {
            "CMakeLists.txt": b"project(x)\n",
            FILE: SOURCE,
            "src/other.cpp": SOURCE,
            "docs/big.md": b"x",
        }
        with tarfile.open(archive, "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"llama_cpp_python-9.9.9/vendor/llama.cpp/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        self.archive = archive
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        self.pin_file = folder / "pin"
        self.pin = {
            "LLAMA_CPP_PYTHON_VERSION": "9.9.9",
            "LLAMA_CPP_COMMIT": "0123abc",
            "LLAMA_CPP_PYTHON_SHA256": digest,
        }
        self.write_pin()
        self.cached = self.cache / "sdist" / digest[:16] / archive.name
        self.cached.parent.mkdir(parents=True)
        shutil.copy(archive, self.cached)

    def write_pin(self) -> None:
        self.pin_file.write_text("".join(f"{key}={value}\n" for key, value in self.pin.items()))

    def patch(self, name: str, old: bytes, new: bytes, path: str = FILE) -> None:
        (self.patches / name).write_text(make_patch(old, new, path))

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "cmake" / "rkv_source.py"), "prepare", *arguments]
        command += ["--patches", str(self.patches), "--pin", str(self.pin_file)]
        full = {**os.environ, "RKV_LOCAL_CACHE": str(self.cache), "PIP_NO_INDEX": "1", **env}
        return subprocess.run(command, capture_output=True, text=True, env=full, check=False)

    def content(self, path: str = FILE) -> bytes:
        return (self.dest / path).read_bytes()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


# --- the pin ---------------------------------------------------------------------------------------------


def test_pin_is_complete() -> None:
    pin = read_pin()
    assert set(pin) == PIN_KEYS
    assert re.fullmatch(r"\d+\.\d+\.\d+", pin["LLAMA_CPP_PYTHON_VERSION"])
    assert re.fullmatch(r"[0-9a-f]{9,40}", pin["LLAMA_CPP_COMMIT"])
    assert re.fullmatch(r"[0-9a-f]{64}", pin["LLAMA_CPP_PYTHON_SHA256"])


def test_everything_reads_the_same_pin() -> None:
    pin = read_pin()
    version = pin["LLAMA_CPP_PYTHON_VERSION"]
    assert _lib.read_pin() == pin
    requires = importlib.metadata.requires("rkv-local") or []
    assert [r for r in requires if r.startswith("llama-cpp-python")] == [f"llama-cpp-python=={version}"]
    assert importlib.metadata.version("llama-cpp-python") == version
    info = _lib._build_info(_lib.lib_dir() / _lib._library_name())
    assert info == f"llama-cpp-python {version}, llama.cpp {pin['LLAMA_CPP_COMMIT']}"


def test_cmake_reads_the_pin(tmp_path: Path) -> None:
    script = tmp_path / "pin.cmake"
    script.write_text(
        f'include("{(ROOT / "cmake" / "RkvHelpers.cmake").as_posix()}")\n'
        f'rkv_read_pin("{PIN_FILE.as_posix()}")\n'
        + "".join(f'message("{key}=${{{key}}}")\n' for key in sorted(PIN_KEYS))
    )
    done = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True, check=True)
    assert dict(line.split("=", 1) for line in done.stderr.splitlines()) == read_pin()


def test_the_pin_stands_in_one_file_only() -> None:
    pin = read_pin()
    files = ["pyproject.toml", "CMakeLists.txt", "bootstrap.py", "constraints.txt", "README.md", ".ci/run"]
    paths = [ROOT / name for name in files]
    paths += [path for folder in ("cmake", "scripts", "native") for path in (ROOT / folder).rglob("*.*")]
    paths += list((ROOT / "rkv_local").rglob("*.py"))
    for path in paths:
        if "__pycache__" in path.parts or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        for value in pin.values():
            assert value not in text, f"{path.relative_to(ROOT)} repeats the pin's {value}"


# --- fetch and patch -------------------------------------------------------------------------------------


def test_prepare_twice_changes_nothing(fake: Fake) -> None:
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_3="one"))
    assert fake.run(str(fake.dest)).returncode == 0
    assert fake.content() == edited(SOURCE, line_3="one")
    assert not (fake.dest / "docs").exists()
    before = {path: path.stat().st_mtime_ns for path in fake.dest.rglob("*")}
    done = fake.run(str(fake.dest))
    assert (done.returncode, done.stderr) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in fake.dest.rglob("*")} == before


def test_changed_patches_start_from_the_archive(fake: Fake) -> None:
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_3="one"))
    fake.patch("0002-b.patch", SOURCE, edited(SOURCE, line_9="two"), "src/other.cpp")
    assert fake.run(str(fake.dest)).returncode == 0
    untouched = (fake.dest / "CMakeLists.txt").stat().st_mtime_ns
    (fake.patches / "0002-b.patch").unlink()
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_20="other"))
    assert fake.run(str(fake.dest)).returncode == 0
    assert fake.content() == edited(SOURCE, line_20="other")
    assert fake.content("src/other.cpp") == SOURCE
    assert (fake.dest / "CMakeLists.txt").stat().st_mtime_ns == untouched


def test_an_interrupted_build_tree_is_repaired(fake: Fake) -> None:
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_3="one"))
    assert fake.run(str(fake.dest)).returncode == 0
    (fake.dest / FILE).write_bytes(b"half a fi")
    assert fake.run(str(fake.dest)).returncode == 0
    assert fake.content() == edited(SOURCE, line_3="one")


def test_a_patch_that_does_not_apply(fake: Fake) -> None:
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_3="one"))
    other = SOURCE.replace(b"line 12\n", b"line twelve\n")
    fake.patch("0002-b.patch", other, edited(other, line_12="two"))
    done = fake.run(str(fake.dest))
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert line.startswith("rkv-local: error: patch 0002-b.patch: src/llama-context.cpp, line ")
    assert "patches.py export" in line
    assert fake.content() == SOURCE  # nothing half applied


def test_a_patch_that_moved_is_refused_in_the_archive_and_found_in_a_tree(fake: Fake) -> None:
    moved = b"new first line\n" + SOURCE
    fake.patch("0001-a.patch", moved, edited(moved, line_15="one"))
    assert "does not match" in one_line(fake.run(str(fake.dest)).stderr)
    (fake.dest / FILE).write_bytes(SOURCE)
    assert fake.run("--local", str(fake.dest)).returncode == 0
    assert fake.content() == edited(SOURCE, line_14="one")


@pytest.mark.parametrize("applied", [0, 1, 2])
def test_a_local_tree_gets_what_it_lacks(fake: Fake, applied: int) -> None:
    states = [SOURCE, edited(SOURCE, line_3="one"), edited(SOURCE, line_3="one", line_5="two")]
    fake.patch("0001-a.patch", states[0], states[1])
    fake.patch("0002-b.patch", states[1], states[2])  # the context of the second holds the first's line
    (fake.dest / "src").mkdir(parents=True)
    (fake.dest / FILE).write_bytes(states[applied])
    for _ in range(2):
        assert fake.run("--local", str(fake.dest)).returncode == 0
        assert fake.content() == states[2]


def test_a_local_tree_that_is_none(fake: Fake, tmp_path: Path) -> None:
    line = one_line(fake.run("--local", str(tmp_path)).stderr)
    assert "is not a llama.cpp tree" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (make_patch(SOURCE, edited(SOURCE, line_3="x")).split("\n\n", 1)[1], "no reason stands above"),
        (REASON, "no 'diff --git' line"),
        (make_patch(SOURCE, edited(SOURCE, line_3="x"), "../outside"), "leaves the tree"),
        (REASON + "\ndiff --git a/x b/x\n--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n only\n", "not a unified diff"),
    ],
)
def test_a_malformed_patch(fake: Fake, text: str, message: str) -> None:
    (fake.patches / "0001-a.patch").write_text(text)
    line = one_line(fake.run(str(fake.dest)).stderr)
    assert message in line
    assert "0001-a.patch" in line


def test_no_network(fake: Fake) -> None:
    fake.cached.unlink()
    line = one_line(fake.run(str(fake.dest)).stderr)
    assert line.startswith("rkv-local: error: no network, or no package index reachable: ")


def test_wrong_hash(fake: Fake) -> None:
    fake.pin["LLAMA_CPP_PYTHON_SHA256"] = "0" * 64
    fake.write_pin()
    done = fake.run(str(fake.dest), PIP_FIND_LINKS=str(fake.archive.parent))
    line = one_line(done.stderr)
    assert done.returncode == 1
    assert "wrong hash: the archive of llama-cpp-python==9.9.9 is not the one named in llama-cpp.pin" in line


def test_a_damaged_cached_archive_is_not_used(fake: Fake) -> None:
    fake.cached.write_bytes(b"damaged")
    done = fake.run(str(fake.dest))
    assert done.returncode == 1  # downloaded again, and there is no index here
    assert "is damaged; it is downloaded again" in done.stdout
    assert not fake.cached.exists()


# --- the repository's own patches ------------------------------------------------------------------------


def test_the_repository_patches_are_in_order() -> None:
    assert " patches apply, " in patches_script.check()


def test_export_writes_the_same_bytes_again(tmp_path: Path) -> None:
    old, new = edited(SOURCE, line_1="no end")[:-1], edited(SOURCE, line_2="x", line_28="y")
    patch = tmp_path / "0001-a.patch"
    patch.write_text(f"{REASON}\n\ndiff --git a/{FILE} b/{FILE}\n")
    first = patches_script.render(patch, {FILE: old}.get, {FILE: new}.get)
    patch.write_text(first)
    assert patches_script.render(patch, {FILE: old}.get, {FILE: new}.get) == first
    assert rkv_patch.apply(rkv_patch.read_patches(tmp_path), {FILE: old}.get, exact=True) == {FILE: new}
    undone = rkv_patch.apply(rkv_patch.read_patches(tmp_path), {FILE: new}.get, reverse=True)
    assert undone == {FILE: old}


def test_a_file_in_two_patches_is_refused(fake: Fake) -> None:
    fake.patch("0001-a.patch", SOURCE, edited(SOURCE, line_3="one"))
    fake.patch("0002-b.patch", SOURCE, edited(SOURCE, line_9="two"))
    with pytest.raises(patches_script.CheckError, match="use one patch"):
        patches_script.check(fake.patches)


# --- compiler and bootstrap ------------------------------------------------------------------------------


def test_cmake_without_a_compiler(tmp_path: Path) -> None:
    env = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    command = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "rkv-local: error: " in line]
    assert len(lines) == 1
    assert "no working C and C++ compiler found: install one" in lines[0]


def _bootstrap(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bootstrap.py"), *arguments]
    full = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")}
    return subprocess.run(command, capture_output=True, text=True, env={**full, **env}, check=False)


@pytest.mark.skipif(os.name == "nt", reason="CMake looks for Visual Studio itself")
def test_bootstrap_without_a_compiler(tmp_path: Path) -> None:
    done = _bootstrap("--setup", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "no C++ compiler found: install one" in one_line(done.stderr)
    done = _bootstrap("--setup", CXX="no-such-compiler")
    assert done.returncode == 1
    assert "the compiler no-such-compiler (from CC or CXX) does not exist" in one_line(done.stderr)


def test_bootstrap_with_a_bad_option() -> None:
    done = _bootstrap("--frobnicate")
    assert done.returncode == 2
    assert "unknown option --frobnicate" in one_line(done.stderr)


def test_bootstrap_reads_what_it_needs_from_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import bootstrap

    assert any(tool.startswith("scikit-build-core") for tool in bootstrap.build_tools())
    assert any(tool.startswith("pytest") for tool in bootstrap.extra("test"))
    assert any(tool.startswith("torch") for tool in bootstrap.extra("train"))
    names = {re.split(r"[=<>]", name)[0] for name in bootstrap.dependencies()}
    wanted = {re.split(r"[=<>;]", name)[0] for name in importlib.metadata.requires("rkv-local") or []
              if "extra" not in name}  # fmt: skip
    assert {name.replace("_", "-") for name in names} | {"llama-cpp-python"} == {
        name.replace("_", "-") for name in wanted
    }


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (["x", "  rkv-local: error: wrong hash: abc", "ERROR: pip"], "wrong hash: abc"),
        (["a.cpp:3:1: error: no such thing", "ninja: stopped"], "compilation failed: a.cpp:3:1: error: "),
        (["Retrying ... NewConnectionError"], "no network, or no package index reachable: "),
    ],
)
def test_bootstrap_explains_failures(monkeypatch: pytest.MonkeyPatch, output: list[str], line: str) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import bootstrap

    assert bootstrap.explain(output).startswith(line)


def test_bootstrap_shows_progress(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    import bootstrap

    lines = [f"[{n}/200] Building CXX object x.o" for n in range(1, 201)]
    code = f"print({chr(10).join(lines)!r}); raise SystemExit(3)"
    with pytest.raises(bootstrap.SetupError):
        bootstrap.step("building", [sys.executable, "-c", code])
    shown = capfd.readouterr().err.splitlines()
    assert any(line.startswith("building: compiling 50% (100 of 200)") for line in shown)
    assert shown[-1].startswith("building: failed")
    assert len(shown) <= 13  # every tenth percent where there is no terminal
    assert bootstrap.describe("Progress 1048576 of 4194304\n") == "downloading 25% of 4 MiB"
    assert (
        bootstrap.describe("  Downloading a_b-1.2-py3-none-any.whl (3 kB)\n") == "downloading a_b-1.2, 3 kB"
    )


# --- the libraries at import -----------------------------------------------------------------------------


def test_the_wheel_holds_libraries_licenses_model_and_pin() -> None:
    files = {str(path) for path in importlib.metadata.files("rkv-local") or []}
    names = {Path(path).name for path in files}
    library = _lib._library_name()
    assert {f"rkv_local/lib/{library}", "rkv_local/llama-cpp.pin", "rkv_local/rkv-reasoner.gguf"} <= files
    assert "rkv_local/rkv-reasoner.rkv.json" in files
    assert {"LICENSE", "NOTICE", "llama.cpp.txt", "llamafile.txt", "llama-cpp-python.txt"} <= names
    assert any("ggml-base" in path for path in files)
    assert any("ggml-cpu" in path for path in files)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ELF run paths")
def test_run_paths_are_relative() -> None:
    for path in _lib.lib_dir().glob("*.so"):
        assert b"\0$ORIGIN\0" in path.read_bytes(), path.name  # alone, not one of a list


def _prepare(**env: str) -> subprocess.CompletedProcess[str]:
    code = (
        "from rkv_local import _lib\ntry:\n    _lib.prepare()\nexcept ImportError as error:\n    print(error)"
    )
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, check=False)


def test_prepare_without_a_library(tmp_path: Path) -> None:
    done = _prepare(RKV_LOCAL_LIB=str(tmp_path))
    assert "is missing: build it with `pip install .`" in one_line(done.stdout)


def test_prepare_with_a_broken_library(tmp_path: Path) -> None:
    (tmp_path / _lib._library_name()).write_bytes(b"not a library")
    done = _prepare(RKV_LOCAL_LIB=str(tmp_path))
    assert "cannot be loaded" in one_line(done.stdout)


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(_lib, "_PREPARED", {})
    return monkeypatch


def test_prepare_with_another_llama_cpp_python(unprepared: pytest.MonkeyPatch) -> None:
    unprepared.setattr(_lib, "_llama_cpp_version", lambda: "0.1.0")
    with pytest.raises(
        ImportError, match=r"llama-cpp-python 0\.1\.0 is installed, but .* needs .*: CMAKE_ARGS="
    ):
        _lib.prepare()
    unprepared.setattr(_lib, "_llama_cpp_version", lambda: None)
    with pytest.raises(ImportError, match="llama-cpp-python is not installed: CMAKE_ARGS="):
        _lib.prepare()


def test_prepare_after_another_library_was_loaded(unprepared: pytest.MonkeyPatch) -> None:
    unprepared.setattr(_lib, "_loaded_elsewhere", lambda folder: "/elsewhere/libllama.so")
    with pytest.raises(ImportError, match="import rkv_local first"):
        _lib.prepare()


def test_prepare_with_a_library_of_another_pin(unprepared: pytest.MonkeyPatch) -> None:
    unprepared.setattr(_lib, "_build_info", lambda library: "llama-cpp-python 0.1.0, llama.cpp abc")
    with pytest.raises(ImportError, match=r"was built for llama-cpp-python 0\.1\.0"):
        _lib.prepare()
