"""The promise about size, for all three types: what a guest finds free, fixed sizes, small ones, labels, features."""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fledge_tasks.filesystems.options import OPTIONS
from tests.layers import Member, folder, symlink
from tests.layouts import Layout
from tests.real.test_mounted_types import checked, mounted
from tests.tools import PATH, need
from tests.workspaces import Workspace

KINDS = ("ext4", "xfs", "btrfs")
MIB = 1 << 20
UUID = "0b0eeb0f-5b73-4ff1-9d6d-0f5b0d3f7a5c"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mke2fs", "mkfs.xfs", "xfs_repair", "mkfs.btrfs", "btrfs", "blkid")


def _small_files() -> Iterator[Member]:
    for number in range(3_000):
        yield Member(f"many/{number // 500}/{number}", b"%d\n" % number * (number % 90))


def _large_files() -> Iterator[Member]:
    numbers = random.Random(1)
    for number in range(3):
        yield Member(f"large/{number}", numbers.randbytes(60 * MIB + number))


def _deep_folders() -> Iterator[Member]:
    for tree in range(20):
        for depth in range(1, 120):
            yield folder(f"{tree}" + "/folder-with-a-name" * depth)
        yield symlink(f"{tree}/link", "x/" * 400)


def _attributes() -> Iterator[Member]:
    numbers = random.Random(2)
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    for number in range(3000):
        value = numbers.randbytes(number % 2500).hex()[: number % 2500].encode()
        yield Member(f"attributes/{number}", b"", xattrs={"user.value": value, "security.capability": capability})


SHAPES: dict[str, Callable[[], Iterator[Member]]] = {
    "small files": _small_files, "large files": _large_files, "deep folders": _deep_folders, "attributes": _attributes,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(scratch: Path) -> Workspace:
    """A workspace with a layout for each shape."""
    place = Workspace(scratch / "sizes", scratch)
    for shape, members in SHAPES.items():
        Layout(place.root / "layouts" / shape.replace(" ", "-")).write(list(members()))
    Layout(place.root / "layouts" / "small").write([Member("a", b"a" * 100_000)])
    return place


def describe(place: Workspace, kind: str, shape: str, settings: str) -> str:
    """Write the fledge.toml of an image, and return its name."""
    name = f"{kind}-{shape.replace(' ', '-')}"
    file = place.root / name / "fledge.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        f'version = "1"\nstrategy = "oci_rootfs"\n[source]\nimage = "oci:../layouts/{shape.replace(" ", "-")}"\n'
        f'[filesystem]\ntype = "{kind}"\n{settings}\n'
    )
    return name


def judged(image: Path, kind: str) -> None:
    if kind == "ext4":
        subprocess.run(["e2fsck", "-fn", image], env={"PATH": PATH}, capture_output=True, check=True)
    else:
        checked(image, kind)


