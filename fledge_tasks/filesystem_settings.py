"""`[filesystem]` of fledge.toml: what may stand there for each type, and the record that it becomes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fledge_tasks.filesystems.options import OPTIONS, Options
from fledge_tasks.filesystems.options import conflict as feature_conflict
from fledge_tasks.shapes import Array, Shape, Table, Value, integer, matching, one_of, quoted

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


def filesystem_of(table: dict[str, Any]) -> Filesystem:
    """Return a checked `[filesystem]`. A fixed size has no buffer but the one that is asked for."""
    values = {key: value for key, value in table.items() if key not in {"mappings", "preallocate"}}
    values.setdefault("size_buffer_mb", 0 if "size_mb" in values else DEFAULT_BUFFER_MB)
    values["features"] = tuple(sorted(values.get("features", ())))
    if "uuid" in values:
        values["uuid"] = values["uuid"].lower()
    return Filesystem(**values)


_TYPE = one_of(*OPTIONS)
_BOOLEAN = Value(bool, "true or false")


def filesystem_tables(mappings: Shape) -> dict[str, Table]:
    """Return what the table may hold for each type, and under '' for one that is wrong or missing."""
    tables = {kind: _table(kind, options, mappings) for kind, options in OPTIONS.items()}
    # What these may hold depends on the type, whose own mistake is told.
    unknown: dict[str, Shape] = {
        "size_mb": integer(1, MAX_SIZE_MB),
        "label": Value(str, "a label"),
        "block_size": Value(int, "a block size"),
        "features": Array(Value(str, "a feature"), "an array of features"),
    }
    every = {key: shape for table in tables.values() for key, shape in table.fields.items()}
    tables[""] = Table({**every, **unknown}, required=("type",))
    return tables


def _table(kind: str, options: Options, mappings: Shape) -> Table:
    words, sizes = options.feature_words(), options.block_sizes

    def conflict(table: dict[str, Any]) -> str | None:
        features = table.get("features")
        words = [each for each in features if isinstance(each, str)] if isinstance(features, list) else []
        return _size_conflict(table) or feature_conflict(kind, words)

    def is_label(found: str) -> bool:
        return found.isprintable() and "/" not in found and len(found.encode(errors="replace")) <= options.label_bytes

    keys: dict[str, Shape] = {
        "type": _TYPE,
        "size_buffer_mb": integer(0, MAX_SIZE_MB),
        "size_mb": integer(options.min_mb, MAX_SIZE_MB),
        "shrink": _BOOLEAN,
        "preallocate": _BOOLEAN,
        "label": Value(str, f"a label of at most {options.label_bytes} bytes, printable, without '/'", is_label),
        "uuid": matching(
            r"(?i)(?!0{8}-0{4}-0{4}-0{4}-0{12})[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
            'a UUID such as "0b0eeb0f-5b73-4ff1-9d6d-0f5b0d3f7a5c"',
        ),
        "block_size": Value(
            int, f"a block size of {kind}: {', '.join(map(str, sizes))}", lambda found: found in sizes
        ),
        **({"inode_ratio": integer(MIN_INODE_RATIO, MAX_INODE_RATIO)} if options.has_ratio else {}),
        "features": Array(
            Value(
                str, f"a feature that {kind} and Linux 5.10 guests know: {', '.join(map(quoted, words))}",
                lambda found: found in words, words,
            ),
            "an array of different features",
            lambda found: all(found.count(each) == 1 for each in found),
        ),
        "mappings": mappings,
    }  # fmt: skip
    return Table(keys, required=("type",), place=f"with type {quoted(kind)}", conflict=conflict)


def _size_conflict(table: dict[str, Any]) -> str | None:
    size, buffer = table.get("size_mb"), table.get("size_buffer_mb", 0)
    if size is not None and table.get("shrink"):
        return "found size_mb and shrink = true, expected one of them"
    if isinstance(size, int) and isinstance(buffer, int) and size <= buffer:
        return f"found size_mb = {size} with size_buffer_mb = {buffer}, expected more than the buffer"
    return None
