"""Images read back: what was written is found again, and every damage is told."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import string
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.filesystems import ext4_read
from fledge_tasks.filesystems.comparison import Difference, compare
from fledge_tasks.filesystems.ext4_read import Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.fsutil import opened
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind
from fledge_tasks.tree import Inode
from fledge_tasks.verify import check_manifest, check_structure, compare_tree, label, read_all
from tests.layers import Member, folder, hardlink
from tests.layouts import Place
from tests.test_ext4_images import odd
from tests.tools import need
from tests.trees import EPOCH, EPOCH_NS, Built, Content, build, compared, tool, tree_of
from tests.workspaces import Workspace, sha256_of


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("e2fsck", "debugfs", "mke2fs")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Content, Built, Path]:
    content, place = odd(), tmp_path_factory.mktemp("odd")
    return content, build(place, content), place


def test_one_of_everything_is_found_again(image: tuple[Content, Built, Path]) -> None:
    content, built, place = image
    assert compared(built.image, tree_of(content), place) == []
    assert list(check_structure(built.image)) == []
    assert list(read_all(built.image)) == []


def test_what_is_found_does_not_come_from_the_writer(image: tuple[Content, Built, Path]) -> None:
    _, built, _ = image
    with ext4_read.opened(built.image) as found:
        names = found.names(ext4_read.ROOT)
        assert set(names) == {b"files", b"links", b"dev", b"x", b"tmp", b"names", b"lost+found"}
        files = found.names(names[b"files"][0])
        sparse = found.inode(files[b"sparse"][0])
        assert (sparse.size, len(sparse.extents), sparse.extents[7].logical) == (5 << 30, 2000, 21)
        assert files[b"link"][0] == files[b"4097"][0] and found.inode(files[b"link"][0]).links == 2
        assert found.inode(files[b"old"][0]).mtime_ns == -1_500_000_000 * 10**9 + 7
        device = found.inode(found.names(names[b"dev"][0])[b"large"][0])
        assert (device.kind, device.rdev, device.mode) == (Kind.BLOCK_DEVICE, (259, 70_000), 0o660)
        links = found.names(names[b"links"][0])
        assert [found.inode(links[b"%d" % size][0]).link for size in (59, 60, 4095)] == [
            b"t" * size for size in (59, 60, 4095)
        ]


CHANGES: dict[str, tuple[str, list[str]]] = {
    # debugfs command: path, what is said
    "sif /files/4096 mode 0100600": ("/files/4096", ["mode is 0600, and should be 0644"]),
    "sif /files/4096 uid 5": ("/files/4096", ["owner is 5:0, and should be 0:0"]),
    "sif /files/empty gid 7": ("/files/empty", ["owner is 100000:7, and should be 100000:4000000000"]),
    "sif /files/4096 mtime 19700101000007": ("/files/4096", ["mtime is 7.000000000, and should be 0.000000000"]),
    "sif /files/4097 size 4095": ("/files/4097", ["size is 4095, and should be 4097"]),
    "sif /dev/null block[0] 0x104": ("/dev/null", ["device number is 1:4, and should be 1:3"]),
    "ea_rm /x/capability security.capability": (
        "/x/capability",
        ["extended attribute security.capability is not there"],
    ),
    "ea_set /files/1 user.new v": ("/files/1", ["extended attribute user.new is 0x76, and should be not there"]),
    "rm /dev/fifo": ("/dev/fifo", ["is missing"]),
    "symlink /extra to": ("/extra", ["is in the image, and should not be there"]),
    "ln /files/4095 /more": ("/more", ["is in the image, and should not be there"]),
    "sif /files/1 mode 010644": ("/files/1", ["is a fifo, and should be a file"]),
}


@pytest.mark.parametrize("command", CHANGES)
def test_every_change_is_told(image: tuple[Content, Built, Path], tmp_path: Path, command: str) -> None:
    content, built, place = image
    path, said = CHANGES[command]
    changed = Path(shutil.copy(built.image, tmp_path / "image"))
    tool("debugfs", "-w", "-R", command, changed)
    found = compared(changed, tree_of(content), place)
    assert len(found) == 1, found
    assert all(found[0].startswith(f"{path}: {text}") for text in said), found


def test_every_byte_of_content_counts(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    content, built, place = image
    with ext4_read.opened(built.image) as found:
        files = found.names(found.names(ext4_read.ROOT)[b"files"][0])
        places = {
            name: [extent.physical for extent in found.inode(files[name][0]).extents]
            for name in (b"1", b"4097", b"sparse")
        }
    for name, block, offset in ((b"1", 0, 0), (b"4097", -1, 0), (b"4097", 0, 4095), (b"sparse", 1234, 2)):
        changed = Path(shutil.copy(built.image, tmp_path / "image"))
        at = places[name][block]
        with changed.open("r+b") as file:
            file.seek(at * 4096 + offset)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))
        [said] = compared(changed, tree_of(content), place)
        assert said.startswith(f"/files/{name.decode()}: content differs at byte ")
        assert int(said.rpartition(" ")[2]) % 4096 == offset


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: below(root, b"names").pop(b"n" * 255), "is in the image, and should not be there"),
        (lambda root: below(root, b"files").update({b"new": below(root, b"files")[b"1"]}), "/files/new: is missing"),
        (lambda root: setattr(below(root, b"files")[b"4095"].entry, "size", 4094), "size is 4095"),
        (lambda root: setattr(below(root, b"links")[b"60"].entry, "link", b"u" * 60), "target is "),
        (lambda root: setattr(below(root, b"x")[b"acl"].entry, "xattrs", {}), "extended attribute system.posix_acl"),
        (lambda root: below(root, b"files").update({b"link": own(root)}), "shares the inode of "),
        (lambda root: below(root, b"files").update({b"4095": below(root, b"files")[b"1"]}), "has an inode of its own"),
    ],
)
def test_every_other_expectation_is_told(
    image: tuple[Content, Built, Path], change: Callable[[Inode], object], said: str
) -> None:
    content, built, place = image
    root = tree_of(copy.deepcopy(content))
    change(root)
    found = compared(built.image, root, place)
    assert any(said in line for line in found), found


def below(root: Inode, name: bytes) -> dict[bytes, Inode]:
    assert root.children is not None
    children = root.children[name].children
    assert children is not None
    return children


def own(root: Inode) -> Inode:
    """Return what /files/link would be as a file of its own, of the same content."""
    twin = below(root, b"files")[b"link"]
    return Inode(msgspec.structs.replace(twin.entry), twin.source)


def test_damage_that_only_checksums_show(image: tuple[Content, Built, Path], tmp_path: Path) -> None:
    content, built, place = image
    with ext4_read.opened(built.image) as found:
        folder_block = found.inode(found.names(ext4_read.ROOT)[b"names"][0]).extents[0].physical
    changed = Path(shutil.copy(built.image, tmp_path / "image"))
    with changed.open("r+b") as file:
        file.seek(folder_block * 4096 + 2000)
        file.write(b"\1")
    assert any("/names: its names cannot be read: " in line for line in compared(changed, tree_of(content), place))
    assert any(difference.path == "/names" for difference in read_all(changed))
    assert any("irectory" in difference.message for difference in check_structure(changed))


def test_what_is_no_filesystem(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    for found in (list(read_all(file)), list(compare_tree(file, tree_of(Content()), {}, EPOCH))):
        [difference] = found
        assert "cannot be read as ext4" in difference.message
    assert list(check_structure(file)) != []


def test_a_folder_with_a_question_mark(tmp_path: Path) -> None:
    """For libext2fs and e2fsck, options such as an offset begin there."""
    place = Place(tmp_path / "what?offset=4096", tmp_path)
    place.add_layout("web", [Member("a", b"a" * 9000)])
    place.build()
    assert place.fledge("verify", "web").code == 0
    place.output("web").write_bytes(bytes(1 << 20))
    result = place.fledge("verify", "web")
    assert (result.code, "e2fsck: " in result.stdout) == (1, True)


def test_manifests(tmp_path: Path) -> None:
    image, manifest = tmp_path / "rootfs.img", tmp_path / "manifest.json"
    image.write_bytes(b"image")
    right = {"rootfs": {"url": "/x", "checksum": sha256_of(image), "format": "raw"}}
    manifest.write_text(json.dumps(right))
    assert list(check_manifest(image, manifest)) == []
    image.write_bytes(b"images")
    [difference] = check_manifest(image, manifest)
    assert difference.message.startswith(
        f"the checksum is {sha256_of(image)}, and should be {right['rootfs']['checksum']}"
    )
    for named in ({**right["rootfs"], "format": "ext4"}, {"checksum": right["rootfs"]["checksum"]}):
        manifest.write_text(json.dumps({"rootfs": named}))
        assert len(list(check_manifest(image, manifest))) == 1
    for text in ("", "[]", "{}", '{"rootfs": 1}', '{"rootfs": {"format": "raw"}}', "[" * 100_000):
        manifest.write_text(text)
        assert label(manifest, "any") is None
        [difference] = check_manifest(image, manifest)
        assert "is no manifest of an image" in difference.message
    manifest.unlink()
    assert len(list(check_manifest(image, manifest))) == 1


# --- random trees ---------------------------------------------------------------------------------

NAMES = st.one_of(
    st.text(string.ascii_lowercase, min_size=1, max_size=3).map(str.encode),
    st.binary(min_size=1, max_size=255).filter(lambda name: not {0, 0x2F} & set(name) and name not in {b".", b".."}),
)
TIMES = st.integers(-(1 << 31) * 10**9, (1 << 33) * 10**9)
IDS = st.one_of(st.just(0), st.integers(0, (1 << 32) - 1))
XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"user.long-name", b"security.x", b"trusted.y"]), st.binary(max_size=700), max_size=3
)
KINDS = st.sampled_from(
    [Kind.FILE] * 4 + [Kind.DIRECTORY] * 3 + [Kind.SYMLINK, Kind.FIFO, Kind.CHAR_DEVICE, Kind.HARDLINK]
)


@st.composite
def contents(draw: st.DrawFn) -> Content:
    """A layer of random entries, which `merge` takes as they are."""
    content = Content()
    folders, files = [b""], list[bytes]()
    used: set[bytes] = set()
    for _ in range(draw(st.integers(0, 25))):
        above = draw(st.sampled_from(folders))
        path = above + b"/" * bool(above) + draw(NAMES)
        kind = draw(KINDS)
        if path in used or len(path) > 4096 or path == b"lost+found" or (kind is Kind.HARDLINK and not files):
            continue
        used.add(path)
        fields = {
            "mode": draw(st.integers(0, 0o7777)), "uid": draw(IDS), "gid": draw(IDS),
            "mtime_ns": draw(TIMES), "xattrs": draw(XATTRS),
        }  # fmt: skip
        if kind is Kind.FILE:
            files.append(path)
            if draw(st.booleans()):
                content.file(path, draw(st.binary(max_size=9000)), **fields)
            else:
                blocks = sorted(draw(st.sets(st.integers(0, 60), max_size=12)))
                parts = [(block, bytes([block + 1]) * 4096) for block in blocks]
                end = (blocks[-1] + 1) * 4096 if blocks else 0
                content.sparse(path, end + draw(st.integers(0, 1 << 20)), parts, **fields)
        elif kind is Kind.HARDLINK:
            content.add(path, kind, link=draw(st.sampled_from(files)))
        elif kind is Kind.SYMLINK:
            content.add(path, kind, link=draw(st.binary(min_size=1, max_size=300)).replace(b"\0", b"0"), **fields)
        elif kind is Kind.CHAR_DEVICE:
            rdev = (draw(st.integers(0, 4095)), draw(st.integers(0, (1 << 20) - 1)))
            content.add(path, kind, rdev=rdev, **fields)
        else:
            if kind is Kind.DIRECTORY:
                folders.append(path)
            content.add(path, kind, **fields)
    return content


def settable(content: Content) -> Content:
    """Change a layer so that Linux could set all of it: user.* of files and folders alone, no owners of -1."""
    for entry in content.entries:
        if entry.kind not in {Kind.FILE, Kind.DIRECTORY}:
            entry.xattrs = {name: value for name, value in entry.xattrs.items() if not name.startswith(b"user.")}
        entry.uid, entry.gid = min(entry.uid, (1 << 32) - 2), min(entry.gid, (1 << 32) - 2)
    return content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_random_trees_are_found_again(tmp_path: Path, content: Content) -> None:
    built = build(tmp_path, content)
    assert [str(difference) for difference in check_structure(built.image)] == []
    assert compared(built.image, tree_of(content), tmp_path) == []


def test_a_folder_of_a_hash_tree_is_found_again(tmp_path: Path) -> None:
    content = Content()
    for number in range(5000):
        content.add(b"many/%05d" % number, Kind.FIFO)
    built = build(tmp_path, content)
    assert compared(built.image, tree_of(content), tmp_path) == []
    content.entries.pop(1234)
    assert compared(built.image, tree_of(content), tmp_path) == [
        "/many/01234: is in the image, and should not be there"
    ]


# --- the command ----------------------------------------------------------------------------------

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" * 5000, mode=0o755), hardlink("bin/twin", "bin/app")]


class Holey:
    """An image of one file, all hole but its first and its last block; `asked` are the blocks that were read."""

    root = 1

    def __init__(self, size: int, entry: Entry) -> None:
        last = size // BLOCK_BYTES - 1
        extents = tuple(Extent(block, block, 1, is_unwritten=False) for block in (0, last))
        self._inodes = {
            1: Found(1, Kind.DIRECTORY, 0o755, 0, 0, EPOCH_NS, 0, 2, b"", (0, 0), {}, ()),
            2: Found(2, Kind.FILE, entry.mode, 0, 0, entry.mtime_ns, size, 1, b"", (0, 0), {}, extents),
        }
        self.asked: list[tuple[int, int]] = []

    def inode(self, number: int) -> Found:
        return self._inodes[number]

    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]:
        return {b"file": (2, Kind.FILE)} if number == self.root else {}

    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes:
        assert found.number == 2 and extent.logical == start
        self.asked.append((start, count))
        return b"x" * (count * BLOCK_BYTES)


def test_holes_of_any_size_are_passed_over(tmp_path: Path) -> None:
    """Both xfs and btrfs hold a file of 8 EiB, and looking for data in all of it would take a year."""
    size, content = (1 << 63) - BLOCK_BYTES, Content()
    last = size // BLOCK_BYTES - 1
    data = b"x" * BLOCK_BYTES
    content.add(b"", Kind.DIRECTORY, mtime_ns=EPOCH_NS)
    entry = content.sparse(b"file", size, [(0, data), (last, data)])
    (tmp_path / "payload").write_bytes(content.payload)
    image = Holey(size, entry)
    with opened({0: tmp_path / "payload"}) as sources:
        assert list(compare(image, tree_of(content), sources, int)) == []
    assert image.asked == [(0, 1), (last, 1)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, mappings={"conf": "/srv/conf"})
    (place.root / "web" / "conf").write_text("one\n")
    place.build()
    return place


def test_a_build_is_as_it_should_be(place: Place) -> None:
    result = place.fledge("verify")
    assert (result.code, result.stderr) == (0, "")
    assert result.stdout == f"web: {place.output('web')} holds what it should\n"
    [image] = json.loads(place.fledge("verify", "web", "--json").stdout)["images"]
    assert image == {"name": "web", "image": str(place.output("web")), "compared": True, "differences": []}


def test_a_changed_image_is_told(place: Place) -> None:
    tool("debugfs", "-w", "-R", "sif /srv/conf mode 0100600", place.output("web"))
    result = place.fledge("verify", "web")
    assert result.code == 1
    assert "web: /srv/conf: mode is 0600, and should be 0644\n" in result.stdout
    assert "web: the checksum is sha256:" in result.stdout
    assert "is not what it should be: 2 differences" in result.stdout
    [image] = json.loads(place.fledge("verify", "--json").stdout)["images"]
    assert Difference("/srv/conf", "mode is 0600, and should be 0644") in [
        Difference(*each) for each in image["differences"]
    ]


def test_what_changed_since_the_build_is_told(place: Place) -> None:
    (place.root / "web" / "conf").write_text("two\n")
    result = place.fledge("verify")
    assert result.code == 1
    assert "web: what goes in has changed since the image was made: run `fledge build web`" in result.stdout


def test_what_may_not_be_mounted_here_is_not_called_wrong(tmp_path: Path) -> None:
    """Whoever is not root gets the checksum and the checker's word on a btrfs image, and is told what is missing."""
    need("mkfs.btrfs", "btrfs", "setpriv")
    prefix = ["setpriv", "--bounding-set=-sys_admin"] if os.geteuid() == 0 else []
    place = Workspace(tmp_path / "w", tmp_path, prefix=prefix)
    place.root.mkdir()
    file = place.root / "rootfs.img"
    with open(file, "wb") as image:
        image.truncate(128 << 20)
    tool("mkfs.btrfs", "-q", file)
    described = {"rootfs": {"checksum": sha256_of(file)}, "labels": {"volant.rootfs_fstype": "btrfs"}}
    (place.root / "manifest.json").write_text(json.dumps(described))
    result = place.fledge("verify", str(file))
    assert (result.code, result.stderr) == (1, "")
    assert result.stdout == (
        "rootfs.img: cannot be mounted here: a mount namespace of our own cannot be had: Operation not permitted:"
        f" xfs and btrfs are read by root alone\n"
        f"rootfs.img: {file} is what its manifest says, but its entries were not looked at\n"
    )
    [image] = json.loads(place.fledge("verify", str(file), "--json").stdout)["images"]
    assert (image["compared"], image["differences"]) == (False, [])
    assert "mount namespace" in image["unread"]
    described["rootfs"] = {"checksum": "sha256:0"}
    (place.root / "manifest.json").write_text(json.dumps(described))
    assert "is not what it should be: 1 difference\n" in place.fledge("verify", str(file)).stdout


