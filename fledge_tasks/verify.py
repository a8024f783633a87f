"""Does a finished image hold what it should? Read back, and compared entry by entry.

The image is read as others read it: ext4 by e2fsck and through libext2fs; xfs and btrfs, as root, by
their own checkers and by Linux; of a qcow2 what qemu-img makes of it. What it should hold is the
merged tree of its layers, whose file data is in the payloads. What is wrong with an image is a
value here, never an error.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Generic, NamedTuple, Protocol, TypeVar

from fledge_tasks import hash_tree, qcow2
from fledge_tasks.digest import sha256_file
from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems import ext4, ext4_inode, ext4_read, mounted_read
from fledge_tasks.filesystems.ext4_read import Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.fsutil import opened
from fledge_tasks.manifest import RAW_CHECKSUM, ROOT_HASH
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind, Run, file_runs
from fledge_tasks.run import run
from fledge_tasks.tree import Inode

_CHUNK_BLOCKS = 256
_CHATTER = re.compile(
    r"^Pass \d|^e2fsck \d|Filesystem still has errors|\d+/\d+ files|^The superblock could not be read|^filesystem[. ]|"
    r"^is corrupt, and|^ *or$|e2fsck -b \d"
)
_CHECKERS = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f"), "btrfs": ("btrfs", "check", "--readonly")}
_ZERO = bytes(_CHUNK_BLOCKS * BLOCK_BYTES)


class FoundImage(Protocol):
    """An image that is open for reading: see `ext4_read.Ext4Image`."""

    root: int

    def inode(self, number: int) -> Found: ...
    def names(self, number: int) -> dict[bytes, tuple[int, Kind]]: ...
    def blocks(self, found: Found, extent: Extent, start: int, count: int) -> bytes: ...


class Difference(NamedTuple):
    """One thing that is wrong. `path` is absolute inside the image, '' for the image as a whole."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


def check_disk(image: Path) -> Iterator[Difference]:
    """Yield what is wrong with the format of an image file. Raises OSError, ToolError."""
    if qcow2.is_qcow2(image):
        for problem in qcow2.problems(image):
            yield Difference("", problem)


@contextmanager
def raw_of(image: Path) -> Iterator[Path]:
    """Yield an image file in which `check_disk` finds nothing in its raw form: itself, or a temporary file.

    That is made in TMPDIR, else in /var/tmp. Raises OSError, CommandError.
    """
    if not qcow2.is_qcow2(image):
        yield image
        return
    place = os.environ.get("TMPDIR") or "/var/tmp"
    with TemporaryDirectory(prefix="fledge-verify-", dir=place) as folder:
        raw = Path(folder) / "raw"
        qcow2.expand(image, raw)
        yield raw


