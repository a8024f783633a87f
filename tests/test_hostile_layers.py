"""Layers that want out, that lie and that burst: nothing outside changes, and one error says why."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Sequence
from itertools import chain

import pytest

from fledge_tasks.filesystems import ext4
from fledge_tasks.oci import limits
from tests import trees
from tests.layers import Compression, Member, archive, compress, digest, folder, hardlink, symlink
from tests.rawtar import END, header, padded, pax
from tests.scene import Scene, scene
from tests.tools import need

__all__ = ["scene"]

MIB = 1 << 20
OUT = "OUT"
"""Stands for the absolute path of the folder outside."""


def placed(members: Sequence[Member], outside: str) -> list[Member]:
    return [
        Member(**{
            **{name: getattr(member, name) for name in member.__dataclass_fields__},
            "path": member.path.replace(OUT, outside),
            "link": member.link.replace(OUT, outside),
        })
        for member in members
    ]  # fmt: skip


EVIL = b"evil"
ESCAPES: dict[str, tuple[list[list[Member]], str]] = {
    # what is tried: (layers, the path in the image where the data EVIL ends up)
    "an absolute path": ([[Member(f"{OUT}/secret", EVIL)]], f"{OUT}/secret"),
    "more slashes": ([[Member(f"//{OUT}//./secret", EVIL)]], f"{OUT}/secret"),
    "parents of the root": ([[Member("../" * 40 + f"{OUT}/secret", EVIL)]], f"{OUT}/secret"),
    "parents on the way": ([[Member("a/../../../" + f"b/../..{OUT}/secret", EVIL)]], f"{OUT}/secret"),
    "parents to the root": ([[folder("../.."), Member("../x", EVIL)]], "/x"),
    "a link to a folder": ([[symlink("l", OUT), Member("l/secret", EVIL)]], f"{OUT}/secret"),
    "a relative link": ([[symlink("l", "../" * 40 + OUT), Member("l/secret", EVIL)]], f"{OUT}/secret"),
    "a link to a link": ([[symlink("l", "m"), symlink("m", OUT), Member("l/secret", EVIL)]], f"{OUT}/secret"),
    "a link of a lower layer": ([[symlink("l", OUT)], [Member("l/secret", EVIL)]], f"{OUT}/secret"),
    "a link to a file": ([[symlink("l", f"{OUT}/secret"), Member("l", EVIL)]], "/l"),
    "parents behind a link": ([[symlink("l", f"{OUT}/folder"), Member("l/../../../secret", EVIL)]], "/secret"),
    "a link that becomes a folder": ([[symlink("l", OUT), folder("l"), Member("l/secret", EVIL)]], "/l/secret"),
    "a whiteout outside": ([[Member(f"{OUT}/.wh.secret"), Member(f"../..{OUT}/.wh.link"), Member("x", EVIL)]], "/x"),
    "a whiteout behind a link": ([[symlink("l", OUT)], [Member("l/.wh.secret"), Member("x", EVIL)]], "/x"),
    "an opaque folder outside": ([[Member(f"{OUT}/.wh..wh..opq"), Member("x", EVIL)]], "/x"),
    "an opaque link": ([[symlink("l", OUT)], [Member("l/.wh..wh..opq"), Member("x", EVIL)]], "/x"),
    "a hard link that is written": ([
        [Member(f"{OUT}/secret", b"inside"), hardlink("h", f"{OUT}/secret"), Member("h", EVIL)],
    ], "/h"),
    "a link in a circle": ([[symlink("a", "b"), symlink("b", "a"), Member("x", EVIL)]], "/x"),
    "a link to itself that is replaced": ([[symlink("a", "a"), Member("a", EVIL)]], "/a"),
}  # fmt: skip


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(scene: Scene, name: str) -> None:
    need("debugfs")
    layers, path = ESCAPES[name]
    scene.image().write(*(placed(members, str(scene.outside)) for members in layers))
    result = scene.build()
    assert result.code == 0, result.stderr
    path = path.replace(OUT, str(scene.outside))
    assert trees.debugfs(scene.place.output("bad"), [f"cat {path}".encode()]) == [EVIL.decode()]


def tar(*members: Member) -> bytes:
    return archive(members)


def number(value: int, length: int) -> bytes:
    """Return a number in base 256 (tar(5) of libarchive, 'GNU tar'), whatever its sign."""
    sign = 0x80 if value >= 0 else 0xFF
    return bytes([sign]) + (value & (1 << 8 * (length - 1)) - 1).to_bytes(length - 1, "big")


def sparse(size: int, *pairs: int) -> bytes:
    """Return an archive of one sparse file in the PAX format 0.1; `pairs` are offsets and lengths."""
    records = {"map": ",".join(map(str, pairs)), "numblocks": len(pairs) // 2, "size": size}
    head = pax(*((f"GNU.sparse.{key}".encode(), str(value).encode()) for key, value in records.items()))
    return head + header(size=sum(pairs[1::2])) + padded(bytes(sum(pairs[1::2]))) + END


BAD_TREES: dict[str, tuple[bytes, str]] = {
    # what is wrong: (archive, words of the error); found when layers are merged or the image is made
    "a hard link outside": (tar(hardlink("h", "/etc/passwd")), "hard link to /etc/passwd, which does not exist"),
    "a hard link by parents": (tar(hardlink("h", "../" * 40 + "etc/passwd")), "hard link to /etc/passwd"),
    "a hard link behind a link": (tar(symlink("l", "/etc"), hardlink("h", "l/passwd")), "which does not exist"),
    "hard links in a circle": (tar(hardlink("a", "b"), hardlink("b", "a")), "hard link to /b, which does not exist"),
    "a hard link to itself": (tar(hardlink("a", "a")), "hard link to /a, which does not exist"),
    "a hard link to itself, replaced": (tar(Member("a"), hardlink("a", "a")), "/a is a hard link to /a"),
    "a hard link to a folder": (tar(folder("d"), hardlink("a", "d")), "which is a folder"),
    "a path through a circle": (tar(symlink("a", "b"), symlink("b", "a"), Member("a/x")), "too many symbolic links"),
    "a path through itself": (tar(symlink("a", "a/a"), Member("a/x")), "too many symbolic links"),
    "a path through a file": (tar(Member("a"), Member("a/x")), "/a is not a folder"),
    "a file for lost+found": (tar(Member("lost+found")), "ext4 needs it as a folder"),
    "too large a sparse file": (sparse((1 << 63) - 1, 0, 0), "a file of 9223372036854775807 bytes, ext4 allows"),
    "data far out": (sparse((1 << 63) - 1, (1 << 63) - 2, 1), "a file of 9223372036854775807 bytes, ext4 allows"),
    "too large an attribute": (tar(Member("f", xattrs={"user.a": b"x" * 60_000})), "user.a"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_tree_that_cannot_be(scene: Scene, name: str) -> None:
    data, words = BAD_TREES[name]
    scene.image().write_tars([tar(Member("lower")), data])
    scene.refused(words, stage="mkfs")
    scene.recovers()


LONG = "n" * 10_000
LONG_PATH = "/".join(["n" * 99] * 100)


def gnu_long(name: str, kind: bytes) -> bytes:
    data = name.encode() + b"\0"
    return header(b"././@LongLink", kind, size=len(data)) + padded(data) + header(type=b"2", link=b"x") + END


BAD_ARCHIVES: dict[str, tuple[bytes, str]] = {
    # what is wrong: (archive, words of the error); found when the layer is unpacked
    "a name of 10,000 bytes": (tar(Member(LONG)), "a path of 10000 bytes, the limit is 4096"),
    "a path of 10,000 bytes": (tar(Member(LONG_PATH)), "a path of 9999 bytes, the limit is 4096"),
    "a GNU name of 10,000 bytes": (gnu_long(LONG, b"L"), "a path of 10000 bytes, the limit is 4096"),
    "a name of 256 bytes": (tar(folder("a"), Member("a/" + "n" * 256)), "has more than 255 bytes"),
    "a target of 10,000 bytes": (tar(symlink("l", LONG)), "cannot have a target of 10000 bytes"),
    "a GNU target of 10,000 bytes": (gnu_long(LONG, b"K"), "cannot have a target of 10000 bytes"),
    "a hard link to 10,000 bytes": (tar(hardlink("l", LONG)), "a path of 10000 bytes, the limit is 4096"),
    "an extended header of 2 MiB": (tar(Member("n" * 2 * MIB)), "an extended header has 2097"),
    "a name of control characters": (tar(Member("\x1b[31m\r\n" + LONG)), r"'\x1b[31m\r\n"),
    "an attribute of 100 kB": (tar(Member("f", xattrs={"user.a": b"x" * 100_000})), "extended attribute b'user.a'"),
    "an attribute's name of 300 bytes": (tar(Member("f", xattrs={"user." + "a" * 300: b""})), "no file can have its"),
    "no target": (tar(symlink("l", "")), "cannot have a target of 0 bytes"),
    "a whiteout of nothing": (tar(Member("a/.wh.")), "a whiteout of nothing"),
    "a whiteout of the folder": (tar(Member("a/.wh..")), "a whiteout of nothing"),
    "a whiteout of the parent": (tar(Member("a/.wh...")), "a whiteout of nothing"),
    "a root that is a file": (tar(Member("./")), "the root of the layer is not a directory"),
    "a hard link to the root": (tar(hardlink("a", "/..")), "a hard link to the root, or to nothing"),
    "an unknown type": (header(type=b"Z") + END, "unknown type 'Z'"),
    "a size of 2^63-1": (header(size=number((1 << 63) - 1, 12)), "truncated archive: ends inside 'name'"),
    "a size of 2^63": (header(size=number(1 << 63, 12)), "a number in a header does not fit 64 bits"),
    "a size of 8 GiB, octal": (header(size=b"7" * 12), "truncated archive: ends inside 'name'"),
    "a size of -1": (header(size=number(-1, 12)), "impossible size -1"),
    "a size of -2^63": (header(size=number(-(1 << 63), 12)), "does not fit 64 bits"),
    "a size that is no number": (
        header(size=b"0000000009\0\0") + END,
        "'0000000009' in a header is not an octal number",
    ),
    "a size with a sign": (header(size=b"-0000000001\0") + END, "is not an octal number"),
    "a PAX size of 2^63-1": (pax((b"size", b"9223372036854775807")) + header() + END, "truncated archive"),
    "a PAX size of 2^64": (pax((b"size", b"18446744073709551616")) + header() + END, "is not a number"),
    "a negative PAX size": (pax((b"size", b"-1")) + header() + END, "b'-1' is not a number"),
    "an owner of 2^32": (pax((b"uid", b"4294967296")) + header() + END, "its owner 4294967296:0"),
    "an owner of -1": (header(uid=number(-1, 8)) + END, "its owner -1:0"),
    "a time of 2^63-1 s": (header(mtime=number((1 << 63) - 1, 12)) + END, "does not fit nanoseconds in 64 bits"),
    "a PAX time of 10^18 s": (pax((b"mtime", b"-1" + b"0" * 18)) + header() + END, "does not fit nanoseconds"),
    "a PAX time of a million digits": (pax((b"mtime", b"1" * 1_000_000)) + header() + END, "is not a time"),
    "a device of 4096:0": (header(type=b"3", devices=b"0010000\0" + b"0000000\0") + END, "no device 4096:0"),
    "a device of -1:0": (header(type=b"4", devices=number(-1, 8) + b"0000000\0") + END, "no device -1:0"),
    "a sparse map past its end": (sparse(100, 200, 1), "sparse map is not in order, or goes past its end"),
    "a sparse map backwards": (sparse(100, 50, 1, 10, 1), "sparse map is not in order"),
    "a sparse size of 2^63": (sparse(1 << 63, 0, 0), "impossible size"),
    "a length of 5,000 digits": (header(b"p", b"x", size=5000) + padded(b"1" * 5000) + END, "has a wrong length"),
    "less data than the header says": (tar(Member("f", b"x" * 2000))[:1500], "truncated archive: ends inside 'f'"),
    "more data than the header says": (header(size=10) + b"x" * 1024 + END, "bad header checksum"),
    "half a header": (header()[:300], "truncated archive: ends inside a header"),
    "nothing after an extended header": (pax((b"path", b"x")), "ends after an extended header"),
    "no archive": (b"no archive at all" * 100, "not a tar archive"),
    "one block of zeros": (tar(Member("a"))[:512] + bytes(512) + tar(Member("b")), "after a single block of zeros"),
}


@pytest.mark.parametrize("name", BAD_ARCHIVES)
def test_a_bad_archive(scene: Scene, name: str) -> None:
    data, words = BAD_ARCHIVES[name]
    layout = scene.image().write_tars([data])
    named = f"bad: layer {layout.diff_ids[0][7:19]}: "
    scene.refused(named, words, stage="unpack")
    assert scene.cached() == {"resolve", "fetch"}


def test_extremes_that_are_allowed(scene: Scene) -> None:
    """The last numbers that a member may have are in the image, or the nearest that ext4 has."""
    need("debugfs", "e2fsck")
    most = (1 << 32) - 2  # the one above means "none" to Linux
    data = b"".join([
        pax((b"uid", b"%d" % most), (b"gid", b"%d" % most), (b"mtime", b"9223372036.854775807"), (b"path", b"last")),
        header(), pax((b"mtime", b"-9223372036.854775807"), (b"path", b"first")), header(),
        header(b"device", b"3", devices=b"0007777\0" + b"3777777\0"), sparse(ext4.MAX_FILE_BYTES, 8 << 40, 1),
    ])  # fmt: skip
    scene.image().write_tars([data])
    result = scene.build()
    assert result.code == 0, result.stderr
    image = scene.place.output("bad")
    trees.check(image)
    last, first, device, name = trees.debugfs(image, [b"stat /last", b"stat /first", b"stat /device", b"stat /name"])
    assert re.search(r"User: +-2 +Group: +-2 ", last)  # debugfs prints 32 bits with a sign
    assert "Fri Apr 11 23:47:16 2262" in last
    assert "1901" in first
    assert "4095:1048575" in device
    assert f"Size: {ext4.MAX_FILE_BYTES}" in name


def zstd_of_a_window(bits: int) -> bytes:
    """Return a frame that asks for a window of that many bits (RFC 8878, 3.1.1.1.2), and has one raw block."""
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(bits - 10) << 3]) + (5 << 3 | 1).to_bytes(3, "little") + b"12345"


TREE = tar(Member("a", b"x" * 10_000))
NOISE = tar(Member("a", random.Random(1).randbytes(10_000)))
BAD_BLOBS: dict[str, tuple[bytes, str]] = {
    "garbage after gzip": (gzip.compress(TREE) + b"garbage", "trailing garbage after the gzip stream"),
    "garbage after zeros after gzip": (gzip.compress(TREE) + bytes(600) + b"g", "trailing garbage after the gzip"),
    "half a gzip member after gzip": (gzip.compress(TREE) + gzip.compress(TREE)[:20], "truncated gzip stream"),
    "garbage after zstd": (compress(TREE, "zstd") + b"garbage", "trailing garbage after the zstd stream"),
    "a byte after zstd": (compress(TREE, "zstd") + b"\0", "trailing garbage after the zstd stream"),
    "a skippable frame that lies": (compress(TREE, "zstd") + b"\x50\x2a\x4d\x18\xff\xff\xff\xff", "truncated zstd"),
    "a wrong checksum in gzip": (gzip.compress(TREE)[:-8] + bytes(8), "corrupt gzip stream"),
    "a window of 2 GiB": (zstd_of_a_window(31), "corrupt zstd stream"),
    "a window of 2^41": (zstd_of_a_window(41), "corrupt zstd stream"),
    "gzip in gzip": (gzip.compress(gzip.compress(TREE)), "truncated archive: ends inside a header"),
    "zstd in gzip": (gzip.compress(compress(NOISE, "zstd")), "not a tar archive"),
    "bzip2": (bz2.compress(TREE), "compressed with bzip2"),
    "xz": (lzma.compress(TREE), "compressed with xz"),
    "nothing": (b"", "diff ID"),
}


@pytest.mark.parametrize("name", BAD_BLOBS)
def test_a_bad_blob(scene: Scene, name: str) -> None:
    data, words = BAD_BLOBS[name]
    layout = scene.image().write_tars([TREE], blobs={0: data})
    scene.refused(f"bad: layer {layout.diff_ids[0][7:19]}: ", words, stage="unpack")
    scene.recovers()


def zeros(mib: int) -> bytes:
    """Return an archive of one file of zeros."""
    return tar(Member("zeros", bytes(mib * MIB)))


def members(data: bytes) -> bytes:
    """Return gzip of many members."""
    return b"".join(gzip.compress(data[at : at + 65_536], mtime=0) for at in range(0, len(data), 65_536))


BOMBS: dict[str, tuple[bytes, str, str, str]] = {
    # what it is: (blob, [limits], words of the error, the setting that its hint names)
    "bytes in gzip": (gzip.compress(zeros(8)), "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "bytes in zstd": (compress(zeros(8), "zstd"), "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "bytes in gzip members": (members(zeros(8)), "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "bytes in zstd frames": (compress(bytes(MIB), "zstd") * 8, "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "bytes after the end": (gzip.compress(END + bytes(8 * MIB)), "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "plain bytes": (zeros(2), "layer_mb = 1", f"more than {MIB} bytes", "layer_mb"),
    "ratio of gzip": (gzip.compress(zeros(8)), "ratio = 20", "bytes, over 20 times as many as its blob", "ratio"),
    "ratio of zstd": (compress(zeros(8), "zstd"), "ratio = 20", "bytes, over 20 times as many as its blob", "ratio"),
    "ratio of gzip members": (members(zeros(8)), "ratio = 20", "bytes, over 20 times as many as its blob", "ratio"),
    "entries in gzip": (gzip.compress(header() * 1001), "entries = 1000", "more than 1000 entries", "entries"),
    "entries in zstd": (compress(header() * 1001, "zstd"), "entries = 1000", "more than 1000 entries", "entries"),
    "parts of a sparse file": (
        gzip.compress(sparse(1 << 40, *(n for at in range(20_000) for n in (at * 8192, 1)))), "layer_mb = 1",
        f"the layer's files take more than {4 * MIB} bytes", "layer_mb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb(scene: Scene, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RATIO_FREE_BYTES", MIB)
    blob, setting, words, hinted = BOMBS[name]
    layout = scene.image(f"[limits]\n{setting}\n").write_tars([b""], blobs={0: blob})
    error = scene.refused(f"bad: layer {layout.diff_ids[0][7:19]}: ", words, stage="unpack")
    assert f"raise {hinted} in the [limits] of fledge.toml" in error
    scene.recovers()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_limits_have_defaults(scene: Scene, compression: Compression) -> None:
    """A small image with a large file of zeros is no bomb, whatever its ratio."""
    layout = scene.image().write_tars([zeros(64)], compression=compression)
    assert layout.blob(0).stat().st_size * 200 < 64 * MIB
    assert scene.build().code == 0


def test_many_entries_in_bounded_memory(scene: Scene) -> None:
    """The memory of a build grows with the entries, by less than a kilobyte for each."""
    few, many = 1000, 51_000
    peaks = []
    for count in (few, many):
        headers = (header(b"folder%d/empty%07d" % (at // 10_000, at)) for at in range(count))
        scene.image().write_tars([b"".join(headers) + END])
        peaks.append(peak_bytes(scene))
    assert peaks[1] - peaks[0] < (many - few) * 1000


def test_a_million_entries(scene: Scene) -> None:
    """No more than a kilobyte for each, and 200 MB; how many are in the image, its superblock tells."""
    count = 1_000_000
    packer, diff_id, blob = zlib.compressobj(1, wbits=31), hashlib.sha256(), bytearray()
    for part in chain((b"".join(numbered(range(at, at + 50_000))) for at in range(0, count, 50_000)), (END,)):
        diff_id.update(part)
        blob += packer.compress(part)
    blob += packer.flush()
    scene.image().write_tars([b""], blobs={0: bytes(blob)}, diff_ids=[f"sha256:{diff_id.hexdigest()}"])
    assert peak_bytes(scene) < count * 1000 + (200 << 20)
    with scene.place.output("bad").open("rb") as image:
        superblock = image.read(2048)[1024:]
    inodes, free = (struct.unpack_from("<I", superblock, at)[0] for at in (0x00, 0x10))
    assert inodes - free > count


def numbered(numbers: range) -> Iterator[bytes]:
    """Yield headers of empty files 'dDDD/fDDDDDDD'. What differs in the checksum is the sum of the digits."""
    block = header(b"d000/f0000000")
    start, total = block[13:148], int(block[148:154], 8)
    for number in numbers:
        digits = b"%03d%07d" % (number // 5000, number)
        checksum = b"%06o\0 " % (total + sum(digits) - 480)
        yield b"".join((b"d", digits[:3], b"/f", digits[3:], start, checksum, block[156:]))


WATCH = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


def peak_bytes(scene: Scene) -> int:
    """Run `fledge build` and return the most memory that one of its processes had.

    A small process starts it, and not this one, whose own peak would count (getrusage(2): it is kept across execve).
    """
    need("mke2fs")
    build = [sys.executable, "-m", "fledge_tasks", "-C", str(scene.place.root), "build", "-j", "1"]
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *build],
        env=scene.place.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(done.stdout.split()[-1]) * 1024


def test_a_tar_that_goes_on_after_its_end(scene: Scene) -> None:
    """What follows the two blocks of zeros belongs to the diff ID and is looked at by nobody: no error."""
    need("debugfs")
    scene.image().write_tars([tar(Member("a", b"first")) + tar(Member("a", EVIL)) + b"garbage"])
    assert scene.build().code == 0
    assert trees.debugfs(scene.place.output("bad"), [b"cat /a"]) == ["first"]


def test_a_layer_of_another_diff_id(scene: Scene) -> None:
    layout = scene.image().write([Member("a")], diff_ids=[digest(b"other")])
    scene.refused(
        f"bad: layer {layout.diff_ids[0][7:19]}: ", "has the diff ID sha256:", digest(b"other"), stage="unpack"
    )
    scene.recovers()
