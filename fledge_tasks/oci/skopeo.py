"""skopeo, and what its failures mean to people.

The one program that speaks to registries, daemons and containers-storage for us, with the host's
registries.conf, policy.json and logins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fledge_tasks.errors import BlobError, CommandError, ImageNotFoundError, SourceError
from fledge_tasks.run import run

_REGISTRIES_CONF = "in ~/.config/containers/registries.conf (see containers-registries.conf(5))"
# What skopeo prints, from the most telling to the least: a registry's 'denied' may quote a 404.
_LOST_BLOB = r"fetching blob: .*(?:404|blob unknown|not found)"
_FAILURES: tuple[tuple[str, type[SourceError], str, str | None], ...] = (
    (
        r"policy\.json: no such file|Source image rejected",
        SourceError,
        "skopeo's signature policy does not let it through",
        "see containers-policy.json(5); distributions ship a default as /etc/containers/policy.json "
        "(Debian: sudo apt-get install golang-github-containers-common)",
    ),
    (
        r"reading JSON file .* permission denied",
        SourceError,
        "skopeo may not read its file with logins",
        "set XDG_RUNTIME_DIR to a folder of yours, or REGISTRY_AUTH_FILE to a file",
    ),
    (r"no space left on device", SourceError, "there is no space left for it", "free some space, or set TMPDIR"),
    (
        r"server gave HTTP response to HTTPS client",
        SourceError,
        "the registry speaks plain HTTP",
        f"allow it with `insecure = true` for its location {_REGISTRIES_CONF}",
    ),
    (
        r"x509: |tls: ",
        SourceError,
        "the registry's TLS certificate is not accepted",
        "put its CA certificate into /etc/containers/certs.d/<registry>/ca.crt, "
        f"or set `insecure = true` for its location {_REGISTRIES_CONF}",
    ),
    (
        r"toomanyrequests|429 \(?Too Many|too many requests",
        SourceError,
        "the registry limits the rate of requests",
        "wait, or log in with `skopeo login <registry>` for a higher limit",
    ),
    (
        r"unauthorized|authentication required|access to the resource is denied|denied:|invalid username/password|"
        r"40[13] \((?:Unauthorized|Forbidden)\)|StatusCode: 40[13]",
        SourceError,
        "the registry does not let us read the image: it is private, or there is no such repository",
        "check the name, or log in with `skopeo login <registry>`; "
        "REGISTRY_AUTH_FILE may name another file with logins",
    ),
    (
        rf"(?i){_LOST_BLOB}",
        BlobError,
        "the registry has not got a blob that its manifest names",
        "push the image again, or look at mirrors and proxies",
    ),
    (
        r"manifest unknown|name unknown|repository name not known|404 \(?Not Found|StatusCode: 404|"
        r"does not resolve to an image ID|identifier is not an image|Tag .* not found|Invalid source index|"
        r"No such image|reference does not exist",
        ImageNotFoundError,
        "there is no such image",
        "check the name and tag",
    ),
    (
        r"Digest did not match|does not match expected sha256|unexpected EOF",
        BlobError,
        "a blob is not what its manifest promises",
        "the source or the way to it damages data; push the image again, or look at mirrors and proxies",
    ),
    (
        r"no such host|connection refused|connection reset|network is unreachable|no route to host|i/o timeout|"
        r"TLS handshake timeout|deadline exceeded|StatusCode: 50\d|proxyconnect|: EOF",
        SourceError,
        "the source cannot be reached",
        "check the network, the name of the registry and the proxy settings; --offline builds from what is cached",
    ),
)
_SHA256 = r"(sha256:[0-9a-f]{64})"
_GOT = re.compile(rf"expected {_SHA256}, got {_SHA256}")
_NOT_EXPECTED = re.compile(rf"digest {_SHA256} does not match expected {_SHA256}")
_NOT_THERE = re.compile(rf"(?i)reading blob {_SHA256}: .*{_LOST_BLOB}")


def skopeo(arguments: Sequence[str], *, where: str, work: Path | None = None) -> bytes:
    """Run skopeo to its end and return what it wrote to stdout.

    `where` names the image in errors; `work` becomes the working folder and the place of temporary
    files. Raises what its failure means: SourceError, ImageNotFoundError, BlobError, and ToolError
    when it is not installed.
    """
    # TMPDIR: skopeo would put whole images into /var/tmp.
    env = {"TMPDIR": str(work)} if work else None
    try:
        return run(["skopeo", *arguments], cwd=work, env=env)
    except CommandError as error:
        raise _explained(error, where) from error


def _explained(error: CommandError, where: str) -> SourceError:
    for pattern, kind, meaning, hint in _FAILURES:
        if re.search(pattern, error.stderr):
            return kind(f"{_about_blob(error.stderr) or meaning}\n  {error.message}", where=where, hint=hint)
    return SourceError(error.message, where=where)


def _about_blob(stderr: str) -> str | None:
    if match := _GOT.search(stderr):
        return f"blob {match[1]}: found {match[2]}"
    if match := _NOT_EXPECTED.search(stderr):
        return f"blob {match[2]}: found {match[1]}"
    if match := _NOT_THERE.search(stderr):
        return f"blob {match[1]}: the registry has not got it"
    return None
