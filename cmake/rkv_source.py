"""Puts the pinned llama.cpp source, with patches/ applied, where CMake builds it.

    python cmake/rkv_source.py prepare DEST           archive -> DEST, patched
    python cmake/rkv_source.py prepare --local TREE   patches a tree of the developer's, in place
    python cmake/rkv_source.py fetch                  prints the archive's path in the cache

Every failure is one line on stderr, exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import rkv_patch
from rkv_pin import PIN_FILE, read_pin

ROOT = Path(__file__).resolve().parent.parent
STAMP = ".rkv-source.json"
# nothing that the libraries are built from
SKIP = {"docs", "models", "media", "benches", "tools/ui"}
REGENERATE = "see docs/building.md: patch a tree by hand, then `python scripts/patches.py export TREE`"


class SourceError(Exception):
    """Why there is no source to build, in one line."""


def cache_dir() -> Path:
    """The user's cache folder for downloads; RKV_LOCAL_CACHE overrides it."""
    override = os.environ.get("RKV_LOCAL_CACHE")
    if override:
        return Path(override)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "rkv-local"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"rkv-local: {text}", flush=True)


def _pip_failure(requirement: str, output: str) -> str:
    lowered = output.lower()
    if "do not match the hashes" in lowered:
        got = re.search(r"Got\s+([0-9a-f]{64})", output)
        found = f" (got {got.group(1)})" if got else ""
        return f"wrong hash: the archive of {requirement} is not the one named in {PIN_FILE.name}{found}"
    if "no module named pip" in lowered:
        return f"this Python has no pip, which fetches {requirement}: {sys.executable} -m ensurepip"
    network = ("connection", "resolve", "timed out", "no matching distribution", "ssl", "retries")
    if any(word in lowered for word in network):
        return f"no network, or no package index reachable: pip could not download {requirement}"
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    return f"pip could not download {requirement}: {last}"


def _pip_download(requirement: str, digest: str, folder: Path) -> None:
    listing = folder / "requirements.txt"
    listing.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--require-hashes", "-r", str(listing), "-d", str(folder)]
    command += ["--progress-bar", "raw"]
    # pip asks an sdist for its metadata. Its build backend is ours too: where it is installed, which is
    # everywhere inside pip's and uv's builds, no second environment has to be downloaded for that.
    if importlib.util.find_spec("scikit_build_core"):
        command.append("--no-build-isolation")
    # set by the pip or uv around us, for another package
    env = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_BUILD_", "SKBUILD"))
    }
    env["PYTHONUNBUFFERED"] = "1"
    output: list[str] = []
    shown = -1
    with subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=env,
    ) as process:
        assert process.stdout is not None  # PIPE
        for line in process.stdout:
            progress = re.match(r"Progress (\d+) of (\d+)", line)
            if not progress:
                output.append(line)
            elif int(progress[2]) and 10 * int(progress[1]) // int(progress[2]) > shown:
                shown = 10 * int(progress[1]) // int(progress[2])
                _say(f"downloading {requirement}: {10 * shown}%")
    if process.returncode:
        raise SourceError(_pip_failure(requirement, "".join(output)))


