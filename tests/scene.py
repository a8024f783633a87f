"""Hostile images built in a workspace, beside a folder that they would like to reach.

Whatever is built, nothing outside the cache and the build folder may change: names, content, modes,
owners and times are compared. What is refused leaves nothing behind, and does not stand in the way
of what comes next.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.layers import Member, digest
from tests.layouts import Layout, Place
from tests.workspaces import Result

Facts = dict[str, tuple[object, ...]]
Change = Callable[[dict[str, Any]], dict[str, Any] | bytes]


@dataclass
class Scene:
    """A workspace with one image, 'bad', made of `oci:../layouts/bad`; `outside` holds what must stay as it is."""

    place: Place
    outside: Path

    @property
    def layout(self) -> Layout:
        """The layout of the image."""
        return self.place.layout("bad")

    def image(self, more: str = "", source: str = "oci:../layouts/bad") -> Layout:
        """Write the image's fledge.toml and return its layout, which is not there yet."""
        self.place.add("bad", source, more=more, buffer_mb=1)
        return self.layout

    def build(self, *arguments: str) -> Result:
        """Run `fledge build`, by which nothing outside changes."""
        before = dict(self._facts())
        result = self.place.fledge("build", *arguments)
        assert dict(self._facts()) == before
        return result

    def refused(self, *words: str, stage: str, name: str = "") -> str:
        """Build the image, which must fail in `stage` with one error of these words, and return it.

        `name` is the digest of the layer or blob that fails, when others of the image do not.
        """
        result = self.build()
        assert result.code == 1, result.stderr
        assert "Traceback" not in result.stderr
        errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result.stderr
        assert errors[0].startswith(f"error: {stage}:")
        message = result.stderr[result.stderr.index(errors[0]) :]
        assert [word for word in words if word not in message] == [], message
        assert len(message) < 2000
        assert message.replace("\n", "").isprintable()
        assert self.place.leftovers() == []
        assert self.cached(name).isdisjoint(_STAGES[_STAGES.index(stage) :])
        assert "mkfs" not in self.cached()
        return message

    def cached(self, name: str = "") -> set[str]:
        """Return the stages of which the cache holds results, or those that were made from what has that digest."""
        records = [json.loads(path.read_bytes()) for path in self.place.root.glob("cache/objects/*/*/entry.json")]
        return {_MADE_BY.get(record["stage"], record["stage"]) for record in records if name in record["key_text"]}

    def recovers(self) -> None:
        """Put a good image in the place of the bad one, which must be built with the same cache."""
        self.layout.write([Member("good", b"good")])
        result = self.build()
        assert result.code == 0, result.stderr
        assert self.place.output("bad").exists()

    def _facts(self) -> Iterator[tuple[str, tuple[object, ...]]]:
        root = self.place.root
        own = {root / "cache", root / "build", root / "fledge.lock"}
        for folder, folders, files in os.walk(root.parent):
            folders[:] = [name for name in folders if Path(folder, name) not in own]
            for name in [*folders, *files, "."]:
                path = Path(folder, name)
                if path in own or path == root:
                    continue
                facts = path.lstat()
                content: object = None
                if stat.S_ISREG(facts.st_mode):
                    content = digest(path.read_bytes())
                elif stat.S_ISLNK(facts.st_mode):
                    content = path.readlink()
                times = (facts.st_mtime_ns, facts.st_ctime_ns)
                yield str(path), (facts.st_mode, facts.st_uid, facts.st_gid, facts.st_nlink, *times, content)


_STAGES = ("resolve", "fetch", "unpack", "mkfs")
_MADE_BY = {"config": "resolve", "blob": "fetch"}


def make(folder: Path) -> Scene:
    """Make a scene with nothing built yet."""
    place, outside = Place(folder / "workspace", folder / "home"), folder / "outside"
    for path in (place.root, place.home, outside / "folder"):
        path.mkdir(parents=True)
    (outside / "secret").write_text("secret")
    (outside / "secret").chmod(0o640)
    (outside / "folder" / "file").write_text("file")
    (outside / "link").symlink_to("secret")
    os.link(outside / "secret", outside / "second-name")
    os.mkfifo(outside / "fifo")
    for path in (outside / "secret", outside / "folder", outside):
        os.utime(path, ns=(1, 1_500_000_000_123_456_789))
    return Scene(place, outside)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return make(tmp_path)


def rewrite(layout: Layout, *, config: Change = dict, manifest: Change = dict, index: Change = dict) -> None:
    """Change the JSON of an image, and make every digest and size above a change true again."""
    top = json.loads((layout.path / "index.json").read_bytes())
    middle = json.loads(_blob(layout, top["manifests"][0]).read_bytes())
    bottom = json.loads(_blob(layout, middle["config"]).read_bytes())
    _put(layout, middle["config"], config(bottom))
    _put(layout, top["manifests"][0], manifest(middle))
    (layout.path / "index.json").write_bytes(encoded(index(top)))


def encoded(value: dict[str, Any] | bytes) -> bytes:
    """Return JSON, bytes as they are."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def _blob(layout: Layout, descriptor: dict[str, Any]) -> Path:
    return layout.path / "blobs" / str(descriptor["digest"]).replace(":", "/")


def _put(layout: Layout, descriptor: dict[str, Any], value: dict[str, Any] | bytes) -> None:
    data = encoded(value)
    descriptor.update(digest=digest(data), size=len(data))
    _blob(layout, descriptor).write_bytes(data)
