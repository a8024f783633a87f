"""The Docker daemon's side, against a daemon that we play; skopeo is the real one."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer, ThreadingUnixStreamServer
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from fledge_tasks.digest import sha256_bytes, sha256_file
from fledge_tasks.errors import ImageNotFoundError, NoDaemonError, OfflineError, SourceError
from fledge_tasks.oci import daemon
from fledge_tasks.oci.daemon import DaemonImage
from fledge_tasks.oci.layout import adopt
from fledge_tasks.oci.reference import parse
from fledge_tasks.oci.source import fetch, identity, resolve

ID = f"sha256:{'1' * 64}"
if shutil.which("skopeo") is None and os.environ.get("FLEDGE_REQUIRE_TOOLS"):
    raise RuntimeError("missing: skopeo")
needs_skopeo = pytest.mark.skipif(shutil.which("skopeo") is None, reason="missing: skopeo")


class FakeDaemon:
    """What a daemon knows: (status, body) of each name, archives of each ID, and what was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.archives: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.delay = 0.0

    def has(self, name: str, identity: str, **fields: object) -> None:
        body = {"Id": identity, "Os": "linux", "Architecture": "amd64", **fields}
        self.answers[name] = (200, json.dumps(body).encode())

    def answer(self, path: str) -> tuple[int, bytes]:
        path = re.sub(r"^/v1\.\d+", "", unquote(path))
        self.asked.append(path)
        time.sleep(self.delay)
        if found := re.fullmatch(r"/images/(.+)/json", path):
            return self.answers.get(found[1], (404, b'{"message":"No such image"}'))
        if found := re.fullmatch(r"/images/get\?names=(.+)|/images/(.+)/get", path):
            name = found[1] or found[2]
            return (200, self.archives[name]) if name in self.archives else (404, b'{"message":"No such image"}')
        return (200, b"OK") if path == "/_ping" else (500, b"not known here")


class Handler(BaseHTTPRequestHandler):
    daemon: ClassVar[FakeDaemon]

    def do_GET(self) -> None:
        status, body = self.daemon.answer(self.path)
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def address_string(self) -> str:
        return "client"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""


@contextlib.contextmanager
def serving(server: ThreadingUnixStreamServer | ThreadingTCPServer) -> Iterator[None]:
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    fake = FakeDaemon()
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
    with serving(ThreadingUnixStreamServer(str(path), type("Bound", (Handler,), {"daemon": fake}))):
        yield fake


