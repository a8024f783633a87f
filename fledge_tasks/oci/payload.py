"""The payload file of a layer: the data of its regular files, one after the other, in whole blocks.

Files are small and many, so their data is gathered in a large buffer: there is one system call for
megabytes of payload, and none per file. While one buffer fills, a thread hashes and writes the other.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import xxhash

from fledge_tasks.fsutil import start_writeback, write_all
from fledge_tasks.oci.layer_index import BLOCK_BYTES

_BUFFER_BYTES = 1 << 21
_ZEROS = memoryview(bytes(BLOCK_BYTES))


class PayloadWriter:
    """Appends to the payload file `fd`, which must be empty and stays open.

    `admit` is told the bytes that the payload comes to before they are written, and may raise.
    Every method raises OSError when the file cannot be written. What the file holds is of use only
    after `close`. When the block of a `with` ends, well or not, nothing is written any more; only
    after that, or after `close`, may `fd` be closed.
    """

    def __init__(self, fd: int, admit: Callable[[int], None] = lambda _: None) -> None:
        self._fd = fd
        self._admit = admit
        self._buffer, self._other = (memoryview(bytearray(_BUFFER_BYTES)) for _ in range(2))
        self._fill = 0
        self._written_bytes = 0
        self._hash = xxhash.xxh3_128()
        self._pool = ThreadPoolExecutor(1, "payload")
        self._writing: Future[None] | None = None

    def __enter__(self) -> PayloadWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    @property
    def block(self) -> int:
        """Index of the block that comes next; the file must be at a block boundary."""
        return (self._written_bytes + self._fill) // BLOCK_BYTES

    def write(self, data: memoryview) -> None:
        """Append `data`."""
        fill = self._fill
        end = fill + len(data)
        while end > _BUFFER_BYTES:
            count = _BUFFER_BYTES - fill
            self._buffer[fill:] = data[:count]
            data = data[count:]
            self._fill = _BUFFER_BYTES
            self._flush()
            fill, end = 0, len(data)
        self._buffer[fill:end] = data
        self._fill = end

    def write_zeros(self, count: int) -> None:
        """Append less than a block of zeros."""
        self.write(_ZEROS[:count])

    def pad(self) -> None:
        """Append zeros up to the next block boundary."""
        # Cannot overflow: the buffer is whole blocks, and so is what was written of it before.
        fill = self._fill
        end = fill + -fill % BLOCK_BYTES
        self._buffer[fill:end] = _ZEROS[: end - fill]
        self._fill = end

    def close(self) -> tuple[int, str]:
        """Write what is buffered; return the size in bytes and the XXH3-128 (hexadecimal) of the payload.

        Does not sync or close the file.
        """
        self.pad()
        self._flush()
        self._wait()
        self._pool.shutdown()
        return self._written_bytes, self._hash.hexdigest()

    def _flush(self) -> None:
        self._wait()
        self._admit(self._written_bytes + self._fill)
        self._writing = self._pool.submit(self._write, self._buffer[: self._fill], self._written_bytes)
        self._buffer, self._other = self._other, self._buffer
        self._written_bytes += self._fill
        self._fill = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def _write(self, data: memoryview, offset: int) -> None:
        self._hash.update(data)
        write_all(self._fd, data)
        start_writeback(self._fd, offset, len(data))
