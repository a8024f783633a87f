"""Reading images that lie in local files, without a program and without unpacking anything.

Three forms, one reader: an OCI image layout as a folder (`oci:`) or as a tar archive (`oci-archive:`),
and the flat folder of `dir:`, which is also how skopeo exports images for us. The names that are
opened are fixed, or 64 hexadecimal digits, so nothing in the files chooses a path.

    OCI image layout ('image-layout.md')       dir: (containers-transports(5))
      index.json                                 manifest.json
      blobs/sha256/<hex>                         <hex>, <hex>.manifest.json
"""

from __future__ import annotations

import contextlib
import errno
import io
import lzma
import os
import posixpath
import shutil
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from fledge_tasks.digest import CHUNK_BYTES, sha256_file
from fledge_tasks.errors import BlobError, ImageNotFoundError, SourceError
from fledge_tasks.fsutil import RangeCopier
from fledge_tasks.oci.manifest import (
    CONFIG_LIMIT_BYTES,
    Descriptor,
    Index,
    LayerRef,
    Platform,
    check_bytes,
    check_digest,
    parse,
    select_platform,
)

_REF_NAME = "org.opencontainers.image.ref.name"
_DAMAGED = "the source is damaged or was changed meanwhile; run again, or make the image again"
# What tarfile lets out about a size that no file has, of an extended header that fits no memory, too, and about
# more extended headers in a row than Python calls functions.
_OF_TARFILE = (ValueError, OverflowError, MemoryError, RecursionError)


class Files(Protocol):
    """Regular files by name. Both methods raise FileNotFoundError for what is not there or not regular."""

    def size(self, name: str) -> int:
        """Return the bytes of a file."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; a file of the host is opened without a buffer."""


