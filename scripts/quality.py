#!/usr/bin/env python3
"""Measures what docs/quality.md reports, in pieces, and makes the page.

python scripts/quality.py plan
python scripts/quality.py run --stage full,core -o quality.jsonl --limit-seconds 3000
python scripts/quality.py report

docs/evals.md says how the pieces fit together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quality_plan import REASONER, STAGES, jobs_of
from rkv_local.evals import report as made
from rkv_local.evals.problems import FAMILIES, KINDS
from rkv_local.evals.results import Results, packed, read
from rkv_local.evals.summary import summaries
from rkv_local.evals.verdict import candidate

ROOT = Path(__file__).resolve().parent.parent
DATA, PAGE, NOTES = (
    ROOT / "docs" / "quality",
    ROOT / "docs" / "quality.md",
    ROOT / "docs" / "quality-notes.md",
)
MADE_BY = "Made by `scripts/quality.py report` from the results in [quality/](quality)"
HOW = """\
## How to repeat

From the repository's root, in its environment (`python3 bootstrap.py`, then
`.venv/bin/pip install reasoning-gym matplotlib -c constraints.txt`):

```sh
.venv/bin/python scripts/quality.py plan                          # the stages, and how much each of them is
.venv/bin/rkv-local calibrate smollm2 -o docs/quality/smollm2.rkv.json   # the reasoner's lies beside it
.venv/bin/python scripts/quality.py run --stage all -o docs/quality/mine.jsonl   # repeat it to continue
.venv/bin/python scripts/quality.py report
```

Problems are numbers 0, 1, 2 ... of the final seeds, in equal parts of {families}. Shares of the mean trace
are of that of the first {base} problems of a kind. On GPUs: `scripts/gpu_quality.sh`. Methods:
[evals.md](evals.md).
"""
BASE = 200  # the problems of a kind whose mean trace budgets are shares of


def files_of(folder: Path) -> list[Path]:
    """The results in a folder, in order of their names."""
    return sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])


def stages_of(text: str) -> list[str]:
    """Names of stages. Raises ValueError for one that there is not."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in STAGES and name != "all":
            raise ValueError(f"--stage: {name!r} is not one of {', '.join(STAGES)}, all")
    return list(STAGES) if "all" in names else list(dict.fromkeys(names))


