"""Trees as archives: read back by our own reader, which reads what all others do, and by Python's."""

from __future__ import annotations

import dataclasses
import os
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings

from fledge_tasks.errors import FilesystemError
from fledge_tasks.filesystems import tarstream
from fledge_tasks.oci.layer import unpack
from fledge_tasks.oci.layer_index import Entry, Kind, file_runs, read_index
from fledge_tasks.tree import Inode, Layer, merge, walk
from tests.layers import LIMITS, digest
from tests.test_verify import contents, settable
from tests.trees import EPOCH_NS, Content, tree_of

READER = tarstream.Reader("reader", int, 1 << 20, has_root=True, has_holes=True, has_any_name=True)


def written(folder: Path, content: Content, reader: tarstream.Reader = READER) -> Path:
    """Write a tree to an archive."""
    (folder / "payload").write_bytes(content.payload)
    archive = folder / "archive.tar"
    source, fd = os.open(folder / "payload", os.O_RDONLY), os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        tarstream.write(fd, tree_of(content), {0: source}, reader)
    finally:
        os.close(source)
        os.close(fd)
    return archive


def read(folder: Path, archive: Path) -> tuple[Inode, bytes]:
    """Return tree and payload of an archive, as our own reader has them."""
    data = archive.read_bytes()
    index, payload = folder / "index", folder / "read"
    with archive.open("rb") as blob, index.open("wb") as index_file, payload.open("wb") as payload_file:
        unpack(
            blob, diff_id=digest(data), blob_digest=digest(data), blob_size=len(data), limits=LIMITS,
            payload_fd=payload_file.fileno(), index_file=index_file, advance=lambda _: None, where="archive",
        )  # fmt: skip
    return merge([Layer("archive", read_index(index))], EPOCH_NS), payload.read_bytes()


def facts(root: Inode, payload: bytes) -> dict[bytes, object]:
    """Return all that a tree holds, by path; names of one inode have the first one's path."""
    first: dict[int, bytes] = {}
    found: dict[bytes, object] = {}
    for path, inode in walk(root):
        entry = inode.entry
        if first.setdefault(id(inode), path) != path:
            found[path] = first[id(inode)]
            continue
        data = {run.logical: payload[run.payload * 4096 : (run.payload + run.count) * 4096] for run in file_runs(entry)}
        pieces = {at + number: block for at, piece in data.items() for number, block in enumerate(_blocks(piece))}
        mode = 0o777 if entry.kind is Kind.SYMLINK else entry.mode
        found[path] = (
            entry.kind, mode, entry.uid, entry.gid, entry.mtime_ns, entry.size, entry.link, entry.rdev, entry.xattrs,
            {at: block for at, block in pieces.items() if any(block)},
        )  # fmt: skip
    return found


def _blocks(data: bytes) -> list[bytes]:
    return [data[at : at + 4096] for at in range(0, len(data), 4096)]


def pieces(archive: Path) -> list[tuple[int, int]] | None:
    """Return offset and length of the pieces of the one file, None if it is told as a whole."""
    with tarfile.open(archive) as opened:
        [member] = [member for member in opened if member.isfile()]
        found: list[tuple[int, int]] | None = cast("Any", member).sparse
        return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents())
def test_random_trees_are_read_again(tmp_path: Path, content: Content) -> None:
    for entry in settable(content).entries:
        entry.path = b"/".join(b"_" + name if name.startswith(b".wh.") else name for name in entry.path.split(b"/"))
    expected = facts(tree_of(content), bytes(content.payload))
    for holes in (True, False):
        archive = written(tmp_path, content, dataclasses.replace(READER, has_holes=holes))
        assert archive.stat().st_size % 512 == 0
        assert facts(*read(tmp_path, archive)) == expected


