"""Compares two file trees in everything that a filesystem keeps, one of them the reference."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

_CHUNK_BYTES = 1 << 20
# xfs shows access control lists to root once more, in its own form.
_SHOWN_TWICE = {"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT"}


@dataclass(frozen=True)
class Node:
    """What a path is, as comparable facts; `first` is the first path of its inode, in the order of the alphabet."""

    facts: dict[str, object]
    first: bytes


def compare_trees(
    reference: Path,
    image: Path,
    *,
    added: Collection[str] = (),
    unstamped: Collection[bytes] = (),
    time_ns: Callable[[int], int] = int,
) -> list[str]:
    """Return one line for each difference between two trees, none when they are equal.

    Compared: type, mode, uid, gid, device numbers, mtime in ns, all xattrs (POSIX ACLs and capabilities are
    among them), symlink targets, size and content, which names share an inode. `added` are paths, relative and
    with everything below them, that only `image` has. `unstamped` are folders that no layer
    has an entry for: their mode and owner count, their mtime does not, since there is no true one. `time_ns` is what
    the image's type makes of a time.
    """
    expected, found = _scan(os.fsencode(reference)), _scan(os.fsencode(image))
    extra = [os.fsencode(path) for path in added]
    for path in [path for path in found if any(path == top or path.startswith(top + b"/") for top in extra)]:
        del found[path]
    differences = [f"{_shown(path)}: missing" for path in sorted(expected.keys() - found.keys())]
    differences += [f"{_shown(path)}: not in the reference" for path in sorted(found.keys() - expected.keys())]
    for path in sorted(expected.keys() & found.keys()):
        ours, theirs = found[path], expected[path]
        theirs.facts["mtime_ns"] = time_ns(cast("int", theirs.facts["mtime_ns"]))
        for name in sorted(theirs.facts.keys() | ours.facts.keys()):
            if name == "mtime_ns" and path in unstamped:
                continue
            if theirs.facts.get(name) != ours.facts.get(name):
                differences.append(
                    f"{_shown(path)}: {name} is {ours.facts.get(name)!r}, not {theirs.facts.get(name)!r}"
                )
        if theirs.first != ours.first:
            differences.append(f"{_shown(path)}: has the inode of {_shown(ours.first)}, not of {_shown(theirs.first)}")
        elif "size" in theirs.facts and path == theirs.first and not _same_content(reference, image, path):
            differences.append(f"{_shown(path)}: content differs")
    return differences


def _shown(path: bytes) -> str:
    return repr(path)[1:] if path else "the root folder"


def _scan(root: bytes) -> dict[bytes, Node]:
    facts: dict[bytes, dict[str, object]] = {}
    names: dict[tuple[int, int], list[bytes]] = {}
    for path in _walk(root):
        info = os.lstat(os.path.join(root, path))
        facts[path] = _facts(os.path.join(root, path), info)
        inode = (info.st_dev, info.st_ino) if not stat.S_ISDIR(info.st_mode) else (-1, len(names))
        names.setdefault(inode, []).append(path)
    first = {path: top for group in names.values() for top in [min(group)] for path in group}
    return {path: Node(facts[path], first[path]) for path in facts}


def _walk(root: bytes) -> Iterator[bytes]:
    yield b""
    folders = [b""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                path = os.path.join(folder, entry.name)
                yield path
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)


def _facts(path: bytes, info: os.stat_result) -> dict[str, object]:
    facts: dict[str, object] = {
        "type": stat.filemode(info.st_mode)[0],
        "mode": oct(stat.S_IMODE(info.st_mode)),
        "uid": info.st_uid,
        "gid": info.st_gid,
        "mtime_ns": info.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False) for name in _attributes(path)},
    }
    if stat.S_ISREG(info.st_mode):
        facts["size"] = info.st_size
    elif stat.S_ISLNK(info.st_mode):
        facts["target"] = os.readlink(path)
    elif stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
        facts["device"] = (os.major(info.st_rdev), os.minor(info.st_rdev))
    return facts


def _attributes(path: bytes) -> list[str]:
    try:
        return sorted(set(os.listxattr(path, follow_symlinks=False)) - _SHOWN_TWICE)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # what a squashfs image says that holds none at all
            return []
        raise


def _same_content(reference: Path, image: Path, path: bytes) -> bool:
    with (
        open(os.path.join(os.fsencode(reference), path), "rb", buffering=0) as theirs,
        open(os.path.join(os.fsencode(image), path), "rb", buffering=0) as ours,
    ):
        while chunk := theirs.read(_CHUNK_BYTES):
            if ours.read(_CHUNK_BYTES) != chunk:
                return False
        return not ours.read(1)
