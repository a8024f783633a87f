"""Files on the host: publishing them whole or not at all, and copying ranges without reading them.

The only module that renames anything into its final place. The order is always: write a temporary
sibling, fsync it, rename, fsync the folder. A crash at any point leaves the old state or the new
one, and at most a temporary sibling, which `remove_stale` deletes for the next owner of the name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from fledge_tasks.errors import StoreError
from fledge_tasks.interrupt import finish

_K = TypeVar("_K")

TEMP_PREFIX = ".fledge-tmp-"
_FICLONERANGE = 0x4020940D
_FALLBACK = {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EPERM, errno.ETXTBSY}
_COPY_BYTES = 1 << 20
_sync_file_range = ctypes.CDLL(None).sync_file_range
_KERNEL_COPY_BYTES = 1 << 25  # one call cannot be interrupted by a Python signal handler

CRASH_LOG = os.environ.get("FLEDGE_CRASH_LOG")
CRASH_AT = int(os.environ.get("FLEDGE_CRASH_AT", "0"))


def crash_point(name: str) -> None:
    """Name a moment between two steps at which a crash must do no harm; tests make one there.

    With FLEDGE_CRASH_LOG each process appends the name to that file, as one line. Whoever writes line
    FLEDGE_CRASH_AT kills its process group.
    """
    if CRASH_LOG is not None:
        _pass_crash_point(CRASH_LOG, name)


def _pass_crash_point(log: str, name: str) -> None:
    fd = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # so that the count is that of our line
        os.write(fd, f"{name}\n".encode())
        count = os.pread(fd, os.fstat(fd).st_size, 0).count(b"\n")
    finally:
        os.close(fd)
    if count == CRASH_AT:
        crash()


def crash() -> None:
    """End this process and all that it started in its process group, without a chance to tidy up."""
    os.killpg(0, signal.SIGKILL)


def temp_sibling(target: Path) -> Path:
    """Return a new name beside `target`. Nothing is created."""
    return target.parent / f"{TEMP_PREFIX}{target.name}.{secrets.token_hex(6)}"


def remove_stale(target: Path) -> None:
    """Delete what crashed writers of `target` left. The caller must be its only writer now."""
    prefix = f"{TEMP_PREFIX}{target.name}."
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(target.parent):
            # 'rootfs' does not own what 'rootfs.img' left: the rest of the name is the random part alone.
            if entry.name.startswith(prefix) and "." not in entry.name[len(prefix) :]:
                remove_tree(Path(entry.path))


def temp_name(parent: Path, name: str) -> Path:
    """Return the new path `<name>.<random>` in `parent`. Nothing is created."""
    return parent / f"{name}.{secrets.token_hex(6)}"


def temp_folder(parent: Path, name: str) -> Path:
    """Make and return a new folder `<name>.<random>` in `parent`."""
    folder = temp_name(parent, name)
    folder.mkdir(parents=True)
    return folder


def stale_below(parent: Path, name: str) -> list[Path]:
    """Return what is there under a `temp_name` of `name`. The caller must be its only user now, and may delete it."""
    with contextlib.suppress(FileNotFoundError):
        return [Path(entry.path) for entry in os.scandir(parent) if entry.name.startswith(f"{name}.")]
    return []


def move(source: Path, target: Path) -> None:
    """Rename a file or folder inside one filesystem. Not durable: into and out of temporary folders."""
    os.rename(source, target)


def set_aside(folder: Path, target: Path) -> None:
    """Rename a folder out of the way, replacing what was set aside under that name before."""
    remove_tree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(folder, target)
    crash_point("set aside: renamed")


def remove_tree(path: Path) -> None:
    """Delete a file or folder if it is there. Idempotent; a signal is raised when all is gone."""

    def remove() -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    finish(remove)


@contextlib.contextmanager
def replacing(target: Path, mode: int = 0o644, *, durable: bool = True) -> Iterator[int]:
    """Yield the descriptor of a new file that takes the place of `target` when the block ends well.

    Atomic: on any exception `target` is as it was and the new file is gone. Raises OSError. What is
    not `durable` may be lost, or be empty, after a crash of the machine.
    """
    temp = temp_sibling(target)
    with _published(temp, target, durable=durable):
        fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            crash_point(f"{target.name}: created")
            yield fd
            crash_point(f"{target.name}: written")
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def replacing_by_programs(target: Path) -> Iterator[Path]:
    """Yield a new folder beside `target`, for programs that write files by themselves, and in a mode of their own.

    What is at `target.name` in it takes the place of `target` when the block ends well; the folder is
    gone by then. Atomic and durable as `replacing`. Makes the folder of `target`. The caller is the
    only writer of `target`; what its crashed writers left is deleted. Raises OSError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    folder, temp = temp_sibling(target), temp_sibling(target)
    with _published(temp, target):
        folder.mkdir()
        try:
            crash_point(f"{target.name}: created")
            yield folder
            os.rename(folder / target.name, temp)
        finally:
            remove_tree(folder)
        crash_point(f"{target.name}: written")
        sync_file(temp)


@contextlib.contextmanager
def _published(temp: Path, target: Path, *, durable: bool = True) -> Iterator[None]:
    """Give `temp`, which the block makes, the name `target`; without it when the block raises."""
    try:
        yield
        crash_point(f"{target.name}: synced")
        os.rename(temp, target)
        crash_point(f"{target.name}: renamed")
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(target.parent)
    crash_point(f"{target.name}: folder synced")


