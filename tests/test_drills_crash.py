"""Killed anywhere, a program is completed by the next one, with the same bytes, and leaves nothing lying about."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.drills import BASE, MORE, OURS, Drill, at, is_quiet, killed, with_web
from tests.tools import need
from tests.workspaces import Workspace, sha256_of

WRITTEN = ("created", "written", "synced", "renamed", "folder synced")
PUBLISHED = ("files synced", "record synced", "synced", "renamed", "folder synced", "remembered")


def points_of(steps: Sequence[str], *names: str) -> set[str]:
    return {f"{name}: {step}" for name in names for step in steps}


RESULTS = points_of(WRITTEN, "fledge.lock", "rootfs.img", "manifest.json", ".fledge.json")
STAGES = points_of(PUBLISHED, *(f"publish {stage}" for stage in ("config", "blob", "unpack", "customize", "mkfs")))
WORK = {
    "lease: made", "lease: written", "locked", "staging: made", "discard: renamed", "discard: folder deleted",
}  # fmt: skip
BUILD = RESULTS | STAGES | WORK
"""All crash points of a build. One that is added or lost shows here."""


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    need("mke2fs")
    return with_web(tmp_path / "w", tmp_path)


def passed(drill: Drill, *arguments: str) -> list[str]:
    """Run a program that shall succeed, in a new interpreter, and return the crash points that it passed."""
    log = drill.home / "points"
    log.unlink(missing_ok=True)
    program = Workspace(drill.root, drill.home, env={"FLEDGE_CRASH_LOG": str(log)})
    result = program.fledge(*arguments)
    assert result.code == 0, result.stderr
    return log.read_text().splitlines()


def crashes(source: Drill, points: Sequence[str], arguments: Sequence[str], names: set[str]) -> Iterator[Drill]:
    """Yield a copy of a workspace in which a program was killed, for each of its points that has one of these names."""
    for number, name in enumerate(points, 1):
        if name in names:
            one = source.copy("one")
            result = one.fledge(*arguments, prepare=at(number, killed))
            assert result.code == -signal.SIGKILL, f"{name}: {result}"
            assert is_quiet(one.root), "what it started does not outlive it"
            yield one
            shutil.rmtree(one.root)


def test_the_hook_kills_whole_builds(drill: Drill) -> None:
    """As a user would set it: one program in a session of its own, and its workers with it."""
    log = drill.home / "points"
    need("setsid")
    points = passed(drill, "build", "-j", "4")
    shutil.rmtree(drill.root / "cache")
    shutil.rmtree(drill.root / "build")
    log.unlink()
    number = points.index("publish unpack: renamed") + 1
    env = {"FLEDGE_CRASH_LOG": str(log), "FLEDGE_CRASH_AT": str(number)}
    program = Workspace(drill.root, drill.home, env=env, prefix=["setsid"])
    assert program.fledge("build", "-j", "4").code == -signal.SIGKILL
    assert len(log.read_text().splitlines()) == number
    assert drill.build().stages("web") == ["mkfs", "assemble", "manifest"]


def test_a_first_build(drill: Drill) -> None:
    source = drill.copy("source")
    points = passed(drill, "build", "-j", "1")
    assert set(points) == BUILD | {"prepared"}
    expected, clean = sha256_of(drill.output("web")), drill.settled()
    assert (clean["tmp"], clean["build"], len(clean["entries"])) == ([], OURS, 4)
    seen = 0
    for one in crashes(source, points, ["build", "-j", "1"], set(points)):
        where = points[seen]
        assert one.build("-j", "1").image("web")["sha256"] == expected == sha256_of(one.output("web")), where
        assert one.settled() == clean, where
        assert one.build("-j", "1").stages("web") == [], where
        seen += 1
    assert seen == len(points)


def test_a_build_that_replaces_what_is_there(drill: Drill) -> None:
    drill.build()
    before = sha256_of(drill.output("web"))
    drill.edit("conf", "two\n")
    drill.layout("web").write(BASE, MORE)
    source = drill.copy("source")
    points = drill.points("build", "-j", "4")
    assert set(points) == BUILD
    expected, clean = sha256_of(drill.output("web")), drill.settled()
    assert expected != before
    for one in crashes(source, points, ["build", "-j", "4"], RESULTS | {"discard: renamed"}):
        assert sha256_of(one.output("web")) in {before, expected}
        assert one.build().image("web")["sha256"] == expected == sha256_of(one.output("web"))
        assert one.settled() == clean
        assert one.build().stages("web") == []


def test_a_build_that_publishes_another_form(drill: Drill) -> None:
    """A qcow2 and a hash tree take the place of a raw disk."""
    need("qemu-img", "veritysetup")
    drill.build()
    with (drill.root / "web" / "fledge.toml").open("a") as file:
        file.write('[output]\nformat = "qcow2"\nverity = true\n')
    source = drill.copy("source")
    points = drill.points("build", "-j", "1")
    names = points_of(WRITTEN, "raw", "rootfs.qcow2", "rootfs.verity", "manifest.json")
    assert names < set(points)
    results = [drill.output("web").with_name(name) for name in ("manifest.json", "rootfs.qcow2", "rootfs.verity")]
    expected, clean = list(map(sha256_of, results[1:])), drill.settled()
    assert clean["build"] == [".fledge.json", *(path.name for path in results)]
    for one in crashes(source, points, ["build", "-j", "1"], set(points)):
        one.build("-j", "1")
        found = [one.root / path.relative_to(drill.root) for path in results]
        assert list(map(sha256_of, found[1:])) == expected
        assert one.settled() == clean
        assert one.build("-j", "1").stages("web") == []


def test_a_build_that_finds_damage(drill: Drill) -> None:
    drill.build()
    expected, clean = sha256_of(drill.output("web")), drill.settled()
    for skeleton in (drill.root / "cache" / "objects").glob("*/*/skeleton"):
        skeleton.unlink()
    (drill.root / "cache" / "index" / "cache.db").write_bytes(b"no database" * 100)
    shutil.rmtree(drill.root / "build")
    source = drill.copy("source")
    points = drill.points("build", "-j", "1")
    assert points.count("set aside: renamed") == 2
    for one in crashes(source, points, ["build", "-j", "1"], {"set aside: renamed"}):
        assert one.build().image("web")["sha256"] == expected
        assert one.settled() == clean


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("gc", "--max-age", "0d"), {"retire: renamed", "retired: deleted", "swept", "tidied"}),
        (("trim", "--ci"), {"retire: renamed", "retired: deleted", "swept", "tidied"}),
    ],
)
def test_cleaning_up(drill: Drill, arguments: Sequence[str], names: set[str]) -> None:
    drill.build()
    old = drill.settled()["entries"]
    drill.edit("conf", "two\n")
    drill.build()
    expected = sha256_of(drill.output("web"))
    for name in ("retired-00.11", f"{old[0]}.22"):  # what others left
        (drill.root / "cache" / "tmp" / name).mkdir()
    source = drill.copy("source")
    command = ["cache", *arguments]
    points = drill.points(*command)
    clean = drill.settled()
    assert set(points) == names
    assert points.count("retire: renamed") == 2 and clean["tmp"] == []
    for one in crashes(source, points, command, names):
        assert one.fledge(*command).code == 0
        assert one.settled() == clean
        assert one.build().image("web")["sha256"] == expected
        (one.root / "build" / "web" / "rootfs.img").unlink()
        assert one.build().stages("web") == ["assemble"]
        assert sha256_of(one.output("web")) == expected


def test_importing(drill: Drill) -> None:
    drill.build()
    expected = sha256_of(drill.output("web"))
    archive = drill.home / "cache.tar.zst"
    assert drill.fledge("cache", "export", str(archive)).code == 0
    shutil.rmtree(drill.root / "cache")
    shutil.rmtree(drill.root / "build")
    source = drill.copy("source")
    command = ["cache", "import", str(archive)]
    points = drill.points(*command)
    clean = drill.settled()
    assert points.count("publish unpack: renamed") == points.count("publish mkfs: renamed") == 1
    for one in crashes(source, points, command, {"prepared", *points_of(PUBLISHED, "publish unpack")}):
        assert one.fledge(*command).code == 0
        assert one.settled() == clean
        assert one.fledge("cache", "verify").code == 0
        assert one.build("--locked", "--offline").stages("web") == ["assemble", "manifest"]
        assert sha256_of(one.output("web")) == expected
