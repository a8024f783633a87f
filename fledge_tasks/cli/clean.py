"""`fledge clean`: remove results, and on request the cache."""

from __future__ import annotations

import click

from fledge_tasks import export, output, userns
from fledge_tasks.cli.context import Context, names_argument


@click.command()
@names_argument
@click.option("--cache", is_flag=True, help="Remove the content store, too; not with NAME.")
@click.pass_obj
def clean(context: Context, names: tuple[str, ...], cache: bool) -> None:
    """Remove what builds wrote for these images, by default for all."""
    if names and cache:
        raise click.UsageError("--cache is about all images: leave out the names")
    workspace = context.load()
    for image in workspace.select(names):
        # The folder of an image goes with the last file in it, so those of exports come first.
        for path in export.written(workspace.output(image).parent):
            if output.remove(path):
                click.echo(f"removed {path}")
        wanted = workspace.output(image), workspace.manifest_output(image)
        for path in (*wanted, *sorted(workspace.outputs(image) - set(wanted))):
            # Files of those names are ours; of the others those that a build has noted.
            if (path in wanted or output.key_of(path) is not None) and output.remove(path):
                click.echo(f"removed {path}")
    if cache:
        # Only what the store made: README and .gitignore in the folder are the user's.
        for name in ("objects", "tmp", "locks", "leases", "aside", "index"):
            userns.remove_tree(workspace.cache / name)
        (workspace.cache / "CACHEDIR.TAG").unlink(missing_ok=True)
        click.echo(f"removed the content of {workspace.cache}")
