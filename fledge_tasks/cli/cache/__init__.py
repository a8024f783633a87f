"""`fledge cache`: look at the content store, clean it up, carry it elsewhere."""

from __future__ import annotations

import click

from fledge_tasks.cli.lazy import LazyGroup

COMMANDS = ("stats", "gc", "trim", "verify", "export", "import")


@click.group(cls=LazyGroup, package=__name__, commands=COMMANDS)
def cache() -> None:
    """Look at the cache, clean it up, carry it elsewhere."""
