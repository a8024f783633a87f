"""Digests of mapped files by what stat says: no edit is missed, however coarse the clock; nothing is read twice."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fledge_tasks import workspace
from fledge_tasks.digest import sha256_bytes
from fledge_tasks.index import FileDigests, Index
from fledge_tasks.mappings import expand
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests.layers import Member, folder
from tests.layouts import Place
from tests.tools import need

SECOND = 10**9
MANY = 2000


class Clock:
    """The time of a test, and of a filesystem that knows it to the granule only: ext3 has 1 s, FAT has 2 s.

    What stat says of files that `write` made is what it would say there; ctime cannot be set, so it
    follows mtime. An edit of the same size within a granule changes nothing that stat could show.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, granule_ns: int) -> None:
        self.now = 1_700_000_000 * SECOND + 123_456_789
        self.granule = granule_ns
        monkeypatch.setattr(time, "time_ns", lambda: self.now)
        monkeypatch.setattr(Path, "stat", self._stat)

    def write(self, path: Path, data: bytes) -> None:
        stamp = self.now - self.now % self.granule
        path.write_bytes(data)
        os.utime(path, ns=(stamp, stamp))

    @staticmethod
    def _stat(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = os.stat(path, follow_symlinks=follow_symlinks)
        times = {"st_atime_ns": found.st_atime_ns, "st_mtime_ns": found.st_mtime_ns, "st_ctime_ns": found.st_mtime_ns}
        seconds = (int(found.st_mtime),) * 3
        return os.stat_result((*tuple(found)[:7], *seconds), times)


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return Index(tmp_path / "index")


@pytest.mark.parametrize("granule", [4_000_000, SECOND, 2 * SECOND])
def test_an_edit_without_a_trace_is_noticed(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granule: int
) -> None:
    clock, file = Clock(monkeypatch, granule), tmp_path / "file"
    clock.now -= clock.now % granule
    clock.write(file, b"one")
    before = file.stat()
    clock.now += granule - 1  # as late as it can be without another tick
    assert FileDigests(index)(file) == sha256_bytes(b"one")
    clock.write(file, b"two")
    assert file.stat() == before
    assert FileDigests(index)(file) == sha256_bytes(b"two")
    clock.now += 3 * SECOND
    assert FileDigests(index)(file) == sha256_bytes(b"two")


@pytest.mark.parametrize("granule", [1, 4_000_000, SECOND, 2 * SECOND])
def test_no_order_of_edits_and_builds_goes_wrong(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path], granule: int
) -> None:
    clock, file, numbers = Clock(monkeypatch, granule), tmp_path / "file", random.Random(granule)
    asked, content = 0, b""
    for number in range(600):
        if number == 0 or numbers.random() < 0.3:
            content = b"%03d" % number
            clock.write(file, content)
        else:
            asked += 1
            assert FileDigests(index)(file) == sha256_bytes(content), number
        clock.now += numbers.choice([0, 1, 1_000_000, SECOND // 3, 2 * SECOND, 5 * SECOND])
    assert len(reads) < asked, "what is settled is not read again"


def test_a_time_to_come_is_not_trusted(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    clock, file = Clock(monkeypatch, 1), tmp_path / "file"
    clock.now += 3600 * SECOND
    clock.write(file, b"one")
    clock.now -= 3600 * SECOND
    assert FileDigests(index)(file) == FileDigests(index)(file) == sha256_bytes(b"one")
    assert reads == [file, file]


def many(top: Path, write: Callable[[Path, bytes], object]) -> list[Path]:
    """Write 2000 files in 40 folders."""
    files = [top / f"{number % 40:02d}" / f"{number:04d}" for number in range(MANY)]
    for number, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, b"%04d" % number)
    return files


def test_of_a_large_mapped_folder_what_was_edited_is_read(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    clock = Clock(monkeypatch, SECOND)
    files = many(tmp_path / "static", clock.write)
    clock.now += 3 * SECOND

    def digests() -> dict[str, str]:
        mapped, _ = expand([("static", "/srv")], tmp_path, FileDigests(index))
        return {file.destination: file.digest for file in mapped if file.kind == "file"}

    with index.together():
        first = digests()
    assert sorted(reads) == sorted(files)
    reads.clear()
    assert digests() == first
    assert reads == []
    clock.write(files[1234], b"edit")
    for _ in range(2):  # young, so it is read again
        second = digests()
        assert {name for name in first if first[name] != second[name]} == {"/srv/34/1234"}
    assert second["/srv/34/1234"] == sha256_bytes(b"edit")
    assert reads == [files[1234]] * 2
    clock.write(files[1234], b"Edit")  # in the granule of the first edit, and of its size
    assert digests()["/srv/34/1234"] == sha256_bytes(b"Edit")


def test_what_is_read_together_is_written_down_at_once(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    clock = Clock(monkeypatch, 1)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        clock.write(file, file.name.encode())
    clock.now += 3 * SECOND
    digest_of, other = FileDigests(index), Index(tmp_path / "index")
    with pytest.raises(OSError, match="mine"), digest_of.together(), digest_of.together():  # noqa: PT012
        for file in files:
            assert digest_of(file) == sha256_bytes(file.name.encode())
        assert other.names() == []
        other.set("x", 1)  # nobody has to wait
        raise OSError("mine")
    assert sorted(other.names()) == [*(f"file:{file}" for file in files), "x"]
    assert reads == files
    assert [FileDigests(other)(file) for file in files] == [sha256_bytes(name) for name in (b"a", b"b", b"c")]
    assert reads == files
    clock.write(files[0], b"A")
    clock.now += 3 * SECOND
    assert digest_of(files[0]) == FileDigests(other)(files[0]) == sha256_bytes(b"A")
    assert reads == [*files, files[0]], "after the block each is written down by itself"


def test_a_large_mapped_folder_is_one_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, tmp_path)
    for name in ("web", "api"):
        place.add(name, f"oci:../{name}", mappings={"static": "/srv"})
        (place.root / name / "static").mkdir()
        for number in range(20):
            (place.root / name / "static" / str(number)).write_bytes(b"%d" % number)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * SECOND)
    events: list[str] = []
    together, put = Index.together, Index.set

    @contextlib.contextmanager
    def recording(self: Index) -> Iterator[None]:
        events.append("begin")
        with together(self):
            yield
        events.append("end")

    monkeypatch.setattr(Index, "together", recording)
    monkeypatch.setattr(Index, "set", lambda self, name, value: events.append(name) or put(self, name, value))  # type: ignore[func-returns-value]
    found = Planner(workspace.load(place.root), Store(place.root / "cache"))
    found.check(found.workspace.images)
    assert [events[0], events[-1], len(events)] == ["begin", "end", 42]
    assert {event for event in events[1:-1] if not event.startswith("file:")} == set()


def test_builds_of_a_large_mapped_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]) -> None:
    need("mke2fs")
    place = Place(tmp_path, tmp_path)
    place.add_layout("web", [folder("bin"), Member("bin/app", b"\x7fELF")], mappings={"static": "/srv"})
    files = many(place.root / "web" / "static", Path.write_bytes)
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 3 * SECOND)
    assert "mkfs" in place.build().stages("web")
    assert len(reads) == MANY
    reads.clear()
    assert place.build().stages("web") == []
    assert reads == []
    before = files[77].stat()
    files[77].write_bytes(b"edit")
    os.utime(files[77], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place.build().stages("web") == ["mkfs", "assemble", "manifest"]
    assert reads == [files[77]]
