"""Where images come from: looking at them, and getting their blobs.

Registries, daemons, containers-storage and docker-archives are reached through skopeo, so the
host's registries.conf, policy.json and logins hold; OCI layouts and `dir:` folders are read as they
lie there. Every byte that leaves this module was checked against its digest. Nothing is kept here:
the caller gives a scratch folder, which holds nothing of ours when a call has ended, except the
blobs that a Resolution names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from fledge_tasks.digest import sha256_bytes, sha256_file
from fledge_tasks.errors import (
    ImageNotFoundError,
    NoDaemonError,
    OfflineError,
    SourceError,
)
from fledge_tasks.fsutil import move, remove_tree, temp_folder
from fledge_tasks.oci import daemon
from fledge_tasks.oci.layout import LocalImage, adopt, open_image, wrong_blob
from fledge_tasks.oci.manifest import (
    Descriptor,
    Image,
    LayerRef,
    Manifest,
    Platform,
    check_platform,
    find_manifest,
    image_from,
    parse,
)
from fledge_tasks.oci.reference import PATH_TRANSPORTS, Reference
from fledge_tasks.oci.skopeo import skopeo
from fledge_tasks.oci.transfer import watched

_T = TypeVar("_T")

_COPY = ("copy", "--quiet", "--remove-signatures", "--retry-times", "2")
_CHANGED_HINT = "run again"


@dataclass(frozen=True)
class Resolution:
    """What a reference stands for now.

    config    the image's config JSON, byte for byte
    identity  of a registry image the manifest's digest, of a local one what `identity` returns
    blobs     a folder inside the scratch folder that holds all layer blobs, unchecked, named by the
              hex digits of `LayerRef.blob`, when they had to be exported anyway; `layout.adopt`
              checks and takes them. None when `fetch` has to get them.
    """

    image: Image
    config: bytes
    identity: str
    blobs: Path | None = None


def resolve(
    reference: Reference,
    *,
    folder: Path,
    platform: str,
    scratch: Path,
    offline: bool = False,
    digest_of: Callable[[Path], str] = sha256_file,
) -> Resolution:
    """Find out which image a reference stands for.

    `folder` is where relative paths start; `digest_of` is that of `identity`. Without a transport
    the Docker daemon is asked first and the registry second; only 'no daemon' and 'no such image'
    lead to the registry. On an error the scratch folder holds nothing of this call. Raises
    ImageNotFoundError, NoDaemonError, OfflineError (the registry would be needed and `offline` is
    set), BlobError, SourceError, InputError (the platform), ToolError.
    """
    asked = Platform.parse(platform)
    scratch = Path(os.path.abspath(scratch))
    if reference.transport is None:
        return daemon_first(
            lambda: _resolve_daemon(reference, asked, scratch),
            lambda: _resolve_registry(reference, asked, scratch, offline),
        )
    if reference.transport == "docker":
        return _resolve_registry(reference, asked, scratch, offline)
    if reference.transport == "docker-daemon":
        return _resolve_daemon(reference, asked, scratch)
    seen = identity(reference, folder=folder, platform=platform, digest_of=digest_of) or ""
    if reference.transport in ("docker-archive", "containers-storage"):
        where = _where(reference, folder)
        with _work_folder(scratch, keep_on_success=True) as work:
            source, options = _export_source(reference, folder, work)
            blobs = _export(source, options, asked, work, where)
            return _read_export(blobs, reference.transport, asked, where=where, seen=seen)
    path = _local_path(reference, folder)
    where = _where(reference, folder)
    with open_image(path, reference.transport, where) as local:
        return _read(local, reference.tag, reference.transport, asked, where=where, seen=seen)


def identity(
    reference: Reference, *, folder: Path, platform: str, digest_of: Callable[[Path], str] = sha256_file
) -> str | None:
    """Return a text that changes when a local source changes; None for a registry image.

    Cheap: a daemon image's ID (nothing is exported), the digest of the manifest in a layout, of
    `manifest.json` and `version` in a `dir:` folder, of the manifest in containers-storage, and of
    an archive as a whole, for which `digest_of` may remember what it has read before. Without a
    transport it is None when the daemon does not have the image. Raises the errors of `resolve`.
    """
    asked = Platform.parse(platform)
    if reference.transport == "docker":
        return None
    if reference.transport == "docker-daemon":
        return daemon.inspect(reference.docker_name).id
    if reference.transport is None:
        with contextlib.suppress(NoDaemonError, ImageNotFoundError):
            return daemon.inspect(reference.docker_name).id
        return None
    where = _where(reference, folder)
    if reference.transport == "containers-storage":
        return sha256_bytes(skopeo(["inspect", "--raw", reference.canonical], where=where))
    path = _local_path(reference, folder)
    if reference.transport == "oci":
        with open_image(path, "oci", where) as local:
            manifest = find_manifest(local.top(reference.tag, asked), asked, local.read, where=where)
        return sha256_bytes(manifest)
    try:
        if reference.transport == "dir":
            state = hashlib.sha256((path / "manifest.json").read_bytes())
            with contextlib.suppress(FileNotFoundError):
                state.update((path / "version").read_bytes())
            return f"sha256:{state.hexdigest()}"
        return digest_of(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ImageNotFoundError("there is no image: it holds no manifest.json", where=where) from None
    except OSError as error:
        raise SourceError(f"cannot be read: {error}", where=where) from None


def daemon_first(ask_daemon: Callable[[], _T], ask_registry: Callable[[], _T]) -> _T:
    """Return what the Docker daemon answers, if there is one and it has the image; else what the registry does.

    Any other failure of the daemon is raised as it is; one of the registry says why the daemon did not have it.
    """
    try:
        return ask_daemon()
    except (NoDaemonError, ImageNotFoundError) as error:
        first = error
    try:
        return ask_registry()
    except SourceError as second:
        message = f"{second.message}\n  the Docker daemon was asked first: {first.message}"
        raise type(second)(message, where=second.where, hint=second.hint) from None


def fetch(
    reference: Reference,
    image: Image,
    wanted: Collection[LayerRef],
    *,
    folder: Path,
    into: Path,
    scratch: Path,
    advance: Callable[[int], None],
    arrived: Callable[[LayerRef], None] = lambda _: None,
    offline: bool = False,
) -> None:
    """Put the blob of each wanted layer of a resolved image at `into/<hex of LayerRef.blob>`.

    From a registry only the wanted blobs are transferred, by the manifest's digest. `advance` gets
    the growth in bytes, all in all the sum of the wanted sizes. `arrived` is told each blob once it
    is there, whole and checked, while others are still on their way, and may move it away: what stat
    says of it does not change any more. Both are called from another thread, too, one at a time; what
    `arrived` raises is raised here. With `scratch` on the filesystem of `into`, nothing is copied
    twice. Files are not synced. After an error `arrived` was told some of the wanted blobs; a second
    call starts from the beginning. Raises BlobError for a blob of another digest or size, SourceError
    when a local image is not the resolved one any more, and the errors of `resolve`.
    """
    layers = list({layer.blob: layer for layer in wanted}.values())
    if not layers:
        return
    total = sum(layer.size for layer in layers)
    where = _where(reference, folder)
    if image.origin == "docker" and offline:
        what = "a layer" if len(layers) == 1 else f"{len(layers)} layers"
        raise OfflineError(f"{what} would have to be fetched, which --offline forbids", where=where)
    with _work_folder(Path(os.path.abspath(scratch))) as work, contextlib.ExitStack() as stack:
        if image.origin in ("oci", "oci-archive", "dir"):
            local = stack.enter_context(open_image(_local_path(reference, folder), image.origin, where))
            for layer in layers:
                blob = work / _name(layer)
                local.copy(layer, blob, advance)
                adopt(blob, layer, into, where=where)
                blob.unlink()
                arrived(layer)
            return
        if image.origin == "docker" and not any(layer.is_foreign for layer in layers):
            _copy_from_registry(reference, image, layers, into, work, advance, arrived)
            return
        kept = set(map(_name, image.layers)) - set(map(_name, layers))
        with watched(work, kept, total, advance):
            blobs = _export_again(reference, image, folder, work, where)
        for layer in layers:
            blob = blobs / _name(layer)
            adopt(blob, layer, into, where=where)
            blob.unlink()
            arrived(layer)


def _resolve_registry(reference: Reference, platform: Platform, scratch: Path, offline: bool) -> Resolution:
    where = reference.canonical
    if offline:
        raise OfflineError("the registry would have to be asked, which --offline forbids", where=where)

    def read(descriptor: Descriptor) -> bytes:
        return skopeo(["inspect", "--raw", f"docker://{reference.name}@{descriptor.digest}"], where=where)

    with _work_folder(scratch) as work:
        top = skopeo(["inspect", "--raw", f"docker://{reference.docker_name}"], where=where)
        if reference.digest and sha256_bytes(top) != reference.digest:
            raise wrong_blob(reference.digest, sha256_bytes(top), "a manifest of that digest", where)
        manifest = find_manifest(top, platform, read, where=where)
        digest = sha256_bytes(manifest)
        by_digest = f"docker://{reference.name}@{digest}"
        config = skopeo(["inspect", "--config", "--raw", by_digest], where=where, work=work)
    image = image_from(manifest, config, origin="docker", platform=platform, where=where)
    return Resolution(image, config, identity=digest)


def _resolve_daemon(reference: Reference, platform: Platform, scratch: Path) -> Resolution:
    found = daemon.inspect(reference.docker_name)
    where = _where(reference, scratch)
    check_platform(found.os, found.architecture, found.variant, platform, where=where)
    with _work_folder(scratch, keep_on_success=True) as work:
        # By ID: a name could stand for another image by now.
        blobs = _export(f"docker-daemon:{found.id}", daemon.skopeo_options(), platform, work, where)
        resolution = _read_export(blobs, "docker-daemon", platform, where=where, seen=found.id)
        if found.is_config_id:
            _check_unchanged(resolution.image.config, found.id, where)
        return resolution


def _read_export(blobs: Path, origin: str, platform: Platform, *, where: str, seen: str) -> Resolution:
    with open_image(blobs, "dir", where) as local:
        return replace(_read(local, None, origin, platform, where=where, seen=seen), blobs=blobs)


def _read(local: LocalImage, tag: str | None, origin: str, platform: Platform, *, where: str, seen: str) -> Resolution:
    manifest = find_manifest(local.top(tag, platform), platform, local.read, where=where)
    document = parse(manifest, where=where)
    assert isinstance(document, Manifest)
    config = local.read(document.config)
    image = image_from(manifest, config, origin=origin, platform=platform, where=where)
    return Resolution(image, config, identity=seen)


def _copy_from_registry(
    reference: Reference,
    image: Image,
    layers: Sequence[LayerRef],
    into: Path,
    work: Path,
    advance: Callable[[int], None],
    arrived: Callable[[LayerRef], None],
) -> None:
    """Do what `fetch` does for a registry, with one skopeo for all `layers`."""
    where = reference.canonical
    missing = {_name(layer): layer for layer in layers}
    kept = {_name(layer): layer for layer in image.layers if _name(layer) not in missing}
    blobs = work / "layout" / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    for name, layer in kept.items():
        _stand_in(blobs / name, layer.size, work)

    def take(*, is_ended: bool = False) -> None:
        for name, layer in list(missing.items()):
            # skopeo gives a blob its name, the digest that it computed on the way, when it is whole.
            if is_ended or (blobs / name).exists():
                adopt(blobs / name, layer, into, where=where, digest=layer.blob)
                # Now, since the end of this second name changes the file's ctime. A retry looks for it.
                _stand_in(blobs / name, layer.size, work)
                del missing[name]
                arrived(layer)

    # Relative to the working folder, since ':' in a path confuses skopeo. Without the option it
    # would compress layers that are plain tars, under another digest.
    source = f"docker://{reference.name}@{image.manifest}"
    with watched(work, kept, sum(layer.size for layer in layers), advance, take):
        skopeo([*_COPY, "--dest-oci-accept-uncompressed-layers", source, "oci:layout"], where=where, work=work)
    take(is_ended=True)


def _stand_in(blob: Path, size: int, work: Path) -> None:
    """Put a file without data in the place of a blob: skopeo takes one of the right size for it (tried with 1.9)."""
    empty = work / "stand-in"
    with empty.open("xb") as file:
        file.truncate(size)
    move(empty, blob)


def _name(layer: LayerRef) -> str:
    """Return the name that a layer's blob has in a layout, and in `dir:`."""
    return layer.blob.removeprefix("sha256:")