def check_manifest(image: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what a manifest says otherwise of an image file. Raises OSError when the image cannot be read."""
    try:
        checksum = json.loads(manifest.read_bytes())["rootfs"]["checksum"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        yield Difference("", f"{manifest} is no manifest of an image: {type(error).__name__}: {error}")
        return
    if checksum != (found := sha256_file(image)):
        yield Difference("", f"the checksum is {found}, and should be {checksum}, says {manifest}")


def check_raw(raw: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what a manifest says otherwise of the raw image that a disk of another format holds. Raises OSError."""
    checksum = label(manifest, RAW_CHECKSUM)
    if checksum is not None and checksum != (found := sha256_file(raw)):
        yield Difference("", f"the raw image's checksum is {found}, and should be {checksum}, says {manifest}")


def check_tree(raw: Path, tree: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what does not fit between a raw image, its hash tree and the root hash in a manifest, if that has one.

    Raises OSError, ToolError.
    """
    root_hash = label(manifest, ROOT_HASH)
    if root_hash is None:
        return
    if not tree.is_file():
        yield Difference("", f"there is no hash tree {tree}, and {manifest} has its root hash")
        return
    for problem in hash_tree.problems(raw, tree, root_hash):
        yield Difference("", f"{tree.name}: {problem}")


def label(manifest: Path, name: str) -> str | None:
    """Return a label of a manifest, None if there is no such manifest or label."""
    try:
        value = json.loads(manifest.read_bytes())["labels"][name]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return value if isinstance(value, str) else None


def check_structure(image: Path, kind: str = "ext4") -> Iterator[Difference]:
    """Yield what the checker of a type of filesystem finds wrong. Raises ToolError when it is not installed."""
    checker = _CHECKERS[kind]
    try:
        run([*checker, image])
    except CommandError as error:
        lines = (error.output.decode(errors="replace") + error.stderr).splitlines()
        found = [line.strip() for line in lines if line.strip() and not _CHATTER.search(line)]
        for line in found or [error.message]:
            yield Difference("", f"{checker[0]}: {line}")


def compare_tree(
    image: Path, root: Inode, payloads: Mapping[int, Path], epoch: int, kind: str = "ext4"
) -> Iterator[Difference]:
    """Yield each difference between an image and the tree that it was made from.

    `payloads` are the files that the tree's sources stand for, `epoch` what the image was made with.
    Compared: names, types, modes, owners, times of change, sizes, content, targets, device numbers,
    extended attributes, and which names share an inode. Raises OSError.
    """
    if kind == "ext4":
        ext4.add_lost_found(root, epoch)
    with ExitStack() as stack:
        try:
            found = stack.enter_context(_opened(image, kind))
        except FilesystemError as error:
            yield Difference("", str(error))
            return
        yield from _Comparison(found, stack.enter_context(opened(payloads))).walk(root)


def _opened(image: Path, kind: str) -> AbstractContextManager[FoundImage]:
    return ext4_read.opened(image) if kind == "ext4" else mounted_read.opened(image, kind)


def read_all(image: Path, kind: str = "ext4") -> Iterator[Difference]:
    """Yield what cannot be read of an image of which no more is known. Raises OSError."""
    try:
        with _opened(image, kind) as found:
            yield from _read_all(found)
    except FilesystemError as error:
        yield Difference("", str(error))


def _read_all(image: FoundImage) -> Iterator[Difference]:
    seen = {image.root}
    pending = [(b"", image.root)]
    while pending:
        path, number = pending.pop()
        try:
            names = image.names(number)
        except FilesystemError as error:
            yield Difference(_show(path), f"its names cannot be read: {error}")
            continue
        for name, (below, kind) in sorted(names.items()):
            if below in seen:
                continue
            seen.add(below)
            try:
                image.inode(below)
            except FilesystemError as error:
                yield Difference(_show(path + b"/" + name), f"cannot be read: {error}")
            if kind is Kind.DIRECTORY:
                pending.append((path + b"/" + name, below))


class _Comparison:
    """Walks the tree and the image side by side. `sources` are the descriptors of payloads."""

    def __init__(self, image: FoundImage, sources: Mapping[int, int]) -> None:
        self._image = image
        self._sources = sources
        # The first name of each inode in the order of the walk: in the tree, and by number in the image.
        self._expected_first: dict[int, bytes] = {}
        self._found_first: dict[int, bytes] = {}

    def walk(self, root: Inode) -> Iterator[Difference]:
        yield from self._look(b"", root, self._image.root, Kind.DIRECTORY)
        pending: list[tuple[bytes, Inode, int]] = [(b"", root, self._image.root)]
        while pending:
            path, folder, number = pending.pop()
            assert folder.children is not None
            try:
                names = self._image.names(number)
            except FilesystemError as error:
                yield Difference(_show(path), f"its names cannot be read: {error}")
                continue
            for name in sorted(folder.children.keys() | names.keys()):
                below, child, there = path + b"/" + name, folder.children.get(name), names.get(name)
                if child is None:
                    yield Difference(_show(below), "is in the image, and should not be there")
                elif there is None:
                    yield Difference(_show(below), "is missing")
                else:
                    yield from self._look(below, child, *there)
                    if child.children is not None and there[1] is Kind.DIRECTORY:
                        pending.append((below, child, there[0]))

    def _look(self, path: bytes, inode: Inode, number: int, named_kind: Kind) -> Iterator[Difference]:
        """Yield what differs about one name; an inode is looked at under its first one."""
        expected_first = self._expected_first.setdefault(id(inode), path)
        found_first = self._found_first.setdefault(number, path)
        if expected_first != found_first:
            yield Difference(_show(path), _link_difference(path, found_first, expected_first))
        elif expected_first != path:
            return
        try:
            found = self._image.inode(number)
        except FilesystemError as error:
            yield Difference(_show(path), f"cannot be read: {error}")
            return
        entry = inode.entry
        for kind in dict.fromkeys((found.kind, named_kind)):
            if kind is not entry.kind:
                yield Difference(_show(path), f"is a {_word(kind)}, and should be a {_word(entry.kind)}")
        if found.kind is not entry.kind:
            return
        for what, there, expected in _facts(entry, found):
            if there != expected:
                yield Difference(_show(path), f"{what} is {there}, and should be {expected}")
        if entry.kind is Kind.FILE and found.size == entry.size:
            at = self._first_difference(file_runs(entry), self._sources[inode.source], found)
            if at is not None:
                yield Difference(_show(path), f"content differs at byte {at}")

    def _first_difference(self, runs: Sequence[Run], source: int, file: Found) -> int | None:
        """Return where a file's data begins to differ: in what runs or extents cover, all else is zeros in both."""
        edges = {edge for run in runs for edge in (run.logical, run.logical + run.count)}
        edges |= {edge for extent in file.extents for edge in (extent.logical, extent.logical + extent.count)}
        expected, found = _Cover(runs), _Cover(file.extents)
        for start, end in itertools.pairwise(sorted(edges)):
            run, extent = expected.at(start), found.at(start)
            for block in range(start, end, _CHUNK_BLOCKS):
                count = min(_CHUNK_BLOCKS, end - block)
                ours = theirs = _ZERO[: count * BLOCK_BYTES]
                if run is not None:
                    offset = (run.payload + block - run.logical) * BLOCK_BYTES
                    ours = os.pread(source, count * BLOCK_BYTES, offset)
                if extent is not None and not extent.is_unwritten:
                    theirs = self._image.blocks(file, extent, block, count)
                if ours != theirs:
                    # Either may be cut short, by the end of its file.
                    pairs = enumerate(itertools.zip_longest(ours, theirs))
                    return block * BLOCK_BYTES + next(at for at, (one, other) in pairs if one != other)
        return None


class _Span(Protocol):
    @property
    def logical(self) -> int: ...
    @property
    def count(self) -> int: ...


_S = TypeVar("_S", bound=_Span)


class _Cover(Generic[_S]):
    """Which of some spans, sorted and apart from each other, covers a block; asked for ascending blocks."""

    def __init__(self, spans: Sequence[_S]) -> None:
        self._spans = spans
        self._next = 0

    def at(self, block: int) -> _S | None:
        spans = self._spans
        while self._next < len(spans) and spans[self._next].logical + spans[self._next].count <= block:
            self._next += 1
        if self._next < len(spans) and spans[self._next].logical <= block:
            return spans[self._next]
        return None


def _facts(entry: Entry, found: Found) -> Iterator[tuple[str, str, str]]:
    """Yield (what, as it is, as it should be), as texts."""
    is_link = entry.kind is Kind.SYMLINK
    yield "mode", f"{found.mode:04o}", f"{0o777 if is_link else entry.mode:04o}"
    yield "owner", f"{found.uid}:{found.gid}", f"{entry.uid}:{entry.gid}"
    yield "mtime", _seconds(found.mtime_ns), _seconds(ext4_inode.clamped(entry.mtime_ns))
    if entry.kind is Kind.FILE:
        yield "size", str(found.size), str(entry.size)
    elif is_link:
        yield "target", _show(found.link), _show(entry.link)
    elif entry.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
        yield "device number", "{}:{}".format(*found.rdev), "{}:{}".format(*entry.rdev)
    for name in sorted(found.xattrs.keys() | entry.xattrs.keys()):
        values = (xattrs.get(name) for xattrs in (found.xattrs, entry.xattrs))
        is_there, expected = ("not there" if value is None else f"0x{value.hex()}" for value in values)
        yield f"extended attribute {_show(name)}", is_there, expected


def _link_difference(path: bytes, found_first: bytes, expected_first: bytes) -> str:
    if found_first == path:
        return f"has an inode of its own, and should share that of {_show(expected_first)}"
    should = "not" if expected_first == path else f"share that of {_show(expected_first)}"
    return f"shares the inode of {_show(found_first)}, and should {should}"


def _seconds(nanoseconds: int) -> str:
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{seconds}.{fraction:09d}"


def _word(kind: Kind) -> str:
    return kind.name.lower().replace("_", " ")


def _show(path: bytes) -> str:
    return path.decode(errors="backslashreplace") or "/"
