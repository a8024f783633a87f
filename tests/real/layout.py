"""Writes OCI image layouts from tar layers: for images that no container tool can make.

The layout is the one of the OCI image-layout specification 1.0: `oci-layout`, `index.json`, `blobs/sha256/`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_CHUNK_BYTES = 1 << 20
_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass
class Member:
    """One tar member. `pax` holds PAX records as they are, for example `mtime` or `SCHILY.xattr.user.x`."""

    name: str
    type: bytes = tarfile.REGTYPE
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 1_600_000_000
    link: str = ""
    device: tuple[int, int] = (0, 0)
    pax: dict[str, str] = field(default_factory=dict)


def write_tar(path: Path, members: Iterable[Member]) -> None:
    """Write a PAX tar with these members, in this order, one at a time."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.mode, info.uid, info.gid = member.type, member.mode, member.uid, member.gid
            info.mtime, info.linkname, info.size = member.mtime, member.link, len(member.content)
            info.devmajor, info.devminor = member.device
            info.pax_headers = dict(member.pax)
            archive.addfile(info, io.BytesIO(member.content))


def write_layout(folder: Path, tars: Iterable[Path], config: dict[str, Any] | None = None, tag: str = "latest") -> None:
    """Write `folder` as an OCI layout with one image of these layers; `config` is the OCI `config` object."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    layers, diff_ids = [], []
    for tar in tars:
        descriptor, diff_id = _add_layer(blobs, tar)
        layers.append(descriptor)
        diff_ids.append(diff_id)
    image = {
        "created": "2024-01-02T03:04:05Z",
        "architecture": "amd64",
        "os": "linux",
        "config": config or {"Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2024-01-02T03:04:05Z", "created_by": f"layer {diff_id}"} for diff_id in diff_ids],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST_TYPE,
        "config": {"mediaType": _CONFIG_TYPE, **_add_json(blobs, image)},
        "layers": layers,
    }
    named = {"mediaType": _MANIFEST_TYPE, **_add_json(blobs, manifest)}
    index = {
        "schemaVersion": 2,
        "mediaType": _INDEX_TYPE,
        "manifests": [{**named, "annotations": {"org.opencontainers.image.ref.name": tag}}],
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def _add_layer(blobs: Path, tar: Path) -> tuple[dict[str, Any], str]:
    plain, partial = hashlib.sha256(), blobs / "partial"
    with partial.open("wb") as raw, gzip.GzipFile("", "wb", 1, raw, mtime=0) as packed:
        for chunk in _chunks(tar):
            plain.update(chunk)
            packed.write(chunk)
    digest = hashlib.sha256()
    for chunk in _chunks(partial):
        digest.update(chunk)
    size = partial.stat().st_size
    partial.rename(blobs / digest.hexdigest())
    return {"mediaType": _LAYER_TYPE, "digest": f"sha256:{digest.hexdigest()}", "size": size}, (
        f"sha256:{plain.hexdigest()}"
    )


def _add_json(blobs: Path, value: dict[str, Any]) -> dict[str, Any]:
    data = json.dumps(value, sort_keys=True).encode()
    name = hashlib.sha256(data).hexdigest()
    (blobs / name).write_bytes(data)
    return {"digest": f"sha256:{name}", "size": len(data)}


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk
