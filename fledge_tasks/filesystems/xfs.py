"""xfs images. Features are a fixed set that Linux 5.10 mounts; those of later mkfs.xfs are not asked for."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from fledge_tasks.filesystems import mounted
from fledge_tasks.filesystems.loopmount import Mount
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import MIB, XFS_INODE_BYTES, xfs_bytes
from fledge_tasks.oci.layer_index import BLOCK_BYTES
from fledge_tasks.run import run
from fledge_tasks.tools import MKFS_XFS
from fledge_tasks.tree import Inode

MIN_BYTES = OPTIONS["xfs"].min_mb * MIB


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says. Not the same bytes each time: Linux writes its own times."""
    kind = mounted.Type(
        "xfs", mkfs, "nouuid", MIN_BYTES, False, xfs_bytes, XFS_INODE_BYTES,
        _translate, lambda _: None, _resize, lambda *_: None,
    )  # fmt: skip
    return mounted.make(kind, root, parameters, payloads, image, scratch)


def mkfs(
    image: Path,
    parameters: Parameters,
    *more: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Make a filesystem in a file of the image's size; `more` are options. Raises ToolError, CommandError."""
    names = (*OPTIONS["xfs"].default, *OPTIONS["xfs"].addable)
    features = {name: f"{name}={int(name in parameters.features)}" for name in names}
    metadata = ["crc=1", *(features[name] for name in names if name != "sparse")]
    version = MKFS_XFS.numbers()
    # What newer ones do if they are not told otherwise: Linux 5.19 and 6.10 brought it.
    inodes = ",nrext64=0" * (version >= (6, 5)) + ",exchange=0" * (version >= (6, 10))
    parents = ",parent=0" * (version >= (6, 10))
    options = [
        "-b", f"size={parameters.block_bytes or BLOCK_BYTES}",
        "-m", ",".join([*metadata, f"uuid={uuid.UUID(bytes=parameters.uuid)}"]),
        "-i", f"size={XFS_INODE_BYTES},{features['sparse']},maxpct=50{inodes}",
        "-n", f"ftype=1{parents}",
        *(["-L", parameters.label] if parameters.label else []),
    ]  # fmt: skip
    run(["mkfs.xfs", "-q", "-f", "-K", *options, *more, image], env=env, cwd=cwd)


def _resize(mount: Mount, old: int, new: int) -> bool:
    if new < old:
        return False
    mount.grow(new)
    run(["xfs_growfs", "-d", mount.at])
    return True


def _translate(image: Path) -> Callable[[int], int | None]:
    del image  # FIEMAP tells bytes of the device
    return lambda address: address
