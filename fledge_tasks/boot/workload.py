"""What a guest is to do: the workload of a manifest and of the image's OCI config."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from fledge_tasks.errors import BootError
from fledge_tasks.manifest import lowest_tcp_port

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What a workload without a PATH gets, as from Docker."""

_BEGINS_WITH_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")  # RFC 3986, 3.1
_SAID_AS_IS = string.punctuation  # an escape that is there already is one


@dataclass(frozen=True)
class Check:
    """What tells that a workload is healthy.

    `url` is where it answers in the guest, `port` the port in it; `timeout` are the seconds that one answer may
    take. An endpoint that the user named must answer with 200 to 399. Where nobody did, `is_derived`, anything
    below 500 shows that a server is up.
    """

    url: SplitResult
    port: int
    timeout: float
    is_derived: bool

    @property
    def target(self) -> str:
        """What is asked for. What HTTP cannot say as it is, as letters beyond ASCII, is escaped (RFC 3986, 2.1)."""
        return quote(f"{self.url.path or '/'}{'?' if self.url.query else ''}{self.url.query}", safe=_SAID_AS_IS)

    def accepts(self, status: int) -> bool:
        """Tell whether an answer of this status is that of a healthy workload."""
        return 200 <= status < (500 if self.is_derived else 400)


@dataclass(frozen=True)
class Workload:
    """A program, and what it needs. `user` is that of the OCI config, '' for root.

    Without a `check` it is a job: it does its work and ends.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    workdir: str
    user: str
    cpus: int
    memory_mb: int
    check: Check | None

    @property
    def path(self) -> str:
        """Where its programs are looked for."""
        return self.env.get("PATH", DEFAULT_PATH)


def read(manifest: Mapping[str, Any], asked: Mapping[str, Any], oci_config: Mapping[str, Any]) -> Workload:
    """Return what `manifest`, which we wrote, and the image's OCI config want.

    `asked` is what the user wrote for the manifest: a port that neither it nor the image names is
    not waited for. Raises BootError for what no program can be given.
    """
    run = oci_config.get("config") or {}
    workload = manifest["workload"]
    found = Workload(
        name=manifest["name"],
        argv=tuple(workload["entrypoint"]),
        env=workload.get("env", {}),
        workdir=workload.get("workdir", "/"),
        user=str(run.get("User") or ""),
        cpus=manifest["resources"]["cpu_cores"],
        memory_mb=manifest["resources"]["memory_mb"],
        check=_check(manifest, asked) if _serves(asked, run) else None,
    )
    for text in (*found.argv, *found.env, *found.env.values(), found.workdir, found.user):
        if "\0" in text:
            raise BootError(f"no program can be given {text!r}", where=f"{found.name}: workload")
    return found


def _serves(asked: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Tell whether somebody named a port: the manifest has one in any case."""
    is_exposed = lowest_tcp_port(run.get("ExposedPorts") or ()) is not None
    return is_exposed or "health_check" in asked or "base_url" in asked.get("workload", ())


def _check(manifest: Mapping[str, Any], asked: Mapping[str, Any]) -> Check:
    base = manifest["workload"]["base_url"]
    endpoint = manifest["health_check"]["endpoint"]
    is_whole = _BEGINS_WITH_SCHEME.match(endpoint) is not None
    where = f"{manifest['name']}: {'health_check.endpoint' if is_whole else 'workload.base_url'}"
    try:
        url = urlsplit(endpoint if is_whole else f"{base.rstrip('/')}/{endpoint.lstrip('/')}")
        port = url.port or {"https": 443}.get(url.scheme, 80)
    except ValueError as error:
        raise BootError(str(error), where=where) from None
    if not url.netloc.isascii():
        raise BootError(f"no server can be asked for as {url.netloc!r}", where=where, hint="write its name in ASCII")
    timeout = manifest["health_check"]["timeout_ms"] / 1000
    return Check(url, port, timeout, is_derived="endpoint" not in asked.get("health_check", ()))
