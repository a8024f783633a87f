"""SIGINT, SIGTERM and SIGHUP as one exception, raised once, in the main process and in its workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = frozenset((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
_REPEAT_SECONDS = 0.5
# How long a wait for somebody else may last before it is begun again. Python raises in the main thread, between
# two of its steps: a signal that another thread takes, or that comes just before a system call, ends no wait.
LISTEN_SECONDS = 0.2


class Interrupted(KeyboardInterrupt):
    """A signal ended the run. Programs exit with `exit_code`, 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.exit_code = 128 + signum


class _Interrupter:
    """The main process's signal handler: the first signal raises Interrupted, a later one ends at once."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._raised_at = 0.0

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        if _hold.puts_off(signum):
            return
        if self.signum is None:
            self.signum = signum
            self._raised_at = time.monotonic()
            raise Interrupted(signum)
        # timeout(1) signals its child and then the child's group: that is one signal, not two.
        if time.monotonic() - self._raised_at > _REPEAT_SECONDS:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + signum)


_interrupter: _Interrupter | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[bool]:
    """Let SIGINT, SIGTERM and SIGHUP raise Interrupted in this block, once.

    A second signal kills the workers and exits. Signals that are ignored (nohup) stay ignored.
    Within another such block, or outside of the main thread, nothing changes and the value is False.
    """
    global _interrupter  # noqa: PLW0603
    if _interrupter is not None or threading.current_thread() is not threading.main_thread():
        yield False
        return
    _interrupter = _Interrupter()
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, _interrupter)
        yield True
    finally:
        _interrupter = None
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Raise Interrupted again if there was a signal: Python drops what is raised in a weakref callback."""
    if _interrupter is not None and _interrupter.signum is not None:
        raise Interrupted(_interrupter.signum)


class _Hold:
    """Signals that come while they are held. The mask of a thread is not enough: the kernel may choose another
    thread, and Python runs the handler in the main one all the same."""

    def __init__(self) -> None:
        self.depth = 0
        self.signum: int | None = None

    def puts_off(self, signum: int) -> bool:
        """Remember a signal if signals are held."""
        if self.depth:
            self.signum = signum
        return self.depth > 0

    def release(self) -> int | None:
        """End one hold, and return the signal to be raised, if it was the last one."""
        self.depth -= 1
        if self.depth:
            return None
        signum, self.signum = self.signum, None
        return signum


_hold = _Hold()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Put off our signals to the end of this block, which must be short."""
    is_main = threading.current_thread() is threading.main_thread()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _hold.depth += is_main
    try:
        yield
    finally:
        signum = _hold.release() if is_main else None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if signum is not None:
            signal.raise_signal(signum)


def finish(step: Callable[[], object]) -> None:
    """Take an idempotent step to its end: one that a signal interrupts is begun again, then Interrupted is raised.

    For what takes too long to be `held`. A signal is raised once, so nothing interrupts the second time.
    """
    try:
        step()
    except Interrupted:
        step()
        raise


def handle_in_worker() -> None:
    """Let SIGTERM raise Interrupted, once, in this worker process, which was forked while signals were held.

    A terminal signals the whole group, but it is the main process that decides and sends SIGTERM.
    """
    _hold.depth, _hold.signum = 0, None
    signal.signal(signal.SIGINT, _nothing)
    signal.signal(signal.SIGHUP, _nothing)
    signal.signal(signal.SIGTERM, _raise_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _nothing(_signum: int, _frame: FrameType | None) -> None:
    """Handle a signal by doing nothing; unlike SIG_IGN, programs do not inherit it."""


def _raise_once(signum: int, _frame: FrameType | None) -> None:
    if _hold.puts_off(signum):
        return
    signal.signal(signum, _nothing)
    raise Interrupted(signum)
