"""A small image with a bit of everything in it, for which tests hold checksums.

Nothing in it comes from this machine: the layers are made of members in memory, and the files that are
mapped into it are written by `lay_out`, with the modes that decide about the result.
"""

from __future__ import annotations

import struct
import tarfile
from dataclasses import replace
from pathlib import Path

from tests.layers import Member, archive, folder, hardlink, symlink
from tests.layouts import Layout
from tests.workspaces import Workspace

NAME = "golden"
LAYOUT = "layouts/golden"
CONFIG = {
    "Entrypoint": ["/bin/app"],
    "Cmd": ["--serve"],
    "Env": ["PATH=/bin", "NAME=größe"],
    "WorkingDir": "/srv",
    "ExposedPorts": {"8080/tcp": {}},
}
_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # vfs_cap_data, cap_net_bind_service
_NOBODY = 2**32 - 1
_ACL_ENTRIES = ((1, 6, _NOBODY), (2, 4, 1000), (4, 4, _NOBODY), (16, 4, _NOBODY), (32, 0, _NOBODY))
_ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in _ACL_ENTRIES)  # posix_acl_xattr_header
_SPARSE_BLOCKS = range(0, 60, 6)
"""More runs than the four extents that an inode has room for."""


def _data(size: int, seed: int) -> bytes:
    return bytes((at * 31 + at // 251 + seed) & 0xFF for at in range(size))


def _sparse(path: str) -> Member:
    """Return a sparse file, in GNU's format 1.0: a map of its parts in decimal, padded to 512 bytes, then the parts."""
    parts = [(block * 4096, 4096) for block in _SPARSE_BLOCKS]
    numbers = [len(parts), *(number for part in parts for number in part)]
    head = "".join(f"{number}\n" for number in numbers).encode()
    head += bytes(-len(head) % 512)
    content = b"".join(_data(length, start >> 12) for start, length in parts)
    pax = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": path,
        "GNU.sparse.realsize": str(_SPARSE_BLOCKS[-1] * 4096 + 300_000),
    }
    return Member("./GNUSparseFile.0/sparse", head + content, pax=pax)


BASE = [
    replace(folder("./", 0o755), mtime="1500000000"),
    folder("bin"),
    Member("bin/app", b"\x7fELF" + _data(150_000, 1), mode=0o4755, mtime="1600000000.123456789"),
    hardlink("bin/app-again", "bin/app"),
    Member("bin/ping", _data(30_000, 2), mode=0o755, xattrs={"security.capability": _CAPABILITY}),
    symlink("bin/sh", "app"),
    folder("tmp", 0o1777),
    folder("home/user", 0o700),
    Member("home/user/old", b"before 1970", uid=1000, gid=1000, mode=0o600, mtime="-86400.5"),
    Member("home/user/far", b"after 2038", uid=100_000, gid=200_000, mtime="5000000000"),
    Member("no/entry/for/these/folders", b"deep"),
    folder("many"),
    *(Member(f"many/{number:04d}-{'x' * 40}", b"%d\n" % number) for number in range(300)),
    folder("gone"),
    Member("gone/file", b"hidden by the next layer"),
    folder("opaque"),
    Member("opaque/old", b"hidden too"),
    Member("replaced", _data(9_000, 3)),
    Member("empty"),
]
MIDDLE = [
    Member(".wh.gone"),
    Member("opaque/.wh..wh..opq"),
    Member("opaque/new", b"only this is left"),
    symlink("replaced", "/" + "long/" * 20),
    _sparse("sparse"),
    Member("dev/null", type=tarfile.CHRTYPE, mode=0o666, rdev=(1, 3)),
    Member("dev/disk", type=tarfile.BLKTYPE, mode=0o660, gid=6, rdev=(259, 300)),
    Member("run/pipe", type=tarfile.FIFOTYPE, mode=0o620),
    Member("etc/größe", "naïve\n".encode()),
    Member("srv/acl", b"acl", mode=0o640, xattrs={"system.posix_acl_access": _ACL}),
    Member("srv/attributes", b"a", xattrs={"user.small": b"1", "user.large": b"v" * 1500, "trusted.t": b"\n"}),
]
TOP = [Member("bin/app-again", b"no longer a link"), Member("etc/release", b"golden 1\n", mtime="1700000000")]
LAYERS = (BASE, MIDDLE, TOP)
TARS = tuple(archive(members) for members in LAYERS)

MAPPINGS = {
    "conf/main.conf": "/etc/main.conf",
    "tools": "/usr/local/bin",
    "page.html": "/srv/page.html",
    "libx.so.1": "/usr/lib/libx.so.1",
}
FILES = {  # content and mode
    "conf/main.conf": (b"port = 8080\n", 0o600),
    "tools/run": (b"#!/bin/sh\nexec /bin/app\n", 0o750),
    "tools/deep/data": (_data(20_000, 4), 0o644),
    "page.html": (b"<h1>golden</h1>\n", 0o644),
    "libx.so.1": (_data(5_000, 5), 0o644),
    "kestrel": (b"\x7fELF" + _data(40_000, 6), 0o700),
}
AGENT = '[agent]\nsource_strategy = "local"\npath = "kestrel"\n'


def lay_out(root: Path, home: Path) -> Workspace:
    """Make a workspace with the image, not built yet, whose source is the layout `LAYOUT` in it."""
    workspace = Workspace(root, home)
    describe(workspace)
    write_files(root / NAME, list(FILES))
    layout(workspace).write_tars(TARS, config=CONFIG, compression="none")  # what compressors write is theirs
    return workspace


def layout(workspace: Workspace) -> Layout:
    """Return the layout that the image comes from."""
    return Layout(workspace.root / LAYOUT)


def write_files(folder: Path, names: list[str]) -> None:
    """Write the files that are mapped, and the agent, in this order."""
    for name in names:
        content, mode = FILES[name]
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(mode)
    (folder / "tools" / "link").symlink_to("run")


def describe(workspace: Workspace, source: str = f"oci:../{LAYOUT}", *, backwards: bool = False) -> None:
    """Write the image's fledge.toml; `backwards` turns the order of its mappings round."""
    mappings = dict(reversed(MAPPINGS.items())) if backwards else MAPPINGS
    workspace.add(NAME, source, buffer_mb=3, mappings=mappings, more=AGENT)
