"""An image file, put together from a skeleton and the payloads that its extents point into.

The bytes of the skeleton are written, the ranges of the payloads are cloned or copied inside the
kernel, and beside that a second thread computes the sha256 of the image from the same sources in
the order of the image. Nothing is cached: the file takes about the time of one file copy.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import zstandard

from fledge_tasks.digest import CHUNK_BYTES, Digest
from fledge_tasks.errors import StoreError
from fledge_tasks.filesystems.skeleton import BLOCK_BYTES, ImageMap
from fledge_tasks.fsutil import RangeCopier, opened, pwrite_all, remove_stale, replacing

_ZERO = bytes(CHUNK_BYTES)
_HOLE, _SKELETON = -1, -2


@dataclass(frozen=True)
class Assembled:
    """The finished file. Of its bytes, `shared_bytes` are reflinks and `copied_bytes` were copied."""

    sha256: Digest
    size: int
    shared_bytes: int
    copied_bytes: int


def assemble(
    image_map: ImageMap,
    skeleton: Path,
    payloads: Mapping[int, Path],
    target: Path,
    *,
    preallocate: bool,
    advance: Callable[[int], None],
    durable: bool = True,
) -> Assembled:
    """Write the image to `target`, atomically; `payloads` maps source numbers to files.

    With `preallocate` every block of the file is allocated on the host (no holes, no reflinks).
    Not `durable` is for a file that something else is made of at once.
    The caller is the only writer of `target`. `advance` is told the payload bytes as they are
    done. Raises OSError, and StoreError for sources that do not fit the map; `target` is then as
    it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    with contextlib.ExitStack() as stack:
        sources = stack.enter_context(opened({number: payloads[number] for number in sorted(image_map.sources())}))
        _check_lengths(image_map, sources)
        fd = stack.enter_context(replacing(target, durable=durable))
        os.ftruncate(fd, image_map.image_bytes)
        if preallocate:
            _allocate(fd, image_map.image_bytes)
        hasher = stack.enter_context(_Hasher(image_map, skeleton, sources, fd))
        copier = RangeCopier(fd, advance, may_share=not preallocate)
        for extent in image_map.extents:
            copier.copy(
                sources[extent.source],
                extent.payload_block * BLOCK_BYTES,
                extent.block * BLOCK_BYTES,
                extent.count * BLOCK_BYTES,
            )
        digest = hasher.result()
    return Assembled(digest, image_map.image_bytes, copier.shared_bytes, copier.copied_bytes)


def _check_lengths(image_map: ImageMap, sources: Mapping[int, int]) -> None:
    sizes = {number: os.fstat(fd).st_size for number, fd in sources.items()}
    for extent in image_map.extents:
        if (extent.payload_block + extent.count) * BLOCK_BYTES > sizes[extent.source]:
            raise StoreError(f"payload {extent.source} ends before the data that the image map expects in it")


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
            raise
        for offset in range(0, size, CHUNK_BYTES):
            pwrite_all(fd, _ZERO[: min(CHUNK_BYTES, size - offset)], offset)


def segments(image_map: ImageMap) -> Iterator[tuple[int, int, int, int]]:
    """Yield (image block, source, payload block, count) over the whole image, in order.

    Source -1 is a hole, -2 the skeleton. Raises StoreError when parts lie over each other.
    """
    parts = [(extent.block, extent.source, extent.payload_block, extent.count) for extent in image_map.extents]
    parts += [(block, _SKELETON, 0, count) for block, count in image_map.ranges]
    end = 0
    for block, source, payload_block, count in sorted(parts):
        if block < end or block + count > image_map.blocks:
            raise StoreError(f"image map: block {block} is used twice or lies outside the image")
        if block > end:
            yield end, _HOLE, 0, block - end
        yield block, source, payload_block, count
        end = block + count
    if end < image_map.blocks:
        yield end, _HOLE, 0, image_map.blocks - end


class _Hasher:
    """A thread that computes the image's sha256, and writes the skeleton's bytes on its way."""

    def __init__(self, image_map: ImageMap, skeleton: Path, sources: Mapping[int, int], target: int) -> None:
        self._map, self._skeleton, self._sources, self._target = image_map, skeleton, sources, target
        self._sha256 = hashlib.sha256()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)

    def __enter__(self) -> _Hasher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self) -> Digest:
        """Wait for the end and return the digest; raises what the thread raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return Digest("sha256:" + self._sha256.hexdigest())

    def _run(self) -> None:
        try:
            with self._skeleton.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as reader:
                for block, source, payload_block, count in segments(self._map):
                    self._segment(reader, block, source, payload_block, count)
        except (OSError, StoreError) as error:
            self._failure = error
        except zstandard.ZstdError as error:
            self._failure = StoreError(f"not a skeleton: {error}", where=str(self._skeleton))

    def _segment(
        self, reader: zstandard.ZstdDecompressionReader, block: int, source: int, payload_block: int, count: int
    ) -> None:
        offset, left = block * BLOCK_BYTES, count * BLOCK_BYTES
        position = payload_block * BLOCK_BYTES
        while left and not self._stop.is_set():
            length = min(left, CHUNK_BYTES)
            if source == _HOLE:
                data = _ZERO if length == CHUNK_BYTES else _ZERO[:length]
            elif source == _SKELETON:
                data = reader.read(length)
                pwrite_all(self._target, data, offset)
            else:
                data = os.pread(self._sources[source], length, position)
            if not data:
                raise StoreError("a stored file ends before the data that the image map expects in it")
            self._sha256.update(data)
            offset, position, left = offset + len(data), position + len(data), left - len(data)
