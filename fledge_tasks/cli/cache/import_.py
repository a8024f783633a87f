"""`fledge cache import`: add what `fledge cache export` wrote."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from fledge_tasks import archive
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.view import bar, counted
from fledge_tasks.digest import short
from fledge_tasks.errors import InputError


@click.command("import")
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.pass_obj
def import_(context: Context, file: Path) -> int:
    """Add the entries of FILE ('-': stdin) to the cache.

    Each is checked before it is added; one that does not fit its record is refused, and the exit code is 1.
    Take archives only from those who may write to the cache.
    """
    store, _ = context.store()
    try:
        with contextlib.ExitStack() as stack:
            if str(file) == "-":
                source = sys.stdin.buffer
            else:
                try:
                    source = stack.enter_context(file.open("rb"))
                except OSError as error:
                    raise InputError(f"cannot be read: {os.strerror(error.errno or 0)}", where=str(file)) from None
            with bar("import", None) as advance:
                done = archive.read(store, source, str(file), advance)
    finally:
        store.close()
    for key, reason in done.refused.items():
        click.echo(f"refused: {short(key)}: {reason}", err=True)
    added = counted(len(done.added), "entry", "entries")
    counts = f"{added} added, {len(done.known)} were there, {len(done.refused)} refused"
    click.echo(f"{store.root}: {counts}")
    return int(bool(done.refused))
