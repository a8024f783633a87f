"""Whole layers, from the blob to payload and index."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import random
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import xxhash
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import BlobError, FledgeError, LayerError, LimitError, StoreError
from fledge_tasks.oci import limits
from fledge_tasks.oci.layer import Unpacked, clean, unpack
from fledge_tasks.oci.layer_index import BLOCK_BYTES, FORMAT, Entry, Kind, Run, read_index
from fledge_tasks.oci.limits import Limits
from fledge_tasks.oci.payload import PayloadWriter
from tests.layers import LIMITS, Compression, Member, archive, compress, digest, folder, hardlink, layer, symlink

BLOCK = BLOCK_BYTES


class Result(NamedTuple):
    unpacked: Unpacked
    entries: list[Entry]
    payload: bytes
    advanced: int

    def content(self, entry: Entry) -> bytes:
        """Return the data of a file as a filesystem would show it."""
        data = bytearray(-(-entry.size // BLOCK) * BLOCK)
        runs = (Run(0, entry.block, len(data) // BLOCK),) if entry.runs is None else entry.runs
        for run in runs:
            stored = self.payload[run.payload * BLOCK : (run.payload + run.count) * BLOCK]
            data[run.logical * BLOCK : (run.logical + run.count) * BLOCK] = stored
        assert not any(data[entry.size :])
        return bytes(data[: entry.size])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def unpacked(
    folder_: Path,
    blob: bytes,
    diff_id: str,
    *,
    blob_digest: str | None = None,
    blob_size: int | None = None,
    limits: Limits = LIMITS,
) -> Result:
    advanced: list[int] = []
    with (folder_ / "payload").open("wb", buffering=0) as payload, (folder_ / "index").open("wb") as index:
        found = unpack(
            io.BytesIO(blob),
            diff_id=diff_id,
            blob_digest=blob_digest or digest(blob),
            blob_size=len(blob) if blob_size is None else blob_size,
            limits=limits,
            payload_fd=payload.fileno(),
            index_file=index,
            advance=advanced.append,
            where="layer 1",
        )
    data = (folder_ / "payload").read_bytes()
    assert (found.payload_bytes, found.payload_xxh3) == (len(data), xxhash.xxh3_128_hexdigest(data))
    entries = read_index(folder_ / "index")
    assert len(entries) == found.entries
    return Result(found, entries, data, sum(advanced))


def of(folder_: Path, *members: Member) -> Result:
    return unpacked(folder_, *layer(members))


def refused(folder_: Path, message: str, *members: Member) -> None:
    with pytest.raises(LayerError, match=message) as caught:
        of(folder_, *members)
    assert caught.value.where == "layer 1"


MEMBERS = [
    folder("./", 0o1777),
    folder("./usr/"),
    Member("./usr/file", b"hello", mode=0o104755, uid=70_000, gid=2, mtime="-1.5", xattrs={"user.raw": b"\0\xff"}),
    Member("usr/empty"),
    Member("usr/block", b"x" * BLOCK),
    Member("usr/large", random.Random(1).randbytes(5_000_001)),
    Member("usr/after", b"after"),
    symlink("usr/link", "../some//./where/"),
    hardlink("usr/hard", "./usr/file"),
    Member("dev/char", type=tarfile.CHRTYPE, mode=0o620, rdev=(4095, 1_048_575)),
    Member("dev/block", type=tarfile.BLKTYPE, rdev=(8, 1)),
    Member("dev/fifo", type=tarfile.FIFOTYPE),
]


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_layer_of_everything(tmp_path: Path, compression: Compression) -> None:
    blob, diff_id = layer(MEMBERS, compression)
    result = unpacked(tmp_path, blob, diff_id)
    assert result.advanced == len(blob)
    assert result.unpacked.tar_bytes == len(archive(MEMBERS))
    entries = {entry.path: entry for entry in result.entries}
    assert list(entries) == [clean(member.path.encode()) for member in MEMBERS]
    assert (entries[b""].kind, entries[b""].mode) == (Kind.DIRECTORY, 0o1777)
    file = entries[b"usr/file"]
    assert (file.kind, file.mode, file.uid, file.gid) == (Kind.FILE, 0o4755, 70_000, 2)
    assert (file.mtime_ns, file.xattrs) == (-1_500_000_000, {b"user.raw": b"\0\xff"})
    assert (entries[b"usr/empty"].size, entries[b"usr/empty"].block, entries[b"usr/empty"].runs) == (0, 0, None)
    for member in MEMBERS[2:7]:
        entry = entries[clean(member.path.encode())]
        assert (entry.size, entry.runs) == (len(member.data), None)
        assert result.content(entry) == member.data
    assert entries[b"usr/link"].link == b"../some//./where/"
    assert (entries[b"usr/hard"].kind, entries[b"usr/hard"].link) == (Kind.HARDLINK, b"usr/file")
    assert (entries[b"dev/char"].kind, entries[b"dev/char"].rdev) == (Kind.CHAR_DEVICE, (4095, 1_048_575))
    assert (entries[b"dev/block"].kind, entries[b"dev/block"].rdev) == (Kind.BLOCK_DEVICE, (8, 1))
    assert entries[b"dev/fifo"].kind == Kind.FIFO
    assert result.unpacked.payload_bytes == sum(-(-len(member.data) // BLOCK) for member in MEMBERS) * BLOCK


def test_a_layer_of_nothing(tmp_path: Path) -> None:
    assert of(tmp_path).unpacked == (0, 0, xxhash.xxh3_128_hexdigest(b""), 10_240)
    assert unpacked(tmp_path, b"", digest(b"")).unpacked.tar_bytes == 0


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"", b""),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"..", b""),
        (b"../../etc/passwd", b"etc/passwd"),
        (b"/etc//passwd/", b"etc/passwd"),
        (b"a/./b/../c", b"a/c"),
        (b"a/../../b", b"b"),
        (b"././a", b"a"),
        (b".//a", b"a"),
        (b".hidden/.file", b".hidden/.file"),
        (b"..a/...", b"..a/..."),
        (b"a/..", b""),
        (b"\xff/\xfe", b"\xff/\xfe"),
    ],
)
def test_clean(path: bytes, expected: bytes) -> None:
    assert clean(path) == expected


@given(st.lists(st.sampled_from([b"a", b".b", b"..", b".", b"", b"..c"]), max_size=8).map(b"/".join))
def test_clean_is_what_the_root_of_a_process_would_do(path: bytes) -> None:
    assert clean(path) == os.path.normpath(b"/./" + path).lstrip(b"/")
    assert clean(clean(path)) == clean(path)


def test_whiteouts(tmp_path: Path) -> None:
    result = of(
        tmp_path,
        Member("usr/.wh.gone", b"data that nobody reads"),
        Member(".wh.top"),
        hardlink("usr/.wh.link", "usr/.wh.gone"),
        Member("usr/.wh..wh..opq"),
        Member(".wh..wh..opq"),
        folder("usr/.wh.folder/"),
        Member("usr/.wh..wh.aufs"),
        Member("usr/.wh.folder/file", b"x"),
        Member("usr/a.wh.b"),
    )
    assert [(entry.path, entry.kind) for entry in result.entries] == [
        (b"usr/gone", Kind.WHITEOUT),
        (b"top", Kind.WHITEOUT),
        (b"usr/link", Kind.WHITEOUT),
        (b"usr", Kind.OPAQUE),
        (b"", Kind.OPAQUE),
        (b"usr/folder", Kind.WHITEOUT),
        (b"usr/.wh.aufs", Kind.WHITEOUT),
        (b"usr/.wh.folder/file", Kind.FILE),
        (b"usr/a.wh.b", Kind.FILE),
    ]
    assert result.unpacked.payload_bytes == BLOCK


@pytest.mark.parametrize("name", [".wh.", "usr/.wh.", "usr/.wh..", "usr/.wh...", ".wh../"])
def test_whiteouts_of_nothing_are_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path, "a whiteout of nothing", Member(name))


@pytest.mark.parametrize("member", [Member("."), symlink("/", "usr"), hardlink("a/..", "usr"), Member("..", b"x")])
def test_the_root_must_be_a_directory(tmp_path: Path, member: Member) -> None:
    refused(tmp_path, "the root of the layer is not a directory", member)


def test_limits(tmp_path: Path) -> None:
    deep = "/".join(["d" * 240] * 17)[:4096]
    result = of(
        tmp_path,
        Member("n" * 255),
        Member(deep),
        symlink("link", "t" * 4095),
        hardlink("hard", deep),
    )
    assert result.entries[1].path == result.entries[3].link == deep.encode()
    refused(tmp_path, "more than 255 bytes", Member("usr/" + "n" * 256))
    refused(tmp_path, "a path of 4097 bytes", Member(deep + "d"))
    refused(tmp_path, "a target of 4096 bytes", symlink("link", "t" * 4096))
    refused(tmp_path, "a target of 0 bytes", symlink("link", ""))
    refused(tmp_path, "more than 255 bytes", hardlink("hard", "n" * 256))
    refused(tmp_path, "to the root, or to nothing", hardlink("hard", ""))
    refused(tmp_path, "to the root, or to nothing", hardlink("hard", "a/../.."))
    refused(tmp_path, "no device 4096:0", Member("dev", type=tarfile.CHRTYPE, rdev=(4096, 0)))
    refused(tmp_path, "no device 0:1048576", Member("dev", type=tarfile.BLKTYPE, rdev=(0, 1_048_576)))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_what_a_layer_may_come_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: Compression) -> None:
    tar = archive([Member(str(number), bytes(50_000)) for number in range(20)])
    blob = compress(tar, compression)
    monkeypatch.setattr(limits, "RATIO_FREE_BYTES", len(tar) - 1)
    just = Limits(tar_bytes=len(tar), entries=20, ratio=-(-len(tar) // len(blob)))
    assert len(unpacked(tmp_path, blob, digest(tar), limits=just).entries) == 20
    for less, message, setting in (
        (just._replace(tar_bytes=len(tar) - 1), f"archive has more than {len(tar) - 1} bytes", "layer_mb"),
        (just._replace(entries=19), "more than 19 entries", "entries"),
        (just._replace(ratio=just.ratio - 1, tar_bytes=1 << 40), rf"in a blob of {len(blob)}", "ratio"),
    ):
        with pytest.raises(LimitError, match=message) as caught:
            unpacked(tmp_path, blob, digest(tar), limits=less)
        assert caught.value.where == "layer 1"
        assert f"raise {setting} in the [limits]" in (caught.value.hint or "")
    monkeypatch.setattr(limits, "RATIO_FREE_BYTES", len(tar))
    assert len(unpacked(tmp_path, blob, digest(tar), limits=just._replace(ratio=1)).entries) == 20


def test_a_bomb_is_put_out_early(tmp_path: Path) -> None:
    """A gigabyte and more in a megabyte: what is written before the limit is met stays small."""
    zeros = bytes(1 << 20)
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    head = tarfile.TarInfo("zeros")
    head.size = 3 << 30
    blob = packer.compress(head.tobuf()) + b"".join(packer.compress(zeros) for _ in range(3 << 10)) + packer.flush()
    with pytest.raises(LimitError, match=f"more than {64 << 20} bytes"):
        unpacked(tmp_path, blob, digest(b""), limits=LIMITS._replace(tar_bytes=64 << 20))
    assert (tmp_path / "payload").stat().st_size <= 64 << 20


def many_parts(parts: int) -> bytes:
    """Return an archive of a sparse file with a byte in every other block (GNU tar, 'Storing Sparse Files')."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("sparse")
            text = f"{parts}\n" + "".join(f"{at * 2 * BLOCK}\n1\n" for at in range(parts))
            data = text.encode().ljust(-(-len(text) // 512) * 512, b"\0") + bytes(parts)
            info.size = len(data)
            size = str(parts * 2 * BLOCK)
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": size}
            tar.addfile(info, io.BytesIO(data))
        return file.getvalue()


def test_many_parts_of_a_byte_each_are_a_bomb(tmp_path: Path) -> None:
    tar = many_parts(10_000)
    assert len(tar) < 200_000
    limit = LIMITS._replace(tar_bytes=len(tar))
    with pytest.raises(LimitError, match=f"files take more than {4 * len(tar)} bytes") as caught:
        unpacked(tmp_path, tar, digest(tar), limits=limit)
    assert "raise layer_mb in the [limits]" in (caught.value.hint or "")
    assert (tmp_path / "payload").stat().st_size <= 4 * len(tar)
    assert unpacked(tmp_path, tar, digest(tar)).unpacked.payload_bytes == 10_000 * BLOCK


def test_files_of_one_byte_are_no_bomb(tmp_path: Path) -> None:
    tar = archive([Member(f"{at:04d}", b"x") for at in range(2000)])
    result = unpacked(tmp_path, tar, digest(tar), limits=LIMITS._replace(tar_bytes=len(tar)))
    assert result.unpacked.payload_bytes == 2000 * BLOCK


def test_attributes_are_limited_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry may be as large as an extended header: what is to be read into memory must not be."""
    value = b"v" * 60_000
    tar = archive([Member(f"{at}", xattrs={"user.a": value, "user.b": value}) for at in range(30)])
    assert len(unpacked(tmp_path, tar, digest(tar)).entries) == 30
    monkeypatch.setattr(limits, "INDEX_FREE_BYTES", 1 << 20)
    few = LIMITS._replace(entries=100)
    with pytest.raises(LimitError, match=f"names and attributes in the layer take more than {1 << 20} bytes") as caught:
        unpacked(tmp_path, tar, digest(tar), limits=few)
    assert "raise entries in the [limits]" in (caught.value.hint or "")
    assert len(unpacked(tmp_path, tar, digest(tar), limits=few._replace(entries=20_000)).entries) == 30


def gnu_tar(where: Path, *options: str) -> bytes:
    argv = ["tar", *options, "--sort=name", "-cf", "-", "."]
    return subprocess.run(argv, cwd=where, check=True, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize(
    "options",
    [["--format=gnu"], *(["--format=posix", f"--sparse-version={version}"] for version in ("0.0", "0.1", "1.0"))],
)
def test_sparse_files(tmp_path: Path, options: list[str]) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    sizes = {"hole": (10_000_000, []), "end": (1_000_000, [999_999]), "many": (9_000_000, range(0, 9_000_000, 300_000))}
    for name, (size, offsets) in sizes.items():
        with (tree / name).open("wb") as file:
            for offset in offsets:
                file.seek(offset)
                file.write(b"d" * min(5000, size - offset))
            file.truncate(size)
    (tree / "plain").write_bytes(b"plain")
    tar = gnu_tar(tree, "--sparse", *options)
    result = unpacked(tmp_path, gzip.compress(tar), digest(tar))
    entries = {entry.path.decode(): entry for entry in result.entries}
    for name in (*sizes, "plain"):
        assert result.content(entries[name]) == (tree / name).read_bytes()
    assert (entries["hole"].runs, entries["hole"].size) == ((), 10_000_000)
    assert entries["many"].runs is not None and len(entries["many"].runs) == 30
    assert entries["plain"].runs is None
    assert len(result.payload) < 500_000


segments = st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000)), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(segments, st.integers(0, 9000))
def test_segments_need_no_alignment(tmp_path: Path, gaps: list[tuple[int, int]], tail: int) -> None:
    """Any map comes out as the file it stands for, and no block is stored that holds no data."""
    whole = bytearray()
    pairs, stored = [], b""
    for gap, length in gaps:
        whole += bytes(gap)
        piece = random.Random(len(whole)).randbytes(length)
        pairs.append((len(whole), length))
        whole += piece
        stored += piece
    whole += bytes(tail)
    text = b"%d\n" % len(pairs) + b"".join(b"%d\n%d\n" % pair for pair in pairs)
    text += bytes(-len(text) % 512)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("sparse")
        info.size = len(text) + len(stored)
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "name",
            "GNU.sparse.realsize": str(len(whole)),
        }
        tar.addfile(info, io.BytesIO(text + stored))
        info = tarfile.TarInfo("next")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"next"))
    result = unpacked(tmp_path, file.getvalue(), digest(file.getvalue()))
    sparse, after = result.entries
    assert (sparse.path, sparse.size) == (b"name", len(whole))
    assert result.content(sparse) == whole
    assert result.content(after) == b"next"
    touched = {block for start, length in pairs for block in range(start // BLOCK, (start + length - 1) // BLOCK + 1)}
    assert len(result.payload) == (len(touched) + 1) * BLOCK
    if whole:
        assert sparse.runs is not None
        assert {run.logical + number for run in sparse.runs for number in range(run.count)} == touched
        gaps_between = [
            second.logical - first.logical - first.count for first, second in itertools.pairwise(sparse.runs)
        ]
        assert all(gap > 0 for gap in gaps_between)


def test_damage_is_told_apart(tmp_path: Path) -> None:
    blob, diff_id = layer(MEMBERS)
    other = digest(b"other")
    with pytest.raises(BlobError, match=f"layer 1: the blob has the digest {digest(blob)}, its manifest says {other}"):
        unpacked(tmp_path, blob, diff_id, blob_digest=other)
    with pytest.raises(BlobError, match=f"has {len(blob)} bytes, its manifest says {len(blob) + 1}"):
        unpacked(tmp_path, blob, diff_id, blob_size=len(blob) + 1)
    with pytest.raises(BlobError, match=f"has more than {len(blob) - 1} bytes"):
        unpacked(tmp_path, blob, diff_id, blob_size=len(blob) - 1)
    with pytest.raises(
        LayerError, match=f"layer 1: the layer has the diff ID {diff_id}, the image config says {other}"
    ):
        unpacked(tmp_path, blob, other)
    # What a wrong blob decompresses to says nothing.
    with pytest.raises(BlobError):
        unpacked(tmp_path, blob, other, blob_digest=other)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_cut_or_flipped_blob_is_a_blob_error(tmp_path: Path, compression: Compression) -> None:
    blob, diff_id = layer(MEMBERS[:5] + MEMBERS[6:], compression)
    for length in {0, 1, 10, len(blob) // 2, len(blob) - 1}:
        with pytest.raises(BlobError, match="bytes, its manifest says"):
            unpacked(tmp_path, blob[:length], diff_id, blob_digest=digest(blob), blob_size=len(blob))
    for place in random.Random(3).sample(range(len(blob)), 60):
        flipped = bytearray(blob)
        flipped[place] ^= 0x10
        with pytest.raises(BlobError, match="the blob has the digest"):
            unpacked(tmp_path, bytes(flipped), diff_id, blob_digest=digest(blob))


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_a_cut_or_flipped_archive_is_a_layer_error(tmp_path: Path, compression: Compression) -> None:
    tar = archive(MEMBERS[:5] + MEMBERS[6:])
    for length in (1, 511, 513, 1536, len(tar) // 2 // 512 * 512, len(tar) - 1024, len(tar) - 1):
        with pytest.raises(LayerError):
            unpacked(tmp_path, compress(tar[:length], compression), digest(tar))
    for place in random.Random(4).sample(range(len(tar)), 60):
        flipped = bytearray(tar)
        flipped[place] ^= 0x10
        with pytest.raises(LayerError):
            unpacked(tmp_path, compress(bytes(flipped), compression), digest(tar))


def test_what_follows_the_end_belongs_to_the_diff_id(tmp_path: Path) -> None:
    tar = archive(MEMBERS[:5]) + b"anything" * 100_000
    result = unpacked(tmp_path, gzip.compress(tar), digest(tar))
    assert (len(result.entries), result.unpacked.tar_bytes) == (5, len(tar))


def test_many_gzip_members(tmp_path: Path) -> None:
    tar = archive(MEMBERS)
    blob = b"".join(gzip.compress(tar[at : at + 70_001], 1) for at in range(0, len(tar), 70_001)) + bytes(512)
    assert len(unpacked(tmp_path, blob, digest(tar)).entries) == len(MEMBERS)


class Interrupting(io.BytesIO):
    """A file whose reading fails after a while, as by a signal or a bad disk."""

    def __init__(self, data: bytes, error: BaseException) -> None:
        super().__init__(data)
        self._error = error

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 1_000_000:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("place", ["read", "advance", "write"])
def test_errors_of_others_pass_and_leave_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, place: str
) -> None:
    blob, diff_id = layer(MEMBERS * 3, "none")

    def fail(*_: object) -> None:
        raise error

    if place == "write":
        monkeypatch.setattr(PayloadWriter, "_flush", fail)
    with (tmp_path / "payload").open("wb", buffering=0) as payload, (tmp_path / "index").open("wb") as index:
        with pytest.raises(type(error)) as caught:
            unpack(
                Interrupting(blob, error) if place == "read" else io.BytesIO(blob),
                diff_id=diff_id,
                blob_digest=digest(blob),
                blob_size=len(blob),
                limits=LIMITS,
                payload_fd=payload.fileno(),
                index_file=index,
                advance=fail if place == "advance" else lambda _: None,
                where="layer 1",
            )
        assert caught.value is error


names = st.sampled_from(["a", "b", "c", ".wh.a", ".wh..wh..opq", "ä", "n" * 120])
paths = st.lists(names, min_size=1, max_size=4).map("/".join)
members = st.one_of(
    st.builds(
        Member,
        paths,
        st.binary(max_size=9000),
        mode=st.integers(0, 0o7777),
        uid=st.integers(0, (1 << 32) - 2),
        gid=st.integers(0, (1 << 32) - 2),
        mtime=st.sampled_from(["0", "-1", "1.000000001", "-0.25", "9223372036.5", "8589934592"]),
        xattrs=st.dictionaries(st.sampled_from(["user.a", "security.b"]), st.binary(max_size=100)),
    ),
    st.builds(folder, paths, st.integers(0, 0o7777)),
    st.builds(symlink, paths, paths),
    st.builds(hardlink, paths, paths),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(members, max_size=12), st.sampled_from(["gzip", "zstd", "none"]))
def test_any_tree_comes_back(tmp_path: Path, tree: list[Member], compression: Compression) -> None:
    result = unpacked(tmp_path, *layer(tree, compression))
    assert len(result.entries) == len(tree)
    for member, entry in zip(tree, result.entries, strict=True):
        parent, _, name = member.path.rpartition("/")
        if name == ".wh..wh..opq":
            assert (entry.path, entry.kind) == (parent.encode(), Kind.OPAQUE)
            continue
        if name == ".wh.a":
            assert (entry.path, entry.kind) == (f"{parent}/a".lstrip("/").encode(), Kind.WHITEOUT)
            continue
        assert entry.path == member.path.encode()
        assert (entry.mode, entry.uid, entry.gid) == (member.mode, member.uid, member.gid)
        assert entry.link == member.link.encode()
        seconds, _, fraction = member.mtime.lstrip("-").partition(".")
        nanoseconds = int(seconds) * 10**9 + int(fraction.ljust(9, "0"))
        assert entry.mtime_ns == (-nanoseconds if member.mtime.startswith("-") else nanoseconds)
        if entry.kind is Kind.FILE:
            assert result.content(entry) == member.data
            assert entry.xattrs == {key.encode(): value for key, value in member.xattrs.items()}


VALID = archive([*MEMBERS[:5], *MEMBERS[6:]])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_damaged_layer_raises_nothing_but_layer_errors(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(VALID)
    for place, value in changes:
        damaged[place] = value
    for blob in (bytes(damaged), gzip.compress(bytes(damaged), 1)):
        try:
            unpacked(tmp_path, blob, digest(bytes(damaged)))
        except FledgeError as error:
            assert isinstance(error, LayerError)  # noqa: PT017
            assert error.where == "layer 1"  # noqa: PT017


@pytest.mark.parametrize("more", [b"\xff" * 10, b"\x91" * 100_000 + b"\0"], ids=["long", "deep"])
def test_anything_else_is_no_index(tmp_path: Path, more: bytes) -> None:
    index = msgspec.msgpack.encode(["fledge-layer", FORMAT, []])
    (tmp_path / "index").write_bytes(index)
    assert read_index(tmp_path / "index") == []
    (tmp_path / "index").write_bytes(b"\x94" + index[1:] + more)
    with pytest.raises(StoreError, match="not a layer index"):
        read_index(tmp_path / "index")
