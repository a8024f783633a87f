"""Archives of the cache: what goes in comes out, nothing twice, and nothing that does not fit its record."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import zstandard

from fledge_tasks import archive
from fledge_tasks.archive import Imported
from fledge_tasks.digest import Digest, sha256_bytes
from fledge_tasks.errors import ArchiveError
from fledge_tasks.fsutil import allocated_bytes
from fledge_tasks.store import Entry, Store
from tests.layers import Member, folder
from tests.layouts import Place
from tests.tools import need
from tests.workspaces import sha256_of

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" * 90_000, mode=0o755)]
MORE = [Member("more", b"more" * 5000)]
MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "cache")
    yield store
    store.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Store]:
    other = Store(tmp_path / "other")
    yield other
    other.close()


def add(store: Store, text: str, files: Mapping[str, bytes], stage: str = "test") -> Entry:
    key = sha256_bytes(text.encode())
    with store.building(key), store.staging(key) as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        return store.publish(text, stage, staging, info={"fetch_seconds": 1.5})


def packed(*entries: Entry) -> bytes:
    target, counts = io.BytesIO(), list[int]()
    archive.write(entries, target, counts.append)
    assert counts == [entry.size for entry in entries]
    return target.getvalue()


def unpacked(store: Store, data: bytes) -> Imported:
    return archive.read(store, io.BytesIO(data), "file", lambda _: None)


def members(data: bytes) -> dict[str, bytes]:
    plain = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def repacked(files: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return zstandard.ZstdCompressor().compress(target.getvalue())


def _nested(record: bytes) -> bytes:
    return record.replace(b'"info": {', b'"info": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b", ")


def test_there_and_back(store: Store, other: Store) -> None:
    entries = [
        add(store, "one\n", {"payload": os.urandom(3 * MIB), "index": b"i"}),
        add(store, "two\n", {"data": b""}),
        add(store, "three\n", {"data": b"x" * 513}),
    ]
    done = unpacked(other, packed(*entries))
    assert done.added == [entry.key for entry in entries]
    assert (done.known, done.refused) == ([], {})
    for entry in entries:
        found = other.find(entry.key)
        assert found is not None
        assert (found.stage, found.key_text, found.info, found.seconds) == (
            entry.stage, entry.key_text, entry.info, entry.seconds,
        )  # fmt: skip
        for path in entry.folder.iterdir():
            assert found.file(path.name).read_bytes() == path.read_bytes()
    again = unpacked(other, packed(*entries))
    assert (again.added, again.known) == ([], [entry.key for entry in entries])
    assert list((other.root / "tmp").iterdir()) == []


def test_the_same_entries_make_the_same_archive(store: Store, other: Store) -> None:
    entry = add(store, "one\n", {"payload": os.urandom(MIB), "index": b"i"})
    data = packed(entry)
    unpacked(other, data)
    found = other.find(entry.key)
    assert found is not None
    assert packed(found) == data


def test_other_programs_can_read_it(store: Store, tmp_path: Path) -> None:
    entry = add(store, "one\n", {"index": b"i" * 700, "payload": b"p" * 5000})
    (tmp_path / "file").write_bytes(packed(entry))
    need("tar", "zstd")
    subprocess.run(["tar", "--zstd", "-xf", tmp_path / "file", "-C", tmp_path / "cache"], check=True)
    extracted = tmp_path / "cache" / "objects" / entry.key[7:9] / entry.key[7:]
    assert (extracted / "payload").read_bytes() == b"p" * 5000
    assert json.loads((tmp_path / "cache" / "fledge-cache.json").read_text()) == {"format": 1}


def test_holes_stay_holes(store: Store, other: Store, tmp_path: Path) -> None:
    key = sha256_bytes(b"sparse\n")
    with store.building(key), store.staging(key) as staging:
        for name, parts, size in (
            ("middle", [(10 * MIB, b"island" * 1000)], 64 * MIB),
            ("start", [(0, b"s" * 5000), (20 * MIB, os.urandom(3 * MIB))], 30 * MIB + 1),
            ("nothing", [], 8 * MIB),
        ):
            with (staging / name).open("wb") as file:
                for offset, data in parts:
                    file.seek(offset)
                    file.write(data)
                file.truncate(size)
        entry = store.publish("sparse\n", "test", staging)
    assert allocated_bytes(entry.folder) < 5 * MIB
    data = packed(entry)
    assert len(data) < 4 * MIB
    assert unpacked(other, data).added == [key]
    found = other.find(key)
    assert found is not None
    assert allocated_bytes(found.folder) < 5 * MIB
    need("tar", "zstd")
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "x").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", tmp_path / "file", "-C", tmp_path / "x"], check=True)
    for name in ("middle", "start", "nothing"):
        there = tmp_path / "x" / "objects" / key[7:9] / key[7:] / name
        assert sha256_of(found.file(name)) == sha256_of(entry.file(name)) == sha256_of(there)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, data: data[:-1] + b"\0" if name == "payload" else data, "payload has the XXH3 "),
        (lambda name, data: data[:-1] if name == "payload" else data, "payload has 4999 bytes, not 5000"),
        (lambda name, data: None if name == "payload" else data, "payload cannot be read: No such file"),
        (lambda name, data: None if name == "entry.json" else data, "its record is missing or damaged"),
        (lambda name, data: data.replace(b"one", b"eno") if name == "entry.json" else data, "its record is missing"),
        (lambda name, data: data[1:] if name == "entry.json" else data, "its record is missing or damaged"),
        (lambda name, data: data.replace(b"test", b"\xff") if name == "entry.json" else data, "its record is missing"),
        (lambda name, data: _nested(data) if name == "entry.json" else data, "its record is missing or damaged"),
    ],
)
def test_what_does_not_fit_is_refused(
    store: Store, other: Store, change: Callable[[str, bytes], bytes | None], reason: str
) -> None:
    bad, good = add(store, "one\n", {"index": b"i", "payload": b"p" * 5000}), add(store, "two\n", {"data": b"d"})
    files: dict[str, bytes] = {}
    for path, data in members(packed(bad, good)).items():
        changed = change(path.rpartition("/")[2], data) if bad.key[7:] in path else data
        if changed is not None:
            files[path] = changed
    done = unpacked(other, repacked(files))
    assert done.added == [good.key]
    assert list(done.refused) == [bad.key] and done.refused[bad.key].startswith(reason)
    assert other.find(bad.key) is None and other.all_keys() == [good.key]
    assert list((other.root / "tmp").iterdir()) == []


def test_more_files_than_the_record_has(store: Store, other: Store) -> None:
    entry = add(store, "one\n", {"index": b"i"})
    files = members(packed(entry))
    files[f"objects/{entry.key[7:9]}/{entry.key[7:]}/more"] = b"m"
    done = unpacked(other, repacked(files))
    assert done.refused == {entry.key: "more is not in its record, or twice in the archive"}
    assert other.all_keys() == []


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "objects/../../evil",
        "objects/ab/cd/entry.json",
        "x",
        f"objects/aa/{'b' * 64}/entry.json",
    ],
)
def test_other_names_are_refused(store: Store, tmp_path: Path, name: str) -> None:
    data = repacked({"fledge-cache.json": b'{"format": 1}\n', name: b"{}"})
    with pytest.raises(ArchiveError, match="which is no file of an entry"):
        unpacked(store, data)
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    "name", ["{outside}", "../../../outside", "..", "", "entry.json", "a\0b", "sub/data", "Data", "a" * 33]
)
def test_a_record_of_files_elsewhere(store: Store, other: Store, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"d")
    outside.chmod(0o600)
    entry = add(store, "one\n", {"data": b"d"})
    [(head, first), (path, record), _] = members(packed(entry)).items()
    said = json.loads(record)
    said["files"] = {name.format(outside=outside): said["files"]["data"]}
    data = repacked({head: first, path: json.dumps(said).encode()})
    assert unpacked(other, data).refused == {entry.key: "its record is missing or damaged"}
    assert other.all_keys() == [] and outside.stat().st_mode & 0o777 == 0o600


def test_a_record_among_the_files_of_its_entry(store: Store, other: Store) -> None:
    entry = add(store, "one\n", {"data": b"d"})
    files = members(packed(entry))
    path = next(path for path in files if path.endswith("entry.json"))
    said = json.loads(files[path])
    said["files"]["entry.json"] = said["files"]["data"]
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, data in [*{**files, path: json.dumps(said).encode()}.items(), (path, b"d")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = unpacked(other, zstandard.ZstdCompressor().compress(target.getvalue()))
    assert (done.added, done.refused) == ([], {entry.key: "its record is missing or damaged"})


def test_a_hole_larger_than_any_file(store: Store, other: Store) -> None:
    bad, good = add(store, "one\n", {"data": b"d"}), add(store, "two\n", {"data": b"d"})
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, stored in members(packed(bad, good)).items():
            member, data = tarfile.TarInfo(name), stored
            if name.endswith(f"{bad.key[7:]}/data"):
                data = b"0\n".ljust(512, b"\0")
                member.pax_headers = {
                    "GNU.sparse.major": "1", "GNU.sparse.minor": "0",
                    "GNU.sparse.name": name, "GNU.sparse.realsize": str(1 << 62),
                }  # fmt: skip
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    done = unpacked(other, zstandard.ZstdCompressor().compress(target.getvalue()))
    assert done.refused == {bad.key: f"data has {1 << 62} bytes, not 1"}
    assert done.added == [good.key]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"x" * 2000, repacked({}), repacked({"fledge-cache.json": b'{"format": 2}\n'}), repacked({"other": b""}),
    ],
)  # fmt: skip
def test_what_is_no_archive(store: Store, data: bytes) -> None:
    with pytest.raises(ArchiveError) as caught:
        unpacked(store, data)
    assert caught.value.where == "file"


def test_a_cut_or_damaged_archive(store: Store, other: Store) -> None:
    first, second = add(store, "one\n", {"data": os.urandom(MIB)}), add(store, "two\n", {"data": os.urandom(MIB)})
    data = packed(first, second)
    with pytest.raises(ArchiveError, match="truncated"):
        unpacked(other, data[: len(data) * 2 // 3])
    assert other.all_keys() == [first.key], "what was whole stays"
    damaged = bytearray(data)
    damaged[len(data) * 3 // 4] ^= 0xFF
    with pytest.raises(ArchiveError):
        unpacked(other, bytes(damaged))
    assert other.find(second.key) is None
    assert unpacked(other, data).added == [second.key]


def test_the_most_useful_come_first() -> None:
    def entry(name: str, size: int, seconds: float, stage: str = "unpack") -> Entry:
        return Entry(Digest(name), Path(), stage, "", {}, size, seconds)

    config = entry("c", 5000, 0, "config")
    large, small, shared = entry("l", 1000, 1), entry("s", 10, 1), entry("h", 1000, 1)
    every = [(large, 1), (small, 1), (shared, 50), (config, 1)]
    assert archive.choose(every, None).chosen == [config, small, shared, large]
    choice = archive.choose(every, 6100)
    assert (choice.chosen, choice.left_out) == ([config, small, shared], [large])
    assert archive.choose(every, 1500).chosen == [small, shared]
    assert archive.choose(every, 0).chosen == []


# --- the commands ----------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, MORE)
    place.add_layout("api", BASE)
    place.build()
    return place


def moved(place: Place, tmp_path: Path) -> Place:
    """Return a workspace of the same images and lock file whose sources and cache are gone."""
    twin = Place(tmp_path / "twin", tmp_path)
    shutil.copytree(place.root, twin.root, ignore=shutil.ignore_patterns("cache", "build", "layouts"))
    return twin


def test_a_cache_goes_through_a_file(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "cache.tar.zst"
    result = place.fledge("cache", "export", str(file))
    assert result.code == 0
    assert f"{file}: 8 entries, " in result.stderr
    twin = moved(place, tmp_path)
    result = twin.fledge("cache", "import", str(file))
    assert (result.code, result.stdout) == (0, f"{twin.root}/cache: 8 entries added, 0 were there, 0 refused\n")
    built = twin.build("--locked", "--offline")
    for name in ("web", "api"):
        assert built.stages(name) == ["assemble", "manifest"]
        assert sha256_of(twin.output(name)) == sha256_of(place.output(name))


def test_only_what_is_asked_for(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "cache.tar.zst"
    assert place.fledge("cache", "export", str(file), "api").code == 0
    twin = moved(place, tmp_path)
    assert "4 entries added" in twin.fledge("cache", "import", str(file)).stdout
    assert twin.build("api", "--offline").stages("api") == ["assemble", "manifest"]
    result = place.fledge("cache", "export", str(file), "--max-size", "100K")
    assert result.code == 0
    assert "left out: unpack " in result.stderr and "7 entries" in result.stderr
    assert place.fledge("cache", "export", str(file), "nope").code == 2


def test_nothing_to_export(place: Place, tmp_path: Path) -> None:
    shutil.rmtree(place.root / "cache" / "objects")
    result = place.fledge("cache", "export", str(tmp_path / "file"))
    assert (result.code, "holds nothing of these images" in result.stderr) == (2, True)
    assert not (tmp_path / "file").exists()


def test_where_it_cannot_be_written(place: Place, tmp_path: Path) -> None:
    result = place.fledge("cache", "export", str(tmp_path / "no/cache.tar.zst"))
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"error: {tmp_path}/no: there is no such folder\n"


def test_a_full_disk_is_named(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("fledge_tasks.archive.write", full)
    file = tmp_path / "cache.tar.zst"
    result = place.fledge("cache", "export", str(file))
    assert result.code == 1 and not file.exists()
    assert result.stderr.startswith(f"error: {file}: no space left on the disk (")


def test_a_damaged_entry_is_not_exported(place: Place, tmp_path: Path) -> None:
    [payload] = [path for path in (place.root / "cache" / "objects").rglob("payload") if path.stat().st_size > 300_000]
    payload.chmod(0o644)
    with payload.open("r+b") as file:
        file.write(b"X")
    place.fledge("cache", "export", str(tmp_path / "file"))
    assert f"objects/{payload.parent.parent.name}/{payload.parent.name}/payload" not in members(
        (tmp_path / "file").read_bytes()
    )


def test_what_cannot_be_imported(place: Place, tmp_path: Path) -> None:
    result = place.fledge("cache", "import", str(tmp_path / "nothing"))
    assert (result.code, "No such file" in result.stderr) == (2, True)
    (tmp_path / "text").write_text("hello\n" * 1000)
    result = place.fledge("cache", "import", str(tmp_path / "text"))
    assert (result.code, "Traceback" in result.stderr) == (1, False)
    assert f"error: {tmp_path}/text: " in result.stderr
    file = tmp_path / "file"
    place.fledge("cache", "export", str(file))
    files = members(file.read_bytes())
    name = next(name for name in files if name.endswith("/payload") and len(files[name]) > 300_000)
    files[name] = b"X" + files[name][1:]
    file.write_bytes(repacked(files))
    twin = moved(place, tmp_path)
    result = twin.fledge("cache", "import", str(file))
    assert result.code == 1
    assert "payload has the XXH3 " in result.stderr and "7 entries added, 0 were there, 1 refused" in result.stdout
