"""Layers in memory, made of a list of members by the tarfile of the standard library."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import zstandard

from fledge_tasks.oci.limits import Limits

LIMITS = Limits(tar_bytes=1 << 30, entries=1_000_000, ratio=1000)

Compression = Literal["gzip", "zstd", "none"]


@dataclass(frozen=True)
class Member:
    """One archive member; `path`, `link`, `type` and `pax` stand in the archive as they are given."""

    path: str
    data: bytes = b""
    type: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: str = "0"
    link: str = ""
    rdev: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)
    pax: dict[str, str] = field(default_factory=dict)


def folder(path: str, mode: int = 0o755) -> Member:
    """Return a folder."""
    return Member(path, type=tarfile.DIRTYPE, mode=mode)


def symlink(path: str, target: str) -> Member:
    """Return a symbolic link."""
    return Member(path, type=tarfile.SYMTYPE, mode=0o777, link=target)


def hardlink(path: str, target: str) -> Member:
    """Return a hard link."""
    return Member(path, type=tarfile.LNKTYPE, link=target)


def archive(members: Iterable[Member], format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    """Return an uncompressed archive; times with a fraction and attributes need PAX."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for member in members:
            info = tarfile.TarInfo(member.path)
            info.type, info.mode, info.linkname = member.type, member.mode, member.link
            info.uid, info.gid, info.size = member.uid, member.gid, len(member.data)
            info.devmajor, info.devminor = member.rdev
            if format == tarfile.PAX_FORMAT:
                info.pax_headers = {
                    **({} if member.mtime.isdecimal() else {"mtime": member.mtime}),
                    **{f"SCHILY.xattr.{name}": _text(value) for name, value in member.xattrs.items()},
                    **member.pax,
                }
            if member.mtime.removeprefix("-").isdecimal():
                info.mtime = int(member.mtime)
            tar.addfile(info, io.BytesIO(member.data))
    return file.getvalue()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def compress(tar: bytes, compression: Compression = "gzip") -> bytes:
    """Return `tar` compressed, the same bytes each time."""
    if compression == "gzip":
        return gzip.compress(tar, 1, mtime=0)
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=1).compress(tar)
    return tar


def digest(data: bytes) -> str:
    """Return the digest of a blob, or the diff ID of an archive."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer(members: Iterable[Member], compression: Compression = "gzip") -> tuple[bytes, str]:
    """Return a blob and its diff ID."""
    tar = archive(members)
    return compress(tar, compression), digest(tar)
