"""The tar parser against tarfile and GNU tar, and against archives that neither would write."""

from __future__ import annotations

import base64
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks.errors import LayerError
from fledge_tasks.oci.layer_index import Kind
from fledge_tasks.oci.pax import parse_records, parse_time
from fledge_tasks.oci.tar import MAX_EXTENSION_BYTES, Archive, Member, shown
from tests import layers
from tests.rawtar import END, GNU, base256, checksummed, header, padded, pax, record

LONG = "/".join(["directory" * 10] * 6)


def chunked(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def read(data: bytes, chunk: int = 1 << 16) -> list[tuple[Member, bytes]]:
    archive = Archive(chunked(data, chunk))
    return [(member, b"".join(archive.data())) for member in archive.members()]


def only(data: bytes) -> Member:
    (member, _), *others = read(data)
    assert not others
    return member


def with_pax(*records: tuple[bytes, bytes]) -> bytes:
    return pax(*records) + header() + END


def refused(data: bytes, message: str) -> None:
    with pytest.raises(LayerError, match=message):
        read(data)


MEMBERS = [
    layers.folder("./", 0o700),
    layers.folder("usr/"),
    layers.Member("usr/file", b"hello", mode=0o4755, uid=1, gid=2, mtime="1700000000"),
    layers.Member("usr/empty"),
    layers.Member("usr/block", b"x" * 512),
    layers.Member("usr/large", b"0123456789" * 30_000),
    layers.symlink("usr/link", "../some/where"),
    layers.hardlink("usr/hard", "usr/file"),
    layers.Member("dev/char", type=tarfile.CHRTYPE, rdev=(5, 1)),
    layers.Member("dev/block", type=tarfile.BLKTYPE, rdev=(259, 65535)),
    layers.Member("dev/fifo", type=tarfile.FIFOTYPE, mode=0o600),
    layers.Member("p" * 60 + "/" + "n" * 99, b"ustar prefix"),
    layers.Member("umlaut/ä", b"ae"),
]
BEYOND_USTAR = [
    layers.Member(LONG, b"long name"),
    layers.symlink("long/symlink", LONG),
    layers.hardlink(LONG + "/hard", LONG),
    layers.Member("big/ids", uid=4_294_967_294, gid=3_000_000),
    layers.Member("old", mtime="-86400"),
]
KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHAR_DEVICE,
    tarfile.BLKTYPE: Kind.BLOCK_DEVICE,
    tarfile.FIFOTYPE: Kind.FIFO,
}


@pytest.mark.parametrize("chunk", [1 << 16, 512, 511, 7])
@pytest.mark.parametrize(
    ("format_", "members"),
    [
        (tarfile.USTAR_FORMAT, MEMBERS),
        (tarfile.GNU_FORMAT, MEMBERS + BEYOND_USTAR),
        (tarfile.PAX_FORMAT, MEMBERS + BEYOND_USTAR),
    ],
)
def test_what_tarfile_writes_is_read(format_: int, members: list[layers.Member], chunk: int) -> None:
    found = read(layers.archive(members, format_), chunk)
    assert len(found) == len(members)
    for given_, (member, data) in zip(members, found, strict=True):
        assert member.path == given_.path.encode().rstrip(b"/") or member.path == given_.path.encode()
        assert (member.kind, member.mode, member.link) == (KINDS[given_.type], given_.mode, given_.link.encode())
        assert (member.uid, member.gid) == (given_.uid, given_.gid)
        assert (member.mtime_ns, member.rdev) == (int(given_.mtime) * 10**9, given_.rdev)
        assert (member.size, data) == (len(given_.data), given_.data)
        assert member.segments is None


def test_data_that_is_not_read_is_skipped() -> None:
    archive = Archive(chunked(layers.archive(MEMBERS), 1000))
    paths = []
    for member in archive.members():
        paths.append(member.path)
        if member.path == b"usr/large":
            assert len(next(archive.data())) <= 1000
    assert len(paths) == len(MEMBERS)


