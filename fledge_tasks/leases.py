"""Leases: what running builds use, so that nobody takes it away from them.

    leases/          in the cache
      lock           held shared while keys are added, exclusively while entries are removed
      <random>       one file for each process that builds: a key in hexadecimal digits a line

Its owner holds a flock on a lease, so the lease ends with its process and the children that it
forked, however they end; a lease without an owner is deleted by whoever looks next. A key is added
before its entry is looked for. Whoever removes entries keeps the lock from reading the leases to
the last rename, so an entry that a build has found stays until the build ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from fledge_tasks import fsutil
from fledge_tasks.digest import Digest

_LOCK = "lock"


class Leases:
    """The leases in one cache folder, and the one of this process once it has any."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd: int | None = None
        self._held: set[str] = set()

    @property
    def is_held(self) -> bool:
        """Tell whether this process has a lease."""
        return self._fd is not None

    def hold(self, keys: Iterable[Digest]) -> None:
        """Keep the entries of these keys, there or not yet, until this process ends.

        The first call makes the lease, even without keys: what is forked later adds to the same one.
        Does nothing where the cache cannot be written to: nothing can be removed from it either.
        """
        new = set(keys) - self._held
        if not new and self._fd is not None:
            return
        if self._fd is None:
            self._sweep()
        with contextlib.suppress(OSError), self._locked(fcntl.LOCK_SH):
            if self._fd is None:
                path = self._folder / secrets.token_hex(8)
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
                fsutil.crash_point("lease: made")
            os.write(self._fd, "".join(f"{key.removeprefix('sha256:')}\n" for key in sorted(new)).encode())
            fsutil.crash_point("lease: written")
            self._held |= new

    def release(self) -> None:
        """Let go of everything. Idempotent; what forked from this process keeps the lease alive."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None
        self._held = set()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[frozenset[Digest]]:
        """Yield all keys that are held; none is added while the block runs. Raises OSError."""
        with self._locked(fcntl.LOCK_EX):
            yield frozenset(self._read())

    def _sweep(self) -> None:
        """Delete leases without an owner, unless others are busy with theirs: they would pile up."""
        with contextlib.suppress(OSError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            for _ in self._read():
                pass

    def _read(self) -> Iterator[Digest]:
        for path in sorted(self._folder.iterdir()):
            if path.name == _LOCK:
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield from (Digest(f"sha256:{line}") for line in path.read_text().split())
            else:
                path.unlink(missing_ok=True)  # nobody holds it, and under the lock nobody makes one
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        self._folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, how)
            yield
        finally:
            os.close(fd)
