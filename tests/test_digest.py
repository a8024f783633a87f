"""Digests against known values."""

from __future__ import annotations

from pathlib import Path

import pytest
import xxhash

from fledge_tasks.digest import CHUNK_BYTES, is_digest, sha256_bytes, sha256_file, short, xxh3_file

ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_known_values(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert sha256_bytes(b"abc") == sha256_file(file) == ABC
    assert xxh3_file(file) == "06b05ab6733a618578af5f94892f3950"
    file.write_bytes(b"")
    assert xxh3_file(file) == "99aa06d3014798d86001c324468d497f"  # XXH3_128bits of nothing with seed 0
    assert short(ABC) == "ba7816bf8f01" == short(ABC.removeprefix("sha256:"))


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_files_longer_than_the_buffer(tmp_path: Path, size: int) -> None:
    file, data = tmp_path / "file", bytes(range(256)) * (size // 256) + bytes(size % 256)
    file.write_bytes(data)
    assert xxh3_file(file) == xxhash.xxh3_128(data).hexdigest()
    assert sha256_file(file) == sha256_bytes(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ABC, True),
        (ABC.upper(), False),
        (ABC[:-1], False),
        (ABC + "0", False),
        (ABC + "\n", False),
        ("sha512:" + "0" * 128, False),
        (ABC.removeprefix("sha256:"), False),
        ("", False),
    ],
)
def test_only_one_form_is_a_digest(text: str, expected: bool) -> None:
    assert is_digest(text) is expected


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sha256_file(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        xxh3_file(tmp_path / "none")
