"""The programs that we need: where they are, which version, which package brings them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import CommandError, ToolError
from fledge_tasks.index import Index, signature
from fledge_tasks.run import environment, package_of, run

_VERSION = re.compile(r"\d+(?:\.\d+)+\S*")


@dataclass(frozen=True)
class Tool:
    """A program, and the arguments with which it prints its version."""

    name: str
    arguments: tuple[str, ...]

    @property
    def path(self) -> Path | None:
        """Where it is, or None."""
        found = shutil.which(self.name, path=environment()["PATH"])
        return Path(found) if found else None

    def version(self, index: Index | None = None) -> str:
        """Return its version, for example '1.47.0'. Remembered in `index` as long as the file is the same.

        Raises ToolError when it is not installed.
        """
        path = self.path
        if path is None:
            raise ToolError(
                f"{self.name} is not installed (not found on PATH)",
                hint=f"install it, for example: sudo apt-get install {package_of(self.name)}",
            )
        name, facts = f"tool:{path}", signature(path.stat())
        known = index.get(name) if index else None
        if isinstance(known, list) and known[:-1] == facts:
            return str(known[-1])
        try:
            output = run(["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", path, *self.arguments]).decode(errors="replace")
        except CommandError as error:
            raise ToolError(f"{self.name} does not say its version: {error.message}") from None
        if not output.strip():
            raise ToolError(f"{self.name} does not say its version: it printed nothing", where=str(path))
        match = _VERSION.search(output)
        version = match.group() if match else output.strip().splitlines()[0]
        if index:
            index.set(name, [*facts, version])
        return version

    def identity(self, index: Index | None = None) -> str:
        """Return package and version, for keys. Raises ToolError as `version`."""
        return f"{package_of(self.name)} {self.version(index)}"

    def numbers(self) -> tuple[int, ...]:
        """Return its version as numbers, for comparing. Raises ToolError."""
        return tuple(int(number) for number in re.findall(r"\d+", self.version())[:3])


SKOPEO = Tool("skopeo", ("--version",))
MKE2FS = Tool("mke2fs", ("-V",))
E2FSCK = Tool("e2fsck", ("-V",))
XFS_GROWFS = Tool("xfs_growfs", ("-V",))
XFS_DB = Tool("xfs_db", ("-V",))
XFS_REPAIR = Tool("xfs_repair", ("-V",))
BTRFS = Tool("btrfs", ("--version",))
BTRFSTUNE = Tool("btrfstune", ("--version",))
MKFS_XFS = Tool("mkfs.xfs", ("-V",))
MKFS_BTRFS = Tool("mkfs.btrfs", ("-V",))
QEMU = Tool("qemu-system-x86_64", ("--version",))
QEMU_IMG = Tool("qemu-img", ("--version",))
VERITYSETUP = Tool("veritysetup", ("--version",))
