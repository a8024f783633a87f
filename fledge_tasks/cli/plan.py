"""`fledge plan`: what a build would run, and why. Runs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import click

from fledge_tasks import fresh, output
from fledge_tasks.cli.context import Context, names_argument
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import short
from fledge_tasks.plan import Planner


@click.command()
@names_argument
@click.option("--locked", is_flag=True, help="As for `fledge build`.")
@click.option("--offline", is_flag=True, help="As for `fledge build`.")
@click.pass_obj
def plan(context: Context, names: tuple[str, ...], locked: bool, offline: bool) -> None:
    """Show what `fledge build` would run, and why; run nothing."""
    planner = context.planner(locked=locked, offline=offline)
    images = planner.workspace.select(names)
    planner.check(images)
    try:
        for image in images:
            rows = list(explain(planner, image))
            click.echo(f"{image.name}:" if rows else f"{image.name}: up to date")
            for task, reason in rows:
                click.echo(f"  {task:<24} {reason}")
    finally:
        planner.store.index.close()


def explain(planner: Planner, image: ImageConfig) -> Iterator[tuple[str, str]]:
    """Yield (task, reason) for each task that a build would run, in the order of the pipeline."""
    made = planner.plan(image)
    if made is None:
        yield f"resolve:{image.name}", str(planner.unresolved(image))
        yield "...", "what else is known once it is resolved"
        return
    described = fresh.is_described(made)
    if isinstance(described, output.Written):
        return
    assembled = fresh.is_assembled(made)
    if isinstance(assembled, str):
        if not fresh.is_made(planner.store, made):
            if not fresh.is_resolved(planner, image):
                yield f"resolve:{image.name}", "the OCI config or the agent is not in the cache"
            reason = "no such filesystem in the cache"
        else:
            reason = ""
        for layer in dict.fromkeys(made.layers):
            if not fresh.is_unpacked(planner.store, layer):
                name = short(layer.ref.diff_id)
                if not fresh.is_fetched(planner.store, layer):
                    yield f"fetch:{name}", f"layer is not in the cache ({layer.ref.size} bytes to move)"
                yield f"unpack:{name}", "layer is not in the cache"
        if reason:
            yield f"mkfs:{image.name}", reason
        yield f"assemble:{image.name}", assembled
        yield f"manifest:{image.name}", "the image file is made anew"
    else:
        yield f"manifest:{image.name}", described
