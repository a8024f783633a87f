"""The agent: URLs, local files, and downloads from a loopback server that misbehaves."""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pytest

from fledge_tasks import download as downloads
from fledge_tasks.agent import AgentSpec, agent_url, config_file, lasting_url, local_agent, lock_name, program
from fledge_tasks.digest import sha256_bytes, sha256_file
from fledge_tasks.download import download
from fledge_tasks.errors import AgentError
from fledge_tasks.mappings import MappedFile
from tests.tools import need

PROGRAM = b"\x7fELF" + bytes(range(256)) * 1200
TAG = '"v1"'
REST = f"bytes 100000-{len(PROGRAM) - 1}/{len(PROGRAM)}"


class Server(ThreadingHTTPServer):
    """Answers each request with the next step of the path's script; the last step is repeated."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.scripts: dict[str, list[Callable[[Handler], None]]] = {}
        self.requests: list[tuple[str, str | None]] = []

    def url(self, *script: Callable[[Handler], None]) -> str:
        path = f"/{len(self.scripts)}"
        self.scripts[path] = list(script)
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    @property
    def ranges(self) -> list[str | None]:
        return [requested for _, requested in self.requests]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, self.headers.get("Range")))
        script = self.server.scripts[self.path.partition("?")[0]]
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def reply(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


def whole(handler: Handler) -> None:
    """Serve the program, or the part that is asked for, like a good server."""
    start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if start and handler.headers.get("If-Range") == TAG:
        offset = int(start[1])
        content_range = f"bytes {offset}-{len(PROGRAM) - 1}/{len(PROGRAM)}"
        handler.reply(206, PROGRAM[offset:], Content_Range=content_range, ETag=TAG)
    else:
        handler.reply(200, PROGRAM, ETag=TAG)


def unsized(handler: Handler) -> None:
    """Serve the program without saying how long it is."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(PROGRAM)
    handler.close_connection = True


def cut(length: int, **headers: str) -> Callable[[Handler], None]:
    """Promise the program and break off after `length` bytes."""
    return lambda handler: handler.reply(200, PROGRAM[:length], len(PROGRAM), **headers)


def status(code: int) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(code, b"<html>sorry</html>")


def body(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(200, data)


def moved(target: str, code: int = 302) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(code, b"", Location=target)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", (0.0, 0.0, 0.0))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def test_download(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    checksum = sha256_bytes(PROGRAM)
    assert download(server.url(whole), tmp_path / "x", checksum=checksum, advance=seen.append) == checksum
    assert (tmp_path / "x").read_bytes() == PROGRAM
    assert sum(seen) == len(PROGRAM)
    assert len(server.requests) == 1


def test_scripts_are_programs_too(server: Server, tmp_path: Path) -> None:
    script = b"#!/bin/sh\n"
    assert download(server.url(body(script)), tmp_path / "x") == sha256_bytes(script)


def test_body_without_length(server: Server, tmp_path: Path) -> None:
    assert download(server.url(unsized), tmp_path / "x") == sha256_bytes(PROGRAM)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_followed(server: Server, tmp_path: Path, code: int) -> None:
    assert download(server.url(moved(server.url(whole), code)), tmp_path / "x") == sha256_bytes(PROGRAM)
    assert len(server.requests) == 2


def test_redirect_loop_ends(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="answered with status 302"):
        download(server.url(moved("/0")), tmp_path / "x")


def test_redirect_to_a_file_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="not allowed"):
        download(server.url(moved("file:///etc/hostname")), tmp_path / "x")


def test_redirect_to_another_protocol_is_refused(server: Server, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(AgentError, match="redirects from http to ftp, which is refused"):
            download(server.url(moved(f"ftp://127.0.0.1:{listener.getsockname()[1]}/kestrel")), tmp_path / "x")
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_redirect_from_https_to_http_is_refused() -> None:
    request = urllib.request.Request("https://user:secret@example.com/kestrel?token=secret")
    with pytest.raises(AgentError, match="from https to http") as caught:
        downloads._Redirects(print).redirect_request(request, BytesIO(), 302, "", Message(), "http://example.com/")  # type: ignore[arg-type]
    assert caught.value.where == "https://example.com/kestrel"


@pytest.mark.parametrize("code", [404, 403, 401, 410])
def test_refusals_are_not_tried_again(server: Server, tmp_path: Path, code: int) -> None:
    with pytest.raises(AgentError, match=f"status {code}"):
        download(server.url(status(code)), tmp_path / "x")
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [204, 203])
def test_other_success_is_no_success(server: Server, tmp_path: Path, code: int) -> None:
    with pytest.raises(AgentError, match=f"status {code}"):
        download(server.url(lambda handler: handler.reply(code, b"")), tmp_path / "x")


