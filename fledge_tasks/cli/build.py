"""`fledge build`: build images."""

from __future__ import annotations

import time

import click
import msgspec

from fledge_tasks import collector, runner
from fledge_tasks.cli.context import Context, jobs_option, names_argument
from fledge_tasks.cli.report import Report, make_report
from fledge_tasks.cli.view import make_view, show_report
from fledge_tasks.tasks import Graph, Loader


@click.command()
@names_argument
@jobs_option
@click.option("--locked", is_flag=True, help="Refuse what fledge.lock does not hold, or holds differently.")
@click.option("--offline", is_flag=True, help="Never touch the network.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object about what was done.")
@click.pass_obj
def build(context: Context, *, names: tuple[str, ...], jobs: int, locked: bool, offline: bool, as_json: bool) -> int:
    """Build images, by default all of the workspace. What is up to date does not run."""
    collector.retire()
    started = time.monotonic()
    planner = context.planner(locked=locked, offline=offline)
    images = planner.workspace.select(names)
    planner.check(images)
    view = make_view(is_quiet=as_json)
    graph = Graph(planner, tell=view.tell)
    targets = [f"build:{image.name}" for image in images]
    try:
        with view:
            outcome = runner.run(Loader(graph, images), targets, jobs=jobs, listener=view)
        graph.record()
    finally:
        planner.store.close()
    report = make_report(planner, images, outcome.results, time.monotonic() - started)
    show_errors(report)
    if as_json:
        click.echo(msgspec.json.encode(report.summary))
    else:
        show_report(report)
    return report.exit_code


def show_errors(report: Report) -> None:
    """Print what failed, each error once."""
    for error in report.errors:
        click.echo(f"error: {error}", err=True)
