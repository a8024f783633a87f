"""A disk that is full at any point, and a cache that may only be read."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fledge_tasks.store import Store
from tests.drills import BASE, MORE, Drill, at, with_web
from tests.layouts import Layout
from tests.tools import need, need_root
from tests.workspaces import Workspace, sha256_of


@contextlib.contextmanager
def mounted(folder: Path, mib: int) -> Iterator[Path]:
    """Mount a filesystem of some MiB on a new folder."""
    need("mount", "umount", "mke2fs")
    need_root()
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], check=False)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def filling(disk: Path) -> Callable[[], None]:
    """Return what takes all the room that a filesystem has."""

    def fill() -> None:
        fd = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT, 0o644)
        with contextlib.suppress(OSError):
            while os.write(fd, bytes(1 << 16)):
                pass
        with contextlib.suppress(OSError):
            while os.write(fd, bytes(512)):
                pass
        os.close(fd)

    return fill


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    need("mke2fs")
    return with_web(tmp_path / "w", tmp_path)


@pytest.mark.parametrize("form", ["rootfs.img", "rootfs.qcow2"])
def test_a_disk_that_is_full_at_every_point(drill: Drill, tmp_path: Path, form: str) -> None:
    """Cache and results are on one disk, which has no room left from some point on."""
    if form == "rootfs.qcow2":
        need("qemu-img", "veritysetup")
        with (drill.root / "web" / "fledge.toml").open("a") as file:
            file.write('[output]\nformat = "qcow2"\nverity = true\n')
    source = drill.copy("source")
    points = drill.points("build", "-j", "1")
    expected, clean = sha256_of(drill.output("web").with_name(form)), drill.settled()
    failed = set()
    with mounted(tmp_path / "disk", 24) as disk:
        for name in dict.fromkeys(points):
            number = points.index(name) + 1
            one = source.copy("disk/one")
            result = one.fledge("build", "-j", "1" if number % 2 else "4", prepare=at(number, filling(disk)))
            if result.code:
                failed.add(name)
                assert result.code == 1, f"{name}: {result}"
                assert "no space left on the disk (0 MiB free)" in result.stderr, f"{name}: {result}"
                assert "hint: make room" in result.stderr
            else:
                assert sha256_of(one.output("web").with_name(form)) == expected, name
            assert "Traceback" not in result.stderr, f"{name}: {result}"
            assert one.settled()["tmp"] == [], name
            assert list(one.root.rglob(".fledge-tmp-*")) == [], name
            assert [] not in map(os.listdir, (one.root / "build").glob("*")), f"{name}: an empty folder is left"
            (disk / "filler").unlink()
            assert one.build().image("web")["sha256"] == expected == sha256_of(one.output("web").with_name(form)), name
            assert one.settled() == clean, name
            shutil.rmtree(one.root)
    for stage in ("publish config", "fledge.lock", "publish blob", "publish unpack", "publish mkfs", form):
        assert any(name.startswith(stage) for name in failed), f"it was not too full for {stage}: {failed}"


@pytest.fixture
def shared(drill: Drill) -> Workspace:
    """A built workspace whose cache its user may not write to: root, without the right to overrule modes."""
    need("setpriv")
    need_root()
    drill.build()
    for path in (drill.root / "cache", *(drill.root / "cache").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return Workspace(drill.root, drill.home, prefix=["setpriv", "--bounding-set=-dac_override"])


@pytest.fixture
def mount(drill: Drill, tmp_path: Path) -> Iterator[Drill]:
    """A built workspace whose cache is on a filesystem that is mounted read-only."""
    with mounted(tmp_path / "disk", 24) as disk:
        drill.cache = disk / "cache"
        drill.build()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        yield drill


@pytest.mark.parametrize("kind", ["shared", "mount"])
def test_a_read_only_cache_that_holds_it_all(kind: str, request: pytest.FixtureRequest) -> None:
    place: Workspace = request.getfixturevalue(kind)
    cache = place.cache or place.root / "cache"

    expected = sha256_of(place.output("web"))
    before = sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*"))
    result = place.fledge("build", "--json")
    assert (result.code, result.stages("web"), result.stderr) == (0, [], "")
    shutil.rmtree(place.output("web").parent)
    for jobs in ("1", "4"):
        result = place.fledge("build", "--json", "-j", jobs)
        assert (result.code, result.stages("web"), result.stderr) == (0, ["assemble", "manifest"], "")
        assert sha256_of(place.output("web")) == expected
        assert result.image("web")["sha256"] == expected
        place.output("web").unlink()
        place.output("web").with_name("manifest.json").unlink()
    if isinstance(place, Drill):
        pids = [place.start("build", "--json") for _ in range(4)]
        results = [place.wait(pid) for pid in pids]
        assert [(each.code, each.stderr) for each in results] == [(0, "")] * 4, "one at a time writes"
        assert sorted(stage for each in results for stage in each.stages("web")) == ["assemble", "manifest"]
    assert place.fledge("plan").code == 0
    assert place.fledge("cache", "verify").code == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in cache.rglob("*")) == before


@pytest.mark.parametrize("kind", ["shared", "mount"])
def test_a_read_only_cache_that_lacks_something(kind: str, request: pytest.FixtureRequest) -> None:
    place: Workspace = request.getfixturevalue(kind)
    why = "Permission denied" if kind == "shared" else "Read-only file system"

    expected = sha256_of(place.output("web"))
    (place.root / "web" / "conf").write_text("two\n")
    result = place.fledge("build")
    assert result.code == 1
    assert f": {why}\n  hint: set FLEDGE_CACHE_DIR to a folder that can be written to" in result.stderr
    assert str(place.cache or place.root / "cache") in result.stderr
    assert "Traceback" not in result.stderr
    assert sha256_of(place.output("web")) == expected
    Layout(place.root / "layouts" / "web").write(BASE, MORE)
    result = place.fledge("build", "-j", "4")
    assert result.code == 1 and why in result.stderr and "FLEDGE_CACHE_DIR" in result.stderr
    result = place.fledge("cache", "gc", "--max-age", "0d")
    assert result.code == 1 and "cannot be cleaned up" in result.stderr and why in result.stderr


def test_damage_in_a_read_only_cache(shared: Workspace) -> None:
    shared.output("web").unlink()
    [skeleton] = (shared.root / "cache" / "objects").glob("*/*/skeleton")
    os.truncate(skeleton, 5)
    result = shared.fledge("build")
    assert result.code == 1
    assert f"damaged: mkfs {skeleton.parent.name[:12]}: skeleton has 5 bytes, not " in result.stderr
    assert "; not used; it cannot be set aside: Permission denied" in result.stderr
    assert "FLEDGE_CACHE_DIR" in result.stderr


def test_what_is_read_only(drill: Drill, tmp_path: Path) -> None:
    """A cache that is not there yet, or that was trimmed for a saved copy, is not."""
    cache = drill.root / "cache"
    assert not Store(cache).is_read_only
    drill.build()
    assert not Store(cache).is_read_only
    shutil.rmtree(cache / "locks")
    assert not Store(cache).is_read_only
    with mounted(tmp_path / "disk", 24) as disk:
        trimmed = drill.copy("disk/w").root / "cache"
        assert not (trimmed / "locks").exists()
        assert not Store(trimmed).is_read_only
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert Store(trimmed).is_read_only
