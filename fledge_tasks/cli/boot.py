"""`fledge boot`: start a finished image in QEMU, and see that it does what its manifest says."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from fledge_tasks import fresh
from fledge_tasks.boot import kernel
from fledge_tasks.boot.guest import prepared
from fledge_tasks.boot.qemu import LINES, LOOPBACK, TICK_SECONDS, Machine, accelerators, started, tail
from fledge_tasks.boot.verdict import Verdict, judge
from fledge_tasks.boot.workload import Workload, read
from fledge_tasks.cli.context import Context
from fledge_tasks.config import ImageConfig
from fledge_tasks.errors import InputError, printable
from fledge_tasks.oci.manifest import parse_config
from fledge_tasks.output import Written
from fledge_tasks.stages import DATA

_FILE = click.Path(path_type=Path, dir_okay=False)
_PLATFORMS = ("linux/amd64", "linux/386")


class Booted(msgspec.Struct):
    """The object that `--json` prints. `url` is where the workload answers while it runs, `body` what it answered."""

    name: str
    image: str
    healthy: bool
    text: str
    seconds: float
    accelerator: str
    kernel: str
    url: str | None
    status: int | None
    body: str | None
    exit_code: int | None
    console: list[str]


@click.command()
@click.argument("name")
@click.option("--kernel", "given", type=_FILE, help="A kernel image; default: the newest of Debian's cloud kernels.")
@click.option("--initrd", type=_FILE, help="An initramfs of yours, which starts the workload by itself.")
@click.option(
    "--accel", type=click.Choice(["auto", "kvm", "tcg"]), default="auto", help="Default: KVM where it works, else TCG."
)
@click.option(
    "--timeout", type=click.IntRange(min=1), default=60, metavar="SECONDS", help="How long it may take; default: 60."
)
@click.option("--offline", is_flag=True, help="The guest reaches nobody. Else it reaches what this host does.")
@click.option("--shell", is_flag=True, help="Run a shell in the image, on this terminal, instead of the workload.")
@click.option("--keep", is_flag=True, help="Once it is healthy, let it run until Ctrl-C.")
@click.option("--show", is_flag=True, help="Print what a healthy workload answered.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def boot(
    context: Context,
    *,
    name: str,
    given: Path | None,
    initrd: Path | None,
    accel: str,
    timeout: int,
    offline: bool,
    shell: bool,
    keep: bool,
    show: bool,
    as_json: bool,
) -> int:
    """Start a finished image in QEMU, and see that its workload gets healthy.

    The image is not changed. A workload that serves is healthy when health_check.endpoint of the manifest
    answers; one that has no port is a job, whose exit code is ours.
    """
    if shell and (initrd or keep or show or as_json):
        raise click.UsageError("--shell goes with none of --initrd, --keep, --show and --json")
    image, path, workload = _find(context, name)
    is_job = shell or workload.check is None
    echo = sys.stdout.buffer if is_job and not as_json else None
    linux = kernel.find(given)
    terminal = os.environ.get("TERM", "linux") if shell else None
    begun = time.monotonic()
    with (
        prepared(
            path, image.filesystem.type, workload, linux, initrd=initrd, shell=terminal, is_offline=offline
        ) as hardware,
        _terminal_kept() if shell else contextlib.nullcontext(),
        started(hardware, accelerators(accel), timeout, echo) as machine,
    ):
        for note in machine.notes:
            click.echo(f"note: {printable(note.splitlines()[0])} (trying {machine.accelerator})", err=True)
        if shell:
            return _use(machine)
        verdict = judge(machine, workload, begun + timeout)
        booted = _report(path, workload, linux, machine, verdict, time.monotonic() - begun)
        if as_json:
            click.echo(msgspec.json.encode(booted))
        else:
            _show(booted, verdict, machine, is_shown=show, was_echoed=echo is not None)
        sys.stdout.flush()
        if keep and verdict.is_good and workload.check:
            return _keep(booted, machine)
        return verdict.exit_code if is_job and verdict.exit_code is not None else int(not verdict.is_good)


def _find(context: Context, name: str) -> tuple[ImageConfig, Path, Workload]:
    """Return a finished image's configuration, file and workload. Raises InputError when it is not finished."""
    planner = context.planner(offline=True)  # nothing but the lock file and local files is asked
    try:
        [image] = planner.workspace.select([name])
        if not image.source.platform.startswith(_PLATFORMS):
            raise InputError(
                f"found {image.source.platform}, expected one of {', '.join(_PLATFORMS)}: only these can be booted",
                where=f"{image.file}: source.platform",
            )
        plan = planner.plan(image)
        reason = fresh.is_described(plan) if plan else planner.unresolved(image)
        if plan is None or not isinstance(reason, Written):
            raise InputError(f"there is nothing to boot: {reason}", where=name, hint=f"run `fledge build {name}`")
        config = planner.store.find(plan.config.key())
        if config is None:
            raise InputError("its OCI config is not in the cache", where=name, hint=f"run `fledge lock {name}`")
        oci_config = parse_config(config.file(DATA).read_bytes(), where=f"{name}: OCI config")
        manifest = json.loads(plan.manifest_output.read_bytes())
        return image, plan.output, read(manifest, image.manifest, oci_config)
    finally:
        planner.store.close()


def _report(
    image: Path, workload: Workload, linux: kernel.Kernel, machine: Machine, verdict: Verdict, seconds: float
) -> Booted:
    scheme = workload.check.url.scheme if workload.check else ""
    return Booted(
        name=workload.name,
        image=str(image),
        healthy=verdict.is_good,
        text=verdict.text,
        seconds=round(seconds, 3),
        accelerator=machine.accelerator,
        kernel=linux.name,
        url=f"{scheme}://{LOOPBACK}:{machine.port}/" if machine.port else None,
        status=verdict.answer.status if verdict.answer else None,
        body=verdict.answer.body.decode(errors="replace") if verdict.answer else None,
        exit_code=verdict.exit_code,
        console=machine.console.lines(LINES),
    )


def _show(booted: Booted, verdict: Verdict, machine: Machine, *, is_shown: bool, was_echoed: bool) -> None:
    line = f"{printable(verdict.text)}, {booted.seconds:.1f} s ({booted.accelerator}, {booted.kernel})"
    if booted.healthy:
        click.echo(f"{booted.name}: {'healthy: ' if verdict.answer else ''}{line}")
        if is_shown and verdict.answer:
            click.echo(printable(verdict.answer.body.decode(errors="replace")))
        return
    click.echo(f"error: {booted.name}: {line}", err=True)
    if not (was_echoed and machine.console.has_started):
        click.echo(printable("\n".join(tail(machine.console))), err=True)


def _keep(booted: Booted, machine: Machine) -> int:
    click.echo(f"{booted.name}: {booted.url} until Ctrl-C", err=True)
    while not machine.has_ended():
        time.sleep(TICK_SECONDS)
    click.echo(
        "\n".join([f"error: {booted.name}: the guest has ended", *map(printable, tail(machine.console))]), err=True
    )
    return 1


def _use(machine: Machine) -> int:
    click.echo("Ctrl-A X ends the guest.", err=True)
    while not machine.has_ended():
        time.sleep(TICK_SECONDS)
    code = machine.console.exit_code()
    return 1 if code is None else code


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Leave the terminal as it was, if there is one: QEMU changes it, and may be killed."""
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
