"""`fledge init`: begin with an image."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fledge_tasks import fsutil, starter
from fledge_tasks.cli.context import Context
from fledge_tasks.config import FILE_NAME, MANIFEST_FILE_NAME, SOURCE, Source
from fledge_tasks.errors import FledgeError, InputError
from fledge_tasks.oci.inspect import read_config
from fledge_tasks.oci.reference import PATH_TRANSPORTS, Reference, parse

_DODO_NAME = "dodo.py"


@click.command()
@click.argument("folder", metavar="[DIR]", default=".", type=click.Path(path_type=Path))
@click.option("--image", required=True, metavar="REF", help="As in [source] of fledge.toml; paths start here.")
@click.option("--platform", default=Source("").platform, metavar="OS/ARCH", help=f"Default: {Source('').platform}.")
@click.option("--no-inspect", is_flag=True, help="Do not look at the image, say because there is no network.")
@click.option("--no-dodo", is_flag=True, help="Write no dodo.py.")
@click.pass_obj
def init(context: Context, *, folder: Path, image: str, platform: str, no_inspect: bool, no_dodo: bool) -> None:
    """Write a commented fledge.toml, and a dodo.py, for an image into DIR, by default the workspace.

    The image's config is looked at, and what it suggests for the manifest is written down. Nothing is built
    or pinned, and no file is replaced.
    """
    target = context.folder / folder
    names = (FILE_NAME,) if no_dodo else (FILE_NAME, _DODO_NAME)
    _refuse_existing(target, *names, MANIFEST_FILE_NAME)
    home = Path(os.path.realpath(target))
    reference = _reference(image, platform, context.folder, home)
    written = reference.canonical if reference.transport in PATH_TRANSPORTS else image
    config = None if no_inspect else _look(reference, platform, home)
    content = starter.fledge_toml(written, platform, starter.image_name(home.name, reference), config)
    _write({target / name: text for name, text in zip(names, (content, starter.DODO), strict=False)})
    for name in names:
        click.echo(f"wrote {target / name}")


def _refuse_existing(target: Path, *names: str) -> None:
    """Raise InputError when one of these is there, or `target` is no folder. A second manifest would be a mistake."""
    if os.path.lexists(target) and not target.is_dir():
        raise InputError("not a folder", where=str(target))
    if there := [name for name in names if os.path.lexists(target / name)]:
        hint = "move it away, or name another folder"
        if there == [_DODO_NAME]:
            hint += "; --no-dodo writes fledge.toml alone"
        if there == [MANIFEST_FILE_NAME]:
            hint += ": the manifest will stand in fledge.toml"
        raise InputError(f"found {' and '.join(there)}, and no file is replaced", where=str(target), hint=hint)


def _reference(image: str, platform: str, here: Path, home: Path) -> Reference:
    """Return the reference as it is seen from `home`, the folder of fledge.toml. Raises InputError."""
    reference = parse(image)
    if reference.transport in PATH_TRANSPORTS and not os.path.isabs(reference.path):
        path = os.path.relpath(os.path.abspath(here / reference.path), home)
        reference = parse(replace(reference, path=path).canonical)
    text = reference.canonical if reference.transport in PATH_TRANSPORTS else image
    for key, message, hint in SOURCE.findings("", {"image": text, "platform": platform}):
        raise InputError(message, where=f"--{key}", hint=hint)
    return reference


def _look(reference: Reference, platform: str, home: Path) -> dict[str, Any]:
    try:
        with tempfile.TemporaryDirectory(prefix="fledge-init-") as scratch:
            return read_config(reference, folder=home, platform=platform, scratch=Path(scratch))
    except FledgeError as error:
        hints = [error.hint, "--no-inspect writes the files without looking at the image"]
        error.hint = "\n".join(filter(None, hints))
        raise


def _write(files: Mapping[Path, str]) -> None:
    """Write new files, all of them or none. Raises InputError when one has come into being, StoreError."""
    with ExitStack() as undo:
        for path, text in files.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fsutil.write_new(path, text.encode())
            except FileExistsError:
                _refuse_existing(path.parent, path.name)
                raise
            except OSError as error:
                raise fsutil.explained(error, path.parent) from None
            undo.callback(path.unlink, missing_ok=True)
        undo.pop_all()
