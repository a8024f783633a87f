"""The index beside the store: small JSON facts that make things quick and may be lost at any time.

Kept by diskcache in `<cache>/index`. Names are 'kind:rest'; values are JSON. What is in it:

    file:<absolute path>     [size, mtime_ns, ctime_ns, inode, sha256]   digest memo of mapped files
    object:<key>/<name>      [size, mtime_ns, ctime_ns, inode, XXH3-128] stored files known to be whole
    used:<key>               seconds since the epoch of the last use of an entry
    image:<lock file>:<name> what an image was last made of, see `usage`
    day:<date>               what builds did on a day, see `usage`
    format                   the version of all this

Version history: 1 first version.

Nothing here is ever needed for a right result. An index that is corrupt, or of another version, is
set aside and a new one begun; one that cannot be opened at all (a read-only cache) is treated as empty.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diskcache

from fledge_tasks import fsutil
from fledge_tasks.digest import Digest, is_digest, sha256_file

FORMAT = 1
_FORMAT_NAME = "format"
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_NOTADB}
_OTHER_TABLES = re.compile(r"no such (table|column)|table \w+ has no column")
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

    def __init__(self, folder: Path, tell: Callable[[str], None] | None = None) -> None:
        self._folder = folder
        self._tell = tell
        self._cache: Any = None
        self._owner = 0
        self._seen = 0
        self._inherited: list[Any] = []

    def get(self, name: str) -> Any:
        """Return the value or None."""
        with self._using() as cache:
            return cache.get(name) if cache is not None else None
        return None  # it failed

    def set(self, name: str, value: Any) -> None:
        """Remember the value if that is possible."""
        with self._using() as cache:
            if cache is not None:
                cache.set(name, value)

    def remove(self, name: str) -> None:
        """Forget a name. Idempotent."""
        with self._using() as cache:
            if cache is not None:
                cache.delete(name)

    def names(self) -> list[str]:
        """Return all names."""
        names: list[str] = []
        with self._using() as cache:
            if cache is not None:
                names.extend(name for name in cache.iterkeys() if name != _FORMAT_NAME)
        return names

    def items(self, kind: str) -> dict[str, Any]:
        """Return the rest of the name, and the value, of everything of a kind."""
        found = {name.removeprefix(f"{kind}:"): self.get(name) for name in self.names() if name.startswith(f"{kind}:")}
        return {name: value for name, value in found.items() if value is not None}

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make the writes of the block one transaction, which is several times as fast."""
        transaction = contextlib.ExitStack()
        with self._using() as cache:
            if cache is not None:
                transaction.enter_context(cache.transact())
        try:
            yield
        finally:
            with self._using():
                transaction.close()  # what was set is as true after an error; a full disk shows here

    def close(self) -> None:
        """Write everything into the one database file, so that the folder can be copied."""
        if self._cache is not None and self._owner == os.getpid():
            with contextlib.suppress(*_FAILURES):
                self._cache.close()
            self._cache, self._owner = None, 0

    @contextlib.contextmanager
    def _using(self) -> Iterator[Any]:
        """Yield the database, None if there is none to be had; a failure of the block is a miss."""
        if self._owner != os.getpid():
            if self._cache is not None:
                # SQLite must not even close a connection that came across a fork (sqlite.org/howtocorrupt.html, 2.6).
                self._inherited.append(self._cache)
            self._owner, self._cache = os.getpid(), None
            with self._guarded():
                self._open()
        with self._guarded():
            yield self._cache

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if _is_damage(error):
                self._begin_anew(f"is damaged ({error})")
        except _FAILURES:
            pass

    def _open(self) -> None:
        with contextlib.suppress(OSError):
            self._seen = self._inode()
        self._cache = self._create()
        found = self._cache.get(_FORMAT_NAME)
        if found is None:
            self._cache.set(_FORMAT_NAME, FORMAT)
        elif found != FORMAT:
            self._begin_anew(f"is of version {found}, not {FORMAT}")

    def _inode(self) -> int:
        return (self._folder / "cache.db").stat().st_ino

    def _begin_anew(self, reason: str) -> None:
        """Set the database aside, unless somebody else has done so meanwhile, and begin another one."""
        broken, self._cache = self._cache, None
        with contextlib.suppress(*_FAILURES):
            if broken is not None:
                broken.close()
        with contextlib.suppress(*_FAILURES):
            if self._inode() == self._seen:
                fsutil.set_aside(self._folder, self._folder.parent / "aside" / self._folder.name)
                if self._tell:
                    self._tell(f"{self._folder}: {reason}; set aside, and a new one begun")
            self._cache = self._create()
            self._seen = self._inode()
            self._cache.set(_FORMAT_NAME, FORMAT)

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


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """Tell whether the database is none, or not ours; no space, no permission and a lock are not its fault."""
    # https://www.sqlite.org/rescode.html; the low byte is the primary code. A table or column of another name has none.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE or bool(_OTHER_TABLES.match(str(error)))


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
        self._pending: dict[str, list[Any]] | None = None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Write down what the block reads when it ends, at once, which is several times as fast.

        Nobody else has to wait meanwhile, as they would for a transaction that is open while large
        files are read.
        """
        if self._pending is not None:
            yield
            return
        self._pending = {}
        try:
            yield
        finally:
            pending, self._pending = self._pending, None
            if pending:
                with self._index.together():
                    for name, value in pending.items():
                        self._index.set(name, value)

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
            if self._pending is None:
                self._index.set(name, [*facts, digest])
            else:
                self._pending[name] = [*facts, digest]
        return digest
