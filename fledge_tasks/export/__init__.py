"""What other virtual machine monitors need to start an image: one module for each."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from fledge_tasks.export.guest import File, Guest

MONITORS = ("firecracker", "cloud-hypervisor", "qemu")
FILES = ("vm_config.json", "run.sh")
"""The names of all files that are written for any of them."""


class Monitor(Protocol):
    """What the module of a monitor offers. Its functions raise ExportError for what the monitor cannot do."""

    def arguments(self, guest: Guest) -> str:
        """Return the kernel command line."""

    def files(self, guest: Guest, folder: Path) -> Sequence[File]:
        """Return the files that start a guest, and that will be in `folder`.

        The same guest gives the same bytes.
        """


def monitor(name: str) -> Monitor:
    """Return the module of a monitor."""
    return cast("Monitor", importlib.import_module(f"fledge_tasks.export.{name.replace('-', '_')}"))


def written(folder: Path) -> list[Path]:
    """Return the files that are there of exports into the folders that they go to below that of an image."""
    paths = (folder / name / file for name in MONITORS for file in FILES)
    return [path for path in paths if path.is_file()]
