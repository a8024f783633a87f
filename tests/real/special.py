"""Two images made member by member: one with every oddity that tar can carry, one with a huge folder."""

from __future__ import annotations

import os
import struct
import subprocess
from pathlib import Path
from tarfile import BLKTYPE, CHRTYPE, DIRTYPE, FIFOTYPE, LNKTYPE, SYMTYPE
from tempfile import TemporaryDirectory

from tests.real.layout import Member, write_layout, write_tar

MANY_FILES = 120_000

_CAP_NET_RAW = 1 << 13


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _capability() -> str:
    """`struct vfs_cap_data` revision 2 with the effective bit: cap_net_raw=ep (capabilities(7), linux/capability.h)."""
    return _text(struct.pack("<5I", 0x02000001, _CAP_NET_RAW, 0, 0, 0))


def _acl(*entries: tuple[int, int, int]) -> str:
    """`posix_acl_xattr` version 2: (tag, permissions, id) each (linux/posix_acl_xattr.h)."""
    return _text(struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries))


_NO_ID = 0xFFFFFFFF
_ACCESS_ACL = _acl((0x01, 6, _NO_ID), (0x02, 6, 1000), (0x04, 4, _NO_ID), (0x10, 6, _NO_ID), (0x20, 4, _NO_ID))
_DEFAULT_ACL = _acl((0x01, 7, _NO_ID), (0x04, 5, _NO_ID), (0x08, 7, 2000), (0x10, 7, _NO_ID), (0x20, 0, _NO_ID))


