#!/usr/bin/env python3
"""Writes and checks patches/.

    python scripts/patches.py export TREE   TREE: a llama.cpp tree with the changes made
    python scripts/patches.py check         patches/ against the pinned archive

A patch file is its reason (what it adds, why that cannot live outside upstream, when it can go), then the
diff. A source file stands in one patch only. For a new patch, write the reason and one line
`diff --git a/FILE b/FILE` for each of its files; export fills in the rest. Export needs no git and always
writes the same bytes for the same tree.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import rkv_patch  # noqa: E402
import rkv_source  # noqa: E402
from rkv_pin import read_pin  # noqa: E402

PATCHES = ROOT / "patches"
MAX_CHANGED = 300  # lines added + removed by all patches together, exclusive
MIN_REASON = 100  # characters; a reason answers three questions
CONTEXT = 3
FILE_LINE = re.compile(r"^diff --git a/(\S+) b/\S+$", re.MULTILINE)


class CheckError(Exception):
    """What is wrong with patches/, in one line."""


def _text_lines(data: bytes | None) -> list[str]:
    return data.decode("utf-8").splitlines(keepends=True) if data else []


def _range(start: int, stop: int) -> str:
    length = stop - start
    return f"{start + 1 if length else start},{length}"


def _heading(lines: list[str], before: int) -> str:
    """The nearest line above that starts at the margin, as git prints it after @@."""
    for line in reversed(lines[:before]):
        if re.match(r"[A-Za-z_$]", line):
            return " " + line.rstrip()[:80].rstrip()
    return ""


def _diff_lines(mark: str, lines: list[str]) -> str:
    return "".join(
        mark + line if line.endswith("\n") else f"{mark}{line}\n\\ No newline at end of file\n"
        for line in lines
    )


def file_diff(path: str, old: bytes | None, new: bytes | None) -> str:
    """One file's part of a patch; "" if nothing differs."""
    if old == new:
        return ""
    a, b = _text_lines(old), _text_lines(new)
    out = [f"diff --git a/{path} b/{path}\n"]
    if old is None:
        out.append("new file mode 100644\n")
    if new is None:
        out.append("deleted file mode 100644\n")
    out.append(f"--- {'/dev/null' if old is None else 'a/' + path}\n")
    out.append(f"+++ {'/dev/null' if new is None else 'b/' + path}\n")
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for group in matcher.get_grouped_opcodes(CONTEXT):
        first, last = group[0], group[-1]
        out.append(
            f"@@ -{_range(first[1], last[2])} +{_range(first[3], last[4])} @@{_heading(a, first[1])}\n"
        )
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                out.append(_diff_lines(" ", a[i1:i2]))
            else:
                out.append(_diff_lines("-", a[i1:i2]) + _diff_lines("+", b[j1:j2]))
    return "".join(out)


def _owners(folder: Path) -> dict[str, Path]:
    """Source file -> the patch that it stands in. Raises CheckError if it stands in two."""
    owners: dict[str, Path] = {}
    for patch in sorted(folder.glob("*.patch")):
        for path in FILE_LINE.findall(patch.read_text(encoding="utf-8")):
            if path in owners:
                raise CheckError(f"{path} stands in {owners[path].name} and in {patch.name}: use one patch")
            owners[path] = patch
    return owners


def render(patch: Path, original: rkv_patch.Reader, changed: rkv_patch.Reader) -> str:
    """A patch file's text: its own reason, and the diff of its files as they are now."""
    text = patch.read_text(encoding="utf-8")
    match = FILE_LINE.search(text)
    reason = (text[: match.start()] if match else text).strip()
    files = sorted(set(FILE_LINE.findall(text)))
    parts = [file_diff(path, original(path), changed(path)) for path in files]
    return f"{reason}\n\n{''.join(parts)}"


def export(tree: Path, folder: Path = PATCHES) -> list[str]:
    """Rewrite every patch from a changed tree; the names of the patches that changed.

    Raises CheckError if a changed file belongs to no patch, or a patch has become empty.
    """
    archive = rkv_source.fetch(read_pin())
    owners = _owners(folder)
    original = {path: data for path, data, _ in rkv_source.members(archive)}
    changed = rkv_patch.tree_reader(tree)
    if changed("src/llama-context.cpp") is None:
        raise CheckError(f"{tree} is not a llama.cpp tree")
    loose = [
        path
        for path, data in original.items()
        if path not in owners and changed(path) not in (data, None)  # a trimmed tree is no change
    ]
    if loose:
        raise CheckError(
            f"changed but in no patch: {', '.join(loose)}; add the line "
            f"'diff --git a/{loose[0]} b/{loose[0]}' to a file of {folder.name}/"
        )
    texts = {patch: render(patch, original.get, changed) for patch in sorted(folder.glob("*.patch"))}
    for patch, text in texts.items():
        if not FILE_LINE.search(text):
            raise CheckError(f"{patch.name}: none of its files differs from the pinned source; delete it")
    written = []
    for patch, text in texts.items():
        if patch.read_bytes() != text.encode("utf-8"):
            patch.write_bytes(text.encode("utf-8"))
            written.append(patch.name)
    return written


def check(folder: Path = PATCHES) -> str:
    """Patches apply exactly, in order, state a reason, stay small and export to the same bytes.

    Returns a summary line. Raises CheckError, PatchError, SourceError.
    """
    owners = _owners(folder)
    patches = rkv_patch.read_patches(folder)
    original = rkv_source.pristine(rkv_source.fetch(read_pin()), owners)
    patched = rkv_patch.apply(patches, original.get, exact=True)
    for patch in patches:
        if len(patch.reason) < MIN_REASON:
            raise CheckError(f"{patch.name}: say what it adds, why not outside upstream, and when it can go")
        file = folder / patch.name
        if render(file, original.get, patched.get).encode("utf-8") != file.read_bytes():
            raise CheckError(f"{patch.name}: does not export to the same bytes; run `patches.py export TREE`")
    total = sum(patch.changed for patch in patches)
    if total >= MAX_CHANGED:
        raise CheckError(f"the patches change {total} lines together; {MAX_CHANGED - 1} are allowed")
    again, had = rkv_patch.complete(patches, patched.get)
    if had != len(patches) or any(again.get(path, data) != data for path, data in patched.items()):
        raise CheckError("applying the patches a second time changes something")
    each = ", ".join(f"{patch.name} {patch.changed}" for patch in patches) or "none"
    return f"{len(patches)} patches apply, {total} lines changed ({each})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("export").add_argument("tree", type=Path)
    commands.add_parser("check")
    args = parser.parse_args(argv)
    try:
        if args.command == "export":
            written = export(args.tree)
            print("\n".join(written) if written else "nothing changed")
        print(check())
    except (CheckError, rkv_patch.PatchError, rkv_source.SourceError) as error:
        print(f"patches: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
