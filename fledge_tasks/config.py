"""fledge.toml, and manifest.toml beside it, read into frozen records.

All mistakes in an image's files come out at once, each with file, key path, what was found and
what was expected; a record exists only when there is none. Nothing here looks at the image, the
mapped files or the agent: whether those are there is found out by the stages that need them.
"""

from __future__ import annotations

import os
import posixpath
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import tomli

from fledge_tasks.errors import ConfigError, InputError, Problem
from fledge_tasks.filesystem_settings import (
    MAX_SIZE_MB,
    Filesystem,
    filesystem_of,
    filesystem_shape,
    size_conflict,
)
from fledge_tasks.manifest import CHECKSUM, MANIFEST, NAME, check, normal_checksum
from fledge_tasks.oci import reference
from fledge_tasks.shapes import (
    MAX_INTEGER,
    URL,
    Finding,
    Table,
    TableOf,
    Value,
    Variants,
    integer,
    join,
    matching,
    one_of,
    quoted,
    text,
)

FILE_NAME = "fledge.toml"
MANIFEST_FILE_NAME = "manifest.toml"
BASE_URL_VARIABLE = "FLEDGE_AGENT_BASE_URL"


AgentStrategy = Literal["release", "local", "http"]
DiskFormat = Literal["raw", "qcow2"]
Compression = Literal["zlib", "zstd"]


class Source(msgspec.Struct, frozen=True):
    """`[source]`: the image reference as written, and the platform as os/arch[/variant]."""

    image: str
    platform: str = "linux/amd64"


class Output(msgspec.Struct, frozen=True):
    """`[output]`: the form in which an image is published.

    `compression` is that of a qcow2's clusters; with `verity` a hash tree for dm-verity comes with it.
    """

    format: DiskFormat = "raw"
    compression: Compression | None = None
    verity: bool = False


class Limits(msgspec.Struct, frozen=True):
    """`[limits]`: what one layer may come to, so that a hostile one cannot fill disk or memory.

    layer_mb  MiB of its uncompressed archive
    entries   members of its archive
    ratio     how many times as large as the blob the archive may be, once it is over 1 GiB
    """

    layer_mb: int = 64 << 10
    entries: int = 5_000_000
    ratio: int = 200


class Agent(msgspec.Struct, frozen=True):
    """`[agent]`: `release` has `version`, `local` has `path`, `http` has `url`.

    `checksum` is `sha256:` and 64 lower-case hexadecimal digits. `base_url`
    of a release is that of the file, else that of FLEDGE_AGENT_BASE_URL, else None: the project's own.
    """

    source_strategy: AgentStrategy
    version: str | None = None
    path: str | None = None
    url: str | None = None
    checksum: str | None = None
    base_url: str | None = None


class Mapping(msgspec.Struct, frozen=True):
    """A file or folder of the host and its absolute path in the image, both as written.

    A `destination` that ends in '/' is the folder into which a file goes under its own name.
    """

    source: str
    destination: str


class ImageConfig(msgspec.Struct, frozen=True):
    """One image of a workspace. Relative paths in it start at `folder`, that of `file`.

    `manifest` is what the user wrote for the manifest, checked, without any derived value.
    `preallocate` stands in `[filesystem]`, too.
    """

    file: Path
    folder: Path
    name: str
    source: Source
    filesystem: Filesystem
    mappings: tuple[Mapping, ...]
    agent: Agent | None
    manifest: dict[str, object]
    limits: Limits = Limits()
    preallocate: bool = False
    output: Output = Output()


_PATH = matching(r"[^\x00]+", "a path")
_DESTINATION = Value(
    str,
    "an absolute path in the image, without '..'",
    pattern="^/",
    forbidden=r"/\.\.(?:/|$)|\x00",
    hint='a mapping is "path/on/host" = "/path/in/image", with quotes around both',
)
_MAPPINGS = TableOf(_DESTINATION, _PATH)
_AGENT = Variants(
    "source_strategy",
    {
        "release": Table({"version": text(), "base_url": URL, "checksum": CHECKSUM}, required=("version",)),
        "local": Table({"path": _PATH, "checksum": CHECKSUM}, required=("path",)),
        "http": Table({"url": URL, "checksum": CHECKSUM}, required=("url",)),
    },
)

_IMAGE = matching(r"[^\s\x00-\x1f\x7f]+( +[^\s\x00-\x1f\x7f]+)*", 'an image reference such as "nginx:alpine"')

SOURCE = Table(
    {
        "image": _IMAGE,
        "platform": matching(r"linux/[a-z0-9_]+(/[a-z0-9_.]+)?", 'a platform such as "linux/amd64" or "linux/arm/v7"'),
    },
    required=("image",),
)
"""The keys of `[source]`."""

FLEDGE = Table(
    {
        "version": one_of("1"),
        "strategy": one_of("oci_rootfs", hint='fledge-tasks builds "oci_rootfs" only'),
        "source": SOURCE,
        "filesystem": filesystem_shape(_MAPPINGS),
        "mappings": _MAPPINGS,
        "agent": _AGENT,
        "manifest": MANIFEST,
        "limits": Table(
            {"layer_mb": integer(1, MAX_SIZE_MB), "entries": integer(1, MAX_INTEGER), "ratio": integer(1, MAX_INTEGER)}
        ),
        "output": Table(
            {
                "format": one_of("raw", "qcow2"),
                "compression": one_of("zlib", "zstd"),
                "verity": Value(bool, "true or false"),
            }
        ),
    },
    required=("version", "strategy", "source", "filesystem"),
)
"""The keys of fledge.toml.

What `load` refuses beyond that: an `image` that is no reference, two mappings onto one path, a size that is no larger
than the buffer, a second manifest, and a folder's name that cannot be the image's.
"""


_WRAPPED = "the file is that table: [manifest.workload] is [workload] here, and what is in [manifest] is at the top"


def load(path: Path, shown: str) -> ImageConfig:
    """Read the fledge.toml at `path`, which messages call `shown`.

    Raises ConfigError with every problem of the file and of the manifest.toml beside it.
    """
    path = Path(os.path.realpath(path.parent), path.name)
    document = _parse(path, shown)
    problems = [Problem(shown, *finding) for finding in _findings(document)]
    user = document.get("manifest", {})
    beside = path.with_name(MANIFEST_FILE_NAME)
    if os.path.lexists(beside):
        shown_beside = posixpath.join(posixpath.dirname(shown), MANIFEST_FILE_NAME)
        if "manifest" in document:
            problems.append(Problem(shown, "manifest", f"found this table and {shown_beside}, expected one of them"))
        try:
            user = _parse(beside, shown_beside)
            for key, message, hint in check(user):
                is_wrapped = key == "manifest"
                problems.append(Problem(shown_beside, key, message, _WRAPPED if is_wrapped else hint))
        except ConfigError as error:
            problems.extend(error.problems)
    name = path.parent.name
    if isinstance(user, dict) and "name" in user:
        name = user["name"]
    elif not NAME.accepts(name):
        message = f"missing, and the folder's name {quoted(name)} cannot stand in, expected {NAME.expected}"
        problems.append(Problem(shown, "manifest.name", message, 'add a [manifest] table with name = "..."'))
    if problems:
        raise ConfigError(problems)
    return ImageConfig(
        file=path,
        folder=path.parent,
        name=name,
        source=Source(**document["source"]),
        filesystem=filesystem_of(document["filesystem"]),
        mappings=tuple(Mapping(source, destination) for _, source, destination in _mappings(document)),
        agent=_agent(document["agent"]) if "agent" in document else None,
        manifest=user,
        limits=Limits(**document.get("limits", {})),
        preallocate=document["filesystem"].get("preallocate", False),
        output=Output(**document.get("output", {})),
    )


