"""`fledge explain`: for each stage of images, hit or miss, and what changed in its key."""

from __future__ import annotations

import click
import msgspec

from fledge_tasks.cli.context import Context, names_argument
from fledge_tasks.cli.plan import as_object
from fledge_tasks.explain import explain as explain_image


@click.command()
@names_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def explain(context: Context, names: tuple[str, ...], as_json: bool) -> None:
    """Show what a build of these images would reuse and what it would run, with the difference to the last one.

    Values are those of the keys: 'old -> new', and what sets them.
    """
    planner = context.planner()
    images = planner.workspace.select(names)
    planner.check(images)
    try:
        explained = {image.name: list(explain_image(planner, image)) for image in images}
    finally:
        planner.store.close()
    if as_json:
        found = [{"name": name, "stages": [as_object(each) for each in tasks]} for name, tasks in explained.items()]
        click.echo(msgspec.json.encode({"images": found}))
        return
    for name, tasks in explained.items():
        click.echo(f"{name}:")
        for each in tasks:
            click.echo(f"  {each.task:<24} {each.status}{f': {each.reason}' if each.reason else ''}")
            for change in each.changes:
                click.echo(f"      {change}")
