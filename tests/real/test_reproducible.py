"""Same inputs, same bytes, for what only root can vary: the host's mke2fs.conf, filesystems, users; and a registry."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import golden
from tests.real.registry import Registry
from tests.test_reproducible import GOLDEN_IMAGE, apply, plain_mke2fs
from tests.tools import as_nobody, need
from tests.trees import tool
from tests.variations import EVERYTHING, MKE2FS_CONF, Ground, ground
from tests.workspaces import sha256_of

HOST_CONF = Path("/etc/mke2fs.conf")
IMAGE_MIB = 400
"""What mkfs.xfs and mkfs.btrfs ask for at least."""


@contextmanager
def filesystem(kind: str, folder: Path) -> Iterator[Path]:
    """Mount a new filesystem."""
    place = folder / "mounted"
    place.mkdir()
    if kind == "tmpfs":
        tool("mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", place)
    else:
        image = folder / "image"
        with image.open("wb") as file:
            file.truncate(IMAGE_MIB << 20)
        tool(f"mkfs.{kind}", "-q", image)
        tool("mount", "-t", kind, "-o", "loop", image, place)
    try:
        yield place
    finally:
        tool("umount", place)


def built(place: Ground) -> str:
    """Build, and return the checksum of what is there then."""
    report = place.build().image(golden.NAME)
    found = sha256_of(place.workspace.output(golden.NAME))
    assert report["sha256"] == found
    return found


def host_conf(folder: Path) -> list[str]:
    """Return the prefix of a command that sees another /etc/mke2fs.conf."""
    (folder / "host.conf").write_text(MKE2FS_CONF)
    script = f'mount --bind "$0" {HOST_CONF} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(folder / "host.conf")]


def test_the_hosts_mke2fs_conf_does_not_matter(folder: Path) -> None:
    need("unshare", "mke2fs")
    prefix, before = host_conf(folder), HOST_CONF.read_bytes()
    tool(*prefix, "mke2fs", "-q", "-F", "-t", "ext4", folder / "other.img", "8M")
    other = (folder / "other.img").read_bytes()[1024:2048]
    assert other[0x58:0x5A] != plain_mke2fs(folder)[0x58:0x5A], "mke2fs follows it"
    place = ground(folder)
    place.prefix(*prefix)
    assert built(place) == GOLDEN_IMAGE
    assert HOST_CONF.read_bytes() == before, "it was another one for the build only"


@pytest.mark.parametrize("kind", ["tmpfs", "xfs", "btrfs"])
def test_the_filesystem_below_does_not_matter(kind: str, folder: Path) -> None:
    need("mount", *([] if kind == "tmpfs" else [f"mkfs.{kind}"]))
    with filesystem(kind, folder) as mounted:
        assert mounted.stat().st_dev != folder.stat().st_dev
        assert built(ground(mounted)) == GOLDEN_IMAGE


def test_a_cache_on_another_filesystem_does_not_matter(folder: Path) -> None:
    need("mount")
    with filesystem("tmpfs", folder) as mounted:
        place = ground(folder)
        place.workspace.cache = mounted / "cache"
        assert built(place) == GOLDEN_IMAGE


def test_a_registry_does_not_matter(folder: Path) -> None:
    need("docker-registry", "skopeo")
    (folder / "registry").mkdir()
    registry = Registry(folder / "storage", folder / "registry")
    registry.start()
    try:
        place = ground(folder)
        name = f"{registry.host}/golden:1"
        layout = golden.layout(place.workspace).path
        tool("skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}", f"docker://{name}")
        shutil.rmtree(layout)
        place.workspace.home = registry.home
        golden.describe(place.workspace, f"docker://{name}")
        assert built(place) == GOLDEN_IMAGE
    finally:
        registry.stop()


def test_all_of_it_at_once_as_another_user(folder: Path) -> None:
    need("unshare", "mount")
    with filesystem("tmpfs", folder) as mounted:
        place = ground(mounted)
        apply(EVERYTHING, place)
        for path in [mounted, *mounted.rglob("*")]:
            os.chown(path, 65534, 65534, follow_symlinks=False)
        place.workspace.prefix = [*host_conf(folder), *place.workspace.prefix, *as_nobody()]
        assert built(place) == GOLDEN_IMAGE
        assert place.workspace.output(golden.NAME).stat().st_uid == 65534
