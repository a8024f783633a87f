"""Keys: what each stage is made from, as frozen records. Every field is key material.

The key of a record is the sha256 of a readable text, one line per value, that is stored with what
was built:

    text  = first line*
    first = "fledge-tasks " stage " " format number "\\n"
    line  = field ("." field | "[" number "]")* " = " JSON value "\\n"

Paths of the host, times, the build folder and the number of jobs are in no record, so a key is the
same on every machine. A change of what a stage writes for the same fields is a new format number.

Version history of the formats: all 1, first version.
"""

from __future__ import annotations

import functools
import json
from typing import ClassVar, Literal

import msgspec

from fledge_tasks.config import Compression
from fledge_tasks.digest import Digest, sha256_bytes
from fledge_tasks.filesystem_settings import Filesystem
from fledge_tasks.mappings import MappedFile

_quoted = json.encoder.encode_basestring_ascii  # what json.dumps does to a string, without its preparations


class Stage(msgspec.Struct, frozen=True, kw_only=True, dict=True):  # dict: for the cached property
    """Base of the records. A subclass's name, in lower case, is the name of its stage."""

    FORMAT: ClassVar[int] = 1

    @classmethod
    def stage(cls) -> str:
        """Return the name of the stage."""
        return cls.__name__.lower()

    def text(self) -> str:
        """Return the text whose sha256 is the key."""
        lines = _lines("", msgspec.to_builtins(self))
        return "".join([f"fledge-tasks {self.stage()} {self.FORMAT}\n", *lines])

    def key(self) -> Digest:
        """Return the key."""
        return self._key

    @functools.cached_property
    def _key(self) -> Digest:
        return sha256_bytes(self.text().encode())


def _lines(name: str, value: object) -> list[str]:
    lines: list[str] = []
    _add_lines(lines, name, value)
    return lines


def _add_lines(lines: list[str], name: str, value: object) -> None:
    if isinstance(value, str):  # nearly all
        lines.append(f"{name} = {_quoted(value)}\n")
    elif type(value) is int:
        lines.append(f"{name} = {value}\n")
    elif isinstance(value, dict) and value:
        for field, below in sorted(value.items()):
            _add_lines(lines, f"{name}.{field}" if name else str(field), below)
    elif isinstance(value, (list, tuple)) and value:
        for number, below in enumerate(value):
            _add_lines(lines, f"{name}[{number}]", below)
    else:
        lines.append(f"{name} = {json.dumps(value)}\n")


class Config(Stage, frozen=True, kw_only=True):
    """An image's OCI config JSON. Made by the stage 'resolve'."""

    digest: str


class Agent(Stage, frozen=True, kw_only=True):
    """A downloaded agent binary. Made by the stage 'resolve'."""

    digest: str


class Blob(Stage, frozen=True, kw_only=True):
    """A layer as it is transferred. Made by the stage 'fetch', dropped once it is unpacked."""

    digest: str
    size: int


class Unpack(Stage, frozen=True, kw_only=True):
    """An unpacked layer, whatever compression it came in."""

    diff_id: str


class Customize(Stage, frozen=True, kw_only=True):
    """The layer that comes on top: OCI config, agent, mapped files. Made by the stage 'mkfs'."""

    config: str
    agent: str | None
    mapped: tuple[MappedFile, ...]
    epoch: int


class Content(Stage, frozen=True, kw_only=True):
    """What an image is made from, without our formats and the tools' versions: names its UUID."""

    diff_ids: tuple[str, ...]
    customization: Customize
    filesystem: Filesystem


class Mkfs(Stage, frozen=True, kw_only=True):
    """A filesystem without its file data."""

    layers: tuple[str, ...]
    """Keys of the unpacked layers, from the lowest up, and of the customization."""
    filesystem: Filesystem
    epoch: int
    uuid: str
    tools: tuple[str, ...]


class Assemble(Stage, frozen=True, kw_only=True, omit_defaults=True):
    """An image file. `format` is None for a raw one; `tools` are those that make another of it.

    What is not used is in no text. msgspec knows a default by its identity: None, not 'raw'.
    """

    filesystem: str
    preallocate: bool
    format: Literal["qcow2"] | None = None
    compression: Compression | None = None
    tools: tuple[str, ...] = ()


class Verity(Stage, frozen=True, kw_only=True):
    """The hash tree of an image file. `checksum` is that of what a guest sees, the raw image."""

    checksum: str
    salt: str
    uuid: str
    tools: tuple[str, ...]


class Manifest(Stage, frozen=True, kw_only=True, omit_defaults=True):
    """A manifest file. Unlike all others it names a path of this host, since its content does."""

    user: str
    name: str
    image: str
    image_digest: str
    config: str
    filesystem: str
    rootfs: str
    checksum: str
    format: Literal["qcow2"] | None = None
    labels: dict[str, str] = {}
    """Those that come of the image file, beside what `filesystem` says."""
