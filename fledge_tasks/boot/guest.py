"""What a guest for an image and its workload is made of: kernel, initramfs, disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from fledge_tasks import qcow2
from fledge_tasks.boot import initramfs
from fledge_tasks.boot.kernel import Kernel
from fledge_tasks.boot.qemu import Hardware
from fledge_tasks.boot.workload import Workload
from fledge_tasks.errors import InputError
from fledge_tasks.fsutil import write_all


@contextlib.contextmanager
def prepared(
    image: Path,
    filesystem: str,
    workload: Workload,
    kernel: Kernel,
    *,
    initrd: Path | None = None,
    shell: str | None = None,
    is_offline: bool = False,
) -> Iterator[Hardware]:
    """Yield the guest that runs `workload`, or instead of it a shell on a terminal of the type `shell`.

    Our initramfs is in memory alone and goes with the block. `initrd` takes its place, and is told root and
    type of filesystem on the kernel's command line. Raises InputError when it is not there, BootError for a module
    that the kernel does not have, ToolError without a busybox for it.
    """
    descriptors: list[int] = []
    with contextlib.ExitStack() as stack:
        if initrd is None:
            modules = kernel.load_order(initramfs.modules(filesystem))
            fd = os.memfd_create("initramfs")
            stack.callback(os.close, fd)
            descriptors.append(fd)
            write_all(fd, initramfs.make(workload, filesystem, modules, shell=shell))
            words, place = "quiet", Path(f"/dev/fd/{fd}")
        elif initrd.is_file():
            mode = "ro" if filesystem in initramfs.READ_ONLY else "rw"
            words, place = f"root=/dev/vda rootfstype={filesystem} {mode}", initrd
        else:
            raise InputError("there is no such initramfs", where=str(initrd))
        yield Hardware(
            image=image,
            disk_format="qcow2" if qcow2.is_qcow2(image) else "raw",
            kernel=kernel.image,
            initrd=place,
            words=words,
            cpus=workload.cpus,
            memory_mb=workload.memory_mb,
            port=workload.check.port if workload.check and shell is None else None,
            descriptors=tuple(descriptors),
            is_foreign=initrd is not None,
            is_offline=is_offline,
            has_terminal=shell is not None,
        )
