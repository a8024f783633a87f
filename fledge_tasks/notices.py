"""Notices: what a run found and dealt with by itself, for the user to be told once.

No error, and no result depends on it, so those who come upon it have nobody to raise it to: a
check, or a worker process that goes on. Lines go to a file in memory that forked processes share, and
stay there whatever becomes of the one that wrote them; the command line prints them in the end.
"""

from __future__ import annotations

import os
import weakref


class Notices:
    """Lines of this process and of those that are forked from it later."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("fledge-notices")
        self._read = 0
        weakref.finalize(self, os.close, self._fd)

    def add(self, line: str) -> None:
        """Add a line. One short write at the position that all processes share, so lines do not mix."""
        os.write(self._fd, f"{line}\n".encode(errors="replace"))

    def take(self) -> list[str]:
        """Return the lines that were added since the last call, each once."""
        data = os.pread(self._fd, os.fstat(self._fd).st_size - self._read, self._read)
        self._read += len(data)
        return list(dict.fromkeys(data.decode().splitlines()))
