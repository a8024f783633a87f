"""`fledge cache gc`: remove what has not been used for the longest time."""

from __future__ import annotations

import time

import click
import msgspec

from fledge_tasks import collect
from fledge_tasks.cli.cache.units import Age, Size
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.view import counted, human
from fledge_tasks.collect import Collected
from fledge_tasks.digest import short


@click.command()
@click.option("--max-size", type=Size(), metavar="SIZE", help="What all entries may take on the disk, such as 10G.")
@click.option("--max-age", type=Age(), metavar="AGE", help="How old the last use of an entry may be, such as 30d.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def gc(context: Context, *, max_size: int | None, max_age: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove entries, least recently used first.

    What lock files reach stays, and so does what running builds use, whatever the limits.
    """
    if max_size is None and max_age is None:
        raise click.UsageError("say what to remove: --max-size, --max-age, or both")
    store, planner = context.store()
    try:
        done = collect.collect(store, planner, max_bytes=max_size, max_age_seconds=max_age, dry_run=dry_run)
    finally:
        store.close()
    show(done, dry_run=dry_run, as_json=as_json)


def show(done: Collected, *, dry_run: bool, as_json: bool) -> None:
    """Print what was removed, and why the rest stays."""
    removed, kept = (sum(each.allocated for each in group) for group in (done.removed, done.kept))
    if as_json:
        click.echo(
            msgspec.json.encode(
                {
                    "dry_run": dry_run,
                    "removed": [
                        {"stage": each.stage, "key": each.key, "bytes": each.allocated} for each in done.removed
                    ],
                    "removed_bytes": removed,
                    "kept": len(done.kept),
                    "kept_bytes": kept,
                }
            )
        )
        return
    for each in done.removed if dry_run else ():
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.used))
        click.echo(
            f"would remove {each.stage or 'damaged'} {short(each.key)}, {human(each.allocated)}, last used {when}"
        )
    verb = "would remove" if dry_run else "removed"
    click.echo(f"{verb} {counted(len(done.removed), 'entry', 'entries')}, {human(removed)}")
    reached = sum(each.key in done.reached for each in done.kept)
    held = sum(each.key in done.held - done.reached for each in done.kept)
    click.echo(
        f"{len(done.kept)} stay, {human(kept)}: {reached} that lock files reach, {held} that running builds use,"
        f" {len(done.kept) - reached - held} within the limits"
    )
