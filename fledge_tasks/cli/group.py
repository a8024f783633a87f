"""The group of all commands, and what its errors come to."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from fledge_tasks import __version__
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.lazy import LazyGroup
from fledge_tasks.errors import FledgeError

COMMANDS = (
    "init", "build", "plan", "explain", "lock", "verify", "boot", "export", "cache", "schema", "doctor", "clean",
)  # fmt: skip


@click.group(
    cls=LazyGroup, package=__package__, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="fledge")
@click.option(
    "-C", "folder", default=".", metavar="DIR", type=click.Path(path_type=Path), help="Workspace; default: this folder."
)
@click.pass_context
def cli(context: click.Context, folder: Path) -> None:
    """Build microVM root filesystems from OCI images, and only what changed.

    Every fledge.toml below the workspace describes one image; results are build/NAME/rootfs.img and
    build/NAME/manifest.json.
    """
    context.obj = Context(folder)


def run() -> int:
    """Run the command line and return the exit code. Raises KeyboardInterrupt when a signal ended it."""
    try:
        code = cli(standalone_mode=False, prog_name="fledge")
        sys.stdout.flush()
        return int(code or 0)
    except click.Abort as stop:  # click makes one of every KeyboardInterrupt, and of every EOFError
        cause = stop.__cause__
        raise (cause if isinstance(cause, KeyboardInterrupt) else KeyboardInterrupt) from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FledgeError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return 1
