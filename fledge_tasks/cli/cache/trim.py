"""`fledge cache trim`: keep what the lock files reach, and nothing else."""

from __future__ import annotations

import click

from fledge_tasks import collect
from fledge_tasks.cli.cache.gc import show
from fledge_tasks.cli.context import Context
from fledge_tasks.errors import InputError


@click.command()
@click.option("--ci", is_flag=True, help="Also leave nothing that is not worth saving: locks, logs, half of an index.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def trim(context: Context, *, ci: bool, dry_run: bool, as_json: bool) -> None:
    """Remove every entry that the workspace's images do not need as they are now.

    With --ci it is what a job should run before the cache folder is saved. What running builds use stays.
    """
    store, planner = context.store()
    if planner is None:
        raise InputError("there is no workspace here, so nothing would be left", where=str(context.folder))
    try:
        done = collect.collect(store, planner, only_reached=True, only_own=ci, dry_run=dry_run)
    finally:
        store.close()
    if ci and not dry_run:
        collect.leave_only_content(store)
    show(done, dry_run=dry_run, as_json=as_json)
