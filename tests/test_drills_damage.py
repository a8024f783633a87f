"""Damage of any kind to anything stored: it is noticed, said in one line, and made again with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.drills import Drill, at, killed, with_web
from tests.test_agent import Server, body
from tests.test_dodo import doit
from tests.tools import need
from tests.workspaces import sha256_of

AGENT = b"\x7fELF" + b"agent" * 1000


def flip(path: Path) -> None:
    """Change a byte in the middle. All of stat but ctime, which nobody can set, is as before."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x20
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(status.st_mode)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) == (
        status.st_ino, status.st_size, status.st_mtime_ns,
    )  # fmt: skip


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = [flip, truncate, remove]
SAYS: dict[Callable[[Path], object], str] = {
    flip: "has the XXH3",
    truncate: "bytes, not",
    remove: "cannot be read: No such file or directory",
}
NO_RECORD = "its record is missing, damaged, or of another version"


@pytest.fixture
def drill(tmp_path: Path) -> Drill:
    need("mke2fs")
    return with_web(tmp_path / "w", tmp_path)


def entries(drill: Drill) -> dict[str, Path]:
    """Return the folders of all entries, by stage; there is one of each."""
    folders = list((drill.root / "cache" / "objects").glob("*/*"))
    found = {str(json.loads((folder / "entry.json").read_bytes())["stage"]): folder for folder in folders}
    assert len(found) == len(folders)
    return found


def check(one: Drill, path: Path, stage: str, damage: Callable[[Path], object], expected: str) -> None:
    """Damage a file of an entry, and let a build find it."""
    damage(path)
    result = one.fledge("build", "-j", "2", "--json")
    assert result.code == 0, result.stderr
    assert result.image("web")["sha256"] == expected == sha256_of(one.output("web")), path.name
    [line] = result.stderr.splitlines()
    name = path.parent.name[:12]
    if path.name == "entry.json":
        assert line.startswith(f"damaged: entry {name}: {NO_RECORD}; set aside")
    else:
        assert line.startswith(f"damaged: {stage} {name}: {path.name} "), line
        assert SAYS[damage] in line
    assert line.endswith("; set aside, to be made again when it is needed")
    assert one.settled()["tmp"] == []
    assert one.fledge("cache", "verify").code == 0
    assert one.build().stages("web") == []


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stage", ["config", "unpack", "customize", "mkfs"])
def test_entries(drill: Drill, stage: str, damage: Callable[[Path], object]) -> None:
    drill.build()
    expected = sha256_of(drill.output("web"))
    shutil.rmtree(drill.root / "build")
    names = sorted(path.name for path in entries(drill)[stage].iterdir())
    wanted = {"config": ["data"], "unpack": ["index", "payload"], "mkfs": ["map", "skeleton"]}
    assert names == sorted(["entry.json", *wanted.get(stage, ["index", "payload"])])
    for name in names:
        one = drill.copy("one")
        check(one, entries(one)[stage] / name, stage, damage, expected)
        shutil.rmtree(one.root)


@pytest.mark.parametrize("damage", DAMAGES)
def test_blobs(drill: Drill, damage: Callable[[Path], object]) -> None:
    """A build that was killed between fetch and unpack leaves one."""
    source = drill.copy("source")
    points = drill.points("build", "-j", "1")
    expected = sha256_of(drill.output("web"))
    source.fledge("build", "-j", "1", prepare=at(points.index("publish blob: remembered") + 1, killed))
    for name in ("blob", "entry.json"):
        one = source.copy("one")
        check(one, entries(one)["blob"] / name, "blob", damage, expected)
        shutil.rmtree(one.root)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("damage", DAMAGES)
def test_agents(drill: Drill, server: Server, damage: Callable[[Path], object]) -> None:
    url = server.url(*[body(AGENT)] * 3)
    more = f'[agent]\nsource_strategy = "http"\nurl = "{url}"\n'
    drill.add("web", "oci:../layouts/web", buffer_mb=1, mappings={"conf": "/srv/conf"}, more=more)
    drill.env = {"no_proxy": "*"}
    drill.build()
    expected = sha256_of(drill.output("web"))
    for name in ("data", "entry.json"):
        shutil.rmtree(drill.root / "build")
        check(drill, entries(drill)["agent"] / name, "agent", damage, expected)
    assert len(server.requests) == 3


def test_a_flip_that_only_ctime_shows_is_noticed_in_an_entry_at_once(drill: Drill) -> None:
    """Entries are known by size, mtime, ctime and inode: `flip` restores all but ctime, and the file is read again."""
    drill.build()
    expected = sha256_of(drill.output("web"))
    flip(entries(drill)["unpack"] / "payload")
    result = drill.fledge("build", "--json")
    assert (result.image("web")["sha256"], result.stderr) == (expected, ""), (
        "the output is good: nobody looks at entries"
    )
    drill.output("web").unlink()
    assert "damaged: unpack" in drill.fledge("build", "--json").stderr
    assert sha256_of(drill.output("web")) == expected


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rootfs.img", "manifest.json", ".fledge.json"])
def test_results(drill: Drill, name: str, damage: Callable[[Path], object]) -> None:
    """Results are known by size, mtime and inode, not by ctime, which a backup or a chmod changes.

    So one byte that somebody flipped and hid by restoring the mtime is for `fledge verify` to find.
    """
    drill.build()
    folder = drill.root / "build" / "web"
    before = {path.name: sha256_of(path) for path in folder.iterdir() if path.name != ".fledge.json"}
    damage(folder / name)
    result = drill.build()
    if damage is flip and name != ".fledge.json":
        assert result.stages("web") == []
        if name == "rootfs.img":
            verified = drill.fledge("verify", "web")
            assert verified.code == 1, verified
        os.utime(folder / name)  # not hidden
        result = drill.build()
    assert "assemble" in result.stages("web") or name == "manifest.json"
    assert {path.name: sha256_of(path) for path in folder.iterdir() if path.name != ".fledge.json"} == before
    assert drill.build().stages("web") == []


