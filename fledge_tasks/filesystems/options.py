"""What `[filesystem]` may ask for, type by type, such that Linux 5.10 guests mount the result. Pure.

Each type is made with a fixed set of features. One of its set may be left out (`"^name"`), one of
the others added (`"name"`); what came to Linux later than 5.10, or what our writers cannot fill, is
in no list. Sources: mke2fs(8), ext4(5), mkfs.xfs(8), mkfs.btrfs(8), btrfs(5), and fs/*/ of Linux 5.10.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What a type has.

    label_bytes    the longest label, in bytes of UTF-8
    min_mb         the smallest image, in MiB
    block_sizes    of which the last is the default; guests with pages of 4096 bytes mount all of them
    default        features that an image has unless they are left out
    removable      those of them that may be left out
    addable        other features that may be added
    needs          a word of `feature_words`, another one that it needs, and why
    has_ratio      whether the number of inodes is fixed when the filesystem is made
    compressions   of a read-only type, the default first: least, most and default level, None for no levels
    """

    label_bytes: int
    min_mb: int
    block_sizes: tuple[int, ...]
    default: tuple[str, ...]
    removable: tuple[str, ...]
    addable: tuple[str, ...]
    needs: tuple[tuple[str, str, str], ...] = ()
    has_ratio: bool = False
    compressions: Mapping[str, tuple[int, int, int] | None] = dataclasses.field(default_factory=dict)

    @property
    def is_read_only(self) -> bool:
        """Whether there is nothing to be free in it."""
        return bool(self.compressions)

    def feature_words(self) -> tuple[str, ...]:
        """Return all that `features` may hold."""
        return (*self.addable, *(f"^{name}" for name in self.removable))

    def features(self, words: Iterable[str]) -> list[str]:
        """Return the features of an image, in a fixed order."""
        chosen = set(words)
        kept = [name for name in self.default if f"^{name}" not in chosen]
        return kept + [name for name in self.addable if name in chosen]


OPTIONS = {
    "ext4": Options(
        label_bytes=16,
        min_mb=1,
        # File data lies in the image as the blocks of 4096 bytes that the cache has of it.
        block_sizes=(4096,),
        default=(
            "has_journal", "ext_attr", "resize_inode", "dir_index", "filetype", "extent", "64bit", "flex_bg",
            "sparse_super", "large_file", "huge_file", "dir_nlink", "extra_isize", "metadata_csum",
        ),
        removable=("has_journal", "resize_inode"),
        addable=("encrypt", "large_dir", "metadata_csum_seed", "stable_inodes", "verity"),
        has_ratio=True,
    ),
    "xfs": Options(
        label_bytes=12,
        min_mb=300,
        block_sizes=(1024, 2048, 4096),
        default=("finobt", "inobtcount", "bigtime", "reflink", "sparse"),
        removable=("finobt", "inobtcount", "bigtime", "reflink", "sparse"),
        addable=("rmapbt",),
        needs=(("^finobt", "^inobtcount", "which counts what finobt holds"),),
    ),
    "btrfs": Options(
        label_bytes=255,
        min_mb=109,
        block_sizes=(4096,),
        default=("extref", "skinny-metadata", "no-holes", "free-space-tree"),
        removable=("no-holes", "free-space-tree"),
        addable=("mixed-bg",),
    ),
    "squashfs": Options(
        label_bytes=0,
        min_mb=0,
        block_sizes=(4096, 8192, 16384, 32768, 65536, 262_144, 524_288, 1_048_576, 131_072),
        default=(),
        removable=(),
        addable=(),
        compressions={
            "zstd": (1, 22, 3), "gzip": (1, 9, 6), "lzo": (1, 9, 8), "xz": None, "lz4": None, "none": None,
        },
    ),
    "erofs": Options(
        label_bytes=15,
        min_mb=0,
        block_sizes=(4096,),
        default=(),
        removable=(),
        addable=(),
        compressions={"none": None, "lz4": None, "lz4hc": (1, 12, 9)},
    ),
}  # fmt: skip
"""By type. mkfs.xfs makes nothing smaller since 5.19, mkfs.btrfs since 6.2."""
