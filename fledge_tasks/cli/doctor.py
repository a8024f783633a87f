"""`fledge doctor`: which tools are here and what is possible with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click

from fledge_tasks import fsutil, workspace
from fledge_tasks.cli.context import Context
from fledge_tasks.errors import FledgeError, ImageNotFoundError
from fledge_tasks.tools import E2FSCK, MKE2FS, QEMU, QEMU_IMG, SKOPEO, VERITYSETUP, Tool


class _Check(NamedTuple):
    """One line. `is_needed`: nothing can be built without it."""

    name: str
    is_good: bool
    text: str
    is_needed: bool = False


@click.command()
@click.pass_obj
def doctor(context: Context) -> int:
    """Show tools, versions and what is possible here. Exits with 1 when ext4 images cannot be built."""
    checks = list(_checks(context.folder))
    for check in checks:
        mark = "ok" if check.is_good else "MISSING" if check.is_needed else "no"
        click.echo(f"{mark:<8} {check.name:<14} {check.text}")
    return 0 if all(check.is_good or not check.is_needed for check in checks) else 1


def _checks(folder: Path) -> Iterator[_Check]:
    yield _tool(SKOPEO, "registries, daemons, archives", is_needed=True)
    yield _tool(MKE2FS, "ext4", is_needed=True)
    from fledge_tasks.filesystems import libext2fs  # the other commands start sooner without

    try:
        yield _Check("libext2fs", True, f"{libext2fs.version()}: ext4", is_needed=True)
    except FledgeError as error:
        yield _Check("libext2fs", False, str(error), is_needed=True)
    yield _tool(E2FSCK, "checking ext4 images")
    for kind in ("xfs", "btrfs"):
        yield from _type(kind)
    yield _read_only("squashfs", "squashfs", "zstd", "without root")
    yield _read_only("erofs", "erofs", "none", "without root or any program")
    yield _read_only("erofs lz4", "erofs", "lz4", "compressed, without root")
    yield _tool(QEMU, "booting images")._replace(name="qemu")
    yield _kernel()
    yield _tool(QEMU_IMG, "qcow2 disks")
    yield _tool(VERITYSETUP, "hash trees for dm-verity")
    yield _daemon()
    yield from _cache(folder)


def _type(kind: str) -> Iterator[_Check]:
    from fledge_tasks.filesystems import possible

    ways = (
        ("as root", possible.obstacle_to_mounting(kind), "through a loop mount that nobody else sees"),
        (
            "rootless",
            possible.obstacle_to_populating(kind),
            "filled by mkfs from a folder, as root of a user namespace",
        ),
    )
    for way, obstacle, how in ways:
        text = f"{possible.made_by(kind)}: {how}" if obstacle is None else f"{obstacle.message}: {obstacle.hint}"
        yield _Check(f"{kind} {way}", obstacle is None, text)


def _read_only(name: str, kind: str, compression: str, how: str) -> _Check:
    from fledge_tasks.filesystems import possible, read_only

    try:
        possible.check(kind, compression=compression)
        if read_only.check(kind, compression) is not None:
            least = read_only.dotted(read_only.MIN_EROFS_TAR)
            how = f"compressed, through a loop mount that nobody else sees; {least} needs no root"
        return _Check(name, True, f"{possible.made_by(kind, compression)}: {how}")
    except FledgeError as error:
        return _Check(name, False, str(error).replace("\n  hint:", ":"))


def _tool(tool: Tool, purpose: str, *, is_needed: bool = False) -> _Check:
    try:
        return _Check(tool.name, True, f"{tool.version()}: {purpose}", is_needed)
    except FledgeError as error:
        return _Check(tool.name, False, str(error).replace("\n  hint:", ":"), is_needed)


def _kernel() -> _Check:
    from fledge_tasks.boot import kernel

    try:
        found = kernel.find()
        return _Check("kernel", True, f"{found.image}: booting images")
    except FledgeError as error:
        return _Check("kernel", False, error.message)


def _daemon() -> _Check:
    from fledge_tasks.oci import daemon

    try:
        daemon.inspect("scratch")
    except ImageNotFoundError:
        pass  # it answered
    except FledgeError as error:
        return _Check("docker daemon", False, f"{error.message}: images come from registries and files")
    return _Check("docker daemon", True, f"{daemon.host()}: asked first for references without a transport")


def _cache(folder: Path) -> Iterator[_Check]:
    cache = workspace.cache_folder(folder)
    place = cache
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        yield _Check("cache", False, f"{cache} cannot be written to: set {workspace.CACHE_VARIABLE}", is_needed=True)
        return
    yield _Check("cache", True, str(cache), is_needed=True)
    if fsutil.can_reflink(place):
        yield _Check("reflinks", True, "images share their blocks with the cache")
    else:
        yield _Check("reflinks", False, "images are copied: put cache and build on one btrfs or xfs to share blocks")
