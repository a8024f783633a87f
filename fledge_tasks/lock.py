"""fledge.lock: what every reference was resolved to, so that builds are repeatable. People commit it.

    fledge.lock = {"version": 1,
                   "images": {"<reference> <platform>": locked image},
                   "agents": {"<agent>": {"digest"[, "url"]}}}
    locked image = {"image": image, "identity", "created"}
    image        = {"origin", "manifest", "config", "platform", "layers": [layer]}
    layer        = {"diff_id", "blob", "size", "media_type"}

Paths in references are relative to the workspace. `identity` is what a local source is recognised
by in later runs, `created` the image's creation time in seconds since the epoch. `url` is where the agent of
that digest can be had when its own address, say that of 'latest', leads to another one. Keys are sorted,
so that two branches that lock different images merge.

Version history: 1 first version.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import msgspec

from fledge_tasks import fsutil
from fledge_tasks.digest import is_digest
from fledge_tasks.errors import NOT_DECODED, LockError
from fledge_tasks.index import signature
from fledge_tasks.oci.manifest import Image

VERSION = 1
_HINT = "restore it from version control, or delete it and run `fledge lock`"


class LockedImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One resolved reference for one platform."""

    image: Image
    identity: str
    created: int


class LockedAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One downloaded agent."""

    digest: str
    url: str | None = None


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of a lock file."""

    version: int = VERSION
    images: dict[str, LockedImage] = {}
    agents: dict[str, LockedAgent] = {}


class LockFile:
    """The lock file at `path`; reading is cheap as long as it does not change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: list[int] | None = None
        self._content = Content()

    def read(self) -> Content:
        """Return its content, an empty one when there is no file. Raises LockError."""
        try:
            seen = signature(self.path.stat())
        except FileNotFoundError:
            self._seen, self._content = None, Content()
            return self._content
        except OSError as error:
            raise LockError(f"cannot be read: {error.strerror}", where=str(self.path), hint=_HINT) from None
        if seen != self._seen:
            if not self.path.is_file():
                raise LockError("cannot be read: it is not a file", where=str(self.path), hint=_HINT)
            try:
                content = msgspec.json.decode(self.path.read_bytes(), type=Content)
            except (OSError, *NOT_DECODED) as error:
                raise LockError(f"cannot be read: {error}", where=str(self.path), hint=_HINT) from None
            if content.version != VERSION:
                raise LockError(
                    f"is of version {content.version}, expected {VERSION}",
                    where=str(self.path),
                    hint="it was written by another fledge-tasks: update it, or delete the file and run `fledge lock`",
                )
            if wrong := next((text for text in _digests(content) if not is_digest(text)), None):
                message = f"cannot be read: found {wrong!r}, expected 'sha256:' and 64 lower-case hexadecimal digits"
                raise LockError(message, where=str(self.path), hint=_HINT)
            self._seen, self._content = seen, content
        return self._content

    def update(self, images: Mapping[str, LockedImage], agents: Mapping[str, LockedAgent]) -> None:
        """Add or replace entries, atomically. The caller holds the file's lock. Raises LockError, OSError."""
        content = self.read()
        self._write(Content(VERSION, {**content.images, **images}, {**content.agents, **agents}))

    def keep_only(self, images: Collection[str], agents: Collection[str]) -> None:
        """Drop all other entries, atomically. The caller holds the file's lock."""
        content = self.read()
        self._write(
            Content(
                VERSION,
                {name: value for name, value in content.images.items() if name in images},
                {name: value for name, value in content.agents.items() if name in agents},
            )
        )

    def _write(self, content: Content) -> None:
        if content != self._content:
            data = msgspec.json.format(msgspec.json.encode(content, order="sorted"), indent=2)
            fsutil.write_atomic(self.path, data + b"\n")


def _digests(content: Content) -> Iterator[str]:
    """Yield all digests: they become parts of file names, so nothing else may stand there."""
    for locked in content.images.values():
        yield from (locked.image.manifest, locked.image.config)
        for layer in locked.image.layers:
            yield from (layer.diff_id, layer.blob)
    for agent in content.agents.values():
        yield agent.digest
