"""The command `rkv-local`: a group of commands, each in its own module, and the one way in which it fails."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

import click

from rkv_local.cli import ui
from rkv_local.models import ModelError

# name: module
COMMANDS = {
    "run": "run",
    "chat": "chat",
    "fit": "fit",
    "devices": "devices",
    "bench": "bench",
    "eval": "eval",
    "inspect": "inspect",
    "calibrate": "calibrate",
}


class Group(click.Group):
    """Imports commands when they are needed; a failure is one line and an exit code of 1, 2 or 130."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command from its module."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"rkv_local.cli.{COMMANDS[cmd_name]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def main(  # type: ignore[override]
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but for how failures are shown."""
        if not standalone_mode:
            return super().main(args, prog_name or "rkv-local", standalone_mode=False, **extra)
        if sys.stdout is None:
            ui.error("stdout is closed: there is nowhere to write the answer")
            leave(1)
        try:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal's encoding lacks
            code = super().main(args, prog_name or "rkv-local", standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.exceptions.NoArgsIsHelpError as err:
            click.echo(err.format_message(), err=True)
            leave(2)
        except click.ClickException as err:
            ui.error(err.format_message())
            leave(err.exit_code)
        except (click.Abort, KeyboardInterrupt):
            leave(130)
        except BrokenPipeError:
            # nobody reads on: leave without a word, also when Python flushes at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            leave(1)
        except (ModelError, ImportError, RuntimeError, ValueError, OSError, MemoryError) as err:
            if os.environ.get("RKV_LOCAL_TRACEBACK"):
                raise
            ui.error(str(err) or type(err).__name__)
            leave(1)
        return leave(code if isinstance(code, int) else 0)


def leave(code: int) -> NoReturn:
    """Exit with a code."""
    sys.exit(code)


def version() -> str:
    """Our version as installed."""
    try:
        return metadata.version("rkv-local")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """--version."""
    if value and not ctx.resilient_parsing:
        click.echo(f"rkv-local {version()}")
        ctx.exit()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=print_version,
    help="Show the version.",
)
def main() -> None:
    """Reasoning models in a key-value cache of fixed size.

    Exit codes: 0 done, 1 it failed, 2 wrong usage, 130 Ctrl-C.
    """
