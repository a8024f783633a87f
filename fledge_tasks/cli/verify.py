"""`fledge verify`: does a finished image hold what it should?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import click
import msgspec

from fledge_tasks import stages
from fledge_tasks.cli.context import Context
from fledge_tasks.cli.view import counted
from fledge_tasks.config import ImageConfig
from fledge_tasks.errors import InputError, MountError
from fledge_tasks.filesystems.comparison import Difference
from fledge_tasks.filesystems.options import OPTIONS
from fledge_tasks.manifest import ROOT_HASH
from fledge_tasks.output import key_of
from fledge_tasks.plan import ImagePlan
from fledge_tasks.planner import Planner
from fledge_tasks.verify import (
    check_disk,
    check_manifest,
    check_raw,
    check_structure,
    check_tree,
    compare_tree,
    label,
    raw_of,
    read_all,
)
from fledge_tasks.workspace import MANIFEST_NAME, TREE_NAME

_SHOWN = 100


class Verified(msgspec.Struct, omit_defaults=True):
    """One image file. `compared` tells whether its tree was known, and not only the manifest.

    `unread` is why this host could not look into it, which says nothing about the image.
    """

    name: str
    image: str
    compared: bool
    differences: list[Difference]
    unread: str | None = None


@click.command()
@click.argument("images", nargs=-1, metavar="[NAME|FILE]...")
@click.option(
    "--manifest",
    type=click.Path(path_type=Path, dir_okay=False),
    help="That of FILE; default: manifest.json beside it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def verify(context: Context, images: tuple[str, ...], manifest: Path | None, as_json: bool) -> int:
    """Read finished images back and compare every entry with what should be in them.

    By default all of the workspace. Of a FILE that came from elsewhere, the checksum and the structure
    are checked, and the entries, too, if the workspace has the image that its manifest names. Exit code
    1 means that something differs, or could not be looked at: xfs and btrfs are read by root alone.
    """
    names = [name for name in images if not _is_file(name)]
    files = [Path(name) for name in images if _is_file(name)]
    if manifest is not None and (names or len(files) != 1):
        raise click.UsageError("--manifest goes with one FILE")
    verified = []
    if names or not images:
        planner = context.planner()
        try:
            for image in planner.workspace.select(names):
                planner.hold(image)  # no clean-up takes its layers away meanwhile
                with _busy(image.name):
                    verified.append(_verify_image(planner, image))
        finally:
            planner.store.close()
    for file in files:
        with _busy(str(file)):
            verified.append(_verify_file(context, file, manifest or file.with_name(MANIFEST_NAME)))
    if as_json:
        click.echo(msgspec.json.encode({"images": verified}))
    else:
        for each in verified:
            _show(each)
    return int(any(each.differences or each.unread for each in verified))


def _is_file(name: str) -> bool:
    return os.sep in name or os.path.isfile(name)


def _verify_image(planner: Planner, image: ImageConfig) -> Verified:
    plan = _plan(planner, image)
    file, manifest = planner.workspace.output(image), planner.workspace.manifest_output(image)
    if not file.is_file():
        missing = Difference("", f"there is no image: run `fledge build {image.name}`")
        return Verified(image.name, str(file), False, [missing])
    kind = image.filesystem.type
    is_current = key_of(file) == plan.assemble.key()
    if is_current:
        differences, unread = _look(file, manifest, kind, partial(_compare, planner, plan))
    else:
        message = f"what goes in has changed since the image was made: run `fledge build {image.name}`"
        found, unread = _look(file, manifest, kind, partial(read_all, kind=kind))
        differences = [Difference("", message), *found]
    if image.output.verity and label(manifest, ROOT_HASH) is None:
        differences.append(Difference("", f"the manifest has no root hash: run `fledge build {image.name}`"))
    return Verified(image.name, str(file), is_current and not unread, differences, unread)


def _look(
    file: Path, manifest: Path, kind: str, compare: Callable[[Path], Iterable[Difference]]
) -> tuple[list[Difference], str | None]:
    """Return what is wrong with an image file, and what `compare` finds in its raw form; and why it could not look."""
    differences = [*check_manifest(file, manifest)]
    if broken := list(check_disk(file)):
        return differences + broken, None
    with raw_of(file) as raw:
        if raw != file:
            differences += check_raw(raw, manifest)
        differences += check_tree(raw, file.with_name(TREE_NAME), manifest)
        differences += check_structure(raw, kind)
        try:
            return [*differences, *compare(raw)], None
        except MountError as error:
            return differences, error.message


def _verify_file(context: Context, file: Path, manifest: Path) -> Verified:
    for path, what, hint in ((file, "image", None), (manifest, "manifest", "--manifest says where it is")):
        if not path.is_file():
            raise InputError(f"there is no such {what}", where=str(path), hint=hint)
    kind = _type_in(manifest)
    found = _named_in(context, manifest)
    compare = partial(_compare, *found) if found else partial(read_all, kind=kind)
    differences, unread = _look(file, manifest, kind, compare)
    return Verified(file.name, str(file), found is not None and not unread, differences, unread)


def _type_in(manifest: Path) -> str:
    """Return the type of filesystem that a manifest tells the guest, ext4 when it tells none that we know."""
    kind = label(manifest, "volant.rootfs_fstype")
    return kind if kind in OPTIONS else "ext4"


def _named_in(context: Context, manifest: Path) -> tuple[Planner, ImagePlan] | None:
    """Return the plan of the workspace's image that a manifest describes, None if there is none."""
    with contextlib.suppress(InputError, OSError, ValueError, AttributeError, RecursionError):
        described = json.loads(manifest.read_bytes())
        planner = context.planner()
        for image in planner.workspace.select([str(described.get("name"))]):
            plan = _plan(planner, image)
            if plan.locked.image.manifest == described.get("image_digest"):
                return planner, plan
    return None


def _plan(planner: Planner, image: ImageConfig) -> ImagePlan:
    plan = planner.plan(image)
    if plan is None:
        reason = str(planner.unresolved(image))
        raise InputError(reason, where=image.name, hint=f"run `fledge build {image.name}`")
    return plan


def _compare(planner: Planner, plan: ImagePlan, file: Path) -> Iterator[Difference]:
    sources = stages.sources_of(planner.store, plan)
    return compare_tree(
        file, stages.merged(plan, sources), stages.payloads_of(sources), plan.mkfs.epoch, plan.mkfs.filesystem.type
    )


@contextlib.contextmanager
def _busy(name: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"verifying {name}"):
        yield


def _show(verified: Verified) -> None:
    for difference in verified.differences[:_SHOWN]:
        click.echo(f"{verified.name}: {difference}")
    if verified.unread:
        click.echo(f"{verified.name}: cannot be mounted here: {verified.unread}: xfs and btrfs are read by root alone")
    count = len(verified.differences)
    if count > _SHOWN:
        click.echo(f"{verified.name}: ... and {count - _SHOWN} more")
    if count:
        click.echo(f"{verified.name}: {verified.image} is not what it should be: {counted(count, 'difference')}")
    elif verified.unread:
        click.echo(f"{verified.name}: {verified.image} is what its manifest says, but its entries were not looked at")
    else:
        known = "holds what it should" if verified.compared else "is what its manifest says, and can be read"
        click.echo(f"{verified.name}: {verified.image} {known}")
