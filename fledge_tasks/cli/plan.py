"""`fledge plan`: what a build would run, and why. Runs nothing."""

from __future__ import annotations

import click
import msgspec

from fledge_tasks.cli.context import Context, names_argument
from fledge_tasks.explain import Explanation, explain


@click.command()
@names_argument
@click.option("--locked", is_flag=True, help="As for `fledge build`.")
@click.option("--offline", is_flag=True, help="As for `fledge build`.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def plan(context: Context, *, names: tuple[str, ...], locked: bool, offline: bool, as_json: bool) -> None:
    """Show what `fledge build` would run, and why; run nothing."""
    planner = context.planner(locked=locked, offline=offline)
    images = planner.workspace.select(names)
    planner.check(images)
    try:
        planned = {image.name: [each for each in explain(planner, image) if each.status == "miss"] for image in images}
    finally:
        planner.store.close()
    if as_json:
        found = [{"name": name, "tasks": [as_object(each) for each in tasks]} for name, tasks in planned.items()]
        click.echo(msgspec.json.encode({"images": found}))
        return
    for name, tasks in planned.items():
        click.echo(f"{name}:" if tasks else f"{name}: up to date")
        for each in tasks:
            click.echo(f"  {each.task:<24} {each}")
        if [each.stage for each in tasks] == ["resolve"]:
            click.echo(f"  {'...':<24} what else is known once it is resolved")


def as_object(each: Explanation) -> dict[str, object]:
    """Return what `--json` prints of a task."""
    return {**each._asdict(), "changes": [change._asdict() for change in each.changes]}
