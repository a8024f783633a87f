"""The manifest that Volant registers an image with (plugin-manifest-v1), and what users may say in it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fledge_tasks.errors import ManifestError, SourceError
from fledge_tasks.shapes import URL, Array, Conflict, Finding, Table, TableOf, Value, integer, matching, one_of, text

SCHEMA_URL = "https://raw.githubusercontent.com/volantvm/volant/main/docs/schemas/plugin-manifest-v1.json"
SCHEMA_VERSION = "1.0"
RAW_CHECKSUM, ROOT_HASH, HASH_TREE = "fledge.raw_checksum", "fledge.verity_root_hash", "fledge.verity_hash_tree"
"""Labels: the checksum of the raw image that a disk of another format holds; for dm-verity, the root hash
in hexadecimal digits, and the path or URL of the hash tree."""

CHECKSUM = matching(r"(sha256:)?[0-9A-Fa-f]{64}", 'a checksum: "sha256:" and 64 hexadecimal digits')
NAME = matching(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
    "a name of at most 128 of the characters A-Z a-z 0-9 . _ -, the first a letter or digit",
)
"""An image's name is also the name of its folder below build/ and part of the names of its tasks."""

_STRING = Value(str, "a string")
_BOOLEAN = Value(bool, "true or false")
_STRINGS = Array(_STRING, "an array of strings")
_VARIABLE = Value(str, "the name of a variable", pattern=r"\S", forbidden=r"[=\x00]")
_ANY = text()
_TRUE = Value(bool, "true", choices=(True,))
_CLOUD_INIT_DOCUMENT = Table(
    {"inline": _BOOLEAN, "content": _STRING, "path": _STRING},
    conflicts=(
        Conflict("found both content and path, expected one of them", {"content": _ANY, "path": _ANY}),
        Conflict(
            "found content without inline, expected inline = true beside it",
            {"content": _ANY},
            lacking={"inline": _TRUE, "path": _ANY},
        ),
        Conflict(
            "found path and inline = true, expected content beside inline",
            {"path": _ANY, "inline": _TRUE},
            lacking={"content": _ANY},
        ),
    ),
)
_URL_PREFIX = Value(
    str,
    "an absolute path or an http(s) URL without '?' and '#'",
    pattern="^(?:/|https?://[!-.0-~][!-~]*$)",
    forbidden="[?#]",
)
_DISK_FORMAT = one_of("raw", "qcow2")

_WRITTEN = Table(
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
                "url": Value(str, "an absolute path or an http(s) URL", pattern="^(?:/|https?://[!-.0-~][!-~]*$)"),
                "checksum": CHECKSUM,
                # Of the disk: raw or qcow2. Volant's first samples name the filesystem, as its later versions let one.
                "format": one_of("raw", "qcow2", "ext4", "xfs", "btrfs", "squashfs"),
            },
            derived=("url", "checksum", "format"),
        ),
        "resources": Table(
            {"cpu_cores": integer(1), "memory_mb": integer(1)},
            derived=("cpu_cores", "memory_mb"),
        ),
        "workload": Table(
            {
                "type": one_of("http"),
                "entrypoint": Array(_STRING, "an array of strings that begins with a program", first=text()),
                "base_url": URL,
                "env": TableOf(_STRING, _VARIABLE),
                "workdir": text(),
            },
            derived=("type", "entrypoint", "base_url"),
        ),
        "health_check": Table(
            {"endpoint": text(), "timeout_ms": integer(0)},
            derived=("endpoint", "timeout_ms"),
        ),
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
            conflicts=(
                Conflict(
                    "found a subnet in bridged mode, expected gateway or auto_assign = true beside it",
                    {"mode": one_of("bridged"), "subnet": _ANY},
                    lacking={"gateway": _ANY, "auto_assign": _TRUE},
                ),
            ),
        ),
        "devices": Table({"pci_passthrough": _STRINGS, "allowlist": _STRINGS}),
        "labels": TableOf(_STRING),
    },
    derived=(
        "$schema", "schema_version", "name", "version", "runtime", "enabled", "image", "image_digest",
        "rootfs", "resources", "workload", "health_check", "labels",
    ),
)  # fmt: skip
"""The keys of plugin-manifest-v1 in the order in which they are written."""

FINISHED = _WRITTEN.finished()
"""What `render` returns."""

MANIFEST = dataclasses.replace(_WRITTEN, fields={**_WRITTEN.fields, "url_prefix": _URL_PREFIX})
"""What a user may say: all that is written, and where images will be published."""

