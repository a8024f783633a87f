"""Image manifests, indexes and configs: pure parsing of bytes that strangers wrote.

Formats: OCI image spec 1.1 ('manifest.md', 'image-index.md', 'config.md') and Docker image manifest
version 2, schema 2. Every function raises SourceError for whatever is not well-formed, BlobError for
bytes that are not the promised ones, and nothing else. No file and no network is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from fledge_tasks.digest import is_digest, sha256_bytes
from fledge_tasks.errors import NOT_DECODED, BlobError, InputError, SourceError

MANIFEST_LIMIT_BYTES = 4 << 20
CONFIG_LIMIT_BYTES = 8 << 20
INDEX_DEPTH = 2
_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64"}
_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
_FOREIGN = ("nondistributable", "foreign")

_Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_T = TypeVar("_T")


class LayerRef(msgspec.Struct, frozen=True):
    """One layer of an image.

    diff_id     digest of the uncompressed tar, which names the layer
    blob, size  digest and bytes of the blob as it is transferred, usually compressed
    media_type  as the manifest has it; '' where it has none
    """

    diff_id: str
    blob: str
    size: int
    media_type: str

    @property
    def is_foreign(self) -> bool:
        """Whether the blob may have to be had from URLs in the manifest (OCI 'Non-Distributable Layers')."""
        return any(word in self.media_type for word in _FOREIGN)


class Image(msgspec.Struct, frozen=True):
    """One image for one platform.

    origin            transport that it was found with: 'docker', 'docker-daemon', 'oci', …
    manifest, config  digests
    platform          the platform that was asked for, normalised
    layers            lowest first; empty for an image made from nothing
    """

    origin: str
    manifest: str
    config: str
    platform: str
    layers: tuple[LayerRef, ...]


class PlatformFields(msgspec.Struct, frozen=True):
    """The `platform` of a descriptor, as it stands."""

    os: str = ""
    architecture: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """OCI image spec 'descriptor.md'. `digest` is unchecked text until it is used."""

    digest: str
    size: _Size
    media_type: str = ""
    platform: PlatformFields | None = None
    annotations: dict[str, str] | None = None


class Index(msgspec.Struct, frozen=True):
    """An image index or manifest list."""

    manifests: tuple[Descriptor, ...]


class Manifest(msgspec.Struct, frozen=True):
    """An image manifest. All digests in it are sha256."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


class _Document(msgspec.Struct, rename="camel"):
    schema_version: int = 0
    media_type: str = ""
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None
    manifests: list[Descriptor] | None = None


class _Rootfs(msgspec.Struct):
    type: str = ""
    diff_ids: list[str] | None = None


