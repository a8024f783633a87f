"""What Linux makes of extended attributes. tests/real/test_conformance.py asks Linux itself."""

from __future__ import annotations

import struct

import pytest

from fledge_tasks.errors import LayerError
from fledge_tasks.oci.attributes import kept
from fledge_tasks.oci.layer_index import Kind

ACCESS, DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
NO_ID = 0xFFFFFFFF
MINIMAL = ((0x01, 6, NO_ID), (0x04, 4, NO_ID), (0x20, 1, NO_ID))
NAMED = ((0x01, 6, NO_ID), (0x02, 7, 5), (0x04, 4, NO_ID), (0x08, 1, 6), (0x10, 2, NO_ID), (0x20, 0, NO_ID))


def acl(*entries: tuple[int, int, int]) -> bytes:
    """posix_acl_xattr of version 2."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def capability(revision: int, size: int) -> bytes:
    """A capability with nothing but its revision."""
    return struct.pack("<I", revision << 24).ljust(size, b"\0")


@pytest.mark.parametrize(
    ("kind", "xattrs", "mode", "left"),
    [
        (Kind.FILE, {b"user.a": b"", b"trusted.b": b"2", b"security.c": b"3"}, 0o4711, None),
        (Kind.SYMLINK, {b"trusted.b": b"2"}, 0o4711, None),
        (Kind.FILE, {b"other.a": b"1", b"system.x": b"2", b"user": b"3"}, 0o4711, {}),
        (Kind.FILE, {b"security.capability": capability(2, 20)}, 0o4711, None),
        (Kind.FILE, {b"security.capability": capability(3, 24)}, 0o4711, None),
        (Kind.FILE, {b"security.capability": b"", ACCESS: b"", DEFAULT: b""}, 0o4711, {}),
        (Kind.FILE, {ACCESS: acl(*NAMED)}, 0o4620, None),
        (Kind.FIFO, {ACCESS: acl(*NAMED)}, 0o4620, None),
        (Kind.FILE, {ACCESS: acl(*MINIMAL)}, 0o4641, {}),
        (Kind.FILE, {ACCESS: acl((0x01, 6, 9), *NAMED[1:])}, 0o4620, {ACCESS: acl(*NAMED)}),
        (Kind.FILE, {ACCESS: acl(), DEFAULT: acl()}, 0o4711, {}),
        (Kind.FILE, {ACCESS: b"\1" + acl(*NAMED)[1:]}, 0o4711, {}),
        (Kind.SYMLINK, {ACCESS: acl(*NAMED)}, 0o4711, {}),
        (Kind.DIRECTORY, {DEFAULT: acl(*MINIMAL)}, 0o4711, None),
        (Kind.DIRECTORY, {DEFAULT: acl(*NAMED), ACCESS: acl(*NAMED)}, 0o4620, None),
    ],
)
def test_what_is_kept(kind: Kind, xattrs: dict[bytes, bytes], mode: int, left: dict[bytes, bytes] | None) -> None:
    assert kept(kind, 0o4711, xattrs) == (mode, xattrs if left is None else left)


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"),
    [
        (Kind.SYMLINK, b"user.a", b"1", "only files and directories"),
        (Kind.CHAR_DEVICE, b"user.a", b"1", "only files and directories"),
        (Kind.FILE, b"user.", b"1", "no name behind its namespace"),
        (Kind.FILE, b"security.capability", capability(2, 24), "version 2 or 3"),
        (Kind.FILE, b"security.capability", capability(1, 12), "version 2 or 3"),
        (Kind.FILE, b"security.capability", b"\2\2\2\2", "version 2 or 3"),
        (Kind.FILE, DEFAULT, acl(*MINIMAL), "only a directory"),
        (Kind.FILE, ACCESS, b"\2", "cut short"),
        (Kind.FILE, ACCESS, acl(*NAMED)[:-1], "cut short"),
        (Kind.FILE, ACCESS, acl(*MINIMAL[::-1]), "in order"),
        (Kind.FILE, ACCESS, acl(*MINIMAL[1:]), "in order"),
        (Kind.FILE, ACCESS, acl(*NAMED[:4], NAMED[5]), "in order"),
        (Kind.FILE, ACCESS, acl(MINIMAL[0], *MINIMAL), "in order"),
        (Kind.FILE, ACCESS, acl(MINIMAL[0], (0x03, 1, 1), *MINIMAL[1:]), "in order"),
        (Kind.FILE, ACCESS, acl((0x01, 8, NO_ID), *MINIMAL[1:]), "do not exist"),
        (Kind.FILE, ACCESS, acl(NAMED[0], (0x02, 7, NO_ID), *NAMED[2:]), "do not exist"),
    ],
)
def test_what_is_refused(kind: Kind, name: bytes, value: bytes, message: str) -> None:
    with pytest.raises(LayerError, match=message) as caught:
        kept(kind, 0o644, {name: value})
    assert name.decode() in caught.value.message
