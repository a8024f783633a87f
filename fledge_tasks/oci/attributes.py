"""The extended attributes of an archive's member as Linux lets a file have them: what setxattr(2) makes of each.

An image that came about by unpacking could hold nothing else, and a kernel that finds something else
in a filesystem does not expect it. Sources are xattr(7), acl(5), capabilities(7), and of Linux
fs/xattr.c, fs/posix_acl.c, security/commoncap.c.
"""

from __future__ import annotations

import struct

from fledge_tasks.errors import LayerError
from fledge_tasks.oci.layer_index import Kind

_ACCESS, _DEFAULT = b"system.posix_acl_access", b"system.posix_acl_default"
_USER, _CAPABILITY = b"user.", b"security.capability"
_NAMESPACES = (_USER, b"trusted.", b"security.")
_CAPABILITY_BYTES = {2: 20, 3: 24}  # by revision, struct vfs_cap_data and vfs_ns_cap_data
# Access control lists: linux/posix_acl_xattr.h. The tags are those of acl(5), in its order.
_ACL_VERSION = 2
_HEADER, _ITEM = struct.Struct("<I"), struct.Struct("<HHI")
_OWNER, _NAMED_USER, _GROUP, _NAMED_GROUP, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_NAMED = {_NAMED_USER, _NAMED_GROUP}
_NO_ID = 0xFFFFFFFF


def kept(kind: Kind, mode: int, xattrs: dict[bytes, bytes]) -> tuple[int, dict[bytes, bytes]]:
    """Return mode and attributes that a file has after they were set. Raises LayerError for what is refused.

    Attributes that no filesystem knows are left out, as all tools that unpack layers do. An access
    control list decides the bits of the mode that it speaks of, and is left out when it says no more
    than those.
    """
    result = {}
    for name, value in xattrs.items():
        if not value and name in (_ACCESS, _DEFAULT, _CAPABILITY):
            continue
        if name in (_ACCESS, _DEFAULT):
            acl = None if kind is Kind.SYMLINK else _parse_acl(name, value)
            if not acl:
                continue
            if name == _ACCESS:
                mode = mode & ~0o777 | _acl_mode(acl)
                if len(acl) == 3:
                    continue
            elif kind is not Kind.DIRECTORY:
                raise _refused(name, "only a directory has one (acl(5))")
            result[name] = _HEADER.pack(_ACL_VERSION) + b"".join(_ITEM.pack(*item) for item in acl)
        elif name.startswith(_NAMESPACES):
            _check(kind, name, value)
            result[name] = value
    return mode, result


def _check(kind: Kind, name: bytes, value: bytes) -> None:
    if name in _NAMESPACES:
        raise _refused(name, "it has no name behind its namespace")
    if name.startswith(_USER) and kind not in (Kind.FILE, Kind.DIRECTORY):
        raise _refused(name, "only files and directories have those of users (xattr(7))")
    if name == _CAPABILITY and (len(value) < 20 or _CAPABILITY_BYTES.get(value[3]) != len(value)):
        raise _refused(name, "its value is not of version 2 or 3 (capabilities(7))")


def _parse_acl(name: bytes, value: bytes) -> list[tuple[int, int, int]]:
    """Return (tag, permissions, id) of a list, [] when there is none (posix_acl_from_xattr, posix_acl_valid)."""
    is_known = value[:4] == _HEADER.pack(_ACL_VERSION)
    if len(value) < _HEADER.size or (is_known and len(value) % _ITEM.size != _HEADER.size):
        raise _refused(name, "it is cut short")
    if not is_known:
        return []
    items = [(tag, bits, who if tag in _NAMED else _NO_ID) for tag, bits, who in _ITEM.iter_unpack(value[4:])]
    tags = [tag for tag, _, _ in items]
    unnamed = [tag for tag in tags if tag not in _NAMED]
    expected = [_OWNER, _GROUP, *([_MASK] if _MASK in tags or len(unnamed) < len(tags) else []), _OTHER]
    if items and (tags != sorted(tags) or unnamed != expected):
        raise _refused(name, "it is not made of the entries that acl(5) asks for, in order")
    if any(bits > 7 or (tag in _NAMED and who == _NO_ID) for tag, bits, who in items):
        raise _refused(name, "it has permissions, or names users, that do not exist")
    return items


def _acl_mode(acl: list[tuple[int, int, int]]) -> int:
    """Return the mode's nine bits that a list stands for (posix_acl_equiv_mode); those of the group are the mask's."""
    bits = {tag: permissions for tag, permissions, _ in acl}
    return bits[_OWNER] << 6 | bits.get(_MASK, bits[_GROUP]) << 3 | bits[_OTHER]


def _refused(name: bytes, why: str) -> LayerError:
    return LayerError(f"Linux does not take its extended attribute {name.decode(errors='backslashreplace')}: {why}")