def test_python_reads_it_too(tmp_path: Path) -> None:
    content = Content()
    content.file(b"d/" + b"a" * 200, b"data", uid=3_000_000, gid=5, mtime_ns=1_500_000_000)
    content.add(b"d/hard", Kind.HARDLINK, link=b"d/" + b"a" * 200)
    content.sparse(b"holes", 100_000, [(3, b"island")])
    content.add(b"link", Kind.SYMLINK, link=b"t" * 150)
    content.file(b"x", b"", xattrs={b"user.a": b"\0\n=", b"security.b=c": b"v"})
    with tarfile.open(written(tmp_path, content)) as archive:
        members = {member.name: member for member in archive}
        assert [*members] == ["", "d", f"d/{'a' * 200}", "d/hard", "holes", "link", "x"] or "." in members
        long = members[f"d/{'a' * 200}"]
        assert (long.uid, long.gid, long.mtime) == (3_000_000, 5, 1.5)
        assert members["d/hard"].islnk() and members["d/hard"].linkname == long.name
        file = archive.extractfile(members["holes"])
        assert file is not None
        assert file.read() == bytes(3 * 4096) + b"island" + bytes(100_000 - 3 * 4096 - 6)
        assert members["link"].linkname == "t" * 150
        assert members["x"].pax_headers["LIBARCHIVE.xattr.security.b%3Dc"] == "dg"


@pytest.mark.parametrize(
    ("size", "blocks", "is_sparse"),
    [(4096, [], False), (8192, [], False), (8193, [], True), (10_000_000, [], True), (40 * 4096 - 5, [39], True),
     (40 * 4096, [0], True), (40 * 4096, range(40), False)],
)  # fmt: skip
def test_holes(tmp_path: Path, size: int, blocks: list[int], is_sparse: bool) -> None:
    """sqfstar 4.6 misreads a member of one piece, and one that ends in a hole."""
    content = Content()
    content.sparse(b"f", size, [(block, b"%d" % block) for block in blocks])
    archive = written(tmp_path, content)
    assert facts(*read(tmp_path, archive)) == facts(tree_of(content), bytes(content.payload))
    told = pieces(archive)
    assert (told is not None) == is_sparse
    if told:
        assert len(told) > 1
        assert told[0][0] == 0 and sum(told[-1]) == size


def test_the_smallest_of_too_many_holes_are_written_as_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tar2sqfs takes 65,536 pieces of a member."""
    monkeypatch.setattr(tarstream, "_MAX_HOLES", 10)
    content = Content()
    content.sparse(b"f", 5000 * 4096, [(at * at, b"%d" % at) for at in range(60)])
    archive = written(tmp_path, content)
    assert facts(*read(tmp_path, archive)) == facts(tree_of(content), bytes(content.payload))
    told = pieces(archive)
    assert told is not None
    assert [offset // 4096 for offset, _ in told] == [0, *(at * at for at in range(51, 60)), 4999]


def test_the_root_is_told_only_to_those_who_take_it(tmp_path: Path) -> None:
    content = Content()
    content.add(b"", Kind.DIRECTORY, mode=0o700)
    content.file(b"a")
    for has_root, names in ((True, [".", "a"]), (False, ["a"])):
        with tarfile.open(written(tmp_path, content, dataclasses.replace(READER, has_root=has_root))) as archive:
            assert [member.name or "." for member in archive] == names


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Entry(b"run/s", Kind.SOCKET), "run/s: is a socket, which reader cannot be told of"),
        (Entry(b"f", Kind.FILE, xattrs={b"user.a": bytes(5000)}), "/f: name and extended attributes take 5026 bytes, "),
        (Entry(b"d/f", Kind.FILE, xattrs={b"user.a=b": b""}), "/d/f: its extended attribute user.a=b cannot be told"),
    ],
)
def test_what_a_reader_does_not_take(tmp_path: Path, entry: Entry, message: str) -> None:
    content = Content([entry])
    with pytest.raises(FilesystemError) as caught:
        written(tmp_path, content, dataclasses.replace(READER, max_header_bytes=5000, has_any_name=False))
    assert message in str(caught.value)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(-1, "-0.000000001"), (-500_000_000, "-0.500000000"), (-1_500_000_000, "-1.500000000"), (5 * 10**8, "0.500000000"),
     (1 << 33, None), ((1 << 33) * 10**9, "8589934592.000000000"), (-(10**9), "-1.000000000")],
)  # fmt: skip
def test_times(tmp_path: Path, nanoseconds: int, text: str | None) -> None:
    """All nine digits: mkfs.erofs takes those that are there for a number of nanoseconds."""
    content = Content()
    content.file(b"f", mtime_ns=nanoseconds)
    with tarfile.open(written(tmp_path, content)) as archive:
        [member] = [member for member in archive if member.isfile()]
        assert member.pax_headers.get("mtime") == (text or "8.589934592")
