"""squashfs and erofs images: judged by what umoci unpacks, by a mount, and by programs of more than one version."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fledge_tasks.filesystems import squashfs
from tests.layers import Member, archive, symlink
from tests.layouts import Layout
from tests.real.compare import compare_trees
from tests.real.images import Images
from tests.real.newer import tools_of
from tests.real.reference import Reference
from tests.real.registry import Registry
from tests.real.test_conformance import unpack
from tests.real.test_mounted_types import ODD, set_kind
from tests.tools import PATH, as_nobody, need
from tests.trees import mounted
from tests.workspaces import Workspace, sha256_of

# Image, type, compression
IMAGES = {"squashfs": ("squashfs", None), "erofs": ("erofs", None), "packed": ("erofs", "lz4")}
MIB = 1 << 20
ADDED = ("etc/fsify-entrypoint",)
TIMES: dict[str, Callable[[int], int]] = {"squashfs": squashfs.clamped, "erofs": int}

References = Callable[[str], Reference]


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("tar2sqfs", "sqfstar", "mkfs.erofs", "fsck.erofs")


def add(place: Workspace, name: str, source: str, kind: str, compression: str | None = None) -> Path:
    """Add an image of a read-only type."""
    folder = place.add(name, source)
    set_kind(place, name, kind)
    if compression:
        file = folder / "fledge.toml"
        file.write_text(re.sub("^type = .*$", rf'\g<0>\ncompression = "{compression}"', file.read_text(), flags=re.M))
    return folder


def mkfs_bytes(place: Workspace, name: str) -> int:
    """Return what the cache has of an image beside its layers."""
    found = place.fledge("cache", "stats", "--json")
    assert found.code == 0
    assert place.cache is not None
    total = 0
    for record in (place.cache / "objects").glob("*/*/entry.json"):
        text = json.loads(record.read_text())
        if text["stage"] == "mkfs" and re.search(f'^filesystem.type = "{IMAGES[name][0]}"$', text["key_text"], re.M):
            total += sum(path.stat().st_size for path in record.parent.iterdir())
    return total


@pytest.fixture(scope="module")
def place(scratch: Path, images: Images, registry: Registry) -> Workspace:
    """A workspace with `web` and `odd` of each type, built; squashfs cannot hold the lists of `odd`."""
    place = Workspace(scratch / "read-only", registry.home, scratch / "read-only-cache")
    for name, (kind, compression) in IMAGES.items():
        add(place, name, f"docker://{images.reference('web')}", kind, compression)
        if kind != "squashfs":
            add(place, f"odd-{name}", f"docker://{images.reference('odd')}", kind, compression)
    place.build("-j", "2")
    return place


@pytest.mark.parametrize("name", IMAGES)
def test_a_real_image(place: Workspace, reference: References, name: str) -> None:
    expected, image, (kind, _) = reference("web"), place.output(name), IMAGES[name]
    with mounted(image, kind) as root:
        found = compare_trees(
            expected.root, root, added=ADDED, unstamped=expected.unstamped, time_ns=TIMES[kind]
        )  # fmt: skip
        assert found == []
    result = place.fledge("verify", name)
    assert (result.code, result.stdout) == (0, f"{name}: {image} holds what it should\n")
    manifest = json.loads(image.with_name("manifest.json").read_bytes())
    assert manifest["labels"]["volant.rootfs_fstype"] == kind
    assert manifest["rootfs"]["checksum"] == sha256_of(image)


@pytest.mark.parametrize("name", ["erofs", "packed"])
def test_one_of_everything(place: Workspace, reference: References, name: str) -> None:
    expected, image = reference("odd"), place.output(f"odd-{name}")
    with mounted(image, "erofs") as root:
        assert compare_trees(expected.root, root, added=ADDED, unstamped=expected.unstamped) == []
    assert place.fledge("verify", f"odd-{name}").code == 0


def test_what_squashfs_cannot_hold_is_named(folder: Path, images: Images, registry: Registry) -> None:
    place = Workspace(folder / "w", registry.home)
    add(place, "odd", f"docker://{images.reference('odd')}", "squashfs")
    result = place.fledge("build")
    assert result.code == 1
    said = "error: mkfs:odd: /acl-file: has the access control list system.posix_acl_access, which squashfs cannot hold"
    assert said in result.stderr
    assert "hint: choose ext4 or erofs, which can" in result.stderr
    assert place.leftovers() == []


@pytest.mark.parametrize("name", IMAGES)
def test_odd_members(folder: Path, name: str) -> None:
    """What umoci unpacks of the layer that the other types are tried with, too."""
    kind, compression = IMAGES[name]
    odd = ODD
    if kind == "squashfs":
        odd = [member for member in odd if not any(name.startswith("system.") for name in member.xattrs)]
    elif compression:  # mkfs.erofs 1.5 cannot name the others
        odd = [member for member in odd if len(member.path.rpartition("/")[2]) < 255]
    place = Workspace(folder / "w", folder)
    layout = Layout(place.root / "layouts" / "odd").write_tars([archive(odd)], compression="none", tag="latest")
    add(place, "odd", "oci:../layouts/odd:latest", kind, compression)
    place.build()
    assert place.fledge("verify").code == 0
    reference = unpack(layout, folder)
    assert reference.error is None
    with mounted(place.output("odd"), kind) as root:
        added = ("etc",)
        found = compare_trees(
            reference.root, root, added=added, unstamped=reference.unstamped, time_ns=TIMES[kind]
        )  # fmt: skip
        assert found == []


def test_images_on_one_base_share_it_where_they_can(
    place: Workspace, images: Images, registry: Registry, scratch: Path
) -> None:
    del registry, scratch
    source = f"docker://{images.reference('web')}"
    sizes = {}
    for name in ("erofs", "squashfs"):
        before = mkfs_bytes(place, name)
        for number in range(3):
            folder = add(place, f"{name}-{number}", source, name)
            (folder / "page").write_text(f"{name} {number}")
            file = folder / "fledge.toml"
            file.write_text(file.read_text().replace("[mappings]", '[mappings]\n"page" = "/srv/page"'))
        result = place.build(*(f"{name}-{number}" for number in range(3)))
        assert all(result.stages(f"{name}-{number}") == ["resolve", "mkfs", "assemble", "manifest"][-3:]
                   or "unpack" not in result.stages(f"{name}-{number}") for number in range(3))  # fmt: skip
        sizes[name] = (mkfs_bytes(place, name) - before) / 3 / place.output(f"{name}-0").stat().st_size
    assert sizes["erofs"] < 0.02, "file data is in the payloads alone"
    assert 0.9 < sizes["squashfs"] < 1.1, "what is compressed differs with every image"


def test_every_byte_counts(place: Workspace, folder: Path) -> None:
    for name in IMAGES:
        image = Path(shutil.copy(place.output(name), folder / name))
        manifest = place.output(name).with_name("manifest.json")
        with image.open("r+b") as file:
            file.seek(image.stat().st_size // 2)
            data = file.read(4096)
            file.seek(-4096, os.SEEK_CUR)
            file.write(bytes(byte ^ 0x55 for byte in data))
        result = place.fledge("verify", str(image), "--manifest", str(manifest))
        assert result.code == 1
        assert "the checksum is " in result.stdout
        assert re.search(f"^{name}: /.*: .*(content differs at byte|cannot be read)", result.stdout, re.M), (
            result.stdout
        )


def test_preallocate_leaves_no_hole(folder: Path) -> None:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "small").write([Member("a", bytes(10 * MIB))])
    for kind in ("squashfs", "erofs"):
        file = add(place, kind, "oci:../layouts/small", kind) / "fledge.toml"
        file.write_text(re.sub("^type = .*$", r"\g<0>\npreallocate = true", file.read_text(), flags=re.M))
    place.build()
    for kind in ("squashfs", "erofs"):
        status = place.output(kind).stat()
        assert status.st_blocks * 512 >= status.st_size


def nobodys(folder: Path) -> Workspace:
    """Return a workspace of nobody's in a folder, and in it a layout."""
    place = Workspace(folder / "w", folder, prefix=as_nobody())
    Layout(place.root / "layouts" / "small").write(
        [
            Member("a", b"a" * 100_000, uid=5, mtime="5.25"),
            Member("b", os.urandom(30_000), mode=0o4755),
            symlink("c", "a"),
            Member("d", b"d", xattrs={"security.capability": bytes.fromhex("0100000200200000" + "00" * 12)}),
        ]
    )
    return place


