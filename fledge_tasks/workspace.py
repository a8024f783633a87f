"""A workspace: a folder, every image described below it, and where its cache and results live."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from fledge_tasks.config import FILE_NAME, ImageConfig
from fledge_tasks.config import load as load_config
from fledge_tasks.errors import ConfigError, InputError, Problem
from fledge_tasks.shapes import quoted, suggestion

CACHE_VARIABLE = "FLEDGE_CACHE_DIR"
LOCK_NAME = "fledge.lock"
IMAGE_NAMES = {"raw": "rootfs.img", "qcow2": "rootfs.qcow2"}
"""The name of an image's disk by its format."""
MANIFEST_NAME = "manifest.json"
TREE_NAME = "rootfs.verity"

_SKIPPED = frozenset({"node_modules"})
_SAMPLE = """`fledge init --image nginx:alpine` writes one; by hand, the least is:
    version = "1"
    strategy = "oci_rootfs"
    [source]
    image = "nginx:alpine"
    [filesystem]
    type = "ext4"
    size_buffer_mb = 100"""


class Workspace(msgspec.Struct, frozen=True):
    """The images below `root`, sorted by name; names differ in more than case. All paths are absolute."""

    root: Path
    images: tuple[ImageConfig, ...]
    cache: Path
    build: Path
    lock: Path

    def select(self, names: Iterable[str]) -> tuple[ImageConfig, ...]:
        """Return the images of these names, all without any name, sorted, each once.

        Raises InputError for the names that no image has.
        """
        wanted = set(names)
        known = {image.name: image for image in self.images}
        if unknown := sorted(wanted - known.keys()):
            close = {name: suggestion(name, known) for name in unknown}
            hints = [f"{quoted(name)}: {hint}" if len(unknown) > 1 else hint for name, hint in close.items() if hint]
            raise InputError(
                f"no image is named {', '.join(map(quoted, unknown))}",
                where=str(self.root),
                hint="\n".join([*hints, f"there are: {', '.join(known)}"]),
            )
        return tuple(image for image in self.images if not wanted or image.name in wanted)

    def output(self, image: ImageConfig) -> Path:
        """Return where the image's disk is published."""
        return self.build / image.name / IMAGE_NAMES[image.output.format]

    def outputs(self, image: ImageConfig) -> set[Path]:
        """Return all that builds of the image may have published, in whatever form."""
        folder = self.build / image.name
        return {folder / name for name in (*IMAGE_NAMES.values(), TREE_NAME, MANIFEST_NAME)}

    def tree_output(self, image: ImageConfig) -> Path:
        """Return where the hash tree of the image's disk is published, if there is to be one."""
        return self.build / image.name / TREE_NAME

    def manifest_output(self, image: ImageConfig) -> Path:
        """Return where the image's manifest is published."""
        return self.build / image.name / MANIFEST_NAME


def cache_folder(root: Path) -> Path:
    """Return where the cache is: FLEDGE_CACHE_DIR, relative to the current folder, else `cache` of the root."""
    return Path(os.path.realpath(os.environ.get(CACHE_VARIABLE) or root / "cache"))


def load(root: Path) -> Workspace:
    """Find and read every fledge.toml in `root` and below.

    Not looked into: `build` and `cache` of the root, the cache folder in use, hidden folders,
    node_modules, links to folders, and folders that this user may not read.

    Raises InputError when `root` is no folder, has a path that is not UTF-8, or holds no fledge.toml,
    and ConfigError with every problem of every file, two images of one name included.
    """
    if not os.path.isdir(root):
        raise InputError(
            "not a folder" if os.path.lexists(root) else "no such folder",
            where=str(root),
            hint=f"give the folder that holds {FILE_NAME} or folders with one",
        )
    root = Path(os.path.realpath(root))
    if not _is_unicode(root):
        raise InputError("its path is not UTF-8, and manifests hold paths as text", where=_shown(str(root)))
    build, cache = root / "build", cache_folder(root)
    files = sorted(_find(root, {str(build), str(root / "cache"), str(cache)}))
    if not files:
        raise InputError(f"found no {FILE_NAME} in this folder or below", where=str(root), hint=_SAMPLE)
    images: list[tuple[str, ImageConfig]] = []
    problems: list[Problem] = []
    for file in files:
        shown = _shown(os.path.relpath(file, root))
        try:
            images.append((shown, load_config(Path(file), shown)))
        except ConfigError as error:
            problems.extend(error.problems)
    problems.extend(_name_clashes(images))
    if problems:
        raise ConfigError(problems)
    by_name = tuple(sorted((image for _, image in images), key=lambda image: image.name))
    return Workspace(root, by_name, cache, build, root / LOCK_NAME)


def _find(root: Path, skipped: set[str]) -> Iterator[str]:
    folders = [str(root)]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(folder)
        except OSError as error:
            # A folder below may belong to a database of another user, or have just gone away.
            if folder != str(root) and isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError):
                continue
            raise InputError(f"cannot be read: {error.strerror}", where=folder) from None
        with entries:
            for entry in entries:
                if entry.name == FILE_NAME:
                    yield entry.path
                elif entry.is_dir(follow_symlinks=False) and not (
                    entry.name.startswith(".") or entry.name in _SKIPPED or entry.path in skipped
                ):
                    folders.append(entry.path)


def _is_unicode(path: Path) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in str(path))


def _shown(path: str) -> str:
    """Return a path for messages, whatever bytes it has."""
    return path if path.isprintable() else path.encode("unicode_escape").decode()


def _name_clashes(images: list[tuple[str, ImageConfig]]) -> Iterator[Problem]:
    """Yield a problem for each image whose name is taken; build/ may lie on a filesystem that ignores case."""
    taken: dict[str, tuple[str, str]] = {}
    for shown, image in images:
        name, file = taken.setdefault(image.name.lower(), (image.name, shown))
        if file != shown:
            like = "has already" if name == image.name else f"has already as {quoted(name)}"
            message = f"found the image name {quoted(image.name)}, which {file} {like}"
            yield Problem(shown, "manifest.name", message, "give one of them another name in its [manifest] table")
