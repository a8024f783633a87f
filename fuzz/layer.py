"""Fuzz target: a layer blob, unpacked, its index read back and merged over a lower layer.

Digests, sizes and header checksums stop a fuzzer, so this target makes them true. Its input is one
byte that says how, and an archive or blob:

    bits 0-1   0 the archive as it is, 1 in gzip, 2 in zstd, 3 the input is the blob, compressed or not
    bit 2      repair the checksums of its headers
    bit 3      cut off the last quarter of the blob
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import os
from pathlib import Path

import zstandard

from fledge_tasks.errors import FledgeError
from fledge_tasks.filesystems import ext4, ext4_inode
from fledge_tasks.oci.decompress import open_stream
from fledge_tasks.oci.layer import unpack
from fledge_tasks.oci.layer_index import Entry, Kind, file_runs, read_index
from fledge_tasks.oci.limits import Limits
from fledge_tasks.tree import Inode, Layer, merge, walk

LIMITS = Limits(tar_bytes=1 << 22, entries=1000, ratio=1000)
_BLOCK = 512
# What a hostile layer meets: folders, links into them, out of them and in a circle, hard links.
_LOWER = [
    Entry(b"a", Kind.DIRECTORY),
    Entry(b"a/b", Kind.DIRECTORY),
    Entry(b"a/b/c", Kind.FILE),
    Entry(b"l", Kind.SYMLINK, link=b"a/b"),
    Entry(b"out", Kind.SYMLINK, link=b"../../etc"),
    Entry(b"loop", Kind.SYMLINK, link=b"loop/x"),
    Entry(b"h", Kind.HARDLINK, link=b"a/b/c"),
]


def one_input(data: bytes) -> None:
    """Run everything on one input. It may end in a FledgeError, which counts as an answer, and in no other."""
    mode, rest = data[0] if data else 0, data[1:]
    blob = _blob(mode, rest)
    with contextlib.suppress(FledgeError):
        entries = _unpacked(blob)
        root = merge([Layer("lower", _LOWER), Layer("layer", entries), Layer("again", entries)], 0)
        for path, inode in walk(root):
            _check(path, inode)
        items = ext4._number(root, 0)
        ext4._prepare(items, bytes(16))
        for item in items:
            _encode(item.inode.entry)


def _blob(mode: int, rest: bytes) -> bytes:
    if mode & 4:
        rest = repaired(rest)
    if mode & 3 == 1:
        rest = gzip.compress(rest, 1, mtime=0)
    elif mode & 3 == 2:
        rest = zstandard.ZstdCompressor(level=1).compress(rest)
    return rest[: len(rest) * 3 // 4] if mode & 8 else rest


def repaired(archive: bytes) -> bytes:
    """Return an archive with true checksums, as far as its headers can be found by their sizes."""
    fixed = bytearray(archive)
    at = 0
    while at + _BLOCK <= len(fixed):
        header = fixed[at : at + _BLOCK]
        if any(header):
            header[148:156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        size = 0
        if header[156:157] in b"0\x007SxgLK":
            with contextlib.suppress(ValueError):
                size = int(header[124:136].strip(b" \0") or b"0", 8)
        at += _BLOCK + -(-max(size, 0) // _BLOCK) * _BLOCK
    return bytes(fixed)


def _unpacked(blob: bytes) -> list[Entry]:
    payload, index = os.memfd_create("payload"), os.memfd_create("index")
    try:
        with open(index, "wb", closefd=False) as index_file:
            found = unpack(
                io.BytesIO(blob),
                diff_id=_diff_id(blob),
                blob_digest=f"sha256:{hashlib.sha256(blob).hexdigest()}",
                blob_size=len(blob),
                limits=LIMITS,
                payload_fd=payload,
                index_file=index_file,
                advance=lambda _: None,
                where="layer",
            )
        entries = read_index(Path(f"/proc/self/fd/{index}"))
        assert len(entries) == found.entries <= LIMITS.entries
        assert os.fstat(payload).st_size == found.payload_bytes <= 4 * LIMITS.tar_bytes
        blocks = found.payload_bytes // ext4_inode.BLOCK_BYTES
        for entry in entries:
            if entry.kind is Kind.FILE:
                assert all(run.payload + run.count <= blocks for run in file_runs(entry))
    finally:
        os.close(payload)
        os.close(index)
    return entries


def _diff_id(blob: bytes) -> str:
    state, size = hashlib.sha256(), 0
    with contextlib.suppress(FledgeError):
        for chunk in open_stream(io.BytesIO(blob)):
            state.update(chunk)
            if (size := size + len(chunk)) > LIMITS.tar_bytes:
                break
    return f"sha256:{state.hexdigest()}"


def _check(path: bytes, inode: Inode) -> None:
    names = path.split(b"/")
    assert not {b".", b".."} & set(names) and (path == b"" or b"" not in names)
    assert (inode.children is not None) == (inode.entry.kind is Kind.DIRECTORY)
    assert inode.entry.kind < Kind.HARDLINK


def _encode(entry: Entry) -> None:
    """Have everything about an entry written as bytes of an inode, as `ext4.make` does it in an image."""
    extents = [(run.logical, 0, min(run.count, ext4_inode.MAX_EXTENT_BLOCKS)) for run in file_runs(entry)]
    field, _ = ext4_inode.extent_field(extents, lambda: 0)
    if entry.kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
        field = ext4_inode.device_field(*entry.rdev)
    data = ext4_inode.inode(
        entry, size=entry.size, links=1, blocks=1, block_field=field, flags=0, changed=ext4_inode.timestamp(0)
    )
    assert len(data) == 256
