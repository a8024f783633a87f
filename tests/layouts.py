"""OCI layouts made of layers in memory, and `fledge build` run on them inside the test process."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fledge_tasks.cli import main
from tests.layers import Compression, Member, archive, compress, digest
from tests.workspaces import Result, Workspace

CREATED = "2024-01-02T03:04:05Z"
CREATED_SECONDS = 1704164645
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
_SUFFIX = {"gzip": "+gzip", "zstd": "+zstd", "none": ""}


@dataclass
class Layout:
    """An OCI layout with one image in it. `diff_ids` and `blobs` are those of its layers, from the lowest up."""

    path: Path
    diff_ids: tuple[str, ...] = ()
    blobs: tuple[str, ...] = ()

    def write(
        self,
        *layers: Iterable[Member],
        config: dict[str, Any] | None = None,
        compression: Compression = "gzip",
        created: str = CREATED,
        diff_ids: Sequence[str] = (),
    ) -> Layout:
        """Make it hold one image of these layers, and nothing else; `diff_ids` are lies about them."""
        tars = [archive(members) for members in layers]
        return self.write_tars(tars, config=config, compression=compression, created=created, diff_ids=diff_ids)

    def write_tars(
        self,
        tars: Sequence[bytes],
        *,
        config: dict[str, Any] | None = None,
        compression: Compression = "gzip",
        created: str = CREATED,
        diff_ids: Sequence[str] = (),
        blobs: Mapping[int, bytes] | None = None,
        tag: str | None = None,
    ) -> Layout:
        """Like `write`, for layers that are archives already; `blobs` are other ones for some of them."""
        shutil.rmtree(self.path, ignore_errors=True)
        (self.path / "blobs" / "sha256").mkdir(parents=True)
        self.diff_ids = tuple(diff_ids) or tuple(digest(tar) for tar in tars)
        packed = {number: compress(tar, compression) for number, tar in enumerate(tars)} | dict(blobs or {})
        layers = [self._put(blob, mediaType=_LAYER_TYPE + _SUFFIX[compression]) for blob in packed.values()]
        self.blobs = tuple(layer["digest"] for layer in layers)
        image = {
            "created": created,
            "architecture": "amd64",
            "os": "linux",
            "config": {"Cmd": ["/bin/app"]} if config is None else config,
            "rootfs": {"type": "layers", "diff_ids": list(self.diff_ids)},
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self._json(image, mediaType="application/vnd.oci.image.config.v1+json"),
            "layers": layers,
        }
        entry = self._json(manifest, mediaType=manifest["mediaType"])
        if tag is not None:
            entry["annotations"] = {"org.opencontainers.image.ref.name": tag}
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        return self

    def blob(self, number: int) -> Path:
        """Return the file of a layer's blob."""
        return self.path / "blobs" / "sha256" / self.blobs[number].removeprefix("sha256:")

    def _json(self, value: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return self._put(json.dumps(value, sort_keys=True).encode(), **fields)

    def _put(self, data: bytes, **fields: Any) -> dict[str, Any]:
        name = digest(data)
        (self.path / "blobs" / "sha256" / name.removeprefix("sha256:")).write_bytes(data)
        return {"digest": name, "size": len(data), **fields}


class Place(Workspace):
    """A workspace whose commands run in this process, which is much quicker.

    `layouts/` holds its images; `env` is of no effect, tests set their own.
    """

    def layout(self, name: str) -> Layout:
        """Return the layout that the reference `oci:../layouts/NAME` of an image leads to."""
        return Layout(self.root / "layouts" / name)

    def add_layout(self, name: str, *layers: Iterable[Member], more: str = "", **options: Any) -> Layout:
        """Add an image, made of `layers`; `options` are those of `add`."""
        options.setdefault("buffer_mb", 1)
        self.add(name, f"oci:../layouts/{name}", more=more, **options)
        return self.layout(name).write(*layers)

    def fledge(self, *arguments: str, timeout: float = 0) -> Result:  # noqa: ARG002
        """Run `fledge` to its end, with one job if nothing else is said: the test process is costly to fork."""
        if arguments[0] in {"build", "lock"} and "-j" not in arguments:
            arguments = (*arguments, "-j", "1")
        with (
            mock.patch.object(sys, "argv", ["fledge", "-C", str(self.root), *arguments]),
            io.TextIOWrapper(io.BytesIO(), write_through=True) as stdout,
            io.TextIOWrapper(io.BytesIO(), write_through=True) as stderr,
        ):
            with (
                contextlib.redirect_stdout(stdout),
                contextlib.redirect_stderr(stderr),
                pytest.raises(SystemExit) as end,
            ):
                main()
            gc.enable()  # a build leaves it off
            printed = [stream.buffer.getvalue().decode() for stream in (stdout, stderr)]
        return Result(int(end.value.code or 0), *printed)