class FolderFiles:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def open(self, name: str) -> BinaryIO:
        # O_NONBLOCK: a FIFO of that name must not stop us.
        file = io.FileIO(self._folder / name, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise FileNotFoundError(name)


class ArchiveFiles:
    """The regular members of a tar archive, compressed or not; links in it are not followed."""

    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive
        self._members = {posixpath.normpath(member.name): member for member in archive if member.isreg()}

    def size(self, name: str) -> int:
        return self._member(name).size

    def open(self, name: str) -> BinaryIO:
        file = self._archive.extractfile(self._member(name))
        assert file is not None
        return file  # type: ignore[return-value]

    def _member(self, name: str) -> tarfile.TarInfo:
        try:
            return self._members[name]
        except KeyError:
            raise FileNotFoundError(name) from None


class LocalImage:
    """An image layout or `dir:` folder. `where` names it in errors."""

    def __init__(self, files: Files, where: str, *, is_flat: bool) -> None:
        self._files = files
        self._where = where
        self._names = ("{}", "{}.manifest.json") if is_flat else ("blobs/sha256/{}",)
        self._is_flat = is_flat

    def top(self, tag: str | None, platform: Platform) -> bytes:
        """Return the manifest or index that a tag stands for; without a tag, of the only image.

        Raises ImageNotFoundError when there is none, SourceError when there are several.
        """
        if self._is_flat:
            return self._read_name("manifest.json")
        index = parse(self._read_name("index.json"), where=self._where)
        if not isinstance(index, Index):
            raise SourceError("its index.json is not an index", where=self._where)
        named = [((entry.annotations or {}).get(_REF_NAME), entry) for entry in index.manifests]
        chosen = [(name, entry) for name, entry in named if tag in (None, name)]
        names = sorted({name or "(unnamed)" for name, _ in named})
        if not chosen:
            image = f"image named {tag!r}" if tag else "image"
            message = f"there is no {image}; there are: {', '.join(names) or 'none'}"
            raise ImageNotFoundError(message, where=self._where)
        if len({name for name, _ in chosen}) > 1:
            message = f"there is more than one image: {', '.join(names)}"
            raise SourceError(message, where=self._where, hint="append ':' and the name of one")
        # One name may stand for one image on several platforms, without an index of its own.
        entries = tuple(entry for _, entry in chosen)
        entry = entries[0] if len(entries) == 1 else select_platform(Index(entries), platform, where=self._where)
        return self.read(entry)

    def read(self, descriptor: Descriptor) -> bytes:
        """Return a manifest, index or config, checked. Raises BlobError, SourceError."""
        check_digest(descriptor.digest, where=self._where)
        data = self._read_name(self._find(descriptor.digest, descriptor.size))
        check_bytes(data, descriptor, where=self._where)
        return data

    def copy(self, layer: LayerRef, target: Path, advance: Callable[[int], None]) -> None:
        """Copy the blob of a layer to a new file, sharing blocks where possible. The copy is not checked.

        `advance` gets the bytes as they are done. Raises BlobError when the blob is not there or has
        another size, SourceError when it cannot be read.
        """
        name = self._find(layer.blob, layer.size)
        with _reading(self._where), self._files.open(name) as source, target.open("xb") as file:
            if isinstance(source, io.FileIO):
                RangeCopier(file.fileno(), advance).copy(source.fileno(), 0, 0, layer.size)
                return
            while data := source.read(CHUNK_BYTES):
                file.write(data)
                advance(len(data))

    def _find(self, digest: str, size: int) -> str:
        for pattern in self._names:
            name = pattern.format(digest.removeprefix("sha256:"))
            with _reading(self._where), contextlib.suppress(FileNotFoundError):
                found = self._files.size(name)
                if found != size:
                    raise wrong_blob(digest, f"{found} bytes", f"{size} bytes", self._where)
                return name
        raise wrong_blob(digest, "no such file", f"{size} bytes", self._where)

    def _read_name(self, name: str) -> bytes:
        try:
            with _reading(self._where), self._files.open(name) as file:
                data = file.read(CONFIG_LIMIT_BYTES + 1)
        except FileNotFoundError:
            raise ImageNotFoundError(f"there is no image: it holds no {name}", where=self._where) from None
        if len(data) > CONFIG_LIMIT_BYTES:
            raise SourceError(f"{name} is larger than {CONFIG_LIMIT_BYTES >> 20} MiB", where=self._where)
        return data


@contextlib.contextmanager
def open_image(path: Path, form: str, where: str) -> Iterator[LocalImage]:
    """Open what lies at `path` in the form 'oci', 'oci-archive' or 'dir'. Raises SourceError."""
    if form == "oci-archive":
        with contextlib.ExitStack() as stack:
            with _reading(where):
                archive = stack.enter_context(tarfile.open(path))
                files = ArchiveFiles(archive)
            yield LocalImage(files, where, is_flat=False)
    else:
        yield LocalImage(FolderFiles(path), where, is_flat=form == "dir")


def adopt(blob: Path, layer: LayerRef, into: Path, *, where: str, digest: str | None = None) -> None:
    """Check a blob and put it at `into/<hex of layer.blob>`, replacing what is there.

    `digest` is that of the file if somebody has just computed it. The file is linked, or copied to
    another filesystem; `blob` stays. Raises BlobError when it is not there or not the layer's;
    `into` then has no such file.
    """
    target = into / layer.blob.removeprefix("sha256:")
    target.unlink(missing_ok=True)
    try:
        size, digest = blob.stat().st_size, digest or sha256_file(blob)
    except FileNotFoundError:
        raise wrong_blob(layer.blob, "nothing", f"{layer.size} bytes", where) from None
    if (size, digest) != (layer.size, layer.blob):
        raise wrong_blob(layer.blob, f"{digest} of {size} bytes", f"{layer.size} bytes", where)
    try:
        os.link(blob, target)
    except OSError:  # another filesystem, or one without links
        shutil.copyfile(blob, target)


def wrong_blob(digest: str, found: str, expected: str, where: str) -> BlobError:
    """Return the error for a blob that is not what its manifest promises."""
    return BlobError(f"blob {digest}: found {found}, expected {expected}", where=where, hint=_DAMAGED)


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, *_OF_TARFILE) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise  # it is the copy that cannot be written
        what = str(error) or type(error).__name__
        raise SourceError(f"cannot be read: {what}", where=where, hint=_DAMAGED) from None