def test_v7() -> None:
    magic = devices = bytes(8)
    found = read(
        header(b"folder/", b"\0", magic=magic, devices=devices)
        + header(b"folder/file", b"\0", size=3, magic=magic, devices=devices)
        + padded(b"abc")
        + header(b"n" * 100, b"0", magic=magic, devices=devices)
        + END
    )
    assert [(member.path, member.kind, data) for member, data in found] == [
        (b"folder/", Kind.DIRECTORY, b""),
        (b"folder/file", Kind.FILE, b"abc"),
        (b"n" * 100, Kind.FILE, b""),
    ]


def test_devices_have_no_numbers_before_ustar() -> None:
    assert only(header(b"tty", b"3", magic=bytes(8), devices=b"garbage, garbage") + END).rdev == (0, 0)


def test_prefixes() -> None:
    assert only(header(b"name", tail=b"p" * 155) + END).path == b"p" * 155 + b"/name"
    star = (b"p" * 131).ljust(163, b"1") + b"tar\0"
    assert only(header(b"name", tail=star) + END).path == b"p" * 131 + b"/name"
    for times in (b"00000000000\0", base256(-5, 12) + b"00000000000\0"):
        assert only(header(b"name", magic=GNU, tail=times) + END).path == b"name"
    # Go before 1.8 wrote a prefix where GNU has times.
    assert only(header(b"name", magic=GNU, tail=b"p" * 155) + END).path == b"p" * 155 + b"/name"
    assert only(header(b"name", magic=GNU, tail=b"1234567890/8") + END).path == b"1234567890/8/name"
    assert only(header(b"name", magic=GNU, tail=b"00000000000/not a time") + END).path == b"00000000000/not a time/name"
    assert only(header(b"name", magic=GNU, tail=b"p\xff") + END).path == b"name"


@pytest.mark.parametrize("type_", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_only_files_have_data(type_: bytes) -> None:
    found = read(header(b"a", type_, size=5000, link=b"b") + header(b"next", size=1) + padded(b"1") + END)
    assert [(member.path, member.size, data) for member, data in found] == [(b"a", 0, b""), (b"next", 1, b"1")]


def test_contiguous_files_and_volume_headers() -> None:
    data = header(b"label", b"V", size=3) + padded(b"lab") + header(b"file", b"7", size=2) + padded(b"ab") + END
    ((member, content),) = read(data)
    assert (member.path, member.kind, content) == (b"file", Kind.FILE, b"ab")


@pytest.mark.parametrize("type_", [b"D", b"M", b"N", b"A", b"8", b"\xff"])
def test_unknown_types_are_refused(type_: bytes) -> None:
    refused(header(b"some/name", type_) + END, "'some/name': it is of the unknown type")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"000644 \0", 0o644),
        (b"   644 \0", 0o644),
        (b"00000644", 0o644),
        (b"644\0junk", None),
        (b"644\0\0\0\0\0", 0o644),
        (b"\0" * 8, 0),
        (b" " * 8, 0),
        (b"\x80" + (70_000).to_bytes(7, "big"), 70_000),
        (b"-000644\0", None),
        (b"0o00644\0", None),
        (b"00_0644\0", None),
        (b"0000648\0", None),
        (b"\xff" * 8, None),
        (b"\x80" + (1 << 32).to_bytes(7, "big"), None),
    ],
)
def test_numbers(field: bytes, value: int | None) -> None:
    if value is None and field != b"644\0junk":
        refused(header(uid=field) + END, "octal number|its owner")
    else:
        assert only(header(uid=field) + END).uid == (0o644 if value is None else value)


def test_negative_times_in_base_256() -> None:
    assert only(header(mtime=(-5).to_bytes(12, "big", signed=True)) + END).mtime_ns == -5 * 10**9
    refused(header(mtime=b"\xc0" + bytes(11)) + END, "does not fit 64 bits")
    refused(header(mtime=b"\x80" + (1 << 62).to_bytes(11, "big")) + END, "does not fit nanoseconds")


