"""What a guest writes to its serial console, read as it comes, and what our scripts in the guest say on it."""

from __future__ import annotations

import re
import threading
from typing import IO

_KEPT_BYTES = 1 << 16
_CHUNK_BYTES = 1 << 14
_IS_UP = re.compile(rb"fledge: the guest is up\r?\n")
_STARTS = re.compile(rb"fledge: the workload starts\r?\n")
_KERNEL = re.compile(rb"Linux version [^\n]*\n")
_ENDED = re.compile(rb"fledge: the workload ended with (\d{1,3})\r?\n\Z")


class Console:
    """Reads a stream to its end, in a thread of its own, so that the guest never waits for us.

    Keeps the last 64 KiB. From the workload's start on all is copied to `echo`. With `is_foreign` there are
    no scripts of ours in the guest, and its kernel's first words stand for theirs.
    """

    def __init__(self, stream: IO[bytes], *, is_foreign: bool = False, echo: IO[bytes] | None = None) -> None:
        self._stream = stream
        self._echo = echo
        self._is_up, self._starts = (_KERNEL, _KERNEL) if is_foreign else (_IS_UP, _STARTS)
        self._kept = b""
        self.is_alive = False
        self.has_started = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait until all is read. The program at the other end has ended."""
        self._thread.join()

    def exit_code(self) -> int | None:
        """Return what the workload ended with, None when the guest did not come to say it, as its last words."""
        match = _ENDED.search(self._kept)
        return int(match[1]) if match else None

    def lines(self, count: int) -> list[str]:
        """Return the last lines, as they would be seen, without empty ones at the end."""
        text = self._kept.decode(errors="replace").replace("\r\n", "\n").rstrip()
        return [line.rpartition("\r")[2] for line in text.split("\n")[-count:]] if text else []

    def _read(self) -> None:
        while chunk := self._stream.read1(_CHUNK_BYTES):  # type: ignore[attr-defined]  # a BufferedReader
            self._kept = (self._kept + chunk)[-_KEPT_BYTES:]
            if self.has_started:
                self._show(chunk)
                continue
            self.is_alive = self.is_alive or self._is_up.search(self._kept) is not None
            if match := self._starts.search(self._kept):
                self.has_started = True
                self._show(self._kept[match.end() :])

    def _show(self, data: bytes) -> None:
        try:
            if self._echo is not None:
                self._echo.write(data)
                self._echo.flush()
        except OSError:  # whoever looked has seen enough
            self._echo = None
