"""The index beside the store: small JSON facts that make things quick and may be lost at any time.

Kept by diskcache in `<cache>/index`. Names are 'kind:rest'; values are JSON. What is in it:

    file:<absolute path>     [size, mtime_ns, ctime_ns, inode, sha256]   digest memo of mapped files
    object:<key>/<name>      [size, mtime_ns, ctime_ns, inode, XXH3-128] stored files known to be whole
    used:<key>               seconds since the epoch of the last use of an entry
    image:<lock file>:<name> what an image was last made of, see `usage`
    day:<date>               what builds did on a day, see `usage`

Nothing here is ever needed for a right result. An index that is corrupt is set aside and a new one
begun; one that cannot be opened at all (a read-only cache) is treated as empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache

from fledge_tasks.digest import Digest, is_digest, sha256_file

_RACY_SECONDS = 2.0
_FAILURES = (sqlite3.Error, diskcache.Timeout, OSError, ValueError, TypeError, RecursionError)


class _JsonDisk(diskcache.Disk):  # type: ignore[misc]
    """Text keys and JSON values in the row itself: never pickle (CVE-2025-69872), never a file.

    A row of any other form, put there by something else, reads as an OSError, which is a miss.
    """

    def put(self, key: object) -> tuple[str, bool]:
        if not isinstance(key, str):
            raise TypeError("names in the index are text")
        return key, True

    def get(self, key: object, raw: bool) -> str:
        if not raw or not isinstance(key, str):
            raise OSError("foreign row")
        return key

    def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, str]:  # noqa: ARG002
        return 0, 1, None, json.dumps(value, separators=(",", ":"))

    def fetch(self, mode: int, filename: object, value: object, read: bool) -> Any:  # noqa: ARG002
        if mode != 1 or not isinstance(value, str):
            raise OSError("foreign row")
        return json.loads(value)

    def remove(self, path: object) -> None:
        """Do nothing: no value of ours has a file, whatever a row says."""


class Index:
    """A persistent mapping of names to JSON values that is allowed to forget.

    Opened at the first use, in each process anew, so that it may be carried across a fork.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None
        self._owner = 0
        self._inherited: list[Any] = []

    def get(self, name: str) -> Any:
        """Return the value or None."""
        with contextlib.suppress(*_FAILURES):
            cache = self._open()
            return cache.get(name) if cache is not None else None
        return None

    def set(self, name: str, value: Any) -> None:
        """Remember the value if that is possible."""
        with contextlib.suppress(*_FAILURES):
            cache = self._open()
            if cache is not None:
                cache.set(name, value)

    def remove(self, name: str) -> None:
        """Forget a name. Idempotent."""
        with contextlib.suppress(*_FAILURES):
            cache = self._open()
            if cache is not None:
                cache.delete(name)

    def names(self) -> list[str]:
        """Return all names."""
        names: list[str] = []
        with contextlib.suppress(*_FAILURES):
            cache = self._open()
            if cache is not None:
                names.extend(cache.iterkeys())
        return names

    def items(self, kind: str) -> dict[str, Any]:
        """Return the rest of the name, and the value, of everything of a kind."""
        found = {name.removeprefix(f"{kind}:"): self.get(name) for name in self.names() if name.startswith(f"{kind}:")}
        return {name: value for name, value in found.items() if value is not None}

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make the writes of the block one transaction, which is several times as fast."""
        transaction = contextlib.ExitStack()
        with contextlib.suppress(*_FAILURES):
            cache = self._open()
            if cache is not None:
                transaction.enter_context(cache.transact())
        try:
            yield
        finally:
            with contextlib.suppress(*_FAILURES):
                transaction.close()  # what was set is as true after an error; a full disk shows here

    def close(self) -> None:
        """Write everything into the one database file, so that the folder can be copied."""
        if self._cache is not None and self._owner == os.getpid():
            with contextlib.suppress(*_FAILURES):
                self._cache.close()
            self._cache, self._owner = None, 0

    def _open(self) -> Any:
        if self._owner == os.getpid():
            return self._cache
        if self._cache is not None:
            # SQLite must not even close a connection that came across a fork (sqlite.org/howtocorrupt.html, 2.6).
            self._inherited.append(self._cache)
        self._owner = os.getpid()
        try:
            self._cache = self._create()
        except sqlite3.DatabaseError as error:
            self._cache = None
            if not isinstance(error, sqlite3.OperationalError):  # 'not a database', 'malformed'
                shutil.rmtree(self._folder, ignore_errors=True)
                with contextlib.suppress(*_FAILURES):
                    self._cache = self._create()
        except _FAILURES:
            self._cache = None
        return self._cache

    def _create(self) -> Any:
        # Nothing is ever evicted: entries of the store, not rows of the index, take the space.
        return diskcache.Cache(
            str(self._folder),
            disk=_JsonDisk,
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 62,
            disk_min_file_size=1 << 40,
        )


def signature(status: os.stat_result) -> list[int]:
    """Return what tells one state of a file from another: size, mtime, ctime, inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


class FileDigests:
    """sha256 of local files, remembered by what stat says of them.

    A file that changed less than two seconds before it was read is read again the next time, since
    an edit within the clock's granularity would leave no trace.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def __call__(self, path: Path) -> Digest:
        """Return the digest of a file's content. Raises OSError."""
        now = time.time_ns()
        status = path.stat()
        name, facts = f"file:{path.absolute()}", signature(status)
        known = self._index.get(name)
        if isinstance(known, list) and known[:-1] == facts and is_digest(str(known[-1])):
            return Digest(known[-1])
        digest = sha256_file(path)
        is_settled = now - max(status.st_mtime_ns, status.st_ctime_ns) > _RACY_SECONDS * 1e9
        if is_settled and signature(path.stat()) == facts:
            self._index.set(name, [*facts, digest])
        return digest
