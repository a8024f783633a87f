"""A guest that is to be started: its disks, its kernel and what that is told.

Paths are absolute. They go into files that others parse, so each monitor says how it wants them written.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fledge_tasks import hash_tree
from fledge_tasks.errors import ExportError

SCRIPT = "run.sh"
_ROOT, _TREE, _MAPPED = "vda", "vdb", "dm-0"


class File(NamedTuple):
    """A file to be written."""

    name: str
    data: bytes
    is_program: bool = False


class Disk(NamedTuple):
    """A disk of the guest, in the order of their device names. `format` is `raw` or `qcow2`."""

    name: str
    path: Path
    format: str
    is_read_only: bool


@dataclass(frozen=True)
class Verity:
    """The hash tree of the root disk, and what it is to be checked against."""

    tree: Path
    superblock: hash_tree.Superblock
    root_hash: str


@dataclass(frozen=True)
class Guest:
    """What is the same for all monitors. `architecture` is that of the image's platform, such as `amd64`.

    `init` is the first program, None for what the kernel looks for; `more` are kernel arguments of the
    user's; `tap` is a network device of the host, None for no network.
    """

    name: str
    architecture: str
    image: Path
    disk_format: str
    filesystem: str
    kernel: Path
    initrd: Path | None
    cpus: int
    memory_mib: int
    is_read_only: bool = False
    verity: Verity | None = None
    init: str | None = None
    more: str = ""
    tap: str | None = None

    @property
    def disks(self) -> list[Disk]:
        """The root disk, and the one that holds its hash tree."""
        root = Disk("rootfs", self.image, self.disk_format, self.is_read_only or self.verity is not None)
        return [root, *([Disk("verity", self.verity.tree, "raw", True)] if self.verity else [])]

    def arguments(self, *own: str) -> str:
        """Return the kernel command line: `own` of the monitor first, what the user wants last.

        The names are those of Linux, Documentation/admin-guide/kernel-parameters.txt, and Volant's. With a
        hash tree the root is the device that the kernel makes of both disks before it mounts it, so no
        initrd is needed; nothing but `ro` can be mounted then.
        """
        device, mapped = _ROOT, []
        if self.verity:
            device = _MAPPED
            created = hash_tree.early_device(
                self.verity.superblock, self.verity.root_hash, image=f"/dev/{_ROOT}", tree=f"/dev/{_TREE}"
            )
            mapped = [f'dm-mod.create="{created}"']
        parts = [
            *own, *mapped, f"root=/dev/{device}", "ro" if self.disks[0].is_read_only else "rw",
            f"rootfstype={self.filesystem}",
            f"volant.rootfs_device={device}", f"volant.rootfs_fstype={self.filesystem}",
            *([f"init={self.init}"] if self.init else []), self.more,
        ]  # fmt: skip
        return " ".join(filter(None, parts))

    def choose(self, monitor: str, **by_architecture: str) -> str:
        """Return what a monitor wants for the architecture. Raises ExportError for one that it does not run."""
        try:
            return by_architecture[self.architecture]
        except KeyError:
            known = " and ".join(by_architecture)
            raise ExportError(f"{monitor} runs {known} images, and this one is for {self.architecture}") from None


def script(program: str, options: Sequence[str], guest: Guest, monitor: str, before: str = "") -> File:
    """Return a shell script that becomes a program, and passes on what it is given itself.

    `program` is the beginning of its command line, and `before` lines that come first, as a shell reads
    them. Each of the options stands on a line of its own, with its value, in quotes where a shell wants them.
    """
    lines = [program]
    for argument in map(shlex.quote, options):
        if len(lines) > 1 and " " not in lines[-1] and not argument.startswith("-"):
            lines[-1] += f" {argument}"
        else:
            lines.append(argument)
    command = " \\\n  ".join([*lines, '"$@"'])
    head = f"#!/bin/sh\n# Starts {guest.name}. Written by `fledge export {guest.name} --for {monitor}`.\n{before}"
    return File(SCRIPT, os.fsencode(f"{head}exec {command}\n"), is_program=True)