def write_odd(folder: Path) -> None:
    """Write an image of four layers with what the plain ones lack."""
    base = [
        Member("./", DIRTYPE, mode=0o755, mtime=1_500_000_000),
        Member("bin/", DIRTYPE, mode=0o755),
        Member("bin/sh", content=b"#!not really\n", mode=0o755),
        Member("etc/", DIRTYPE, mode=0o755),
        Member("etc/kept", content=b"kept\n"),
        Member("etc/removed", content=b"gone in the next layer\n"),
        Member("dev/", DIRTYPE, mode=0o755),
        Member("dev/null", CHRTYPE, mode=0o666, device=(1, 3)),
        Member("dev/loop200", BLKTYPE, mode=0o660, gid=6, device=(7, 200)),
        Member("dev/large-minor", CHRTYPE, mode=0o600, device=(259, 70_000)),
        Member("run/fifo", FIFOTYPE, mode=0o620, uid=5),
        Member("suid", content=b"s" * 5000, mode=0o4755),
        Member("sgid-folder/", DIRTYPE, mode=0o2775, gid=50),
        Member("tmp/", DIRTYPE, mode=0o1777),
        Member("ping", content=b"p" * 10, mode=0o755, pax={"SCHILY.xattr.security.capability": _capability()}),
        Member("attributes", content=b"a", pax={
            "SCHILY.xattr.user.short": "value",
            "SCHILY.xattr.user.binary": _text(bytes(range(256))),
            "SCHILY.xattr.user.long": "L" * 1500,
            "SCHILY.xattr.trusted.overlay": "y",
        }),
        Member("acl-file", content=b"acl", mode=0o664, pax={"SCHILY.xattr.system.posix_acl_access": _ACCESS_ACL}),
        Member("acl-folder/", DIRTYPE, mode=0o750, pax={"SCHILY.xattr.system.posix_acl_default": _DEFAULT_ACL}),
        Member("link-short", SYMTYPE, link="etc/kept", mode=0o777),
        Member("link-59", SYMTYPE, link="x" * 59, mode=0o777),
        Member("link-60", SYMTYPE, link="y" * 60, mode=0o777),
        Member("link-long", SYMTYPE, link="/".join(["z" * 200] * 15), mode=0o777, uid=7),
        Member("link-folder", SYMTYPE, link="real-folder", mode=0o777),
        Member("real-folder/", DIRTYPE, mode=0o711, mtime=1_400_000_000),
        Member("high-ids", content=b"h", uid=100_000, gid=4_000_000_000),
        Member("high-ids-folder/", DIRTYPE, uid=70_000, gid=70_001),
        Member("before-1970", content=b"old", pax={"mtime": "-1000000.25"}),
        Member("before-1902", content=b"older", pax={"mtime": "-2140000000"}),
        Member("after-2038", content=b"new", pax={"mtime": "4102444800.123456789"}),
        Member("sub-second", content=b"now", pax={"mtime": "1600000000.987654321"}),
        Member("sub-second-link", SYMTYPE, link="sub-second", pax={"mtime": "1600000001.5"}),
        Member("name with spaces/", DIRTYPE),
        Member("name with spaces/new\nline and \ttab", content=b"n"),
        Member("name with spaces/" + _text(b"latin-1 \xe9\xff"), content=b"l"),
        Member("name with spaces/" + "é" * 127, content=b"255 bytes"),
        Member("empty", content=b""),
        Member("exactly-one-block", content=b"b" * 4096),
        Member("hard/", DIRTYPE),
        Member("hard/a", content=b"one inode, three names", mode=0o640, uid=3),
        Member("hard/b", LNKTYPE, link="hard/a", mode=0o640, uid=3),
        Member("opaque/", DIRTYPE),
        Member("opaque/hidden", content=b"hidden"),
        Member("opaque/folder/", DIRTYPE),
        Member("opaque/folder/hidden", content=b"hidden"),
        Member("folder-then-file/", DIRTYPE),
        Member("folder-then-file/inside", content=b"i"),
        Member("file-then-folder", content=b"f"),
        Member("no/own/entry/leaf", content=b"leaf"),
    ]  # fmt: skip
    change = [
        Member("etc/.wh.removed"),
        Member("opaque/", DIRTYPE, mode=0o700, mtime=1_650_000_000),
        Member("opaque/.wh..wh..opq"),
        Member("opaque/shown", content=b"shown"),
        Member("hard/c", LNKTYPE, link="hard/a", mode=0o640, uid=3),
        Member("folder-then-file", content=b"now a file"),
        Member("file-then-folder/", DIRTYPE, mode=0o755),
        Member("file-then-folder/inside", content=b"i"),
        Member("link-folder/through", content=b"written through a link"),
        Member("suid", content=b"replaced", mode=0o755),
    ]
    last = [
        Member("hard/.wh.a"),
        Member("etc/removed", content=b"back again\n", mode=0o600),
        Member("sgid-folder/", DIRTYPE, mode=0o700, gid=51),
    ]
    with TemporaryDirectory() as scratch:
        tars = []
        for number, members in enumerate([base, change, last]):
            tars.append(Path(scratch) / f"{number}.tar")
            write_tar(tars[-1], members)
        tars.append(_sparse_tar(Path(scratch)))
        write_layout(folder, tars, {"Entrypoint": ["/bin/sh"], "Env": ["A=b"], "WorkingDir": "/tmp"})


def _sparse_tar(scratch: Path) -> Path:
    """Python's tarfile cannot write sparse members; GNU tar can."""
    source, tar = scratch / "sparse", scratch / "sparse.tar"
    with source.open("wb") as file:
        file.seek(3 << 20)
        file.write(b"island")
        file.truncate(64 << 20)
    os.utime(source, (1_600_000_000, 1_600_000_000))
    subprocess.run(
        ["tar", "--format=pax", "--sparse", "--owner=0", "--group=0", "-cf", tar, "-C", scratch, "sparse"], check=True
    )
    return tar


def write_manyfiles(folder: Path) -> None:
    """Write an image with `MANY_FILES` small files in one folder."""
    with TemporaryDirectory() as scratch:
        tar = Path(scratch) / "many.tar"
        files = (Member(f"many/{number:06d}.txt", content=b"%d\n" % number) for number in range(MANY_FILES))
        write_tar(tar, (Member("many/", DIRTYPE, mode=0o755), *files))
        write_layout(folder, [tar])
