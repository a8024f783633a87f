"""Filesystem images without their file data, made from a merged tree: one module for each type."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:  # a build that does nothing asks what is possible, and needs no more
    from fledge_tasks.filesystems.parameters import Make


class Backend(Protocol):
    """What the module of a type offers."""

    make: Make


def backend(kind: str) -> Backend:
    """Return the module of a type, imported when it is needed."""
    return cast("Backend", importlib.import_module(f"fledge_tasks.filesystems.{kind}"))
