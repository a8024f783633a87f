"""What is taken out of the cache, and what stays: reached by lock files, held by builds, used lately."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fledge_tasks import collect, usage, workspace
from fledge_tasks.digest import Digest, sha256_bytes
from fledge_tasks.errors import LockError
from fledge_tasks.fsutil import allocated_bytes
from fledge_tasks.leases import Leases
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests.layers import Member, folder
from tests.layouts import Place
from tests.tools import need
from tests.workspaces import sha256_of

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" * 9000, mode=0o755)]
MORE = [Member("more", b"more" * 5000)]
DAY = 86_400


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "cache")
    yield store
    store.close()


def add(store: Store, text: str, *, size: int = 10_000, days: float = 0) -> Digest:
    """Add an entry that was last used some days ago, and is not held."""
    key = sha256_bytes(text.encode())
    with store.building(key), store.staging(key) as staging:
        (staging / "data").write_bytes(os.urandom(size))
        store.publish(text, "test", staging)
    store.index.set(f"used:{key[7:]}", int(time.time() - days * DAY))
    store.leases.release()
    return key


def test_the_least_recently_used_go_first(store: Store) -> None:
    keys = [add(store, str(days), days=days) for days in (3, 9, 1)]
    entries = collect.candidates(store)
    assert [each.key for each in entries] == [keys[1], keys[0], keys[2]]
    assert [each.size for each in entries] == [10_000] * 3
    one = entries[0].allocated
    assert one == allocated_bytes(store.folder(keys[1])) >= 10_000
    done = collect.collect(store, None, max_bytes=2 * one)
    assert [each.key for each in done.removed] == [keys[1]]
    assert [each.key for each in done.kept] == [keys[0], keys[2]]
    assert store.all_keys() == sorted([keys[0], keys[2]])
    assert collect.collect(store, None, max_bytes=2 * one).removed == []
    assert [each.key for each in collect.collect(store, None, max_age_seconds=2 * DAY).removed] == [keys[0]]
    assert store.find(keys[2]) is not None
    assert [each.key for each in collect.collect(store, None, max_bytes=0).removed] == [keys[2]]
    assert store.all_keys() == []
    assert list((store.root / "tmp").iterdir()) == []


def test_a_dry_run_removes_nothing(store: Store) -> None:
    key = add(store, "a", days=5)
    assert [each.key for each in collect.collect(store, None, max_bytes=0, dry_run=True).removed] == [key]
    assert store.find(key) is not None


def test_what_is_held_stays(store: Store) -> None:
    held, other = add(store, "held", days=9), add(store, "other", days=1)
    lease = Leases(store.root / "leases")
    lease.hold([held])
    done = collect.collect(store, None, max_bytes=0)
    assert [each.key for each in done.removed] == [other]
    assert set(done.held) == {held}
    assert store.find(held) is not None
    lease.release()
    assert [each.key for each in collect.collect(store, None, max_bytes=0).removed] == [held]


def test_what_was_just_published_is_held_by_its_builder(store: Store) -> None:
    key = sha256_bytes(b"new")
    with store.building(key), store.staging(key) as staging:
        (staging / "data").write_bytes(b"data")
        store.publish("new", "test", staging)
    other = Store(store.root)
    assert collect.collect(other, None, max_bytes=0).removed == []
    store.close()
    assert [each.key for each in collect.collect(other, None, max_bytes=0).removed] == [key]
    other.close()


def test_without_an_index_the_age_of_the_folder_counts(store: Store) -> None:
    key = add(store, "a")
    old = time.time() - 5 * DAY
    os.utime(store.folder(key), (old, old))
    store.close()
    shutil.rmtree(store.root / "index")
    assert collect.collect(store, None, max_age_seconds=6 * DAY).removed == []
    assert [each.key for each in collect.collect(store, None, max_age_seconds=4 * DAY).removed] == [key]


def test_the_index_forgets_what_is_gone(store: Store) -> None:
    gone, stays = add(store, "gone", days=5), add(store, "stays")
    collect.collect(store, None, max_age_seconds=DAY)
    names = store.index.names()
    assert not any(gone[7:] in name for name in names)
    assert f"used:{stays[7:]}" in names and f"object:{stays[7:]}/data" in names


def test_what_crashes_left_is_deleted(store: Store) -> None:
    store.prepare()
    temp = store.root / "tmp"
    for name, days in (("retired-ab.12", 0), ("cd.34", 2), ("ef.56", 0)):
        (temp / name).mkdir()
        old = time.time() - days * DAY
        os.utime(temp / name, (old, old))
    (store.root / "aside" / "gh").mkdir(parents=True)
    collect.collect(store, None, max_age_seconds=DAY)
    assert [path.name for path in temp.iterdir()] == ["ef.56"], "somebody may be building it"
    assert not (store.root / "aside").exists()


def test_damaged_entries_count_and_go(store: Store) -> None:
    key = add(store, "a", days=2)
    record = store.folder(key) / "entry.json"
    record.write_text("{")
    [entry] = collect.candidates(store)
    assert (entry.stage, entry.size) == ("", 0) and entry.allocated > 0
    assert [each.key for each in collect.collect(store, None, max_age_seconds=DAY).removed] == [key]


# --- reached by lock files -------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace with two images on one base, built."""
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, MORE, mappings={"conf": "/srv/conf"})
    place.add_layout("api", BASE)
    (place.root / "web" / "conf").write_text("one\n")
    place.build()
    return place


