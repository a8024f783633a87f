"""A filesystem that was read back, compared with the tree that it was made from, entry by entry."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.ext4_read import Found
from fledge_tasks.filesystems.libext2fs import Extent
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind, Run, file_runs
from fledge_tasks.tree import Inode

_CHUNK_BLOCKS = 256
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


def compare(
    image: FoundImage, root: Inode, sources: Mapping[int, int] | None, time_ns: Callable[[int], int]
) -> Iterator[Difference]:
    """Yield each difference between an image and a tree.

    Compared: names, types, modes, owners, times of change, sizes, targets, device numbers, extended attributes,
    which names share an inode, and content, unless `sources`, the descriptors of payloads, is None. `time_ns`
    turns nanoseconds of an entry into those that the type can hold. Raises OSError.
    """
    return _Comparison(image, sources, time_ns).walk(root)


def require(image: FoundImage, root: Inode, time_ns: Callable[[int], int], program: str) -> None:
    """Raise FilesystemError when what a program made of a tree is not that tree; contents are not looked at.

    Such programs have dropped or changed what they did not understand, and said nothing.
    """
    for difference in compare(image, root, None, time_ns):
        raise FilesystemError(
            f"{program} made something else of it: {difference.message}",
            where=difference.path,
            hint="choose another type of filesystem, and please report this",
        )


class _Comparison:
    """Walks the tree and the image side by side."""

    def __init__(self, image: FoundImage, sources: Mapping[int, int] | None, time_ns: Callable[[int], int]) -> None:
        self._image = image
        self._sources = sources
        self._time_ns = time_ns
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
                yield Difference(shown(path), f"its names cannot be read: {error}")
                continue
            for name in sorted(folder.children.keys() | names.keys()):
                below, child, there = path + b"/" + name, folder.children.get(name), names.get(name)
                if child is None:
                    yield Difference(shown(below), "is in the image, and should not be there")
                elif there is None:
                    yield Difference(shown(below), "is missing")
                else:
                    yield from self._look(below, child, *there)
                    if child.children is not None and there[1] is Kind.DIRECTORY:
                        pending.append((below, child, there[0]))

    def _look(self, path: bytes, inode: Inode, number: int, named_kind: Kind) -> Iterator[Difference]:
        """Yield what differs about one name; an inode is looked at under its first one."""
        expected_first = self._expected_first.setdefault(id(inode), path)
        found_first = self._found_first.setdefault(number, path)
        if expected_first != found_first:
            yield Difference(shown(path), _link_difference(path, found_first, expected_first))
        elif expected_first != path:
            return
        try:
            found = self._image.inode(number)
        except FilesystemError as error:
            yield Difference(shown(path), f"cannot be read: {error}")
            return
        entry = inode.entry
        for kind in dict.fromkeys((found.kind, named_kind)):
            if kind is not entry.kind:
                yield Difference(shown(path), f"is a {_word(kind)}, and should be a {_word(entry.kind)}")
        if found.kind is not entry.kind:
            return
        for what, there, expected in _facts(entry, found, self._time_ns(entry.mtime_ns)):
            if there != expected:
                yield Difference(shown(path), f"{what} is {there}, and should be {expected}")
        if self._sources is not None and entry.kind is Kind.FILE and found.size == entry.size:
            try:
                at = self._first_difference(file_runs(entry), self._sources[inode.source], found)
            except FilesystemError as error:
                yield Difference(shown(path), f"content cannot be read: {error}")
                return
            if at is not None:
                yield Difference(shown(path), f"content differs at byte {at}")

    def _first_difference(self, runs: Sequence[Run], source: int, file: Found) -> int | None:
        """Return where a file's data begins to differ: in what runs or extents cover, all else is zeros in both."""
        edges = {edge for run in runs for edge in (run.logical, run.logical + run.count)}
        edges |= {edge for extent in file.extents for edge in (extent.logical, extent.logical + extent.count)}
        expected, found = _Cover(runs), _Cover(file.extents)
        for start, end in itertools.pairwise(sorted(edges)):
            run, extent = expected.at(start), found.at(start)
            if run is None and (extent is None or extent.is_unwritten):
                continue  # a hole may be of any size
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


def _facts(entry: Entry, found: Found, mtime_ns: int) -> Iterator[tuple[str, str, str]]:
    """Yield (what, as it is, as it should be), as texts."""
    is_link = entry.kind is Kind.SYMLINK
    yield "mode", f"{found.mode:04o}", f"{0o777 if is_link else entry.mode:04o}"
    yield "owner", f"{found.uid}:{found.gid}", f"{entry.uid}:{entry.gid}"
    yield "mtime", _seconds(found.mtime_ns), _seconds(mtime_ns)
    if entry.kind is Kind.FILE:
        yield "size", str(found.size), str(entry.size)
    elif is_link:
        yield "target", shown(found.link), shown(entry.link)
    elif entry.kind in {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}:
        yield "device number", "{}:{}".format(*found.rdev), "{}:{}".format(*entry.rdev)
    for name in sorted(found.xattrs.keys() | entry.xattrs.keys()):
        values = (xattrs.get(name) for xattrs in (found.xattrs, entry.xattrs))
        is_there, expected = ("not there" if value is None else f"0x{value.hex()}" for value in values)
        yield f"extended attribute {shown(name)}", is_there, expected


def _link_difference(path: bytes, found_first: bytes, expected_first: bytes) -> str:
    if found_first == path:
        return f"has an inode of its own, and should share that of {shown(expected_first)}"
    should = "not" if expected_first == path else f"share that of {shown(expected_first)}"
    return f"shares the inode of {shown(found_first)}, and should {should}"


def _seconds(nanoseconds: int) -> str:
    seconds, fraction = divmod(nanoseconds, 1_000_000_000)
    return f"{seconds}.{fraction:09d}"


def _word(kind: Kind) -> str:
    return kind.name.lower().replace("_", " ")


def shown(path: bytes) -> str:
    """Return a path of an image for messages; the root's is empty."""
    return path.decode(errors="backslashreplace") or "/"