def give_away(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)


def test_without_root(folder: Path) -> None:
    place = nobodys(folder)
    for name in ("squashfs", "erofs"):
        add(place, name, "oci:../layouts/small", name)
    give_away(folder)
    place.build()
    result = place.fledge("verify")
    assert (result.code, result.stdout.count("holds what it should")) == (0, 2)


def test_what_needs_root_is_refused_before_any_work(folder: Path) -> None:
    """As long as the mkfs.erofs that is installed is an old one."""
    place = nobodys(folder)
    add(place, "packed", "oci:../layouts/small", "erofs", "lz4hc")
    give_away(folder)
    doctor = place.fledge("doctor").stdout
    result = place.fledge("build")
    if re.search("^ok +erofs lz4 ", doctor, re.M):
        assert result.code == 0
        return
    assert result.code == 1
    assert "filesystem.type: compressed erofs images can only be made by root" in result.stderr
    assert "install erofs-utils 1.8.4 or later, which needs none" in result.stderr
    assert not (place.root / "fledge.lock").exists() and not (place.root / "cache/objects").exists()


NEWER = {
    "zstd": ("squashfs", "zstd"), "gzip": ("squashfs", "gzip"), "plain": ("squashfs", "none"),
    "lz4": ("erofs", "lz4"), "lz4hc": ("erofs", "lz4hc"),
}  # fmt: skip