def planner(place: Place) -> Planner:
    found = workspace.load(place.root)
    return Planner(found, Store(found.cache))


def keys(place: Place) -> set[str]:
    return set(planner(place).store.all_keys())


def test_what_images_are_made_of_stays(place: Place) -> None:
    before = keys(place)
    found = planner(place)
    done = collect.collect(found.store, found, max_bytes=0, max_age_seconds=0)
    found.store.close()
    assert done.removed == [] and keys(place) == before
    (place.root / "web" / "conf").write_text("two\n")
    place.build()
    newer = keys(place)
    assert len(newer - before) == 2  # customization and filesystem
    assert place.fledge("cache", "gc", "--max-size", "0").code == 0
    assert len(keys(place) & before) == len(before) - 2
    assert keys(place) >= newer - before
    assert place.build().stages("web") == []


def test_who_needs_what(place: Place) -> None:
    found = planner(place)
    users = collect.reached(found.store, found)
    plans = {image.name: found.plan(image) for image in found.workspace.images}
    web, api = plans["web"], plans["api"]
    assert web is not None and api is not None
    names = {name: f"{place.root}/fledge.lock:{name}" for name in plans}
    assert users[web.layers[0].unpack_key] == {names["web"], names["api"]}
    assert users[web.layers[1].unpack_key] == {names["web"]}
    assert users[api.mkfs.key()] == {names["api"]}
    assert set(found.store.all_keys()) <= users.keys()
    found.store.close()


def test_an_image_whose_mapped_file_is_gone_keeps_what_it_was_made_of(place: Place) -> None:
    before = keys(place)
    (place.root / "web" / "conf").unlink()
    found = planner(place)
    assert collect.collect(found.store, found, max_bytes=0).removed == []
    found.store.close()
    assert keys(place) == before


