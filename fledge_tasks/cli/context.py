"""What all commands share: the workspace of `-C`, its store, and the jobs option."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from fledge_tasks import workspace
from fledge_tasks.errors import ConfigError, InputError
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from fledge_tasks.workspace import Workspace


@dataclass(frozen=True)
class Context:
    """The folder that the user works in."""

    folder: Path

    def load(self) -> Workspace:
        """Read the workspace. Raises InputError."""
        return workspace.load(self.folder)

    def planner(self, *, locked: bool = False, offline: bool = False) -> Planner:
        """Return a planner for the workspace."""
        found = self.load()
        return Planner(found, _open(found.cache), locked=locked, offline=offline)

    def store(self) -> tuple[Store, Planner | None]:
        """Return the cache, and a planner where there is a workspace. Raises ConfigError for a broken one."""
        try:
            planner = self.planner()
        except ConfigError:
            raise
        except InputError:
            return _open(workspace.cache_folder(self.folder)), None
        return planner.store, planner


def _open(cache: Path) -> Store:
    """Return a store whose notices are printed when the command ends, however it ends."""
    store = Store(cache)

    def show() -> None:
        for line in store.notices.take():
            click.echo(line, err=True)

    click.get_current_context().call_on_close(show)
    return store


def names_argument(function: Callable[..., object]) -> Callable[..., object]:
    """Add NAME…, the images that a command is about."""
    return click.argument("names", nargs=-1, metavar="[NAME]...")(function)


def jobs_option(function: Callable[..., object]) -> Callable[..., object]:
    """Add `-j N`; by default as many jobs as there are processors."""
    count = len(os.sched_getaffinity(0))
    return click.option(
        "-j", "jobs", type=click.IntRange(1, 256), default=count, metavar="N", help=f"Jobs at once; default: {count}."
    )(function)
