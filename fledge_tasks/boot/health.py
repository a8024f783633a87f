"""Asking a workload over HTTP whether it is healthy."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from dataclasses import dataclass

from fledge_tasks.boot.workload import Check

_BODY_BYTES = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What a server said. `body` is cut off at 1 MiB."""

    status: int
    reason: str
    body: bytes

    def __str__(self) -> str:
        return f"{self.status} {self.reason}".strip()


def ask(check: Check, host: str, port: int, timeout: float) -> Answer | str:
    """Ask once, at the forwarded `port`, and return the answer, or why there is none. Raises nothing.

    Takes no longer than `timeout` seconds, whatever the server does; a body is then what came until then.
    Redirections are not followed, and a certificate is not looked at: nobody is between us and the guest.
    """
    connection = _connection(check, host, port, timeout)
    try:
        connection.connect()
        watch = threading.Timer(timeout, _hang_up, [connection.sock])
        watch.daemon = True
        watch.start()
        try:
            connection.request("GET", check.target, headers={"Host": check.url.netloc, "User-Agent": "fledge"})
            response = connection.getresponse()
            return Answer(response.status, response.reason, _body(response))
        finally:
            watch.cancel()
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()


def _body(response: http.client.HTTPResponse) -> bytes:
    body = b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        while len(body) < _BODY_BYTES and (chunk := response.read1(_BODY_BYTES - len(body))):
            body += chunk
    return body


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _connection(check: Check, host: str, port: int, timeout: float) -> http.client.HTTPConnection:
    if check.url.scheme != "https":
        return http.client.HTTPConnection(host, port, timeout=timeout)
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(host, port, timeout=timeout, context=unchecked)
