"""What tests need from the machine: missing, they are skipped; in CI and in `make test`, they fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from fledge_tasks.boot import kernel
from fledge_tasks.errors import BootError

PATH = ":".join(dict.fromkeys([*os.environ["PATH"].split(":"), "/usr/sbin", "/sbin"]))
"""Where programs are looked for: a plain user's PATH on Debian lacks the folders of mke2fs and its kind."""

CHECKOUT = Path(__file__).resolve().parents[1]


def need(*programs: str) -> None:
    """Skip or fail the calling test when a program is not installed."""
    if missing := [program for program in programs if shutil.which(program, path=PATH) is None]:
        _lacking(f"not installed: {', '.join(missing)}")


def need_root() -> None:
    """Skip or fail the calling test when it does not run as root."""
    if os.geteuid() != 0:
        _lacking("needs root")


def need_kernel() -> Path:
    """Return the folder with the kernel that guests run; skip or fail the calling test when there is none."""
    try:
        return kernel.find().image.parents[1]
    except BootError as error:
        _lacking(str(error))


def as_nobody() -> list[str]:
    """Return the prefix of a command that runs as nobody, without a single capability.

    Skips or fails the calling test when nobody cannot reach this checkout, whose programs the command will run.
    """
    need("setpriv")
    if closed := [folder for folder in CHECKOUT.parents if not folder.stat().st_mode & 0o001]:
        _lacking(f"other users cannot enter {closed[0]}, where this checkout is: chmod o+x {closed[0]}")
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]


def _lacking(reason: str) -> NoReturn:
    if os.environ.get("FLEDGE_REQUIRE_TOOLS") == "1" or os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