@pytest.mark.parametrize("has_tar2sqfs", [True, False], ids=["squashfs-tools-ng", "squashfs-tools"])
def test_newer_programs_need_no_root(folder: Path, has_tar2sqfs: bool) -> None:
    need("taskset")
    programs = folder / "programs" / "bin"
    programs.mkdir(parents=True)
    (folder / "programs" / "root").symlink_to(tools_of("trixie").with_name("root"))
    hidden = set() if has_tar2sqfs else {"tar2sqfs"}
    for path in tools_of("trixie").iterdir():
        if path.name not in hidden:
            shutil.copy(path, programs)
    # Of what is installed all but the hidden is found.
    for place_ in dict.fromkeys(PATH.split(":")):
        for path in Path(place_).iterdir() if Path(place_).is_dir() else ():
            if path.name not in hidden and not (programs / path.name).exists():
                (programs / path.name).symlink_to(path)
    place = nobodys(folder)
    place.env = {"PATH": str(programs)}
    for name, (kind, compression) in NEWER.items():
        add(place, name, "oci:../layouts/small", kind, compression)
    give_away(folder)
    first = place.build("-j", "1")
    result = place.fledge("verify")
    assert (result.code, result.stdout.count("holds what it should")) == (0, len(NEWER)), result.stdout
    doctor = place.fledge("doctor").stdout
    assert re.search(rf"^ok +squashfs +squashfs-tools{'-ng' * has_tar2sqfs} \d", doctor, re.M), doctor
    assert re.search(r"^ok +erofs lz4 .*compressed, without root$", doctor, re.M), doctor
    for name, (kind, _) in NEWER.items():
        with mounted(place.output(name), kind) as root:
            assert (root / "b").stat().st_mode & 0o7777 == 0o4755 and (root / "a").stat().st_uid == 5
            assert (root / "a").stat().st_mtime == (5.25 if kind == "erofs" else 5)
            assert len(os.getxattr(root / "d", "security.capability")) == 20
    # The same bytes again, on one processor.
    shutil.rmtree(place.root / "cache")
    shutil.rmtree(place.root / "build")
    place.prefix = ["taskset", "-c", "0", *place.prefix]
    second = place.build("-j", "1")
    for name in NEWER:
        assert "mkfs" in second.stages(name)
        assert second.image(name)["sha256"] == first.image(name)["sha256"], name
