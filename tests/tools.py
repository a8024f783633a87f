"""What tests need from the machine: missing, they are skipped; in CI and in `make test`, they fail."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from fledge_tasks import userns
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


def have_only(monkeypatch: pytest.MonkeyPatch, folder: Path, *programs: str) -> None:
    """Let fledge find no programs in this process but these, through links in the new folder."""
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(str(shutil.which(program, path=PATH)))
    monkeypatch.setattr("fledge_tasks.tools.environment", lambda: {"PATH": str(folder)})


def put_before(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, script: str) -> None:
    """Let a shell script in the new folder `bin` of `folder` be found before the program of this name."""
    program = folder / "bin" / name
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{PATH}")


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what another thread or process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def as_nobody() -> list[str]:
    """Return the prefix of a command that runs as nobody, without a single capability.

    Skips or fails the calling test when nobody cannot reach this checkout, whose programs the command will run.
    """
    need("setpriv")
    if closed := [folder for folder in CHECKOUT.parents if not folder.stat().st_mode & 0o001]:
        _lacking(f"other users cannot enter {closed[0]}, where this checkout is: chmod o+x {closed[0]}")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs", "--bounding-set=-all"]
    return [*_with_our_python(), *nobody]


def _with_our_python() -> list[str]:
    """Return the prefix of a command that everyone can run this Python in, though its folder is root's alone.

    With a Python below /root, nobody's either lacks its library or finds that of another one.
    """
    python = Path(sys.base_prefix).resolve()
    closed = [folder for folder in python.parents if not folder.stat().st_mode & 0o001]
    if not closed:
        return []
    need_root()
    need("unshare", "mount")
    # In a mount namespace of its own, there is nothing else in that folder.
    script = 'mount --bind "$1" "$0" && mount -t tmpfs -o mode=755 none "$2" && mkdir -p "$1" && mount --bind "$0" "$1"'
    return ["unshare", "--mount", "sh", "-c", f'{script} && shift 2 && exec "$@"', "/mnt", str(python), str(closed[-1])]


def as_subordinate(folder: Path, count: int = 65536, first: int = 100_000) -> list[str]:
    """Return the prefix of a command that runs as nobody, to whom `count` subordinate ids are granted.

    /etc has the files that grant them only for that command: they are in the empty `folder`, and an
    overlay in a mount namespace shows them. Skips or fails the calling test like `as_nobody`.
    """
    need_root()
    need("newuidmap", "newgidmap", "unshare", "setpriv")
    as_nobody()
    for name in ("subuid", "subgid"):
        (folder / name).write_text(f"somebody:1:2\nnobody:{first}:{count}\n" if count else "")
    overlay = 'mount -t overlay overlay -o "lowerdir=$0:/etc" /etc'
    script = f'{overlay} && exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@"'
    return [*_with_our_python(), "unshare", "--mount", "sh", "-c", script, str(folder)]


def take_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process believe that it may not mount, and has no subordinate ids."""
    monkeypatch.setattr(userns, "capabilities", lambda: 0)
    monkeypatch.setattr(userns, "SUBUID", Path("/nothing/subuid"))


def _lacking(reason: str) -> NoReturn:
    if os.environ.get("FLEDGE_REQUIRE_TOOLS") == "1" or os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
