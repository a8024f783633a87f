"""xfs images. Features are a fixed set that Linux 5.10 mounts; those of later mkfs.xfs are not asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from fledge_tasks.filesystems import mounted
from fledge_tasks.filesystems.loopmount import Mount
from fledge_tasks.filesystems.mounted import Content
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from fledge_tasks.run import run
from fledge_tasks.tree import Inode

MIN_BYTES = 300 << 20
"""What mkfs.xfs makes at least since xfsprogs 5.19."""

_INODE_BYTES = 512


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says. Not the same bytes each time: Linux writes its own times."""
    kind = mounted.Type("xfs", _mkfs, "nouuid", MIN_BYTES, False, estimate, _translate, _resize, lambda *_: None)
    return mounted.make(kind, root, parameters, payloads, image, scratch)


def estimate(content: Content) -> int:
    """Return the bytes that a tree takes: data, inodes by chunks of 64, names and attributes in blocks half full."""
    inodes = -(-content.inodes // 64) * 64 * _INODE_BYTES
    trees = (content.runs + content.inodes // 64) * 32
    return content.blocks * BLOCK_BYTES + inodes + 2 * (content.name_bytes + content.xattr_bytes) + trees


def _mkfs(image: Path, parameters: Parameters) -> None:
    identity = uuid.UUID(bytes=parameters.uuid)
    run([
        "mkfs.xfs", "-q", "-f", "-K",
        "-b", f"size={BLOCK_BYTES}",
        "-m", f"crc=1,finobt=1,inobtcount=1,bigtime=1,reflink=1,rmapbt=0,uuid={identity}",
        "-i", f"size={_INODE_BYTES},sparse=1,maxpct=50",
        "-n", "ftype=1",
        image,
    ])  # fmt: skip


def _resize(mount: Mount, old: int, new: int) -> bool:
    if new < old:
        return False
    mount.grow(new)
    run(["xfs_growfs", "-d", mount.at])
    return True


def _translate(image: Path) -> Callable[[int], int | None]:
    del image  # FIEMAP tells bytes of the device
    return lambda address: address
