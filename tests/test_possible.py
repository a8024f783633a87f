"""Which way a type can be made: decided by what is installed, and by what this process may do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fledge_tasks import userns
from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import backend, possible
from fledge_tasks.filesystems.possible import check, obstacle_to_mounting, obstacle_to_populating

PROGRAMS = ("mkfs.xfs", "xfs_growfs", "xfs_db", "xfs_repair", "mkfs.btrfs", "btrfs", "btrfstune", "mke2fs")
ROOT = (1 << 41) - 1


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with tools that are new enough, loop devices, both types in the kernel, and a root that may do all."""
    for name in PROGRAMS:
        install(tmp_path, name, "7.3")
    monkeypatch.setattr("fledge_tasks.tools.environment", lambda: {"PATH": str(tmp_path)})
    monkeypatch.setattr(userns, "capabilities", lambda: ROOT)
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(possible, "_is_known", lambda _: True)
    return tmp_path


def install(folder: Path, name: str, version: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\necho {name} {version}\n")
    (folder / name).chmod(0o755)


def made_by(kind: str) -> str:
    """Return the name of the module that makes a type."""
    return str(getattr(backend(kind), "__name__", "")).rpartition(".")[2]


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_with_root_it_is_mounted(kind: str) -> None:
    check(kind)
    assert obstacle_to_mounting(kind) is None
    assert made_by(kind) == kind


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
@pytest.mark.parametrize("lost", ["rights", "loop devices", "kernel", "tool"])
def test_where_nothing_can_be_mounted_it_is_filled_by_mkfs(
    machine: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lost: str
) -> None:
    if lost == "rights":
        monkeypatch.setattr(userns, "capabilities", lambda: ROOT & ~(1 << userns.CAP_SYS_ADMIN))
    elif lost == "loop devices":
        monkeypatch.setattr(os, "access", lambda path, _: path != "/dev/loop-control")
    elif lost == "kernel":
        monkeypatch.setattr(possible, "_is_known", lambda _: False)
    else:
        (machine / {"xfs": "xfs_growfs", "btrfs": "btrfstune"}[kind]).unlink()
    check(kind)
    assert obstacle_to_mounting(kind) is not None
    assert made_by(kind) == f"{kind}_rootless"


def test_ext4_needs_its_tool_alone(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "capabilities", lambda: 0)
    check("ext4")
    assert made_by("ext4") == "ext4"
    (machine / "mke2fs").unlink()
    with pytest.raises(FilesystemError, match="ext4 images need mke2fs, which is not installed") as caught:
        check("ext4")
    assert caught.value.hint == "install it, for example: sudo apt-get install e2fsprogs"


@pytest.mark.parametrize(
    ("kind", "version", "text"),
    [
        ("xfs", "6.1.0", "mkfs.xfs 6.1.0 does not fill an image from a folder completely"),
        ("xfs", "7.1.1", "mkfs.xfs 7.1.1 does not fill an image from a folder completely"),
        ("xfs", "7.2.0", None),
        ("xfs", "10.0.0", None),
        ("btrfs", "v5.16", "mkfs.btrfs 5.16 is older than what was tried"),
        ("btrfs", "v6.2", None),
        ("btrfs", "v6.10", None),
        ("btrfs", "v6.10.1", "mkfs.btrfs 6.10.1 makes files of their own of hard links"),
        ("btrfs", "v6.11", "mkfs.btrfs 6.11 makes files of their own of hard links"),
        ("btrfs", "v6.12", None),
        ("btrfs", "v7.3", None),
    ],
)
def test_versions_that_fill_completely(machine: Path, kind: str, version: str, text: str | None) -> None:
    install(machine, f"mkfs.{kind}", version)
    found = obstacle_to_populating(kind)
    assert (found.message if found else None) == text


def test_what_is_in_the_way_is_told_for_both_ways(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: path != "/dev/loop-control")
    install(machine, "mkfs.xfs", "6.1.0")
    with pytest.raises(FilesystemError) as caught:
        check("xfs")
    assert caught.value.message == (
        "xfs images need a loop device, and there is no /dev/loop-control to use; "
        "without a mount: mkfs.xfs 6.1.0 does not fill an image from a folder completely"
    )
    assert caught.value.hint == (
        "load it with `modprobe loop` (a container needs --privileged); or install xfsprogs 7.2 or later; "
        "or choose ext4, which needs none of it"
    )
    (machine / "mkfs.xfs").unlink()
    with pytest.raises(FilesystemError, match=r"^xfs images need mkfs.xfs, which is not installed") as caught:
        check("xfs")
    assert caught.value.hint == "install it, for example: sudo apt-get install xfsprogs"


def test_what_users_lack_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(userns, "capabilities", lambda: 0)
    monkeypatch.setattr(userns, "obstacle", lambda: FilesystemError("nobody may", hint="ask"))
    with pytest.raises(FilesystemError) as caught:
        check("btrfs")
    assert caught.value.message == "btrfs images can only be made by root; without a mount: nobody may"
    assert caught.value.hint == "run as root; or ask; or choose ext4, which needs none of it"
    (machine / "btrfs").unlink()
    with pytest.raises(FilesystemError, match="without a mount: they need btrfs, which is not installed") as caught:
        check("btrfs")
    assert caught.value.hint is not None and "apt-get install btrfs-progs" in caught.value.hint


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_mkfs_fills_plain_ones_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    check(kind, is_plain=False)
    monkeypatch.setattr(os, "access", lambda path, _: path != "/dev/loop-control")
    check(kind)
    with pytest.raises(FilesystemError, match="without a mount: they have the features and the block size of the type"):
        check(kind, is_plain=False)
