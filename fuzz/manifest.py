"""Fuzz target: the parsers of what strangers and users write as text.

The first byte of an input chooses the parser (see `_TARGETS`), the rest is what it gets. Images
are made of blobs that name each other by digest, which stops a fuzzer; so one input holds all
of them, the lowest first, separated by RS (0x1e). `@D0`, `@S0`, … stand for digest and size of
the blob of that number. The last one is index.json, or the manifest of a `dir:` folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from fledge_tasks import config, manifest
from fledge_tasks.digest import sha256_bytes
from fledge_tasks.errors import FledgeError
from fledge_tasks.lock import LockFile
from fledge_tasks.oci import daemon, reference
from fledge_tasks.oci.layout import LocalImage, open_image
from fledge_tasks.oci.manifest import Manifest, Platform, find_manifest, image_from, parse, parse_config
from fledge_tasks.resolve import created

PLATFORM = Platform("linux", "amd64")
_SEPARATOR = b"\x1e"
_PLACEHOLDER = re.compile(rb"@([DS])([0-9])")


def one_input(data: bytes) -> None:
    """Run one parser on one input. It may end in a FledgeError, which counts as an answer, and in no other."""
    number, rest = data[0] if data else 0, data[1:]
    with contextlib.suppress(FledgeError):
        _TARGETS[number % len(_TARGETS)](rest)


class _Blobs:
    """`Files` of an image in memory."""

    def __init__(self, text: bytes) -> None:
        done: list[bytes] = []

        def value(match: re.Match[bytes]) -> bytes:
            number = int(match[2])
            if number >= len(done):
                return match[0]
            return sha256_bytes(done[number]).encode() if match[1] == b"D" else b"%d" % len(done[number])

        for part in text.split(_SEPARATOR)[:10]:
            done += [_PLACEHOLDER.sub(value, part)]
        self._files = {"index.json": done[-1], "manifest.json": done[-1]}
        for blob in done:
            name = sha256_bytes(blob).removeprefix("sha256:")
            self._files |= {f"blobs/sha256/{name}": blob, name: blob}

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return len(file.read())

    def open(self, name: str) -> BinaryIO:
        if name not in self._files:
            raise FileNotFoundError(name)
        return io.BytesIO(self._files[name])


def _layout(text: bytes) -> None:
    _read_image(LocalImage(_Blobs(text), "layout", is_flat=False))


def _folder(text: bytes) -> None:
    _read_image(LocalImage(_Blobs(text), "folder", is_flat=True))


def _archive(data: bytes) -> None:
    with _file(data) as path, open_image(path, "oci-archive", "archive") as local:
        _read_image(local)


def _read_image(local: LocalImage) -> None:
    found = find_manifest(local.top(None, PLATFORM), PLATFORM, local.read, where="image")
    document = parse(found, where="image")
    assert isinstance(document, Manifest)
    data = local.read(document.config)
    image = image_from(found, data, origin="oci", platform=PLATFORM, where="image")
    values = parse_config(data, where="image")
    assert 0 <= created(values) < 1 << 32
    rendered = manifest.render(
        {},
        values,
        name="image",
        image="image",
        image_digest=image.manifest,
        rootfs=Path("/rootfs.img"),
        checksum=image.manifest,
        filesystem="ext4",
    )
    assert json.loads(rendered)["image_digest"] == image.manifest


def _reference(text: bytes) -> None:
    found = reference.parse(text.decode(errors="surrogateescape"))
    assert reference.parse(found.canonical) == found
    reference.lock_name(found, Path("/workspace/image"), Path("/workspace"))


def _lock(text: bytes) -> None:
    with _file(text) as path:
        LockFile(path).read()


def _fledge_toml(text: bytes) -> None:
    _load({config.FILE_NAME: text})


def _manifest_toml(text: bytes) -> None:
    fledge = b'version="1"\nstrategy="oci_rootfs"\nsource.image="a"\nfilesystem={type="ext4",size_buffer_mb=1}\n'
    _load({config.FILE_NAME: fledge, config.MANIFEST_FILE_NAME: text})


def _load(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for name, data in files.items():
            Path(folder, name).write_bytes(data)
        loaded = config.load(Path(folder, config.FILE_NAME), config.FILE_NAME)
    assert loaded.filesystem.size_buffer_mb >= 0


def _daemon(body: bytes) -> None:
    daemon.parse_answer(body, "daemon")


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


_TARGETS: tuple[Callable[[bytes], None], ...] = (
    _layout,
    _folder,
    _archive,
    _reference,
    _lock,
    _fledge_toml,
    _manifest_toml,
    _daemon,
)
