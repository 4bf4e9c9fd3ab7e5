"""Keep the help texts in docs/cli.md as the commands print them.

python -m rkv_local.cli.docs [--check] docs/cli.md
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from rkv_local.cli.main import main

BLOCK = re.compile(r"(<!-- help: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)
WIDTH = 100


def help_text(command: str) -> str:
    """What `command --help` prints; the first word is rkv-local."""
    settings = {**main.context_settings, "terminal_width": WIDTH, "max_content_width": WIDTH}
    context = click.Context(main, info_name="rkv-local", **settings)
    found: click.Command | None = main
    for word in command.split()[1:]:
        found = found.get_command(context, word) if isinstance(found, click.Group) else None
        if found is None:
            raise ValueError(f"{command!r}: {word!r} is no command")
        context = click.Context(found, context, word, **settings)
    return context.command.get_help(context)


def renewed(text: str) -> str:
    """`text` with every help block written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}```text\n{help_text(m[2])}\n```\n{m[3]}", text)


if __name__ == "__main__":
    check, path = "--check" in sys.argv[1:], Path(sys.argv[-1])
    old = path.read_text(encoding="utf-8")
    new = renewed(old)
    if check and new != old:
        sys.exit(f"{path} is out of date: python -m rkv_local.cli.docs {path}")
    path.write_text(new, encoding="utf-8")
