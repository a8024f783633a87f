"""The index: it may forget, it must not lie, and nothing that is put into its file is ever run."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import sqlite3
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from fledge_tasks import index as index_module
from fledge_tasks.digest import sha256_bytes
from fledge_tasks.index import FileDigests, Index, signature

OLD_NS = 1_600_000_000 * 10**9


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index")


def old_file(path: Path, data: bytes) -> Path:
    """Write a file and wait until its times are trusted."""
    path.write_bytes(data)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    return path


@pytest.fixture
def digest_of(index: Index, monkeypatch: pytest.MonkeyPatch) -> FileDigests:
    """Digests that trust a file at once when its mtime is old: ctime cannot be set, and a test cannot wait."""
    monkeypatch.setattr(index_module, "_RACY_SECONDS", -1e9)
    return FileDigests(index)


def test_values_come_back(index: Index) -> None:
    values = {"a": 1, "b": [1, "x", None], "c": {"d": 1.5}, "e": "text", "f": True, "g": []}
    for name, value in values.items():
        index.set(name, value)
    index.close()
    assert {name: index.get(name) for name in values} == values
    assert index.get("h") is None


def test_what_is_no_json_is_not_kept(index: Index) -> None:
    index.set("a", {1, 2})
    index.set("b", object())
    assert index.get("a") is index.get("b") is None


def test_writes_together_are_kept_whatever_happens(index: Index) -> None:
    with pytest.raises(OSError, match="mine"), index.together():  # noqa: PT012
        index.set("a", 1)
        raise OSError("mine")
    with index.together(), index.together():
        index.set("b", 2)
    index.close()
    assert (index.get("a"), index.get("b")) == (1, 2)


def test_a_forked_process_does_not_close_what_it_inherited(index: Index) -> None:
    index.set("a", 1)
    inherited = weakref.ref(index._cache)
    child = os.fork()
    if child == 0:
        found = index.get("a")
        index.close()
        gc.collect()
        os._exit(0 if found == 1 and inherited() is not None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert index.get("a") == 1


def test_a_forked_process_opens_its_own(index: Index) -> None:
    index.set("a", 1)
    child = os.fork()
    if not child:
        index.set("b", index.get("a"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert index.get("b") == 1


def poison(folder: Path, rows: dict[str, tuple[int, object, str | None]]) -> None:
    """Put rows into the database: name to (mode, value, file name)."""
    with sqlite3.connect(folder / "cache.db") as database:
        for name, (mode, value, filename) in rows.items():
            database.execute(
                "INSERT OR REPLACE INTO Cache (key, raw, store_time, expire_time, access_time, access_count, tag, "
                "size, mode, filename, value) VALUES (?, 1, 0, NULL, 0, 0, NULL, 0, ?, ?, ?)",
                (name, mode, filename, value),
            )
    database.close()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_nothing_foreign_is_unpickled_opened_or_deleted(index: Index, tmp_path: Path) -> None:
    index.set("mine", 1)
    index.close()
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    target = tmp_path / "index" / "target"
    target.write_bytes(bomb)
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    rows: dict[str, tuple[int, object, str | None]] = {
        "pickle": (4, bomb, None),
        "raw bytes": (1, bomb, None),
        "a number": (1, 5, None),
        "no JSON": (1, "{", None),
        "deep JSON": (1, "[" * 200_000, None),
        "a pickle file": (4, None, "target"),
        "a text file": (3, None, "../outside"),
        "a binary file": (2, None, str(outside)),
    }
    poison(tmp_path / "index", rows)
    for name in rows:
        assert index.get(name) is None, name
    assert index.get("mine") == 1
    for name in rows:  # replacing a row would delete its file
        index.set(name, "new")
        assert index.get(name) == "new"
    assert not (tmp_path / "exploded").exists()
    assert target.exists()
    assert outside.read_bytes() == b"precious"


def test_a_pickled_key_is_not_unpickled(index: Index, tmp_path: Path) -> None:
    index.set("mine", 1)
    index.close()
    with sqlite3.connect(tmp_path / "index" / "cache.db") as database:
        database.execute(
            "UPDATE Cache SET raw = 0, key = ? WHERE key = 'mine'", (pickle.dumps(Bomb(tmp_path / "exploded")),)
        )
    database.close()
    assert index.get("mine") is None
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["disk_surprise", "eviction_policy", "sqlite_surprise"])
def test_foreign_settings_do_no_harm(index: Index, tmp_path: Path, name: str) -> None:
    index.set("a", 1)
    index.close()
    with sqlite3.connect(tmp_path / "index" / "cache.db") as database:
        database.execute("INSERT OR REPLACE INTO Settings (key, value) VALUES (?, 'x; y')", (name,))
    database.close()
    assert index.get("a") in {1, None}
    index.set("a", 2)
    assert index.get("a") in {2, None}


@pytest.mark.parametrize("damage", [b"", b"not a database at all" * 300, b"SQLite format 3\0" + bytes(5000)])
def test_a_corrupt_index_begins_anew(index: Index, tmp_path: Path, damage: bytes) -> None:
    index.set("a", 1)
    index.close()
    (tmp_path / "index" / "cache.db").write_bytes(damage)
    assert index.get("a") is None
    index.set("a", 2)
    assert index.get("a") == 2


def test_an_index_that_cannot_be_opened_is_empty(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"a file")
    index = Index(tmp_path / "index")
    index.set("a", 1)
    assert index.get("a") is None
    with index.together():
        index.set("a", 1)
    index.close()
    assert (tmp_path / "index").read_bytes() == b"a file"


def test_an_index_that_goes_away_while_it_is_open(index: Index, tmp_path: Path) -> None:
    index.set("a", 1)
    shutil.rmtree(tmp_path / "index")
    with index.together():
        index.set("a", 2)
    assert index.get("a") in {1, 2, None}


def test_nothing_is_evicted(index: Index) -> None:
    with index.together():
        for number in range(3000):
            index.set(f"x:{number}", "x" * 100)
    index.close()
    assert all(index.get(f"x:{number}") for number in range(3000))


# --- digests of local files ---------------------------------------------------------------------


def test_a_file_is_read_once(digest_of: FileDigests, reads: list[Path], tmp_path: Path) -> None:
    file = old_file(tmp_path / "f", b"one")
    assert digest_of(file) == digest_of(file) == sha256_bytes(b"one")
    assert reads == [file]


def test_a_young_file_is_read_each_time(index: Index, reads: list[Path], tmp_path: Path) -> None:
    digest_of = FileDigests(index)
    file = old_file(tmp_path / "f", b"one")  # its mtime is old, its ctime is not
    assert digest_of(file) == digest_of(file) == sha256_bytes(b"one")
    assert reads == [file, file]


def test_a_file_older_than_two_seconds_is_trusted(
    index: Index, reads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest_of, file = FileDigests(index), old_file(tmp_path / "f", b"one")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * 10**9)
    assert digest_of(file) == digest_of(file) == sha256_bytes(b"one")
    assert reads == [file]


def test_every_trace_of_an_edit_counts(digest_of: FileDigests, tmp_path: Path) -> None:
    file = old_file(tmp_path / "f", b"one")
    assert digest_of(file) == sha256_bytes(b"one")
    old_file(file, b"two")  # same size and mtime: ctime tells
    assert digest_of(file) == sha256_bytes(b"two")
    replacement = old_file(tmp_path / "g", b"six")
    replacement.rename(file)
    assert digest_of(file) == sha256_bytes(b"six")
    file.write_bytes(b"seven")
    assert digest_of(file) == sha256_bytes(b"seven")


@pytest.mark.parametrize("memo", [[], "text", 5, {"a": 1}, [1, 2, 3, 4], [None] * 5])
def test_a_foreign_memo_is_not_believed(index: Index, digest_of: FileDigests, tmp_path: Path, memo: object) -> None:
    file = old_file(tmp_path / "f", b"one")
    index.set(f"file:{file}", memo)
    assert digest_of(file) == sha256_bytes(b"one")


@pytest.mark.parametrize("memo", [[], ["sha256:no"], [5], [sha256_bytes(b"x")] * 2])
def test_a_memo_without_a_digest_is_not_believed(
    index: Index, digest_of: FileDigests, tmp_path: Path, memo: list[object]
) -> None:
    file = old_file(tmp_path / "f", b"one")
    index.set(f"file:{file}", [*signature(file.stat()), *memo])
    assert digest_of(file) == sha256_bytes(b"one")


def test_a_file_that_is_not_there(digest_of: FileDigests, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digest_of(tmp_path / "f")
