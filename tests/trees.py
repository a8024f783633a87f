"""Trees in memory with a payload, images made from them, and what other programs read in those."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fledge_tasks.assemble import Assembled, assemble
from fledge_tasks.filesystems import backend, ext4, skeleton
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import Wanted
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Entry, Kind, Run
from fledge_tasks.tree import Inode, Layer, merge
from fledge_tasks.verify import compare_tree
from tests.tools import PATH

EPOCH = 1_700_000_000
MIB = 1 << 20
EPOCH_NS = EPOCH * 1_000_000_000
PARAMETERS = Parameters(
    uuid=bytes(range(16)),
    hash_seed=bytes(range(16, 32)),
    epoch=EPOCH,
    wanted=Wanted(2 * MIB),
    features=OPTIONS["ext4"].default,
)


@dataclass
class Content:
    """A layer: entries and the payload that they point into."""

    entries: list[Entry] = field(default_factory=list)
    payload: bytearray = field(default_factory=bytearray)

    def add(self, path: bytes, kind: Kind, **fields: Any) -> Entry:
        """Append an entry that has no data."""
        entry = Entry(path, kind, **{"mode": 0o755 if kind is Kind.DIRECTORY else 0o644, **fields})
        self.entries.append(entry)
        return entry

    def file(self, path: bytes, data: bytes = b"", **fields: Any) -> Entry:
        """Append a file."""
        return self.add(path, Kind.FILE, size=len(data), block=self._store(data) if data else 0, **fields)

    def sparse(self, path: bytes, size: int, parts: Iterable[tuple[int, bytes]], **fields: Any) -> Entry:
        """Append a file that has data at some blocks and holes elsewhere."""
        runs = tuple(Run(block, self._store(data), -(-len(data) // BLOCK_BYTES)) for block, data in parts)
        return self.add(path, Kind.FILE, size=size, runs=runs, **fields)

    def _store(self, data: bytes) -> int:
        block = len(self.payload) // BLOCK_BYTES
        self.payload += data + bytes(-len(data) % BLOCK_BYTES)
        return block


@dataclass(frozen=True)
class Built:
    """A finished image and the steps on the way to it. `bare` has holes where file data belongs."""

    image: Path
    bare: Path
    skeleton: Path
    map: Path
    filled: Filled
    assembled: Assembled


def fill(folder: Path, entries: Sequence[Entry], parameters: Parameters = PARAMETERS) -> Filled:
    """Make `folder/bare.img`: the filesystem, holes where file data belongs."""
    root = merge([Layer("layer", entries)], parameters.epoch * 1_000_000_000)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        return ext4.make(root, parameters, {}, folder / "bare.img", Path(scratch))


def tree_of(*contents: Content) -> Inode:
    """Merge layers."""
    return merge([Layer(f"layer {at}", content.entries) for at, content in enumerate(contents)], EPOCH_NS)


def build(folder: Path, *contents: Content, parameters: Parameters = PARAMETERS, kind: str = "ext4") -> Built:
    """Make a whole image of layers."""
    folder.mkdir(exist_ok=True)
    root = merge(
        [Layer(f"layer {at}", content.entries) for at, content in enumerate(contents)], parameters.epoch * 10**9
    )
    bare, target = folder / "bare.img", folder / "rootfs.img"
    bare.unlink(missing_ok=True)
    payloads = {at: folder / f"payload{at}" for at in range(len(contents))}
    for at, content in enumerate(contents):
        payloads[at].write_bytes(content.payload)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        filled = backend(kind).make(root, parameters, payloads, bare, Path(scratch))
    image_map = skeleton.save(bare, filled.extents, folder / "skeleton", folder / "map")
    assembled = assemble(image_map, folder / "skeleton", payloads, target, preallocate=False, advance=lambda _: None)
    return Built(target, bare, folder / "skeleton", folder / "map", filled, assembled)


def compared(image: Path, root: Inode, folder: Path, count: int = 1, kind: str = "ext4") -> list[str]:
    """Return what `verify` finds different in an image that `build` made of `count` layers."""
    payloads = {at: folder / f"payload{at}" for at in range(count)}
    return [str(difference) for difference in compare_tree(image, root, payloads, EPOCH, kind)]


def tool(*argv: str | Path) -> str:
    """Run a program, which must succeed, and return what it printed."""
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, env={"PATH": PATH, "LC_ALL": "C", "TZ": "UTC"}
    )
    output = done.stdout.decode(errors="surrogateescape")
    assert done.returncode == 0, output + done.stderr.decode(errors="replace")
    return output


def check(image: Path) -> None:
    """Have e2fsck find nothing wrong."""
    tool("e2fsck", "-fn", image)


def debugfs(image: Path, commands: Sequence[bytes]) -> list[str]:
    """Return what debugfs printed for each command."""
    with tempfile.NamedTemporaryFile() as script:
        script.write(b"".join(command + b"\n" for command in commands))
        script.flush()
        output = tool("debugfs", "-f", Path(script.name), image)
    parts = re.split(r"^debugfs: .*\n", output, flags=re.MULTILINE)
    assert len(parts) == len(commands) + 1
    return parts[1:]


@contextlib.contextmanager
def mounted(image: Path, kind: str = "ext4") -> Iterator[Path]:
    """Mount an image read-only. Needs root."""
    with tempfile.TemporaryDirectory() as folder:
        tool("mount", "-t", kind, "-o", "ro,loop", image, folder)
        try:
            yield Path(folder)
        finally:
            tool("umount", folder)


def available_bytes(image: Path) -> int:
    """Compute what statfs will report as available: free blocks less what Linux keeps back (ext4_set_resv_clusters)."""
    listed = tool("dumpe2fs", "-h", image)
    counts = {
        name: int(re.search(rf"^{name}: +(\d+)$", listed, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("Block count", "Free blocks", "Reserved block count")
    }
    kept = min(counts["Block count"] // 50, 4096) + counts["Reserved block count"]
    return (counts["Free blocks"] - kept) * BLOCK_BYTES
