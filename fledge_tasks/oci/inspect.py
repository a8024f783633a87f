"""What an image says of itself: its config, without its layers.

As `source.resolve`, in the same order and with the same errors, but nothing is exported where that
can be avoided: the Docker daemon tells the config of its images itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fledge_tasks.oci import daemon, source
from fledge_tasks.oci.manifest import Platform, check_platform, parse_config
from fledge_tasks.oci.reference import Reference


def read_config(reference: Reference, *, folder: Path, platform: str, scratch: Path) -> dict[str, Any]:
    """Return the config document of an image, of whatever types its values are; of a daemon's only `config` is known.

    `folder` is where relative paths start, `scratch` a folder for what has to be exported after all, which the
    caller removes. Raises what `source.resolve` raises.
    """

    def of_daemon() -> dict[str, Any]:
        found = daemon.inspect(reference.docker_name)
        asked = Platform.parse(platform)
        check_platform(found.os, found.architecture, found.variant, asked, where=reference.canonical)
        return {"config": found.config}

    def resolved(asked: Reference) -> dict[str, Any]:
        found = source.resolve(asked, folder=folder, platform=platform, scratch=scratch)
        return parse_config(found.config, where=reference.canonical)

    if reference.transport is None:
        return source.daemon_first(of_daemon, lambda: resolved(replace(reference, transport="docker")))
    return of_daemon() if reference.transport == "docker-daemon" else resolved(reference)
