"""A signal anywhere, or a worker that the kernel kills: a quick end, no orphan, and the next build goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drills import MORE, Drill, at, is_quiet, with_web
from tests.tools import need
from tests.workspaces import sha256_of


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    need("mke2fs")
    return with_web(tmp_path / "w", tmp_path)


def ctrl_c() -> None:
    """What a terminal does: the whole group gets it."""
    os.killpg(0, signal.SIGINT)


def terminated() -> None:
    """What a supervisor does: the program that it started gets it."""
    os.kill(os.getsid(0), signal.SIGTERM)


def timed(moment: Path, fault: Callable[[], None]) -> Callable[[], None]:
    def late() -> None:
        moment.write_text(str(time.monotonic()))
        fault()

    return late


KINDS = [("1", ctrl_c, 130), ("1", terminated, 143), ("4", ctrl_c, 130), ("4", terminated, 143)]


def test_a_signal_at_every_point(drill: Drill) -> None:
    """One kind of signal, in one kind of run, at each point in turn."""
    source, moment = drill.copy("source"), drill.home / "moment"
    points = drill.points("build", "-j", "1")
    expected, clean = sha256_of(drill.output("web")), drill.settled()
    for number, name in enumerate(points, 1):
        jobs, fault, code = KINDS[number % 4]
        one = source.copy("one")
        result = one.fledge("build", "-j", jobs, prepare=at(number, timed(moment, fault)))
        seconds = time.monotonic() - float(moment.read_text())
        assert (result.code, result.stderr.splitlines()[-1]) == (code, "interrupted"), f"{name}: {result}"
        assert "Traceback" not in result.stderr
        assert seconds < 3, name
        assert is_quiet(one.root)
        assert list(one.root.rglob(".fledge-tmp-*")) == [], name
        assert one.build().image("web")["sha256"] == expected == sha256_of(one.output("web")), name
        assert one.settled() == clean, name
        shutil.rmtree(one.root)


def out_of_memory() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("point", "task"),
    [
        ("publish config: renamed", "resolve:web"),
        ("publish blob: synced", "fetch:"),
        ("publish unpack: synced", "unpack:"),
        ("publish customize: synced", "mkfs:web"),
        ("publish mkfs: renamed", "mkfs:web"),
        ("rootfs.img: written", "assemble:web"),
        ("manifest.json: synced", "manifest:web"),
    ],
)
def test_a_worker_that_runs_out_of_memory(drill: Drill, point: str, task: str) -> None:
    """The kernel kills a worker of one image; the other image is built."""
    points = drill.copy("first").points("build", "-j", "1")
    expected = sha256_of(drill.root.with_name("first") / "build" / "web" / "rootfs.img")
    drill.add("api", "oci:../layouts/api", buffer_mb=1)
    drill.layout("api").write(MORE)
    result = drill.fledge("build", "-j", "4", "web", prepare=at(points.index(point) + 1, out_of_memory))
    assert result.code == 1
    assert f"error: {task}" in result.stderr
    assert "the worker process of this task was killed by signal 9 (Killed)" in result.stderr
    assert "hint: the machine may have run out of memory: try fewer jobs" in result.stderr
    assert is_quiet(drill.root)
    again = drill.build()
    assert again.image("web")["sha256"] == expected == sha256_of(drill.output("web"))
    assert drill.settled()["tmp"] == []
    assert list(drill.root.rglob(".fledge-tmp-*")) == []
