"""With what mkfs.xfs and mkfs.btrfs are called, by their version: recorded by programs in their place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from fledge_tasks.filesystems import btrfs, xfs
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.tools import Tool
from tests.tools import PATH
from tests.trees import PARAMETERS

XFS = (
    "-q -f -K -b size=4096"
    " -m crc=1,finobt=1,inobtcount=1,bigtime=1,reflink=1,rmapbt=0,uuid=00010203-0405-0607-0809-0a0b0c0d0e0f"
    " -i size=512,sparse=1,maxpct=50{inodes} -n ftype=1{names}"
)
BTRFS = "-q -f --nodiscard -s 4096 -m single -d single -O {features}"


@pytest.mark.parametrize(
    ("kind", "version", "options"),
    [
        (xfs, "6.1.0", XFS.format(inodes="", names="")),
        (xfs, "6.5.0", XFS.format(inodes=",nrext64=0", names="")),
        (xfs, "6.13.0", XFS.format(inodes=",nrext64=0,exchange=0", names=",parent=0")),
        (xfs, "7.2.0", XFS.format(inodes=",nrext64=0,exchange=0", names=",parent=0")),
        (btrfs, "v6.2", BTRFS.format(features="no-holes -R free-space-tree")),
        (btrfs, "v6.14", BTRFS.format(features="no-holes,free-space-tree,^block-group-tree")),
        (btrfs, "v7.3", BTRFS.format(features="no-holes,free-space-tree,^block-group-tree")),
    ],
)
def test_no_version_is_asked_for_what_linux_5_10_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: ModuleType, version: str, options: str
) -> None:
    name = f"mkfs.{kind.__name__.rpartition('.')[2]}"
    version_asked, recorded = 'test "$1" = -V', f'echo "$@" "$EPOCH" "$PWD" > {tmp_path}/log'
    script = f"#!/bin/sh\nif {version_asked}; then echo {name} {version}; else {recorded}; fi\n"
    (tmp_path / name).write_text(script)
    (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
    parameters = replace(PARAMETERS, features=OPTIONS[kind.__name__.rpartition(".")[2]].default)
    kind.mkfs(tmp_path / "image", parameters)
    assert (tmp_path / "log").read_text().startswith(f"{options} {tmp_path}/image ")
    kind.mkfs(tmp_path / "image", parameters, "--more", "of it", env={"EPOCH": "5"}, cwd=tmp_path)
    assert (tmp_path / "log").read_text() == f"{options} --more of it {tmp_path}/image 5 {tmp_path}\n"


@pytest.mark.parametrize(
    ("text", "numbers"), [("tool 6.1.0", (6, 1, 0)), ("tool v6.14-rc2", (6, 14, 2)), ("7.3", (7, 3)), ("none", ())]
)
def test_versions_as_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, numbers: tuple[int, ...]
) -> None:
    (tmp_path / "tool").write_text(f"#!/bin/sh\necho {text}\n")
    (tmp_path / "tool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{PATH}")
    assert Tool("tool", ()).numbers() == numbers
