"""The manifest that Volant registers an image with (plugin-manifest-v1), and what users may say in it.

A file format is told as data: a `Table` of `Value`, `Array`, `TableOf` and `Table`. From one such
shape come all mistakes of a document at once, each with its key path, and the order of the keys in
what we write. `config` tells fledge.toml in the same words. A shape never changes a document and
never raises, whatever TOML or JSON holds.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fledge_tasks.errors import SourceError

Finding = tuple[str, str, str | None]
"""One mistake: dotted key path ('' for the document), message, hint."""

SCHEMA_URL = "https://raw.githubusercontent.com/volantvm/volant/main/docs/schemas/plugin-manifest-v1.json"
SCHEMA_VERSION = "1.0"
MAX_INTEGER = (1 << 31) - 1

_SHOWN_CHARACTERS = 60
_BARE_KEY = re.compile(r"[A-Za-z0-9_$-]+")


class Shape(Protocol):
    """What a part of a document may be."""

    @property
    def expected(self) -> str:
        """What would have been right, as a noun for messages."""

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        """Yield every mistake in `value`, which stands at the key `path`."""

    def ordered(self, value: Any) -> Any:
        """Return a `value` without mistakes, its keys in the order of the shape."""


@dataclass(frozen=True)
class Value:
    """A value of exactly one type (a boolean is no integer) that `accepts` accepts."""

    kind: type
    expected: str
    accepts: Callable[[Any], bool] = lambda _: True
    choices: tuple[str, ...] = ()
    hint: str | None = None

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if type(value) is not self.kind or not self.accepts(value):
            yield path, f"found {shown(value)}, expected {self.expected}", self.hint or suggestion(value, self.choices)

    def ordered(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Array:
    """A list of like items. `accepts` judges it as a whole."""

    item: Shape
    expected: str = "an array"
    accepts: Callable[[list[Any]], bool] = lambda _: True

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, list) or not self.accepts(value):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for number, item in enumerate(value):
            yield from self.item.findings(f"{path}[{number}]", item)

    def ordered(self, value: Any) -> Any:
        return [self.item.ordered(item) for item in value]


@dataclass(frozen=True)
class TableOf:
    """A table whose keys the user chooses; written in the order of the keys."""

    item: Shape
    key: Value | None = None
    expected: str = "a table"

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, dict):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for key, item in value.items():
            if self.key and not self.key.accepts(key):
                yield path, f"found the key {quoted(key)}, expected {self.key.expected}", None
            yield from self.item.findings(join(path, key), item)

    def ordered(self, value: Any) -> Any:
        return {key: self.item.ordered(value[key]) for key in sorted(value)}


@dataclass(frozen=True)
class Table:
    """A table of known keys. `conflict` may object to keys that are right one by one, not together.

    `place` is where the allowed keys are allowed, for the message about any other.
    """

    fields: Mapping[str, Shape]
    required: Collection[str] = ()
    place: str = "here"
    conflict: Callable[[dict[str, Any]], str | None] = lambda _: None
    expected: str = "a table"

    def findings(self, path: str, value: object) -> Iterator[Finding]:
        if not isinstance(value, dict):
            yield path, f"found {shown(value)}, expected {self.expected}", None
            return
        for key, item in value.items():
            if key in self.fields:
                yield from self.fields[key].findings(join(path, key), item)
            else:
                message = f"unknown key, allowed {self.place}: {', '.join(self.fields)}"
                yield join(path, key), message, suggestion(key, self.fields)
        for key in self.required:
            if key not in value:
                yield join(path, key), f"missing, expected {self.fields[key].expected}", None
        if objection := self.conflict(value):
            yield path, objection, None

    def ordered(self, value: Any) -> Any:
        return {key: shape.ordered(value[key]) for key, shape in self.fields.items() if key in value}


def text(expected: str = "a non-empty string") -> Value:
    """Return the shape of a string that is not blank; Volant trims strings before it looks at them."""
    return Value(str, expected, lambda found: bool(found.strip()))


def integer(minimum: int, maximum: int = MAX_INTEGER) -> Value:
    """Return the shape of an integer, both limits included."""
    return Value(int, f"an integer from {minimum} to {maximum}", lambda found: minimum <= found <= maximum)


def one_of(*choices: str, hint: str | None = None) -> Value:
    """Return the shape of a string that is one of `choices`."""
    expected = " or ".join(filter(None, (", ".join(map(quoted, choices[:-1])), quoted(choices[-1]))))
    suggested = choices if len(choices) > 1 else ()
    return Value(str, f"the string {expected}", lambda found: found in choices, suggested, hint)


def matching(pattern: str, expected: str, hint: str | None = None) -> Value:
    """Return the shape of a string that matches a regular expression as a whole."""
    return Value(str, expected, lambda found: re.fullmatch(pattern, found) is not None, hint=hint)


def quoted(found: str) -> str:
    """Return a string of the user's for messages: in quotes, not too long, safe for a terminal."""
    short = found if len(found) <= _SHOWN_CHARACTERS else f"{found[:_SHOWN_CHARACTERS]}..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def shown(value: object) -> str:
    """Return type and value of what a user wrote, for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return f"boolean {str(value).lower()}"
        case int():
            return f"integer {value}" if -(1 << 64) < value < 1 << 64 else "an integer beyond 64 bits"
        case float():
            return f"float {value}"
        case str():
            return f"string {quoted(value)}" if value else "an empty string"
        case list():
            return "an array" if value else "an empty array"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def join(path: str, key: str) -> str:
    """Return the key path of `key` in the table at `path`, quoted as TOML wants it."""
    name = key if _BARE_KEY.fullmatch(key) else quoted(key)
    return f"{path}.{name}" if path else name


def suggestion(found: object, allowed: Collection[str]) -> str | None:
    """Return a hint when `found` looks like a misspelt word out of `allowed`, else None."""
    close = difflib.get_close_matches(found.lower(), allowed, 1) if isinstance(found, str) else []
    return f"did you mean {quoted(close[0])}?" if close else None


def is_url(found: str) -> bool:
    """Tell whether a string looks like an http or https URL."""
    return re.fullmatch(r"https?://(?!/)[!-~]+", found) is not None


CHECKSUM = matching(r"(sha256:)?[0-9A-Fa-f]{64}", 'a checksum: "sha256:" and 64 hexadecimal digits')
NAME = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
    "a name of at most 128 of the characters A-Z a-z 0-9 . _ -, the first a letter or digit",
)
"""An image's name is also the name of its folder below build/ and part of the names of its tasks."""