def _export_again(reference: Reference, image: Image, folder: Path, work: Path, where: str) -> Path:
    platform = Platform.parse(image.platform)
    if image.origin == "docker":
        source, options = f"docker://{reference.name}@{image.manifest}", list[str]()
    elif image.origin == "docker-daemon":
        try:
            found = daemon.inspect(image.config)
        except ImageNotFoundError:  # the containerd image store does not know images by their config
            found = daemon.inspect(reference.docker_name)
        source, options = f"docker-daemon:{found.id}", daemon.skopeo_options()
    else:
        source, options = _export_source(reference, folder, work)
    blobs = _export(source, options, platform, work, where)
    with open_image(blobs, "dir", where) as local:
        document = parse(local.top(None, platform), where=where)
    if isinstance(document, Manifest):
        _check_unchanged(document.config.digest, image.config, where)
    return blobs


def _export_source(reference: Reference, folder: Path, work: Path) -> tuple[str, list[str]]:
    if reference.transport == "containers-storage":
        return reference.canonical, []
    # A link, since ':' in the path confuses skopeo.
    (work / "archive").symlink_to(_local_path(reference, folder))
    return "docker-archive:archive" + (f":{reference.tag}" if reference.tag else ""), []


def _export(source: str, options: Sequence[str], platform: Platform, work: Path, where: str) -> Path:
    # Into dir:, the one target that leaves layers as they are.
    override = ["--override-os", platform.os, "--override-arch", platform.architecture]
    if platform.variant:
        override += ["--override-variant", platform.variant]
    skopeo([*override, *_COPY, *options, source, "dir:export"], where=where, work=work)
    return work / "export"


