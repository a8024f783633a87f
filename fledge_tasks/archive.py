"""Entries of the store in one file, to carry them to another cache.

    archive = zstd frame around a POSIX tar archive (pax) of
              "fledge-cache.json"                      {"format": 1}
              (for each entry, the most useful first)
              "objects/<2 digits>/<key>/entry.json"    its record, as it lies in the store
              "objects/<2 digits>/<key>/<file>"        its files, by name; with holes as GNU sparse 1.0
    owner 0, mode 0644, time 0: the same entries make the same archive

Version history: 1 first version.

The checksums in records find damage, not forgery: an archive must come from somebody who may write
to the cache.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from fledge_tasks import fsutil
from fledge_tasks.digest import CHUNK_BYTES, Digest
from fledge_tasks.errors import ArchiveError, LayerError
from fledge_tasks.oci.decompress import open_stream
from fledge_tasks.oci.layer_index import Kind
from fledge_tasks.oci.tar import Archive, Member, shown
from fledge_tasks.store import RECORD, Entry, Record, Store, parse_record

FORMAT = 1
_HEAD = "fledge-cache.json"
_HEAD_TEXT = b'{"format": 1}\n'
_NAME = re.compile(rb"objects/([0-9a-f]{2})/(\1[0-9a-f]{62})/([a-z][a-z.]{0,31})")
_RECORD_LIMIT_BYTES = 256 << 20
_BLOCK_BYTES = 512
_FIRST = ("config", "agent")


@dataclass(frozen=True)
class Choice:
    """Which entries an archive holds, in order, and which were left out for want of room."""

    chosen: list[Entry]
    left_out: list[Entry]


def choose(entries: Iterable[tuple[Entry, int]], max_bytes: int | None) -> Choice:
    """Choose from entries, each with the number of images that need it, what is worth its room.

    Without configs and agents nothing can be built offline, and they are small, so they come first;
    then what saves the most seconds per byte. `max_bytes` is that of the entries, uncompressed.
    """

    def order(item: tuple[Entry, int]) -> tuple[bool, float, str]:
        entry, images = item
        return entry.stage not in _FIRST, -entry.cost_seconds * images / max(entry.size, 1), entry.key

    choice = Choice([], [])
    total = 0
    for entry, _ in sorted(entries, key=order):
        fits = max_bytes is None or total + entry.size <= max_bytes
        (choice.chosen if fits else choice.left_out).append(entry)
        total += entry.size * fits
    return choice


def write(entries: Sequence[Entry], file: BinaryIO, advance: Callable[[int], None]) -> None:
    """Write an archive of entries to `file`, front to back. `advance` is told the bytes of entries. Raises OSError."""
    compressor = zstandard.ZstdCompressor(level=3, threads=len(os.sched_getaffinity(0)), write_checksum=True)
    with (
        compressor.stream_writer(file, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        tar.addfile(_member(_HEAD, len(_HEAD_TEXT)), io.BytesIO(_HEAD_TEXT))
        for entry in entries:
            names = sorted(os.listdir(entry.folder), key=lambda name: (name != RECORD, name))
            for name in names:
                _add(tar, entry.folder / name, f"objects/{entry.folder.parent.name}/{entry.folder.name}/{name}")
            advance(entry.size)


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        ranges = list(fsutil.data_ranges(file.fileno(), size))
        if sum(length for _, length in ranges) == size:
            file.seek(0)
            tar.addfile(_member(name, size), file)
            return
        # GNU tar manual, 'PAX Format, Version 1.0' of sparse files: the map, filled up to a block, then the data.
        numbers = [len(ranges) + 1, *itertools.chain.from_iterable(ranges), size, 0]
        text = "".join(f"{number}\n" for number in numbers).encode()
        text += bytes(-len(text) % _BLOCK_BYTES)
        member = _member(name, len(text) + sum(length for _, length in ranges))
        member.pax_headers = {
            "GNU.sparse.major": "1", "GNU.sparse.minor": "0",
            "GNU.sparse.name": name, "GNU.sparse.realsize": str(size),
        }  # fmt: skip
        tar.addfile(member, _Pieces(_sparse_pieces(text, file, ranges)))  # type: ignore[arg-type]


def _sparse_pieces(text: bytes, file: io.FileIO, ranges: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    yield text
    for offset, length in ranges:
        for at in range(offset, offset + length, CHUNK_BYTES):
            count = min(CHUNK_BYTES, offset + length - at)
            data = os.pread(file.fileno(), count, at)
            if len(data) < count:
                raise OSError(f"{file.name} became shorter")
            yield data


class _Pieces:
    """What tarfile needs of a file: `read`."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (piece := next(self._pieces, b"")):
            self._rest += piece
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


