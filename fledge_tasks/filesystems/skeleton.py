"""A filesystem image without its file data, and where that data comes from.

On disk it is two files. `skeleton` is one zstd frame around the bytes of all ranges, one after
the other. `map` is one msgpack value:

    map     = [magic, version, blocks, ranges, extents]
    magic   = "fledge-skeleton"
    version = 1
    blocks  = size of the image in blocks of 4096 bytes
    ranges  = [[image block, count]*]                          in order, apart from each other
    extents = [[image block, source, payload block, count]*]   in order, apart from each other and
                                                               from the ranges
    source  = number of the payload, in the order of the layers

What neither a range nor an extent covers is zero. Version history: 1 first version.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import zstandard

from fledge_tasks.errors import NOT_DECODED, StoreError
from fledge_tasks.fsutil import data_ranges

BLOCK_BYTES = 4096
FORMAT = 1
_MAGIC = "fledge-skeleton"
_READ_BLOCKS = 256
_ZERO = bytes(BLOCK_BYTES)


class ImageExtent(msgspec.Struct, frozen=True, array_like=True, gc=False, order=True):
    """`count` blocks of the image from `block` on are those of a payload from `payload_block` on."""

    block: int
    source: int
    payload_block: int
    count: int


class ImageMap(msgspec.Struct, frozen=True, array_like=True):
    """The content of `map`."""

    magic: str
    version: int
    blocks: int
    ranges: list[tuple[int, int]]
    extents: list[ImageExtent]

    @property
    def image_bytes(self) -> int:
        """Size of the image."""
        return self.blocks * BLOCK_BYTES

    def sources(self) -> set[int]:
        """Return the numbers of the payloads that hold any data of the image."""
        return {extent.source for extent in self.extents}


def merge_extents(extents: Iterable[ImageExtent]) -> list[ImageExtent]:
    """Return the extents in order, neighbours that continue each other joined."""
    merged: list[ImageExtent] = []
    for extent in sorted(extents):
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.source == extent.source
            and last.block + last.count == extent.block
            and last.payload_block + last.count == extent.payload_block
        ):
            merged[-1] = ImageExtent(last.block, last.source, last.payload_block, last.count + extent.count)
        else:
            merged.append(extent)
    return merged


def save(image: Path, extents: Iterable[ImageExtent], skeleton: Path, map_file: Path) -> ImageMap:
    """Write `skeleton` and `map_file` from an image file; what extents tell of is left out, whether it is there or not.

    All-zero blocks are left out, so that the result does not depend on how the host's filesystem
    keeps holes. Neither file is synced. Raises OSError.
    """
    ranges: list[tuple[int, int]] = []
    merged = merge_extents(extents)
    with image.open("rb", buffering=0) as source, skeleton.open("wb") as target:
        size = os.fstat(source.fileno()).st_size
        with zstandard.ZstdCompressor(level=3).stream_writer(target, closefd=False) as compressor:
            for block, data in _nonzero_blocks(source.fileno(), size, merged):
                if ranges and sum(ranges[-1]) == block:
                    ranges[-1] = (ranges[-1][0], ranges[-1][1] + len(data) // BLOCK_BYTES)
                else:
                    ranges.append((block, len(data) // BLOCK_BYTES))
                compressor.write(data)
    image_map = ImageMap(_MAGIC, FORMAT, size // BLOCK_BYTES, ranges, merged)
    map_file.write_bytes(msgspec.msgpack.encode(image_map))
    return image_map


def _without(ranges: Iterable[tuple[int, int]], extents: Sequence[ImageExtent]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of the blocks of byte ranges that are in no extent; both come in order."""
    following, done = 0, 0
    for start, length in ranges:
        block, end = max(start // BLOCK_BYTES, done), -(-(start + length) // BLOCK_BYTES)
        done = max(done, end)
        while block < end:
            while following < len(extents) and extents[following].block + extents[following].count <= block:
                following += 1
            extent = extents[following] if following < len(extents) else None
            if extent is None or extent.block >= end:
                yield block, end
                break
            if extent.block > block:
                yield block, extent.block
            block = extent.block + extent.count


def _nonzero_blocks(fd: int, size: int, extents: Sequence[ImageExtent]) -> Iterator[tuple[int, bytes]]:
    """Yield (block, data) of runs of blocks that are in no extent and not all zero."""
    for block, done in _without(data_ranges(fd, size), extents):
        while block < done:
            data = os.pread(fd, min(_READ_BLOCKS, done - block) * BLOCK_BYTES, block * BLOCK_BYTES)
            first = None
            count = len(data) // BLOCK_BYTES
            for at in range(count + 1):
                zero = at == count or data.startswith(_ZERO, at * BLOCK_BYTES)
                if zero and first is not None:
                    yield block + first, data[first * BLOCK_BYTES : at * BLOCK_BYTES]
                    first = None
                elif not zero and first is None:
                    first = at
            block += count  # noqa: PLW2901


def read_map(path: Path) -> ImageMap:
    """Return the content of a map file. Raises StoreError for anything else."""
    try:
        image_map = msgspec.msgpack.decode(path.read_bytes(), type=ImageMap)
    except (OSError, *NOT_DECODED) as error:
        raise StoreError(f"not an image map: {error}", where=str(path)) from None
    if image_map.magic != _MAGIC or image_map.version != FORMAT:
        raise StoreError(f"not an image map of format {FORMAT}", where=str(path))
    return image_map
