"""A container registry on loopback, and what its access log says was moved."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ACCEPT = ", ".join(
    [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ]
)
_BLOB_GET = re.compile(r'"GET /v2/[^ ]+/blobs/(sha256:[0-9a-f]{64}) HTTP/1\.\d" 200 ')
_START_SECONDS = 20.0


class Registry:
    """docker-registry, serving `storage` over plain HTTP on a free loopback port that it keeps for life.

    `home` is a home folder whose registries.conf calls it insecure: skopeo 1.9 reads that file from $HOME only.
    With `logins`, the text of an htpasswd file (bcrypt), nobody else gets anything.
    """

    def __init__(self, storage: Path, scratch: Path, logins: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{free.getsockname()[1]}"
        self.home = scratch / "home"
        self._log = scratch / "registry.log"
        self._config = scratch / "registry.yml"
        self._process: subprocess.Popen[bytes] | None = None
        settings: dict[str, Any] = {
            "version": "0.1",
            "log": {"accesslog": {"disabled": False}, "level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(storage)}},
            "http": {"addr": self.host},
        }
        if logins is not None:
            (scratch / "htpasswd").write_text(logins)
            settings["auth"] = {"htpasswd": {"realm": "test", "path": str(scratch / "htpasswd")}}
        storage.mkdir(parents=True, exist_ok=True)
        self._config.write_text(json.dumps(settings))  # JSON is YAML
        conf = self.home / ".config" / "containers" / "registries.conf"
        conf.parent.mkdir(parents=True)
        conf.write_text(f'[[registry]]\nlocation = "{self.host}"\ninsecure = true\n')

    def start(self) -> None:
        """Start serving and wait until it answers. Raises RuntimeError with its log when it does not."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(self._config)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                urllib.request.urlopen(f"http://{self.host}/v2/", timeout=5).close()
            except urllib.error.HTTPError as error:
                if error.code == 401:
                    return
                time.sleep(0.05)
            except OSError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(f"docker-registry does not answer:\n{self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End the server and wait for it; the stored images stay."""
        if self._process:
            self._process.terminate()
            self._process.wait()
            self._process = None

    @contextmanager
    def down(self) -> Iterator[None]:
        """Serve nothing inside the block: connections are refused."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def manifest(self, name: str, tag: str) -> dict[str, Any] | None:
        """Return a manifest as stored, None when there is none of this tag."""
        request = urllib.request.Request(f"http://{self.host}/v2/{name}/manifests/{tag}", headers={"Accept": _ACCEPT})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                manifest: dict[str, Any] = json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return None
        return manifest

    @contextmanager
    def transfers(self) -> Iterator[list[str]]:
        """Collect the digests of all blobs that are fetched inside the block; the list is filled at its end."""
        start, moved = self._log.stat().st_size, list[str]()
        yield moved
        time.sleep(0.2)  # a line is logged after the answer's last byte has left
        with self._log.open("rb") as log:
            log.seek(start)
            moved.extend(_BLOB_GET.findall(log.read().decode(errors="replace")))
