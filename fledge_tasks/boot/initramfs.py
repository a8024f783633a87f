"""The first root filesystem of a guest: busybox, the kernel's modules, and the scripts that start the workload.

    /init                     PID 1, `init.sh`
    /bin/*                    links to busybox for what it calls
    /modules/NNN.ko           in the order in which they are loaded
    /fledge/                  what workload and shell need; the guest has it as /dev/fledge, beside the image
        busybox, become       programs
        enter.sh workload.sh  run one after the other
        settings.sh           what differs from guest to guest, made here

The archive is not compressed: it is made in some ten milliseconds, and its guest has less to do. The same
arguments give the same bytes.
"""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import struct
from collections.abc import Iterable
from pathlib import Path

from fledge_tasks.boot.become import program
from fledge_tasks.boot.workload import DEFAULT_PATH, Workload
from fledge_tasks.errors import BootError, ToolError
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.run import environment, package_of

READ_ONLY = frozenset(kind for kind, options in OPTIONS.items() if options.is_read_only)
"""Types of filesystems that get an overlay in memory, so that the workload can write."""

MODULES = ("virtio_mmio", "virtio_blk", "virtio_net")
"""What every guest needs, beside its filesystem."""

_SCRIPTS = ("enter.sh", "workload.sh")
_FOLDERS = ("bin", "dev", "fledge", "image", "lower", "modules", "proc", "sys", "upper")
_APPLETS = ("chroot", "cp", "dmesg", "hostname", "insmod", "ip", "ln", "mkdir", "mount", "reboot", "stty", "unshare")
_PT_INTERP = 3
_X86_64 = 62


def modules(filesystem: str) -> tuple[str, ...]:
    """Return the modules that a guest needs whose image has this type of filesystem."""
    return (*MODULES, filesystem, *(("overlay",) if filesystem in READ_ONLY else ()))


def make(workload: Workload, filesystem: str, modules: Iterable[bytes], *, shell: str | None = None) -> bytes:
    """Return the initramfs of a guest that runs `workload`, or a shell on its terminal of the type `shell`.

    Raises ToolError when there is no busybox, BootError when it is one that cannot be used.
    """
    here = Path(__file__).parent
    files = {name: (here / name).read_bytes() for name in _SCRIPTS}
    files["settings.sh"] = settings(workload, filesystem, shell).encode()
    archive = _Archive()
    for folder in _FOLDERS:
        archive.add(folder, stat.S_IFDIR | 0o755)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("init", stat.S_IFREG | 0o755, (here / "init.sh").read_bytes())
    archive.add("fledge/busybox", stat.S_IFREG | 0o755, _busybox())
    archive.add("fledge/become", stat.S_IFREG | 0o755, program())
    for name, data in files.items():
        archive.add(f"fledge/{name}", stat.S_IFREG | 0o644, data)
    for applet in _APPLETS:
        archive.add(f"bin/{applet}", stat.S_IFLNK | 0o777, b"/fledge/busybox")
    for number, module in enumerate(modules):
        archive.add(f"modules/{number:03}.ko", stat.S_IFREG | 0o644, module)
    return archive.finished()


def settings(workload: Workload, filesystem: str, shell: str | None) -> str:
    """Return what the scripts read: variables, and the function `launch`.

    It takes what becomes the user and the program's path, and adds environment and arguments.
    """
    variables = {
        "hostname": workload.name[:64],  # sethostname(2)
        "filesystem": filesystem,
        "is_read_only": "yes" if filesystem in READ_ONLY else "",
        "is_shell": "" if shell is None else "yes",
        "user": workload.user if shell is None else "",
        "workdir": workload.workdir if shell is None else "/",
        "path": workload.path,
        "command": workload.argv[0],
    }
    env = {"PATH": DEFAULT_PATH, **workload.env, **({} if shell is None else {"TERM": shell})}
    session = "" if shell is None else '"$busybox" setsid -c '
    assigned = shlex.join(f"{name}={value}" for name, value in env.items())
    argv = shlex.join(workload.argv if shell is None else ("sh",))
    return "".join(
        [
            *(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()),
            f'launch() {{\n    exec {session}"$busybox" env -i "HOME=$home" {assigned} "$@" {argv}\n}}\n',
        ]
    )


def _busybox() -> bytes:
    path = shutil.which("busybox", path=environment()["PATH"])
    install = f"install it, for example: sudo apt-get install {package_of('busybox')}"
    if path is None:
        raise ToolError("busybox is not installed (not found on PATH)", hint=install)
    data = Path(path).read_bytes()
    if not _is_static(data):
        raise BootError("this busybox needs libraries, expected a static one for x86-64", where=path, hint=install)
    return data


def _is_static(data: bytes) -> bool:
    """Tell whether a program runs on x86-64 all by itself (elf(5): no segment PT_INTERP)."""
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 18) != (_X86_64,):
        return False
    offset, size, count = *struct.unpack_from("<Q", data, 32), *struct.unpack_from("<HH", data, 54)
    return _PT_INTERP not in [struct.unpack_from("<I", data, offset + size * number)[0] for number in range(count)]


class _Archive:
    """A cpio archive in the format 'newc' (kernel, Documentation/driver-api/early-userspace/buffer-format.rst).

    All files belong to root and are of 1970.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def add(self, path: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add a file; `data` is the target of a link. Folders come before what is in them."""
        self._count += 1
        name = os.fsencode(path) + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name), 0)
        head = b"070701" + b"".join(b"%08x" % field for field in fields) + name
        self._parts += [head, bytes(-len(head) % 4), data, bytes(-len(data) % 4)]

    def finished(self) -> bytes:
        """Return the whole archive."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)
