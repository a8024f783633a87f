"""Asking a Docker daemon which image a name stands for (Docker Engine API, `GET /images/{name}/json`).

Only looks: images are exported by skopeo. Asking costs milliseconds, so it is done in every run.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import msgspec

from fledge_tasks.digest import is_digest
from fledge_tasks.errors import NOT_DECODED, ImageNotFoundError, NoDaemonError, SourceError

DEFAULT_HOST = "unix:///var/run/docker.sock"
TIMEOUT_SECONDS = 10.0
_ANSWER_LIMIT_BYTES = 8 << 20
_SKIP_HINT = "write docker:// in front of the image to ask the registry only"


@dataclass(frozen=True)
class DaemonImage:
    """An image as the daemon has it.

    id            `sha256:…`
    is_config_id  whether the ID is the digest of the image's config; with the containerd image
                  store it is the digest of its manifest or index
    config        what the object `config` of its OCI config holds, as far as the daemon knows it
    """

    id: str
    is_config_id: bool
    os: str
    architecture: str
    variant: str
    config: dict[str, Any] = field(default_factory=dict)


class _Inspect(msgspec.Struct, rename="pascal"):
    id: str
    os: str = ""
    architecture: str = ""
    variant: str = ""
    descriptor: dict[str, object] | None = None
    config: dict[str, Any] | None = None


def host() -> str:
    """Return the address of the daemon: DOCKER_HOST, or the default socket."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_HOST


def skopeo_options() -> list[str]:
    """Return what skopeo's `copy` needs to find the same daemon; it does not read DOCKER_HOST.

    Raises SourceError for an address that we cannot use.
    """
    address = _address()
    if address.scheme == "unix":
        return ["--src-daemon-host", f"unix://{address.path}"]
    if not _uses_tls():  # containers/image takes tcp:// for TLS, http:// for plain text
        return ["--src-daemon-host", f"http://{address.netloc}"]
    return ["--src-daemon-host", f"tcp://{address.netloc}", "--src-cert-dir", str(_cert_folder())]


def inspect(name: str) -> DaemonImage:
    """Return the image that the daemon has under a name or ID.

    Raises NoDaemonError when nothing listens, ImageNotFoundError when the daemon does not have the
    image, SourceError for anything else; connecting and answering may each take TIMEOUT_SECONDS.
    """
    where = host()
    connection = _connection(_address())
    try:
        connection.connect()
        with _deadline(connection.sock):
            connection.request("GET", f"/images/{quote(name, safe='/:@')}/json", headers={"Host": "docker"})
            with connection.getresponse() as response:
                body = response.read(_ANSWER_LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
        raise NoDaemonError(f"there is no Docker daemon ({error.strerror})", where=where) from None
    except PermissionError as error:
        hint = f"join the group 'docker' (sudo usermod -aG docker $USER, then log in again), or {_SKIP_HINT}"
        raise SourceError(f"the Docker daemon cannot be asked: {error.strerror}", where=where, hint=hint) from None
    except TimeoutError:
        message = f"the Docker daemon did not answer within {TIMEOUT_SECONDS:g} seconds"
        raise SourceError(message, where=where, hint=_SKIP_HINT) from None
    except (OSError, http.client.HTTPException) as error:
        raise SourceError(f"the Docker daemon cannot be asked: {error}", where=where, hint=_SKIP_HINT) from None
    finally:
        connection.close()
    if response.status == http.client.NOT_FOUND:
        raise ImageNotFoundError(f"the Docker daemon has no image {name}", where=where)
    if response.status != http.client.OK:
        said = body[:500].decode(errors="replace").strip()
        raise SourceError(f"the Docker daemon answered {response.status}: {said}", where=where, hint=_SKIP_HINT)
    return parse_answer(body, where)


@contextlib.contextmanager
def _deadline(connected: socket.socket) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer than TIMEOUT_SECONDS: that of a socket is for each byte anew."""
    has_passed = threading.Event()
    # Of our own, since the connection closes its socket when the answer has begun.
    own = socket.socket(fileno=os.dup(connected.fileno()))

    def end() -> None:
        has_passed.set()
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT_SECONDS, end)
    timer.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not has_passed.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()
        own.close()
    if has_passed.is_set():
        raise TimeoutError


def parse_answer(body: bytes, where: str) -> DaemonImage:
    """Return the image that a daemon's answer describes. Raises SourceError."""
    try:
        if len(body) > _ANSWER_LIMIT_BYTES:
            raise msgspec.ValidationError("it is too long")
        fields = msgspec.json.decode(body, type=_Inspect)
        # Podman's emulation of this API leaves out the algorithm.
        identity = fields.id if ":" in fields.id else f"sha256:{fields.id}"
        if not is_digest(identity):
            raise msgspec.ValidationError(f"image ID {fields.id[:100]!r}")
    except NOT_DECODED as error:
        raise SourceError(f"what answers is no Docker daemon: {error}", where=where, hint=_SKIP_HINT) from None
    # Only the containerd image store answers with the descriptor of a manifest.
    is_config_id = fields.descriptor is None
    return DaemonImage(identity, is_config_id, fields.os, fields.architecture, fields.variant, fields.config or {})


def _address() -> SplitResult:
    try:
        address = urlsplit(host())
        usable = bool(address.path) if address.scheme == "unix" else address.scheme == "tcp" and bool(address.port)
    except ValueError:
        usable = False
    if not usable:
        raise SourceError(
            "this address of a Docker daemon cannot be used; expected unix:///path or tcp://host:port",
            where=f"DOCKER_HOST={host()}",
            hint=_SKIP_HINT,
        )
    return address


def _uses_tls() -> bool:
    return bool(os.environ.get("DOCKER_TLS_VERIFY"))


def _cert_folder() -> Path:
    return Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")


def _connection(address: SplitResult) -> http.client.HTTPConnection:
    if address.scheme == "unix":
        return _UnixConnection(address.path)
    if not _uses_tls():
        return http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS)
    folder = _cert_folder()
    try:
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    except OSError as error:
        message = f"the certificates for the Docker daemon cannot be read: {error}"
        raise SourceError(message, where=str(folder), hint="see DOCKER_CERT_PATH and DOCKER_TLS_VERIFY") from None
    return http.client.HTTPSConnection(address.hostname or "", address.port, timeout=TIMEOUT_SECONDS, context=context)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)
