"""Content digests.

sha256 *names* things: keys, blobs, mapped files, images. Such names come from others, go to
others, or may one day be shared between machines, so they must resist forgery. XXH3-128, four
times as fast, only answers 'did these stored bytes rot', and is never part of a name or a key.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NewType

import xxhash

Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hexadecimal digits."""

CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Tell whether `text` is a digest in the only form that we accept."""
    return _DIGEST.fullmatch(text) is not None


def sha256_bytes(data: bytes) -> Digest:
    """Return the digest of `data`."""
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def sha256_file(path: Path) -> Digest:
    """Return the digest of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return Digest("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())


def xxh3_file(path: Path) -> str:
    """Return the XXH3-128 of a file's content as 32 hexadecimal digits. Raises OSError."""
    state = xxhash.xxh3_128()
    buffer = bytearray(CHUNK_BYTES)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(view[:count])
    return state.hexdigest()


def short(digest: str) -> str:
    """Return the 12 hexadecimal digits by which tasks and messages call a digest or key."""
    return digest.removeprefix("sha256:")[:12]
