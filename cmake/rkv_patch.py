"""Applies patches/*.patch strictly and in memory: a file's context matches exactly or nothing is written.

unidiff parses; what is here is the application. `git apply` is not used, so that no git is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

# path inside the tree -> its bytes, None where there is no such file
Reader = Callable[[str], "bytes | None"]
Files = dict[str, "bytes | None"]


class PatchError(Exception):
    """A patch that cannot be read or does not apply; the message is one line."""


@dataclass(frozen=True)
class Hunk:
    """One @@ part. `start` is the 0-based line in the old file; lines keep their line ends."""

    start: int
    old: list[bytes]
    new: list[bytes]
    changed: int  # added + removed lines


@dataclass(frozen=True)
class FilePatch:
    path: str
    creates: bool
    deletes: bool
    hunks: list[Hunk]


@dataclass(frozen=True)
class Patch:
    """One file of patches/: the reason, then one part for each file that it changes."""

    name: str
    reason: str
    files: list[FilePatch]

    @property
    def changed(self) -> int:
        """Lines added and removed."""
        return sum(hunk.changed for file in self.files for hunk in file.hunks)


def _lines(hunk: Any, keep: str) -> list[bytes]:
    """The hunk's lines of the given kinds, with `\\ No newline at end of file` honoured."""
    out: list[bytes] = []
    last_kept = False
    for line in hunk:
        if line.line_type == "\\":
            if last_kept and out:
                out[-1] = out[-1].rstrip(b"\r\n")
            continue
        last_kept = line.line_type in keep
        if last_kept:
            out.append(line.value.encode("utf-8"))
    return out


def _safe_path(name: str, path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts:
        raise PatchError(f"{name}: the path {path!r} leaves the tree")
    return str(pure)


def read_patch(path: Path) -> Patch:
    """Parse one file. Raises PatchError if there is no reason, no diff, or a rename or a binary part."""
    try:
        import unidiff
    except ImportError as error:
        raise PatchError("reading patches/ needs the Python package unidiff: pip install unidiff") from error
    text = path.read_bytes().decode("utf-8")
    at = 0 if text.startswith("diff --git ") else text.find("\ndiff --git ") + 1
    if at == 0:
        why = "no reason stands above the diff" if text.startswith("diff --git ") else "no 'diff --git' line"
        raise PatchError(f"{path.name}: {why}")
    reason, body = text[:at].strip(), text[at:]
    if not reason:
        raise PatchError(f"{path.name}: no reason stands above the diff")
    try:
        parsed = unidiff.PatchSet(_keep_ends(body))  # not str.splitlines, which splits at form feeds too
    except unidiff.UnidiffParseError as error:
        raise PatchError(f"{path.name}: not a unified diff: {error}") from error
    files = []
    for part in parsed:
        if part.is_rename or part.is_binary_file:
            raise PatchError(f"{path.name}: {part.path}: renames and binary parts are not supported")
        hunks = [
            Hunk(max(h.source_start - 1, 0), _lines(h, " -"), _lines(h, " +"), h.added + h.removed)
            for h in part
        ]
        target = _safe_path(path.name, part.path)
        files.append(FilePatch(target, part.is_added_file, part.is_removed_file, hunks))
    if not files:
        raise PatchError(f"{path.name}: the diff is empty")
    return Patch(path.name, reason, files)


def _keep_ends(text: str) -> Iterator[str]:
    pieces = text.split("\n")
    for piece in pieces[:-1]:
        yield piece + "\n"
    if pieces[-1]:
        yield pieces[-1]


def read_patches(folder: Path) -> list[Patch]:
    """All patches of a folder, in the order of their names."""
    return [read_patch(path) for path in sorted(folder.glob("*.patch"))]


def _find(lines: list[bytes], want: list[bytes], expected: int, exact: bool) -> int | None:
    """Where `want` stands in `lines`, nearest to the expected line; None if nowhere."""
    last = len(lines) - len(want)
    reach = 0 if exact else len(lines)
    for distance in range(reach + 1):
        for at in {expected - distance, expected + distance}:
            if 0 <= at <= last and lines[at : at + len(want)] == want:
                return at
    return None


def _apply_file(name: str, part: FilePatch, data: bytes | None, reverse: bool, exact: bool) -> bytes | None:
    creates, deletes = (part.deletes, part.creates) if reverse else (part.creates, part.deletes)
    if creates:
        if data is not None:
            raise PatchError(f"{name}: {part.path} exists already")
    elif data is None:
        raise PatchError(f"{name}: {part.path} is missing")
    lines = (data or b"").splitlines(keepends=True)
    shift = 0
    for number, hunk in enumerate(part.hunks, 1):
        old, new = (hunk.new, hunk.old) if reverse else (hunk.old, hunk.new)
        at = _find(lines, old, hunk.start + shift, exact)
        if at is None:
            raise PatchError(
                f"{name}: {part.path}, line {hunk.start + 1}: hunk {number} does not match the source"
            )
        lines[at : at + len(old)] = new
        shift = at - hunk.start + len(new) - len(old)
    out = b"".join(lines)
    if deletes:
        if out:
            raise PatchError(f"{name}: {part.path} has lines that the patch does not know")
        return None
    return out


def apply(
    patches: Iterable[Patch],
    read: Reader,
    *,
    reverse: bool = False,
    exact: bool = False,
    base: Files | None = None,
) -> Files:
    """Every touched file's new content. `read` gives the tree's files, `base` overrides them.

    exact: a hunk must stand at its own line, not only match somewhere. Raises PatchError; nothing is written.
    """
    files: Files = dict(base or {})
    for patch in patches:
        for part in patch.files:
            data = files[part.path] if part.path in files else read(part.path)
            files[part.path] = _apply_file(patch.name, part, data, reverse, exact)
    return files


def complete(patches: list[Patch], read: Reader) -> tuple[Files, int]:
    """Bring a tree in which the first k patches are applied (k unknown) to all of them: (files, k).

    Raises PatchError for the first patch that fits in neither direction.
    """
    for k in range(len(patches), 0, -1):
        try:
            unpatched = apply(reversed_order(patches[:k]), read, reverse=True)
            # what the first k patches give from there is what stands in the tree, so it is patched up to k
            apply(patches[:k], read, base=unpatched)
            return apply(patches[k:], read), k
        except PatchError:
            continue
    return apply(patches, read), 0


def reversed_order(patches: list[Patch]) -> list[Patch]:
    """Patches, last first, with the parts of each last first: a file may stand in several."""
    return [Patch(p.name, p.reason, p.files[::-1]) for p in patches[::-1]]


def tree_reader(root: Path) -> Reader:
    """Reads files under a folder."""

    def read(path: str) -> bytes | None:
        file = root / path
        return file.read_bytes() if file.is_file() else None

    return read


def write_files(root: Path, files: Files) -> list[str]:
    """Write what differs and leave the rest alone, so that only what changed is compiled again."""
    written = []
    for path, data in sorted(files.items()):
        file = root / path
        if data is None:
            if file.exists():
                file.unlink()
                written.append(path)
        elif not file.is_file() or file.read_bytes() != data:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            written.append(path)
    return written
