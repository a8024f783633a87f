"""qcow2 disks: made of raw images by qemu-img, and turned back into them.

The same raw image gives the same file, however it lies on the disk: clusters are written in order,
and of a cluster only its content decides whether it is there. All that a newer qemu-img might choose
otherwise is said. Its version is key material all the same, and that of its libraries, which
compress, is not known: what is the same everywhere is the raw image.

Format: QEMU, docs/interop/qcow2.txt. Options: qemu-img(1).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.run import run

MAGIC = b"QFI\xfb"
_OPTIONS = "compat=1.1,cluster_size=65536,preallocation=off,lazy_refcounts=off,refcount_bits=16,extended_l2=off"
# magic, version, backing_file_offset; size at byte 24, incompatible_features at byte 72
_HEADER = struct.Struct(">4sIQ8xQ40xQ")
_EXTERNAL_DATA = 1 << 2


def convert(raw: Path, target: Path, compression: str | None) -> None:
    """Make the qcow2 file `target` of a raw image; its clusters are compressed with `zlib` or `zstd`, or not.

    Raises OSError when the disk is full, ToolError, CommandError, FilesystemError when `target` is not what
    it should be; what there is of it is of no use then.
    """
    compressed = ["-c"] if compression else []
    options = _OPTIONS + (f",compression_type={compression}" if compression else "")
    _run("convert", *compressed, "-S", "4k", "-f", "raw", "-O", "qcow2", "-o", options, raw, target)
    try:
        wrong = next(problems(target), None)
        if wrong is None and (size := virtual_size(target)) != raw.stat().st_size:
            wrong = f"the qcow2 has {size} bytes, and should have {raw.stat().st_size}"
    except FileNotFoundError:
        wrong = "there is no qcow2"
    if wrong:
        raise FilesystemError(
            f"qemu-img says that it made a qcow2, but {wrong}", hint="see that it is the real qemu-img"
        )


def expand(image: Path, target: Path) -> None:
    """Make the raw image `target` of a qcow2 file in which `problems` finds none. Raises as `convert`."""
    _run("convert", "-S", "4k", "-f", "qcow2", "-O", "raw", image, target)


def is_qcow2(image: Path) -> bool:
    """Tell whether a file says that it is a qcow2. Raises OSError."""
    with image.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def virtual_size(image: Path) -> int:
    """Return how many bytes a disk shows in a qcow2 file in which `problems` finds none. Raises OSError."""
    with image.open("rb") as file:
        return int(_HEADER.unpack(file.read(_HEADER.size))[3])


def problems(image: Path) -> Iterator[str]:
    """Yield what is wrong with a qcow2 file by itself, a line each. Raises OSError, ToolError.

    A file that names others is refused before any program opens it: it could name any of the host.
    """
    with image.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        yield "the qcow2 header is cut short"
        return
    magic, version, backing, _, features = _HEADER.unpack(header)
    if magic != MAGIC:
        yield "it does not begin as a qcow2"
        return
    if backing or (version >= 3 and features & _EXTERNAL_DATA):
        yield "the qcow2 refers to another file, and should hold all of its data"
        return
    try:
        run(["qemu-img", "check", "-f", "qcow2", image])
    except CommandError as error:
        lines = (error.output.decode(errors="replace") + error.stderr).splitlines()
        for line in [line.strip() for line in lines if line.strip()] or [error.message]:
            yield f"qemu-img: {line}"


def _run(*arguments: str | Path) -> None:
    try:
        run(["qemu-img", *arguments])
    except CommandError as error:
        if os.strerror(errno.ENOSPC) in error.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
        raise