def fetch(pin: dict[str, str]) -> Path:
    """The pinned source archive, from the cache or through pip; its hash is checked in both cases."""
    version, digest = pin["LLAMA_CPP_PYTHON_VERSION"], pin["LLAMA_CPP_PYTHON_SHA256"]
    folder = cache_dir() / "sdist" / digest[:16]
    archive = folder / f"llama_cpp_python-{version}.tar.gz"
    if archive.is_file():
        if sha256(archive) == digest:
            return archive
        _say(f"{archive} is damaged; it is downloaded again")
        archive.unlink()
    _say(f"downloading llama-cpp-python {version} (73 MiB, the llama.cpp source)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            _pip_download(f"llama-cpp-python=={version}", digest, Path(temporary))
            found = list(Path(temporary).glob("*.tar.gz"))
            if len(found) != 1:
                raise SourceError(
                    f"pip downloaded {len(found)} archives of llama-cpp-python {version}, not 1"
                )
            if sha256(found[0]) != digest:
                raise SourceError(f"wrong hash: {found[0].name} is not the archive named in {PIN_FILE.name}")
            found[0].replace(archive)
    except OSError as error:
        raise SourceError(f"the cache folder {folder} cannot be used: {error}") from error
    return archive


def members(archive: Path) -> Iterator[tuple[str, bytes, int]]:
    """(path below vendor/llama.cpp, content, mode) of every regular file that is worth unpacking."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts
            if not member.isfile() or parts[1:3] != ("vendor", "llama.cpp") or ".." in parts:
                continue
            inside = parts[3:]
            if inside[0].startswith(".") or inside[0] in SKIP or "/".join(inside[:2]) in SKIP:
                continue
            stream = tar.extractfile(member)
            assert stream is not None  # isfile()
            yield "/".join(inside), stream.read(), member.mode


def pristine(archive: Path, paths: Iterable[str]) -> dict[str, bytes]:
    """The archive's own content of some files; those that it lacks are left out."""
    wanted = set(paths)
    return {path: data for path, data, _ in members(archive) if path in wanted} if wanted else {}


def unpack(archive: Path, dest: Path) -> None:
    """vendor/llama.cpp of the archive -> dest, which is replaced. Files are new: ninja compares times."""
    fresh = dest.with_name(dest.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    for path, data, mode in members(archive):
        file = fresh / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if mode & 0o100:
            file.chmod(0o755)
    if not (fresh / "CMakeLists.txt").is_file():
        raise SourceError(f"{archive.name} holds no vendor/llama.cpp")
    shutil.rmtree(dest, ignore_errors=True)
    fresh.rename(dest)


def _digest(data: bytes | None) -> str:
    return "absent" if data is None else hashlib.sha256(data).hexdigest()


def _patches_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.patch")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _read_stamp(dest: Path) -> dict[str, object]:
    try:
        stamp = json.loads((dest / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def prepare(dest: Path, pin: dict[str, str], patch_dir: Path) -> list[str]:
    """The pinned source with all patches in dest; the files written by patches.

    Any earlier state of dest will do: changed patches start again from the archive's own files, and only
    files whose content changes are written. Raises SourceError, PatchError.
    """
    archive = fetch(pin)
    stamp = _read_stamp(dest)
    if stamp.get("archive") != pin["LLAMA_CPP_PYTHON_SHA256"]:
        _say(f"unpacking llama.cpp {pin['LLAMA_CPP_COMMIT']}")
        unpack(archive, dest)
        stamp = {}
    recorded = stamp.get("files")
    before: dict[str, str] = recorded if isinstance(recorded, dict) else {}
    digest = _patches_digest(patch_dir)
    read = rkv_patch.tree_reader(dest)
    if stamp.get("patches") == digest and all(_digest(read(path)) == sha for path, sha in before.items()):
        return []
    patches = rkv_patch.read_patches(patch_dir)
    touched = {part.path for patch in patches for part in patch.files}
    original = pristine(archive, touched | set(before))
    patched = rkv_patch.apply(patches, original.get, exact=True)
    written = rkv_patch.write_files(dest, {**{path: original.get(path) for path in before}, **patched})
    stamp = {
        "archive": pin["LLAMA_CPP_PYTHON_SHA256"],
        "patches": digest,
        "files": {path: _digest(data) for path, data in patched.items()},
    }
    (dest / STAMP).write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    _say(f"{len(patches)} patches applied, {len(written)} files changed")
    return written


def prepare_local(tree: Path, patch_dir: Path) -> list[str]:
    """Apply in place what a developer's own tree does not have yet. Raises SourceError, PatchError."""
    if not (tree / "src" / "llama-context.cpp").is_file():
        raise SourceError(f"RKV_LLAMA_CPP_SOURCE: {tree} is not a llama.cpp tree")
    patches = rkv_patch.read_patches(patch_dir)
    files, had = rkv_patch.complete(patches, rkv_patch.tree_reader(tree))
    written = rkv_patch.write_files(tree, files)
    _say(f"{tree}: {had} of {len(patches)} patches were applied, {len(written)} files changed")
    return written


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fetch")
    sub = commands.add_parser("prepare")
    sub.add_argument("dest", nargs="?", type=Path)
    sub.add_argument("--local", type=Path)
    sub.add_argument("--patches", type=Path, default=ROOT / "patches")
    sub.add_argument("--pin", type=Path, default=PIN_FILE)
    args = parser.parse_args(argv)
    try:
        if args.command == "fetch":
            print(fetch(read_pin()))
        elif args.local:
            prepare_local(args.local.resolve(), args.patches)
        elif args.dest:
            prepare(args.dest.resolve(), read_pin(args.pin), args.patches)
        else:
            parser.error("prepare: DEST or --local is needed")
    except rkv_patch.PatchError as error:
        print(f"rkv-local: error: patch {error}; {REGENERATE}", file=sys.stderr)
        return 1
    except SourceError as error:
        print(f"rkv-local: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
