"""What makes the read-only types: which programs are taken, and what is said when there is none that will do."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge_tasks import userns
from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import possible, read_only
from fledge_tasks.tools import SQFSTAR, TAR2SQFS

HELP = "gzip lzo lz4 lz4hc xz zstd"


class Programs:
    """A PATH with nothing on it but what tests put there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, name: str, version: str, offers: str = HELP) -> None:
        """Put a program there that says its version, and what it was built with."""
        path = self._folder / name
        path.write_text(f'#!/bin/sh\ncase $1 in --help|-help) echo "{offers}" ;; *) echo "{name} {version}" ;; esac\n')
        path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr("fledge_tasks.tools.environment", lambda: {"PATH": str(folder)})
    return Programs(folder)


def said(kind: str, compression: str | None = None) -> str:
    """Return what is said about a type that cannot be made."""
    error = possible.obstacle(kind, compression=compression)
    assert error is not None
    return str(error)


def test_squashfs_is_made_by_what_keeps_everything(programs: Programs) -> None:
    assert "need tar2sqfs, or sqfstar 4.6 or later: neither is installed" in said("squashfs", "zstd")
    assert "apt-get install squashfs-tools-ng" in said("squashfs", "zstd")
    programs.add("sqfstar", "version 4.5.1 (2022/03/17)")
    assert "found sqfstar 4.5.1, which does not keep the root folder's owner and time" in said("squashfs", "zstd")
    programs.add("sqfstar", "version 4.6.1 (2023/03/25)")
    assert read_only.tool_for("squashfs", "zstd") is SQFSTAR
    assert possible.made_by("squashfs", "zstd") == "squashfs-tools 4.6.1"
    programs.add("tar2sqfs", "(squashfs-tools-ng) 1.2.0")
    assert read_only.tool_for("squashfs", "zstd") is TAR2SQFS
    assert possible.made_by("squashfs", "zstd") == "squashfs-tools-ng 1.2.0"
    assert possible.obstacle("squashfs", compression="zstd") is None


def test_squashfs_without_compression_is_made_by_sqfstar_alone(programs: Programs) -> None:
    programs.add("tar2sqfs", "(squashfs-tools-ng) 1.2.0")
    assert "without compression need sqfstar 4.6 or later: it is not installed" in said("squashfs", "none")
    programs.add("sqfstar", "version 4.6.1 (2023/03/25)")
    assert read_only.tool_for("squashfs", "none") is SQFSTAR
    assert possible.obstacle("squashfs", compression="none") is None


def test_erofs_without_compression_needs_nothing(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    del programs
    monkeypatch.setattr(userns, "capabilities", lambda: 0)
    assert possible.obstacle("erofs", compression="none") is None
    assert possible.made_by("erofs", "none") == "fledge-tasks erofs 1"


def test_compressed_erofs_needs_a_new_mkfs_or_root(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "capabilities", lambda: 0)
    assert "compressed erofs images need mkfs.erofs, which is not installed" in said("erofs", "lz4")
    programs.add("mkfs.erofs", "1.5")
    assert said("erofs", "lz4") == (
        "compressed erofs images can only be made by root\n"
        "  hint: run as root, or install erofs-utils 1.8.4 or later, which needs none (here is 1.5), "
        "or choose compression none, or squashfs"
    )
    programs.add("mkfs.erofs", "(erofs-utils) 1.8.3")
    assert not read_only.reads_tar()
    programs.add("mkfs.erofs", "(erofs-utils) 1.8.10")
    assert read_only.reads_tar()
    assert possible.obstacle("erofs", compression="lz4") is None
    assert possible.made_by("erofs", "lz4") == "erofs-utils 1.8.10"


def test_what_a_program_was_built_without(programs: Programs) -> None:
    programs.add("tar2sqfs", "1.2.0", "gzip xz lz4hc")
    programs.add("mkfs.erofs", "1.8.6", "lzma")
    assert possible.obstacle("squashfs", compression="xz") is None
    assert said("squashfs", "lz4") == (
        "the tar2sqfs that is installed was built without lz4\n"
        "  hint: choose another compression of squashfs: zstd, gzip, lzo, xz, lz4, none"
    )
    assert "the mkfs.erofs that is installed was built without lz4hc" in said("erofs", "lz4hc")


def test_a_program_that_does_not_say_its_version(programs: Programs) -> None:
    programs.add("sqfstar", "nothing")
    with pytest.raises(FilesystemError, match="squashfs images need tar2sqfs"):
        possible.check("squashfs", compression="zstd")
