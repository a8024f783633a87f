"""A generated monorepo: images on a few bases in a registry, and the workspace that builds them.

Everything comes from numbers, so each run has the same images.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.layers import Member, archive
from tests.real.push import Layer, Pusher
from tests.workspaces import Workspace

MAPPED_FILES = 6


@dataclass(frozen=True)
class Shape:
    """How large things are: `base` and `own` are (files, bytes of each) of a base and of an image's own layer."""

    bases: int
    base: tuple[int, int]
    own: tuple[int, int]

    def payload_bytes(self, images: int) -> int:
        """Return the bytes of all files in the layers of so many images, each layer counted once."""
        return min(images, self.bases) * self.base[0] * self.base[1] + images * self.own[0] * self.own[1]


class Monorepo:
    """Images `<prefix>-0000` and on, image n on base n modulo the number of bases."""

    def __init__(self, host: str, prefix: str, shape: Shape) -> None:
        self.shape = shape
        self._host = host
        self._prefix = prefix
        self._pusher = Pusher(host)
        self.bases = [
            self._pusher.layer(f"{prefix}-base", _tar(f"base {number}", shape.base, f"usr/lib/base{number}"))
            for number in range(shape.bases)
        ]
        self.own: list[Layer] = []

    def name(self, number: int) -> str:
        """Return the name of an image, which is its repository's, too."""
        return f"{self._prefix}-{number:04d}"

    def add(self, workspace: Workspace, count: int) -> None:
        """See to it that the registry has the first `count` images, and the workspace describes them.

        Each has a mapped file, and a mapped folder of six files and a folder.
        """
        for number in range(len(self.own), count):
            name = self.name(number)
            self.own.append(self._pusher.layer(name, _tar(name, self.shape.own, "srv/app")))
            config = {"Cmd": ["/srv/app/0/0"], "Labels": {"name": name}}
            self._pusher.image(name, "1", [self.bases[number % len(self.bases)], self.own[-1]], config)
        for number in range(count):
            name = self.name(number)
            folder = workspace.add(
                name, f"docker://{self._host}/{name}:1", buffer_mb=1,
                mappings={"static": "/srv/static", "service.conf": "/etc/service.conf"},
            )  # fmt: skip
            if not (folder / "static").exists():
                (folder / "static" / "below").mkdir(parents=True)
                (folder / "service.conf").write_text(f"name={name}\n")
                for file in range(MAPPED_FILES):
                    (folder / "static" / ("below" if file % 2 else "") / f"{file}.txt").write_text(f"{name} {file}\n")


def _tar(seed: str, shape: tuple[int, int], start: str) -> bytes:
    return archive(_members(seed, *shape, start))


def _members(seed: str, files: int, size: int, start: str) -> Iterator[Member]:
    """Yield files that are half noise and half text: gzip makes about half of them, as of real programs."""
    numbers = random.Random(seed)
    text = (f"{seed}: the quick brown fox jumps over the lazy dog\n" * (size // 40 + 1)).encode()
    for number in range(files):
        data = numbers.randbytes(size // 2) + text[: size - size // 2]
        yield Member(f"{start}/{number // 50}/{number}", data, mode=0o755 if number % 5 == 0 else 0o644)
