"""`fledge cache export`: what images need, in one file."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fledge_tasks import archive, collect, fsutil
from fledge_tasks.cli.cache.units import Size
from fledge_tasks.cli.context import Context, names_argument
from fledge_tasks.cli.view import bar, counted, human
from fledge_tasks.digest import short
from fledge_tasks.errors import InputError


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True))
@names_argument
@click.option("--max-size", type=Size(), metavar="SIZE", help="Room for entries, before compression.")
@click.pass_obj
def export(context: Context, file: Path, names: tuple[str, ...], max_size: int | None) -> None:
    """Write what images need to FILE ('-': stdout), by default what all of the workspace need.

    Each entry is written once, however many images share it. `fledge cache import` reads it.
    """
    if str(file) != "-" and not file.parent.is_dir():
        raise InputError("there is no such folder", where=str(file.parent))
    planner = context.planner()
    store = planner.store
    images = planner.workspace.select(names)
    try:
        for image in images:
            planner.hold(image)
        needed = collect.needed(planner, images)
        entries = [(entry, len(users)) for key, users in needed.items() if (entry := store.find(key))]
        if not entries:
            raise InputError(
                "the cache holds nothing of these images", where=str(store.root), hint="run `fledge build`"
            )
        choice = archive.choose(entries, max_size)
        with bar("export", sum(entry.size for entry in choice.chosen)) as advance:
            if str(file) == "-":
                archive.write(choice.chosen, sys.stdout.buffer, advance)
            else:
                try:
                    with fsutil.replacing(file) as fd, open(fd, "wb", closefd=False) as target:
                        archive.write(choice.chosen, target, advance)
                except OSError as error:
                    raise fsutil.explained(error, file) from None
    finally:
        store.close()
    for entry in choice.left_out:
        click.echo(f"left out: {entry.stage} {short(entry.key)}, {human(entry.size)}", err=True)
    size = human(sum(entry.size for entry in choice.chosen))
    packed = "" if str(file) == "-" else f", {human(file.stat().st_size)} compressed"
    click.echo(f"{file}: {counted(len(choice.chosen), 'entry', 'entries')}, {size}{packed}", err=True)
