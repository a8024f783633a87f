"""QEMU with a guest in it: its command line, its accelerator, the port that is forwarded to the guest."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fledge_tasks.boot.console import Console
from fledge_tasks.errors import BootError
from fledge_tasks.run import Child, running
from fledge_tasks.tools import QEMU

LOOPBACK = "127.0.0.1"
KVM = Path("/dev/kvm")
TICK_SECONDS = 0.05
_KVM_SECONDS = 10.0
_PORT_TAKEN = "Could not set up host forwarding rule"
LINES = 30


@dataclass(frozen=True)
class Hardware:
    """What a guest is. `port` is the one that is forwarded to it, `descriptors` are ours that QEMU has to see.

    With `is_foreign`, `initrd` is not of our making, and does not say on the console what our scripts say.
    """

    image: Path
    disk_format: str
    kernel: Path
    initrd: Path
    words: str
    cpus: int
    memory_mb: int
    port: int | None
    descriptors: tuple[int, ...] = ()
    is_foreign: bool = False
    is_offline: bool = False
    has_terminal: bool = False


@dataclass(frozen=True)
class Machine:
    """A running guest. `port` is that of the host's loopback, None when none is forwarded.

    `notes` tell which accelerators did not do, and why.
    """

    child: Child
    console: Console
    accelerator: str
    port: int | None
    notes: tuple[str, ...]

    def has_ended(self) -> bool:
        """Tell whether it has ended; then all that it wrote is known."""
        if self.child.ended() is None:
            return False
        self.console.finish()
        return True

    def comes_to_life(self, until: float) -> bool:
        """Wait for the guest's kernel, at most until this moment of the monotonic clock."""
        while not self.console.is_alive and not self.has_ended() and time.monotonic() < until:
            time.sleep(TICK_SECONDS)
        return self.console.is_alive

    def failure(self) -> str:
        """Return why nothing came of it."""
        if not self.has_ended():
            return "nothing was heard of the guest's kernel"
        return f"QEMU ended with {self.child.ended()}: {self.child.complaint() or 'it said nothing'}"


def command(hardware: Hardware, accelerator: str, port: int | None) -> list[str]:
    """Return the command line of QEMU (qemu(1); its docs/system/i386/microvm.rst).

    `snapshot=on` keeps what the guest writes in a temporary file that has no name. An emulated guest has one
    processor and virtual time, which counts instructions: a microvm has but one timer that Linux can measure its
    clock with, and on a busy host it fails to, and hangs. With a second processor it hangs in virtual time.
    """
    network = f"user,id=net{',restrict=on' if hardware.is_offline else ''}"
    if port is not None:
        network += f",hostfwd=tcp:{LOOPBACK}:{port}-:{hardware.port}"
    terminal = ["-chardev", "stdio,id=console,signal=off,mux=on", "-mon", "chardev=console"]
    return [
        QEMU.name, "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "microvm,rtc=on", "-accel", accelerator, "-cpu", "max",
        *(["-icount", "shift=auto"] if accelerator == "tcg" else ["-smp", str(hardware.cpus)]),
        "-m", str(hardware.memory_mb),
        "-kernel", str(hardware.kernel), "-initrd", str(hardware.initrd),
        "-append", f"console=ttyS0 reboot=t panic=-1 {hardware.words}",
        "-drive", ",".join(["id=root,if=none", f"format={hardware.disk_format}", "snapshot=on",
                            f"file={str(hardware.image).replace(',', ',,')}"]),
        "-device", "virtio-blk-device,drive=root",
        "-netdev", network, "-device", "virtio-net-device,netdev=net",
        *(terminal if hardware.has_terminal else ["-chardev", "stdio,id=console,signal=off"]),
        "-serial", "chardev:console",
    ]  # fmt: skip


@contextlib.contextmanager
def started(
    hardware: Hardware, accelerators: Sequence[str], seconds: float, echo: IO[bytes] | None = None
) -> Iterator[Machine]:
    """Start the guest and yield it when its kernel runs; it is ended with the block.

    The accelerators are tried in turn. Where KVM is not what it should be (in nested virtual machines it
    may refuse to begin, or a guest may hang before its first word) the next one gets its chance after ten
    seconds. Raises BootError when no kernel ran in time, ToolError when QEMU is not installed.
    """
    deadline = time.monotonic() + seconds
    notes: list[str] = []
    left = list(accelerators)
    while left:
        until = deadline if len(left) == 1 else min(deadline, time.monotonic() + _KVM_SECONDS)
        with _run(hardware, left[0], tuple(notes), echo) as machine:
            if machine.comes_to_life(until):
                yield machine
                return
            failure = machine.failure()
        if _PORT_TAKEN not in failure or time.monotonic() > deadline:
            notes.append(f"{left.pop(0)}: {failure}")
    raise BootError("\n".join([*notes, *tail(machine.console)]))


@contextlib.contextmanager
def _run(hardware: Hardware, accelerator: str, notes: tuple[str, ...], echo: IO[bytes] | None) -> Iterator[Machine]:
    port = None if hardware.port is None else _free_port()
    with running(
        command(hardware, accelerator, port), descriptors=hardware.descriptors, has_our_stdin=hardware.has_terminal
    ) as child:
        console = Console(child.stdout, is_foreign=hardware.is_foreign, echo=echo)
        try:
            yield Machine(child, console, accelerator, port, notes)
        finally:
            child.end()
            console.finish()


def tail(console: Console) -> list[str]:
    """Return the end of the console as lines for a message."""
    lines = console.lines(LINES)
    return ["  the end of its console:", *(f"  | {line}" for line in lines)] if lines else ["  its console is empty"]


def accelerators(wanted: str) -> list[str]:
    """Return those to try for 'kvm', 'tcg' or 'auto': KVM when this user may use it, then emulation."""
    if wanted != "auto":
        return [wanted]
    return ["kvm", "tcg"] if os.access(KVM, os.R_OK | os.W_OK) else ["tcg"]


def _free_port() -> int:
    """Return a port that nobody listens at now; QEMU says it when somebody was quicker."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
