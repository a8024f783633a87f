"""The finished files of an image, and how they are known to be untouched.

`build/<name>/.fledge.json` says, for each file that we wrote there, from which key it was made and
what stat said of it then: {"<file>": {"key", "sha256", "size", "mtime_ns", "inode", "seconds"}}; of a
qcow2 also "raw_sha256", of a hash tree "root_hash". A file that someone booted, edited, replaced or
deleted no longer fits and is made again. The record is written after the file, so a crash between the
two only means that the file is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from fledge_tasks import fsutil
from fledge_tasks.digest import Digest, sha256_bytes
from fledge_tasks.errors import NOT_DECODED
from fledge_tasks.store import Store

RECORD = ".fledge.json"


class Written(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is known of one file. `seconds` is what it took to make.

    `raw_sha256` is that of the raw image which a disk of another format holds, `root_hash` that of a
    hash tree.
    """

    key: str
    sha256: str
    size: int
    mtime_ns: int
    inode: int
    seconds: float = 0.0
    raw_sha256: str | None = None
    root_hash: str | None = None

    @property
    def raw_checksum(self) -> str:
        """The digest of what a guest sees of a disk."""
        return self.raw_sha256 or self.sha256


@contextlib.contextmanager
def writing(store: Store, path: Path) -> Iterator[None]:
    """Be the only one who writes `path` and its neighbours, across processes. Raises StoreError.

    A block that raises does not leave their folder if it is empty. A cache that is read-only has no
    place for a lock, but all that is wanted may be in it: then the folder of `path` itself is locked.
    """
    if not store.is_read_only:
        with store.building(sha256_bytes(f"output {path.parent}".encode())):
            try:
                yield
            except BaseException:
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
                raise
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise fsutil.explained(error, path) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def look(path: Path, key: str) -> Written | str:
    """Return the record of the file if it is the one made from `key`, else the reason why it is not."""
    record = _read(path.parent).get(path.name)
    try:
        status = path.stat()
    except OSError:
        return f"{path.name} is not there"
    if record is None:
        return f"{path.name} was not made by this build"
    if (status.st_size, status.st_mtime_ns, status.st_ino) != (record.size, record.mtime_ns, record.inode):
        return f"{path.name} was changed since it was written"
    if record.key != key:
        return "what goes in has changed"
    return record


def made_from(path: Path, key: str) -> Written | None:
    """Return the record of the file that was made from `key`, whatever has become of it since."""
    record = _read(path.parent).get(path.name)
    return record if record and record.key == key else None


def key_of(path: Path) -> str | None:
    """Return the key that the file was made from, None if that is not known."""
    record = _read(path.parent).get(path.name)
    return record.key if record else None


def remember(
    path: Path,
    key: str,
    sha256: Digest,
    seconds: float = 0.0,
    *,
    raw_sha256: Digest | None = None,
    root_hash: str | None = None,
) -> Written:
    """Record that the file was just made from `key`. Atomic."""
    status = path.stat()
    facts = status.st_size, status.st_mtime_ns, status.st_ino, round(seconds, 3)
    written = Written(key, sha256, *facts, raw_sha256, root_hash)
    records = {**_read(path.parent), path.name: written}
    fsutil.write_atomic(path.parent / RECORD, msgspec.json.format(msgspec.json.encode(records), indent=1))
    return written


def remove(path: Path) -> bool:
    """Delete an image's file, its record, and the folder once it is empty. True if there was a file."""
    was_there = path.exists()
    path.unlink(missing_ok=True)
    fsutil.remove_stale(path)
    records = _read(path.parent)
    if records.pop(path.name, None) is not None and records:
        fsutil.write_atomic(path.parent / RECORD, msgspec.json.format(msgspec.json.encode(records), indent=1))
    elif not records:
        (path.parent / RECORD).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something of the user's is in it, or it is not there
        path.parent.rmdir()
    return was_there


def _read(folder: Path) -> dict[str, Written]:
    try:
        return msgspec.json.decode((folder / RECORD).read_bytes(), type=dict[str, Written])
    except (OSError, *NOT_DECODED):
        return {}
