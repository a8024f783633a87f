"""A clock that jumps: results stay right, an edit is never missed, and clean-up neither forgets nor takes too much."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fledge_tasks import collect, workspace
from fledge_tasks.digest import sha256_bytes
from fledge_tasks.index import FileDigests, Index
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests.drills import Drill, with_web
from tests.test_store import build
from tests.tools import need
from tests.workspaces import Workspace, sha256_of

DAY = 86_400
# Times of files come from the kernel, whose clock nobody touches; so the program's clock is the one that is off.
FAKED = {"NO_FAKE_STAT": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    need("mke2fs", "faketime")
    return with_web(tmp_path / "w", tmp_path)


def off_by(drill: Drill, offset: str) -> Workspace:
    """Return the workspace with a clock that is off for all programs of a build."""
    return Workspace(drill.root, drill.home, env=FAKED, prefix=["faketime", "-m", "-f", offset])


def test_builds(drill: Drill) -> None:
    """Back, forth and right again, with an edit at each stop, which is in the image; nothing else runs."""
    sums: dict[str, str] = {}
    for offset in ("+0d", "-3d", "+4000d", "+0d"):
        clock = off_by(drill, offset)
        for text in ("one\n", "two\n"):
            drill.edit("conf", text)
            result = clock.build("-j", "2")
            assert sums.setdefault(text, str(result.image("web")["sha256"])) == sha256_of(drill.output("web")), offset
            assert {"resolve", "unpack", "fetch"}.isdisjoint(result.stages("web")) or offset == "+0d"
            assert clock.build().stages("web") == [], offset
    assert len(set(sums.values())) == 2
    assert drill.settled()["tmp"] == []
    assert drill.fledge("cache", "verify").code == 0


@pytest.mark.parametrize("offset", [-3 * DAY, 3 * DAY])
def test_files_from_another_time(drill: Drill, offset: int) -> None:
    """Mapped files, results and entries whose times lie in the past or in the future."""
    drill.build()
    expected = sha256_of(drill.output("web"))
    when = time.time() + offset
    for path in (*(drill.root / "web").iterdir(), *(drill.root / "cache" / "objects").glob("*/*/*")):
        os.utime(path, (when, when))
    assert drill.build().stages("web") == []
    drill.output("web").unlink()
    assert drill.build().stages("web") == ["assemble"]
    assert sha256_of(drill.output("web")) == expected
    for text in ("two\n", "six\n"):  # of one size, and of one mtime
        drill.edit("conf", text)
        os.utime(drill.root / "web" / "conf", (when, when))
        assert drill.build().stages("web") == ["mkfs", "assemble", "manifest"]
    drill.edit("conf", "one\n")
    assert drill.build().image("web")["sha256"] == expected


def test_digests_of_files_from_the_future_are_not_remembered(tmp_path: Path) -> None:
    digest_of, file = FileDigests(Index(tmp_path / "index")), tmp_path / "f"
    for text in (b"one", b"two"):
        file.write_bytes(text)
        os.utime(file, (4e9, 4e9))
        assert digest_of(file) == sha256_bytes(text)
    assert Index(tmp_path / "index").items("file") == {}


def test_gc_after_the_clock_was_set_back(tmp_path: Path) -> None:
    """What was used 'in the future' counts as used now: it is not the last to go for ever, and not the first."""
    store = Store(tmp_path / "cache")
    now = int(time.time())
    used = {"future": now + 400 * DAY, "old": now - 9 * DAY, "new": now - 2 * DAY}
    keys = {name: build(store, name).key for name in used}
    for name, when in used.items():
        store.index.set(f"used:{keys[name][7:]}", when)
    store.close()
    assert [each.key for each in collect.candidates(store)] == [keys["old"], keys["new"], keys["future"]]
    assert [each.key for each in collect.collect(store, None, max_age_seconds=5 * DAY).removed] == [keys["old"]]
    when = store.used()[keys["future"]]
    assert now <= when <= time.time(), "from now on it ages"
    assert store.used()[keys["new"]] == now - 2 * DAY
    for name in ("future", "new"):
        store.index.set(f"used:{keys[name][7:]}", now - 6 * DAY)
    assert len(collect.collect(store, None, max_age_seconds=5 * DAY).removed) == 2
    store.close()


def test_gc_whose_clock_is_ahead_leaves_a_running_build_alone(drill: Drill) -> None:
    """A day on its clock is no reason to take away what somebody is at: the lock tells, not the time."""
    drill.build()
    found = workspace.load(drill.root)
    store = Planner(found, Store(found.cache)).store
    key = sha256_bytes(b"in work")
    with store.building(key), store.staging(key) as folder:
        (folder / "data").write_bytes(b"half")
        assert off_by(drill, "+30d").fledge("cache", "gc", "--max-age", "1d").code == 0
        assert (folder / "data").read_bytes() == b"half"
    left = store.root / "tmp" / f"{key[7:]}.abc"
    left.mkdir()
    assert off_by(drill, "-30d").fledge("cache", "gc", "--max-age", "1d").code == 0
    assert not left.exists()
    assert drill.build().stages("web") == []
    store.close()
