"""Does a finished image hold what it should? Read back, and compared entry by entry.

The image is read as others read it: ext4 by e2fsck and through libext2fs; xfs and btrfs, as root, by
their own checkers and by Linux; squashfs and erofs by readers of our own, which share nothing with what made
them; of a qcow2 what qemu-img makes of it. What it should hold is the merged tree of its layers, whose file
data is in the payloads. What is wrong with an image is a value here, never an error; that a type cannot be read
here, since this process may not mount, is a MountError.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fledge_tasks import hash_tree, qcow2
from fledge_tasks.digest import sha256_file
from fledge_tasks.errors import CommandError, FilesystemError, MountError
from fledge_tasks.filesystems import (
    comparison,
    erofs_read,
    ext4,
    ext4_inode,
    ext4_read,
    mounted_read,
    squashfs,
    squashfs_read,
)
from fledge_tasks.filesystems.comparison import Difference, FoundImage, shown
from fledge_tasks.filesystems.ext4_read import Found
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.fsutil import opened
from fledge_tasks.manifest import RAW_CHECKSUM, ROOT_HASH
from fledge_tasks.oci.layer_index import Kind
from fledge_tasks.run import run
from fledge_tasks.tools import FSCK_EROFS
from fledge_tasks.tree import Inode

_CHUNK_BLOCKS = 256
_NOTHING = re.compile(r"(?!)")
_CHATTER = {
    "ext4": re.compile(
        r"^Pass \d|^e2fsck \d|Filesystem still has errors|\d+/\d+ files|^The superblock could not be read|"
        r"^filesystem[. ]|^is corrupt, and|^ *or$|e2fsck -b \d"
    ),
    "xfs": re.compile(
        r"^Phase \d|^- |^No modify flag set|^Cannot get host filesystem geometry|^Repair may fail if there is a sector|"
        r"^the image and the host filesystem"
    ),
    "btrfs": re.compile(
        r"^\[\d+/\d+\] |^(Opening|Checking) filesystem |^UUID: |^found \d+ bytes used|^total [a-z ]+ bytes: |"
        r"^btree space waste bytes: |^file data blocks allocated: |^referenced \d"
    ),
}
"""What checkers say that is no difference."""

_CHECKERS = {
    "ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n", "-f"), "btrfs": ("btrfs", "check", "--readonly"),
    "erofs": ("fsck.erofs",),
}  # fmt: skip
_TIMES: dict[str, Callable[[int], int]] = {"squashfs": squashfs.clamped, "erofs": int, "ext4": ext4_inode.clamped}
"""What types make of nanoseconds, those that are mounted aside."""


def check_disk(image: Path) -> Iterator[Difference]:
    """Yield what is wrong with the format of an image file. Raises OSError, ToolError."""
    if qcow2.is_qcow2(image):
        for problem in qcow2.problems(image):
            yield Difference("", problem)


@contextmanager
def raw_of(image: Path) -> Iterator[Path]:
    """Yield an image file in which `check_disk` finds nothing in its raw form: itself, or a temporary file.

    That is made in TMPDIR, else in /var/tmp. Raises OSError, CommandError.
    """
    if not qcow2.is_qcow2(image):
        yield image
        return
    place = os.environ.get("TMPDIR") or "/var/tmp"
    with TemporaryDirectory(prefix="fledge-verify-", dir=place) as folder:
        raw = Path(folder) / "raw"
        qcow2.expand(image, raw)
        yield raw


def check_manifest(image: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what a manifest says otherwise of an image file. Raises OSError when the image cannot be read."""
    try:
        checksum = json.loads(manifest.read_bytes())["rootfs"]["checksum"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        yield Difference("", f"{manifest} is no manifest of an image: {type(error).__name__}: {error}")
        return
    if checksum != (found := sha256_file(image)):
        yield Difference("", f"the checksum is {found}, and should be {checksum}, says {manifest}")


def check_raw(raw: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what a manifest says otherwise of the raw image that a disk of another format holds. Raises OSError."""
    checksum = label(manifest, RAW_CHECKSUM)
    if checksum is not None and checksum != (found := sha256_file(raw)):
        yield Difference("", f"the raw image's checksum is {found}, and should be {checksum}, says {manifest}")


def check_tree(raw: Path, tree: Path, manifest: Path) -> Iterator[Difference]:
    """Yield what does not fit between a raw image, its hash tree and the root hash in a manifest, if that has one.

    Raises OSError, ToolError.
    """
    root_hash = label(manifest, ROOT_HASH)
    if root_hash is None:
        return
    if not tree.is_file():
        yield Difference("", f"there is no hash tree {tree}, and {manifest} has its root hash")
        return
    for problem in hash_tree.problems(raw, tree, root_hash):
        yield Difference("", f"{tree.name}: {problem}")


def label(manifest: Path, name: str) -> str | None:
    """Return a label of a manifest, None if there is no such manifest or label."""
    try:
        value = json.loads(manifest.read_bytes())["labels"][name]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return value if isinstance(value, str) else None


def check_structure(image: Path, kind: str = "ext4") -> Iterator[Difference]:
    """Yield what the checker of a type of filesystem finds wrong. Raises ToolError when it is not installed.

    squashfs has none, and that of erofs is a second opinion, where it is installed: our readers look at everything.
    """
    if kind == "squashfs" or (kind == "erofs" and FSCK_EROFS.path is None):
        return
    checker = _CHECKERS[kind]
    try:
        run([*checker, f"./{image.name}"], cwd=image.parent)  # e2fsck takes what follows a '?' in folders for options
    except CommandError as error:
        lines = (error.output.decode(errors="replace") + error.stderr).splitlines()
        chatter = _CHATTER.get(kind, _NOTHING)
        found = [line.strip() for line in lines if line.strip() and not chatter.search(line.strip())]
        for line in found or [error.message]:
            yield Difference("", f"{checker[0]}: {line}")


def compare_tree(
    image: Path, root: Inode, payloads: Mapping[int, Path], epoch: int, kind: str = "ext4"
) -> Iterator[Difference]:
    """Yield each difference between an image and the tree that it was made from.

    `payloads` are the files that the tree's sources stand for, `epoch` what the image was made with.
    Compared: names, types, modes, owners, times of change, sizes, content, targets, device numbers,
    extended attributes, and which names share an inode. Raises OSError, MountError.
    """
    if kind == "ext4":
        ext4.add_lost_found(root, epoch)
    with ExitStack() as stack:
        try:
            found = stack.enter_context(_opened(image, kind))
        except MountError:
            raise
        except FilesystemError as error:
            yield Difference("", str(error))
            return
        sources = stack.enter_context(opened(payloads))
        yield from comparison.compare(found, root, sources, _TIMES.get(kind) or mounted_read.clamping(image, kind))


def _opened(image: Path, kind: str) -> AbstractContextManager[FoundImage]:
    match kind:
        case "ext4":
            return ext4_read.opened(image)
        case "squashfs":
            return squashfs_read.opened(image)
        case "erofs":
            return erofs_read.opened(image)
        case _:
            return mounted_read.opened(image, kind)


def read_all(image: Path, kind: str = "ext4") -> Iterator[Difference]:
    """Yield what cannot be read of an image of which no more is known. Raises OSError, MountError.

    The data of files are looked at where nothing but reading them shows whether they are whole.
    """
    try:
        with _opened(image, kind) as found:
            yield from _read_all(found, with_data=OPTIONS[kind].is_read_only)
    except MountError:
        raise
    except FilesystemError as error:
        yield Difference("", str(error))


def _read_all(image: FoundImage, *, with_data: bool) -> Iterator[Difference]:
    seen = {image.root}
    pending = [(b"", image.root)]
    while pending:
        path, number = pending.pop()
        try:
            names = image.names(number)
        except FilesystemError as error:
            yield Difference(shown(path), f"its names cannot be read: {error}")
            continue
        for name, (below, kind) in sorted(names.items()):
            if below in seen:
                continue
            seen.add(below)
            try:
                inode = image.inode(below)
                if with_data:
                    _read_data(image, inode)
            except FilesystemError as error:
                yield Difference(shown(path + b"/" + name), f"cannot be read: {error}")
            if kind is Kind.DIRECTORY:
                pending.append((path + b"/" + name, below))


def _read_data(image: FoundImage, inode: Found) -> None:
    for extent in inode.extents:
        end = extent.logical + extent.count
        for start in range(extent.logical, end, _CHUNK_BLOCKS):
            image.blocks(inode, extent, start, min(_CHUNK_BLOCKS, end - start))
