"""`fledge cache stats`: what is in the cache, and what it saved."""

from __future__ import annotations

import datetime
import sys
from collections import defaultdict

import click
import msgspec

from fledge_tasks import collect, usage
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.view import human, show_rows
from fledge_tasks.usage import Counts, Sums


class Kind(Sums):
    """All entries of one kind.

    bytes     apparent size           allocated_bytes  what they take on the disk
    reached   entries that an image needs     shared  entries that more than one image needs
    unshared_bytes  what the reached ones would take if every image had its own
    """

    entries: int = 0
    bytes: int = 0
    allocated_bytes: int = 0
    reached: int = 0
    shared: int = 0
    unshared_bytes: int = 0


class Stats(msgspec.Struct):
    """The object that `--json` prints. `images` is the number of images that the cache knows of."""

    cache: str
    images: int
    kinds: dict[str, Kind]
    today: Counts
    total: Counts


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def stats(context: Context, *, as_json: bool) -> None:
    """Show the entries of the cache by kind, how images share them, and what reusing them saved."""
    store, planner = context.store()
    try:
        found = collect.candidates(store)
        needed = collect.reached(store, planner)
        days = usage.days(store.index)
    finally:
        store.close()
    kinds: defaultdict[str, Kind] = defaultdict(Kind)
    for each in found:
        kind, users = kinds[each.stage or "damaged"], len(needed.get(each.key, ()))
        kind.entries += 1
        kind.bytes += each.size
        kind.allocated_bytes += each.allocated
        kind.reached += users > 0
        kind.shared += users > 1
        kind.unshared_bytes += users * each.size
    total = Counts()
    for counts in days.values():
        total.add(counts)
    today = days.get(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", Counts())
    images = len({name for users in needed.values() for name in users})
    result = Stats(str(store.root), images, dict(sorted(kinds.items())), today, total)
    if as_json:
        click.echo(msgspec.json.encode(result))
    else:
        _show(result)


def _show(result: Stats) -> None:
    click.echo(f"{result.cache}: used by {result.images} image{'s' * (result.images != 1)}")
    everything = Kind()
    for kind in result.kinds.values():
        everything.add(kind)
    rows = [
        (name, str(kind.entries), human(kind.bytes), human(kind.allocated_bytes), str(kind.reached), str(kind.shared),
         human(kind.unshared_bytes))
        for name, kind in [*result.kinds.items(), ("all", everything)]
    ]  # fmt: skip
    show_rows(("kind", "entries", "size", "on disk", "needed", "shared", "without sharing"), rows, sys.stdout)
    rows = [
        (name, str(counts.hits), str(counts.misses), f"{counts.seconds_saved:.1f} s", f"{counts.seconds_built:.1f} s",
         human(counts.bytes_saved), human(counts.bytes_built))
        for name, counts in (("today", result.today), ("in all", result.total))
    ]  # fmt: skip
    show_rows(("stages", "reused", "built", "saved", "spent", "bytes saved", "bytes built"), rows, sys.stdout)
