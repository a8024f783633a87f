"""Odd layers: the finished image, read back, holds what `umoci unpack` makes of the same layers.

`umoci raw unpack` is what `umoci unpack` calls, without the runtime's configuration around it.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import layers as tar
from tests import rawtar
from tests.layers import Compression
from tests.layouts import CREATED_SECONDS, Layout, Place
from tests.real.compare import compare_trees
from tests.real.oddlayers import DEFAULT, DIFFERENT, INHERITED, KEPT, REFUSED, SAME, Layers
from tests.real.reference import fsck, mounted
from tests.test_tree import CASES
from tests.tools import PATH, need
from tests.workspaces import Result

OURS = ("etc", "lost+found")
"""What an image gets, if it has not got it."""


def archives(layers: Layers) -> list[bytes]:
    return [b"".join(members) + rawtar.END for members in layers]


@dataclass(frozen=True)
class Reference:
    """What umoci made. `unstamped` are the folders that have the time of the day: no entry says another."""

    root: Path
    error: str | None
    unstamped: frozenset[bytes]


def unpack(layout: Layout, place: Path) -> Reference:
    need("umoci")
    root = place / "reference"
    started = time.time_ns() - 1_000_000_000
    argv: list[str | Path] = ["umoci", "raw", "unpack", "--image", f"{layout.path}:latest", root]
    done = subprocess.run(
        argv, env={"PATH": PATH, "HOME": str(place)}, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        return Reference(root, done.stderr.decode(errors="replace"), frozenset())
    folders = [path for path, _, _ in os.walk(os.fsencode(root)) if os.lstat(path).st_mtime_ns >= started]
    paths = (os.path.relpath(path, os.fsencode(root)) for path in folders)
    return Reference(root, None, frozenset(b"" if path == b"." else path for path in paths))


@dataclass(frozen=True)
class Case:
    """One image in a workspace of its own."""

    place: Place
    layout: Layout

    def build(self) -> Result:
        return self.place.fledge("build", "odd")

    def refused(self) -> str:
        """Return what we say when we refuse it."""
        result = self.build()
        assert result.code == 1
        assert not self.place.output("odd").exists()
        return result.stderr

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """Build, let e2fsck and `fledge verify` look, and mount."""
        result = self.build()
        assert result.code == 0, result.stderr
        image = self.place.output("odd")
        assert fsck(image) == ""
        verified = self.place.fledge("verify", "odd")
        assert verified.code == 0, verified.stdout
        with mounted(image) as root:
            yield root

    def differences(self, reference: Reference) -> list[str]:
        """Build, and compare with what umoci made."""
        assert reference.error is None, reference.error
        added = [name for name in OURS if not os.path.lexists(reference.root / name)]
        if "etc" not in added:
            added.append("etc/fsify-entrypoint")
        with self.mounted() as root:
            return compare_trees(reference.root, root, added=added, unstamped=reference.unstamped)


@pytest.fixture
def case(folder: Path) -> Case:
    place = Place(folder / "workspace", folder)
    return Case(place, place.add_layout("odd", buffer_mb=0))


def write(case: Case, tars: list[bytes]) -> None:
    case.layout.write_tars(tars, compression="none", tag="latest")


@pytest.mark.parametrize("name", SAME)
def test_odd_layers(case: Case, folder: Path, name: str) -> None:
    write(case, archives(SAME[name]))
    reference = unpack(case.layout, folder)
    if name in REFUSED:
        assert reference.error is not None
        assert REFUSED[name] in case.refused()
    else:
        assert case.differences(reference) == []


@pytest.mark.parametrize("name", CASES)
def test_the_rules_of_the_merge(case: Case, folder: Path, name: str) -> None:
    """The table of tests/test_tree.py, which says what comes out, with umoci as the judge of it."""
    stack, expected = CASES[name]
    write(case, [tar.archive(members) for members in stack])
    reference = unpack(case.layout, folder)
    if expected is None:
        assert reference.error is not None
        case.refused()
    else:
        assert case.differences(reference) == []


@pytest.mark.parametrize("name", DIFFERENT)
def test_where_we_differ_on_purpose(case: Case, folder: Path, name: str) -> None:
    layers, ours = DIFFERENT[name]
    write(case, archives(layers))
    theirs = unpack(case.layout, folder)
    if isinstance(ours, str):
        assert theirs.error is None  # else there is no difference
        assert ours in case.refused()
        return
    assert theirs.error is not None
    with case.mounted() as root:
        assert list(root.iterdir())
    same = Layout(folder / "same").write_tars(archives(ours), compression="none", tag="latest")
    (folder / "second").mkdir()
    assert case.differences(unpack(same, folder / "second")) == []


PLAIN = rawtar.file(b"f", b"1" * 5000) + rawtar.END
BLOBS: dict[str, tuple[bytes, Compression, bool]] = {
    # name: (blob of a layer, what its media type says, whether we take it)
    "zeros behind gzip": (gzip.compress(PLAIN) + bytes(512), "gzip", True),
    "plain, said to be gzip": (PLAIN, "gzip", True),
    "gzip, said to be plain": (gzip.compress(PLAIN), "none", True),
    "gzip without its checksum": (gzip.compress(PLAIN)[:-8], "gzip", False),
}


@pytest.mark.parametrize("name", BLOBS)
def test_where_we_differ_in_compression(case: Case, folder: Path, name: str) -> None:
    blob, said, is_taken = BLOBS[name]
    case.layout.write_tars([PLAIN], compression=said, blobs={0: blob}, tag="latest")
    theirs = unpack(case.layout, folder)
    assert (theirs.error is None) is not is_taken
    if not is_taken:
        assert "truncated gzip stream" in case.refused()
        return
    same = Layout(folder / "same").write_tars([PLAIN], compression="none", tag="latest")
    (folder / "second").mkdir()
    assert case.differences(unpack(same, folder / "second")) == []


@pytest.mark.parametrize("name", KEPT)
def test_attributes_that_only_we_keep(case: Case, folder: Path, name: str) -> None:
    layers, kept = KEPT[name]
    write(case, archives(layers))
    reference = unpack(case.layout, folder)
    assert reference.error is None
    for path, attributes in kept.items():
        assert not attributes.keys() & {os.fsencode(key) for key in os.listxattr(bytes(reference.root) + b"/" + path)}
    with case.mounted() as root:
        for path, attributes in kept.items():
            for attribute, value in attributes.items():
                assert os.getxattr(bytes(root) + b"/" + path, attribute, follow_symlinks=False) == value


def test_folders_without_an_entry(case: Case, folder: Path) -> None:
    """They inherit nothing, and have the image's time.

    mkdir(2), which umoci calls for them, hands down set-group-ID, the group and a default list (acl(5)).
    """
    above = rawtar.folder(b"d", rawtar.xattr(DEFAULT, INHERITED), mode=0o2750, gid=7)
    write(case, archives([[above, rawtar.file(b"d/e/f")]]))
    reference = unpack(case.layout, folder)
    assert reference.error is None
    theirs = (reference.root / "d/e").stat()
    assert (theirs.st_mode & 0o2000, theirs.st_gid) == (0o2000, 7)
    assert os.fsdecode(DEFAULT) in os.listxattr(reference.root / "d/e")
    assert b"d/e" in reference.unstamped
    with case.mounted() as root:
        ours = (root / "d/e").stat()
        assert (ours.st_mode & 0o7777, ours.st_uid, ours.st_gid) == (0o755, 0, 0)
        assert ours.st_mtime == CREATED_SECONDS
        assert os.listxattr(root / "d/e") == []


def test_paths_as_long_as_linux_takes_them(case: Case, folder: Path) -> None:
    """umoci puts the folder that it unpacks to in front of them, and then they are too long."""
    path = b"d/" * 2047 + b"f"
    write(case, archives([[rawtar.file(path, b"deep")]]))
    assert "file name too long" in (unpack(case.layout, folder).error or "")
    with case.mounted() as root:
        at = os.open(root, os.O_RDONLY)
        try:
            with open(os.open(path, os.O_RDONLY, dir_fd=at), "rb") as file:
                assert file.read() == b"deep"
        finally:
            os.close(at)


def test_more_folders_than_links_can_count(case: Case, folder: Path) -> None:
    """With 65,000 links and more, a folder has the link count 1 (ext4's dir_nlink).

    umoci unpacks into memory, where as many folders are made and removed in a quarter of the time.
    """
    number = 65_010
    write(case, archives([[rawtar.folder(b"d"), *(rawtar.folder(b"d/%d" % at) for at in range(number))]]))
    with in_memory(folder / "memory") as memory:
        assert case.differences(unpack(case.layout, memory)) == []
    with mounted(case.place.output("odd")) as root:
        assert (root / "d").stat().st_nlink == 1
        assert sorted(os.listdir(root / "d"), key=int) == [str(at) for at in range(number)]


@contextmanager
def in_memory(place: Path) -> Iterator[Path]:
    """Mount a tmpfs for a test."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=0", "tmpfs", place], check=True, env={"PATH": PATH})
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True, env={"PATH": PATH})


def test_as_many_links_as_ext4_counts(case: Case, folder: Path) -> None:
    links = [rawtar.hardlink(b"d/%d" % at, b"f") for at in range(65_000)]
    write(case, archives([[rawtar.file(b"f", b"1"), *links[1:]]]))
    assert case.differences(unpack(case.layout, folder)) == []
    with mounted(case.place.output("odd")) as root:
        assert (root / "f").stat().st_nlink == 65_000
    write(case, archives([[rawtar.file(b"f", b"1"), *links]]))
    result = case.build()
    assert result.code == 1
    assert "65001 hard links, ext4 allows 65000" in result.stderr
