"""How far the running task is: a counter for stages, and the way its numbers take to the user.

A stage asks for a `meter` and adds to it; it does not know who listens. The runner says, with
`reporting`, which task runs in this process and where its numbers go: straight to the listener, or
from a worker process through a `Channel`. Outside of any run a meter counts for nobody. Numbers are
for the eye only: they may be dropped, so nothing must be decided by them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

Sink = Callable[[str, int, int | None], None]
"""Receives (task name, bytes done, total bytes or None when not known)."""

INTERVAL_SECONDS = 0.1
_READ_BYTES = 1 << 16
_PIPE_BUF = 4096  # pipe(7): a write of up to this many bytes is never torn or mixed with another

_current: tuple[str, Sink] | None = None  # one task at a time runs in a process
_lock = threading.Lock()  # a stage may count from several threads of its own


class Meter:
    """Counts the bytes of one piece of work. Safe to be shared by the threads of a stage."""

    def __init__(self, total_bytes: int | None) -> None:
        self.done_bytes = 0
        self.total_bytes = total_bytes
        self._target = _current
        self._next_report = 0.0

    def add(self, count: int) -> None:
        """Count `count` more bytes; tell the listener at most ten times a second, and at the end."""
        if self._target is None:
            return
        task, sink = self._target
        with _lock:
            self.done_bytes += count
            now = time.monotonic()
            if now >= self._next_report or self.done_bytes == self.total_bytes:
                self._next_report = now + INTERVAL_SECONDS
                sink(task, self.done_bytes, self.total_bytes)


def meter(total_bytes: int | None = None) -> Meter:
    """Return a new meter for the task that runs in this process; it does nothing outside of a run."""
    return Meter(total_bytes)


@contextlib.contextmanager
def reporting(task: str, sink: Sink) -> Iterator[None]:
    """Send the numbers of meters that are made in this block to `sink`, under the name of `task`."""
    global _current  # noqa: PLW0603
    before, _current = _current, (task, sink)
    try:
        yield
    finally:
        _current = before


class Channel:
    """A pipe from worker processes, forked while it is open, to the main process.

    Neither end ever blocks. Each record is one short write, so records of several workers do not
    mix: `<done> <total or -1> <task name>` and a line feed, in UTF-8. When the pipe is full, a record
    is dropped.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._rest = b""

    def send(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        """Write one record; a `Sink` for workers. Never raises OSError."""
        record = f"{done_bytes} {-1 if total_bytes is None else total_bytes} {task}\n".encode()
        if len(record) <= _PIPE_BUF:
            with contextlib.suppress(OSError):
                os.write(self._writer, record)

    def drain(self, sink: Sink) -> None:
        """Read what is there and pass on the newest record of each task."""
        newest: dict[str, tuple[int, int | None]] = {}
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._reader, _READ_BYTES):
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    done, total, task = line.decode().split(" ", 2)
                    newest[task] = int(done), None if total == "-1" else int(total)
        for task, (done_bytes, total_bytes) in newest.items():
            sink(task, done_bytes, total_bytes)

    def close(self) -> None:
        """Close both ends."""
        os.close(self._reader)
        os.close(self._writer)
