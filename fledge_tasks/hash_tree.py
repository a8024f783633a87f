"""The hash tree with which a kernel checks each block of a read-only image when it is read (dm-verity).

It is made and checked by veritysetup, out of plain files and without root. The same image, salt and
UUID make the same file. All numbers that a kernel needs beside the root hash are in its superblock:

    8s signature   4 version   4 hash type   16s UUID   32s algorithm   4 data block size
    4 hash block size   8 data blocks   2 salt size   6 padding   256s salt      (little endian)

Sources: veritysetup(8); cryptsetup wiki, DMVerity, 'Verity superblock format'; Linux,
Documentation/admin-guide/device-mapper/verity.rst and dm-init.rst.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.run import run

BLOCK_BYTES = 4096
ALGORITHM = "sha256"
_HASHES_PER_BLOCK = BLOCK_BYTES // 32
_SECTOR_BYTES = 512
_SUPERBLOCK = struct.Struct("<8sII16s32sIIQH6x256s")
_ROOT_HASH = re.compile(r"^Root hash:\s*([0-9a-f]{64})$", re.MULTILINE)


@dataclass(frozen=True)
class Superblock:
    """What a hash tree says of itself. `salt` is hexadecimal."""

    data_blocks: int
    salt: str


def make(image: Path, tree: Path, *, salt: str, uuid: str) -> str:
    """Make the hash tree of a raw image in the new file `tree`, and return the root hash, in hexadecimal digits.

    `salt` has 64 hexadecimal digits. The image is a whole number of blocks. Raises OSError when the
    disk is full, ToolError, CommandError, FilesystemError; what there is of `tree` is of no use then.
    """
    fd = os.open(tree, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # veritysetup calls a full disk an input/output error, and makes files that only their owner may read.
        os.posix_fallocate(fd, 0, tree_bytes(image.stat().st_size))
    finally:
        os.close(fd)
    printed = run([
        "veritysetup", "format", "--format=1", f"--hash={ALGORITHM}",
        f"--data-block-size={BLOCK_BYTES}", f"--hash-block-size={BLOCK_BYTES}",
        f"--salt={salt}", f"--uuid={uuid}", image, tree,
    ]).decode(errors="replace")  # fmt: skip
    found = _ROOT_HASH.search(printed)
    if found is None:
        raise FilesystemError("veritysetup printed no root hash", hint="please report this with its version")
    # A look at what is cheap to see; each block of the image is for `problems`.
    blocks = -(-image.stat().st_size // BLOCK_BYTES)
    if superblock(tree) != Superblock(blocks, salt) or _top_hash(image, tree, salt) != found[1]:
        raise FilesystemError("veritysetup made no hash tree of this root hash", hint="please report this")
    return found[1]


def _top_hash(image: Path, tree: Path, salt: str) -> str:
    """Return the root hash as it follows from the highest level (verity.rst, 'Hash Tree'); the salt comes first."""
    has_levels = tree.stat().st_size > BLOCK_BYTES
    with (tree if has_levels else image).open("rb") as file:
        file.seek(BLOCK_BYTES if has_levels else 0)
        return hashlib.sha256(bytes.fromhex(salt) + file.read(BLOCK_BYTES)).hexdigest()


def tree_bytes(image_bytes: int) -> int:
    """Return the size of a hash tree: a block with the superblock, then each level of hashes, the highest first."""
    count, blocks = -(-image_bytes // BLOCK_BYTES), 1
    while count > 1:
        count = -(-count // _HASHES_PER_BLOCK)
        blocks += count
    return blocks * BLOCK_BYTES


def problems(image: Path, tree: Path, root_hash: str) -> Iterator[str]:
    """Yield what does not fit between a raw image, its hash tree and the root hash, a line each. Raises ToolError."""
    try:
        run(["veritysetup", "verify", image, tree, root_hash])
    except CommandError as error:
        lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        for line in lines or [error.message]:
            yield f"veritysetup: {line}"


def superblock(tree: Path) -> Superblock:
    """Read the superblock of a tree that `make` made. Raises OSError, FilesystemError."""
    with tree.open("rb") as file:
        data = file.read(_SUPERBLOCK.size)
    if len(data) == _SUPERBLOCK.size:
        signature, version, kind, _, algorithm, *sizes, data_blocks, salt_bytes, salt = _SUPERBLOCK.unpack(data)
        known = b"verity\0\0", 1, 1, ALGORITHM.encode(), [BLOCK_BYTES, BLOCK_BYTES]
        if (signature, version, kind, algorithm.rstrip(b"\0"), sizes) == known and salt_bytes <= len(salt):
            return Superblock(data_blocks, salt[:salt_bytes].hex())
    raise FilesystemError("not a hash tree that fledge made", where=str(tree), hint="run `fledge build`")


def early_device(found: Superblock, root_hash: str, *, image: str, tree: str) -> str:
    """Return the value of the kernel argument `dm-mod.create` that makes /dev/dm-0 of two block devices.

    The kernel must have CONFIG_DM_INIT, and device mapper and dm-verity built in (dm-init.rst).
    """
    sectors = found.data_blocks * (BLOCK_BYTES // _SECTOR_BYTES)
    # Version, devices, block sizes, blocks, where the first level begins, and what it is made with (verity.rst).
    table = (
        f"0 {sectors} verity 1 {image} {tree} {BLOCK_BYTES} {BLOCK_BYTES} {found.data_blocks} 1 "
        f"{ALGORITHM} {root_hash} {found.salt}"
    )
    return f"verity,,0,ro,{table}"
