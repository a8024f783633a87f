"""Image references: what people write after `image =`.

A reference is a Docker reference (distribution 'reference' grammar, normalised as `docker pull`
does it), bare or behind one of the transports of containers-transports(5). Parsing is pure: no file
and no network is looked at.
"""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path

from fledge_tasks.digest import is_digest
from fledge_tasks.errors import InputError

PATH_TRANSPORTS = ("oci", "oci-archive", "docker-archive", "dir")
TRANSPORTS = ("docker", "docker-daemon", *PATH_TRANSPORTS, "containers-storage")
_FORMS = "docker://, docker-daemon:, oci:, oci-archive:, docker-archive:, dir:, containers-storage:"

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_PATH = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_DOMAIN = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NAME_LIMIT = 255


@dataclass(frozen=True)
class Reference:
    """A parsed reference.

    transport  one of TRANSPORTS, None when none is written
    name       repository with its registry ('docker.io/library/nginx'); '' for paths and image IDs;
               for containers-storage the text behind the transport, as written
    tag        tag of a repository, or what follows the path of a path transport
    digest     `sha256:…` behind an '@', or the image ID of `docker-daemon:sha256:…`
    path       of a path transport, as written
    """

    transport: str | None
    name: str = ""
    tag: str | None = None
    digest: str | None = None
    path: str = ""

    @property
    def canonical(self) -> str:
        """The normalised text, for people and keys; parsing it gives this reference again."""
        return self._text(self.path)

    @property
    def docker_name(self) -> str:
        """What a registry or daemon is asked for: the digest wins over the tag."""
        if not self.digest:
            return f"{self.name}:{self.tag}"
        return f"{self.name}@{self.digest}" if self.name else self.digest

    def _text(self, path: str) -> str:
        if self.transport in PATH_TRANSPORTS:
            return f"{self.transport}:{path}" + (f":{self.tag}" if self.tag else "")
        if self.transport == "containers-storage":
            return f"containers-storage:{self.name}"
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest and self.name else self.digest or ""
        prefix = {None: "", "docker": "docker://"}.get(self.transport, f"{self.transport}:")
        return f"{prefix}{self.name}{tag}{digest}"


@functools.lru_cache(maxsize=4096)  # more than a workspace has images: config asks, and all that builds
def parse(image: str) -> Reference:
    """Parse a reference. Raises InputError that says what was found and what was expected.

    The path of a path transport ends at its first ':', as in skopeo; only `dir:` takes all of it.
    """
    if not image or image != image.strip() or not image.isprintable():
        raise InputError(f"{image!r} is not an image reference: it is empty, or holds blanks or control characters")
    scheme, separator, rest = image.partition(":")
    if scheme == "docker" and rest.startswith("//"):
        return _docker("docker", rest[2:], image)
    if separator and scheme in TRANSPORTS and scheme != "docker":
        return _with_transport(scheme, rest, image)
    if "://" in image:
        raise InputError(
            f"{image!r} has the unknown transport {image.partition('://')[0] + '://'!r}",
            hint=f"known transports: {_FORMS}, or none at all",
        )
    return _docker(None, image, image)


def lock_name(reference: Reference, folder: Path, root: Path) -> str:
    """Return the text that names the reference in the lock: the same on every machine.

    A path is read from `folder` and written relative to the workspace `root`, with '/' and, where it
    leads outside, with '..'. Symbolic links are not followed. Anything else is the canonical text.
    """
    if reference.transport not in PATH_TRANSPORTS:
        return reference.canonical
    relative = os.path.relpath(os.path.abspath(folder / reference.path), os.path.abspath(root))
    return reference._text(Path(relative).as_posix())


def _with_transport(transport: str, rest: str, image: str) -> Reference:
    if rest.startswith("//") and transport not in PATH_TRANSPORTS:
        raise InputError(f"{image!r}: there is no '//' in the transport {transport!r}", hint=f"write {transport}:…")
    if transport in PATH_TRANSPORTS:
        path, colon, tag = (rest, "", "") if transport == "dir" else rest.partition(":")
        if not path or (colon and not tag):
            raise InputError(
                f"{image!r} is incomplete", hint=f"write {transport}:path" + "[:name]" * (transport != "dir")
            )
        return Reference(transport, path=path, tag=tag or None)
    if not rest:
        raise InputError(f"{image!r} names no image", hint=f"write {transport}:name:tag")
    if transport == "containers-storage":
        return Reference(transport, name=rest)
    if is_digest(rest):
        return Reference(transport, digest=rest)
    return _docker(transport, rest, image)


def _docker(transport: str | None, text: str, image: str) -> Reference:
    if is_digest(text):
        raise InputError(
            f"{image!r} is an image ID, not a name",
            hint=f"an image of the Docker daemon is written docker-daemon:{text}",
        )
    rest, at, digest = text.partition("@")
    if at and not is_digest(digest):
        raise InputError(f"{image!r}: the digest {digest!r} is not 'sha256:' and 64 lower-case hexadecimal digits")
    head, slash, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise InputError(
            f"{image!r}: the tag {tag!r} is not 1 to 128 letters, digits, '_', '.' or '-'",
            hint=f"write name:tag, or one of the transports: {_FORMS}",
        )
    domain, name = _split_domain(head + slash + last)
    if not _PATH.fullmatch(name) or not _DOMAIN.fullmatch(domain) or len(domain) + 1 + len(name) > _NAME_LIMIT:
        expected = "lower-case letters, digits and single separators '.', '_', '-', '/', at most 255 characters"
        raise InputError(
            f"{image!r}: {head + slash + last!r} is not an image name ({expected})",
            hint=f"write [registry/]name[:tag], or one of the transports: {_FORMS}",
        )
    if domain == "docker.io" and "/" not in name:
        name = f"library/{name}"
    return Reference(transport, f"{domain}/{name}", tag if colon else None if digest else "latest", digest or None)


def _split_domain(text: str) -> tuple[str, str]:
    # distribution/reference 'splitDockerDomain': the part before the first '/' is a registry only
    # if it looks like a host name; anything else is a repository on Docker Hub.
    first, slash, rest = text.partition("/")
    is_domain = "." in first or ":" in first or first == "localhost" or first != first.lower()
    if not slash or not is_domain:
        return "docker.io", text
    return ("docker.io" if first == "index.docker.io" else first), rest
