"""`fledge lock`: pin references in fledge.lock."""

from __future__ import annotations

import click

from fledge_tasks import runner
from fledge_tasks.cli.context import Context, jobs_option, names_argument
from fledge_tasks.cli.view import make_view
from fledge_tasks.digest import sha256_bytes, short
from fledge_tasks.errors import FledgeError
from fledge_tasks.tasks import Graph, Loader


@click.command()
@names_argument
@jobs_option
@click.option("--update", is_flag=True, help="Ask for pinned images and agents anew.")
@click.pass_obj
def lock(context: Context, names: tuple[str, ...], jobs: int, update: bool) -> int:
    """Look up what is not pinned in fledge.lock yet, and pin it.

    Without a NAME, entries that no image of the workspace uses are dropped.
    """
    planner = context.planner()
    images = planner.workspace.select(names)
    planner.check(images)
    before = planner.lock.read()
    view = make_view(is_quiet=True)
    try:
        with view:
            loader = Loader(Graph(planner, update=update), images)
            outcome = runner.run(loader, [f"resolve:{image.name}" for image in images], jobs=jobs, listener=view)
        if not names and not outcome.failures:
            used = {planner.lock_name(image) for image in images}
            agents = {name for image in images if (name := planner.agent_name(image))}
            with planner.store.building(sha256_bytes(f"lock file {planner.workspace.lock}".encode())):
                planner.lock.keep_only(used, agents)
    finally:
        planner.store.close()
    after = planner.lock.read()
    for name in sorted(before.images.keys() | after.images.keys()):
        old, new = before.images.get(name), after.images.get(name)
        if old is None or new is None or old.image != new.image:
            _show(name, old.image.manifest if old else None, new.image.manifest if new else None)
    for name in sorted(before.agents.keys() | after.agents.keys()):
        was, now = before.agents.get(name), after.agents.get(name)
        if was != now:
            _show(name, was.digest if was else None, now.digest if now else None)
    codes = set()
    for task, result in outcome.failures.items():
        click.echo(f"error: {task}: {result.error}", err=True)
        codes.add(result.error.exit_code if isinstance(result.error, FledgeError) else 1)
    return min(codes, default=0)


def _show(name: str, old: str | None, new: str | None) -> None:
    """Print what became of an entry, given its digests."""
    if new is None:
        click.echo(f"{name}: dropped")
    else:
        click.echo(f"{name}: {short(new)}" + (f" (was {short(old)})" if old else ""))