class TestInspect:
    def test_an_image(self, fake: FakeDaemon) -> None:
        fake.has("a.b/c:1", ID, Variant="v8")
        assert daemon.inspect("a.b/c:1") == DaemonImage(ID, True, "linux", "amd64", "v8")

    def test_the_containerd_store_names_images_by_manifest(self, fake: FakeDaemon) -> None:
        fake.has("x:1", ID, Descriptor={"digest": ID})
        fake.has("x:2", ID, Descriptor=None)
        assert not daemon.inspect("x:1").is_config_id
        assert daemon.inspect("x:2").is_config_id

    def test_an_id_without_its_algorithm(self, fake: FakeDaemon) -> None:
        fake.has("x:1", "1" * 64)
        assert daemon.inspect("x:1").id == ID

    def test_an_image_that_is_not_there(self, fake: FakeDaemon) -> None:
        with pytest.raises(ImageNotFoundError, match="has no image x:1"):
            daemon.inspect("x:1")
        assert fake.asked == ["/images/x:1/json"]

    @pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"Id": 3}', b'{"Id": "../x"}', b"\xff", b"[" * 100_000])
    def test_answers_that_no_daemon_gives(self, fake: FakeDaemon, body: bytes) -> None:
        fake.answers["x:1"] = (200, body)
        with pytest.raises(SourceError, match="no Docker daemon"):
            daemon.inspect("x:1")

    def test_an_answer_that_is_too_long(self, fake: FakeDaemon) -> None:
        fake.answers["x:1"] = (200, json.dumps({"Id": ID, "x": "y" * (9 << 20)}).encode())
        with pytest.raises(SourceError, match="too long"):
            daemon.inspect("x:1")

    def test_a_failure_is_shown(self, fake: FakeDaemon) -> None:
        fake.answers["x:1"] = (500, b'{"message":"disk on fire"}')
        with pytest.raises(SourceError, match=r"answered 500: .*disk on fire") as caught:
            daemon.inspect("x:1")
        assert "docker://" in (caught.value.hint or "")

    def test_a_daemon_that_hangs(self, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(daemon, "TIMEOUT_SECONDS", 0.1)
        fake.delay = 1
        with pytest.raises(SourceError, match=r"did not answer within 0\.1 seconds") as caught:
            daemon.inspect("x:1")
        assert type(caught.value) is SourceError

    @pytest.mark.parametrize("head", [b"HTTP/1.1 ", b"HTTP/1.1 200 OK\r\nX-A: ", b"HTTP/1.1 200 OK\r\n\r\n"])
    def test_a_daemon_that_drips(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
        """A byte from time to time: the timeout of the socket never comes."""
        monkeypatch.setattr(daemon, "TIMEOUT_SECONDS", 0.2)

        def drip(connection: socket.socket) -> None:
            connection.sendall(head)
            while True:
                connection.sendall(b"2")
                time.sleep(0.01)

        with self.answering(tmp_path, monkeypatch, drip), pytest.raises(SourceError, match="did not answer within"):
            daemon.inspect("a:1")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 70_000 + b"\r\n\r\n", "got more than 65536 bytes"),
            (b"HTTP/1.1 200 OK\r\n" + b"X-A: a\r\n" * 101 + b"\r\n", "got more than 100 headers"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", "what answers is no Docker daemon"),
            (b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (9 << 20), "it is too long"),
            (b"HTTP/1.1 301 Moved\r\nLocation: file:///etc/passwd\r\n\r\n", "the Docker daemon answered 301: "),
            (b"HTTP/1.1 500 No\r\n\r\n\x1b[2Jgone", r"the Docker daemon answered 500: \x1b[2Jgone"),
        ],
    )
    def test_hostile_answers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, message: str
    ) -> None:
        with (
            self.answering(tmp_path, monkeypatch, lambda connection: connection.sendall(answer)),
            pytest.raises(SourceError) as caught,
        ):
            daemon.inspect("a:1")
        assert message in str(caught.value)
        assert str(caught.value).replace("\n", "").isprintable()

    @contextlib.contextmanager
    def answering(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[socket.socket], None]
    ) -> Iterator[None]:
        """Have one connection answered by whoever that is."""
        path = str(folder / "other.sock")
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen()

            def serve() -> None:
                connection, _ = server.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(1000)
                    answer(connection)

            threading.Thread(target=serve, daemon=True).start()
            yield

    def test_what_hangs_up(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/s")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / "s"))
            server.listen()

            def hang_up() -> None:
                server.accept()[0].close()

            thread = threading.Thread(target=hang_up)
            thread.start()
            with pytest.raises(SourceError, match="cannot be asked") as caught:
                daemon.inspect("x:1")
            thread.join()
        assert type(caught.value) is SourceError

    def test_a_daemon_on_tcp(self, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
        fake.has("x:1", ID)
        server = ThreadingTCPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"daemon": fake}))
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{server.server_address[1]}")
        with serving(server):
            assert daemon.inspect("x:1").id == ID


