"""`fledge export`: what another virtual machine monitor needs to start an image."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import click
import msgspec

from fledge_tasks import export as exports
from fledge_tasks import fresh, fsutil, hash_tree, output
from fledge_tasks.cli.context import Context
from fledge_tasks.errors import InputError
from fledge_tasks.export.guest import Guest, Verity
from fledge_tasks.plan import ImagePlan

_KERNEL = "vmlinux"
_CPUS = click.IntRange(1, 4096)
_MEMORY = click.IntRange(1, 1 << 30)


def _matching(pattern: str, expected: str) -> Callable[[click.Context, click.Parameter, str | None], str | None]:
    """Return the callback of an option that is a text of one form."""

    def check(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(pattern, value):
            raise click.BadParameter(f"found {value!r}, expected {expected}")
        return value

    return check


_PROGRAM = _matching(r"/[!#-~]+", "an absolute path without blanks and quotes")
_WORDS = _matching(r"[ -~]*", "kernel arguments in one line of ASCII")
_TAP = _matching(r"[A-Za-z0-9._-]{1,15}", "the name of a network device")  # IFNAMSIZ is 16, with the NUL at the end
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("name")
@click.option("--for", "monitor", type=click.Choice(exports.MONITORS), required=True, help="Who is to start it.")
@click.option("--kernel", type=_FILE, help=f"Default: {_KERNEL} in the folder that is written to.")
@click.option("--initrd", type=_FILE, help="Default: none.")
@click.option("--cpus", type=_CPUS, metavar="N", help="Default: resources.cpu_cores of the manifest.")
@click.option("--memory", type=_MEMORY, metavar="MIB", help="Default: resources.memory_mb of the manifest.")
@click.option("--read-only", is_flag=True, help="The guest cannot write to its disk; so it is with verity.")
@click.option("--init", callback=_PROGRAM, metavar="PATH", help="First program; default: what the kernel looks for.")
@click.option("--append", callback=_WORDS, metavar="TEXT", default="", help="More kernel arguments.")
@click.option("--tap", callback=_TAP, metavar="NAME", help="A tap device of this host for a network; default: none.")
@click.option(
    "-o", "--output", "folder", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where to write; default: build/NAME/MONITOR.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def export(
    context: Context,
    *,
    name: str,
    monitor: str,
    kernel: Path | None,
    initrd: Path | None,
    cpus: int | None,
    memory: int | None,
    read_only: bool,
    init: str | None,
    append: str,
    tap: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Write what a virtual machine monitor needs to start a built image.

    Firecracker gets a configuration file, all of them a script, run.sh, which passes on what it is given.
    Paths in them are absolute: after moving the workspace, and after each build with verity, export again.
    """
    planner = context.planner()
    try:
        [image] = planner.workspace.select([name])
        plan = planner.plan(image)
        if plan is None:
            raise _not_built(name, str(planner.unresolved(image)))
    finally:
        planner.store.close()
    folder = _absolute(folder or planner.workspace.build / name / monitor)
    resources = _resources(plan)
    guest = Guest(
        name=name,
        architecture=image.source.platform.split("/")[1],
        image=plan.output,
        disk_format=image.output.format,
        filesystem=plan.mkfs.filesystem.type,
        kernel=_absolute(kernel or folder / _KERNEL),
        initrd=_absolute(initrd) if initrd else None,
        cpus=cpus or resources["cpu_cores"],
        memory_mib=memory or resources["memory_mb"],
        is_read_only=read_only or plan.mkfs.filesystem.is_read_only,
        verity=_verity(plan),
        init=init,
        more=append,
        tap=tap,
    )
    module = exports.monitor(monitor)
    files = {folder / file.name: file for file in module.files(guest, folder)}
    for path, file in files.items():
        try:
            fsutil.write_atomic(path, file.data, 0o755 if file.is_program else 0o644)
        except OSError as error:
            raise fsutil.explained(error, path) from None
    if as_json:
        _show_json(guest, monitor, module.arguments(guest), files)
    else:
        for path in files:
            click.echo(f"{name}: {path}")
    for what, needed in (("kernel", guest.kernel), ("initrd", guest.initrd)):
        if needed is not None and not needed.is_file():
            click.echo(f"note: there is no {what} at {needed} yet: put one there, or give --{what}", err=True)


def _resources(plan: ImagePlan) -> dict[str, int]:
    """Return the resources in the manifest of an image. Raises InputError when it is not that of a finished image."""
    described = fresh.is_described(plan)
    if isinstance(described, str):
        raise _not_built(plan.image.name, described)
    resources: dict[str, int] = json.loads(plan.manifest_output.read_bytes())["resources"]
    return resources


def _verity(plan: ImagePlan) -> Verity | None:
    tree = fresh.is_hashed(plan) if plan.image.output.verity else None
    if not isinstance(tree, output.Written):
        return None
    return Verity(plan.tree_output, hash_tree.superblock(plan.tree_output), str(tree.root_hash))


def _not_built(name: str, reason: str) -> InputError:
    return InputError(
        f"the image is not what a build would make: {reason}", where=name, hint=f"run `fledge build {name}`"
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # not resolved: what links lead to may change


def _show_json(guest: Guest, monitor: str, arguments: str, files: Iterable[Path]) -> None:
    found = {
        "name": guest.name,
        "monitor": monitor,
        "files": [str(path) for path in files],
        "kernel": str(guest.kernel),
        "initrd": str(guest.initrd) if guest.initrd else None,
        "arguments": arguments,
        "cpus": guest.cpus,
        "memory_mb": guest.memory_mib,
        "disks": [{**disk._asdict(), "path": str(disk.path)} for disk in guest.disks],
    }
    click.echo(msgspec.json.encode(found))