def _check_unchanged(found: str, expected: str, where: str) -> None:
    if found != expected:
        message = f"the image changed meanwhile: found config {found}, expected {expected}"
        raise SourceError(message, where=where, hint=_CHANGED_HINT)


def _local_path(reference: Reference, folder: Path) -> Path:
    assert reference.transport in PATH_TRANSPORTS
    path = Path(os.path.abspath(folder / reference.path))
    if not path.exists():
        raise ImageNotFoundError(
            f"there is nothing at {path}", where=reference.canonical, hint=f"relative paths start at {folder}"
        )
    if path.is_dir() == reference.transport.endswith("-archive"):
        found, form = ("a folder", "oci: or dir:") if path.is_dir() else ("a file", "oci-archive: or docker-archive:")
        hint = f"the transport for that is {form}"
        raise SourceError(f"{path} is {found}", where=reference.canonical, hint=hint)
    return path


def _where(reference: Reference, folder: Path) -> str:
    if reference.transport not in PATH_TRANSPORTS:
        return reference.canonical
    return f"{reference.canonical} ({os.path.abspath(folder / reference.path)})"


@contextlib.contextmanager
def _work_folder(scratch: Path, *, keep_on_success: bool = False) -> Iterator[Path]:
    work = temp_folder(scratch, "source")
    try:
        yield work
    except BaseException:
        remove_tree(work)
        raise
    if not keep_on_success:
        remove_tree(work)
