"""Odd layers, by name: what umoci and we must read alike, and where we differ on purpose.

A layer is a list of members, a member is bytes (tests/rawtar.py): so a case can hold what no tar program writes.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.rawtar import (
    GNU,
    TIME,
    V7,
    Parts,
    base256,
    file,
    folder,
    gnu_sparse,
    hardlink,
    header,
    long_name,
    padded,
    pax,
    pax_sparse,
    record,
    special,
    symlink,
    xattr,
)

Layers = list[list[bytes]]

OPAQUE = b".wh..wh..opq"


def same(value: bytes) -> bytes:
    """What a member holds: bytes that tell it from all others."""
    return hashlib.sha256(value).digest() * 200


# Extended attributes.


def acl(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    """`posix_acl_xattr` version 2 of (tag, permissions, id) (linux/posix_acl_xattr.h)."""
    whole = [(*entry, 0xFFFFFFFF)[:3] for entry in entries]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in whole)


def capability(revision: int, *words: int) -> bytes:
    """`struct vfs_cap_data`, effective (linux/capability.h)."""
    return struct.pack(f"<{1 + len(words)}I", revision << 24 | 1, *words)


ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
OWNER, USER, GROUP_OWNER, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
FULL = acl((OWNER, 6), (USER, 6, 1000), (USER, 4, 70_000), (GROUP_OWNER, 4), (GROUP, 7, 5), (MASK, 6), (OTHER, 4))
INHERITED = acl((OWNER, 7), (GROUP_OWNER, 5), (GROUP, 7, 2000), (MASK, 7), (OTHER, 0))
MINIMAL = acl((OWNER, 6), (GROUP_OWNER, 4), (OTHER, 0))
CAPABILITY = capability(2, 1 << 13, 0, 0, 0)

ATTRIBUTES: dict[str, Layers] = {
    "capabilities": [[
        file(b"two", b"2", xattr(b"security.capability", CAPABILITY), mode=0o4755, uid=7),
        file(b"three", b"3", xattr(b"security.capability", capability(3, 1 << 10, 0, 1, 0, 100_000)), mode=0o755),
        hardlink(b"name", b"two"),
    ]],
    "capabilities go when the file is replaced": [
        [file(b"a", b"1", xattr(b"security.capability", CAPABILITY))], [file(b"a", b"2")]],
    "attributes of a folder are replaced, not added to": [
        [folder(b"d", xattr(b"user.old", b"1"), xattr(b"user.both", b"1")), file(b"d/f")],
        [folder(b"d", xattr(b"user.both", b"2"), xattr(b"user.new", b"2"))]],
    "attributes of all namespaces": [[
        file(b"f", b"", xattr(b"user.a", b"1"), xattr(b"trusted.b", b"2"), xattr(b"security.c", b"3")),
        folder(b"d", xattr(b"user.a", b"1"), xattr(b"trusted.b", b"2"), xattr(b"security.c", b"3")),
        symlink(b"l", b"f", xattr(b"trusted.b", b"2"), xattr(b"security.c", b"3")),
        special(b"c", b"3", xattr(b"trusted.b", b"2"), rdev=(1, 3)),
        special(b"p", b"6", xattr(b"security.c", b"3")),
    ]],
    "attributes of the root": [[folder(b"./", xattr(b"user.a", b"1"), mode=0o700)]],
    "attributes of namespaces that Linux does not know": [
        [file(b"f", b"", xattr(b"other.a", b"1"), xattr(b"system.a", b"2"), xattr(b"plain", b"3"),
         xattr(b"user.a", b"4"))]],
    "attributes as large as a block holds": [[
        file(b"one", b"x", xattr(b"user.large", b"v" * 4000)),
        file(b"many", b"x", *(xattr(b"user.%d" % at, b"v" * 100) for at in range(30))),
        folder(b"d", xattr(b"user.large", bytes(range(250)) * 12)),
        symlink(b"l", b"t" * 200, xattr(b"trusted.large", b"v" * 2000)),
        file(b"long", b"x", xattr(b"user." + b"n" * 250, b"v")),
    ]],
    "attributes larger than a block": [[file(b"f", b"x", xattr(b"user.large", b"v" * 5000))]],
    "attributes with any bytes": [[file(b"f", b"", xattr(b"user.\xff\xc3\xa4", b"="),
     xattr(b"user.b", bytes(range(256))))]],
    "attributes of a symlink for users": [[symlink(b"l", b"t", xattr(b"user.a", b"1"))]],
    "attributes of a device for users": [[special(b"c", b"3", xattr(b"user.a", b"1"), rdev=(1, 3))]],
    "attributes of a FIFO for users": [[special(b"p", b"6", xattr(b"user.a", b"1"))]],
    "attribute without a name": [[file(b"f", b"", xattr(b"user.", b"1"))]],
    "attribute without a name, trusted": [[file(b"f", b"", xattr(b"trusted.", b"1"))]],
    "capability of the wrong size": [[file(b"f", b"", xattr(b"security.capability", CAPABILITY[:-4]))]],
    "capability of the first version": [[file(b"f", b"", xattr(b"security.capability", capability(1, 1, 0)))]],
    "capability of no version": [[file(b"f", b"", xattr(b"security.capability", b"garbage"))]],
    "capability of a folder": [[folder(b"d", xattr(b"security.capability", CAPABILITY))]],
    "ACLs": [[
        file(b"f", b"1", xattr(ACCESS, FULL), mode=0o664),
        folder(b"d", xattr(ACCESS, FULL), xattr(DEFAULT, INHERITED), mode=0o664),
        file(b"d/plain", b"2", mode=0o640),
        special(b"p", b"6", xattr(ACCESS, FULL), mode=0o664),
    ]],
    "ACLs that say other than the mode": [[
        file(b"f", b"1", xattr(ACCESS, FULL), mode=0o6711, uid=3),
        folder(b"d", xattr(ACCESS, FULL), mode=0o1700),
        special(b"c", b"3", xattr(ACCESS, FULL), mode=0o600, rdev=(1, 3)),
    ]],
    "ACLs that only say what a mode says": [[
        file(b"f", b"1", xattr(ACCESS, MINIMAL), mode=0o640),
        file(b"g", b"2", xattr(ACCESS, MINIMAL), mode=0o4777),
        folder(b"d", xattr(DEFAULT, MINIMAL)),
    ]],
    "ACLs with a mask and no names": [[file(b"f", b"1",
     xattr(ACCESS, acl((OWNER, 6), (GROUP_OWNER, 7), (MASK, 5), (OTHER, 0))))]],
    "ACLs that are empty": [[file(b"f", b"1", xattr(ACCESS, acl())), folder(b"d", xattr(DEFAULT, acl()))]],
    "ACLs of no bytes": [[folder(b"d", xattr(DEFAULT, b""))]],
    "ACL of a symlink": [[symlink(b"l", b"t", xattr(ACCESS, FULL))]],
    "default ACL of a file": [[file(b"f", b"", xattr(DEFAULT, INHERITED))]],
    "empty default ACL of a file": [[file(b"f", b"", xattr(DEFAULT, acl()))]],
    "ACL of another version": [[file(b"f", b"", xattr(ACCESS, b"\1" + FULL[1:]))]],
    "ACL that is cut": [[file(b"f", b"", xattr(ACCESS, FULL[:-1]))]],
    "ACL of one byte": [[file(b"f", b"", xattr(ACCESS, b"\2"))]],
    "ACL without a mask": [[file(b"f", b"", xattr(ACCESS,
     acl((OWNER, 6), (USER, 6, 1), (GROUP_OWNER, 4), (OTHER, 4))))]],
    "ACL without an owner": [[file(b"f", b"", xattr(ACCESS, acl((GROUP_OWNER, 4), (OTHER, 4))))]],
    "ACL in another order": [[file(b"f", b"", xattr(ACCESS, acl((OTHER, 4), (GROUP_OWNER, 4), (OWNER, 6))))]],
    "ACL with names in another order": [
        [file(b"f", b"", xattr(ACCESS, acl((OWNER, 6), (USER, 6, 9), (USER, 6, 2), (GROUP_OWNER, 4), (MASK, 6),
         (OTHER, 4))))]],
    "ACL with unknown permissions": [[file(b"f", b"", xattr(ACCESS, acl((OWNER, 14), (GROUP_OWNER, 4), (OTHER, 4))))]],
    "ACL with an unknown tag": [[file(b"f", b"", xattr(ACCESS,
     acl((OWNER, 6), (3, 6), (GROUP_OWNER, 4), (OTHER, 4))))]],
    "ACL with the same name twice": [
        [file(b"f", b"", xattr(ACCESS, acl((OWNER, 6), (USER, 6, 9), (USER, 4, 9), (GROUP_OWNER, 4), (MASK, 6),
         (OTHER, 4))))]],
    "ACL of nobody": [
        [file(b"f", b"", xattr(ACCESS, acl((OWNER, 6), (USER, 6), (GROUP_OWNER, 4), (MASK, 6), (OTHER, 4))))]],
}  # fmt: skip

# Headers.

FORMATS: dict[str, Layers] = {
    "v7": [[
        header(b"d/", b"\0", mode=0o750, mtime=TIME, magic=V7, devices=bytes(16)),
        header(b"d/f", b"\0", size=3, mtime=TIME, magic=V7, devices=bytes(16)) + padded(b"abc"),
        header(b"d/l", b"2", link=b"f", mtime=TIME, magic=V7, devices=bytes(16)),
        header(b"d/h", b"1", link=b"d/f", magic=V7, devices=bytes(16)),
        header(b"n" * 100, b"0", mtime=TIME, magic=V7, devices=bytes(16)),
    ]],
    "prefix of ustar": [[header(b"n" * 100, mtime=TIME, tail=b"/".join([b"p" * 77] * 2))]],
    "prefix of star": [[header(b"n" * 90, mtime=TIME, tail=(b"p" * 131).ljust(163, b"1") + b"tar\0")]],
    "prefix of Go before 1.8": [[header(b"n", mtime=TIME, magic=GNU, tail=b"p" * 50 + b"/" + b"q" * 100)]],
    "times in a GNU header": [[header(b"n", mtime=TIME, magic=GNU, tail=b"%011o\0" % TIME * 2)]],
    "times in base 256 in a GNU header": [[header(b"n", mtime=TIME, magic=GNU, tail=base256(TIME, 12) * 2)]],
    "GNU long names": [[
        long_name(b"d/" * 20 + b"n" * 200) + file(b"short", b"1", magic=GNU),
        long_name(b"t" * 300, b"K") + long_name(b"l" * 200) + symlink(b"short", b"t", magic=GNU),
        long_name(b"d/" * 20 + b"n" * 200, b"K") + hardlink(b"h", b"short", magic=GNU),
        long_name(b"first") + long_name(b"second") + file(b"third", b"2", magic=GNU),
    ]],
    "GNU long name and pax": [[
        long_name(b"gnu") + file(b"header", b"1", (b"path", b"pax")),
        pax((b"path", b"pax2")) + long_name(b"gnu2") + header(b"header", mtime=TIME),
    ]],
    "pax records": [[
        file(b"n", b"1", (b"path", b"p\xc3\xa4=\n"), (b"uid", b"70000"), (b"gid", b"4294967294"), (b"comment", b"c")),
        file(b"kept", b"2", (b"path", b""), (b"uid", b""), (b"mtime", b"")),
        symlink(b"l", b"t", (b"linkpath", b"to")),
        pax((b"path", b"lost"), (b"uid", b"3")) + pax((b"gid", b"4")) + header(b"twice", mtime=TIME),
    ]],
    "pax size": [[pax((b"size", b"600")) + header(b"n", mtime=TIME) + padded(b"d" * 600), file(b"next")]],
    "numbers in base 256": [[
        file(b"ids", b"", uid=base256(3_000_000, 8), gid=base256(4_000_000_000, 8)),
        file(b"old", b"", mtime=base256(-86_400, 12)),
        file(b"new", b"", mtime=base256(1 << 33, 12)),
        header(b"size", size=base256(5, 12), mtime=TIME) + padded(b"12345"),
    ]],
    "numbers with spaces": [[
        file(b"a", b"1", mode=b"   755 \0", uid=b"     5 \0", gid=b"6\0\0\0\0\0\0\0", mtime=b"14012345670 ")]],
    "numbers that are empty": [[file(b"a", b"1", mode=bytes(8), uid=b" " * 8, gid=bytes(8))]],
    "number that is not octal": [[file(b"a", b"1", uid=b"0000009\0")]],
    "types of files": [[
        file(b"zero", b"1", type_=b"\0"),
        file(b"slash/", b"", type_=b"\0"),
        file(b"slash0/", b"2", type_=b"0"),
        special(b"old-tty", b"3", magic=V7, rdev=(5, 1)),
    ]],
    "modes with type bits": [[
        file(b"f", b"1", mode=0o100755), folder(b"d", mode=0o040711), file(b"g", b"2", mode=0o040600),
        folder(b"e", mode=0o100755), special(b"p", b"6", mode=0o010600),
         special(b"c", b"3", mode=0o020640, rdev=(1, 3)),
    ]],
    "modes": [[
        file(b"f%o" % mode, b"", mode=mode) for mode in (0, 0o7777, 0o4755, 0o2755, 0o1644)
    ] + [folder(b"d%o" % mode, mode=mode) for mode in (0, 0o7777, 0o2775, 0o1777)]],
    "links and folders with a size": [[
        file(b"f", b"x"), symlink(b"l", b"t", size=5000), hardlink(b"h", b"f", size=1), folder(b"d", size=99)]],
    "devices": [[
        special(b"null", b"3", rdev=(1, 3), mode=0o666), special(b"loop", b"4", rdev=(7, 200), gid=6),
        special(b"old", b"3", rdev=(255, 255)), special(b"large", b"4", rdev=(259, 70_000)),
        special(b"fifo", b"6", mode=0o620, uid=5), special(b"none", b"4", rdev=(0, 0)),
    ]],
    "unknown type": [[file(b"a", type_=b"Z")]],
    "bad checksum": [[file(b"a"), b"\1" + file(b"b")[1:]]],
    "signed checksum": [[header(b"\xe4", mtime=TIME, signed=True)]],
}  # fmt: skip

NAMES: dict[str, Layers] = {
    "slashes and dots": [[
        folder(b"./", mode=0o711, mtime=5), folder(b"./a/"), file(b"./a/1", b"1"), folder(b"/b//"),
         file(b"//b///2", b"2"),
        folder(b"a/./c"), file(b"a/../3", b"3"), file(b"a/c/../4", b"4"), symlink(b"s/", b"a/"),
         hardlink(b"h", b"./a//1"),
        file(b"..x", b"5"), file(b"...", b"6"), file(b".hidden", b"7"),
    ]],
    "outside": [[
        file(b"../up", b"1"), file(b"../../../etc2/passwd", b"2"), file(b"/../x/../abs", b"3"),
         file(b"d/../../../e", b"4"),
        hardlink(b"h", b"../../up"), hardlink(b"i", b"/../abs"), symlink(b"l", b"../../../../etc/passwd"),
        symlink(b"m", b"/.."), file(b"m/through", b"5"), symlink(b"../n", b"t"), folder(b"/../o"),
    ]],
    "outside, hard link to a file of the host": [[hardlink(b"h", b"../../../../../../../../bin/sh")]],
    "outside, through a symlink": [[symlink(b"l", b"../../../../../../bin"), hardlink(b"h", b"l/sh")]],
    "root with a mode of its own": [[folder(b"./", mode=0o1700, uid=5, gid=6, mtime=77)], [file(b"f")]],
    "root as /": [[file(b"f"), folder(b"/", mode=0o500)], [folder(b"", mode=0o711, mtime=9)]],
    "root as a file": [[file(b".")]],
    "root as a symlink": [[symlink(b"/", b"x")]],
    "no name": [[file(b"")]],
    "not UTF-8": [[
        folder(b"\xff\xfe"), file(b"\xff\xfe/\xe9", b"1"), symlink(b"l", b"\xff\xfe/\xe9"),
         hardlink(b"h\x80", b"\xff\xfe/\xe9"),
        file(b"n" * 101 + b"\xff", b"2"), file(b"new\nline\ttab\x01\x7f", b"3"), file(b"back\\slash \"'$(x)`", b"4"),
    ], [file(b"\xff\xfe/.wh.\xe9")]],
    "255 bytes": [[folder(b"d" * 255), file(b"d" * 255 + b"/" + "é".encode() * 127 + b"x", b"1"),
     file(b".wh." + b"w" * 251)]],
    "256 bytes": [[file(b"n" * 256)]],
    "256 bytes in a folder": [[file(b"n" * 256 + b"/f")]],
    "targets": [[symlink(b"l%d" % length, b"t" * length) for length in (1, 59, 60, 61, 255, 4095)]],
    "target of 4096 bytes": [[symlink(b"l", b"t" * 4096)]],
    "target of no bytes": [[symlink(b"l", b"")]],
    "hard link to no name": [[hardlink(b"h", b"")]],
    "duplicates": [[
        file(b"a", b"1", mode=0o755), file(b"a", b"2"), folder(b"d", mode=0o700), file(b"d/f", b"3"),
         folder(b"./d/", mode=0o711),
        file(b"e", b"4"), hardlink(b"e2", b"e"), file(b"e", b"5"), symlink(b"s", b"a"), symlink(b"s", b"b"),
    ]],
}  # fmt: skip

TIMES: dict[str, Layers] = {
    "pax times": [[
        file(b"f%d" % at, b"", (b"mtime", text)) for at, text in enumerate((
            b"0", b"-1", b"-0.5", b"-1000000.25", b"-0.000000001", b"-2147483648", b"1.000000001",
             b"1600000000.987654321",
            b"1600000000.9999999999", b"2147483647.5", b"2147483648", b"4102444800.123456789", b"4294967296.5",
             b"9000000000.1",
            b"1.",
        ))
    ] + [symlink(b"l", b"t", (b"mtime", b"-5.25")), folder(b"d", (b"mtime", b"4102444800.5")), file(b"d/f")]],
    "pax time that is none": [[file(b"f", b"", (b"mtime", b"1e9"))]],
    "folders keep their times": [
        [folder(b"d", mtime=5), file(b"d/a"), folder(b"d/e", mtime=6), file(b"d/e/b")],
        [file(b"d/e/c"), file(b"d/.wh.a")],
    ],
}  # fmt: skip


def _islands(count: int, step: int = 8192, length: int = 700) -> list[tuple[int, bytes]]:
    return [(at * step + at, same(b"%d" % at)[:length]) for at in range(count)]


_SPARSE_FILES: dict[bytes, tuple[int, list[tuple[int, bytes]]]] = {
    b"nothing but a hole": (1 << 20, []),
    b"nothing but a hole, said": (5000, [(5000, b"")]),
    b"hole at the end": (100_000, [(0, same(b"0")[:5000])]),
    b"hole at the start": (100_007, [(100_000, b"islands")]),
    b"in the middle of blocks": (20_000, [(1, b"a"), (4095, b"bc"), (4098, b"d"), (12_287, b"e"), (12_288, b"f")]),
    b"one after the other": (9000, [(0, b"x" * 4096), (4096, b"y" * 4096), (8192, b"z" * 808)]),
    b"more than four": (300_000, _islands(25)),
    b"more than a leaf holds": (8_000_000, _islands(700)),
    b"empty": (0, []),
}


def sparse(write: Callable[[bytes, int, Parts], bytes]) -> Layers:
    """All sparse files in one form."""
    return [[*(write(name, size, parts) for name, (size, parts) in _SPARSE_FILES.items()), file(b"next", b"n")]]


def gnu_tar(*options: str) -> Layers:
    """What GNU tar itself makes of sparse files."""
    with TemporaryDirectory() as scratch:
        for name, (size, parts) in _SPARSE_FILES.items():
            path = Path(scratch, os.fsdecode(name))
            with path.open("wb") as target:
                for offset, data in parts:
                    target.seek(offset)
                    target.write(data)
                target.truncate(size)
            os.utime(path, (TIME, TIME))
        argv = ["tar", "--sparse", "--owner=0", "--group=0", "--sort=name", *options, "-cf", "-", "-C", scratch, "."]
        whole = subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout
    # The end of the archive goes, and the entry of '.', which has the time of the day, is told over.
    blocks = -(-len(whole.rstrip(b"\0")) // 512)
    return [[whole[: 512 * blocks], folder(b"./", mtime=TIME)]]


CONTENT: dict[str, Layers] = {
    "sizes": [[file(b"%d" % size, (same(b"%d" % size) * 20)[:size])
               for size in (0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 100_000)]],
    "zeros": [[file(b"%d" % size, bytes(size)) for size in (1, 4095, 4096, 4097, 1 << 20)]],
    "pax sparse 0.0": sparse(partial(pax_sparse, "0.0")),
    "pax sparse 0.1": sparse(partial(pax_sparse, "0.1")),
    "pax sparse 1.0": sparse(partial(pax_sparse, "1.0")),
    "sparse by GNU tar, pax 0.0": gnu_tar("--format=posix", "--sparse-version=0.0"),
    "sparse by GNU tar, pax 0.1": gnu_tar("--format=posix", "--sparse-version=0.1"),
    "sparse by GNU tar, pax 1.0": gnu_tar("--format=posix", "--sparse-version=1.0"),
    "sparse map out of order": [[pax_sparse("1.0", b"f", 9000, [(5000, b"a"), (0, b"b")])]],
    "sparse map past the end": [[pax_sparse("0.1", b"f", 9000, [(8999, b"ab")])]],
}  # fmt: skip


# Trees: what tests/test_tree.py has in its table is not repeated here.

_KINDS: dict[bytes, Callable[[bytes], list[bytes]]] = {
    b"file": lambda path: [file(path, same(path), mode=0o640)],
    b"empty": lambda path: [file(path, b"", mode=0o600)],
    b"folder": lambda path: [folder(path, mode=0o711), file(path + b"/in", b"in")],
    b"to-file": lambda path: [symlink(path, b"target")],
    b"to-folder": lambda path: [symlink(path, b"place")],
    b"to-nothing": lambda path: [symlink(path, b"/no/where")],
    b"hard": lambda path: [hardlink(path, b"target")],
    b"hard-to-link": lambda path: [hardlink(path, b"link")],
    b"char": lambda path: [special(path, b"3", rdev=(1, 7), mode=0o660)],
    b"block": lambda path: [special(path, b"4", rdev=(7, 7), uid=8)],
    b"fifo": lambda path: [special(path, b"6")],
    b"sparse": lambda path: [pax_sparse("1.0", path, 50_000, [(40_000, same(path)[:99])])],
}
_TARGETS = [file(b"target", b"target"), folder(b"place"), file(b"place/kept", b"kept"), symlink(b"link", b"target")]

_FOLDER = [folder(b"d"), folder(b"d/e"), file(b"d/e/f", b"1"), file(b"g", b"2")]

TREES: dict[str, Layers] = {
    "bare whiteout in the root": [_FOLDER, [file(b".wh.")]],
    "bare whiteout": [_FOLDER, [file(b"d/.wh.")]],
    "whiteout of .": [_FOLDER, [file(b"d/e/.wh..")]],
    "whiteout of ..": [_FOLDER, [file(b"d/e/.wh...")]],
    "type changes in all directions": [
        [*_TARGETS, *(part for old in _KINDS for new in _KINDS for part in _KINDS[old](old + b"=" + new))],
        [part for old in _KINDS for new in _KINDS for part in _KINDS[new](old + b"=" + new)],
    ],
    "type changes within a layer": [
        [*_TARGETS, *(part for old in _KINDS for new in _KINDS for kind in (old, new)
         for part in _KINDS[kind](old + b"=" + new))]],
    "whiteouts of all types": [
        [*_TARGETS, *(part for kind in _KINDS for part in _KINDS[kind](kind))],
         [file(b".wh." + kind) for kind in _KINDS]],
    "whiteouts as all types": [
        [file(b"target", b"t"), folder(b"w"), *(file(b"w/%d" % at, b"gone") for at in range(7))],
        [file(b"w/.wh.0", b"with data"), folder(b"w/.wh.1"), symlink(b"w/.wh.2", b"x"), hardlink(b"w/.wh.3", b"target"),
         special(b"w/.wh.4", b"3", rdev=(0, 0)), special(b"w/.wh.5", b"6"),
          gnu_sparse(b"w/.wh.6", 9000, [(8000, b"s")])],
    ],
    "opaque as all types": [
        [*(part for at in range(4) for part in (folder(b"d%d" % at), file(b"d%d/low" % at), folder(b"d%d/s" % at),
         file(b"d%d/s/x" % at))),
         file(b"target")],
        [hardlink(b"d0/" + OPAQUE, b"target"), folder(b"d1/" + OPAQUE), symlink(b"d2/" + OPAQUE, b"x"),
         special(b"d3/" + OPAQUE, b"3")],
    ],
    "whiteouts below folders that only whiteouts name": [
        [folder(b"d"), file(b"d/a"), file(b"d/b")], [file(b"d/.wh.a"), file(b"e/f/.wh.g"), file(b"h/" + OPAQUE)]],
    "whiteout of a folder, and things in it": [
        [folder(b"d"), file(b"d/a"), folder(b"d/e"), file(b"d/e/b")],
         [file(b"d/.wh.e"), file(b".wh.d"), file(b"d/e/.wh.b")]],
    "opaque, times of the folder": [[folder(b"d", mtime=9), file(b"d/a")],
     [folder(b"d", mode=0o700, mtime=8), file(b"d/" + OPAQUE)]],
    "opaque between its siblings": [
        [folder(b"d"), file(b"d/a", b"low"), file(b"d/b", b"low"), file(b"d/c", b"low")],
        [file(b"d/a", b"up"), file(b"d/" + OPAQUE), file(b"d/b", b"up")],
        [file(b"d/d", b"top"), file(b"d/" + OPAQUE)],
    ],
    "whiteout in a folder that is a symlink below": [
        [folder(b"real"), file(b"real/a"), file(b"real/b"), symlink(b"l", b"/real"), symlink(b"k", b"l")],
        [file(b"l/.wh.a"), file(b"k/c", b"new")],
        [folder(b"k", mode=0o700), file(b"k/.wh.b"), file(b"k/" + OPAQUE)],
    ],
    "whiteout of a name that is a whiteout": [[folder(b"d"), file(b"d/a")],
     [file(b"d/.wh..wh.a"), file(b"d/.wh..wh..opq2")]],
    "names that only look like whiteouts": [[file(b"a.wh.b"), file(b".wh"), folder(b".wh.d2"), file(b".whx"),
     file(b"d/.wh.x/y", b"1")]],
    "files of aufs": [[folder(b"d"), file(b".wh..wh.aufs"), folder(b".wh..wh.orph"), folder(b".wh..wh.plnk"),
     file(b"d/.wh.__dir_opaque")]],
    "hard links across layers": [
        [file(b"a", b"1", xattr(b"user.a", b"1"), mode=0o4711, uid=5), symlink(b"s", b"a"),
         special(b"c", b"3", rdev=(1, 3))],
        [hardlink(b"b", b"a", mode=0, uid=99), hardlink(b"t", b"s"), hardlink(b"d", b"c"), hardlink(b"gone", b"a")],
        [file(b".wh.a"), file(b".wh.gone"), file(b".wh.s"), hardlink(b"e", b"b"), file(b"t", b"2"),
         hardlink(b"f", b"d")],
        [file(b"b", b"3"), hardlink(b"g", b"e")],
    ],
    "hard link over its own target": [[file(b"a", b"1"), hardlink(b"b", b"a")], [hardlink(b"a", b"b")]],
    "hard links change what all names show": [
        [folder(b"d"), file(b"d/a", b"1"), hardlink(b"b", b"d/a")], [file(b"d/a", b"2"), hardlink(b"c", b"d/a")]],
    "parents without an entry, then with": [[file(b"a/b/c", b"1"), folder(b"a/b", mode=0o700, uid=3),
     folder(b"a", mode=0o711)]],
    "parents without an entry below a symlink": [[symlink(b"l", b"x/y"), file(b"l/m/f", b"1"),
     folder(b"l/m", mode=0o700)]],
    "usr merge": [
        [folder(b"usr"), folder(b"usr/bin", mode=0o711), file(b"usr/bin/a", b"1"), symlink(b"bin", b"usr/bin"),
         symlink(b"usr/sbin", b"bin")],
        [file(b"bin/b", b"2"), file(b"usr/sbin/c", b"3"), hardlink(b"usr/sbin/d", b"bin/a"), file(b"bin/.wh.a"),
         symlink(b"bin/e", b"b")],
    ],
    "lost+found": [[folder(b"lost+found", mode=0o700), file(b"lost+found/#12", b"found")]],
}  # fmt: skip

SAME = {**ATTRIBUTES, **FORMATS, **NAMES, **TIMES, **CONTENT, **TREES}
"""What umoci and we read alike, or refuse both."""

REFUSED = {
    "attributes larger than a block": "Insufficient space to store extended attribute data",
    "attributes of a symlink for users": "only files and directories have those of users",
    "attributes of a device for users": "only files and directories have those of users",
    "attributes of a FIFO for users": "only files and directories have those of users",
    "attribute without a name": "it has no name behind its namespace",
    "attribute without a name, trusted": "it has no name behind its namespace",
    "capability of the wrong size": "its value is not of version 2 or 3",
    "capability of the first version": "its value is not of version 2 or 3",
    "capability of no version": "its value is not of version 2 or 3",
    "default ACL of a file": "only a directory has one",
    "ACL that is cut": "it is cut short",
    "ACL of one byte": "it is cut short",
    "ACL without a mask": "not made of the entries that acl(5) asks for",
    "ACL without an owner": "not made of the entries that acl(5) asks for",
    "ACL in another order": "not made of the entries that acl(5) asks for",
    "ACL with an unknown tag": "not made of the entries that acl(5) asks for",
    "ACL with unknown permissions": "permissions, or names users, that do not exist",
    "ACL of nobody": "permissions, or names users, that do not exist",
    "number that is not octal": "is not an octal number",
    "unknown type": "it is of the unknown type",
    "bad checksum": "bad header checksum",
    "outside, hard link to a file of the host": "which does not exist",
    "outside, through a symlink": "which does not exist",
    "root as a file": "the root of the layer is not a directory",
    "root as a symlink": "the root of the layer is not a directory",
    "no name": "the root of the layer is not a directory",
    "256 bytes": "a name in it has more than 255 bytes",
    "256 bytes in a folder": "a name in it has more than 255 bytes",
    "target of 4096 bytes": "cannot have a target of 4096 bytes",
    "target of no bytes": "cannot have a target of 0 bytes",
    "hard link to no name": "a hard link to the root, or to nothing",
    "pax time that is none": "is not a time",
    "sparse map out of order": "its sparse map is not in order, or goes past its end",
    "bare whiteout in the root": "a whiteout of nothing",
    "bare whiteout": "a whiteout of nothing",
    "whiteout of .": "a whiteout of nothing",
    "whiteout of ..": "a whiteout of nothing",
    "sparse map past the end": "its sparse map is not in order, or goes past its end",
}
"""Those of them that both refuse, and what we say."""

# What ARCHITECTURE.md lists under 'Where we differ from umoci on purpose'.


NAMED = record(b"path", b"named")

DIFFERENT: dict[str, tuple[Layers, Layers | str]] = {
    # name: (layers, those of which umoci makes what we make of these; or what we say when we refuse)
    "bare whiteout where nothing is": ([_FOLDER, [file(b"no/.wh."), file(b"no/.wh..")]], "a whiteout of nothing"),
    "global header": (
        [[pax((b"mtime", b"5"), (b"uid", b"9"), (b"SCHILY.xattr.user.a", b"1"), type=b"g"), *_FOLDER]], [_FOLDER]),
    "contiguous file": ([[file(b"f", b"1", type_=b"7")]], [[file(b"f", b"1")]]),
    "volume label": ([[file(b"label", b"1", type_=b"V"), file(b"f", b"1")]], [[file(b"f", b"1")]]),
    "old GNU sparse": (sparse(gnu_sparse), sparse(partial(pax_sparse, "1.0"))),
    "old GNU sparse by GNU tar": (gnu_tar("--format=gnu"), gnu_tar("--format=posix")),
    "devices whose modes have the bits of another type": (
        [[special(b"c", b"3", rdev=(1, 3), mode=0o100640), special(b"p", b"6", mode=0o120640)]],
        [[special(b"c", b"3", rdev=(1, 3), mode=0o640), special(b"p", b"6", mode=0o640)]],
    ),
    "device that Linux does not have": ([[special(b"c", b"3", rdev=(4096, 0))]], "Linux has no device 4096:0"),
    "owner of -1": ([[file(b"f", uid=base256(-1, 8))]], "its owner -1:0 is not within"),
    "owner that stands for none": ([[file(b"f", b"", (b"gid", b"4294967295"))]], "its owner 0:4294967295 is not"),
    "owner of -2": ([[file(b"f", uid=base256(-2, 8))]], "its owner -2:0 is not within"),
    "owner of 33 bits": ([[file(b"f", b"", (b"uid", b"4294967296"))]], "its owner 4294967296:0 is not"),
    "number with a plus": ([[file(b"f", b"", (b"uid", b"+5"))]], "b'+5' is not a number"),
    "number of too many zeros": ([[file(b"f", b"", (b"uid", b"0" * 20))]], "is not a number"),
    "time with a plus": ([[file(b"f", b"", (b"mtime", b"+5"))]], "b'+5' is not a time"),
    "time after 2262": ([[file(b"f", b"", (b"mtime", b"9300000000"))]], "does not fit nanoseconds in 64 bits"),
    "device numbers of a file that are none": (
        [[header(b"f", mtime=TIME, devices=b"zz".ljust(16, b"\0"))]], [[header(b"f", mtime=TIME)]]),
    "owner of an extended header that is none": (
        [[header(b"pax", b"x", uid=b"nobody\0\0", size=len(NAMED)) + padded(NAMED) + header(b"f", mtime=TIME)]],
        [[file(b"named")]]),
    "end after an extended header": ([[file(b"f"), pax((b"path", b"x"))]], "ends after an extended header"),
    "end after a long name": ([[file(b"f"), long_name(b"x")]], "ends after an extended header"),
    "access and change times that are none": (
        [[file(b"f", b"", (b"atime", b"never"), (b"ctime", b"1e9"))]], [[file(b"f", b"")]]),
    "lost+found that is a file": ([[file(b"lost+found")]], "ext4 needs it as a folder"),
    "lost+found that is a symlink": ([[symlink(b"lost+found", b"/var")]], "ext4 needs it as a folder"),
}  # fmt: skip

KEPT: dict[str, tuple[Layers, dict[bytes, dict[bytes, bytes]]]] = {
    # name: (layers, attributes that umoci leaves out by path)
    "attributes of SELinux": (
        [[file(b"f", b"", xattr(b"security.selinux", b"system_u:object_r:bin_t:s0\0"))]],
        {b"f": {b"security.selinux": b"system_u:object_r:bin_t:s0\0"}}),
    "attributes of overlayfs": (
        [[folder(b"d", xattr(b"trusted.overlay.opaque", b"y"), xattr(b"user.overlay.opaque", b"y")),
          special(b"d/w", b"3", rdev=(0, 0))]],
        {b"d": {b"trusted.overlay.opaque": b"y"}}),
    "attributes of libarchive": (
        [[file(b"f", b"", (b"LIBARCHIVE.xattr.user.a", base64.b64encode(b"value")))]], {b"f": {b"user.a": b"value"}}),
    "attributes of no bytes": ([[file(b"f", b"", xattr(b"user.a", b""))]], {b"f": {b"user.a": b""}}),
}  # fmt: skip