def free(image: Path, kind: str, copy: Path) -> tuple[int, int, int]:
    """Return the bytes and inodes that a guest's root finds free, and the inodes in use."""
    shutil.copy(image, copy)
    with mounted(copy, kind, "rw") as root:
        status = os.statvfs(root)
    copy.unlink()
    return status.f_bavail * status.f_frsize, status.f_favail, status.f_files - status.f_ffree


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_buffer_and_little_more(place: Workspace, folder: Path, shape: str, kind: str) -> None:
    buffer = {"small files": 0, "large files": 150, "deep folders": 1, "attributes": 40}[shape]
    name = describe(place, kind, shape, f"size_buffer_mb = {buffer}")
    place.build(name)
    image = place.output(name)
    judged(image, kind)
    size, (found, free_inodes, used) = image.stat().st_size, free(image, kind, folder / "image")
    assert found >= buffer * MIB
    least = OPTIONS[kind].min_mb * MIB
    assert size == least or found <= buffer * MIB + (MIB if kind == "ext4" else max(16 * MIB, size // 20))
    if kind != "btrfs":  # which has no limit
        assert free_inodes >= max(10_000, used // 5)
    assert place.fledge("verify", name).code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_shrunk(place: Workspace, folder: Path, kind: str) -> None:
    name = describe(place, kind, "large files", "size_buffer_mb = 150")
    place.build(name)
    plain = place.output(name).stat().st_size
    describe(place, kind, "large files", "size_buffer_mb = 150\nshrink = true")
    place.build(name)
    image = place.output(name)
    judged(image, kind)
    assert image.stat().st_size <= plain
    assert 150 * MIB <= free(image, kind, folder / "image")[0] <= 152 * MIB
    assert place.fledge("verify", name).code == 0


def test_btrfs_has_no_empty_block_groups(place: Workspace) -> None:
    """Linux takes them away some time after a mount, and until then does not always count what is free in them."""
    name = describe(place, "btrfs", "large files", "size_buffer_mb = 150")
    command = ["btrfs", "inspect-internal", "dump-tree", "-t", "extent", str(place.output(name))]
    for attempt in range(4):
        place.build(name)
        told = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
        used = [int(number) for number in re.findall(r"block group used (\d+)", told)]
        assert len(used) >= 3
        assert all(used), used
        describe(place, "btrfs", "large files", f'size_buffer_mb = 150\nlabel = "{attempt}"')


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_size(place: Workspace, folder: Path, kind: str) -> None:
    name = describe(place, kind, "large files", "size_mb = 700\nsize_buffer_mb = 200")
    place.build(name)
    image = place.output(name)
    judged(image, kind)
    assert image.stat().st_size == 700 * MIB
    assert free(image, kind, folder / "image")[0] >= 300 * MIB
    describe(place, kind, "large files", "size_mb = 301\nsize_buffer_mb = 200")
    result = place.fledge("build", name)
    assert result.code == 1
    found = re.search(
        rf"error: mkfs:{name}: filesystem.size_mb: found 301, and this image needs (\d+) MiB, 200 of them free\n"
        rf"  hint: set size_mb = \1 or more, or leave it out\n", result.stderr,
    )  # fmt: skip
    assert found is not None, result.stderr
    describe(place, kind, "large files", f"size_mb = {found[1]}\nsize_buffer_mb = 200")
    place.build(name)
    judged(image, kind)
    assert image.stat().st_size == int(found[1]) * MIB
    assert free(image, kind, folder / "image")[0] >= 200 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_label_and_uuid(place: Workspace, kind: str) -> None:
    settings = f'size_buffer_mb = 1\nlabel = "root-é"\nuuid = "{UUID}"'
    name = describe(place, kind, "small", settings)
    place.build(name)
    judged(place.output(name), kind)
    command = ["blkid", "-p", "-o", "value", "-s", "LABEL", "-s", "UUID", "-s", "TYPE"]
    found = subprocess.run(
        [*command, place.output(name)], env={"PATH": PATH, "LC_ALL": "C.UTF-8"}, capture_output=True, check=True
    ).stdout
    assert UUID.encode() in found.split()
    assert b"root-M-CM-)" in found.split() or "root-é".encode() in found.split()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *(("xfs", f'features = ["{word}"]') for word in OPTIONS["xfs"].feature_words() if word != "^finobt"),
        ("xfs", 'features = ["^finobt", "^inobtcount"]'),
        ("xfs", "block_size = 1024"),
        *(("btrfs", f'features = ["{word}"]') for word in OPTIONS["btrfs"].feature_words()),
    ],
)
def test_features(place: Workspace, folder: Path, kind: str, settings: str) -> None:
    name = describe(place, kind, "deep folders", f"size_buffer_mb = 1\n{settings}")
    place.build(name)
    image = place.output(name)
    judged(image, kind)
    with mounted(image, kind, "ro") as root:
        told = _features(kind, root, image)
    for word in re.findall(r'"(.*?)"', settings):
        assert (word.removeprefix("^") in told) == (not word.startswith("^")), told
    if "block_size" in settings:
        assert "bsize=1024" in told
    assert place.fledge("verify", name).code == 0
    del folder


def _features(kind: str, root: Path, image: Path) -> set[str]:
    """Return what the tools tell of an image's features, in the words that we have for them."""
    if kind == "xfs":
        told = subprocess.run(["xfs_info", root], env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
        pairs = dict(re.findall(r"(\w+)=(\d+)", told.partition("naming")[0]))
        names = {"finobt", "inobtcount", "bigtime", "reflink", "sparse", "rmapbt"}
        assert names <= pairs.keys()
        return {name for name in names if pairs[name] != "0"} | {
            f"bsize={size}" for size in re.findall(r"data +=\s*bsize=(\d+)", told)
        }
    command = ["btrfs", "inspect-internal", "dump-super"]
    told = subprocess.run([*command, image], env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
    flags = {"FREE_SPACE_TREE": "free-space-tree", "NO_HOLES": "no-holes", "MIXED_GROUPS": "mixed-bg"}
    return {ours for theirs, ours in flags.items() if re.search(rf"\b{theirs}\b", told)}


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_the_least_size_is_said(place: Workspace, kind: str) -> None:
    name = describe(place, kind, "small", "size_buffer_mb = 3")
    result = place.fledge("build", name)
    assert result.code == 0
    least = OPTIONS[kind].min_mb
    assert re.search(
        rf"^{name}: {least} MiB is the least that {kind} takes, so \d+ MiB are free instead of 3$",
        result.stderr, re.MULTILINE,
    ), result.stderr  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_preallocate_leaves_no_hole(place: Workspace, kind: str) -> None:
    name = describe(place, kind, "attributes", "size_buffer_mb = 5\npreallocate = true\nshrink = true")
    place.build(name)
    status = place.output(name).stat()
    assert status.st_blocks * 512 >= status.st_size
    judged(place.output(name), kind)
