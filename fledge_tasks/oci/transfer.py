"""What another program puts below a folder, watched while it comes: skopeo's own progress is for eyes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from fledge_tasks.fsutil import start_writeback

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def watched(
    folder: Path,
    ignored: Collection[str],
    total: int,
    advance: Callable[[int], None],
    look: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Report the growth of the files below `folder` while the block runs, but for those whose names are `ignored`.

    `advance` gets it in bytes, `total` in all when the block ends well. `look` is called every now and
    then. Both are called from a thread that has ended when the block has; `look` no more once it has
    raised something, which the end of the block raises unless the block has raised something itself.

    The files begin to be written to the disk meanwhile: skopeo syncs each blob, and would wait for all
    of it at its end.
    """
    reported = 0
    ended = threading.Event()
    failed: list[BaseException] = []

    def report(found: int) -> None:
        nonlocal reported
        if (growth := min(found, total) - reported) > 0:
            reported += growth
            advance(growth)

    def watch() -> None:
        while not ended.wait(_POLL_SECONDS):
            report(_bytes_on_their_way(folder, ignored))
            if not failed:
                try:
                    look()
                except BaseException as error:
                    failed.append(error)

    watcher = threading.Thread(target=watch, name="fetch-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    if failed:
        raise failed[0]
    report(total)


def _bytes_on_their_way(folder: Path, ignored: Collection[str]) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name not in ignored:
                with contextlib.suppress(OSError), open(os.path.join(parent, name), "rb") as file:
                    start_writeback(file.fileno(), 0, 0)
                    total += os.fstat(file.fileno()).st_size
    return total
