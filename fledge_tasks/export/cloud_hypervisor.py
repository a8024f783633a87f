"""Cloud Hypervisor: a script with its command line.

The format of a disk is told, since a raw one that it has to guess cannot be written to at its beginning,
where ext4 keeps its superblock; `image_type` is there from version 51 on. All disks stand behind one
`--disk`: older versions take that option once only.

Sources: Cloud Hypervisor, cloud-hypervisor/src/main.rs (options), option_parser/src/lib.rs (commas and
quotes), README.md ('Booting the guest VM'), pull requests 7728 and 8219.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fledge_tasks.errors import ExportError
from fledge_tasks.export.guest import Disk, File, Guest, script


def files(guest: Guest, folder: Path) -> Sequence[File]:  # noqa: ARG001  # all that it needs is on the command line
    """Return the script. Raises ExportError for a path that the options cannot hold."""
    options = [
        "--kernel", str(guest.kernel),
        *(["--initramfs", str(guest.initrd)] if guest.initrd else []),
        "--cmdline", arguments(guest),
        "--disk", *map(_disk, guest.disks),
        "--cpus", f"boot={guest.cpus}",
        "--memory", f"size={guest.memory_mib}M",
        *(["--net", f"tap={guest.tap}"] if guest.tap else []),
        "--serial", "tty",
        "--console", "off",
    ]  # fmt: skip
    return [script("cloud-hypervisor", options, guest, "cloud-hypervisor")]


def arguments(guest: Guest) -> str:
    """Return the kernel command line."""
    return guest.arguments(guest.choose("Cloud Hypervisor", amd64="console=ttyS0", arm64="console=ttyAMA0"))


def _disk(disk: Disk) -> str:
    return f"path={_quoted(disk.path)},image_type={disk.format},readonly={'on' if disk.is_read_only else 'off'}"


def _quoted(path: Path) -> str:
    """Return a path as a value among others: in double quotes, which there is no way to have in it."""
    text = str(path)
    if bad := sorted(set(text) & set('"[]')):
        raise ExportError(f"Cloud Hypervisor's options cannot hold a path with {' '.join(bad)}", where=text)
    return f'"{text}"' if "," in text else text
