"""One layer blob, unpacked: its file data into a payload, all else into an index.

The blob is read once, front to back, in constant memory. On that way its digest and size, the diff
ID of what it decompresses to, and every header are checked. Nothing is ever made on the host under
a name from the archive, so nothing in it can reach out of it.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from fledge_tasks.errors import BlobError, LayerError, LimitError
from fledge_tasks.oci import attributes
from fledge_tasks.oci.decompress import open_stream
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, IndexWriter, Kind, Run
from fledge_tasks.oci.limits import Limits
from fledge_tasks.oci.payload import PayloadWriter
from fledge_tasks.oci.tar import Archive, Member, shown

MAX_PATH_BYTES = 4096
MAX_NAME_BYTES = 255
MAX_TARGET_BYTES = 4095  # PATH_MAX without its NUL
_MAX_MAJOR = (1 << 12) - 1  # makedev(3), new_encode_dev() of Linux
_MAX_MINOR = (1 << 20) - 1
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_DRAIN_BYTES = 1 << 20
_BLOCK_SHARE = BLOCK_BYTES // 1024  # header and data of the smallest file take two blocks of 512 bytes


class Unpacked(NamedTuple):
    """What a layer came to: number of entries, size and XXH3-128 of the payload, size of the archive."""

    entries: int
    payload_bytes: int
    payload_xxh3: str
    tar_bytes: int


def unpack(
    blob: BinaryIO,
    *,
    diff_id: str,
    blob_digest: str,
    blob_size: int,
    limits: Limits,
    payload_fd: int,
    index_file: BinaryIO,
    advance: Callable[[int], None],
    where: str,
) -> Unpacked:
    """Unpack `blob` into the empty files `payload_fd` and `index_file`, which stay open and are not synced.

    `advance` is told the bytes of the blob as they are read; `where` names the layer in errors.
    Raises BlobError when the blob is not the one of `blob_digest` and `blob_size`, whatever else is
    wrong with it; LayerError when it is not an archive that can be used, or not the one of
    `diff_id`; LimitError when it comes to more than `limits`; OSError when reading or writing fails.
    What the files hold then is of no use.
    """
    index = IndexWriter(index_file)
    source = _HashedBlob(blob, blob_size)
    tar_hash = hashlib.sha256()
    tar_bytes = told = 0
    allowed_bytes, setting = limits.allowed_bytes(blob_size)

    def tar(stream: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal tar_bytes, told
        for chunk in stream:
            tar_bytes += len(chunk)
            if tar_bytes > allowed_bytes:
                what = f"the layer's archive has more than {allowed_bytes} bytes"
                times = f", over {limits.ratio} times as many as its blob" if setting == "ratio" else ""
                raise _too_much(what + times, blob_size, setting)
            tar_hash.update(chunk)
            told, count = source.bytes_read, source.bytes_read - told
            advance(count)
            yield chunk

    def admit(payload_bytes: int) -> None:
        # Files of one byte take four times as much as in the archive; only the many parts of sparse
        # ones take more, a block for each byte.
        if payload_bytes > _BLOCK_SHARE * allowed_bytes:
            what = f"the layer's files take more than {_BLOCK_SHARE * allowed_bytes} bytes"
            raise _too_much(what, blob_size, setting)

    failure: LayerError | None = None
    try:
        # Reading, the digest of the blob and decompressing take about as long as all the rest.
        with PayloadWriter(payload_fd, admit) as payload, _ReadAhead(open_stream(source)) as stream:
            chunks = tar(stream)
            for member in (archive := Archive(chunks)).members():
                if index.entries == limits.entries:
                    raise _too_much(f"the layer has more than {limits.entries} entries", blob_size, "entries")
                if index.written_bytes > limits.index_bytes:
                    what = f"the names and attributes in the layer take more than {limits.index_bytes} bytes"
                    raise _too_much(what, blob_size, "entries")
                index.add(_entry(member, archive, payload))
            for _ in chunks:  # what follows the end of the archive belongs to the diff ID
                pass
            payload_bytes, payload_xxh3 = payload.close()
    except LayerError as error:
        failure = error
    while source.read(_DRAIN_BYTES):
        pass
    found = f"sha256:{source.hash.hexdigest()}"
    if source.bytes_read != blob_size:
        size = f"more than {blob_size}" if source.bytes_read > blob_size else f"{source.bytes_read}"
        raise BlobError(f"the blob has {size} bytes, its manifest says {blob_size}", where=where)
    if found != blob_digest:
        raise BlobError(f"the blob has the digest {found}, its manifest says {blob_digest}", where=where)
    if failure:
        raise type(failure)(failure.message, where=where, hint=failure.hint)
    if (found := f"sha256:{tar_hash.hexdigest()}") != diff_id:
        raise LayerError(f"the layer has the diff ID {found}, the image config says {diff_id}", where=where)
    advance(source.bytes_read - told)
    index.close()
    return Unpacked(index.entries, payload_bytes, payload_xxh3, tar_bytes)


def _too_much(what: str, blob_size: int, setting: str) -> LimitError:
    hint = f"if the image is to be trusted, raise {setting} in the [limits] of fledge.toml"
    return LimitError(f"{what}, in a blob of {blob_size}", hint=hint)


def clean(path: bytes) -> bytes:
    """Return `path` as seen from the root, without leading '/': '..' ends at the root, b'' is the root.

    What CleanPath of umoci does. Symbolic links are not looked at.
    """
    path = path.removeprefix(b"./").strip(b"/")
    if path[:1] != b"." and b"/." not in path and b"//" not in path:
        return path
    names: list[bytes] = []
    for name in path.split(b"/"):
        if name == b"..":
            del names[-1:]
        elif name not in (b"", b"."):
            names.append(name)
    return b"/".join(names)


def _entry(member: Member, archive: Archive, payload: PayloadWriter) -> Entry:
    """Return the index entry of `member` after appending its data to `payload`."""
    path = _checked(clean(member.path))
    kind = member.kind
    if _WHITEOUT in path:
        folder, _, name = path.rpartition(b"/")
        if name == _OPAQUE:
            return Entry(folder, Kind.OPAQUE)
        if name.startswith(_WHITEOUT):
            # Of whatever type it is: some tools ship whiteouts as hard links to each other.
            hidden = name.removeprefix(_WHITEOUT)
            if hidden in (b"", b".", b".."):
                raise LayerError(f"{shown(path)}: a whiteout of nothing (OCI image spec, layer.md, 'Whiteouts')")
            return Entry(clean(folder + b"/" + hidden), Kind.WHITEOUT)
    if not path and kind is not Kind.DIRECTORY:
        raise LayerError("the root of the layer is not a directory")
    link = b""
    rdev = (0, 0)
    block = 0
    runs = None
    if kind is Kind.FILE:
        if member.segments is not None:
            runs = _sparse(member.segments, archive, payload) if member.size else None
        elif member.size:
            block = payload.block
            for piece in archive.data():
                payload.write(piece)
            payload.pad()
    elif kind is Kind.SYMLINK:
        link = member.link
        if not 0 < len(link) <= MAX_TARGET_BYTES:
            raise LayerError(f"{shown(path)}: a symbolic link cannot have a target of {len(link)} bytes")
    elif kind is Kind.HARDLINK:
        link = _checked(clean(member.link))
        if not link:
            raise LayerError(f"{shown(path)}: a hard link to the root, or to nothing")
    elif kind in (Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE):
        rdev = major, minor = member.rdev
        if not (0 <= major <= _MAX_MAJOR and 0 <= minor <= _MAX_MINOR):
            raise LayerError(f"{shown(path)}: Linux has no device {major}:{minor}")
    mode, xattrs = member.mode & 0o7777, member.xattrs
    if xattrs and kind is not Kind.HARDLINK:
        try:
            mode, xattrs = attributes.kept(kind, mode, xattrs)
        except LayerError as error:
            raise LayerError(f"{shown(path)}: {error.message}") from None
    return Entry(
        path, kind, mode, member.uid, member.gid, member.mtime_ns, member.size, block, link, rdev, xattrs, runs
    )


def _checked(path: bytes) -> bytes:
    if len(path) > MAX_NAME_BYTES:
        if len(path) > MAX_PATH_BYTES:
            raise LayerError(f"{shown(path)}: a path of {len(path)} bytes, the limit is {MAX_PATH_BYTES}")
        if max(map(len, path.split(b"/"))) > MAX_NAME_BYTES:
            raise LayerError(f"{shown(path)}: a name in it has more than {MAX_NAME_BYTES} bytes")
    return path


def _sparse(segments: list[tuple[int, int]], archive: Archive, payload: PayloadWriter) -> tuple[Run, ...]:
    """Append the blocks that hold any data and return where they belong."""
    starts: list[tuple[int, int]] = []  # first logical and payload block of each run
    ends: list[int] = []
    position = 0  # in the file: end of what was written, in the last run
    for offset, length in segments:
        block = offset // BLOCK_BYTES
        if position <= block * BLOCK_BYTES:
            # The data is in a block of its own; it goes on with the run if that is the next one.
            payload.pad()
            position = -(-position // BLOCK_BYTES) * BLOCK_BYTES
            if not starts or position != block * BLOCK_BYTES:
                if starts:
                    ends.append(payload.block)
                starts.append((block, payload.block))
            position = block * BLOCK_BYTES
        payload.write_zeros(offset - position)
        for piece in archive.segment(length):
            payload.write(piece)
        position = offset + length
    payload.pad()
    ends.append(payload.block)
    return tuple(Run(logical, start, end - start) for (logical, start), end in zip(starts, ends, strict=False))


class _HashedBlob:
    """Reads a blob, but not much further than its size, and hashes what it reads."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size
        self.hash = hashlib.sha256()
        self.bytes_read = 0

    def read(self, size: int, /) -> bytes:
        if self.bytes_read > self._size:
            return b""
        data = self._file.read(size)
        self.hash.update(data)
        self.bytes_read += len(data)
        return data


class _ReadAhead:
    """Iterates over `chunks` in a second thread, a few ahead of who iterates over this.

    When the block ends, well or not, the thread has ended, and nobody iterates over `chunks` any
    more. Errors of theirs are raised where the next chunk would have been.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=8)  # None ends it
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> _ReadAhead:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        # The thread may wait for room in the queue: it gets some until it says that it ends.
        self._stopped = True
        while not self._ended:
            self._take()
        self._thread.join()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if not self._ended and (chunk := self._take()) is not None:
            return chunk
        if self._error:
            raise self._error
        raise StopIteration

    def _take(self) -> bytes | None:
        chunk = self._queue.get()
        self._ended = chunk is None
        return chunk

    def _run(self) -> None:
        try:
            for chunk in self._chunks:
                if self._stopped:
                    break
                self._queue.put(chunk)
        except BaseException as error:
            self._error = error
        finally:
            self._queue.put(None)
