"""The command `fledge`: one file per command; the only place that prints or picks exit codes.

Exit codes: 0 done, 1 a build failed, 2 the user's input is wrong, 128 + n ended by signal n.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from fledge_tasks import __version__
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.lazy import LazyGroup
from fledge_tasks.errors import FledgeError
from fledge_tasks.interrupt import Interrupted, interruptible

COMMANDS = (
    "init", "build", "plan", "explain", "lock", "verify", "boot", "export", "cache", "schema", "doctor", "clean",
)  # fmt: skip


@click.group(
    cls=LazyGroup, package=__name__, commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
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


def main() -> None:
    """Run the command line and exit."""
    _open_standard_streams()
    sys.exit(_run())


def _open_standard_streams() -> None:
    """Give those that the caller closed to /dev/null: the next file that is opened would take their number."""
    for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            setattr(sys, name, open(fd, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115  # for good


def _run() -> int:
    try:
        with interruptible():
            code = cli(standalone_mode=False, prog_name="fledge")
            sys.stdout.flush()
            return int(code or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except FledgeError as error:
        print_error(error)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        cause = stop.__cause__ or stop  # click makes an Abort of every KeyboardInterrupt
        click.echo("interrupted", err=True)
        return cause.exit_code if isinstance(cause, Interrupted) else 130
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        click.echo(f"error: {error}", err=True)
        return 1


def print_error(error: FledgeError) -> None:
    """Print an error the way all errors look."""
    click.echo(f"error: {error}", err=True)
