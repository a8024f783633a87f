"""`[filesystem]` of fledge.toml: what may stand there for each type, and the record that it becomes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fledge_tasks.filesystems.options import OPTIONS, Options
from fledge_tasks.shapes import Array, Conflict, Holds, Shape, Table, Value, Variants, integer, quoted

MAX_SIZE_MB = 16 << 20
"""16 TiB in MiB: what ext4 addresses with blocks of 4 KiB and 32-bit block numbers."""
DEFAULT_BUFFER_MB = 100
MIN_INODE_RATIO, MAX_INODE_RATIO = 1 << 10, 64 << 20
"""What mke2fs takes for -i."""

FilesystemType = Literal["ext4", "xfs", "btrfs"]


class Filesystem(msgspec.Struct, frozen=True, omit_defaults=True):
    """`[filesystem]`, as far as it decides what the filesystem is: every field is key material.

    A default is in no key text, so that a new field changes no key of those who do not use it.

    size_buffer_mb  MiB that are free in the finished filesystem
    size_mb         MiB of the whole image, None: what is needed
    shrink          as small as it can be and still have the buffer
    label, uuid     '' and None: none, and one that follows from the content
    block_size      bytes, None: the default of the type
    inode_ratio     bytes of the image for each inode, None: as many inodes as the content and its growth need
    features        words of `options.OPTIONS`, sorted
    """

    type: FilesystemType
    size_buffer_mb: int
    size_mb: int | None = None
    shrink: bool = False
    label: str = ""
    uuid: str | None = None
    block_size: int | None = None
    inode_ratio: int | None = None
    features: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether features and block size are those of the type."""
        return not self.features and self.block_size in {None, OPTIONS[self.type].block_sizes[-1]}


def filesystem_of(table: dict[str, Any]) -> Filesystem:
    """Return a checked `[filesystem]`. A fixed size has no buffer but the one that is asked for."""
    values = {key: value for key, value in table.items() if key not in {"mappings", "preallocate"}}
    values.setdefault("size_buffer_mb", 0 if "size_mb" in values else DEFAULT_BUFFER_MB)
    values["features"] = tuple(sorted(values.get("features", ())))
    if "uuid" in values:
        values["uuid"] = values["uuid"].lower()
    return Filesystem(**values)


_BOOLEAN = Value(bool, "true or false")
_INTEGER = Value(int, "an integer")


def filesystem_shape(mappings: Shape) -> Variants:
    """Return what the table may hold, type by type. `size_conflict` knows what is wrong beyond that."""
    return Variants("type", {kind: _table(kind, options, mappings) for kind, options in OPTIONS.items()})


def size_conflict(table: dict[str, Any]) -> str | None:
    """Return what is wrong with numbers that are right one by one."""
    size, buffer = table.get("size_mb"), table.get("size_buffer_mb", 0)
    if isinstance(size, int) and isinstance(buffer, int) and size <= buffer:
        return f"found size_mb = {size} with size_buffer_mb = {buffer}, expected more than the buffer"
    return None


def _table(kind: str, options: Options, mappings: Shape) -> Table:
    words, sizes = options.feature_words(), options.block_sizes

    def is_label(found: str) -> bool:
        return found.isprintable() and "/" not in found and len(found.encode(errors="replace")) <= options.label_bytes

    keys: dict[str, Shape] = {
        "size_buffer_mb": integer(0, MAX_SIZE_MB),
        "size_mb": integer(options.min_mb, MAX_SIZE_MB),
        "shrink": _BOOLEAN,
        "preallocate": _BOOLEAN,
        "label": Value(
            str,
            f"a label of at most {options.label_bytes} bytes, printable, without '/'",
            pattern=f"^[ -.0-~]{{0,{options.label_bytes}}}$",
            beyond=is_label,
        ),
        "uuid": Value(
            str,
            'a UUID such as "0b0eeb0f-5b73-4ff1-9d6d-0f5b0d3f7a5c"',
            pattern="^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
            forbidden="^[0-]*$",
        ),
        "block_size": Value(int, f"a block size of {kind}: {', '.join(map(str, sizes))}", choices=sizes),
        **({"inode_ratio": integer(MIN_INODE_RATIO, MAX_INODE_RATIO)} if options.has_ratio else {}),
        "features": Array(
            Value(
                str, f"a feature that {kind} and Linux 5.10 guests know: {', '.join(map(quoted, words))}", choices=words
            ),
            "an array of different features",
            distinct=True,
        ),
        "mappings": mappings,
    }
    conflicts = [
        Conflict(
            "found size_mb and shrink = true, expected one of them",
            {"size_mb": _INTEGER, "shrink": Value(bool, "true", choices=(True,))},
        ),
        *(
            Conflict(
                f"found {quoted(word)} in features, expected {quoted(other)} beside it, {why}",
                {"features": Holds(word)},
                lacking={"features": Holds(other)},
            )
            for word, other, why in options.needs
        ),
    ]
    return Table(keys, conflicts=conflicts)
