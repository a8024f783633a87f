"""Asking a server whether it is healthy, and reading a guest's console."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from fledge_tasks.boot.console import Console
from fledge_tasks.boot.health import Answer, ask
from fledge_tasks.boot.workload import Check
from tests.tools import need

HOST = "127.0.0.1"


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Serve one connection after the other, and yield the port."""
    with socket.create_server((HOST, 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client = server.accept()[0]
                except OSError:
                    return
                with client:
                    try:
                        answer(client)
                    except OSError:
                        continue

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def check(url: str = "http://in.guest:81/", *, is_derived: bool = False) -> Check:
    return Check(urlsplit(url), 81, 10.0, is_derived)


def asked(answer: bytes, url: str = "http://in.guest:81/") -> tuple[Answer | str, bytes]:
    requests: list[bytes] = []

    def reply(client: socket.socket) -> None:
        requests.append(client.recv(65536))
        client.sendall(answer)

    with serving(reply) as port:
        found = ask(check(url), HOST, port, 10)
    return found, requests[0]


def test_an_answer() -> None:
    found, request = asked(b"HTTP/1.1 404 Not Here\r\nContent-Length: 4\r\n\r\nbody", "http://in.guest:81/a/b?c=d")
    assert found == Answer(404, "Not Here", b"body")
    assert str(found) == "404 Not Here"
    lines = request.split(b"\r\n")
    assert lines[0] == b"GET /a/b?c=d HTTP/1.1"
    assert b"Host: in.guest:81" in lines
    assert str(Answer(200, "", b"")) == "200"


@pytest.mark.parametrize("answer", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 2", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200])
def test_what_is_no_answer(answer: bytes) -> None:
    found, _ = asked(answer)
    assert isinstance(found, str) and found


def test_nobody_there() -> None:
    with socket.socket() as unused:
        unused.bind((HOST, 0))
        assert "refused" in str(ask(check(), HOST, unused.getsockname()[1], 10))


def test_a_body_is_cut_off() -> None:
    found, _ = asked(b"HTTP/1.1 200 OK\r\n\r\n" + bytes(3 << 20))
    assert isinstance(found, Answer) and len(found.body) == 1 << 20
    short, _ = asked(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nall there is")
    assert short == Answer(200, "OK", b"all there is")


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_server_that_drips_is_not_waited_for(head: bytes) -> None:
    stop = threading.Event()

    def drip(client: socket.socket) -> None:
        client.sendall(head)
        while not stop.wait(0.05):
            client.sendall(b"x")

    with serving(drip) as port:
        begun = time.monotonic()
        found = ask(check(), HOST, port, 0.5)
        took = time.monotonic() - begun
        stop.set()
    assert took < 5
    if head:
        assert isinstance(found, Answer) and found.status == 200 and set(found.body) <= {ord("x")}
    else:
        assert isinstance(found, str)


def test_https_with_any_certificate(tmp_path: Path) -> None:
    need("openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=somebody", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")

    def reply(client: socket.socket) -> None:
        with context.wrap_socket(client, server_side=True) as secured:
            secured.recv(65536)
            secured.sendall(b"HTTP/1.1 200 Safe\r\n\r\n")

    with serving(reply) as port:
        assert ask(check("https://in.guest/"), HOST, port, 10) == Answer(200, "Safe", b"")


@pytest.mark.parametrize(
    ("status", "named", "derived"),
    [
        (199, False, False), (200, True, True), (399, True, True),
        (400, False, True), (499, False, True), (500, False, False),
    ],
)  # fmt: skip
def test_what_is_accepted(status: int, named: bool, derived: bool) -> None:
    assert check().accepts(status) == named
    assert check(is_derived=True).accepts(status) == derived


# --- the console -----------------------------------------------------------------------------------------------


@contextmanager
def console(data: bytes, **options: object) -> Iterator[Console]:
    """Yield a console on which all of `data` was written, a few bytes at a time."""
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as stream:
        found = Console(stream, **options)  # type: ignore[arg-type]
        with os.fdopen(writer, "wb", buffering=0) as file:
            for offset in range(0, len(data), 7 if len(data) < 10_000 else 70_001):
                file.write(data[offset : offset + (7 if len(data) < 10_000 else 70_001)])
        found.finish()
        yield found


UP, STARTS = b"fledge: the guest is up\r\n", b"fledge: the workload starts\r\n"


def ended(code: int) -> bytes:
    return b"fledge: the workload ended with %d\r\n" % code


def test_what_our_scripts_say() -> None:
    with console(b"BIOS\r\n") as found:
        assert (found.is_alive, found.has_started, found.exit_code()) == (False, False, None)
    with console(b"BIOS\r\n" + UP) as found:
        assert (found.is_alive, found.has_started, found.exit_code()) == (True, False, None)
    with console(UP + STARTS + b"output\r\n" + ended(0)) as found:
        assert (found.is_alive, found.has_started, found.exit_code()) == (True, True, 0)


def test_only_the_last_words_are_ours() -> None:
    with console(UP + STARTS + ended(0) + b"said the workload\r\n") as found:
        assert found.exit_code() is None
    with console(UP + STARTS + ended(0) + b"no newline" + ended(3)) as found:
        assert found.exit_code() == 3
    with console(UP + STARTS + b"fledge: the workload ended with " + b"9" * 5000 + b"\r\n") as found:
        assert found.exit_code() is None  # no script of ours says that


def test_a_kernel_with_another_initramfs() -> None:
    with console(b"[    0.000000] Linux version 6.1\r\nmore\r\n", is_foreign=True) as found:
        assert (found.is_alive, found.has_started) == (True, True)
    with console(UP + STARTS, is_foreign=True) as found:
        assert (found.is_alive, found.has_started) == (False, False)


def test_the_last_lines() -> None:
    with console(b"one\r\ntwo\r\n10%\r90%\rthree \xff\r\n\r\n\r\n") as found:
        assert found.lines(2) == ["two", "three \ufffd"]
        assert found.lines(9) == ["one", "two", "three \ufffd"]
    with console(b"") as found:
        assert found.lines(3) == []


def test_much_output_is_not_kept() -> None:
    with console(UP + STARTS + b"x" * 3_000_000 + b"\r\n" + ended(7)) as found:
        assert found.exit_code() == 7
        assert sum(map(len, found.lines(9))) <= 1 << 16


def test_the_workloads_output_is_copied(tmp_path: Path) -> None:
    with (tmp_path / "copy").open("wb") as copy, console(UP + b"no\r\n" + STARTS + b"yes\r\n" + ended(0), echo=copy):
        assert (tmp_path / "copy").read_bytes() == b"yes\r\n" + ended(0)


def test_nobody_looks_at_the_copy() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as echo, console(UP + STARTS + b"a" * 200 + ended(5), echo=echo) as found:
        assert found.exit_code() == 5
