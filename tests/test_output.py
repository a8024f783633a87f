"""Finished files are known by what was recorded of them, and by nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fledge_tasks import output
from fledge_tasks.digest import sha256_bytes
from fledge_tasks.fsutil import temp_sibling

DIGEST = sha256_bytes(b"data")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file that was just made from 'key'."""
    path = tmp_path / "build" / "web" / "rootfs.img"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"data")
    output.remember(path, "key", DIGEST)
    return path


def test_an_untouched_file_is_known(file: Path) -> None:
    status = file.stat()
    expected = output.Written("key", DIGEST, 4, status.st_mtime_ns, status.st_ino)
    assert output.look(file, "key") == expected
    assert list(json.loads((file.parent / ".fledge.json").read_bytes())) == ["rootfs.img"]


def test_another_key(file: Path) -> None:
    assert output.look(file, "other") == "what goes in has changed"


def test_a_deleted_file(file: Path) -> None:
    file.unlink()
    assert output.look(file, "key") == "rootfs.img is not there"


def test_edited_touched_truncated_and_replaced_files(file: Path) -> None:
    changed = "rootfs.img was changed since it was written"
    status = file.stat()
    file.write_bytes(b"DATA")
    os.utime(file, ns=(0, status.st_mtime_ns + 1))
    assert output.look(file, "key") == changed
    os.utime(file, ns=(0, status.st_mtime_ns))
    assert isinstance(output.look(file, "key"), output.Written)  # a restored mtime is believed
    file.write_bytes(b"dat")
    os.utime(file, ns=(0, status.st_mtime_ns))
    assert output.look(file, "key") == changed
    (file.parent / "new").write_bytes(b"data")
    os.utime(file.parent / "new", ns=(0, status.st_mtime_ns))
    (file.parent / "new").rename(file)
    assert output.look(file, "key") == changed


@pytest.mark.parametrize(
    "record",
    [
        None,
        b"",
        b"{}",
        b"[]",
        b'{"rootfs.img": {}}',
        b'{"rootfs.img": {"key": "key"}}',
        b'{"rootfs.img": {"key": "\xff"}}',
        b'{"rootfs.img": {"more": ' + b"[" * 100_000,
    ],
)
def test_without_a_record_a_file_is_not_ours(file: Path, record: bytes | None) -> None:
    (file.parent / ".fledge.json").unlink()
    if record is not None:
        (file.parent / ".fledge.json").write_bytes(record)
    assert output.look(file, "key") == "rootfs.img was not made by this build"
    output.remember(file, "key", DIGEST)
    assert isinstance(output.look(file, "key"), output.Written)


def test_records_of_several_files(file: Path) -> None:
    other = file.with_name("manifest.json")
    other.write_bytes(b"{}")
    output.remember(other, "their key", DIGEST)
    assert isinstance(output.look(file, "key"), output.Written)
    assert isinstance(output.look(other, "their key"), output.Written)
    assert output.remove(file)
    assert output.look(file, "key") == "rootfs.img is not there"
    assert isinstance(output.look(other, "their key"), output.Written)
    assert output.remove(other)
    assert not file.parent.exists()
    assert not output.remove(other)


def test_remove_takes_what_crashed_writers_left(file: Path) -> None:
    temp_sibling(file).write_bytes(b"half")
    assert output.remove(file)
    assert not file.parent.exists()


def test_remove_leaves_what_is_not_ours(file: Path) -> None:
    (file.parent / "notes.txt").write_text("mine")
    assert output.remove(file)
    assert [path.name for path in file.parent.iterdir()] == ["notes.txt"]
