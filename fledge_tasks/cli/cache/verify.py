"""`fledge cache verify`: read every byte of the cache."""

from __future__ import annotations

import click
import msgspec

from fledge_tasks.cli.context import Context
from fledge_tasks.cli.view import counted
from fledge_tasks.digest import short


@click.command()
@click.option("--repair", is_flag=True, help="Set damaged entries aside, so that they are built again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def verify(context: Context, *, repair: bool, as_json: bool) -> int:
    """Check every byte of every entry, whatever was found earlier. Exits with 1 when damage stays."""
    store, _ = context.store()
    damaged = []
    keys = store.all_keys()
    try:
        for key in keys:
            entry = store.look(key)
            if reason := store.damage(key):
                if not store.folder(key).exists():
                    continue  # somebody has just removed it
                if repair:
                    store.set_aside(key)
                damaged.append({"stage": entry.stage if entry else "", "key": key, "reason": reason})
                if not as_json:
                    click.echo(f"{entry.stage if entry else 'entry'} {short(key)}: {reason}")
    finally:
        store.close()
    if as_json:
        click.echo(msgspec.json.encode({"entries": len(keys), "damaged": damaged, "repaired": repair}))
    else:
        outcome = "set aside, to be built again" if repair else "damaged: --repair sets them aside"
        click.echo(
            f"{counted(len(keys), 'entry', 'entries')} checked, {len(damaged)} {outcome if damaged else 'damaged'}"
        )
    return int(bool(damaged) and not repair)
