"""Compressed streams: what comes out, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks.errors import LayerError
from fledge_tasks.oci.decompress import CHUNK_BYTES, Cursor, open_stream

TEXT = b"".join(b"%d little lambs\n" % number for number in range(3000))
NOISE = random.Random(1).randbytes(700_000)
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"12345"


class Trickle(io.RawIOBase):
    """A file that gives one byte at a time, as a raw file may."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def read(self, size: int = -1, /) -> bytes:
        return self._data.read(1 if size else 0)


def zstd(data: bytes, **options: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, **options)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


def zstd_streamed(data: bytes) -> bytes:
    """A frame that does not say how much it holds, with a block flushed in the middle."""
    stream = zstandard.ZstdCompressor().compressobj()
    return (
        stream.compress(data[:1000])
        + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        + stream.compress(data[1000:])
        + stream.flush()
    )


def read(blob: bytes) -> bytes:
    chunks = list(open_stream(io.BytesIO(blob)))
    assert all(chunks) and max(map(len, chunks), default=0) <= CHUNK_BYTES
    return b"".join(chunks)


@pytest.mark.parametrize(
    ("blob", "expected"),
    [
        (b"", b""),
        (b"\x1f", b"\x1f"),
        (TEXT, TEXT),
        (NOISE, NOISE),
        (gzip.compress(b""), b""),
        (gzip.compress(TEXT), TEXT),
        (gzip.compress(NOISE, 1), NOISE),
        (gzip.compress(TEXT) + gzip.compress(b"") + gzip.compress(NOISE), TEXT + NOISE),
        (gzip.compress(TEXT) + bytes(1), TEXT),
        (gzip.compress(TEXT) + bytes(200_000), TEXT),
        (b"".join(gzip.compress(b"%d," % number) for number in range(500)), b"".join(b"%d," % n for n in range(500))),
        (zstd(b""), b""),
        (zstd(TEXT), TEXT),
        (zstd(NOISE), NOISE),
        (zstd(bytes(3_000_000)), bytes(3_000_000)),
        (zstd(TEXT, write_checksum=True), TEXT),
        (zstd(TEXT, write_content_size=False), TEXT),
        (zstd_streamed(TEXT), TEXT),
        (zstd(TEXT) + SKIPPABLE + zstd(NOISE) + SKIPPABLE, TEXT + NOISE),
        (SKIPPABLE + zstd(TEXT), TEXT),
    ],
)
def test_streams_come_out_whole(blob: bytes, expected: bytes) -> None:
    assert read(blob) == expected


@pytest.mark.parametrize("blob", [TEXT, gzip.compress(TEXT) * 2 + bytes(9), SKIPPABLE + zstd(TEXT) * 2])
def test_the_file_may_give_single_bytes(blob: bytes) -> None:
    assert b"".join(open_stream(Trickle(blob))) == read(blob)


@pytest.mark.parametrize(
    ("name", "blob"), [("bzip2", bz2.compress(TEXT)), ("bzip2", bz2.compress(b"")), ("xz", lzma.compress(TEXT))]
)
def test_other_compressions_are_named(name: str, blob: bytes) -> None:
    with pytest.raises(LayerError, match=f"compressed with {name}; layers are gzip, zstd or plain"):
        open_stream(io.BytesIO(blob))


def test_a_name_that_starts_like_bzip2_is_no_compression() -> None:
    assert read(b"BZh9.txt".ljust(512, b"\0")) == b"BZh9.txt".ljust(512, b"\0")


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_a_cut_at_any_place_is_found(name: str) -> None:
    blob = gzip.compress(TEXT[:3000]) if name == "gzip" else SKIPPABLE + zstd(TEXT[:3000], write_checksum=True)
    start = 3 if name == "gzip" else len(SKIPPABLE) + 4
    for length in range(start, len(blob)):
        with pytest.raises(LayerError, match=f"truncated {name} stream"):
            read(blob[:length])


def test_a_cut_between_two_blocks_is_found() -> None:
    stream = zstandard.ZstdCompressor().compressobj()
    part = stream.compress(TEXT) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    with pytest.raises(LayerError, match="truncated zstd stream"):
        read(part)


@pytest.mark.parametrize("blob", [gzip.compress(TEXT), zstd(TEXT, write_checksum=True)])
def test_a_flipped_bit_anywhere_is_found_or_harmless(blob: bytes) -> None:
    refused = 0
    for place in random.Random(2).sample(range(4, len(blob)), 400):
        changed = bytearray(blob)
        changed[place] ^= 1 << place % 8
        try:
            found = read(bytes(changed))
        except LayerError:
            refused += 1
        else:
            assert found == TEXT  # the time in a gzip header, say
    assert refused > 380


@pytest.mark.parametrize(
    "tail", [b"x", b"\0\0x", bytes(200_000) + gzip.compress(b""), b"\x1f\x8b\x08 no gzip header", TEXT]
)
def test_garbage_after_gzip_is_refused(tail: bytes) -> None:
    with pytest.raises(LayerError, match=r"trailing garbage|corrupt gzip|truncated gzip"):
        read(gzip.compress(TEXT) + tail)


@pytest.mark.parametrize("tail", [b"x", bytes(4), gzip.compress(TEXT), b"\x28\xb5\x2f\xfe"])
def test_garbage_after_zstd_is_refused(tail: bytes) -> None:
    with pytest.raises(LayerError, match="trailing garbage after the zstd stream"):
        read(zstd(TEXT) + tail)


def test_a_zstd_window_of_gigabytes_is_refused() -> None:
    header = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3])
    with pytest.raises(LayerError, match="corrupt zstd stream"):
        read(header + b"\x01\x00\x00")


@pytest.mark.parametrize("name", ["gzip", "zstd"])
def test_memory_does_not_grow_with_what_comes_out(name: str) -> None:
    size = 300_000_000
    if name == "zstd":
        block = zstd(bytes(1 << 17), write_content_size=False)
        blob = block * (size >> 17)
    else:
        blob = gzip.compress(bytes(10_000_000)) * (size // 10_000_000)
    tracemalloc.start()
    total = sum(map(len, open_stream(io.BytesIO(blob))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0.99 * size
    assert peak < 8_000_000


def test_one_zstd_frame_of_repeats_comes_in_small_chunks() -> None:
    # 4 bytes of input make 128 KiB: what bombs are made of.
    blocks = b"".join((2 | 1 << 17 << 3).to_bytes(3, "little") + b"x" for _ in range(800))
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + blocks + (1).to_bytes(3, "little")
    total = 0
    for chunk in open_stream(io.BytesIO(frame)):
        assert len(chunk) <= CHUNK_BYTES and not chunk.strip(b"x")
        total += len(chunk)
    assert total == 800 << 17


@given(
    st.lists(st.binary(max_size=300)),
    st.lists(st.tuples(st.sampled_from(["take", "pieces", "skip"]), st.integers(0, 400))),
)
def test_a_cursor_reads_as_one_file(chunks: list[bytes], steps: list[tuple[str, int]]) -> None:
    cursor = Cursor(iter([chunk for chunk in chunks if chunk]))
    file = io.BytesIO(b"".join(chunks))
    for step, count in steps:
        expected = file.read(count)
        if step == "take":
            assert cursor.take(count) == expected
        elif step == "pieces":
            assert b"".join(cursor.pieces(count)) == expected
        else:
            assert cursor.skip(count) == len(expected)
        assert cursor.offset == file.tell()
