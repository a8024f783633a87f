"""How large an ext4 filesystem must be, and making it empty at that size with mke2fs.

What the filesystem itself takes (bitmaps, inode tables, journal, copies of the superblock) is not
modelled: mke2fs makes a sparse file in a few milliseconds, so it is asked, by making it and
reading the superblock, and made again with what was missing or too much.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems.ext4_inode import BLOCK_BYTES
from fledge_tasks.filesystems.parameters import Parameters
from fledge_tasks.filesystems.sizing import (
    EXT4_MIN_JOURNAL_BLOCKS,
    MIB,
    Ext4Layout,
    Wanted,
    ext4_free_blocks,
    ext4_layout,
    too_small,
    whole_mib,
)
from fledge_tasks.run import run

MAX_BLOCKS = 1 << 32
_CONFIGURATION = "[defaults]\n\tblocksize = 4096\n[fs_types]\n\text4 = {\n\t}\n"
_TOLERANCE_BLOCKS = 64
_MIB_BLOCKS = 256
_ATTEMPTS = 64
_TOO_SMALL = (
    "requested number of inodes",
    "could not allocate block",
    "journal size too big",
    "not enough space",
    "inodes_count",
)


@dataclass(frozen=True)
class Counts:
    """Counters of a superblock."""

    blocks: int
    free_blocks: int
    inodes: int
    free_inodes: int


def read_counts(image: Path) -> Counts:
    """Read the counters of the first superblock ('The Super Block', Linux ext4 documentation).

    Raises FilesystemError when there is none.
    """
    data = b""
    with contextlib.suppress(FileNotFoundError), image.open("rb") as file:
        file.seek(1024)
        data = file.read(1024)
    if len(data) < 1024 or data[0x38:0x3A] != b"\x53\xef":
        raise FilesystemError("mke2fs says that it made a filesystem, but there is none")
    inodes, blocks, _, free, free_inodes = struct.unpack_from("<IIIII", data)
    blocks_high, _, free_high = struct.unpack_from("<III", data, 0x150)
    return Counts(blocks_high << 32 | blocks, free_high << 32 | free, inodes, free_inodes)


def create(image: Path, scratch: Path, parameters: Parameters, *, needed_blocks: int, inodes: int) -> int:
    """Make an empty filesystem that has `needed_blocks` and the buffer free; return its blocks.

    At most 256 KiB more than that is free, 1 MiB with rare trees of many empty files; all of the
    rest, when the size is fixed. `inodes` are those that will be used, see `sizing.ext4_layout`.
    Raises FilesystemError when ext4 has no such size, or a fixed one is too small.
    """
    configuration = scratch / "mke2fs.conf"
    configuration.write_text(_CONFIGURATION)
    maker = _Maker(image, configuration, parameters, needed_blocks, inodes)
    return maker.search(parameters.wanted) if parameters.wanted.size_bytes is None else maker.fixed(parameters.wanted)


class _Maker:
    """Makes filesystems for one tree, each in place of the one before."""

    def __init__(
        self, image: Path, configuration: Path, parameters: Parameters, needed_blocks: int, inodes: int
    ) -> None:
        self._image = image
        self._configuration = configuration
        self._parameters = parameters
        self._needed_blocks = needed_blocks
        self._inodes = inodes
        self._has_journal = "has_journal" in parameters.features

    def fixed(self, wanted: Wanted) -> int:
        """Make one of a fixed size, with all that a larger one would have if there is room for it."""
        assert wanted.size_bytes is not None
        for each in (wanted, replace(wanted, shrink=True)):
            if (blocks := self._try(each)) is not None:
                return blocks
        least = self.search(replace(wanted, size_bytes=None, shrink=True)) * BLOCK_BYTES
        size = max(whole_mib(least), wanted.size_bytes + MIB)
        while self._try(replace(wanted, size_bytes=size, shrink=True)) is None:
            size += MIB  # a few sizes are not to be had, and have less free than smaller ones
        raise too_small(wanted, size)

    def _try(self, wanted: Wanted) -> int | None:
        assert wanted.size_bytes is not None
        layout, blocks = self._layout(wanted), wanted.size_bytes // BLOCK_BYTES
        if self._has_journal and blocks < EXT4_MIN_JOURNAL_BLOCKS:
            return None
        try:
            self._mke2fs(layout, blocks, layout.journal_mib)
        except CommandError as error:
            if not _is_too_small(error):
                raise
            return None
        os.truncate(self._image, wanted.size_bytes)  # mke2fs leaves out a last group of little more than its tables
        counts = read_counts(self._image)
        return counts.blocks if _surplus(counts, layout) >= 0 else None

    def search(self, wanted: Wanted) -> int:
        """Make one of the size that is needed."""
        layout = self._layout(wanted)
        tolerance = 0 if wanted.shrink else _TOLERANCE_BLOCKS
        journal_mib, least = layout.journal_mib, layout.least_blocks
        blocks = least + least // 64
        low, high, spare = 0, MAX_BLOCKS, 0
        leap = 2 * _MIB_BLOCKS
        for attempt in range(_ATTEMPTS):
            if blocks >= MAX_BLOCKS:
                raise FilesystemError(f"the image would be {blocks * BLOCK_BYTES >> 40} TiB, the limit is 16 TiB")
            try:
                self._mke2fs(layout, blocks, journal_mib)
            except CommandError as error:
                if not _is_too_small(error):
                    raise
                # Inode tables and journal alone need more, as in a tree of many empty files.
                low = blocks
                if high == MAX_BLOCKS:
                    blocks, leap = blocks + leap, 2 * leap
                else:
                    blocks = (low + high) // 2
                continue
            counts = read_counts(self._image)
            surplus = _surplus(counts, layout)
            # Small groups come and go whole, and the journal grows by a MiB: a few sizes are not to be had.
            is_late = attempt >= _ATTEMPTS // 2
            if 0 <= surplus <= (_MIB_BLOCKS if is_late else tolerance):
                return counts.blocks
            if surplus < 0:
                low = blocks
            else:
                high, spare = blocks, surplus
            if high - low <= _MIB_BLOCKS and self._has_journal:
                # mke2fs drops a last group that holds little more than its own tables, and where it keeps
                # one, the free blocks grow by those of the tables at once: the journal takes the excess.
                journal_mib += spare // _MIB_BLOCKS + (not is_late)
                blocks = high if is_late else high + _MIB_BLOCKS - spare % _MIB_BLOCKS
                low, high, leap = high, MAX_BLOCKS, 2 * _MIB_BLOCKS
                continue
            if counts.blocks < blocks and surplus < 0 and high == MAX_BLOCKS:
                blocks, leap = blocks + leap, 2 * leap
                continue
            blocks += tolerance // 4 - surplus
            if not low < blocks < high:
                blocks = (low + high) // 2
        wanted_blocks = layout.wanted_blocks
        raise FilesystemError(
            f"no ext4 filesystem of about {blocks} blocks has {wanted_blocks} of them free: please report this"
        )

    def _layout(self, wanted: Wanted) -> Ext4Layout:
        return ext4_layout(
            wanted, needed_blocks=self._needed_blocks, inodes=self._inodes, has_journal=self._has_journal
        )

    def _mke2fs(self, layout: Ext4Layout, blocks: int, journal_mib: int) -> None:
        _mke2fs(self._image, self._configuration, self._parameters, layout, blocks, journal_mib)


def _surplus(counts: Counts, layout: Ext4Layout) -> int:
    return ext4_free_blocks(counts.blocks, counts.free_blocks) - layout.wanted_blocks


def _is_too_small(error: CommandError) -> bool:
    return any(complaint in error.stderr.lower() for complaint in _TOO_SMALL)


def _mke2fs(
    image: Path, configuration: Path, parameters: Parameters, layout: Ext4Layout, blocks: int, journal_mib: int
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
        "-O", ",".join(["none", *parameters.features]),
        "-b", str(BLOCK_BYTES),
        "-I", "256",
        "-N", str(layout.inodes),
        "-g", str(layout.blocks_per_group),
        "-G", "16",
        *(["-J", f"size={journal_mib}"] if journal_mib else []),
        *(["-L", parameters.label] if parameters.label else []),
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