def _parse(path: Path, shown: str) -> dict[str, Any]:
    """Return what a TOML file holds. Raises ConfigError with one problem."""
    try:
        # Opening a FIFO would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError([Problem(shown, "", "not a regular file, expected a TOML file")])
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([Problem(shown, "", f"cannot be read: {error.strerror}")]) from None
    try:
        return tomli.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"not UTF-8: byte 0x{error.object[error.start]:02x} (at line {line})"
    except RecursionError:
        message = "not usable TOML: nested too deeply"
    except ValueError as error:  # TOMLDecodeError, and Python's limit on the digits of an integer
        message = f"not valid TOML: {error}"
    raise ConfigError([Problem(shown, "", message)])


def _findings(document: dict[str, Any]) -> Iterator[Finding]:
    yield from FLEDGE.findings("", document)
    yield from _bad_references(document)
    yield from _collisions(document)
    yield from _format_conflicts(document)
    filesystem = document.get("filesystem")
    if isinstance(filesystem, dict) and (message := size_conflict(filesystem)):
        yield "filesystem", message, None
    agent = document.get("agent")
    if isinstance(agent, dict) and agent.get("source_strategy") == "release" and "base_url" not in agent:
        base_url = os.environ.get(BASE_URL_VARIABLE)
        if base_url and not URL.accepts(base_url):
            message = f"found {quoted(base_url)} in the variable {BASE_URL_VARIABLE}, expected {URL.expected}"
            yield "agent.base_url", message, None


def _mappings(document: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (key path, source, destination) of every well-formed mapping, wherever it was written."""
    filesystem = document.get("filesystem")
    inner = filesystem.get("mappings") if isinstance(filesystem, dict) else None
    for path, table in (("mappings", document.get("mappings")), ("filesystem.mappings", inner)):
        for source, destination in table.items() if isinstance(table, dict) else ():
            if _DESTINATION.accepts(destination):
                yield join(path, source), source, destination


def _bad_references(document: dict[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a reference that no pattern can tell."""
    source = document.get("source")
    image = source.get("image") if isinstance(source, dict) else None
    if _IMAGE.accepts(image):
        try:
            reference.parse(str(image))
        except InputError as error:
            yield "source.image", error.message, error.hint


def _collisions(document: dict[str, Any]) -> Iterator[Finding]:
    """Yield the mappings whose destination an earlier one has, however it is spelt.

    Destinations that end in '/' are left out: several files may go into one folder. What they and
    mapped folders come to is compared when the sources are read.
    """
    taken: dict[str, str] = {}
    for path, _, destination in _mappings(document):
        if destination.endswith("/"):
            continue
        target = posixpath.normpath("/" + destination.lstrip("/"))
        if target in taken:
            yield path, f"found the destination {quoted(destination)}, which {taken[target]} has already", None
        taken.setdefault(target, path)


def _format_conflicts(document: dict[str, Any]) -> Iterator[Finding]:
    """Yield the keys that are right by themselves, and not with the format of the disk."""
    output, filesystem = document.get("output", {}), document.get("filesystem")
    if not isinstance(output, dict):
        return
    found = output.get("format", "raw")
    if found == "raw" and "compression" in output:
        yield "output.compression", 'found with a raw disk, expected format = "qcow2" beside it', None
    if found == "qcow2" and isinstance(filesystem, dict) and filesystem.get("preallocate") is True:
        message = 'found true with output.format = "qcow2", expected false: a qcow2 file holds what is used'
        yield "filesystem.preallocate", message, None


def _agent(table: dict[str, str]) -> Agent:
    agent = Agent(**table)  # type: ignore[arg-type]
    if agent.checksum:
        agent = msgspec.structs.replace(agent, checksum=normal_checksum(agent.checksum))
    if agent.source_strategy == "release" and not agent.base_url:
        agent = msgspec.structs.replace(agent, base_url=os.environ.get(BASE_URL_VARIABLE) or None)
    return agent
