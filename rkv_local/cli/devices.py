"""rkv-local devices: what llama.cpp can compute on."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from rkv_local import _lib
from rkv_local.cli import ui
from rkv_local.devices import list_devices


@click.command("devices")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
@click.option("-v", "--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
def devices(as_json: bool, verbose: bool) -> None:
    """List the devices that llama.cpp can compute on."""
    _lib.prepare()
    from rkv_local.cli import nativelog

    nativelog.install(verbose)
    found = list_devices()
    if as_json:
        click.echo(json.dumps([asdict(d) for d in found], indent=2))
        return
    rows = [
        [d.name, d.type, f"{d.memory_free / ui.MIB:,.0f}", f"{d.memory_total / ui.MIB:,.0f}", d.description]
        for d in found
    ]
    head = ["NAME", "TYPE", "FREE MiB", "TOTAL MiB", "DESCRIPTION"]
    click.echo(ui.table(head, rows, [False, False, True, True, False]))