RESOURCES = {"cpu_cores": 1, "memory_mb": 1024}
HEALTH_CHECK = {"endpoint": "/", "timeout_ms": 10000}
_SHELL = "/bin/sh"
_HTTP_PORT = 80

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
    disk_format: str = "raw",
    labels: Mapping[str, str] | None = None,
) -> bytes:
    """Return the manifest as ASCII JSON: the `user`'s keys, and for all others what `oci_config` says.

    Tables are merged key by key, lists are replaced as a whole. `user` has passed `check`, and
    `oci_config` is the whole config document of the image, `rootfs` an absolute path. The URL is that
    path, or with `url_prefix` where `<prefix>/<name>/<file>` is; so is the hash tree in `labels`, which
    are more of those that tell what the disk holds. The same arguments give the same bytes, whatever
    the order of their keys.

    Raises SourceError naming the key of the OCI config that has a wrong type (null counts as absent),
    ManifestError when the user named another checksum than `checksum`.
    """
    user = dict(user)
    prefix = user.pop("url_prefix", None)
    _check_checksum(user, checksum, name)
    more = dict(labels or {})
    if HASH_TREE in more:
        more[HASH_TREE] = _url(Path(more[HASH_TREE]), name, prefix)
    derived: dict[str, object] = {
        "$schema": SCHEMA_URL,
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "version": "0.1.0",
        "runtime": name,
        "enabled": True,
        "image": image,
        "image_digest": image_digest,
        "rootfs": {"url": _url(rootfs, name, prefix), "checksum": checksum, "format": disk_format},
        "resources": RESOURCES,
        "workload": workload(oci_config, image),
        "health_check": HEALTH_CHECK,
        # The guest's agent reads the type and the device of its root from these, not from rootfs.format.
        "labels": {"volant.rootfs_fstype": filesystem, "volant.rootfs_device": "vda", **more},
    }
    merged = _merged(derived, user)
    merged["rootfs"] = {**merged["rootfs"], "checksum": checksum}
    return (json.dumps(FINISHED.ordered(merged), indent=2) + "\n").encode()


def workload(oci_config: Mapping[str, object], image: str) -> dict[str, Any]:
    """Return what an image's config says about what runs in it, as the table `workload`.

    `oci_config` is the whole document; what it does not say is guessed: /bin/sh, port 80. Raises SourceError
    as `render`.
    """
    run = _run_config(oci_config, image)
    command = [*run.get("Entrypoint", ()), *run.get("Cmd", ())]
    while command and not command[0].strip():  # `ENTRYPOINT [""]` is how people reset an inherited one
        del command[0]
    return {
        "type": "http",
        "entrypoint": command or [_SHELL],
        "base_url": f"http://127.0.0.1:{lowest_tcp_port(run.get('ExposedPorts', {})) or _HTTP_PORT}",
        **({"env": env} if (env := _environment(run.get("Env", ()))) else {}),
        **({"workdir": workdir} if (workdir := run.get("WorkingDir", "")).strip() else {}),
    }


def _check_checksum(user: Mapping[str, Any], checksum: str, name: str) -> None:
    """Raise ManifestError when the user wants another file than there is: else Volant would refuse it, much later."""
    wanted = normal_checksum(user.get("rootfs", {}).get("checksum", checksum))
    if wanted != checksum:
        raise ManifestError(
            f"found {checksum}, expected {wanted}",
            where=f"{name}: rootfs.checksum",
            hint="leave the key out of the manifest: what is written is the checksum of the image as it is",
        )


def normal_checksum(written: str) -> str:
    """Return a checksum that CHECKSUM accepts as `sha256:` and lower-case digits."""
    return "sha256:" + written.removeprefix("sha256:").lower()


def _url(file: Path, name: str, prefix: object) -> str:
    return str(file) if prefix is None else f"{str(prefix).rstrip('/')}/{name}/{file.name}"


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
    return {name: value for name, equals, value in pairs if equals and _VARIABLE.accepts(name)}


def lowest_tcp_port(exposed: Collection[str]) -> int | None:
    """Return the lowest TCP port of keys like '80', '80/tcp', '53/udp' or '8000-8010/tcp', None without any."""
    found = (re.fullmatch(r"([0-9]{1,5})(-[0-9]{1,5})?(/tcp)?", port) for port in exposed)
    return min((int(port[1]) for port in found if port and 1 <= int(port[1]) <= 65535), default=None)


def _merged(derived: Mapping[str, object], user: Mapping[str, object]) -> dict[str, Any]:
    merged = {**derived, **user}
    for key in derived.keys() & user.keys():
        below, above = derived[key], user[key]
        if isinstance(below, dict) and isinstance(above, dict):
            merged[key] = _merged(below, above)
    return merged