def test_other_workspaces_with_this_cache_keep_theirs(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEDGE_CACHE_DIR", str(place.root / "cache"))
    other = Place(tmp_path / "other", tmp_path)
    other.add_layout("job", BASE, [Member("job", b"job")])
    other.build()
    lone = Place(tmp_path / "lone", tmp_path)
    lone.add_layout("x", [Member("x", b"x")])
    lone.build()
    before = keys(place)
    assert place.fledge("cache", "gc", "--max-size", "0").code == 0
    assert keys(place) == before
    (lone.root / "fledge.lock").unlink()  # nothing reaches its entries any more
    shutil.rmtree(place.root / "build")
    assert place.fledge("cache", "gc", "--max-size", "0").code == 0
    assert len(before - keys(place)) == 4
    assert other.build().stages("job") == []
    (other.root / "build" / "job" / "rootfs.img").unlink()
    assert other.build().stages("job") == ["assemble"]
    # Saved for the next run of this workspace's job, the cache needs nothing of others.
    assert place.fledge("cache", "trim").code == 0
    (other.root / "build" / "job" / "rootfs.img").unlink()
    assert other.build().stages("job") == ["assemble"]
    assert place.fledge("cache", "trim", "--ci").code == 0
    (other.root / "build" / "job" / "rootfs.img").unlink()
    assert "unpack" in other.build().stages("job")
    assert place.build().stages("web") == ["assemble", "manifest"]


def test_a_lock_file_that_cannot_be_read_removes_nothing(place: Place) -> None:
    (place.root / "fledge.lock").write_text("{")
    before = keys(place)
    found = planner(place)
    with pytest.raises(LockError):
        collect.collect(found.store, found, max_bytes=0)
    found.store.close()
    assert place.fledge("cache", "gc", "--max-size", "0").code == 2
    assert keys(place) == before


# --- the commands ----------------------------------------------------------------------------------


def test_gc_for_people_and_machines(place: Place) -> None:
    (place.root / "web" / "conf").write_text("two\n")
    place.build()
    shown = place.fledge("cache", "gc", "--max-age", "0d", "--dry-run").stdout.splitlines()
    assert [line.split(",")[0].rpartition(" ")[0] for line in shown[:2]] in (
        ["would remove customize", "would remove mkfs"], ["would remove mkfs", "would remove customize"],
    )  # fmt: skip
    assert shown[2].startswith("would remove 2 entries, ")
    assert ": 8 that lock files reach, 0 that running builds use, 0 within the limits" in shown[3]
    done = json.loads(place.fledge("cache", "gc", "--max-size", "0", "--json").stdout)
    assert sorted(each["stage"] for each in done["removed"]) == ["customize", "mkfs"]
    assert done["kept"] == 8 and done["dry_run"] is False
    assert place.fledge("cache", "gc").code == 2
    for bad in ("x", "10", "-1d", "5y"):
        result = place.fledge("cache", "gc", f"--max-age={bad}")
        assert (result.code, "expected an age such as 30d" in result.stderr) == (2, True)
    assert "expected a size such as 500M" in place.fledge("cache", "gc", "--max-size=ten").stderr


@pytest.mark.parametrize(
    ("text", "count"), [("0", 0), ("12", 12), ("1K", 1024), ("1.5M", 3 << 19), ("2GiB", 2 << 30), ("1tb", 1 << 40)]
)
def test_sizes(text: str, count: int) -> None:
    from fledge_tasks.cli.cache.units import Size

    assert Size().convert(text, None, None) == count


def test_trim_leaves_what_is_worth_saving(place: Place) -> None:
    (place.root / "web" / "conf").write_text("two\n")
    place.build()
    (place.root / "cache" / "aside" / "x").mkdir(parents=True)
    assert place.fledge("cache", "trim", "--ci").code == 0
    assert sorted(path.name for path in (place.root / "cache").iterdir()) == ["CACHEDIR.TAG", "index", "objects"]
    assert [path.name for path in (place.root / "cache" / "index").iterdir()] == ["cache.db"]
    assert place.build().stages("web") == []
    nowhere = Place(place.root / "nowhere", place.home)
    nowhere.root.mkdir()
    result = nowhere.fledge("cache", "trim")
    assert (result.code, "there is no workspace here" in result.stderr) == (2, True)


def test_verify_finds_every_damage_and_repairs_it(place: Place) -> None:
    sums = {name: sha256_of(place.output(name)) for name in ("web", "api")}
    result = place.fledge("cache", "verify")
    assert (result.code, result.stdout) == (0, "8 entries checked, 0 damaged\n")
    files = sorted(path for path in (place.root / "cache" / "objects").glob("*/*/*") if path.stat().st_size)
    for number, file in enumerate(files[::2]):
        file.chmod(0o644)
        status, data = file.stat(), bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        if number % 3 == 0:
            file.write_bytes(data)
            os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        elif number % 3 == 1:
            file.write_bytes(data[:-1])
        else:
            file.unlink()
    damaged = {file.parent.name for file in files[::2]}
    result = place.fledge("cache", "verify", "--json")
    assert result.code == 1
    assert {each["key"][7:] for each in json.loads(result.stdout)["damaged"]} == damaged
    assert place.fledge("cache", "verify", "--repair").code == 0
    assert place.fledge("cache", "verify").code == 0
    shutil.rmtree(place.root / "build")
    built = place.build()
    assert {name: built.image(name)["sha256"] for name in sums} == sums


def test_stats(place: Place) -> None:
    place.build()
    found = json.loads(place.fledge("cache", "stats", "--json").stdout)
    assert found["images"] == 2
    unpack = found["kinds"]["unpack"]
    assert (unpack["entries"], unpack["reached"], unpack["shared"]) == (2, 2, 1)
    assert unpack["unshared_bytes"] > unpack["bytes"] > 36_000
    assert found["kinds"]["mkfs"]["entries"] == found["kinds"]["customize"]["entries"] == 2
    assert found["kinds"]["config"]["entries"] == 2
    assert found["today"] == found["total"]
    assert (found["total"]["misses"], found["total"]["hits"]) == (10, 12)
    assert found["total"]["bytes_saved"] > 0 and found["total"]["seconds_built"] > 0
    lines = place.fledge("cache", "stats").stdout.splitlines()
    assert lines[0] == f"{place.root}/cache: used by 2 images"
    assert [line.split("\t")[0] for line in lines[1:]] == [
        "kind", "config", "customize", "mkfs", "unpack", "all", "stages", "today", "in all",
    ]  # fmt: skip


def test_what_is_counted(place: Place) -> None:
    found = planner(place)
    [counts] = usage.days(found.store.index).values()
    found.store.close()
    assert (counts.hits, counts.misses) == (1, 10)  # the base, which was made once, is found by the other image
    (place.root / "web" / "conf").write_text("two\n")
    place.build("web")
    found = planner(place)
    [counts] = usage.days(found.store.index).values()
    made = usage.made_images(found.store.index)
    found.store.close()
    assert (counts.hits, counts.misses) == (4, 13)
    assert set(made) == {f"{place.root}/fledge.lock:{name}" for name in ("web", "api")}
    one = made[f"{place.root}/fledge.lock:web"]
    assert one.bytes > place.output("web").stat().st_size and one.seconds > 0
    assert usage.lock_path(f"{place.root}/fledge.lock:web") == place.root / "fledge.lock"
