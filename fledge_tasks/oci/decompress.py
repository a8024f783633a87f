"""Layer blobs as streams of bytes, decompressed on the way.

What a blob is compressed with is read from its first bytes: media types are often wrong. Memory is
bounded however well a stream compresses: no chunk is longer than `CHUNK_BYTES`, but for a zstd
stream that asks for a larger window (at most 128 MiB, the limit of libzstd).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Protocol

import zstandard
from isal import igzip_lib

from fledge_tasks.errors import LayerError

CHUNK_BYTES = 1 << 20
_INPUT_BYTES = 1 << 17  # short, since each gzip member that ends in an input copies the rest of it
_MAGIC_BYTES = 10
_ZSTD_BLOCK_BYTES = 1 << 17

_GZIP = re.compile(rb"\x1f\x8b")
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
_REFUSED = {
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17\x72\x45\x38\x50\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}


class Readable(Protocol):
    """What we need of a file: `read` returns fewer bytes than asked for only as a raw file may, b'' at the end."""

    def read(self, size: int, /) -> bytes: ...


class Cursor:
    """Reads exact counts from a stream of chunks. `offset` is where it stands."""

    __slots__ = ("_at", "_base", "_chunk", "_chunks")

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._chunk = b""
        self._at = 0
        self._base = 0

    @property
    def offset(self) -> int:
        """Bytes read so far."""
        return self._base + self._at

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes, fewer only when the stream ends."""
        start = self._at
        end = start + count
        if end <= len(self._chunk):
            self._at = end
            return self._chunk[start:end]
        return b"".join(self.pieces(count))

    def pieces(self, count: int) -> Iterator[memoryview]:
        """Yield the next `count` bytes in pieces, fewer only when the stream ends. To be read to its end."""
        while count:
            start = self._at
            end = min(start + count, len(self._chunk))
            if start < end:
                self._at = end
                count -= end - start
                yield memoryview(self._chunk)[start:end]
            elif not self._refill():
                return

    def skip(self, count: int) -> int:
        """Pass over the next `count` bytes and return how many there were, fewer only when the stream ends."""
        left = count
        while left > len(self._chunk) - self._at:
            left -= len(self._chunk) - self._at
            self._at = len(self._chunk)
            if not self._refill():
                return count - left
        self._at += left
        return count

    def _refill(self) -> bool:
        self._base += len(self._chunk)
        self._chunk = next(self._chunks, b"")
        self._at = 0
        return bool(self._chunk)


def open_stream(file: Readable) -> Iterator[bytes]:
    """Return the decompressed chunks of `file`, none of them empty: gzip, zstd, or else the bytes as they are.

    A gzip file may have several members (RFC 1952, 2.2) and be filled up with zeros, as gzip(1)
    has it; a zstd file may have several frames and skippable ones (RFC 8878, 3.1). Anything else
    behind them is refused. Raises LayerError, here for other compressions, from the iterator for
    corrupt and truncated streams. `file` is at its end when the iterator is.
    """
    head = b""
    while len(head) < _MAGIC_BYTES and (more := file.read(_INPUT_BYTES)):
        head += more
    if _GZIP.match(head):
        return _gunzip(_chunks(head, file, _INPUT_BYTES))
    if _ZSTD.match(head):
        return _unzstd(Cursor(_chunks(head, file, CHUNK_BYTES)))
    for name, magic in _REFUSED.items():
        if magic.match(head):
            raise LayerError(f"compressed with {name}; layers are gzip, zstd or plain tar (OCI image spec, layer.md)")
    return _chunks(head, file, CHUNK_BYTES)


def _chunks(head: bytes, file: Readable, size: int) -> Iterator[bytes]:
    rest = iter(lambda: file.read(size), b"")
    return itertools.chain((head,), rest) if head else rest


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    data = next(chunks)
    while data:
        member = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_GZIP)
        while not member.eof:
            if member.needs_input:
                data = data or next(chunks, b"")
                if not data:
                    raise LayerError("truncated gzip stream")
            try:
                output = member.decompress(data, CHUNK_BYTES)
            except igzip_lib.IsalError as error:  # type: ignore[misc]  # not a class, says its stub
                raise LayerError(f"corrupt gzip stream: {error}") from None
            data = b""
            if output:
                yield output
        data = _next_member(member.unused_data, chunks)


def _next_member(data: bytes, chunks: Iterator[bytes]) -> bytes:
    """Return the start of the next gzip member, b'' if there is none."""
    data = data or next(chunks, b"")
    if data.startswith(b"\x1f"):
        return data
    while data:
        if data.strip(b"\0"):
            raise LayerError("trailing garbage after the gzip stream")
        data = next(chunks, b"")
    return b""


def _unzstd(source: Cursor) -> Iterator[bytes]:
    # Fed block by block, since a block never holds more than 128 KiB: the decompressor of python-
    # zstandard returns all that its input yields, and 4 bytes of input can yield a block. This also
    # tells a stream that was cut between two blocks, where the decompressor sees nothing wrong.
    decompressor = zstandard.ZstdDecompressor()
    while magic := source.take(4):
        if not _ZSTD.match(magic):
            raise LayerError("trailing garbage after the zstd stream")
        if magic[0] != 0x28:  # skippable frame
            size = int.from_bytes(_exactly(source, 4), "little")
            if source.skip(size) < size:
                raise LayerError("truncated zstd stream")
            continue
        frame = decompressor.decompressobj()
        try:
            for part in _zstd_parts(magic, source):
                if output := frame.decompress(part):
                    yield output
        except zstandard.ZstdError as error:
            raise LayerError(f"corrupt zstd stream: {error}") from None
        if not frame.eof:
            raise LayerError("corrupt zstd stream: the frame does not end with its last block")


def _zstd_parts(magic: bytes, source: Cursor) -> Iterator[bytes]:
    """Yield a frame in its parts: header, blocks, checksum (RFC 8878, 3.1.1)."""
    descriptor = _exactly(source, 1)
    single_segment = descriptor[0] & 0x20
    window = 0 if single_segment else 1
    dictionary = (0, 1, 2, 4)[descriptor[0] & 3]
    content_size = (1 if single_segment else 0, 2, 4, 8)[descriptor[0] >> 6]
    yield magic + descriptor + _exactly(source, window + dictionary + content_size)
    last = 0
    while not last:
        header = _exactly(source, 3)
        number = int.from_bytes(header, "little")
        last, kind, size = number & 1, number >> 1 & 3, number >> 3
        if kind == 3 or size > _ZSTD_BLOCK_BYTES:
            raise LayerError("corrupt zstd stream: a block of a reserved type or more than 128 KiB")
        yield header + _exactly(source, 1 if kind == 1 else size)
    if descriptor[0] & 4:
        yield _exactly(source, 4)


def _exactly(source: Cursor, count: int) -> bytes:
    data = source.take(count)
    if len(data) < count:
        raise LayerError("truncated zstd stream")
    return data