def test_the_reason_is_said_for_results(drill: Drill) -> None:
    drill.build()
    truncate(drill.output("web"))
    assert drill.fledge("build").stderr.startswith("web: rootfs.img was changed since it was written\n")


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_lock_file(drill: Drill, damage: Callable[[Path], object]) -> None:
    """Missing, it is made again. A digest of another value is no such image; what is no JSON is refused."""
    drill.build()
    expected = sha256_of(drill.output("web"))
    lock = drill.root / "fledge.lock"
    good = lock.read_bytes()
    if damage is flip:
        digest = json.loads(good)["images"]["oci:layouts/web linux/amd64"]["image"]["layers"][0]["diff_id"]
        other = digest[:-1] + ("0" if digest[-1] != "0" else "1")
        lock.write_bytes(good.replace(digest.encode(), other.encode()))
        result = drill.fledge("build")
        assert result.code == 1
        assert "diff ID" in result.stderr and other in result.stderr
        assert sha256_of(drill.output("web")) == expected, "what was there stays"
        lock.write_bytes(good.replace(b'"version": 1', b'"version": 3'))
        assert "is of version 3, expected 1" in drill.fledge("build").stderr
        lock.unlink()
    elif damage is truncate:
        lock.write_bytes(good[:-3])
        result = drill.fledge("build")
        assert result.code == 2
        assert "fledge.lock: cannot be read" in result.stderr and "delete it and run `fledge lock`" in result.stderr
        lock.unlink()
    else:
        lock.unlink()
    assert drill.build().image("web")["sha256"] == expected
    assert lock.read_bytes() == good


# --- the index ----------------------------------------------------------------------------------------------------


def overwrite(folder: Path) -> None:
    (folder / "cache.db").write_bytes(b"no database at all" * 300)


def tear_a_page(folder: Path) -> None:
    """Leave the header: it opens, and shows its damage later."""
    path = folder / "cache.db"
    data = bytearray(path.read_bytes())
    assert len(data) > 3 * 4096
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)


def other_tables(folder: Path) -> None:
    """What another version of diskcache might use."""
    with sqlite3.connect(folder / "cache.db") as database:
        database.execute("ALTER TABLE Cache RENAME COLUMN value TO content")
    database.close()


def newer_file(folder: Path) -> None:
    """SQLite, file format: the read version at offset 19 is one that this library does not know."""
    path = folder / "cache.db"
    data = bytearray(path.read_bytes())
    data[18:20] = b"\x09\x09"
    path.write_bytes(data)


def newer(folder: Path) -> None:
    with sqlite3.connect(folder / "cache.db") as database:
        database.execute("UPDATE Cache SET value = '2' WHERE key = 'format'")
    database.close()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (overwrite, "is damaged (file is not a database)"),
        (tear_a_page, "is damaged ("),
        (other_tables, "is damaged ("),
        (newer_file, "is damaged ("),
        (newer, "is of version 2, not 1"),
    ],
)
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_the_index(drill: Drill, damage: Callable[[Path], object], says: str, jobs: str) -> None:
    drill.build()
    expected, index = sha256_of(drill.output("web")), drill.root / "cache" / "index"
    damage(index)
    drill.edit("conf", "two\n")
    result = drill.fledge("build", "--json", "-j", jobs)
    assert result.code == 0
    [line] = result.stderr.splitlines()
    assert line.startswith(f"{index}: {says}")
    assert line.endswith("; set aside, and a new one begun")
    assert (drill.root / "cache" / "aside" / "index" / "cache.db").exists()
    assert drill.fledge("build").stderr == ""
    drill.edit("conf", "one\n")
    result = drill.fledge("build", "--json")
    assert (result.image("web")["sha256"], result.stderr) == (expected, "")
    counted = json.loads(drill.fledge("cache", "stats", "--json").stdout)
    assert counted["total"]["misses"] > 0, "the new one is kept"


def test_a_deleted_index_is_nothing_to_speak_of(drill: Drill) -> None:
    drill.build()
    expected = sha256_of(drill.output("web"))
    shutil.rmtree(drill.root / "cache" / "index")
    drill.output("web").unlink()
    result = drill.fledge("build", "--json")
    assert (result.image("web")["sha256"], result.stages("web"), result.stderr) == (expected, ["assemble"], "")


def test_bare_doit_says_it_too(drill: Drill) -> None:
    drill.build()
    expected = sha256_of(drill.output("web"))
    (drill.root / "dodo.py").write_text("from fledge_tasks.dodo import *\n")
    flip(entries(drill)["mkfs"] / "map")
    drill.output("web").unlink()
    [line] = [line for line in doit(drill) if "mkfs" in line and "damaged" in line]
    assert line.startswith("damaged: mkfs ")
    assert sha256_of(drill.output("web")) == expected
