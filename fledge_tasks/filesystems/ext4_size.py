"""How large an ext4 filesystem must be, and making it empty at that size with mke2fs.

What the filesystem itself takes (bitmaps, inode tables, journal, copies of the superblock) is not
modelled: mke2fs makes a sparse file in a few milliseconds, so it is asked, by making it and
reading the superblock, and made again with what was missing or too much.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems.ext4_inode import BLOCK_BYTES
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.run import run

FEATURES = (
    "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg", "sparse_super",
    "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
)  # fmt: skip
MIN_FREE_INODES = 10_000
BYTES_PER_FREE_INODE = 16_384
MAX_BLOCKS = 1 << 32
_CONFIGURATION = "[defaults]\n\tblocksize = 4096\n[fs_types]\n\text4 = {\n\t}\n"
_BLOCKS_PER_GROUP = 32_768
_MAX_INODES_PER_GROUP = 32_768 - 256  # leaves room for rounding up
_MIN_BLOCKS_PER_GROUP = 4_096
_INODES_PER_BLOCK = 16
_RESERVED_INODES = 10
_MIN_JOURNAL_BLOCKS = 2_048  # below that, mke2fs makes none (ext2fs_default_journal_size in mkjournal.c)
_MAX_OWN_TIME = (1 << 31) - 1
_TOLERANCE_BLOCKS = 64
_MIB_BLOCKS = 256
_ATTEMPTS = 64
_TOO_SMALL = ("requested number of inodes", "Could not allocate block", "journal size too big")


@dataclass(frozen=True)
class Counts:
    """Counters of a superblock."""

    blocks: int
    free_blocks: int
    inodes: int
    free_inodes: int


def read_counts(image: Path) -> Counts:
    """Read the counters of the first superblock ('The Super Block', Linux ext4 documentation)."""
    with image.open("rb") as file:
        file.seek(1024)
        data = file.read(1024)
    inodes, blocks, _, free, free_inodes = struct.unpack_from("<IIIII", data)
    blocks_high, _, free_high = struct.unpack_from("<III", data, 0x150)
    return Counts(blocks_high << 32 | blocks, free_high << 32 | free, inodes, free_inodes)


def create(image: Path, scratch: Path, parameters: Parameters, *, needed_blocks: int, inodes: int) -> int:
    """Make an empty filesystem that has `needed_blocks` and the buffer free; return its blocks.

    At most 256 KiB more than that is free, 1 MiB with rare trees of many empty files. `inodes` are
    those that will be used; at least 10,000, a fifth of them and one per 16 KiB of the buffer stay
    free for the running guest. Raises FilesystemError when ext4 has no such size.
    """
    configuration = scratch / "mke2fs.conf"
    configuration.write_text(_CONFIGURATION)
    wanted = needed_blocks + -(-parameters.buffer_bytes // BLOCK_BYTES)
    total_inodes = (
        _RESERVED_INODES + inodes + max(MIN_FREE_INODES, inodes // 5, parameters.buffer_bytes // BYTES_PER_FREE_INODE)
    )
    # What follows from the size by steps is settled first: then a block more is a block more free.
    journal_mib = _journal_mib(wanted)
    # Inodes fill a filesystem up that would be too small to have a journal.
    total_inodes = max(total_inodes, (_MIN_JOURNAL_BLOCKS - wanted - journal_mib * _MIB_BLOCKS) * _INODES_PER_BLOCK)
    least = wanted + total_inodes // _INODES_PER_BLOCK + journal_mib * _MIB_BLOCKS
    blocks_per_group = _blocks_per_group(least, total_inodes)
    blocks = least + least // 64
    low, high, spare = 0, MAX_BLOCKS, 0
    leap = 2 * _MIB_BLOCKS
    for attempt in range(_ATTEMPTS):
        if blocks >= MAX_BLOCKS:
            raise FilesystemError(f"the image would be {blocks * BLOCK_BYTES >> 40} TiB, the limit is 16 TiB")
        try:
            _mke2fs(image, configuration, parameters, blocks, blocks_per_group, total_inodes, journal_mib)
        except CommandError as error:
            if not any(complaint in error.stderr for complaint in _TOO_SMALL):
                raise
            # Inode tables and journal alone need more, as in a tree of many empty files.
            low = blocks
            if high == MAX_BLOCKS:
                blocks, leap = blocks + leap, 2 * leap
            else:
                blocks = (low + high) // 2
            continue
        counts = read_counts(image)
        # Linux keeps 2 % (at most 4096 blocks) back from statfs (fs/ext4/super.c, ext4_set_resv_clusters).
        surplus = counts.free_blocks - wanted - min(counts.blocks // 50, 4096)
        # Small groups come and go whole, and the journal grows by a MiB: a few sizes are not to be had.
        is_late = attempt >= _ATTEMPTS // 2
        if 0 <= surplus <= (_MIB_BLOCKS if is_late else _TOLERANCE_BLOCKS):
            return counts.blocks
        if surplus < 0:
            low = blocks
        else:
            high, spare = blocks, surplus
        if high - low <= _MIB_BLOCKS:
            # mke2fs drops a last group that holds little more than its own tables, and where it keeps
            # one, the free blocks grow by those of the tables at once: the journal takes the excess.
            journal_mib += spare // _MIB_BLOCKS + (not is_late)
            blocks = high if is_late else high + _MIB_BLOCKS - spare % _MIB_BLOCKS
            low, high, leap = high, MAX_BLOCKS, 2 * _MIB_BLOCKS
            continue
        if counts.blocks < blocks and surplus < 0 and high == MAX_BLOCKS:
            blocks, leap = blocks + leap, 2 * leap
            continue
        blocks += _TOLERANCE_BLOCKS // 4 - surplus
        if not low < blocks < high:
            blocks = (low + high) // 2
    raise FilesystemError(f"no ext4 filesystem of about {blocks} blocks has {wanted} of them free: please report this")


def _blocks_per_group(blocks: int, inodes: int) -> int:
    """Return the size of groups: a tree of many empty files needs more than its blocks would make."""
    size = _BLOCKS_PER_GROUP
    while max(blocks // size, 1) * _MAX_INODES_PER_GROUP < inodes and size > _MIN_BLOCKS_PER_GROUP:
        size //= 2
    return size


def _journal_mib(blocks: int) -> int:
    """Return the journal's size: what mke2fs would choose, up to 64 MiB, by a table of our own."""
    for limit_blocks, size in ((32_768, 4), (262_144, 16), (524_288, 32)):
        if blocks < limit_blocks:
            return size
    return 64