@dataclass
class Imported:
    """What came of an archive: keys of entries that were added, were there already, and why others were refused."""

    added: list[Digest] = field(default_factory=list)
    known: list[Digest] = field(default_factory=list)
    refused: dict[Digest, str] = field(default_factory=dict)


def read(store: Store, file: BinaryIO, where: str, advance: Callable[[int], None]) -> Imported:
    """Add the entries of an archive to the store, each once all its files are there and fit its record.

    `advance` is told the bytes of entries. An entry that does not fit is refused, and the rest is
    looked at. Raises ArchiveError when `file` is no archive or is damaged as a whole, StoreError;
    what was added before stays.
    """
    try:
        stream = open_stream(file)
        archive = Archive(stream)
        members = archive.members()
        head = next(members, None)
        if head is None or head.path != _HEAD.encode() or b"".join(archive.data()) != _HEAD_TEXT:
            raise ArchiveError(f"is not an archive of a fledge-tasks cache of format {FORMAT}", where=where)
        imported = _Reader(store, archive, members, where, advance).run()
        for _ in stream:  # up to the checksum of the whole
            pass
        return imported
    except LayerError as error:
        raise ArchiveError(error.message, where=where, hint="make the archive again") from None


class _Reader:
    def __init__(
        self, store: Store, archive: Archive, members: Iterator[Member], where: str, advance: Callable[[int], None]
    ) -> None:
        self._store = store
        self._archive = archive
        self._members = members
        self._where = where
        self._advance = advance
        self._next = self._take()

    def run(self) -> Imported:
        imported = Imported()
        while self._next is not None:
            key, name, member = self._next
            data = b"".join(self._archive.data()) if member.size <= _RECORD_LIMIT_BYTES else b""
            record = parse_record(data, key) if name == RECORD else None
            if record is None:
                imported.refused.setdefault(key, "its record is missing or damaged")
                self._skip(key)
                continue
            self._next = self._take()
            with self._store.building(key):
                if self._store.find(key) is not None:
                    imported.known.append(key)
                    self._skip(key)
                elif reason := self._entry(key, record):
                    imported.refused[key] = reason
                    self._skip(key)
                else:
                    imported.added.append(key)
            self._advance(sum(size for size, _ in record.files.values()))
        return imported

    def _entry(self, key: Digest, record: Record) -> str | None:
        """Add one entry. Return why it is refused, None when it is not."""
        with self._store.staging(key) as folder:
            while self._next is not None and self._next[0] == key:
                _, name, member = self._next
                if name not in record.files or (folder / name).exists():
                    return f"{name} is not in its record, or twice in the archive"
                if member.size != (size := record.files[name][0]):  # before it is written: it may be of any size
                    return f"{name} has {member.size} bytes, not {size}"
                self._file(member, folder / name)
                self._next = self._take()
            if reason := record.misfit(folder):
                return reason
            self._store.publish_record(record, folder)
        return None

    def _file(self, member: Member, path: Path) -> None:
        with path.open("xb", buffering=0) as file:
            if member.segments is None:
                for piece in self._archive.data():
                    fsutil.write_all(file.fileno(), piece)
                return
            file.truncate(member.size)
            for offset, length in member.segments:
                for piece in self._archive.segment(length):
                    fsutil.pwrite_all(file.fileno(), piece, offset)
                    offset += len(piece)  # noqa: PLW2901

    def _skip(self, key: Digest) -> None:
        while self._next is not None and self._next[0] == key:
            self._next = self._take()

    def _take(self) -> tuple[Digest, str, Member] | None:
        member = next(self._members, None)
        if member is None:
            return None
        match = _NAME.fullmatch(member.path)
        if match is None or member.kind is not Kind.FILE:
            raise ArchiveError(f"holds {shown(member.path)}, which is no file of an entry", where=self._where)
        return Digest(f"sha256:{match[2].decode()}"), match[3].decode(), member
