"""The records of extended headers in tar archives (POSIX.1-2001, pax, 'pax Extended Header').

Extended attributes come as SCHILY.xattr.<name>, with the value as it is (star, GNU tar, Go), and as
LIBARCHIVE.xattr.<name>, URL-encoded, with the value in base 64 (libarchive).
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from fledge_tasks.errors import LayerError

MAX_XATTR_NAME_BYTES = 255  # xattr(7)
MAX_XATTR_BYTES = 1 << 16

_TIME = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?")
_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."


def parse_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of an extended header, each '<length> <key>=<value>\\n'. Raises LayerError.

    The pairs of the sparse format 0.0, whose keys are repeated, become the GNU.sparse.map of 0.1.
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        end = at + int(digits) if space > 0 and digits.isdigit() else 0
        if not at < space < end <= len(data) or data[end - 1] != 0x0A:
            raise LayerError("corrupt archive: a record of an extended header has a wrong length")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals or not key or b"\0" in key:
            raise LayerError("corrupt archive: a record of an extended header is not '<key>=<value>'")
        at = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            if (key == b"GNU.sparse.offset") != (len(sparse) % 2 == 0) or not value.isdigit():
                raise LayerError("corrupt archive: the sparse map in an extended header is not made of pairs")
            sparse.append(value)
        else:
            records[key] = value
    if sparse:
        records[b"GNU.sparse.map"] = b",".join(sparse)
    return records


def parse_decimal(text: bytes) -> int:
    """Return the value of a decimal number without a sign. Raises LayerError."""
    if not text.isdigit() or len(text) > 19:
        raise LayerError(f"{text[:40]!r} is not a number")
    return int(text)


def parse_time(text: bytes) -> int:
    """Return the nanoseconds of a decimal number of seconds, digits past the ninth dropped. Raises LayerError."""
    match = _TIME.fullmatch(text)
    if not match:
        raise LayerError(f"{text[:40]!r} is not a time")
    sign, seconds, fraction = match.groups()
    value = int(seconds) * 1_000_000_000 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -value if sign else value


def parse_xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the extended attributes in `records`, by full name. Raises LayerError.

    bsdtar writes each in both forms; SCHILY's, which needs no decoding, is taken.
    """
    xattrs: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            xattrs[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            try:
                decoded = binascii.a2b_base64(value + b"==")  # written without padding
            except binascii.Error:
                raise LayerError(f"its {key[:300]!r} is not in base 64") from None
            xattrs.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), decoded)
    for name, value in xattrs.items():
        if not 0 < len(name) <= MAX_XATTR_NAME_BYTES or b"\0" in name or len(value) > MAX_XATTR_BYTES:
            raise LayerError(f"no file can have its extended attribute {name[:300]!r} of {len(value)} bytes")
    return xattrs