def write_atomic(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a small file whole or not at all, making its folder. Raises OSError.

    The caller is the only writer of `target`; what its crashed writers left is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    with replacing(target, mode) as fd:
        write_all(fd, data)


def write_new(target: Path, data: bytes) -> None:
    """Write a small file that is not there yet, whole or not at all. Raises FileExistsError when it is, OSError."""
    temp = temp_sibling(target)
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(temp, target)  # which never replaces anything, unlike a rename
    finally:
        temp.unlink(missing_ok=True)
    sync_folder(target.parent)


def publish_folder(temp: Path, target: Path, what: str = "folder") -> None:
    """Rename the finished folder `temp` to `target`, durably. `target` must not exist.

    Every file in it must have been synced by its writer. `what` names it in crash points.
    """
    sync_folder(temp)
    target.parent.mkdir(parents=True, exist_ok=True)
    crash_point(f"publish {what}: synced")
    os.rename(temp, target)
    crash_point(f"publish {what}: renamed")
    sync_folder(target.parent)
    crash_point(f"publish {what}: folder synced")


def start_writeback(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to write a range to the disk, so that a later fsync waits for less.

    Promises nothing (sync_file_range(2), SYNC_FILE_RANGE_WRITE): errors are fsync's to tell.
    """
    _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), 2)


def explained(error: OSError, place: Path, *, elsewhere: str | None = None) -> StoreError:
    """Return what an OSError means that came of writing at or below `place`.

    `elsewhere` tells the user how to choose another folder.
    """
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        there = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(there).free >> 20
        hint = f"make room, or {elsewhere} on a larger disk" if elsewhere else "make room"
        return StoreError(f"no space left on the disk ({free} MiB free)", where=str(place), hint=hint)
    hint = f"{elsewhere} that can be written to" if elsewhere else "see that it can be written to"
    return StoreError(os.strerror(error.errno or 0), where=str(error.filename or place), hint=hint)


def sync_file(path: Path) -> None:
    """Make a file's content durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make names that were created in `folder` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of `data` at the descriptor's position."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def data_ranges(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the parts of a file that are not holes (lseek(2), SEEK_DATA)."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        yield start, end - start


def allocated_bytes(folder: Path) -> int:
    """Return what the files of a folder take on the disk (stat(2), st_blocks). Raises OSError."""
    return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in os.scandir(folder))


def can_reflink(folder: Path) -> bool:
    """Try whether files in `folder` can share blocks (ioctl_ficlonerange(2))."""
    names = [folder / f"{TEMP_PREFIX}reflink.{secrets.token_hex(6)}" for _ in range(2)]
    try:
        with names[0].open("w+b") as source:
            source.write(bytes(65536))
            source.flush()
            with names[1].open("wb") as target:
                return _clone(source.fileno(), target.fileno(), 0, 0, 65536)
    finally:
        for name in names:
            name.unlink(missing_ok=True)


def _clone(source: int, target: int, source_offset: int, target_offset: int, length: int) -> bool:
    argument = b"".join(value.to_bytes(8, "little") for value in (source, source_offset, length, target_offset))
    try:
        fcntl.ioctl(target, _FICLONERANGE, argument)
    except OSError as error:
        if error.errno in _FALLBACK:
            return False
        raise
    return True


@contextlib.contextmanager
def opened(paths: Mapping[_K, Path]) -> Iterator[dict[_K, int]]:
    """Yield descriptors for reading of all these files. Raises OSError."""
    with contextlib.ExitStack() as stack:
        descriptors: dict[_K, int] = {}
        for key, path in paths.items():
            descriptors[key] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptors[key])
        yield descriptors


class RangeCopier:
    """Copies ranges into one file by the cheapest means that the filesystems allow.

    FICLONERANGE shares the blocks; copy_file_range(2) copies inside the kernel; reading and writing
    works everywhere. A means that failed once is not tried again. `shared_bytes` and `copied_bytes`
    count what was done how; `advance` is told the bytes as they are done. Without `may_share` every
    byte gets a block of its own, so the kernel is not asked to copy either: where it can, it shares.
    """

    def __init__(self, target: int, advance: Callable[[int], None], *, may_share: bool = True) -> None:
        self._target = target
        self._advance = advance
        self._may_clone = self._may_copy = may_share
        self.shared_bytes = 0
        self.copied_bytes = 0

    def copy(self, source: int, source_offset: int, target_offset: int, length: int) -> None:
        """Copy `length` bytes; `source` must hold them all. Raises OSError."""
        if self._may_clone and length:
            if _clone(source, self._target, source_offset, target_offset, length):
                self.shared_bytes += length
                self._advance(length)
                return
            self._may_clone = False
        self.copied_bytes += length
        while length and self._may_copy:
            try:
                count = os.copy_file_range(
                    source, self._target, min(length, _KERNEL_COPY_BYTES), source_offset, target_offset
                )
            except OSError as error:
                if error.errno not in _FALLBACK:
                    raise
                count = 0
            if count == 0:  # some filesystems answer 0 instead of an error
                self._may_copy = False
                break
            start_writeback(self._target, target_offset, count)
            self._advance(count)
            length, source_offset, target_offset = length - count, source_offset + count, target_offset + count
        while length:
            data = os.pread(source, min(length, _COPY_BYTES), source_offset)
            if not data:
                raise OSError(errno.EIO, "the source ends before the range that was to be copied")
            pwrite_all(self._target, data, target_offset)
            count = len(data)
            self._advance(count)
            length, source_offset, target_offset = length - count, source_offset + count, target_offset + count