_STRING = Value(str, "a string")
_BOOLEAN = Value(bool, "true or false")
_STRINGS = Array(_STRING, "an array of strings")


def _document_conflict(table: dict[str, Any]) -> str | None:
    content, path, inline = table.get("content"), table.get("path"), table.get("inline")
    if content and path:
        return "found both content and path, expected one of them"
    if content and inline is not True:
        return "found content without inline, expected inline = true beside it"
    if path and inline is True:
        return "found path and inline = true, expected content beside inline"
    return None


def _network_conflict(table: dict[str, Any]) -> str | None:
    if (
        table.get("mode") == "bridged"
        and table.get("subnet")
        and not (table.get("gateway") or table.get("auto_assign"))
    ):
        return "found a subnet in bridged mode, expected gateway or auto_assign = true beside it"
    return None


_CLOUD_INIT_DOCUMENT = Table({"inline": _BOOLEAN, "content": _STRING, "path": _STRING}, conflict=_document_conflict)
_DISK_FORMAT = one_of("raw", "qcow2")

MANIFEST = Table(
    {
        "$schema": _STRING,
        "schema_version": one_of(SCHEMA_VERSION),
        "name": NAME,
        "version": text(),
        "runtime": text(),
        "enabled": _BOOLEAN,
        "image": text(),
        "image_digest": text(),
        "openapi": text(),
        "rootfs": Table(
            {
                "url": Value(
                    str, "an absolute path or an http(s) URL", lambda found: found.startswith("/") or is_url(found)
                ),
                "checksum": CHECKSUM,
                # Volant boots raw and qcow2 disks; older samples name the filesystem, so any word passes.
                "format": text(),
            }
        ),
        "resources": Table({"cpu_cores": integer(1), "memory_mb": integer(1)}),
        "workload": Table(
            {
                "type": one_of("http"),
                "entrypoint": Array(
                    _STRING,
                    "an array of strings that begins with a program",
                    lambda found: bool(found) and found[0] != "",
                ),
                "base_url": Value(str, "an http(s) URL", is_url),
                "env": TableOf(
                    _STRING,
                    Value(str, "the name of a variable", lambda key: bool(key.strip()) and not set(key) & set("=\0")),
                ),
                "workdir": text(),
            }
        ),
        "health_check": Table({"endpoint": text(), "timeout_ms": integer(0)}),
        "actions": TableOf(
            Table(
                {"description": _STRING, "method": text(), "path": text(), "timeout_ms": integer(0)},
                required=("method", "path"),
            )
        ),
        "disks": Array(
            Table(
                {
                    "name": text(),
                    "source": text(),
                    "checksum": text(),
                    "format": _DISK_FORMAT,
                    "readonly": _BOOLEAN,
                    "target": text(),
                },
                required=("name", "source"),
            ),
            "an array of tables",
        ),
        "cloud_init": Table(
            {
                "datasource": text(),
                "seed_mode": one_of("vfat"),
                "user_data": _CLOUD_INIT_DOCUMENT,
                "meta_data": _CLOUD_INIT_DOCUMENT,
                "network_config": _CLOUD_INIT_DOCUMENT,
            }
        ),
        "network": Table(
            {
                "mode": one_of("vsock", "bridged", "dhcp"),
                "subnet": text(),
                "gateway": text(),
                "auto_assign": _BOOLEAN,
            },
            required=("mode",),
            conflict=_network_conflict,
        ),
        "devices": Table({"pci_passthrough": _STRINGS, "allowlist": _STRINGS}),
        "labels": TableOf(_STRING),
    }
)
"""The keys of plugin-manifest-v1 in the order in which they are written; whatever we derive may be left out."""

