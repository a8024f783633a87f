"""Builds that meet a crash, a signal or a fault on their way.

A build runs in a process forked from the test, in a session of its own, which is many times as quick
as a new interpreter, and lets a test put any fault where the program passes one of its crash points.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks import fsutil
from fledge_tasks import resolve as _resolve  # noqa: F401  # imported once, here, and not in each process
from fledge_tasks.cli import build as _build  # noqa: F401
from fledge_tasks.cli import group as _group  # noqa: F401
from fledge_tasks.cli import main
from fledge_tasks.filesystems import libext2fs
from tests.layers import Member, folder, symlink
from tests.layouts import Layout
from tests.workspaces import Result, Workspace, processes_about

BASE = [
    folder("usr"),
    folder("usr/bin"),
    symlink("bin", "usr/bin"),
    Member("usr/bin/app", b"\x7fELF" * 3000, mode=0o755),
]
MORE = [folder("etc"), Member("etc/motd", b"hello\n" * 2000)]
OURS = [".fledge.json", "manifest.json", "rootfs.img"]


def nothing() -> None:
    """Do nothing."""


def _no_sync(_fd: object) -> None:
    pass


@dataclass
class Drill(Workspace):
    """A workspace whose `fledge` is forked from the test process; `env` adds to the environment."""

    def fledge(self, *arguments: str, timeout: float = 60, prepare: Callable[[], None] = nothing) -> Result:
        """Run `fledge` to its end; `prepare` is called in the new process before. A negative code is a signal."""
        return self.wait(self.start(*arguments, prepare=prepare), timeout)

    def start(self, *arguments: str, prepare: Callable[[], None] = nothing) -> int:
        """Start it, and return its process, which leads its session."""
        libext2fs._library()  # takes longer to load than the rest takes to run
        pid = os.fork()
        if pid:
            return pid
        code = 70
        try:
            os.setsid()
            os.chdir("/")
            for number, name in (
                (0, os.devnull),
                (1, self._printed(os.getpid(), 1)),
                (2, self._printed(os.getpid(), 2)),
            ):
                fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                os.dup2(fd, number)
                os.close(fd)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            os.environ.clear()
            os.environ.update(self.environment())
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
            os.fsync = _no_sync  # type: ignore[assignment]  # nobody pulls the plug here, and what a killed process wrote is written
            sys.argv = ["fledge", "-C", str(self.root), *arguments]
            prepare()
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int, timeout: float = 60) -> Result:
        """Wait for its end; nothing of its session may be left then."""
        deadline = time.monotonic() + timeout
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"it hangs: {self._read(pid, 2)}")
            time.sleep(0.002)
        while left := _session(pid):
            assert time.monotonic() < deadline, f"it left {left}"
            time.sleep(0.002)
        printed = [self._read(pid, number) for number in (1, 2)]
        return Result(os.waitstatus_to_exitcode(ended[1]), *printed)

    def points(self, *arguments: str) -> list[str]:
        """Run a program that shall succeed, and return the crash points that it passed."""
        pid = self.start(*arguments, prepare=at(0, nothing))
        result = self.wait(pid)
        assert result.code == 0, result.stderr
        return (self.home / f"{pid}.log").read_text().splitlines()

    def _printed(self, pid: int, number: int) -> str:
        return str(self.home / f"{pid}.{number}")

    def _read(self, pid: int, number: int) -> str:
        path = Path(self._printed(pid, number))
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return text

    def copy(self, name: str) -> Drill:
        """Return a copy, with times and holes, at a path that starts beside it."""
        target = self.root.parent / name
        subprocess.run(["cp", "-a", "--sparse=always", self.root, target], check=True)
        return Drill(target, self.home, env=self.env)

    def layout(self, name: str) -> Layout:
        """Return the layout that the reference `oci:../layouts/NAME` of an image leads to."""
        return Layout(self.root / "layouts" / name)

    def edit(self, name: str, text: str) -> None:
        """Write a file of the image `web`."""
        (self.root / "web" / name).write_text(text)

    def settled(self) -> dict[str, list[str]]:
        """Return what lies where builds leave nothing behind but results: names by place (of leases, how many)."""
        cache = self.cache or self.root / "cache"
        return {
            "cache": sorted(path.name for path in cache.iterdir() if path.name != "aside"),
            "leases": ["file"] * len(list((cache / "leases").glob("*"))),
            "tmp": sorted(path.name for path in (cache / "tmp").rglob("*")),
            "root": sorted(path.name for path in self.root.iterdir()),
            "build": sorted(path.name for path in (self.root / "build").rglob("*") if path.is_file()),
            "entries": sorted(path.name for path in (cache / "objects").glob("??/*")),
        }


def _session(leader: int) -> list[int]:
    """Return the processes of a session that live. Programs that ours starts have sessions of their own."""
    found: list[int] = []
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return found  # not even a zombie that nobody has waited for
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):
                # proc(5): after the name in parentheses come state, parent, group and session.
                state, _, _, session, *_ = (process / "stat").read_text().rpartition(")")[2].split()
                if int(session) == leader and state != "Z":
                    found.append(int(process.name))
    return found


def with_web(root: Path, home: Path) -> Drill:
    """Return a workspace with an image `web` of one layer that has all that an image can have."""
    drill = Drill(root, home)
    agent = '[agent]\nsource_strategy = "local"\npath = "kestrel"\n'
    drill.add("web", "oci:../layouts/web", buffer_mb=1, mappings={"conf": "/srv/conf"}, more=agent)
    drill.edit("conf", "one\n")
    (root / "web" / "kestrel").write_bytes(b"\x7fELF" + b"agent" * 1000)
    drill.layout("web").write(BASE)
    return drill


def at(number: int, fault: Callable[[], None]) -> Callable[[], None]:
    """Return what makes a forked program meet a fault at its crash point of this number, from 1."""

    def prepare() -> None:
        log = Path(os.environ["HOME"]) / f"{os.getpid()}.log"
        fsutil.CRASH_LOG, fsutil.CRASH_AT, fsutil.crash = str(log), number, fault

    return prepare


def killed() -> None:
    """End the whole process group, as a crash of all would."""
    os.killpg(0, signal.SIGKILL)


def is_quiet(path: Path, seconds: float = 5.0) -> bool:
    """Wait until no process names `path` in its command line any more."""
    deadline = time.monotonic() + seconds
    while processes_about(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return processes_about(path) == []