class TestAddress:
    @pytest.mark.parametrize("kind", ["absent", "not a folder", "file", "dead", "tcp"])
    def test_no_daemon(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        path = tmp_path / "s"
        if kind in ("file", "not a folder"):
            path.touch()
        if kind == "dead":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(str(path))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = {"tcp": f"tcp://127.0.0.1:{port}", "not a folder": f"unix://{path}/s"}.get(kind, f"unix://{path}")
        monkeypatch.setenv("DOCKER_HOST", address)
        with pytest.raises(NoDaemonError) as caught:
            daemon.inspect("x:1")
        assert caught.value.where == address

    def test_a_socket_that_we_may_not_open(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(daemon._UnixConnection, "connect", refuse)
        with pytest.raises(SourceError, match="Permission denied") as caught:
            daemon.inspect("x:1")
        assert type(caught.value) is SourceError
        assert "docker://" in (caught.value.hint or "")
        assert "usermod" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        "address", ["ssh://host", "npipe:////./pipe/docker", "tcp://host", "tcp://h:x", "unix://", "x", "http://[::1"]
    )
    def test_addresses_that_cannot_be_used(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        monkeypatch.setenv("DOCKER_HOST", address)
        for ask in (lambda: daemon.inspect("x:1"), daemon.skopeo_options):
            with pytest.raises(SourceError, match="cannot be used") as caught:
                ask()
            assert caught.value.where == f"DOCKER_HOST={address}"

    def test_a_path_that_is_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", "unix:///" + "x" * 200)
        with pytest.raises(SourceError, match="too long"):
            daemon.inspect("x:1")

    def test_the_default_socket(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DOCKER_HOST", raising=False)
        assert daemon.host() == "unix:///var/run/docker.sock"

    def test_what_skopeo_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("DOCKER_TLS_VERIFY", raising=False)
        monkeypatch.setenv("DOCKER_HOST", "unix:///run/x.sock")
        assert daemon.skopeo_options() == ["--src-daemon-host", "unix:///run/x.sock"]
        monkeypatch.setenv("DOCKER_HOST", "tcp://h:2375")
        assert daemon.skopeo_options() == ["--src-daemon-host", "http://h:2375"]
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", "/certs")
        assert daemon.skopeo_options() == ["--src-daemon-host", "tcp://h:2375", "--src-cert-dir", "/certs"]

    def test_certificates_that_are_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", str(tmp_path))
        with pytest.raises(SourceError, match="certificates") as caught:
            daemon.inspect("x:1")
        assert caught.value.where == str(tmp_path)


def saved_image(*contents: bytes, compress: bool = False) -> tuple[str, bytes, list[str]]:
    """Return the ID, the `docker save` archive and the diff IDs of an image."""
    tars = []
    for content in contents:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as layer:
            member = tarfile.TarInfo("file")
            member.size = len(content)
            layer.addfile(member, io.BytesIO(content))
        tars.append(buffer.getvalue())
    diff_ids = [str(sha256_bytes(tar)) for tar in tars]
    config = json.dumps(
        {"os": "linux", "architecture": "amd64", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    ).encode()
    identity = sha256_bytes(config)
    names = [f"{number}/layer.tar" for number in range(len(tars))]
    listing = [{"Config": f"{identity[7:]}.json", "RepoTags": ["x:1"], "Layers": names}]
    files = {f"{identity[7:]}.json": config, "manifest.json": json.dumps(listing).encode()}
    files |= {name: gzip.compress(tar) if compress else tar for name, tar in zip(names, tars, strict=True)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return identity, buffer.getvalue(), diff_ids


@needs_skopeo
class TestSource:
    NAME = "docker.io/library/x:1"

    @pytest.mark.parametrize("image", ["x:1", "docker-daemon:x:1", "docker-daemon:{id}"])
    @pytest.mark.parametrize("compress", [False, True])
    def test_an_image_is_exported_once_and_by_id(
        self, fake: FakeDaemon, tmp_path: Path, image: str, compress: bool
    ) -> None:
        image_id, archive, diff_ids = saved_image(b"one" * 10_000, b"two", compress=compress)
        image = image.format(id=image_id)
        fake.has(self.NAME, image_id)
        fake.has(image_id, image_id)
        fake.archives[image_id] = archive
        reference = parse(image)
        assert identity(reference, folder=tmp_path, platform="linux/amd64") == image_id
        assert not any("get" in path for path in fake.asked)
        found = resolve(reference, folder=tmp_path, platform="linux/amd64", scratch=tmp_path / "s", offline=True)
        assert [found.image.origin, found.image.config, found.identity] == ["docker-daemon", image_id, image_id]
        assert sha256_bytes(found.config) == image_id
        assert [layer.diff_id for layer in found.image.layers] == diff_ids
        assert [layer.blob for layer in found.image.layers] == diff_ids
        assert len([path for path in fake.asked if "get" in path]) == 1
        assert found.blobs is not None
        into = tmp_path / "into"
        into.mkdir()
        for layer in found.image.layers:
            adopt(found.blobs / layer.blob[7:], layer, into, where=image)
        shutil.rmtree(found.blobs.parent)
        shutil.rmtree(into)
        into.mkdir()
        steps: list[int] = []
        wanted = found.image.layers[1:]
        fetch(reference, found.image, wanted, folder=tmp_path, into=into, scratch=tmp_path / "s", advance=steps.append)
        assert [path.name for path in into.iterdir()] == [wanted[0].blob[7:]]
        assert sha256_file(into / wanted[0].blob[7:]) == wanted[0].blob
        assert sum(steps) == wanted[0].size
        assert list((tmp_path / "s").iterdir()) == []

    def test_the_resolved_image_is_fetched_although_its_name_moved(self, fake: FakeDaemon, tmp_path: Path) -> None:
        image_id, archive, _ = saved_image(b"one")
        fake.has(self.NAME, image_id)
        fake.archives[image_id] = archive
        arguments: dict[str, Any] = {"folder": tmp_path, "scratch": tmp_path / "s"}
        found = resolve(parse("x:1"), platform="linux/amd64", **arguments).image
        other_id, other_archive, _ = saved_image(b"other")
        fake.has(self.NAME, other_id)
        fake.archives[other_id] = other_archive
        into = tmp_path / "into"
        into.mkdir()
        # Gone: the name stands for another image now.
        with pytest.raises(SourceError, match="changed meanwhile") as caught:
            fetch(parse("x:1"), found, found.layers, into=into, advance=lambda _: None, **arguments)
        assert caught.value.hint == "run again"
        assert list(into.iterdir()) == []
        # Still there, without its name.
        fake.has(image_id, image_id)
        fetch(parse("x:1"), found, found.layers, into=into, advance=lambda _: None, **arguments)
        assert [path.name for path in into.iterdir()] == [found.layers[0].blob[7:]]

    def test_an_export_of_another_image_is_refused(self, fake: FakeDaemon, tmp_path: Path) -> None:
        image_id = saved_image(b"one")[0]
        fake.has(self.NAME, image_id)
        fake.archives[image_id] = saved_image(b"other")[1]
        with pytest.raises(SourceError, match="changed meanwhile"):
            resolve(parse("x:1"), folder=tmp_path, platform="linux/amd64", scratch=tmp_path / "s")
        assert list((tmp_path / "s").iterdir()) == []

    def test_the_containerd_store(self, fake: FakeDaemon, tmp_path: Path) -> None:
        config_id, archive, diff_ids = saved_image(b"one")
        fake.has(self.NAME, ID, Descriptor={"digest": ID})
        fake.archives[ID] = archive
        arguments: dict[str, Any] = {"folder": tmp_path, "scratch": tmp_path / "s"}
        found = resolve(parse("x:1"), platform="linux/amd64", **arguments)
        assert [found.identity, found.image.config] == [ID, config_id]
        (tmp_path / "into").mkdir()
        fetch(
            parse("x:1"), found.image, found.image.layers, into=tmp_path / "into", advance=lambda _: None, **arguments
        )
        assert [path.name for path in (tmp_path / "into").iterdir()] == [diff_ids[0][7:]]


class TestFallback:
    NAME = "docker.io/library/x:1"

    def ask(self, image: str, tmp_path: Path, platform: str = "linux/amd64") -> None:
        resolve(parse(image), folder=tmp_path, platform=platform, scratch=tmp_path / "s", offline=True)

    def test_an_image_that_is_not_there_is_asked_of_the_registry(self, fake: FakeDaemon, tmp_path: Path) -> None:
        with pytest.raises(OfflineError, match="asked first: the Docker daemon has no image"):
            self.ask("x:1", tmp_path)
        assert fake.asked == [f"/images/{self.NAME}/json"]
        assert identity(parse("x:1"), folder=tmp_path, platform="linux/amd64") is None

    def test_with_a_transport_nothing_else_is_asked(self, fake: FakeDaemon, tmp_path: Path) -> None:
        with pytest.raises(ImageNotFoundError):
            self.ask("docker-daemon:x:1", tmp_path)
        with pytest.raises(OfflineError) as caught:
            self.ask("docker://x:1", tmp_path)
        assert "daemon" not in caught.value.message
        assert fake.asked == [f"/images/{self.NAME}/json"]
        assert identity(parse("docker://x:1"), folder=tmp_path, platform="linux/amd64") is None
        with pytest.raises(ImageNotFoundError):
            identity(parse("docker-daemon:x:1"), folder=tmp_path, platform="linux/amd64")

    def test_any_other_failure_is_shown(self, fake: FakeDaemon, tmp_path: Path) -> None:
        fake.answers[self.NAME] = (500, b"on fire")
        with pytest.raises(SourceError, match="on fire") as caught:
            self.ask("x:1", tmp_path)
        assert type(caught.value) is SourceError
        with pytest.raises(SourceError, match="on fire") as caught:
            identity(parse("x:1"), folder=tmp_path, platform="linux/amd64")
        assert type(caught.value) is SourceError

    def test_an_image_for_another_platform_is_no_reason_to_fall_back(self, fake: FakeDaemon, tmp_path: Path) -> None:
        fake.has(self.NAME, ID, Architecture="arm64", Variant="v8")
        with pytest.raises(SourceError, match="the image is for linux/arm64/v8, asked for was linux/amd64") as caught:
            self.ask("x:1", tmp_path)
        assert "[source]" in (caught.value.hint or "")
        assert fake.asked == [f"/images/{self.NAME}/json"]  # nothing was exported