def _mke2fs(
    image: Path,
    configuration: Path,
    parameters: Parameters,
    blocks: int,
    blocks_per_group: int,
    inodes: int,
    journal_mib: int,
) -> None:
    image.unlink(missing_ok=True)
    extended = {
        "hash_seed": str(uuid.UUID(bytes=parameters.hash_seed)),
        "lazy_itable_init": "0",  # zeroed here means that the guest does not do it at its first mount
        "lazy_journal_init": "0",
        "nodiscard": None,
        "root_owner": "0:0",
    }  # in ONE -E: mke2fs keeps only its last
    argv: list[str | Path] = [
        "mke2fs", "-q", "-F", "-t", "ext4",
        "-O", ",".join(["none", *FEATURES]),
        "-b", str(BLOCK_BYTES),
        "-I", "256",
        "-N", str(inodes),
        "-g", str(blocks_per_group),
        "-G", "16",
        "-J", f"size={journal_mib}",
        "-m", "0",
        "-e", "continue",
        "-o", "Linux",
        "-U", str(uuid.UUID(bytes=parameters.uuid)),
        "-E", ",".join(name if value is None else f"{name}={value}" for name, value in extended.items()),
        image,
        str(blocks),
    ]  # fmt: skip
    time = str(parameters.own_time)
    times = {"E2FSPROGS_FAKE_TIME": time, "SOURCE_DATE_EPOCH": time}
    run(argv, env={"MKE2FS_CONFIG": str(configuration), **times})
