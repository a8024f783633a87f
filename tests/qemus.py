"""A program that pretends to be QEMU: it notes its command line, and a few lines of Python say what its guest does."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from fledge_tasks.boot import kernel
from tests.tools import PATH

_SCRIPT = """#!{python} -IS
import re, signal, socket, sys, time
argv = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write("\\0".join(argv) + "\\n")
accelerator = argv[argv.index("-accel") + 1]
forwarded = re.search(r"hostfwd=tcp:127.0.0.1:(\\d+)-:(\\d+)", " ".join(argv))

def say(text):
    sys.stdout.write(text + "\\r\\n")
    sys.stdout.flush()

def up():
    say("fledge: the guest is up")
    say("fledge: the workload starts")

def stop(code):
    say(f"fledge: the workload ended with {{code}}")
    sys.exit()

def serve(status, body=""):
    server = socket.create_server(("127.0.0.1", int(forwarded[1])))
    while True:
        client = server.accept()[0]
        request = client.recv(65536).decode()
        say("asked: " + request.splitlines()[0])
        client.sendall(f"HTTP/1.1 {{status}} Said\\r\\nContent-Length: {{len(body)}}\\r\\n\\r\\n{{body}}".encode())
        client.close()

{behaviour}
"""


@dataclass(frozen=True)
class FakeQemu:
    """Where it is, and what it noted."""

    folder: Path

    def does(self, behaviour: str) -> None:
        """Say what its guest does from now on."""
        program = self.folder / "qemu-system-x86_64"
        behaviour = textwrap.dedent(behaviour)
        program.write_text(_SCRIPT.format(python=sys.executable, log=str(self.folder / "log"), behaviour=behaviour))
        program.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """Return the arguments of each time that it was started."""
        log = self.folder / "log"
        return [line.split("\0") for line in log.read_text().splitlines()] if log.exists() else []


def fake_qemu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """Put a QEMU in the PATH, and a kernel where it is looked for, of which all is built in."""
    (folder / "bin").mkdir(parents=True)
    (folder / "kernel/boot").mkdir(parents=True)
    (folder / "kernel/boot/vmlinuz-6.1-cloud-amd64").write_bytes(b"a kernel")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{PATH}")
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, str(folder / "kernel"))
    return FakeQemu(folder / "bin")
