"""The command `fledge`: one file per command; the only place that prints or picks exit codes.

Exit codes: 0 done, 1 a build failed, 2 the user's input is wrong, 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import sys

from fledge_tasks.interrupt import Interrupted, interruptible


def main() -> None:
    """Run the command line and exit."""
    _open_standard_streams()
    sys.exit(_run())


def _open_standard_streams() -> None:
    """Give those that the caller closed to /dev/null: the next file that is opened would take their number."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115  # for good


def _run() -> int:
    try:
        with interruptible():
            # All else is imported here, which takes its time: a signal then ends us like any other.
            from fledge_tasks.cli.group import run

            return run()
    except KeyboardInterrupt as stop:
        sys.stderr.write("interrupted\n")
        return stop.exit_code if isinstance(stop, Interrupted) else 130
