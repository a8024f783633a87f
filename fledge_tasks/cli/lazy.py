"""Groups of commands that import the one that runs: what others need takes longer than a build that does nothing."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import click


class LazyGroup(click.Group):
    """A group whose commands are functions in modules of `package`, both of the same name.

    A name that Python has taken, such as 'import', ends in '_' there.
    """

    def __init__(self, *args: Any, package: str, commands: Sequence[str], **options: Any) -> None:
        super().__init__(*args, **options)
        self._package = package
        self._names = tuple(commands)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self._names:
            return None
        name = cmd_name + "_" * (cmd_name == "import")
        command: click.Command = getattr(importlib.import_module(f"{self._package}.{name}"), name)
        return command
