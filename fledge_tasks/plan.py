"""What an image is made of: the records and keys of all its stages, before anything is fetched."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import Digest
from fledge_tasks.errors import InputError
from fledge_tasks.keys import Agent, Assemble, Blob, Config, Customize, Manifest, Mkfs, Unpack, Verity
from fledge_tasks.lock import LockedImage
from fledge_tasks.oci.manifest import LayerRef
from fledge_tasks.oci.reference import Reference

EPOCH_VARIABLE = "SOURCE_DATE_EPOCH"
_MAX_EPOCH = 1 << 32  # the superblock's times that we can fake have 32 bits


@dataclass(frozen=True)
class Layer:
    """One layer of an image, and the records of its blob and of what it is unpacked to."""

    ref: LayerRef
    blob: Blob
    unpack: Unpack

    @classmethod
    def of(cls, ref: LayerRef) -> Layer:
        """Return the records of a layer."""
        return cls(ref, Blob(digest=ref.blob, size=ref.size), Unpack(diff_id=ref.diff_id))

    @property
    def unpack_key(self) -> Digest:
        """The key of the unpacked layer."""
        return self.unpack.key()


@dataclass(frozen=True)
class ImagePlan:
    """All that is known of an image's build before it starts.

    `sources` maps destinations of mapped files to host paths; `agent_path` is that of a local agent.
    `salt` and `verity_tools` are those of the hash tree.
    """

    image: ImageConfig
    reference: Reference
    locked: LockedImage
    layers: tuple[Layer, ...]
    config: Config
    agent: Agent | None
    agent_path: Path | None
    sources: dict[str, Path]
    customize: Customize
    mkfs: Mkfs
    assemble: Assemble
    salt: str
    verity_tools: tuple[str, ...]
    output: Path
    tree_output: Path
    manifest_output: Path

    @property
    def keys(self) -> list[Digest]:
        """The keys of all entries that a build of the image uses or makes."""
        layers = [key for layer in self.layers for key in (layer.blob.key(), layer.unpack_key)]
        own = [record.key() for record in (self.config, self.customize, self.mkfs)]
        return list(dict.fromkeys([*layers, *own, *([self.agent.key()] if self.agent else [])]))

    @property
    def published(self) -> list[Path]:
        """The files that a build of the image publishes, in the order in which they are made."""
        tree = [self.tree_output] if self.image.output.verity else []
        return [self.output, *tree, self.manifest_output]

    def verity(self, raw_checksum: str) -> Verity:
        """Return the record of the hash tree for a raw image of this digest."""
        identity = uuid.uuid5(uuid.UUID(self.mkfs.uuid), "hash tree")
        return Verity(checksum=raw_checksum, salt=self.salt, uuid=str(identity), tools=self.verity_tools)

    def manifest(self, checksum: str, labels: Mapping[str, str] | None = None) -> Manifest:
        """Return the record of the manifest for an image file of this digest, and what labels say of it."""
        return Manifest(
            user=msgspec.json.encode(self.image.manifest, order="sorted").decode(),
            name=self.image.name,
            image=self.reference.canonical,
            image_digest=self.locked.image.manifest,
            config=self.config.digest,
            filesystem=self.image.filesystem.type,
            rootfs=str(self.output),
            format=other_format(self.image),
            checksum=checksum,
            labels=dict(labels or {}),
        )


def other_format(image: ImageConfig) -> Literal["qcow2"] | None:
    """Return the disk format of an image's file, None for raw."""
    return None if image.output.format == "raw" else image.output.format


def source_date_epoch() -> int | None:
    """Return SOURCE_DATE_EPOCH if it is set. Raises InputError when it is not a number of seconds."""
    text = os.environ.get(EPOCH_VARIABLE)
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) >= _MAX_EPOCH:
        raise InputError(
            f"found {text!r}, expected seconds since 1970 below {_MAX_EPOCH}", where=f"variable {EPOCH_VARIABLE}"
        )
    return int(text)
