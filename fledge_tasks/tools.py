"""The programs that we need: where they are, which version, which package brings them."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import CommandError, ToolError
from fledge_tasks.index import Index, signature
from fledge_tasks.run import environment, package_of, run

_VERSION = re.compile(r"\d{1,9}(?:\.\d{1,9})+\S{0,99}")
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Tool:
    """A program, and the arguments with which it prints its version, and its help.

    `may_fail`: versions of it take these arguments for a mistake, and say what is wanted nevertheless.
    """

    name: str
    arguments: tuple[str, ...]
    help: tuple[str, ...] = ()
    may_fail: bool = False

    @property
    def path(self) -> Path | None:
        """Where it is, or None."""
        found = shutil.which(self.name, path=environment()["PATH"])
        return Path(found) if found else None

    def version(self, index: Index | None = None) -> str:
        """Return its version, for example '1.47.0'. Remembered in `index` as long as the file is the same.

        Raises ToolError when it is not installed.
        """

        def read() -> str:
            match = _VERSION.search(output := self._output(self.arguments))
            if match is None and self.may_fail:
                raise ToolError(f"{self.name} does not say its version: {output.strip()}")
            return match.group() if match else output.strip().splitlines()[0][:_SHOWN_CHARACTERS]

        return str(self._remembered("", read, index))

    def numbers(self, index: Index | None = None) -> tuple[int, ...]:
        """Return its version as numbers, for comparing. Remembers and raises as `version`."""
        return tuple(int(number) for number in re.findall(r"\d+", self.version(index))[:3])

    def offers(self, word: str, index: Index | None = None) -> bool:
        """Tell whether its help has a word: what only some builds of it can. Remembers and raises as `version`."""
        return bool(
            self._remembered(
                f":{word}", lambda: re.search(rf"(?<![\w-]){word}\b", self._output(self.help)) is not None, index
            )
        )

    def _remembered(self, what: str, read: Callable[[], str | bool], index: Index | None) -> object:
        path = self.path
        if path is None:
            raise ToolError(
                f"{self.name} is not installed (not found on PATH)",
                hint=f"install it, for example: sudo apt-get install {package_of(self.name)}",
            )
        name, facts = f"tool:{path}{what}", signature(path.stat())
        known = index.get(name) if index else None
        if isinstance(known, list) and known[:-1] == facts:
            return known[-1]
        found = read()
        if index:
            index.set(name, [*facts, found])
        return found

    def _output(self, arguments: tuple[str, ...]) -> str:
        try:
            output = run(["/bin/sh", "-c", 'exec "$@" 2>&1', "sh", str(self.path), *arguments])
        except CommandError as error:
            if not self.may_fail:
                raise ToolError(f"{self.name} does not say its version: {error.message}") from None
            output = error.output
        if not output.strip():
            raise ToolError(f"{self.name} does not say its version: it printed nothing", where=str(self.path))
        return output.decode(errors="replace")

    def identity(self, index: Index | None = None) -> str:
        """Return package and version, for keys. Raises ToolError as `version`."""
        return f"{package_of(self.name)} {self.version(index)}"


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
TAR2SQFS = Tool("tar2sqfs", ("--version",), ("--help",))
SQFSTAR = Tool("sqfstar", ("-version",), ("-help",))
MKFS_EROFS = Tool("mkfs.erofs", ("-V",), ("--help",), may_fail=True)  # 1.5 has no -V
FSCK_EROFS = Tool("fsck.erofs", ("-V",))
