"""Files of the host that are mapped into an image: found, described, and copied.

`expand` turns mappings into `MappedFile` records, which hold all that decides about the result and
nothing else (no host path, no time), so that they can be key material. `entries` turns these into
a layer that comes on top of the image's own. Names are bytes on both sides; in records they are
UTF-8 with surrogate escapes, whatever the locale.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from fledge_tasks.digest import CHUNK_BYTES
from fledge_tasks.errors import MappingError, Problem
from fledge_tasks.oci.layer_index import Entry, Kind

if TYPE_CHECKING:
    from fledge_tasks.oci.payload import PayloadWriter  # its libraries are not needed to plan

KindName = Literal["file", "directory", "symlink"]

NAME_BYTES = 255  # ext4, xfs and btrfs alike

_PROGRAM_FOLDERS = (
    "/bin/", "/sbin/", "/usr/bin/", "/usr/sbin/", "/usr/local/bin/", "/usr/local/sbin/", "/opt/bin/", "/opt/sbin/",
)  # fmt: skip
_LIBRARY_FOLDERS = ("/lib/", "/lib64/", "/usr/lib/", "/usr/lib64/", "/usr/local/lib/", "/usr/local/lib64/")
_KINDS = {"file": Kind.FILE, "directory": Kind.DIRECTORY, "symlink": Kind.SYMLINK}
_KIND_NAMES: dict[int, KindName] = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


class MappedFile(msgspec.Struct, frozen=True):
    """One file, folder or symbolic link that the mappings bring.

    destination  absolute and clean: one '/' between names, none at the end
    mode         permission bits, see `mode_for`
    digest       sha256 of a file's content, '' otherwise
    size         bytes of a file, 0 otherwise
    link         target of a symbolic link, as it stands, '' otherwise
    """

    destination: str
    kind: KindName
    mode: int
    digest: str = ""
    size: int = 0
    link: str = ""


def mode_for(destination: str, host_mode: int) -> int:
    """Return the permission bits in the image of what has `host_mode` (st_mode) on the host.

    Folders get 0755, symbolic links 0777. A file that anyone may execute keeps its read and write
    bits and may be executed by all who may read it. Any other gets 0755 below a folder of programs,
    or below a folder of libraries if its name says that it is a shared one, and 0644 elsewhere.
    What counts is `destination` as written, not where links in the image lead. Setuid, setgid and
    sticky bits are never kept.
    """
    if stat.S_ISDIR(host_mode):
        return 0o755
    if stat.S_ISLNK(host_mode):
        return 0o777
    if host_mode & 0o111:
        return host_mode & 0o666 | (host_mode & 0o444) >> 2
    if destination.startswith(_PROGRAM_FOLDERS):
        return 0o755
    name = destination.rpartition("/")[2]
    if destination.startswith(_LIBRARY_FOLDERS) and (name.endswith(".so") or ".so." in name):
        return 0o755
    return 0o644


def expand(
    mappings: Sequence[tuple[str, str]], folder: Path, digest_of: Callable[[Path], str]
) -> tuple[list[MappedFile], dict[str, Path]]:
    """Return what (source, destination) pairs bring, sorted by destination, and each file's host path.

    A source is relative to `folder`, that of fledge.toml. A symbolic link is followed if it is the
    source itself and kept as it is inside a mapped folder. A file whose destination ends in '/'
    goes into that folder under its own name; of a folder, the content goes to the destination,
    with or without '/'. Where several mappings bring the same name, one of a file wins over one of
    a folder, and among folders the one with the longer destination. The order of the pairs has no
    influence. `digest_of` may raise OSError.

    Raises MappingError with everything that is wrong: sources that are missing, unreadable or
    neither file nor folder, bad destinations, and names that two mappings claim with equal right or
    that are a folder in one and not in the other.
    """
    expansion = _Expansion(folder)
    for source, destination in sorted(set(mappings)):
        expansion.look(source, destination)
    mapped: list[MappedFile] = []
    sources: dict[str, Path] = {}
    for item in expansion.winners():
        file = item.file
        if file.kind == "file":
            path = sources[file.destination] = Path(os.fsdecode(item.host))
            try:
                file = msgspec.structs.replace(file, digest=digest_of(path))
            except OSError as error:
                expansion.cannot_read(item.source, item.host, error)
        mapped.append(file)
    expansion.finish()
    return mapped, sources


def entries(
    mapped: Sequence[MappedFile], sources: Mapping[str, Path], writer: PayloadWriter, epoch_ns: int
) -> list[Entry]:
    """Return the layer entries of `mapped`, in its order, after appending all file data to `writer`.

    Owner is root, times are `epoch_ns`; folders that the image has already stay as they are. Raises
    MappingError when a file is no longer what its digest says, OSError when it cannot be read to
    its end or `writer` cannot write. In both cases what `writer` holds is of no use.
    """
    return [
        Entry(
            _bytes(file.destination[1:]),
            _KINDS[file.kind],
            file.mode,
            mtime_ns=epoch_ns,
            size=file.size,
            block=_copy(file, sources[file.destination], writer) if file.kind == "file" else 0,
            link=_bytes(file.link),
            keep=file.kind == "directory",
        )
        for file in mapped
    ]


def _copy(file: MappedFile, path: Path, writer: PayloadWriter) -> int:
    """Append the content of `path` and return its first block; the digest is that of what was appended."""
    block = writer.block if file.size else 0
    digest = hashlib.sha256()
    left = file.size
    with _open(path) as source:
        while left >= 0 and (data := source.read(CHUNK_BYTES)):
            digest.update(data)
            writer.write(memoryview(data))
            left -= len(data)
    writer.pad()
    if left or f"sha256:{digest.hexdigest()}" != file.digest:
        raise _changed(path, "changed while it was being built")
    return block


def _open(path: Path) -> FileIO:
    try:
        # O_NONBLOCK: a FIFO that took the file's place must not make us wait for its writer.
        return open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    except OSError as error:
        raise _changed(path, f"cannot be read any more ({error.strerror})") from None


def _changed(path: Path, what: str) -> MappingError:
    return MappingError(f"{what}; run again", where=_show(os.fsencode(path)))


class _Item(NamedTuple):
    """A candidate for a destination, without its digest. The greatest `rank` wins."""

    file: MappedFile
    host: bytes
    source: str
    rank: tuple[bool, int]


class _Expansion:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._problems: list[Problem] = []
        self._items: dict[str, list[_Item]] = {}

    def look(self, source: str, destination: str) -> None:
        """Add all that one mapping brings."""
        try:
            target = _clean(destination)
        except ValueError as error:
            self._problem(source, str(error))
            return
        path = self._folder / source
        try:
            host = os.fsencode(path)
            status = os.stat(host)
        except (OSError, ValueError) as error:
            hint = "'~' is not expanded here" if source.startswith("~") else None
            self.cannot_read(source, os.fsencode(str(path).replace("\0", "\\0")), error, hint)
            return
        if stat.S_ISDIR(status.st_mode):
            self._look_below(source, host, target, status)
        else:
            if destination.endswith(("/", "/.")):
                target += "/" + _text(os.path.basename(host))
            self._add(source, host, target, status, (True, len(target)))

    def _look_below(self, source: str, top: bytes, target: str, status: os.stat_result) -> None:
        rank = (False, len(target))
        if target:
            self._add(source, top, target, status, rank)
        pending = [(top, target)]
        while pending:
            folder, below = pending.pop()
            try:
                with os.scandir(folder) as children:
                    for child in children:
                        destination = f"{below}/{_text(child.name)}"
                        self._add(source, child.path, destination, child.stat(follow_symlinks=False), rank)
                        if child.is_dir(follow_symlinks=False):
                            pending.append((child.path, destination))
            except OSError as error:
                self.cannot_read(source, folder, error)

    def _add(self, source: str, host: bytes, destination: str, status: os.stat_result, rank: tuple[bool, int]) -> None:
        kind = _KIND_NAMES.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            self._problem(source, f"{_show(host)} is a device, FIFO or socket, which cannot be mapped")
            return
        size = status.st_size if kind == "file" else 0
        link = _text(os.readlink(host)) if kind == "symlink" else ""
        file = MappedFile(destination, kind, mode_for(destination, status.st_mode), "", size, link)
        self._items.setdefault(destination, []).append(_Item(file, host, source, rank))

    def winners(self) -> Iterator[_Item]:
        """Yield the one item that each destination gets, sorted, and note what is contradictory."""
        chosen: dict[str, _Item] = {}
        reported: set[tuple[str, str]] = set()  # so that a file over a full folder is one problem
        for destination in sorted(self._items, key=_bytes):
            items = sorted(self._items[destination], key=lambda item: item.rank)
            best = chosen[destination] = items[-1]
            for other in items[:-1]:
                if (other.file.kind == "directory") != (best.file.kind == "directory"):
                    self._clash(best, other, "it is a folder in one and not in the other")
                    reported |= {(best.source, destination), (other.source, destination)}
                elif best.file.kind != "directory" and other.rank == best.rank:
                    self._clash(best, other, "neither destination is more specific")
            above = destination.rpartition("/")[0]
            while above and above not in chosen:
                above = above.rpartition("/")[0]
            if above and chosen[above].file.kind == "file" and (best.source, above) not in reported:
                self._clash(best, chosen[above], f"{_show(_bytes(above))} is a file in the latter")
                reported.add((best.source, above))
            yield best

    def finish(self) -> None:
        """Raise MappingError if there was any problem."""
        if self._problems:
            raise MappingError("\n".join(str(problem) for problem in sorted(self._problems, key=str)))

    def cannot_read(self, source: str, host: bytes, error: Exception, hint: str | None = None) -> None:
        """Note that `host`, which `source` brings, cannot be read."""
        if isinstance(error, FileNotFoundError):
            self._problem(source, f"{_show(host)} does not exist", hint)
        else:
            reason = error.strerror if isinstance(error, OSError) else error
            self._problem(source, f"{_show(host)} cannot be read: {reason}", hint)

    def _clash(self, one: _Item, other: _Item, why: str) -> None:
        place = _show(_bytes(one.file.destination))
        self._problem(one.source, f"this and {_key(other.source)} clash at {place}: {why}")

    def _problem(self, source: str, message: str, hint: str | None = None) -> None:
        self._problems.append(Problem(_show(os.fsencode(self._folder / "fledge.toml")), _key(source), message, hint))


def _clean(destination: str) -> str:
    """Return `destination` with one '/' before each name, '' for the root. Raises ValueError."""
    if not destination.startswith("/"):
        raise ValueError(f"the destination {destination!r} is not an absolute path")
    names = [name for name in destination.split("/") if name not in {"", "."}]
    for name in names:
        if name == ".." or "\0" in name:
            raise ValueError(f"the destination {destination!r} holds '..' or a NUL character")
        if len(_bytes(name)) > NAME_BYTES:
            raise ValueError(f"the destination {destination!r} holds a name of more than {NAME_BYTES} bytes")
    return "".join("/" + name for name in names)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _show(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _key(source: str) -> str:
    return f"mappings.{json.dumps(source, ensure_ascii=False)}"
