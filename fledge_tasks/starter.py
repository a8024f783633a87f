"""The files that `fledge init` writes: a fledge.toml that builds as it is, and explains itself; a dodo.py.

What comes from an image may hold anything. It gets into the text through `toml` alone, which lets
nothing out of its quotes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fledge_tasks.manifest import HEALTH_CHECK, NAME, RESOURCES, lowest_tcp_port, workload
from fledge_tasks.oci.reference import Reference
from fledge_tasks.shapes import MAX_INTEGER

DODO = '''"""`doit`, `doit list`, `doit build:NAME`: the graph of `fledge build`."""

from fledge_tasks.dodo import *  # noqa: F403
'''

_HEAD = """\
# One image. `fledge build` makes build/NAME/rootfs.img and build/NAME/manifest.json of it, and so does `doit`.
# `fledge schema fledge` prints all keys, for editors that know JSON Schema.
version = "1"
strategy = "oci_rootfs"

[source]
image = {image}
platform = {platform}

[filesystem]
type = "ext4"            # or xfs, btrfs, squashfs, erofs: `fledge doctor` says what can be made here
size_buffer_mb = 100     # free space in the finished filesystem
preallocate = false      # true: no holes in the image file

# Files and folders that come on top, from this folder on, and where they go in the image:
# [mappings]
# "app.conf" = "/etc/app.conf"
# "tools" = "/usr/local/bin"

# Volant's agent in the guest, at /bin/kestrel. 'latest' is looked up once, and pinned in fledge.lock.
# [agent]
# source_strategy = "release"
# version = "latest"

# What Volant is told. All that is left out comes from the image's config in each build.
[manifest]
{name}
version = "0.1.0"
# url_prefix = "https://images.example.org"     # where build/ will be published

[manifest.resources]
cpu_cores = {cpu_cores}
memory_mb = {memory_mb}
"""

_NAME_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_PROBED = re.compile(r"https?://[^\s/'\"|;&]+(/[^\s'\"|;&?#]*)")


def fledge_toml(reference: str, platform: str, name: str | None, oci_config: Mapping[str, Any] | None) -> str:
    """Return a commented fledge.toml. With `name` None the folder's name stands in.

    `oci_config` is the image's config document, None when it was not looked at. Raises SourceError when it is
    malformed.
    """
    named = f"name = {toml(name)}" if name else '# name = "web"           # else the name of the folder'
    text = _HEAD.format(image=toml(reference), platform=toml(platform), name=named, **RESOURCES)
    return "\n".join([text, *_workload(oci_config, reference)])


def _workload(oci_config: Mapping[str, Any] | None, reference: str) -> list[str]:
    if oci_config is None:
        return ["# [manifest.workload]", '# entrypoint = ["/bin/app"]', '# base_url = "http://127.0.0.1:80"', ""]
    told = workload(oci_config, reference)
    run = oci_config.get("config") or {}
    named = [*(run.get("Entrypoint") or ()), *(run.get("Cmd") or ())]
    program = "" if any(word.strip() for word in named) else "     # a guess: the image names no program"
    probe = _probe(run.get("Healthcheck"))
    has_port = lowest_tcp_port(run.get("ExposedPorts") or ()) is not None
    port = "the lowest TCP port that the image exposes" if has_port else "a guess: the image exposes no TCP port"
    # Who names a port or a health check has a server: what nothing in the image speaks of stays a comment.
    mark = "" if has_port or probe else "# "
    health = {**HEALTH_CHECK, **probe}
    return [
        "# As the image says it now.",
        "[manifest.workload]",
        f"type = {toml(told['type'])}",
        f"entrypoint = {toml(told['entrypoint'])}{program}",
        *([f"workdir = {toml(told['workdir'])}"] if "workdir" in told else []),
        *(["# Without these, `fledge boot` takes it for a job, which ends, and not for a server:"] if mark else []),
        f"{mark}base_url = {toml(told['base_url'])}     # {port}",
        '# env = { MODE = "production" }     # comes beside the variables of the image',
        "",
        f"{mark}[manifest.health_check]",
        f"{mark}endpoint = {toml(health['endpoint'])}",
        f"{mark}timeout_ms = {health['timeout_ms']}",
        "",
    ]


def _probe(check: object) -> dict[str, Any]:
    """Return what Docker's check of the image comes to if it fetches a URL, else nothing."""
    test = check.get("Test") if isinstance(check, dict) else None
    found = _PROBED.search(" ".join(part for part in test if isinstance(part, str))) if isinstance(test, list) else None
    if not isinstance(check, dict) or found is None:
        return {}
    nanoseconds = check.get("Timeout")
    timeout_ms = nanoseconds // 1_000_000 if isinstance(nanoseconds, int) else 0
    return {"endpoint": found[1], **({"timeout_ms": timeout_ms} if 0 < timeout_ms <= MAX_INTEGER else {})}


def image_name(folder_name: str, reference: Reference) -> str | None:
    """Return the name that an image needs in its fledge.toml: None where that of the folder will do."""
    if NAME.accepts(folder_name):
        return None
    last = (reference.path or reference.name).rstrip("/").rpartition("/")[2]
    return _NAME_CHARACTERS.sub("-", last).strip("-._")[:128] or "image"


def toml(value: str | Sequence[str]) -> str:
    """Return a string, or an array of strings, in TOML (1.0.0, 'String'): on one line, and printable throughout.

    Strings hold no lone surrogates, which TOML cannot hold.
    """
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, value)) + '"'
    return "[" + ", ".join(map(toml, value)) + "]"


def _escaped(char: str) -> str:
    if char in {'"', "\\"}:
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"
