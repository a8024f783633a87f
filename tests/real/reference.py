"""The tree that `umoci unpack` makes of an image: what ours must equal."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from isal import igzip

from tests.tools import PATH

_open_gzip: Callable[[Path], BinaryIO] = igzip.open


@dataclass(frozen=True)
class Reference:
    """An unpacked image. `unstamped` are the folders, relative, whose mtime umoci makes up.

    Those are the ones that no layer has an entry for, and the ones that umoci made such folders in: it puts back the
    times of the folder that it adds a member to, not of one in which it had to add that member's missing parents.
    """

    root: Path
    layers: tuple[str, ...]
    unstamped: frozenset[bytes]


def unpack_reference(source: str, folder: Path, home: Path) -> Reference:
    """Fetch 'host:port/name:tag' and unpack it below `folder`."""
    folder.mkdir()
    layout = folder / "layout"
    environment = {"PATH": PATH, "HOME": str(home)}
    copy = ["skopeo", "copy", "--quiet", f"docker://{source}", f"oci:{layout}:latest"]
    subprocess.run(copy, env=environment, check=True, stdin=subprocess.DEVNULL)
    unpack = ["umoci", "unpack", "--image", f"{layout}:latest", str(folder / "bundle")]
    subprocess.run(unpack, env=environment, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    root = folder / "bundle" / "rootfs"
    layers = [layer["digest"] for layer in _manifest(layout)["layers"]]
    stamped = {path for digest in layers for path in _folders(_blob(layout, digest))}
    found = {os.fsencode(os.path.relpath(path, root)) for path, _, _ in os.walk(root)}
    present = {b"" if path == b"." else path for path in found}
    made_up = present - stamped
    return Reference(root, tuple(layers), frozenset(made_up | {os.path.dirname(path) for path in made_up}))


def _blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def _manifest(layout: Path) -> dict[str, Any]:
    [descriptor] = json.loads((layout / "index.json").read_bytes())["manifests"]
    manifest: dict[str, Any] = json.loads(_blob(layout, descriptor["digest"]).read_bytes())
    return manifest


def _folders(layer: Path) -> Iterator[bytes]:
    with _open_gzip(layer) as plain, tarfile.open(fileobj=plain, mode="r|", errors="surrogateescape") as archive:
        for member in archive:
            if member.isdir():
                path = os.path.normpath(member.name.lstrip("/"))
                yield b"" if path == "." else os.fsencode(path)


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Mount an image file read-only through a loop device, and let go of both at the end."""
    with TemporaryDirectory() as place:
        # noload: a clean journal need not be replayed, and a dirty one must not be hidden by replaying it.
        subprocess.run(["mount", "-o", "ro,loop,noload", image, place], check=True, env={"PATH": PATH})
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True, env={"PATH": PATH})


def fsck(image: Path) -> str:
    """Return what `e2fsck -fn` complains about, '' when the filesystem is clean."""
    done = subprocess.run(["e2fsck", "-fn", image], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr
