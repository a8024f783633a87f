"""Filesystem images without their file data, made from a merged tree: one module for each type, or two."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:  # a build that does nothing asks what is possible, and needs no more
    from fledge_tasks.filesystems.parameters import Make


class Backend(Protocol):
    """What the module of a type offers."""

    make: Make


def backend(kind: str) -> Backend:
    """Return the module that makes a type here, imported when it is needed; `possible.check` comes first."""
    from fledge_tasks.filesystems import possible

    name = kind if possible.obstacle_to_mounting(kind) is None else f"{kind}_rootless"
    return cast("Backend", importlib.import_module(f"fledge_tasks.filesystems.{name}"))
