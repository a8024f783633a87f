"""btrfs images: one device, one copy of everything, features that Linux 5.10 mounts."""

from __future__ import annotations

import contextlib
import mmap
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Mapping
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems import loopmount, mounted
from fledge_tasks.filesystems.loopmount import Mount
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import MIB, btrfs_bytes
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry
from fledge_tasks.run import run
from fledge_tasks.tools import MKFS_BTRFS
from fledge_tasks.tree import Inode, show, walk

MIN_BYTES = OPTIONS["btrfs"].min_mb * MIB

# Its tools refuse a UUID that libblkid knows of another device, or remembers of one: that may well be this image.
NO_OTHER_DEVICES = {"BLKID_FILE": "/dev/null/none"}

_NODE_BYTES = 16_384  # mkfs.btrfs's own choice, or a page where that is larger
# An attribute is one item: struct btrfs_header, btrfs_item, btrfs_dir_item (BTRFS_MAX_XATTR_SIZE in fs/btrfs/ctree.h).
_AROUND_XATTR_BYTES = 101 + 25 + 30

_CHUNK = re.compile(r"CHUNK_ITEM (\d+)\).*?length (\d+).*?stripe 0 devid 1 offset (\d+)", re.DOTALL)


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says. Not the same bytes each time: Linux writes its own times.

    Small files get blocks of their own, as in other types, so that they can be shared. While it is
    being filled it has twice the room: where there is little, Linux writes metadata out again and
    again, and takes nine times as long.
    """
    for path, inode in walk(root):
        # Linux says of it what it says of a filesystem that is full.
        if reason := refusal(inode.entry, parameters):
            raise FilesystemError(reason, where=show(path), hint="choose xfs, which holds 64 KiB, or erofs")
    kind = mounted.Type(
        "btrfs", mkfs, "max_inline=0,nodiscard", MIN_BYTES, True, btrfs_bytes, 0, _translate, _settle, _resize, _finish
    )
    return mounted.make(kind, root, parameters, payloads, image, scratch)


def refusal(entry: Entry, parameters: Parameters) -> str | None:
    """Return why btrfs cannot hold an entry, None if it can."""
    most = _node_bytes(parameters) - _AROUND_XATTR_BYTES
    for name, value in entry.xattrs.items():
        if len(name) + len(value) > most:
            shown = name.decode(errors="backslashreplace")
            return f"has the extended attribute {shown} of {len(name) + len(value)} bytes, and btrfs holds {most}"
    return None


def mkfs(
    image: Path,
    parameters: Parameters,
    *more: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Make a filesystem in a file of the image's size, which has no UUID of ours yet; `more` are options.

    Raises ToolError, CommandError.
    """
    wanted = set(parameters.features)

    def words(*names: str) -> str:
        return ",".join(name if name in wanted else f"^{name}" for name in names)

    # Before 6.3 not all features have a name; since 6.19 there is one by default that Linux 5.10 does not know.
    if MKFS_BTRFS.numbers() < (6, 3):
        features = ["-O", words("no-holes"), "-R", words("free-space-tree")]
    else:
        features = ["-O", words("no-holes", "free-space-tree", "block-group-tree")]
    mixed = ["-M", "-n", str(BLOCK_BYTES)] if "mixed-bg" in wanted else []
    label = ["-L", parameters.label] if parameters.label else []
    options = ["-q", "-f", "--nodiscard", "-s", str(BLOCK_BYTES), "-m", "single", "-d", "single"]
    run(["mkfs.btrfs", *options, *features, *mixed, *label, *more, image], env=env, cwd=cwd)


def _node_bytes(parameters: Parameters) -> int:
    return BLOCK_BYTES if "mixed-bg" in parameters.features else max(_NODE_BYTES, mmap.PAGESIZE)


def _settle(mount: Mount) -> None:
    # The kernel's cleaner takes block groups away that have become empty, some time after a mount; while it is at
    # one, the space in it is not counted as free. None are left to it, here or in the guest.
    with contextlib.suppress(CommandError):  # where not even what that takes is free
        run(["btrfs", "balance", "start", "-dusage=0", "-musage=0", mount.at])


def _resize(mount: Mount, old: int, new: int) -> bool:
    if new > old:
        mount.grow(new)
    resize: list[str | Path] = ["btrfs", "filesystem", "resize", str(new), mount.at]
    try:
        run(resize)
    except CommandError:
        if new > old:
            raise
        try:
            # What is at its end lies in chunks too large to find room elsewhere: new ones are smaller.
            run(["btrfs", "balance", "start", "-dusage=100", mount.at])
            run(resize)
        except CommandError:
            return False
    return True


def _finish(image: Path, parameters: Parameters) -> None:
    # Last: while it was mounted it had a UUID of its own, since Linux takes two devices of one UUID for
    # one filesystem, and somebody may have mounted an image of the same content.
    loopmount.hide_devices()
    run(["btrfstune", "-f", "-U", str(uuid.UUID(bytes=parameters.uuid)), image], env=NO_OTHER_DEVICES)


def _translate(image: Path) -> Callable[[int], int | None]:
    """Return what finds the byte of the image for a logical address: by the chunk tree, one stripe per chunk."""
    text = run(["btrfs", "inspect-internal", "dump-tree", "-t", "chunk", image]).decode(errors="replace")
    chunks = sorted((int(start), int(length), int(offset)) for start, length, offset in _CHUNK.findall(text))
    if not chunks:
        raise FilesystemError("btrfs does not tell where its chunks are")
    starts = [start for start, _, _ in chunks]

    def translate(address: int) -> int | None:
        at = bisect_right(starts, address) - 1
        if at < 0 or address >= chunks[at][0] + chunks[at][1]:
            return None
        return chunks[at][2] + address - chunks[at][0]

    return translate
