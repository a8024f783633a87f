"""Workspaces with a dodo.py, and `doit` run in them as a program whose processes and warnings are looked at."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from fledge_tasks.digest import short
from tests.layers import Member, archive, digest, folder
from tests.layouts import Place
from tests.tools import need, wait_for

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + bytes(20_000), mode=0o755)]
MORE = [folder("etc"), Member("etc/motd", b"hello\n")]
IMPORT = "from fledge_tasks.dodo import *\n"
GROUPS = ("assemble", "build", "fetch", "manifest", "mkfs", "resolve", "unpack", "verity")
MODES: dict[str, tuple[str, ...]] = {
    "serial": (),
    "processes": ("-n", "4"),
    "threads": ("-n", "4", "-P", "thread"),
}
"""The ways in which doit runs tasks; the last runs processes here, too."""

installed = pytest.mark.skipif(
    os.environ.get("FLEDGE_REQUIRE_TOOLS") != "1"
    and not any(entry.name == "fledge-memory" for entry in importlib.metadata.entry_points(group="doit.BACKEND")),
    reason="fledge-tasks is not installed, so doit does not know its state backend",
)
all_modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
two_modes = pytest.mark.parametrize("mode", [(), MODES["processes"]], ids=["serial", "processes"])
processes = pytest.mark.parametrize("mode", [MODES["processes"]], ids=["processes"])


@dataclass(frozen=True)
class Run:
    """What a run of doit printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def ran(self) -> set[str]:
        """The tasks that ran; those of stages that found their work done are among them."""
        return self._marked(".  ")

    @property
    def fresh(self) -> set[str]:
        """The tasks that were up to date."""
        return self._marked("-- ")

    @property
    def began(self) -> set[str]:
        """The tasks that ran, and each `fetch`: the first one of an image gets the blobs of all, whichever it is."""
        return self.ran | {task for task in self.fresh if task.startswith("fetch:")}

    def _marked(self, mark: str) -> set[str]:
        return {line[3:] for line in self.out.splitlines() if line.startswith(mark)}


class DodoPlace(Place):
    """Two images on one base, `web` of two layers with a mapped file and `api` of one, and a dodo.py."""

    def write_dodo(self, before: str = "", after: str = "") -> None:
        """Write the dodo.py: the import, and what stands before and after it."""
        (self.root / "dodo.py").write_text(before + IMPORT + after)

    @property
    def web_layers(self) -> list[str]:
        """The names of the layers of `web` in tasks, from the lowest up; the first is all of `api`."""
        return [short(digest(archive(members))) for members in (BASE, MORE)]

    def tasks(self, *names: str) -> set[str]:
        """Return the names of all tasks of these images that have something to do."""
        stages = {f"{stage}:{name}" for stage in ("resolve", "mkfs", "assemble", "manifest") for name in names}
        layers = self.web_layers if "web" in names else self.web_layers[:1]
        return stages | {f"{stage}:{layer}" for stage in ("fetch", "unpack") for layer in layers}

    def start(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start doit in a session of its own; any warning of Python is an error."""
        return subprocess.Popen(
            [sys.executable, "-m", "doit", *arguments],
            env={**self.environment(), "PYTHONWARNINGS": "error", **(env or {})},
            cwd=cwd or self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def doit(
        self,
        *arguments: str,
        code: int = 0,
        err: str = "",
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Run:
        """Run doit to its end, which must be soon, with this exit code, and leave no process behind.

        It must print `err` on its stderr, nothing else, and no traceback anywhere.
        """
        run = end(self.start(*arguments, cwd=cwd, env=env))
        assert (run.code, run.err) == (code, err), run.out
        assert "Traceback" not in run.out
        return run

    def results(self) -> dict[str, bytes]:
        """Return the lock file and all images and manifests."""
        files = [
            self.root / "fledge.lock",
            *self.root.glob("build/*/rootfs.img"),
            *self.root.glob("build/*/manifest.json"),
        ]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}


def make_place(root: Path) -> DodoPlace:
    """Make the workspace in the folder `w` of `root`, not built yet."""
    need("mke2fs")
    place = DodoPlace(root / "w", root / "home")
    place.add_layout("web", BASE, MORE, mappings={"conf": "/srv/conf"})
    place.add_layout("api", BASE)
    (place.root / "web" / "conf").write_text("one\n")
    place.write_dodo()
    return place


def end(process: subprocess.Popen[str]) -> Run:
    """Wait for the end of doit; nothing of its session may be left."""
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        out, err = process.communicate()
        pytest.fail(f"it hangs:\n{out}{err}")
    wait_for(lambda: session(process.pid) == [])
    return Run(process.returncode, out, err)


def session(leader: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_alive = (path / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if is_alive and os.getsid(int(path.name)) == leader:
                found.append(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