def test_negative_and_huge_sizes_are_refused() -> None:
    refused(header(size=b"\xff" * 12) + END, "impossible size -1")
    refused(header(size=b"\x80" + (1 << 64).to_bytes(11, "big")) + END, "does not fit 64 bits")
    refused(with_pax((b"size", b"9" * 19)), "impossible size")


def test_signed_checksums() -> None:
    assert only(header("ä".encode(), signed=True) + END).path == "ä".encode()
    assert only(header(b"\xff" * 100, signed=True) + END).path == b"\xff" * 100
    assert only(header(b"\xff" * 100) + END).path == b"\xff" * 100


@pytest.mark.parametrize("place", [0, 99, 124, 148, 150, 156, 257, 345, 511])
def test_a_changed_header_is_refused(place: int) -> None:
    block = bytearray(header())
    block[place] ^= 0x05
    refused(bytes(block) + END, "not a tar archive: bad header checksum at byte 0")
    refused(header() + bytes(block) + END, "corrupt archive: bad header checksum at byte 512")


def test_long_names_and_links() -> None:
    def gnu(type_: bytes, text: bytes) -> bytes:
        return header(b"././@LongLink", type_, size=len(text), magic=b"ustar  \0") + padded(text)

    data = gnu(b"K", b"t" * 300 + b"\0") + gnu(b"L", b"n" * 400 + b"\0") + header(b"short", b"2", link=b"t") + END
    member = only(data)
    assert (member.path, member.link) == (b"n" * 400, b"t" * 300)
    # They win over PAX, as in Go, and only count for one member.
    found = read(gnu(b"L", b"gnu") + pax((b"path", b"pax")) + header() + header(b"next") + END)
    assert [member.path for member, _ in found] == [b"gnu", b"next"]
    assert only(gnu(b"L", b"with\0junk") + header() + END).path == b"with"


def test_pax_records() -> None:
    member = only(
        with_pax(
            (b"path", "päth=1\n2".encode()),
            (b"uid", b"4294967294"),
            (b"gid", b"70000"),
            (b"mtime", b"1.5"),
            (b"comment", b"any\0thing"),
            (b"hdrcharset", b"BINARY"),
            (b"uname", b"\xff"),
            (b"SCHILY.xattr.user.raw", b"\0=\n\xff"),
            (b"SCHILY.xattr.user.empty", b""),
            (b"LIBARCHIVE.xattr.user.%C3%A4", base64.b64encode(b"value").rstrip(b"=")),
            (b"LIBARCHIVE.xattr.user.raw", base64.b64encode(b"other")),
        )
    )
    assert member.path == "päth=1\n2".encode()
    assert (member.uid, member.gid, member.mtime_ns) == (4_294_967_294, 70_000, 1_500_000_000)
    assert member.xattrs == {b"user.raw": b"\0=\n\xff", b"user.empty": b"", "user.ä".encode(): b"value"}


def test_the_size_of_a_pax_header_counts() -> None:
    found = read(pax((b"size", b"600")) + header(size=0) + padded(b"d" * 600) + header(b"next") + END)
    assert [(member.path, len(data)) for member, data in found] == [(b"name", 600), (b"next", 0)]
    # But not for what has no data.
    found = read(pax((b"size", b"600")) + header(b"link", b"1", link=b"name") + header(b"next") + END)
    assert [member.path for member, _ in found] == [b"link", b"next"]


