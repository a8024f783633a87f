"""`[filesystem]` of fledge.toml: what may stand there for each type, and the record that it becomes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from fledge_tasks.filesystems.options import OPTIONS, Options
from fledge_tasks.shapes import Array, Conflict, Holds, Shape, Table, Value, Variants, integer, one_of, quoted

MAX_SIZE_MB = 16 << 20
"""16 TiB in MiB: what ext4 addresses with blocks of 4 KiB and 32-bit block numbers."""
DEFAULT_BUFFER_MB = 100
MIN_INODE_RATIO, MAX_INODE_RATIO = 1 << 10, 64 << 20
"""What mke2fs takes for -i."""

FilesystemType = Literal["ext4", "xfs", "btrfs", "squashfs", "erofs"]


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
    compression     of a read-only type, never None then; and its level, None if it has no levels
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
    compression: str | None = None
    compression_level: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether features and block size are those of the type."""
        return not self.features and self.block_size in {None, OPTIONS[self.type].block_sizes[-1]}

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be written in it."""
        return OPTIONS[self.type].is_read_only


def filesystem_of(table: dict[str, Any]) -> Filesystem:
    """Return a checked `[filesystem]`. A fixed size has no buffer but the one that is asked for."""
    values = {key: value for key, value in table.items() if key not in {"mappings", "preallocate"}}
    compressions = OPTIONS[values["type"]].compressions
    if compressions:
        levels = compressions[values.setdefault("compression", next(iter(compressions)))]
        if levels:
            values.setdefault("compression_level", levels[2])
    values.setdefault("size_buffer_mb", 0 if "size_mb" in values or compressions else DEFAULT_BUFFER_MB)
    values["features"] = tuple(sorted(values.get("features", ())))
    if "uuid" in values:
        values["uuid"] = values["uuid"].lower()
    return Filesystem(**values)


_BOOLEAN = Value(bool, "true or false")
_INTEGER = Value(int, "an integer")
_UUID = Value(
    str,
    'a UUID such as "0b0eeb0f-5b73-4ff1-9d6d-0f5b0d3f7a5c"',
    pattern="^[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}$",
    forbidden="^[0-]*$",
)


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
    if options.is_read_only:
        return _read_only_table(kind, options, mappings)
    words = options.feature_words()

    keys: dict[str, Shape] = {
        "size_buffer_mb": integer(0, MAX_SIZE_MB),
        "size_mb": integer(options.min_mb, MAX_SIZE_MB),
        "shrink": _BOOLEAN,
        "preallocate": _BOOLEAN,
        "label": _label(options.label_bytes),
        "uuid": _UUID,
        "block_size": _block_size(kind, options),
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


def _read_only_table(kind: str, options: Options, mappings: Shape) -> Table:
    """Return what a type may have in which nothing can be written."""
    levels = {name: limits for name, limits in options.compressions.items() if limits}
    most = max(limits[1] for limits in levels.values())
    default = next(iter(options.compressions))
    keys: dict[str, Shape] = {
        "compression": one_of(*options.compressions),
        "compression_level": integer(1, most),
        "size_buffer_mb": integer(0, MAX_SIZE_MB),
        "preallocate": _BOOLEAN,
        **({"label": _label(options.label_bytes), "uuid": _UUID} if options.label_bytes else {}),
        "block_size": _block_size(kind, options),
        "mappings": mappings,
    }
    conflicts = [
        Conflict(
            f"found a size_buffer_mb, expected none or 0: {kind} is read-only, and has no free space",
            {"size_buffer_mb": integer(1)},
        )
    ]
    for name, limits in options.compressions.items():
        least_wrong = 1 if limits is None else limits[1] + 1
        if least_wrong <= most:
            expected = "no level" if limits is None else f"one from {limits[0]} to {limits[1]}"
            conflicts.append(
                Conflict(
                    f"found a compression_level that {quoted(name)} does not have, expected {expected}",
                    {"compression": one_of(name), "compression_level": Value(int, expected, minimum=least_wrong)},
                )
            )
    if options.compressions[default] is None:
        conflicts.append(
            Conflict(
                f"found compression_level alone, expected compression = {quoted(next(iter(levels)))} beside it",
                {"compression_level": _INTEGER},
                lacking={"compression": Value(str, "a string")},
            )
        )
    return Table(keys, conflicts=conflicts)


def _label(most_bytes: int) -> Value:
    def is_label(found: str) -> bool:
        return found.isprintable() and "/" not in found and len(found.encode(errors="replace")) <= most_bytes

    return Value(
        str,
        f"a label of at most {most_bytes} bytes, printable, without '/'",
        pattern=f"^[ -.0-~]{{0,{most_bytes}}}$",
        beyond=is_label,
    )


def _block_size(kind: str, options: Options) -> Value:
    sizes = sorted(options.block_sizes)
    return Value(int, f"a block size of {kind}: {', '.join(map(str, sizes))}", choices=tuple(sizes))
