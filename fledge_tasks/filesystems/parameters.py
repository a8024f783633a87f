"""What a filesystem image is made with, and what comes of it: the same for all types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fledge_tasks.filesystems.sizing import Wanted
from fledge_tasks.filesystems.skeleton import ImageExtent
from fledge_tasks.tree import Inode

_MAX_OWN_TIME = (1 << 31) - 1


@dataclass(frozen=True)
class Parameters:
    """What decides an image's bytes beside its tree.

    `uuid` and `hash_seed` are 16 bytes each; `epoch` is the time, in seconds, of all that has no
    time of its own; `features` are all that the filesystem has, `block_bytes` is None for the type's default.
    Read-only types have a `compression`, 'none' or what their module knows, with its level if it has levels.
    """

    uuid: bytes
    hash_seed: bytes
    epoch: int
    wanted: Wanted
    features: tuple[str, ...]
    label: str = ""
    block_bytes: int | None = None
    compression: str | None = None
    compression_level: int | None = None

    @property
    def own_time(self) -> int:
        """The time of what is in no tree: superblock, journal, reserved inodes.

        It is `epoch` where all versions of e2fsprogs make the same of it: they take 0 for 'look at the
        clock' (fs->now), and write times after 2038 into such inodes in different ways.
        """
        return min(max(self.epoch, 1), _MAX_OWN_TIME)


@dataclass(frozen=True)
class Filled:
    """A filled image: the extents of file data that are in payloads as well, and what is free."""

    extents: list[ImageExtent]
    free_bytes: int
    free_inodes: int


class Make(Protocol):
    """How a backend makes an image."""

    def __call__(
        self, root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path
    ) -> Filled:
        """Make the filesystem in the new, sparse file `image`, in the empty folder `scratch`.

        `payloads` are the files that the tree's sources stand for. File data that is told in the
        result's extents need not be in the image. Raises FilesystemError when the type cannot hold
        the tree, ToolError, CommandError, OSError; `image` is of no use then.
        """
