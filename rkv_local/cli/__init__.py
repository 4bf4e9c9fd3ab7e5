"""The command line: `rkv-local run`, `chat`, `devices`, `bench`. One module per command, drawing in ui.py."""

from rkv_local.cli.main import main

__all__ = ["main"]
