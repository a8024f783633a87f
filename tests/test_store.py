"""The content store: an entry is whole or absent, whatever happens to the folder or to its builders."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import store as store_module
from fledge_tasks.digest import Digest, sha256_bytes, xxh3_file
from fledge_tasks.errors import StoreError
from fledge_tasks.interrupt import Interrupted, interruptible
from fledge_tasks.store import Entry, Store
from tests.tools import need, need_root

TEXT = "fledge-tasks test 1\nfield = 1\n"
KEY = sha256_bytes(TEXT.encode())
DATA = bytes(range(256)) * 64
_fork = multiprocessing.get_context("fork")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def build(store: Store, text: str = TEXT, data: bytes = DATA) -> Entry:
    """Publish an entry of two files, as a stage does it."""
    key = sha256_bytes(text.encode())
    with store.building(key), store.staging(key) as folder:
        (folder / "data").write_bytes(data)
        (folder / "small").write_bytes(b"1")
        return store.publish(text, "test", folder, info={"count": 1})


def again(store: Store) -> Store:
    """Return the store as another process sees it."""
    store.index.close()
    return Store(store.root)


def is_miss(store: Store) -> bool:
    """Tell whether the entry is a miss and was set aside, and whether it can be built again."""
    fresh = again(store)
    missed = fresh.find(KEY) is None
    folder = store.root / "objects" / KEY[7:9] / KEY[7:]
    aside = store.root / "aside" / KEY[7:]
    assert missed == (aside.is_dir() and not folder.exists())
    assert build(fresh).size == len(DATA) + 1
    assert fresh.find(KEY) is not None
    return missed


def test_what_is_published_is_found(store: Store) -> None:
    assert store.find(KEY) is None
    built = build(store)
    found = again(store).find(KEY)
    assert found == built
    assert found is not None
    assert (found.key, found.stage, found.key_text, found.info) == (KEY, "test", TEXT, {"count": 1})
    assert found.file("data").read_bytes() == DATA
    assert found.size == len(DATA) + 1
    assert list((store.root / "tmp").iterdir()) == []
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


def test_the_record_on_disk(store: Store) -> None:
    entry = build(store)
    assert json.loads((entry.folder / "entry.json").read_bytes()) == {
        "format": 1,
        "stage": "test",
        "key_text": TEXT,
        "files": {
            "data": [len(DATA), xxh3_file(entry.file("data"))],
            "small": [1, xxh3_file(entry.file("small"))],
        },
        "info": {"count": 1},
        "seconds": entry.seconds,
    }
    assert entry.folder == store.root / "objects" / KEY[7:9] / KEY[7:]


def test_an_unknown_key_and_a_store_that_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "no" / "cache")
    assert store.find(KEY) is None
    assert not (tmp_path / "no" / "cache" / "objects").exists()


def test_a_checksum_that_was_computed_on_the_way_is_taken(store: Store) -> None:
    with store.building(KEY), store.staging(KEY) as folder:
        (folder / "data").write_bytes(DATA)
        store.publish(TEXT, "test", folder, known={"data": "0" * 32})
    assert store.find(KEY) is not None  # trusted as long as stat says that it is the same file
    shutil.rmtree(store.root / "index")
    assert again(store).find(KEY) is None


def replace(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def recording(read: list[Path]) -> Callable[[Path], str]:
    """Return `xxh3_file` that notes which files it reads."""

    def checksum(path: Path) -> str:
        read.append(path)
        return xxh3_file(path)

    return checksum


def flip(path: Path) -> None:
    """Change one byte so that size, mtime and inode stay as they are."""
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    path.chmod(0o444)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
    )


def reversion(folder: Path) -> None:
    record = json.loads((folder / "entry.json").read_bytes())
    (folder / "entry.json").write_text(json.dumps({**record, "format": 2}))


def other_text(folder: Path) -> None:
    record = json.loads((folder / "entry.json").read_bytes())
    (folder / "entry.json").write_text(json.dumps({**record, "key_text": TEXT.replace("1", "2")}))


def a_folder(folder: Path) -> None:
    (folder / "data").unlink()
    (folder / "data").mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "torn: the record is missing": lambda folder: (folder / "entry.json").unlink(),
    "the record is empty": lambda folder: (folder / "entry.json").write_bytes(b""),
    "the record is cut off": lambda folder: os.truncate(folder / "entry.json", 40),
    "the record is no record": lambda folder: (folder / "entry.json").write_text('{"format": 1}'),
    "the record is of another version": reversion,
    "the record is of another key": other_text,
    "a file is missing": lambda folder: (folder / "data").unlink(),
    "a file is a folder": a_folder,
    "a file is truncated": lambda folder: os.truncate(folder / "data", len(DATA) - 1),
    "a file is longer": lambda folder: replace(folder / "data", DATA + b"x"),
    "a file is another of the same size": lambda folder: replace(folder / "data", DATA[::-1]),
    "a byte is flipped and the mtime restored": lambda folder: flip(folder / "data"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_entry_is_a_miss_and_set_aside(store: Store, damage: Callable[[Path], object]) -> None:
    damage(build(store).folder)
    assert is_miss(store)


def test_only_the_last_damaged_entry_is_kept_aside(store: Store) -> None:
    for number in range(2):
        (build(store).folder / "entry.json").write_text(str(number))
        assert store.find(KEY) is None
    assert (store.root / "aside" / KEY[7:] / "entry.json").read_text() == "1"
    assert len(list((store.root / "aside").iterdir())) == 1


def test_an_entry_that_was_built_anew_meanwhile_is_not_set_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(build(store).file("data"))
    slow = again(store)

    def checksum(path: Path) -> str:
        """Let another process find the same damage, and build the entry anew, while this one still reads."""
        monkeypatch.undo()
        wrong = xxh3_file(path)
        other = Store(store.root)
        assert other.find(KEY) is None
        build(other)
        return wrong

    monkeypatch.setattr(store_module, "xxh3_file", checksum)
    assert slow.find(KEY) is None
    assert slow.find(KEY) is not None


def test_an_unchanged_entry_is_read_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store)
    read: list[Path] = []
    monkeypatch.setattr(store_module, "xxh3_file", recording(read))
    assert again(store).find(KEY) is not None
    assert read == []


def test_a_moved_store_with_other_times_is_checked_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build(store)
    store.index.close()
    moved = store.root.parent / "moved"
    shutil.copytree(store.root, moved, copy_function=shutil.copyfile)
    shutil.rmtree(store.root)
    read: list[Path] = []
    monkeypatch.setattr(store_module, "xxh3_file", recording(read))
    for _ in range(2):
        entry = Store(moved).find(KEY)
        assert entry is not None
        assert entry.folder.is_relative_to(moved)
    assert [path.name for path in read] == ["data", "small"]


@pytest.mark.parametrize("loss", ["deleted", "corrupt", "empty", "a file", "none of its rows is right"])
def test_a_lost_index_changes_no_answer(store: Store, loss: str) -> None:
    entry = build(store)
    store.index.close()
    index = store.root / "index"
    if loss == "none of its rows is right":
        for name in ("data", "small"):
            store.index.set(f"object:{KEY[7:]}/{name}", [[], {}, None, 1])
        store.index.close()
    elif loss == "corrupt":
        (index / "cache.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    elif loss == "empty":
        (index / "cache.db").write_bytes(b"")
    else:
        shutil.rmtree(index)
        if loss == "a file":
            index.write_bytes(b"")
    assert again(store).find(KEY) == entry
    flip(entry.file("data"))
    assert is_miss(store)


def test_discard(store: Store) -> None:
    entry = build(store)
    store.discard(KEY)
    store.discard(KEY)
    assert store.find(KEY) is None
    assert not entry.folder.exists()
    assert not (store.root / "aside").exists()


def test_touch_remembers_the_last_use(store: Store) -> None:
    entry = build(store)
    store.index.set(f"used:{KEY[7:]}", 1)
    store.touch(entry.key)
    assert again(store).index.get(f"used:{KEY[7:]}") > 1_700_000_000


def test_an_error_while_building_leaves_nothing(store: Store) -> None:
    with pytest.raises(StoreError), store.building(KEY), store.staging(KEY) as folder:
        (folder / "data" / "below").write_bytes(DATA)
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Have a signal come while a function of os does its first work from now on."""

    def arm(name: str) -> None:
        function, calls = getattr(os, name), []

        def interrupted(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            result = function(*arguments, **options)
            if len(calls) == 1:
                signal.raise_signal(signal.SIGTERM)
            return result

        monkeypatch.setattr(os, name, interrupted)

    with interruptible():
        yield arm


@pytest.mark.parametrize("moment", ["rename", "unlink", "rmdir"])
def test_a_signal_while_an_entry_is_discarded_leaves_nothing(
    store: Store, interrupt_after: Callable[[str], None], moment: str
) -> None:
    build(store)
    interrupt_after(moment)
    with pytest.raises(Interrupted):
        store.discard(KEY)
    assert store.find(KEY) is None
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.parametrize("moment", ["mkdir", "unlink", "rmdir"])
def test_a_signal_while_a_staging_folder_is_made_or_removed_leaves_nothing(
    store: Store, interrupt_after: Callable[[str], None], moment: str
) -> None:
    def stage() -> None:
        with store.staging(KEY) as folder:
            (folder / "data").write_bytes(DATA)
            (folder / "small").write_bytes(b"1")

    store.prepare()
    interrupt_after(moment)
    with pytest.raises(Interrupted):
        stage()
    assert list((store.root / "tmp").iterdir()) == []


def builder(root: Path, ready: object, log: Path) -> None:
    """In a process: build the entry if it is not there."""
    store = Store(root)
    ready.wait()  # type: ignore[attr-defined]
    with store.building(KEY):
        if store.find(KEY) is None:
            with log.open("a") as file:
                file.write("built\n")
            with store.staging(KEY) as folder:
                (folder / "data").write_bytes(DATA)
                store.publish(TEXT, "test", folder)


def test_processes_that_build_one_key_build_it_once(store: Store, tmp_path: Path) -> None:
    ready, log = _fork.Barrier(4), tmp_path / "log"
    workers = [_fork.Process(target=builder, args=(store.root, ready, log)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert log.read_text() == "built\n"
    assert store.find(KEY) is not None


def hang_while_building(root: Path, ready: object) -> None:
    store = Store(root)
    with store.building(KEY), store.staging(KEY) as folder:
        (folder / "data").write_bytes(DATA)
        ready.set()  # type: ignore[attr-defined]
        signal.pause()


@contextlib.contextmanager
def busy(store: Store) -> Iterator[None]:
    """Let another process hold the lock in the block, and kill it in the end."""
    ready = _fork.Event()
    worker = _fork.Process(target=hang_while_building, args=(store.root, ready))
    worker.start()
    assert ready.wait(10)
    try:
        yield
    finally:
        worker.kill()
        worker.join()


@pytest.mark.parametrize("waits", [True, False])
def test_a_killed_builder_leaves_a_free_lock_and_its_folder_to_the_next(store: Store, waits: bool) -> None:
    with busy(store):
        pass
    [left] = (store.root / "tmp").iterdir()
    assert left.name.startswith(KEY[7:])
    assert store.find(KEY) is None
    with store.building(KEY) if waits else store.building_if_free(KEY):
        assert list((store.root / "tmp").iterdir()) == []
    build(store)
    assert store.find(KEY) is not None


def test_a_key_in_work_is_not_waited_for_when_that_is_not_wanted(store: Store) -> None:
    other = sha256_bytes(b"other")
    with busy(store):
        with store.building_if_free(KEY) as is_free:
            assert not is_free
            assert len(list((store.root / "tmp").iterdir())) == 1  # what the other is at stays
        with store.building_if_free(other) as is_free:
            assert is_free
    with store.building_if_free(KEY) as is_free:
        assert is_free
    with store.building(KEY):  # it was released
        pass


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MiB."""
    need("mount", "umount")
    need_root()
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # indexes may still be open


def test_a_full_disk(tiny_disk: Path) -> None:
    store = Store(tiny_disk)
    store.prepare()
    with pytest.raises(StoreError, match=r"no space left on the disk \(\d+ MiB free\)") as caught:
        build(store, data=bytes(2 << 20))
    assert caught.value.hint == "make room, or set FLEDGE_CACHE_DIR to a folder on a larger disk"
    assert str(caught.value.where).startswith(str(tiny_disk))
    assert list((tiny_disk / "tmp").iterdir()) == []
    assert store.find(KEY) is None
    build(store)


def test_a_disk_that_is_full_when_the_index_is_written(tiny_disk: Path) -> None:
    store = Store(tiny_disk)
    build(store, "first\n")
    (tiny_disk / "fill").write_bytes(b"")
    with contextlib.suppress(OSError), (tiny_disk / "fill").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    with store.index.together():
        for number in range(1000):
            store.index.set(f"used:{number}", "x" * 1000)
    assert store.find(sha256_bytes(b"first\n")) is not None


def test_a_disk_that_is_read_only(tiny_disk: Path) -> None:
    store = Store(tiny_disk)
    entry = build(store)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    assert store.find(KEY) == entry
    store.touch(entry.key)
    with (
        pytest.raises(StoreError, match="Read-only file system") as caught,
        store.building(Digest("sha256:" + "0" * 64)),
    ):
        pytest.fail("it was not locked")
    assert caught.value.hint == "set FLEDGE_CACHE_DIR to a folder that can be written to"


def test_a_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(StoreError, match="Not a directory"), Store(tmp_path / "cache").building(KEY):
        pytest.fail("it was not locked")
    assert Store(tmp_path / "cache").find(KEY) is None


def test_what_is_discarded_while_it_is_looked_at_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blob is dropped by whoever unpacked it, while others may ask for it."""
    store, other = Store(tmp_path / "cache"), Store(tmp_path / "cache")
    build(store)
    read = Store._read

    def read_and_lose(self: Store, key: Digest) -> object:
        record = read(self, key)
        other.discard(key)
        return record

    monkeypatch.setattr(Store, "_read", read_and_lose)
    assert store.find(KEY) is None
    assert list(store.notices.take()) == []
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []
    store.close()
    other.close()
