"""Blocks decompressed, each whole: what squashfs and EROFS images hold.

LZ4 and LZO come from their C libraries, which every program that makes such images needs as well.
"""

from __future__ import annotations

import ctypes
import functools
import lzma
import zlib
from collections.abc import Callable

import zstandard

from fledge_tasks.errors import FilesystemError

_XZ_MEMORY_BYTES = 64 << 20  # a dictionary is as large as a block at most, and that is 1 MiB


def _gzip(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(data, limit)
        # A stream that came to its limit has not been looked at to its end, where its checksum is.
        more = b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise _damaged(str(error)) from None
    return _whole(found, more, is_at_end=stream.eof)


def _xz(data: bytes, limit: int) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
    try:
        found = stream.decompress(data, limit)
        more = b"" if stream.eof else stream.decompress(b"", 1)
    except lzma.LZMAError as error:
        raise _damaged(str(error)) from None
    return _whole(found, more, is_at_end=stream.eof)


def _whole(found: bytes, more: bytes, *, is_at_end: bool) -> bytes:
    """Return what was found in a stream, if there is no more of it and it has an end, as Linux wants it to."""
    if more:
        raise _damaged(f"more than the {len(found)} bytes that belong there")
    if not is_at_end:
        raise _damaged("it is cut short")
    return found


def _zstd(data: bytes, limit: int) -> bytes:
    try:
        # What a frame says of its size is believed, whatever the limit (python-zstandard, 'max_output_size').
        told = zstandard.get_frame_parameters(data).content_size
        if limit < told < zstandard.CONTENTSIZE_UNKNOWN:
            raise _damaged(f"{told} bytes, at most {limit} belong there")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=limit)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None


def _lz4(data: bytes, limit: int) -> bytes:
    """LZ4_decompress_safe (lz4.h): bytes written, negative for malformed input."""
    target = ctypes.create_string_buffer(limit)
    count = _library("liblz4.so.1", "liblz4-1").LZ4_decompress_safe(data, target, len(data), limit)
    if count < 0:
        raise _damaged("malformed LZ4")
    return target.raw[:count]


def _lzo(data: bytes, limit: int) -> bytes:
    """lzo1x_decompress_safe (lzo/lzo1x.h): 0 when all is well."""
    target, count = ctypes.create_string_buffer(limit), ctypes.c_size_t(limit)
    length = ctypes.c_size_t(len(data))
    library = _library("liblzo2.so.2", "liblzo2-2")
    if library.lzo1x_decompress_safe(data, length, target, ctypes.byref(count), None):
        raise _damaged("malformed LZO")
    return target.raw[: count.value]


DECOMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {
    "gzip": _gzip, "xz": _xz, "zstd": _zstd, "lz4": _lz4, "lzo": _lzo,
}  # fmt: skip
"""By name what undoes a compression: takes a block, and what that may come to.

Each raises FilesystemError for a block that is damaged, or when its library is not here.
"""


@functools.cache
def _library(file: str, package: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(file)
    except OSError:
        hint = f"install it, for example: sudo apt-get install {package}"
        raise FilesystemError(f"{file} is not installed", hint=hint) from None


def _damaged(how: str) -> FilesystemError:
    return FilesystemError(f"a block cannot be decompressed: {how}")
