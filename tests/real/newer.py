"""Newer filesystem tools than the machine's own: real ones from later Debian releases, with the libraries they need.

They are kept in the cache folder of the real images. `bin` holds a wrapper for each, to be put on PATH.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from tests.real.images import cache_folder
from tests.tools import need

SUITES = {
    "forky": ("xfsprogs", "btrfs-progs"),
    "trixie": ("btrfs-progs", "erofs-utils", "squashfs-tools", "squashfs-tools-ng"),
}
"""The releases, and what is taken from them."""

_PROGRAMS = (
    "mkfs.xfs", "xfs_db", "xfs_repair", "mkfs.btrfs", "btrfs", "mkfs.erofs", "fsck.erofs", "sqfstar", "tar2sqfs",
)  # fmt: skip


def tools_of(suite: str) -> Path:
    """Return the folder with the tools of a release, fetched if they are not there yet."""
    need("mmdebstrap")
    wanted = hashlib.sha256(repr((SUITES[suite], _PROGRAMS)).encode()).hexdigest()
    folder = cache_folder() / f"tools-{suite}-{wanted[:8]}"
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not (folder / "bin").is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            _fetch(suite, folder / "root")
            _wrap(folder / "root", folder / "bin")
    return folder / "bin"


def _fetch(suite: str, root: Path) -> None:
    root.parent.mkdir()
    # Unpacked, not installed. Archives that are mirrored rarely have outdated lists.
    options = ["--quiet", "--variant=extract", '--aptopt=Acquire::Check-Valid-Until "false"']
    command = ["mmdebstrap", *options, f"--include={','.join(SUITES[suite])}", suite, str(root)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    root.chmod(0o755)


def _wrap(root: Path, folder: Path) -> None:
    [loader] = (root / "usr/lib").glob("*/ld-linux-*.so.*")
    scripts = {}
    for name in _PROGRAMS:
        for place in (root / "usr/sbin" / name, root / "usr/bin" / name):
            if place.exists():
                library, program = loader.relative_to(root), place.relative_to(root)
                scripts[name] = (
                    '#!/bin/sh\nroot="${0%/*}/../root"\n'
                    f'exec "$root/{library}" --library-path "$root/{library.parent}" "$root/{program}" "$@"\n'
                )
    part = folder.with_name("part")
    part.mkdir()
    for name, text in scripts.items():
        (part / name).write_text(text)
        (part / name).chmod(0o755)
    part.rename(folder)
