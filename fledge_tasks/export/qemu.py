"""QEMU: a script with its command line.

On amd64 it is a microvm, which is to QEMU what Firecracker is by itself. No disk is told its bus: left
to itself QEMU gives the first disk the bus that it tells Linux of first, so that it is /dev/vda, and
that is the last one (7.2, tried with Linux 6.1). On arm64 it is `virt`, with PCI.

KVM is used where there is one. An emulated microvm has a single timer for Linux to measure its clock
with, and on a busy host that fails, and Linux hangs; counting instructions helps.

Sources: qemu(1); QEMU, docs/system/i386/microvm.rst, docs/system/arm/virt.rst.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fledge_tasks.export.guest import File, Guest, script

_CHOOSE = """\
# ACCEL says how it runs: kvm, or 'tcg -icount shift=auto', the default where there is no KVM.
[ -w /dev/kvm ] && accel=kvm || accel='tcg -icount shift=auto'
"""


def files(guest: Guest, folder: Path) -> Sequence[File]:  # noqa: ARG001  # all that it needs is on the command line
    """Return the script."""
    argv = [
        "-M", guest.choose("QEMU", amd64="microvm,rtc=on", arm64="virt"),
        "-cpu", "max",
        "-smp", str(guest.cpus),
        "-m", f"{guest.memory_mib}M",
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-serial", "mon:stdio",
        "-kernel", str(guest.kernel),
        *(["-initrd", str(guest.initrd)] if guest.initrd else []),
        "-append", arguments(guest),
        *_devices(guest),
    ]  # fmt: skip
    program = guest.choose("QEMU", amd64="qemu-system-x86_64", arm64="qemu-system-aarch64")
    return [script(f"{program} -accel ${{ACCEL:-$accel}}", argv, guest, "qemu", before=_CHOOSE)]


def arguments(guest: Guest) -> str:
    """Return the kernel command line. A guest whose kernel panics reboots, which ends QEMU."""
    return guest.arguments(guest.choose("QEMU", amd64="console=ttyS0", arm64="console=ttyAMA0"), "panic=1")


def _devices(guest: Guest) -> Iterator[str]:
    bus = guest.choose("QEMU", amd64="device", arm64="pci")
    for disk in guest.disks:
        options = {"id": disk.name, "if": "none", "format": disk.format, "file": str(disk.path)}
        if disk.is_read_only:
            options["readonly"] = "on"
        yield from ("-drive", _joined(options))
        yield from ("-device", f"virtio-blk-{bus},drive={disk.name}")
    if guest.tap:
        yield from ("-netdev", f"tap,id=eth0,ifname={guest.tap},script=no,downscript=no")
        yield from ("-device", f"virtio-net-{bus},netdev=eth0")


def _joined(options: dict[str, str]) -> str:
    """Return options with their values, in which a comma is doubled."""
    return ",".join(f"{name}={value.replace(',', ',,')}" for name, value in options.items())
