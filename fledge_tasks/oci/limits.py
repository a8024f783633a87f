"""What a layer may come to when it is unpacked, so that a hostile one cannot fill disk or memory."""

from __future__ import annotations

from typing import NamedTuple

RATIO_FREE_BYTES = 1 << 30
INDEX_FREE_BYTES = 64 << 20
INDEX_BYTES_PER_ENTRY = 256


class Limits(NamedTuple):
    """What a layer may come to: bytes of its archive, members, and how many times the blob the archive may be."""

    tar_bytes: int
    entries: int
    ratio: int

    @property
    def index_bytes(self) -> int:
        """How long the index may get, which is read into memory whole: an entry of usual names takes 100 bytes."""
        return max(INDEX_FREE_BYTES, INDEX_BYTES_PER_ENTRY * self.entries)

    def allowed_bytes(self, blob_size: int) -> tuple[int, str]:
        """Return how long the archive in a blob of that size may be, and the setting that says so."""
        # Small archives may compress as well as they like: a database made of zeros is no attack.
        by_ratio = max(self.ratio * blob_size, RATIO_FREE_BYTES)
        return (by_ratio, "ratio") if by_ratio < self.tar_bytes else (self.tar_bytes, "layer_mb")
