"""Downloads over http and https: resumed, checked, and never kept in part.

They go through `urllib`, which honours the proxy variables. A module of its own, since that takes
its time to import and most builds download nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException, HTTPMessage, HTTPSConnection, InvalidURL
from pathlib import Path
from typing import IO, Any, BinaryIO

from fledge_tasks import agent
from fledge_tasks.digest import Digest
from fledge_tasks.errors import AgentError

TIMEOUT_SECONDS = 30.0
MAX_BYTES = 512 << 20
BACKOFF_SECONDS = (0.5, 1.0, 2.0)
SLOW_SECONDS, SLOW_BYTES = 60.0, 60_000
"""A server that sends fewer bytes than that in that time, be it headers or content, is given up."""

_SCHEMES = {"http", "https"}
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_RANGE_NOT_SATISFIABLE = 416
_PERMANENT = (ssl.SSLCertVerificationError, InvalidURL)
_READ_BYTES = 1 << 16
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")  # RFC 9110, 14.4
_PROGRAM_MAGIC = (b"\x7fELF", b"#!")


def download(
    url: str,
    into: Path,
    *,
    checksum: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
    redirected: Callable[[str], None] = lambda _: None,
) -> Digest:
    """Fetch `url` to the file `into`, synced to disk, and return its digest.

    `into` must be a name that nobody else looks at; it is gone when an error is raised. `advance`
    is told the bytes that arrived, a negative number when a transfer starts over, `redirected` each
    address that a server sent us on to. http_proxy, https_proxy and no_proxy hold. Broken
    connections and busy servers (408, 429, 5xx) are tried again after BACKOFF_SECONDS, from where
    the transfer broke off if the server can prove that the file is still the same (RFC 9110, 13.1.5
    and 14). Raises AgentError for any other status than 200, a redirect from https to http, more
    than MAX_BYTES, a server that is slower than SLOW_BYTES in SLOW_SECONDS, a digest other than
    `checksum`, and content that is neither ELF nor a script.
    Raises OSError when `into` cannot be written.
    """
    try:
        scheme = urllib.parse.urlsplit(url).scheme
    except ValueError as error:
        raise AgentError(f"not a URL: {error}", where=url) from None
    if scheme not in _SCHEMES:
        raise AgentError("only http and https URLs can be downloaded", where=without_secrets(url))
    try:
        with into.open("w+b") as file:
            transfer = _Transfer(url, file, advance, redirected)
            transfer.run()
            digest = Digest("sha256:" + transfer.hash.hexdigest())
            _check(transfer, digest, checksum)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        into.unlink(missing_ok=True)
        raise
    return digest


def _check(transfer: _Transfer, digest: str, checksum: str | None) -> None:
    agent.check(digest, checksum, transfer.shown)
    transfer.file.seek(0)
    if not transfer.file.read(4).startswith(_PROGRAM_MAGIC):
        raise AgentError(
            "does not look like a program: it starts neither with the ELF magic number nor with '#!'",
            where=transfer.shown,
            hint="open the URL in a browser: a server may answer with a login or error page",
        )


class _BrokenOffError(Exception):
    """A transfer that is worth another attempt."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, redirected: Callable[[str], None]) -> None:
        self._redirected = redirected

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in _SCHEMES or (req.type == "https" and scheme != "https"):
            raise AgentError(
                f"redirects from {req.type} to {scheme}, which is refused", where=without_secrets(req.full_url)
            )
        fp.close()  # else the caller would read all of a body that nobody wants
        self._redirected(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Transfer:
    """One download over as many connections as it takes: `file` and `hash` hold the first `done` bytes."""

    def __init__(
        self, url: str, file: BinaryIO, advance: Callable[[int], None], redirected: Callable[[str], None]
    ) -> None:
        self.file = file
        self.hash = hashlib.sha256()
        self.done = 0
        self.shown = without_secrets(url)
        self._url = url
        self._advance = advance
        self._validator: str | None = None
        self._tag: str | None = None
        self._size: int | None = None  # of the whole file, if a server said it
        self._received = 0  # over all attempts
        self._watchdog = _Watchdog(lambda: self._received)
        self._opener = urllib.request.build_opener(_Redirects(redirected), *self._watchdog.handlers)

    def run(self) -> None:
        """Transfer the whole file. Raises AgentError, and OSError for `file`."""
        for pause in (*BACKOFF_SECONDS, None):
            try:
                with self._watchdog.watching():
                    self._attempt()
                break
            except _BrokenOffError as error:
                if self._watchdog.has_bitten:
                    message = f"is sent too slowly: less than {SLOW_BYTES} bytes in {SLOW_SECONDS:g} s"
                    raise AgentError(message, where=self.shown) from None
                if pause is None:
                    tries = len(BACKOFF_SECONDS) + 1
                    raise AgentError(f"cannot be downloaded, tried {tries} times: {error}", where=self.shown) from None
                time.sleep(pause)

    def _attempt(self) -> None:
        if self._validator is None:
            self._start_over()
        with self._open() as response:
            if response.status == 200:
                self._start_over()
                self._validator, self._tag = _validator(response.headers), response.headers.get("ETag")
                self._size = response.length
            elif response.status == 206:
                self._check_range(response.headers)
            else:
                raise AgentError(f"answered with status {response.status} {response.reason}", where=self.shown)
            total = self._size
            if total is None and response.length is not None:
                total = self.done + response.length
            self._limit(total or 0)
            for data in _chunks(response):
                self._limit(self.done + len(data))
                self.file.write(data)
                self.hash.update(data)
                self.done += len(data)
                self._received += len(data)
                self._advance(len(data))
        if self._watchdog.has_bitten or (total is not None and self.done != total):
            raise _BrokenOffError(f"the connection ended after {self.done} of {total} bytes")

    def _open(self) -> Any:
        headers = {"User-Agent": "fledge-tasks"}
        if self._validator is not None and self.done:
            headers |= {"Range": f"bytes={self.done}-", "If-Range": self._validator}
        try:
            return self._opener.open(urllib.request.Request(self._url, headers=headers), timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == _RANGE_NOT_SATISFIABLE:
                self._validator = None
            if error.code in _TRANSIENT or (error.code == _RANGE_NOT_SATISFIABLE and self.done):
                raise _BrokenOffError(f"the server answered with status {error.code} {error.reason}") from None
            raise AgentError(f"answered with status {error.code} {error.reason}", where=self.shown) from None
        except (OSError, HTTPException, ValueError) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            if isinstance(reason, OSError | HTTPException) and not isinstance(reason, _PERMANENT):
                raise _BrokenOffError(str(reason)) from None
            raise AgentError(f"cannot be downloaded: {reason}", where=self.shown) from None

    def _check_range(self, headers: HTTPMessage) -> None:
        found = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", ""))
        # Only parts with the same validator belong together (RFC 9110, 15.3.7.3), and a part need not reach to the end.
        is_same = headers.get("ETag", self._tag) == self._tag
        size = int(found[2]) if found and found[2] != "*" else self._size
        if found is None or int(found[1]) != self.done or not is_same or self._size not in {None, size}:
            self._validator = None
            raise _BrokenOffError("the server sent another part of the file than it was asked for")
        self._size = size

    def _start_over(self) -> None:
        if self.done:
            self._advance(-self.done)
        self.file.seek(0)
        self.file.truncate()
        self.hash = hashlib.sha256()
        self.done = 0

    def _limit(self, size: int) -> None:
        if size > MAX_BYTES:
            raise AgentError(f"is larger than {MAX_BYTES >> 20} MiB", where=self.shown)


class _Watchdog:
    """Ends connections that bring too little. `received` returns the bytes that came by now.

    The timeout of a socket is for one call, and starts anew with each byte.
    """

    def __init__(self, received: Callable[[], int]) -> None:
        self.has_bitten = False
        self._received = received
        self._sockets: list[socket.socket] = []
        http_class, https_class = (self._class(base) for base in (http.client.HTTPConnection, HTTPSConnection))

        class Http(urllib.request.HTTPHandler):
            def http_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(http_class, req)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, req: urllib.request.Request) -> Any:
                return self.do_open(https_class, req)

        self.handlers = (Http, Https)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the connections that are made in the block."""
        ended = threading.Event()
        thread = threading.Thread(target=self._run, args=(ended,), name="download-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            while self._sockets:
                self._sockets.pop().close()

    def _class(self, base: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        sockets = self._sockets

        class Connection(base):  # type: ignore[misc,valid-type]
            def connect(self) -> None:
                super().connect()
                # Of our own, since that of the connection is handed on, closed and wrapped in TLS.
                sockets.append(socket.socket(fileno=os.dup(self.sock.fileno())))

        return Connection

    def _run(self, ended: threading.Event) -> None:
        seen = self._received()
        while not ended.wait(SLOW_SECONDS):
            if (now := self._received()) - seen < SLOW_BYTES:
                self.has_bitten = True
                for each in self._sockets:
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)
                return
            seen = now


def _chunks(response: Any) -> Iterator[bytes]:
    while True:
        try:
            data: bytes = response.read1(_READ_BYTES)
        except (OSError, HTTPException) as error:
            raise _BrokenOffError(f"the connection broke off: {error}") from None
        if not data:
            return
        yield data


def _validator(headers: HTTPMessage) -> str | None:
    """Return what If-Range may hold: a strong ETag, or else a date."""
    tag = headers.get("ETag")
    return tag if tag is not None and tag.startswith('"') else headers.get("Last-Modified")


def without_secrets(url: str) -> str:
    """Return `url` for messages: without user, password and query, which may be secret."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