# What the manifest is derived from: image-spec, config.md, 'Properties', the object `config`.
_OCI_CONFIG = Table(
    {
        "Entrypoint": _STRINGS,
        "Cmd": _STRINGS,
        "Env": _STRINGS,
        "WorkingDir": _STRING,
        "ExposedPorts": Value(dict, "an object"),
    },
    expected="an object",
)


def check(user: Mapping[str, object]) -> list[Finding]:
    """Return every mistake in what a user wrote for the manifest; empty when `render` can take it."""
    return list(MANIFEST.findings("", dict(user)))


def render(
    user: Mapping[str, object],
    oci_config: Mapping[str, object],
    *,
    name: str,
    image: str,
    image_digest: str,
    rootfs: Path,
    checksum: str,
    filesystem: str,
) -> bytes:
    """Return the manifest as ASCII JSON: the `user`'s keys, and for all others what `oci_config` says.

    Tables are merged key by key, lists are replaced as a whole. `user` has passed `check`, and
    `oci_config` is the whole config document of the image, `rootfs` an absolute path. The same
    arguments give the same bytes, whatever the order of their keys.

    Raises SourceError naming the key of the OCI config that has a wrong type; null counts as absent.
    """
    run = _run_config(oci_config, image)
    command = [*run.get("Entrypoint", ()), *run.get("Cmd", ())]
    while command and not command[0].strip():  # `ENTRYPOINT [""]` is how people reset an inherited one
        del command[0]
    derived: dict[str, object] = {
        "$schema": SCHEMA_URL,
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "version": "0.1.0",
        "runtime": name,
        "enabled": True,
        "image": image,
        "image_digest": image_digest,
        "rootfs": {"url": str(rootfs), "checksum": checksum, "format": "raw"},
        "resources": {"cpu_cores": 1, "memory_mb": 1024},
        "workload": {
            "type": "http",
            "entrypoint": command or ["/bin/sh"],
            "base_url": f"http://127.0.0.1:{_lowest_tcp_port(run.get('ExposedPorts', {}))}",
            **({"env": env} if (env := _environment(run.get("Env", ()))) else {}),
            **({"workdir": workdir} if (workdir := run.get("WorkingDir")) else {}),
        },
        "health_check": {"endpoint": "/", "timeout_ms": 10000},
        # The guest's agent reads the type and the device of its root from these, not from rootfs.format.
        "labels": {"volant.rootfs_fstype": filesystem, "volant.rootfs_device": "vda"},
    }
    return (json.dumps(MANIFEST.ordered(_merged(derived, user)), indent=2) + "\n").encode()


def _run_config(oci_config: Mapping[str, object], image: str) -> dict[str, Any]:
    """Return those keys of the config object that we use and that are set, all of the right type."""
    run: Any = oci_config.get("config")
    if run is None:
        return {}
    if isinstance(run, dict):
        run = {key: run[key] for key in _OCI_CONFIG.fields if run.get(key) is not None}
    for path, message, _ in _OCI_CONFIG.findings("config", run):
        raise SourceError(f"the OCI config is malformed at {path}: {message}", where=image)
    return dict(run)


def _environment(variables: Collection[str]) -> dict[str, str]:
    pairs = (variable.partition("=") for variable in variables)
    return {name: value for name, equals, value in pairs if name and equals}


def _lowest_tcp_port(exposed: Collection[str]) -> int:
    """Return the lowest TCP port of keys like '80', '80/tcp', '53/udp' or '8000-8010/tcp', 80 without any."""
    found = (re.fullmatch(r"([0-9]{1,5})(-[0-9]{1,5})?(/tcp)?", port) for port in exposed)
    return min((int(port[1]) for port in found if port and 1 <= int(port[1]) <= 65535), default=80)


def _merged(derived: Mapping[str, object], user: Mapping[str, object]) -> dict[str, object]:
    merged = {**derived, **user}
    for key in derived.keys() & user.keys():
        below, above = derived[key], user[key]
        if isinstance(below, dict) and isinstance(above, dict):
            merged[key] = _merged(below, above)
    return merged