def test_global_records_are_ignored() -> None:
    """As in Go: umoci and Docker could not do otherwise."""
    globals_ = pax((b"uid", b"7"), (b"path", b"no"), (b"SCHILY.xattr.user.a", b"1"), type=b"g")
    found = read(globals_ + header(b"a") + pax((b"gid", b"9")) + globals_ + header(b"b") + END)
    assert [(m.path, m.uid, m.gid, m.xattrs) for m, _ in found] == [(b"a", 0, 0, {}), (b"b", 0, 9, {})]
    assert read(globals_ + END) == []


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (((b"path", b"a\0b"),), "a name holds a NUL byte"),
        (((b"linkpath", b"a\0b"),), "a name holds a NUL byte"),
        (((b"uid", b"-1"),), "is not a number"),
        (((b"uid", b"1_0"),), "is not a number"),
        (((b"gid", b"4294967296"),), "its owner 0:4294967296"),
        (((b"uid", b"4294967295"),), "its owner 4294967295:0"),
        (((b"mtime", b"1e9"),), "is not a time"),
        (((b"mtime", b"9223372037"),), "does not fit"),
        (((b"SCHILY.xattr.", b"x"),), "no file can have its extended attribute"),
        (((b"SCHILY.xattr." + b"n" * 256, b"x"),), "no file can have its extended attribute"),
        (((b"SCHILY.xattr.user.x", bytes(65_537)),), "of 65537 bytes"),
        (((b"LIBARCHIVE.xattr.user.%00", b""),), "no file can have its extended attribute"),
        (((b"LIBARCHIVE.xattr.user.x", b"A"),), "is not in base 64"),
        (((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")), "its sparse format '2.0' is not known"),
        (((b"GNU.sparse.map", b"0,0"),), "is not a number"),
        (((b"GNU.sparse.map", b"0,0"), (b"GNU.sparse.numblocks", b"2")), "not as long as GNU.sparse.numblocks"),
        (((b"GNU.sparse.map", b"0,9"), (b"GNU.sparse.numblocks", b"1")), "goes past its end"),
        (((b"GNU.sparse.map", b"8,1,0,1"), (b"GNU.sparse.numblocks", b"2"), (b"GNU.sparse.size", b"9")), "in order"),
        (((b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.numblocks", b"1"), (b"GNU.sparse.size", b"9")), "does not fit"),
        (((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")), "map is longer than its data"),
        (((b"GNU.sparse.numbytes", b"1"),), "not made of pairs"),
        (((b"GNU.sparse.offset", b"1,2"),), "not made of pairs"),
    ],
)
def test_bad_records_are_refused(records: tuple[tuple[bytes, bytes], ...], message: str) -> None:
    refused(with_pax(*records), message)


@pytest.mark.parametrize(
    "data",
    [
        b"x", b"5", b"5 a=", b"5 a=\n0", b"0 a=b\n", b"6 a=bc\n", b"99 a=b\n", b"-6 a=b\n", b"+6 a=b\n", b" 6 a=b\n",
        b"6 a_b\n", b"5 =b\n", b"8 a\0b=c\n", b"2 ", b"3 \n", b"1", b"999999999999999999999999999 a=b\n", b"6 a=b\n\0",
        b"1" * 5000,
    ],
)  # fmt: skip
def test_malformed_records_are_refused(data: bytes) -> None:
    refused(header(b"pax", b"x", size=len(data)) + padded(data) + header() + END, "record of an extended header")


def test_extended_headers_have_a_limit() -> None:
    for type_ in (b"x", b"g", b"L", b"K"):
        refused(header(b"e", type_, size=MAX_EXTENSION_BYTES + 1), "the limit is")
        refused(header(b"e", type_, size=b"\xff" * 12), "the limit is")
    text = b"n" * MAX_EXTENSION_BYTES
    assert len(only(header(b"L", b"L", size=len(text)) + text + header() + END).path) == MAX_EXTENSION_BYTES


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"0", 0),
        (b"1.", 10**9),
        (b"-1.5", -1_500_000_000),
        (b"-0.000000001", -1),
        (b"1700000000.123456789999", 1_700_000_000_123_456_789),
        (b"12.05", 12_050_000_000),
    ],
)
def test_times(text: bytes, expected: int) -> None:
    assert parse_time(text) == expected


@pytest.mark.parametrize("text", [b"", b".5", b"+1", b"1.2.3", b"1,5", b" 1", b"1.x", b"0x1", b"1\n"])
def test_bad_times(text: bytes) -> None:
    with pytest.raises(LayerError, match="is not a time"):
        parse_time(text)


def test_where_an_archive_ends() -> None:
    one = header(size=3) + padded(b"abc")
    for end in (END, END + b"anything", bytes(512), b"", bytes(700)):
        assert only(one + end).path == b"name"
    assert only(header(size=3) + b"abc").size == 3  # no padding
    assert read(b"") == read(bytes(512)) == read(bytes(10_240)) == []
    refused(bytes(512) + one, "data after a single block of zeros")
    refused(one + b"x", "ends inside a header, at byte 1025")
    refused(header(size=3) + b"ab", "ends inside 'name', at byte 514")
    refused(pax((b"path", b"n")), "ends after an extended header")
    refused(pax((b"path", b"n"))[:515], "ends inside an extended header, at byte 515")
    refused(pax((b"path", b"n")) + END, "ends after an extended header")


def test_data_that_is_cut_is_found_when_it_is_skipped() -> None:
    with pytest.raises(LayerError, match="ends inside 'name'"):
        list(Archive(iter([header(size=5000) + bytes(4999)])).members())


def sparse_file(path: Path, pieces: list[tuple[int, bytes]], size: int) -> None:
    with path.open("wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(size)


def expand(member: Member, data: bytes) -> bytes:
    whole = bytearray(member.size)
    at = 0
    for offset, length in member.segments or [(0, len(data))]:
        whole[offset : offset + length] = data[at : at + length]
        at += length
    assert at == len(data)
    return bytes(whole)


@pytest.mark.parametrize("format_", ["gnu", "posix 0.0", "posix 0.1", "posix 1.0", "oldgnu"])
@pytest.mark.parametrize("count", [0, 1, 3, 5, 40])
def test_sparse_files_of_gnu_tar(tmp_path: Path, format_: str, count: int) -> None:
    size = 40 * 65_536 + 5
    pieces = [(number * 65_536 + 4096, b"piece %d" % number) for number in range(count)]
    sparse_file(tmp_path / "sparse", pieces, size)
    (tmp_path / "next").write_bytes(b"next")
    name, _, version = format_.partition(" ")
    options = [f"--format={name}", *([f"--sparse-version={version}"] if version else [])]
    data = subprocess.run(
        ["tar", *options, "--sparse", "--hole-detection=seek", "-cf", "-", "sparse", "next"],
        cwd=tmp_path, check=True, stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    (sparse, content), (after, next_content) = read(data, 1000)
    assert (sparse.path, sparse.size, after.path, next_content) == (b"sparse", size, b"next", b"next")
    assert sparse.segments is not None and len(sparse.segments) == count
    assert len(content) < size // 2
    assert expand(sparse, content) == (tmp_path / "sparse").read_bytes()


def test_attributes_of_gnu_tar(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"data")
    values = {"user.text": b"value", "user.bytes": bytes(range(256)), "user.empty": b""}
    try:
        for name, value in values.items():
            os.setxattr(file, name, value)
    except OSError:
        pytest.skip("no user attributes on the filesystem of temporary files")
    os.utime(file, ns=(0, -1_500_000_001))
    data = subprocess.run(
        ["tar", "--xattrs", "-cf", "-", "file"], cwd=tmp_path, check=True, stdout=subprocess.PIPE
    ).stdout
    member = only(data)
    assert member.xattrs == {name.encode(): value for name, value in values.items()}
    assert member.mtime_ns == file.stat().st_mtime_ns


def old_sparse(entries: bytes, *, size: int, real: int, extended: bool = False, magic: bytes = b"ustar  \0") -> bytes:
    # 345: access and change time, offset, long names, a pad (41 bytes), then the map.
    tail = bytes(41) + entries.ljust(96, b"\0") + bytes([extended]) + b"%011o\0" % real
    return header(b"sparse", b"S", size=size, magic=magic, tail=tail)


def entry(offset: int, length: int) -> bytes:
    return b"%011o\0%011o\0" % (offset, length)


def test_bad_old_sparse_members_are_refused() -> None:
    good = old_sparse(entry(512, 3), size=3, real=1024)
    assert only(good + padded(b"abc") + END).segments == [(512, 3)]
    refused(old_sparse(entry(512, 3), size=3, real=1024, magic=b"ustar\x0000"), "not in the GNU format")
    refused(old_sparse(entry(512, 3), size=4, real=1024), "does not fit the 4 bytes")
    refused(old_sparse(entry(512, 3) + entry(0, 3), size=6, real=1024), "not in order")
    refused(old_sparse(entry(512, 3) + entry(514, 3), size=6, real=1024), "not in order")
    refused(old_sparse(entry(1022, 3), size=3, real=1024), "goes past its end")
    refused(old_sparse(entry(0, 3), size=3, real=1024, extended=True), "ends inside 'sparse'")
    more = entry(4, 1).ljust(504, b"\0") + b"\0" * 8
    assert only(old_sparse(entry(0, 1), size=2, real=9, extended=True) + more + padded(b"ab")).segments == [
        (0, 1),
        (4, 1),
    ]


def test_sparse_maps_have_a_limit() -> None:
    full = b"".join(entry(number, 0) for number in range(21)) + b"\1" * 8
    refused(old_sparse(entry(0, 0), size=0, real=99, extended=True) + full * 13_000, "more than 262144 parts")
    version = (b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")
    refused(pax(*version) + header(size=512) + padded(b"9999999\n"), "more than 262144 parts")
    refused(pax(*version) + header(size=512) + b"1" * 512, "does not start with a number")
    refused(pax(*version) + header(size=512) + padded(b"2\n1\n1\n"), "longer than its data")
    refused(pax(*version) + header(size=512) + padded(b"1\n1\n-1\n"), "is not a number")


def test_names_are_shown_without_tricks() -> None:
    assert shown(b"a\x1b[31m\xff'") == '"a\\x1b[31m\\udcff\'"'
    assert shown("ä".encode()) == "'ä'"
    assert len(shown(b"n" * 1000)) == 205


VALID = layers.archive(
    [*MEMBERS[:-8], layers.Member(LONG, b"data", mtime="1.5", xattrs={"user.a": b"b"})]
) + old_sparse(entry(512, 3), size=3, real=1024)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_archive_raises_nothing_but_layer_errors(data: st.DataObject) -> None:
    damaged = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
        start = place - place % 512
        block = bytes(damaged[start : start + 512])
        if b"ustar" in block and data.draw(st.booleans()):
            damaged[start : start + 512] = checksummed(block)
    try:
        found = read(bytes(damaged), data.draw(st.sampled_from([100, 512, 1 << 20])))
    except LayerError:
        return
    assert sum(len(content) for _, content in found) <= len(VALID)


@given(st.binary(max_size=200))
def test_any_bytes_as_records_raise_nothing_but_layer_errors(data: bytes) -> None:
    try:
        records = parse_records(data)
    except LayerError:
        return
    assert all(b"=" not in key for key in records)


@given(
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=12, max_size=12),
    st.binary(max_size=16),
    st.binary(max_size=1),
)
def test_any_bytes_in_a_header_raise_nothing_but_layer_errors(
    id_: bytes, number: bytes, rest: bytes, type_: bytes
) -> None:
    block = header(rest, type_ or b"0", uid=id_, mode=id_[::-1], size=number, mtime=number[::-1], tail=rest)
    try:
        member = only(block + END)
    except (LayerError, ValueError):  # ValueError: no member
        return
    assert 0 <= member.uid < 1 << 32


def test_records_of_any_content_come_back() -> None:
    for value in (b"", b"=", b"\n", b" ", b"1 2=3\n", bytes(range(256)) * 40):
        assert parse_records(record(b"key", value) + record(b"next", b"1")) == {b"key": value, b"next": b"1"}