class _Config(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    rootfs: _Rootfs | None = None


@dataclass(frozen=True)
class Platform:
    """os/architecture[/variant], with the names that Go uses ('amd64', 'arm64')."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Parse `linux/arm64/v8`. Raises InputError."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise InputError(f"{text!r} is not a platform", hint="write os/architecture[/variant], such as linux/amd64")
        return cls.normal(*parts)

    @classmethod
    def normal(cls, os: str, architecture: str, variant: str = "") -> Platform:
        """Return the platform with aliases resolved (containerd 'platforms' does the same)."""
        lower = architecture.lower()
        return cls(os.lower(), _ARCHITECTURES.get(lower, lower), variant.lower())

    @property
    def full_variant(self) -> str:
        """The variant that is meant when none is written."""
        return self.variant or _DEFAULT_VARIANT.get(self.architecture, "")


def parse(data: bytes, *, where: str) -> Index | Manifest:
    """Parse a manifest or index. Raises SourceError."""
    document = _decode(_Document, data, MANIFEST_LIMIT_BYTES, "manifest", where)
    if document.schema_version == 1:
        raise SourceError(
            "the image has a manifest of Docker's schema 1, which was given up in 2017 and names no layer contents",
            where=where,
            hint="push the image again with a current tool, for example: skopeo copy --format v2s2 docker://… docker://…",
        )
    if document.schema_version != 2:
        raise SourceError(f"schemaVersion of the manifest is {document.schema_version}, expected 2", where=where)
    is_index = document.manifests is not None
    is_manifest = document.config is not None or document.layers is not None
    if is_index and is_manifest:  # CVE-2021-41190: two readers would see two images
        raise SourceError("the manifest is a manifest and an index at once", where=where)
    if document.manifests is not None:
        return Index(tuple(document.manifests))
    if document.config is None:
        kind = f" ({document.media_type})" if document.media_type else ""
        raise SourceError(f"not the manifest of an image{kind}: it has no config", where=where)
    layers = tuple(document.layers or ())
    for descriptor in (document.config, *layers):
        check_digest(descriptor.digest, where=where)
    return Manifest(document.config, layers)


def select_platform(index: Index, platform: Platform, *, where: str) -> Descriptor:
    """Return the entry of an index for a platform; its digest is a sha256.

    os and architecture must be equal. A variant that is asked for must be the entry's, where arm64
    means v8, arm v7 and amd64 v1 if nothing is written. When none is asked for, an entry without one
    comes first, then the one that is meant by default, then the first in the list. Attestations
    ('unknown/unknown') are not images. A single entry without a platform is taken as it is, since
    its own content says what it is for. Raises SourceError that lists what is there.
    """
    entries = [(entry, entry.platform or PlatformFields()) for entry in index.manifests]
    known = [
        (Platform.normal(fields.os, fields.architecture, fields.variant), entry)
        for entry, fields in entries
        if (fields.os, fields.architecture) != ("unknown", "unknown")
    ]
    matches = [
        (found, entry)
        for found, entry in known
        if (found.os, found.architecture) == (platform.os, platform.architecture)
        and (not platform.variant or found.full_variant == platform.variant)
    ]
    default = Platform(platform.os, platform.architecture).full_variant
    matches.sort(key=lambda match: 0 if not match[0].variant else 1 if match[0].variant == default else 2)
    unnamed = [entry for found, entry in known if not found.os and not found.architecture]
    chosen = matches[0][1] if matches else unnamed[0] if len(unnamed) == len(known) == 1 else None
    if chosen is None:
        there = ", ".join(dict.fromkeys(str(found) or "(none)" for found, _ in known)) or "none"
        raise SourceError(
            f"there is no image for {platform}; there are: {there}",
            where=where,
            hint="choose one of them with [source] platform",
        )
    check_digest(chosen.digest, where=where)
    return chosen


def find_manifest(data: bytes, platform: Platform, read: Callable[[Descriptor], bytes], *, where: str) -> bytes:
    """Return the bytes of the image manifest that a manifest or index leads to.

    `read` gets the bytes of a descriptor, which are checked here. An index may stand inside an
    index; a third level is refused. Raises SourceError, BlobError, and what `read` raises.
    """
    for _ in range(INDEX_DEPTH):
        document = parse(data, where=where)
        if isinstance(document, Manifest):
            return data
        chosen = select_platform(document, platform, where=where)
        data = read(chosen)
        check_bytes(data, chosen, where=where)
    if isinstance(parse(data, where=where), Index):
        raise SourceError(f"indexes inside indexes, more than {INDEX_DEPTH} deep", where=where)
    return data


def image_from(manifest: bytes, config: bytes, *, origin: str, platform: Platform, where: str) -> Image:
    """Return the image of a manifest and its config.

    The config must be the one that the manifest names and be for `platform`; the layers of both must
    agree in number, and be tar archives. Raises SourceError, BlobError.
    """
    document = parse(manifest, where=where)
    if isinstance(document, Index):
        raise SourceError("an index where a manifest was expected", where=where)
    check_bytes(config, document.config, where=where)
    fields = _decode(_Config, config, CONFIG_LIMIT_BYTES, "config", where)
    parse_config(config, where=where)  # what others read in it later must be well-formed, too
    if fields.rootfs is None or fields.rootfs.type != "layers":
        kind = document.config.media_type or "unknown"
        raise SourceError(f"not an image but another artifact: its config ({kind}) describes no rootfs", where=where)
    check_platform(fields.os, fields.architecture, fields.variant, platform, where=where)
    diff_ids = fields.rootfs.diff_ids or []
    if len(diff_ids) != len(document.layers):
        raise SourceError(
            f"the manifest has {len(document.layers)} layers, the config has {len(diff_ids)} diff_ids", where=where
        )
    return Image(
        origin=origin,
        manifest=sha256_bytes(manifest),
        config=document.config.digest,
        platform=str(platform),
        layers=tuple(_layers(diff_ids, document.layers, where)),
    )


def parse_config(config: bytes, *, where: str) -> dict[str, Any]:
    """Return all of an image config, of whatever types its values are. Raises SourceError."""
    return _decode(dict[str, Any], config, CONFIG_LIMIT_BYTES, "config", where)


def diff_ids(config: bytes, *, where: str) -> tuple[str, ...]:
    """Return the diff IDs of an image's layers, from the lowest up (OCI image spec, config.md). Raises SourceError."""
    fields = _decode(_Config, config, CONFIG_LIMIT_BYTES, "config", where)
    return tuple(fields.rootfs.diff_ids or ()) if fields.rootfs else ()


def check_platform(os: str, architecture: str, variant: str, asked: Platform, *, where: str) -> None:
    """Raise SourceError when an image is for another platform; what it does not say is not compared."""
    found = Platform.normal(os, architecture, variant)
    if (
        (found.os and found.os != asked.os)
        or (found.architecture and found.architecture != asked.architecture)
        or (asked.variant and found.variant and found.variant != asked.variant)
    ):
        raise SourceError(
            f"the image is for {found}, asked for was {asked}",
            where=where,
            hint=f'set platform = "{found}" in [source], or name an image for {asked}',
        )


def check_bytes(data: bytes, descriptor: Descriptor, *, where: str) -> None:
    """Raise BlobError when bytes are not those that a descriptor promises."""
    found = sha256_bytes(data)
    if found != descriptor.digest or len(data) != descriptor.size:
        raise BlobError(
            f"blob {descriptor.digest}: found {found} of {len(data)} bytes, expected {descriptor.size} bytes",
            where=where,
            hint="the source is damaged or was tampered with; push or export the image again",
        )


def check_digest(digest: str, *, where: str) -> None:
    """Raise SourceError for a digest that is not a sha256."""
    if not is_digest(digest):
        raise SourceError(f"digest {digest[:100]!r} is not 'sha256:' and 64 lower-case hexadecimal digits", where=where)


def _layers(diff_ids: Iterable[str], descriptors: Iterable[Descriptor], where: str) -> Iterable[LayerRef]:
    for diff_id, descriptor in zip(diff_ids, descriptors, strict=True):
        check_digest(diff_id, where=where)
        kind = descriptor.media_type
        if kind.endswith("+encrypted"):
            raise SourceError(f"layer {descriptor.digest} is encrypted ({kind})", where=where)
        if kind and "tar" not in kind:
            raise SourceError(f"layer {descriptor.digest} is not a tar archive but {kind[:100]!r}", where=where)
        yield LayerRef(diff_id, descriptor.digest, descriptor.size, kind)


def _decode(kind: type[_T], data: bytes, limit: int, what: str, where: str) -> _T:
    if len(data) > limit:
        raise SourceError(f"the {what} is larger than {limit >> 20} MiB", where=where)
    try:
        return msgspec.json.decode(data, type=kind)
    except NOT_DECODED as error:
        raise SourceError(f"the {what} is not well-formed: {error}", where=where) from None