def test_an_image_that_is_not_there(place: Place) -> None:
    place.output("web").unlink()
    result = place.fledge("verify")
    assert result.code == 1
    assert "there is no image: run `fledge build web`" in result.stdout
    (place.root / "fledge.lock").unlink()
    result = place.fledge("verify")
    assert result.code == 2
    assert "run `fledge build web`" in result.stderr
    assert place.fledge("verify", "wed").code == 2


def test_a_file_from_elsewhere(place: Place, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(place.output("web").parent, elsewhere)
    file = elsewhere / "rootfs.img"
    result = place.fledge("verify", str(file))
    assert (result.code, result.stdout) == (0, f"rootfs.img: {file} holds what it should\n")
    manifest = (elsewhere / "manifest.json").rename(tmp_path / "of-it.json")
    assert place.fledge("verify", str(file)).code == 2
    assert place.fledge("verify", str(file), "--manifest", str(manifest)).code == 0
    # Where nobody knows the image, the manifest and the structure are all there is.
    empty = Place(tmp_path / "empty", tmp_path)
    empty.root.mkdir()
    result = empty.fledge("verify", str(file), "--manifest", str(manifest))
    assert (result.code, result.stdout) == (0, f"rootfs.img: {file} is what its manifest says, and can be read\n")
    tool("debugfs", "-w", "-R", "sif /bin/app links_count 1", file)
    result = empty.fledge("verify", str(file), "--manifest", str(manifest))
    assert result.code == 1
    assert "e2fsck: " in result.stdout and "ref count is 1, should be 2" in result.stdout
    assert place.fledge("verify", "web", "--manifest", str(manifest)).code == 2
    assert place.fledge("verify", str(tmp_path / "nothing")).code == 2


def test_layers_that_are_not_in_the_cache(place: Place) -> None:
    shutil.rmtree(place.root / "cache" / "objects")
    result = place.fledge("verify")
    assert result.code == 1
    assert "not in the cache any more" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(("kind", "size", "offset"), [("xfs", 300 << 20, 512 + 52), ("btrfs", 110 << 20, 0)])
def test_what_checkers_only_report_is_no_difference(tmp_path: Path, kind: str, size: int, offset: int) -> None:
    need("mkfs.xfs", "xfs_repair", "mkfs.btrfs", "btrfs")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(size)
    tool(*{"xfs": ("mkfs.xfs", "-q"), "btrfs": ("mkfs.btrfs", "-q", "-m", "single")}[kind], str(image))
    assert list(check_structure(image, kind)) == []
    if kind == "btrfs":  # the leaf of the extent tree, in the first chunks, which are where they say
        told = tool("btrfs", "inspect-internal", "dump-tree", "-t", "extent", str(image))
        offset = int(re.findall(r"^leaf (\d+) ", told, re.MULTILINE)[0]) + 300
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(b"damage")
    found = [str(difference) for difference in check_structure(image, kind)]
    words = {"xfs": "agf has bad CRC for ag 0", "btrfs": "checksum verify failed"}
    assert any(words[kind] in line for line in found), found
    chatter = ("Phase", ": - ", "No modify", "host filesystem", "[1/7]", "Opening", "UUID", "bytes used", "referenced")
    assert [line for line in found for word in chatter if word in line] == []