def numbers(text: str, what: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers above 0, as many as there are names. Raises ValueError."""
    try:
        found = tuple(int(part) for part in text.split(","))
        if len(found) != len(what) or min(found) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} must be {','.join(what)}: whole numbers from 1 on") from None
    return found


def shard_of(text: str) -> tuple[int, int]:
    """I/K as (I, K), I from 0 to K - 1. Raises ValueError."""
    try:
        i, k = (int(part) for part in text.split("/"))
        if not 0 <= i < k:
            raise ValueError
    except ValueError:
        raise ValueError(f"--shard: {text!r} must be I/K with I from 0 to K - 1") from None
    return i, k


def plan(args: argparse.Namespace) -> None:
    """List stages, or the jobs of some, with estimated tokens."""
    if args.stage is None:
        rows = []
        for name, (what, _) in STAGES.items():
            jobs = list(jobs_of(name))
            tokens = sum(job.tokens(args.n_problems, args.needles, args.kl) for job in jobs)
            rows.append(f"{name:<14} {len(jobs):>4} jobs {tokens / 1e6:>8.2f} M tokens  {what}")
        print("\n".join(rows))
        return
    for name in stages_of(args.stage):
        for job in jobs_of(name):
            print(f"{name:<14} {job.tokens(args.n_problems, args.needles, args.kl):>10,} tokens  {job}")


def questions(args: argparse.Namespace) -> None:
    """Write the questions of all problems, for a machine without reasoning-gym."""
    from rkv_local.evals.tasks import reason_task

    with args.output.open("w", encoding="utf-8") as file:
        for kind, split in itertools.product(KINDS, ("final", "fresh")):
            for item in reason_task(kind, tuple(FAMILIES), split, args.n_problems).groups[0].items:
                row = {"id": item.id, "question": item.question, "answer": item.answer}
                file.write(json.dumps(row) + "\n")


def merge(args: argparse.Namespace) -> None:
    """Write the results of several files into one, packed where its name ends in .gz."""
    packed(read(args.files), args.output)


def whole(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the rows that time cut off: what they lack are the longest answers."""

    def task(row: dict[str, Any]) -> str:
        return f"{row['sha256']} {row['task']}"

    full = {task(r): r["problems"] for r in rows if r["kv"] is None and r["type_k"] == "f16"}
    most: dict[str, int] = {}  # of texts
    for r in rows:
        most[task(r)] = max(most.get(task(r), 0), size(r))

    def is_whole(row: dict[str, Any]) -> bool:
        if row["task"].get("kind") not in KINDS:
            return size(row) == most[task(row)]
        return row["problems"] == BASE or row["problems"] >= full.get(task(row), BASE)

    return [row for row in rows if is_whole(row)]


def size(row: dict[str, Any]) -> int:
    """How much was read or asked."""
    return int(row.get("positions") or row.get("problems") or 0)


def page(data: Path, target: Path, notes: Path, draw: bool) -> str:
    """The page's text. draw: make the plots, too. Raises ImportError without matplotlib."""
    from rkv_local.evals import plots

    rows = whole(summaries(read(files_of(data))))
    folder = target.parent / "plots"
    found = plots.draw(rows, folder, target) if draw and rows else plots.paths(rows, folder, target)
    text = notes.read_text(encoding="utf-8") if notes.exists() else ""
    how = HOW.format(families=", ".join(FAMILIES), base=BASE)
    return made.page(rows, candidate(), found, made_by=MADE_BY, notes=text, tail=how)


def report(args: argparse.Namespace) -> None:
    """Make the page and its plots, or check them (the plots: that they are there)."""
    try:
        text = page(args.data, args.output, args.notes, not args.check)
    except ImportError:
        raise RuntimeError("plots need matplotlib: pip install matplotlib") from None
    if args.check:
        if not args.output.exists() or args.output.read_text(encoding="utf-8") != text:
            raise ValueError(f"{args.output} is not what its data gives: run `scripts/quality.py report`")
        for line in text.splitlines():
            if line.startswith("![") and not (args.output.parent / line[line.index("](") + 2 : -1]).exists():
                raise ValueError(f"{args.output}: a plot is missing: run `scripts/quality.py report`")
        return
    args.output.write_text(text, encoding="utf-8")


def run(args: argparse.Namespace) -> int:
    """Do the jobs of some stages in order."""
    from quality_run import work

    jobs = [job for name in stages_of(args.stage) for job in jobs_of(name)]
    i, k = args.shard
    return work(jobs[i::k], args, BASE, known=read(args.known) if args.known else Results())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=what, description=what)

    def sizes(to: argparse.ArgumentParser) -> None:
        to.add_argument("--n-problems", type=int, default=400, help="of each kind (400; 200 is the least)")
        to.add_argument("--needles", default="8,2048,6", metavar="TEXTS,TOKENS,FACTS")
        to.add_argument("--kl", default="4,4096", metavar="TEXTS,TOKENS")

    p = command("plan", "list the stages, or the jobs of some, with estimated tokens")
    p.add_argument("--stage", metavar="NAME,...")
    sizes(p)
    p = command("questions", "write the problems' questions, for a machine without reasoning-gym")
    p.add_argument("-o", "--output", type=Path, required=True)
    p.add_argument("--n-problems", type=int, default=400)
    p = command("run", "measure; what is in the file, or known, is not run again")
    p.add_argument("--stage", required=True, metavar="NAME,...", help=f"{', '.join(STAGES)}, all")
    p.add_argument("-o", "--output", type=Path, required=True, help="JSON Lines, appended to")
    p.add_argument(
        "--known", type=Path, action="append", default=[], help="results of other files (again and again)"
    )
    p.add_argument("--limit-seconds", type=float, metavar="S", help="leave off after so long")
    p.add_argument(
        "--shard", default="0/1", metavar="I/K", help="of all jobs every K-th, from I (0 ... K-1) on"
    )
    p.add_argument("--questions", type=Path, help="a file of `questions`, instead of making them")
    p.add_argument("--text", type=Path, help="what needles and kl read (Python's language reference)")
    p.add_argument("--calibrations", type=Path, default=DATA, help="where MODEL.rkv.json lie")
    p.add_argument("--reasoner", default=str(ROOT / REASONER), metavar="MODEL")
    p.add_argument("--long", default="smollm2", metavar="MODEL", help="the model of needles and kl")
    p.add_argument("--families", default=",".join(FAMILIES), metavar="NAME,...")
    p.add_argument("-n", "--max-tokens", type=int, default=4096, help="of an answer")
    p.add_argument("-ngl", "--gpu-layers", type=int, default=0, help="-1 is all")
    p.add_argument("-np", "--parallel", type=int, help="sequences at once (8; 256 with -ngl)")
    p.add_argument("-t", "--threads", type=int)
    p.add_argument("-fa", "--flash-attn", choices=("on", "off", "auto"), default="auto")
    sizes(p)
    p = command("merge", "write the results of several files into one")
    p.add_argument("files", type=Path, nargs="+")
    p.add_argument("-o", "--output", type=Path, required=True, help="packed if it ends in .gz")
    p = command("report", "make docs/quality.md and its plots from docs/quality/")
    p.add_argument("--data", type=Path, default=DATA)
    p.add_argument("--notes", type=Path, default=NOTES)
    p.add_argument("-o", "--output", type=Path, default=PAGE)
    p.add_argument("--check", action="store_true", help="write nothing, fail if something would change")
    return top


COMMANDS = {"plan": plan, "questions": questions, "merge": merge, "report": report, "run": run}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    top = parser()
    args = top.parse_args(argv)
    try:
        for name in ("n_problems", "max_tokens", "parallel", "threads"):
            if getattr(args, name, None) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
        if hasattr(args, "needles"):
            args.needles = numbers(args.needles, ("TEXTS", "TOKENS", "FACTS"))
            args.kl = numbers(args.kl, ("TEXTS", "TOKENS"))
        if hasattr(args, "shard"):
            args.shard = shard_of(args.shard)
        return COMMANDS[args.command](args) or 0
    except (ValueError, RuntimeError, OSError) as err:
        print(f"quality.py: error: {' '.join(str(err).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
