"""`fledge schema`: JSON Schemas of what we read and write."""

from __future__ import annotations

import json

import click

from fledge_tasks.config import FLEDGE
from fledge_tasks.manifest import FINISHED
from fledge_tasks.schema import document

_DOCUMENTS = {
    "manifest": (FINISHED, "manifest.json: Volant's plugin manifest v1, as fledge-tasks writes it"),
    "fledge": (FLEDGE, "fledge.toml, with a [manifest] table like manifest.toml"),
}


@click.command()
@click.argument("name", type=click.Choice(list(_DOCUMENTS)), default="manifest", metavar="[manifest|fledge]")
def schema(name: str) -> None:
    """Print the JSON Schema (draft 7) of manifest.json, or of fledge.toml.

    It is made from what checks these documents. Editors use it for completion and for errors as you type.
    """
    click.echo(json.dumps(document(*_DOCUMENTS[name]), indent=2))
