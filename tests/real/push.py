"""Images made in Python and pushed over a registry's own HTTP API, a hundred times as quick as with skopeo.

As in the OCI distribution specification 1.0: 'Pushing blobs', 'Mounting a blob from another repository',
'Pushing manifests'.
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.layers import compress, digest

_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@dataclass(frozen=True)
class Layer:
    """A layer whose blob `repository` has."""

    blob: str
    size: int
    diff_id: str
    repository: str


class Pusher:
    """Pushes to the registry at `host`, each request over a connection of its own: the registry may have been down."""

    def __init__(self, host: str) -> None:
        self._host = host

    def layer(self, repository: str, tar: bytes) -> Layer:
        """Push a layer that is an uncompressed archive."""
        blob = compress(tar)
        self._upload(repository, blob)
        return Layer(digest(blob), len(blob), digest(tar), repository)

    def image(self, repository: str, tag: str, layers: Sequence[Layer], config: dict[str, Any] | None = None) -> None:
        """Push an image of layers, wherever in the registry they are; `config` is the OCI `config` object."""
        for layer in layers:
            if layer.repository != repository:
                query = urllib.parse.urlencode({"mount": layer.blob, "from": layer.repository})
                self._request("POST", f"/v2/{repository}/blobs/uploads/?{query}", 201)
        image = {
            "created": "2024-01-02T03:04:05Z",
            "architecture": "amd64",
            "os": "linux",
            "config": config or {"Cmd": ["/bin/app"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        data = json.dumps(image).encode()
        self._upload(repository, data)
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": {"mediaType": _CONFIG_TYPE, "digest": digest(data), "size": len(data)},
            "layers": [{"mediaType": _LAYER_TYPE, "digest": layer.blob, "size": layer.size} for layer in layers],
        }
        self._request("PUT", f"/v2/{repository}/manifests/{tag}", 201, json.dumps(manifest).encode(), _MANIFEST_TYPE)

    def _upload(self, repository: str, data: bytes) -> None:
        parts = urllib.parse.urlsplit(self._request("POST", f"/v2/{repository}/blobs/uploads/", 202))
        query = f"{parts.query}&{urllib.parse.urlencode({'digest': digest(data)})}"
        self._request("PUT", f"{parts.path}?{query}", 201, data)

    def _request(
        self, method: str, path: str, expected: int, body: bytes = b"", kind: str = "application/octet-stream"
    ) -> str:
        """Return the Location of the answer, which must have the status `expected`."""
        connection = http.client.HTTPConnection(self._host, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": kind})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status != expected:
            raise RuntimeError(f"{method} {path}: {answer.status}, expected {expected}: {text[:500]!r}")
        return answer.getheader("Location") or ""