def test_busy_server_is_tried_again(server: Server, tmp_path: Path) -> None:
    digest = download(server.url(status(503), status(429), status(500), whole), tmp_path / "x")
    assert digest == sha256_bytes(PROGRAM)
    assert len(server.requests) == 4


def test_busy_server_is_given_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match="tried 4 times: the server answered with status 502"):
        download(server.url(status(502)), tmp_path / "x")
    assert len(server.requests) == 4
    assert list(tmp_path.iterdir()) == []


def test_nobody_listens(server: Server, tmp_path: Path) -> None:
    url = server.url(whole)
    server.socket.close()
    with pytest.raises(AgentError, match=r"tried 4 times: .*refused"):
        download(url, tmp_path / "x")


def test_truncated_transfer_is_resumed(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    digest = download(server.url(cut(100_000, ETag=TAG), whole), tmp_path / "x", advance=seen.append)
    assert digest == sha256_bytes(PROGRAM) == sha256_file(tmp_path / "x")
    assert server.ranges == [None, "bytes=100000-"]
    assert sum(seen) == len(PROGRAM)
    assert min(seen) > 0


def test_resumed_transfer_of_a_file_that_changed_starts_over(server: Server, tmp_path: Path) -> None:
    seen: list[int] = []
    digest = download(server.url(cut(100_000, ETag='"v0"'), whole), tmp_path / "x", advance=seen.append)
    assert digest == sha256_bytes(PROGRAM) == sha256_file(tmp_path / "x")
    assert sum(seen) == len(PROGRAM)
    assert -100_000 in seen


@pytest.mark.parametrize("headers", [{}, {"ETag": 'W/"v1"'}])
def test_without_proof_of_sameness_the_transfer_starts_over(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    assert download(server.url(cut(100_000, **headers), whole), tmp_path / "x") == sha256_bytes(PROGRAM)
    assert server.ranges == [None, None]


@pytest.mark.parametrize(
    "answer",
    [
        lambda handler: handler.reply(206, PROGRAM[5:], Content_Range="bytes 5-9/10"),
        lambda handler: handler.reply(206, PROGRAM[5:]),
        lambda handler: handler.reply(206, PROGRAM[5:], Content_Range=f"bytes {'9' * 5000}-{'9' * 5000}/*"),
        lambda handler: handler.reply(206, b"x" * 10, Content_Range="bytes 100000-100009/100010"),
        lambda handler: handler.reply(206, b"x" * (len(PROGRAM) - 100_000), Content_Range=REST, ETag='"v2"'),
        status(416),
    ],
)
def test_wrong_part_is_not_used(server: Server, tmp_path: Path, answer: Callable[[Handler], None]) -> None:
    digest = download(server.url(cut(100_000, ETag=TAG), answer, whole), tmp_path / "x")
    assert digest == sha256_bytes(PROGRAM) == sha256_file(tmp_path / "x")
    assert server.ranges == [None, "bytes=100000-", None]


@pytest.mark.parametrize("first", [cut(100_000, ETag=TAG), lambda handler: _unsized_part(handler, 100_000)])
def test_a_part_that_is_shorter_than_asked_for(
    server: Server, tmp_path: Path, first: Callable[[Handler], None]
) -> None:
    def some(handler: Handler) -> None:
        content_range = f"bytes 100000-109999/{len(PROGRAM)}"
        handler.reply(206, PROGRAM[100_000:110_000], Content_Range=content_range, ETag=TAG)

    assert download(server.url(first, some, whole), tmp_path / "x") == sha256_bytes(PROGRAM)
    assert server.ranges == [None, "bytes=100000-", "bytes=110000-"]


def _unsized_part(handler: Handler, length: int) -> None:
    """Break off in the middle of a chunk, after `length` bytes of the program."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("ETag", TAG)
    handler.end_headers()
    handler.wfile.write(b"%x\r\n" % length + PROGRAM[:length] + b"\r\nffff\r\n")
    handler.close_connection = True


def test_always_truncated(server: Server, tmp_path: Path) -> None:
    with pytest.raises(AgentError, match=f"ended after 1000 of {len(PROGRAM)} bytes"):
        download(server.url(cut(1000)), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_wrong_checksum(server: Server, tmp_path: Path) -> None:
    expected = sha256_bytes(b"")
    with pytest.raises(AgentError) as caught:
        download(server.url(whole) + "?token=secret", tmp_path / "x", checksum=expected)
    assert f"found {sha256_bytes(PROGRAM)}, expected {expected}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"<!DOCTYPE html>", b"", b"\x7fEL"])
def test_what_is_no_program(server: Server, tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AgentError, match="does not look like a program"):
        download(server.url(body(data)), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("says_so", [True, False])
def test_too_large(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_so: bool) -> None:
    seen: list[int] = []
    monkeypatch.setattr(downloads, "MAX_BYTES", len(PROGRAM) - 1)
    with pytest.raises(AgentError, match="is larger than"):
        download(server.url(whole if says_so else unsized), tmp_path / "x", advance=seen.append)
    assert bool(seen) is not says_so
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.com/x", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("kestrel", "only http and https"),
        ("http://[", "not a URL"),
        ("http:///x", "no host given"),
        ("http://127.0.0.1:port/x", "nonnumeric port"),
    ],
)
def test_bad_urls(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        download(url, tmp_path / "x")


def drip(handler: Handler) -> None:
    """Send headers, then a byte from time to time."""
    handler.send_response(200)
    handler.end_headers()
    drop(handler)


def drop(handler: Handler, data: bytes = b"\x7f") -> None:
    """Send a byte from time to time, for ever: of headers, if there were none yet."""
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(data)
            time.sleep(0.01)


def chunk_drip(handler: Handler) -> None:
    """Send the length of a chunk, digit by digit (RFC 9112, 7.1)."""
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    drop(handler, b"0")


@pytest.mark.parametrize("script", [drip, drop, chunk_drip])
def test_a_server_that_is_too_slow(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Callable[[Handler], None]
) -> None:
    """The timeout of a socket never comes: each byte starts it anew."""
    monkeypatch.setattr(downloads, "SLOW_SECONDS", 0.2)
    with pytest.raises(AgentError, match=r"sent too slowly: less than 60000 bytes in 0\.2 s"):
        download(server.url(script), tmp_path / "x")
    assert len(server.requests) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_slow_start_is_forgiven(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(downloads, "SLOW_BYTES", len(PROGRAM) // 4)

    def slow(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for at in range(0, len(PROGRAM), len(PROGRAM) // 16):
            handler.wfile.write(PROGRAM[at : at + len(PROGRAM) // 16])
            time.sleep(0.02)

    assert download(server.url(slow), tmp_path / "x") == sha256_bytes(PROGRAM)


def endless(handler: Handler) -> None:
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 16))


def test_the_body_of_a_redirect_is_not_read(server: Server, tmp_path: Path) -> None:
    target = server.url(whole)

    def redirect(handler: Handler) -> None:
        handler.send_response(302)
        handler.send_header("Location", target)
        handler.end_headers()
        endless(handler)

    assert download(server.url(redirect), tmp_path / "x") == sha256_bytes(PROGRAM)


@pytest.mark.parametrize("line", [b"X-A: " + b"a" * 70_000 + b"\r\n", b"X-A: a\r\n" * 101])
def test_huge_headers(server: Server, tmp_path: Path, line: bytes) -> None:
    def script(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\n" + line + b"\r\n")

    with pytest.raises(AgentError, match=r"cannot be downloaded, tried 4 times: got more than"):
        download(server.url(script), tmp_path / "x")


def test_what_a_server_says_is_no_escape_sequence(server: Server, tmp_path: Path) -> None:
    def script(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.0 404 \x1b[2Jgone" + b"x" * 60_000 + b"\r\n\r\n")

    with pytest.raises(AgentError) as caught:
        download(server.url(script), tmp_path / "x")
    assert r"answered with status 404 \x1b[2Jgone" in str(caught.value)
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 5000


def test_interrupt_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(server.url(whole), tmp_path / "x", advance=interrupt)
    assert list(tmp_path.iterdir()) == []


# --- proxies ----------------------------------------------------------------------------------------------


class Proxy(ThreadingHTTPServer):
    """Answers what it is asked for with the program itself, or makes the tunnel that it is asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ProxyHandler)
        self.asked: list[tuple[str, str | None]] = []
        self.tunnel_to = ("127.0.0.1", 0)

    def url(self, login: str = "") -> str:
        return f"http://{login}127.0.0.1:{self.server_address[1]}"


class ProxyHandler(Handler):
    def do_GET(self) -> None:
        self._note()
        self.reply(200, PROGRAM)

    def do_CONNECT(self) -> None:
        self._note()
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(self.proxy.tunnel_to) as far:
            ways = [threading.Thread(target=pump, args=way) for way in ((self.connection, far), (far, self.connection))]
            for way in ways:
                way.start()
            for way in ways:
                way.join()
        self.close_connection = True

    @property
    def proxy(self) -> Proxy:
        assert isinstance(self.server, Proxy)
        return self.server

    def _note(self) -> None:
        self.proxy.asked.append((f"{self.command} {self.path}", self.headers.get("Proxy-Authorization")))


def pump(source: socket.socket, target: socket.socket) -> None:
    """Copy what comes until its end."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy, with an environment that names none yet."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(downloads, "BACKOFF_SECONDS", (0.0,))
    running = Proxy()
    with serving(running):
        yield running


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY"])
def test_a_proxy(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, proxy.url("me:secret@"))
    assert download("http://agents.invalid/kestrel", tmp_path / "x") == sha256_bytes(PROGRAM)
    assert proxy.asked == [("GET http://agents.invalid/kestrel", "Basic bWU6c2VjcmV0")]


def test_no_proxy(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url())
    monkeypatch.setenv("no_proxy", "example.com,127.0.0.1")
    server = Server()
    with serving(server):
        assert download(server.url(whole), tmp_path / "x") == sha256_bytes(PROGRAM)
    assert proxy.asked == []
    assert len(server.requests) == 1


def test_a_proxy_that_is_not_there(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody goes around it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{free.getsockname()[1]}")
        server = Server()
        with serving(server), pytest.raises(AgentError, match="refused") as caught:
            download(server.url(whole), tmp_path / "x")
    assert server.requests == proxy.asked == []
    assert "secret" not in str(caught.value)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for agents.invalid, and its key, in one file."""
    need("openssl")
    file = tmp_path_factory.mktemp("tls") / "agents.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=agents.invalid",
         "-addext", "subjectAltName=DNS:agents.invalid", "-keyout", file, "-out", f"{file}.crt"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    with file.open("ab") as both:
        both.write(file.with_name("agents.pem.crt").read_bytes())
    return file


@pytest.fixture
def tls_server(certificate: Path, proxy: Proxy) -> Iterator[Server]:
    """A server for agents.invalid, to which the proxy leads."""
    server = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    proxy.tunnel_to = ("127.0.0.1", server.server_address[1])
    with serving(server):
        yield server


def test_https_through_a_proxy(
    proxy: Proxy, tls_server: Server, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is resumed through it, and another certificate authority is taken from where OpenSSL looks for it."""
    monkeypatch.setenv("https_proxy", proxy.url("me:secret@"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    path = tls_server.url(cut(100_000, ETag=TAG), whole).rpartition("/")[2]
    assert download(f"https://agents.invalid/{path}", tmp_path / "x") == sha256_bytes(PROGRAM)
    assert proxy.asked == [("CONNECT agents.invalid:443", "Basic bWU6c2VjcmV0")] * 2
    assert tls_server.ranges == [None, "bytes=100000-"]


def test_a_certificate_that_nobody_vouches_for(
    proxy: Proxy, tls_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", proxy.url())
    with pytest.raises(AgentError, match="certificate verify failed"):
        download(f"https://agents.invalid/{tls_server.url(whole).rpartition('/')[2]}", tmp_path / "x")
    assert tls_server.requests == []
    assert len(proxy.asked) == 1, "another attempt would not help"


# --- where agents are ------------------------------------------------------------------------------------------

GITHUB = "https://github.com/volantvm/volant/releases"


@pytest.mark.parametrize(
    ("redirects", "expected"),
    [
        ([], None),
        ([f"{GITHUB}/download/v1/kestrel"], f"{GITHUB}/download/v1/kestrel"),
        ([f"{GITHUB}/download/v1/kestrel", "https://storage.example/x?sig=1"], f"{GITHUB}/download/v1/kestrel"),
        ([f"{GITHUB}/a", f"{GITHUB}/b"], f"{GITHUB}/b"),
        (["https://storage.example/x"], None),
        ([f"{GITHUB}/download/v1/kestrel?token=1"], None),
        (["https://me:secret@github.com/x"], None),
        ([f"{GITHUB}/latest/download/kestrel"], None),
    ],
)
def test_lasting_url(redirects: list[str], expected: str | None) -> None:
    assert lasting_url(f"{GITHUB}/latest/download/kestrel", redirects) == expected


def test_redirects_are_told(server: Server, tmp_path: Path) -> None:
    target = server.url(whole)
    told: list[str] = []
    download(server.url(moved(target)), tmp_path / "x", redirected=told.append)
    assert told == [target]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (AgentSpec("local", path="./kestrel"), None),
        (AgentSpec("http", url="https://example.com/k"), "https://example.com/k"),
        (AgentSpec("release", version="v1.2"), f"{GITHUB}/download/v1.2/kestrel"),
        (AgentSpec("release", version="latest"), f"{GITHUB}/latest/download/kestrel"),
        (AgentSpec("release", version="a b/c"), f"{GITHUB}/download/a%20b%2Fc/kestrel"),
        (AgentSpec("release", version="v1", base_url="http://mirror/k/"), "http://mirror/k/v1/kestrel"),
        (AgentSpec("release", version="latest", base_url="http://mirror/k"), "http://mirror/k/latest/kestrel"),
        (
            AgentSpec("release", version="latest", base_url="http://git/o/r/releases/download"),
            "http://git/o/r/releases/latest/download/kestrel",
        ),
        (AgentSpec("release", version="v1", base_url="http://m/{version}/k-{arch}"), "http://m/v1/k-arm64"),
        (AgentSpec("release", version="v1", base_url="http://m/k-{arch}"), "http://m/k-arm64"),
    ],
)
def test_agent_url(spec: AgentSpec, expected: str | None) -> None:
    assert agent_url(spec, "arm64") == expected


def test_lock_names_differ_where_downloads_do() -> None:
    specs = [
        AgentSpec("release", version="v1"),
        AgentSpec("release", version="v2"),
        AgentSpec("release", version="v1", base_url="http://mirror"),
        AgentSpec("http", url="http://mirror/x"),
        AgentSpec("local", path="x"),
    ]
    assert len({lock_name(spec) for spec in specs}) == len(specs)
    assert lock_name(specs[3]) == lock_name(AgentSpec("http", url="http://mirror/x", checksum="sha256:0"))


def test_local_agent(tmp_path: Path) -> None:
    (tmp_path / "kestrel").write_bytes(PROGRAM)
    found = local_agent(AgentSpec("local", path="./kestrel"), tmp_path, sha256_file)
    assert found == (tmp_path / "kestrel", sha256_bytes(PROGRAM), len(PROGRAM))


@pytest.mark.parametrize(
    ("path", "message"), [("gone", "No such file"), (".", "not a regular file"), ("a\0b", "embedded null")]
)
def test_bad_local_agent(tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(AgentError, match=message):
        local_agent(AgentSpec("local", path=path), tmp_path, sha256_file)


def test_where_agent_and_config_land() -> None:
    assert program("sha256:a", 5) == MappedFile("/bin/kestrel", "file", 0o755, "sha256:a", 5)
    assert config_file("sha256:b", 9) == MappedFile("/etc/fsify-entrypoint", "file", 0o644, "sha256:b", 9)
