"""Where the data of a compressed EROFS file lie, and what they are.

A file is cut into pieces of any length, and each is compressed into one block of 4096 bytes, or stands
in it as it is. For every 4096 bytes of the file an index tells whether a piece begins in them, where in
them, and which block holds it (Linux fs/erofs/erofs_fs.h, struct z_erofs_vle_decompressed_index;
fs/erofs/zmap.c of Linux 5.10). The indexes are packed: two in 8 bytes, or sixteen in 32, of which the last four
are the block before the first one's. The older form that is not is nothing that we write.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems.decompressors import DECOMPRESSORS
from fledge_tasks.oci.layer_index import BLOCK_BYTES

_HEADER = struct.Struct("<IHBB")
_ADVISE_PACKED_16 = 1  # Z_EROFS_ADVISE_COMPACTED_2B
_PLAIN, _HEAD, _NONHEAD = range(3)
_LOW = BLOCK_BYTES - 1
_BITS = BLOCK_BYTES.bit_length() - 1


class Cluster(NamedTuple):
    """The bytes `start` to `end` of a file are what one block holds."""

    start: int
    end: int
    block: int
    is_plain: bool


class Clusters:
    """All of a file, in order and without gaps."""

    def __init__(self, clusters: Sequence[Cluster]) -> None:
        self._clusters = clusters
        self._starts = [cluster.start for cluster in clusters]

    def covering(self, start: int, end: int) -> Iterator[Cluster]:
        """Yield those that hold any of the bytes from `start` to `end`."""
        at = max(0, bisect_right(self._starts, start) - 1)
        while at < len(self._clusters) and self._clusters[at].start < end:
            yield self._clusters[at]
            at += 1


class _Index(NamedTuple):
    """What is told of 4096 bytes of a file: whether a piece begins, at which of them, and its block."""

    form: int
    offset: int
    block: int


def read(read_at: Callable[[int, int], bytes], end: int, size: int) -> Clusters:
    """Return where a file of `size` bytes lies, whose inode ends, attributes and all, at the byte `end`.

    `read_at` returns bytes of the image by place and length. Raises FilesystemError for what is damaged, or
    more than Linux 5.10 knows.
    """
    at = end + -end % 8
    _, advise, algorithms, bits = _HEADER.unpack(read_at(at, _HEADER.size))
    if advise & ~_ADVISE_PACKED_16 or algorithms or bits:
        raise FilesystemError(f"compressed in an unknown way: {advise:#x}, {algorithms:#x}, {bits:#x}")
    count = -(-size // BLOCK_BYTES)
    indexes = _packed(read_at, at + _HEADER.size, count, may_be_16=bool(advise & _ADVISE_PACKED_16))
    heads = [
        (number * BLOCK_BYTES + index.offset, index) for number, index in enumerate(indexes) if index.form != _NONHEAD
    ]
    if len(heads) > 1 and heads[-1][0] == size:
        heads.pop()  # it marks the end of the last piece (vle_write_indexes_final of erofs-utils)
    starts = [start for start, _ in heads]
    if not heads or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= size:
        raise FilesystemError("the pieces of a compressed file do not follow each other")
    ends = [*starts[1:], size]
    return Clusters([
        Cluster(start, stop, index.block, index.form == _PLAIN)
        for (start, index), stop in zip(heads, ends, strict=True)
    ])  # fmt: skip


def data(cluster: Cluster, block: bytes) -> bytes:
    """Return what a block holds, whose compressed bytes stand at its end. Raises FilesystemError."""
    length = cluster.end - cluster.start
    found = block[:length] if cluster.is_plain else DECOMPRESSORS["lz4"](block.lstrip(b"\0"), length)
    if len(found) != length:
        raise FilesystemError(f"a piece of {len(found)} bytes, {length} were told of")
    return found


def _packed(read_at: Callable[[int, int], bytes], at: int, count: int, *, may_be_16: bool) -> Iterator[_Index]:
    """Yield what packed indexes tell (z_erofs_load_cluster_from_disk's compacted_load_cluster_from_disk).

    First pairs, up to a multiple of 32 bytes, then as many sixteens as there are, then pairs again.
    """
    first = min(count, (32 - at % 32) // 4 % 8)
    sixteens = (count - first) // 16 if may_be_16 and first < count else 0
    for number, per in ((first, 2), (sixteens * 16, 16), (count - first - sixteens * 16, 2)):
        pack_bytes = {2: 8, 16: 32}[per]
        packs = -(-number // per)
        whole = read_at(at, packs * pack_bytes)
        for pack in range(packs):
            left = number - pack * per
            yield from list(_unpack(whole[pack * pack_bytes : (pack + 1) * pack_bytes], per))[:left]
        at += number * pack_bytes // per


def _unpack(pack: bytes, per: int) -> Iterator[_Index]:
    """Yield what one pack tells: a block for each piece that begins, counted from the one in its last bytes."""
    (before,) = struct.unpack_from("<I", pack, len(pack) - 4)
    bits = (len(pack) - 4) * 8 // per
    whole = int.from_bytes(pack[:-4], "little")
    values = [whole >> bits * at for at in range(per)]
    fields = [(_known(value >> _BITS & 3), value & _LOW) for value in values]
    for at, (form, low) in enumerate(fields):
        if form == _NONHEAD:
            yield _Index(form, 0, 0)
            continue
        block, earlier = before + 1, at - 1
        while earlier >= 0:
            kind, distance = fields[earlier]
            if kind == _NONHEAD:
                earlier -= distance
            if earlier >= 0:
                block += 1
            earlier -= 1
        yield _Index(form, low, block & 0xFFFFFFFF)


def _known(form: int) -> int:
    if form > _NONHEAD:
        raise FilesystemError(f"an index of the unknown form {form}")
    return form
