"""The agent that a microVM starts, and where it comes from.

`[agent]` in fledge.toml names a local file, a URL or a release. Whatever it is, it becomes
`/bin/kestrel` of the customization layer. `download` gets it; the caller caches and pins it.
"""

from __future__ import annotations

import stat
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from fledge_tasks.digest import Digest
from fledge_tasks.errors import AgentError
from fledge_tasks.mappings import MappedFile

AGENT_PATH = "/bin/kestrel"
CONFIG_PATH = "/etc/fsify-entrypoint"
ASSET = "kestrel"
DEFAULT_BASE_URL = "https://github.com/volantvm/volant/releases/download"

_GITHUB_DOWNLOADS = "/releases/download"


class AgentSpec(msgspec.Struct, frozen=True):
    """The `[agent]` table: `release` uses `version` and `base_url`, `local` `path`, `http` `url`, all `checksum`."""

    source_strategy: Literal["release", "local", "http"]
    version: str | None = None
    path: str | None = None
    url: str | None = None
    checksum: str | None = None
    base_url: str | None = None


def agent_url(spec: AgentSpec, architecture: str = "amd64") -> str | None:
    """Return where the agent is downloaded from, None for a local one.

    A release is at `<base_url>/<version>/kestrel`. Version 'latest' of a base URL that ends in
    '/releases/download' is at '/releases/latest/download/kestrel' instead, as on GitHub. A base
    URL that holds `{version}` or `{arch}` is the whole URL, with those filled in.
    """
    if spec.source_strategy == "local":
        return None
    if spec.source_strategy == "http":
        return spec.url
    base = (spec.base_url or DEFAULT_BASE_URL).rstrip("/")
    version = spec.version or "latest"
    quoted = urllib.parse.quote(version, safe="")
    if "{version}" in base or "{arch}" in base:
        return base.replace("{version}", quoted).replace("{arch}", architecture)
    if version == "latest" and base.endswith(_GITHUB_DOWNLOADS):
        return f"{base.removesuffix('/download')}/latest/download/{ASSET}"
    return f"{base}/{quoted}/{ASSET}"


def lock_name(spec: AgentSpec, architecture: str = "amd64") -> str:
    """Return the name under which fledge.lock pins the agent's digest; a local one needs no pin."""
    return f"agent:{agent_url(spec, architecture) or spec.path}"


def lasting_url(url: str, redirects: Sequence[str]) -> str | None:
    """Return where what was found at `url` will be when `url` leads elsewhere; None when nothing tells.

    That is the last of the `redirects` that stays on the server of `url` and holds no secret. GitHub, for one, sends
    'latest' on to the address of a release, and from there to another server, with a query that expires.
    """
    host = urllib.parse.urlsplit(url).hostname
    for redirect in reversed(redirects):
        parts = urllib.parse.urlsplit(redirect)
        if parts.hostname == host and redirect != url and not parts.query and "@" not in parts.netloc:
            return redirect
    return None


def local_agent(spec: AgentSpec, folder: Path, digest_of: Callable[[Path], str]) -> tuple[Path, Digest, int]:
    """Return path, digest and size in bytes of a local agent; `path` is relative to fledge.toml's `folder`.

    Raises AgentError when it is not there, not a regular file, cannot be read, or is not what its checksum names.
    """
    path = folder / (spec.path or "")
    where = f"agent.path: {path}"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise AgentError("not a regular file", where=where)
        digest = Digest(digest_of(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise AgentError(f"cannot be read: {reason}", where=where) from None
    check(digest, spec.checksum, where)
    return path, digest, status.st_size


def check(digest: str, checksum: str | None, where: str) -> None:
    """Raise AgentError when an agent is not what its checksum names, if it has one."""
    if checksum is not None and digest != checksum:
        raise AgentError(
            f"is not what its checksum names: found {digest}, expected {checksum}",
            where=where,
            hint="if the new content is meant to be used, change agent.checksum in fledge.toml",
        )


def program(digest: str, size: int) -> MappedFile:
    """Return where and how an agent lands in the image."""
    return MappedFile(AGENT_PATH, "file", 0o755, digest, size)


def config_file(digest: str, size: int) -> MappedFile:
    """Return where the image's OCI config lands in it, as the bytes that its digest names."""
    return MappedFile(CONFIG_PATH, "file", 0o644, digest, size)
