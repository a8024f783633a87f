"""Firecracker: the file that its option --config-file takes, and a script that calls it.

Sources: Firecracker, src/firecracker/swagger/firecracker.yaml (BootSource, Drive, MachineConfiguration,
NetworkInterface), docs/getting-started.md (the configuration file, the kernel arguments).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fledge_tasks.errors import ExportError
from fledge_tasks.export.guest import File, Guest, script

CONFIG = "vm_config.json"
_MAX_CPUS = 32


def files(guest: Guest, folder: Path) -> Sequence[File]:
    """Return configuration and script. Raises ExportError for a qcow2, which it cannot read, and too many CPUs."""
    if guest.disk_format != "raw":
        raise ExportError(
            f"Firecracker reads raw disks only, and {guest.image.name} is a {guest.disk_format}",
            hint='build it with [output] format = "raw", or choose --for cloud-hypervisor or --for qemu',
        )
    if guest.cpus > _MAX_CPUS:
        raise ExportError(
            f"Firecracker gives a guest {_MAX_CPUS} CPUs at most, and not {guest.cpus}", hint="see --cpus"
        )
    try:
        data = json.dumps(_config(guest), indent=2, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        raise ExportError("a path is not UTF-8, and Firecracker's configuration is JSON") from None
    options = ["--no-api", "--config-file", str(folder / CONFIG)]
    return [File(CONFIG, data), script("firecracker", options, guest, "firecracker")]


def arguments(guest: Guest) -> str:
    """Return the kernel command line, with those arguments that the documentation recommends."""
    return guest.arguments(
        guest.choose(
            "Firecracker", amd64="console=ttyS0 reboot=k panic=1 pci=off", arm64="console=ttyS0 reboot=k panic=1"
        )
    )


def _config(guest: Guest) -> dict[str, object]:
    # For a root device Firecracker adds `root=/dev/vda` after our arguments, where it would win over that of a hash
    # tree. Without one, drives have the names of their order as well.
    has_root_device = guest.verity is None
    network = {"network-interfaces": [{"iface_id": "eth0", "host_dev_name": guest.tap}]} if guest.tap else {}
    return {
        "boot-source": {
            "kernel_image_path": str(guest.kernel),
            "boot_args": arguments(guest),
            **({"initrd_path": str(guest.initrd)} if guest.initrd else {}),
        },
        "drives": [
            {
                "drive_id": disk.name,
                "path_on_host": str(disk.path),
                "is_root_device": has_root_device and number == 0,
                "is_read_only": disk.is_read_only,
            }
            for number, disk in enumerate(guest.disks)
        ],
        "machine-config": {"vcpu_count": guest.cpus, "mem_size_mib": guest.memory_mib},
        **network,
    }
