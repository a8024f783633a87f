"""xfs and btrfs images made by nobody, with the machine's own tools and newer ones; root mounts and compares them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layers import Member, symlink
from tests.layouts import Layout
from tests.real.compare import compare_trees
from tests.real.images import Images
from tests.real.newer import tools_of
from tests.real.reference import Reference
from tests.real.registry import Registry
from tests.real.test_mounted_types import ADDED, BUFFER_MB, MIB, MIN_BYTES, ODD, attached, checked, mounted, set_kind
from tests.test_ext4_images import ACL
from tests.tools import PATH, as_subordinate, need
from tests.workspaces import Workspace

TOOLS = (("btrfs", "own"), ("btrfs", "trixie"), ("btrfs", "forky"), ("xfs", "forky"))
"""Types, and whose tools make them: the machine's own, or those of a later Debian release."""

References = Callable[[str], Reference]


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mkfs.xfs", "xfs_repair", "mkfs.btrfs", "btrfs", "newuidmap")


def path_of(suite: str) -> str:
    return PATH if suite == "own" else f"{tools_of(suite)}:{PATH}"


def for_nobody(root: Path, home: Path, suite: str, *, count: int = 65536, **env: str) -> Workspace:
    """Return a workspace in which `fledge` is run by nobody."""
    grants = root.with_name(f"{root.name}-{suite}-{count}-grants")
    grants.mkdir(exist_ok=True)
    ours = {"PATH": path_of(suite), "XDG_RUNTIME_DIR": str(home / "run")}
    return Workspace(root, home, env={**ours, **env}, prefix=as_subordinate(grants, count))


def hand_over(place: Workspace) -> None:
    """Let all of a workspace belong to nobody."""
    for path in [place.root, *place.root.rglob("*")]:
        os.chown(path, 65534, 65534, follow_symlinks=False)


def with_layout(place: Workspace, name: str, kind: str, members: list[Member], buffer_mb: int = 1) -> None:
    Layout(place.root / "layouts" / name).write(members)
    place.add(name, f"oci:../layouts/{name}", buffer_mb=buffer_mb)
    set_kind(place, name, kind)
    hand_over(place)


def verified(place: Workspace, name: str) -> None:
    """Let root read an image back, with a copy of the cache: root's files in it would be in nobody's way."""
    copy = shutil.copytree(place.root / "cache", place.root.with_name(f"{place.root.name}-cache"), dirs_exist_ok=True)
    result = Workspace(place.root, place.home, Path(copy), env=place.env).fledge("verify", name)
    assert (result.code, result.stdout) == (0, f"{name}: {place.output(name)} holds what it should\n")


def entries(place: Workspace, stage: str) -> list[Path]:
    """Return the records of the entries of a stage in the cache."""
    records = (place.root / "cache" / "objects").glob("*/*/entry.json")
    return [record for record in records if f'"stage": "{stage}"' in record.read_text()]


def bytes_of(records: list[Path]) -> int:
    return sum(path.stat().st_size for record in records for path in record.parent.iterdir())


# --- complete --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[("btrfs", "own"), ("xfs", "forky")], ids="-".join)
def web(request: pytest.FixtureRequest, scratch: Path, images: Images, registry: Registry) -> tuple[Workspace, str]:
    """`web`, a real image with devices, built by nobody as an image that is named after its type."""
    kind, suite = request.param
    place = for_nobody(scratch / "rootless", registry.home, suite)
    place.add(kind, f"docker://{images.reference('web')}", buffer_mb=BUFFER_MB)
    set_kind(place, kind, kind)
    hand_over(place)
    place.build(kind)
    return place, kind


def test_a_real_image(web: tuple[Workspace, str], reference: References) -> None:
    place, kind = web
    expected, image = reference("web"), place.output(kind)
    checked(image, kind)
    with mounted(image, kind, "ro") as root:
        assert compare_trees(expected.root, root, added=ADDED, unstamped=expected.unstamped) == []
    assert {path.lstat().st_uid for path in place.root.rglob("*")} == {65534}
    assert list((place.root / "cache" / "tmp").iterdir()) == [], "nothing is left of the namespace"


def test_what_is_free_is_what_was_asked_for(web: tuple[Workspace, str], folder: Path) -> None:
    place, kind = web
    image = Path(shutil.copy(place.output(kind), folder / "image"))
    size = image.stat().st_size
    [record] = [entry for entry in entries(place, "mkfs") if f'type = \\"{kind}\\"' in entry.read_text()]
    info = json.loads(record.read_text())["info"]
    for _ in range(2):
        with mounted(image, kind, "rw") as root:  # as the guest will see it
            status = os.statvfs(root)
            free = status.f_bavail * status.f_frsize
            assert free >= BUFFER_MB * MIB
            assert size == MIN_BYTES[kind] or free <= BUFFER_MB * MIB + max(16 * MIB, size // 20)
            # What was worked out is what Linux says.
            assert (info["free_bytes"], info["free_inodes"]) == (free, status.f_favail)
    with mounted(image, kind, "rw") as root:
        (root / "fill").write_bytes(os.urandom(BUFFER_MB * MIB - MIB))
        os.sync()
    checked(image, kind)


def test_payloads_are_shared(web: tuple[Workspace, str]) -> None:
    place, kind = web
    assert bytes_of(entries(place, "unpack")) > 150 * MIB
    # btrfs keeps small files in its metadata, which is no payload's.
    [record] = [entry for entry in entries(place, "mkfs") if f'type = \\"{kind}\\"' in entry.read_text()]
    assert bytes_of([record]) < {"xfs": 4, "btrfs": 12}[kind] * MIB


MORE = [
    Member("acl", b"acl", mode=0o775, xattrs={"system.posix_acl_access": ACL, "user.empty": b""}),
    Member("acl-folder", type=b"5", mode=0o2770, xattrs={"system.posix_acl_default": ACL}),
    Member("dev/with space/zero", type=b"3", mode=0o600, rdev=(1, 5), uid=7),
    Member("dev/again", type=b"1", link="dev/with space/zero"),
    Member("owned", type=b"5", mode=0o500, uid=33, gid=34),
    Member("owned/file", b"f" * 4097, mode=0o2751, uid=33, gid=34),
    Member("second", b"s", mtime="1600000000.000000001"), symlink("second-link", "second"),
    Member("link-of-mode-0", type=b"2", link="x", mode=0),
    Member("link-twice", type=b"1", link="second-link"), Member("fifo-twice", type=b"1", link="fifo"),
    Member("./", type=b"5", mode=0o711, uid=12, gid=13, mtime="1500000000.5"),
    *(Member(f"many/{number:04d}" + "x" * 40, b"%d" % number * 1500) for number in range(600)),
    *(Member(f"many/link{number:04d}", type=b"1", link="many/0000" + "x" * 40) for number in range(600)),
]  # fmt: skip


def odd(kind: str) -> list[Member]:
    """Return one of everything that a plain user can bring into an image of this kind."""
    members = [member for member in ODD if member.path not in {"plain", "hard", "attributes"}]
    members += [
        Member("plain", b"p" * 5000, mode=0o4755, uid=65_535, gid=65_536),
        Member("hard", type=b"1", link="plain"),
    ]
    ours = {"trusted.b": b"\0\1", "security.other": b"text"} if kind == "xfs" else {}
    return [*members, Member("attributes", b"a", xattrs={"user.a": b"v" * 300, **ours}), *MORE]


@pytest.mark.parametrize(("kind", "suite"), TOOLS)
def test_odd_members_are_as_root_makes_them(folder: Path, kind: str, suite: str) -> None:
    place = for_nobody(folder / "w", folder, suite)
    with_layout(place, "odd", kind, odd(kind))
    place.build()
    ours = place.output("odd")
    checked(ours, kind)
    verified(place, "odd")
    shutil.copytree(place.root / "layouts", folder / "root" / "layouts")
    by_root = Workspace(folder / "root", folder, env=place.env)
    with_layout(by_root, "odd", kind, odd(kind))
    by_root.build()
    with mounted(by_root.output("odd"), kind, "ro") as expected, mounted(ours, kind, "ro") as found:
        assert compare_trees(expected, found) == []


def test_the_same_bytes_by_anybody(folder: Path) -> None:
    """mkfs.xfs of this version takes time and randomness from its environment."""
    made = []
    for number, who in enumerate(("nobody", "a root that may not mount")):
        place = for_nobody(folder / f"w{number}", folder, "forky")
        if who != "nobody":
            place.prefix = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
        with_layout(place, "odd", "xfs", odd("xfs"))
        made.append(place.build().image("odd")["sha256"])
    assert len(set(made)) == 1


def test_a_root_that_may_not_mount_needs_no_grants(folder: Path) -> None:
    place = Workspace(folder / "w", folder, prefix=["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"])
    Layout(place.root / "layouts" / "a").write([Member("a", b"a" * 10_000, uid=100_000, gid=4_000_000_000)])
    place.add("a", "oci:../layouts/a", buffer_mb=1)
    set_kind(place, "a", "btrfs")
    place.build()
    verified(place, "a")


# --- refused ---------------------------------------------------------------------------------


def refused(place: Workspace, name: str, *texts: str) -> None:
    result = place.fledge("build", name)
    assert result.code == 1
    for text in texts:
        assert text in result.stderr


def test_an_old_mkfs_xfs_is_refused_before_any_work(folder: Path) -> None:
    place = for_nobody(folder / "w", folder, "own", PATH=f"{folder}/bin:{PATH}")
    (folder / "bin").mkdir()
    for name, version in (("mkfs.xfs", "6.1.0"), ("mkfs.btrfs", "6.11")):
        (folder / "bin" / name).write_text(f"#!/bin/sh\necho {name} version {version}\n")
        (folder / "bin" / name).chmod(0o755)
    with_layout(place, "x", "xfs", [Member("a", b"a")])
    refused(
        place, "x", "filesystem.type: xfs images can only be made by root; without a mount: mkfs.xfs 6.1.0 does not"
    )
    refused(place, "x", "run as root; or install xfsprogs 7.2 or later; or choose ext4")
    with_layout(place, "b", "btrfs", [Member("a", b"a")])
    refused(place, "b", "mkfs.btrfs 6.11 makes files of their own of hard links", "install btrfs-progs 6.12 or later")
    assert not (place.root / "fledge.lock").exists() and not (place.root / "cache").exists()


def test_without_grants_it_is_refused_before_any_work(folder: Path) -> None:
    place = for_nobody(folder / "w", folder, "own", count=0)
    with_layout(place, "b", "btrfs", [Member("a", b"a")])
    refused(place, "b", "without a mount: /etc/subuid grants no subordinate ids to nobody", "usermod --add-subuids")
    assert not (place.root / "fledge.lock").exists() and not (place.root / "cache").exists()


@pytest.mark.parametrize(
    ("kind", "member", "reason"),
    [
        ("btrfs", Member("a", b"a", uid=65_537), "/a: belongs to 65537:0, and you have no such ids"),
        ("btrfs", Member("a", b"a", gid=70_000), "/a: belongs to 0:70000, and you have no such ids"),
        ("btrfs", Member("a", b"a", xattrs={"trusted.b": b"1"}), "/a: has the extended attribute trusted.b"),
        ("btrfs", Member("./", type=b"5", xattrs={"user.b": b"1"}), "/: has extended attributes, which mkfs.btrfs"),
        ("btrfs", Member("/".join(["n" * 200] * 20), b"a"), "its path is too long for mkfs"),
        ("xfs", symlink("a", "t" * 1024), "/a: is a link to 1024 bytes, and xfs holds 1023"),
        ("xfs", Member("a b", type=b"3", rdev=(1, 3)), "/a b: is a device with a name that xfs_db cannot be told"),
        ("xfs", Member("a", type=b"3", rdev=(512, 3)), "/a: is a device of numbers that xfs does not hold (512, 3)"),
        ("xfs", Member("a", type=b"4", rdev=(8, 1 << 18)), "/a: is a device of numbers that xfs does not hold"),
        ("xfs", Member("a", b"a", mtime="-2200000000"), "/a: has a time before 1901"),
    ],
)
def test_what_cannot_be_complete_is_refused_with_the_path(folder: Path, kind: str, member: Member, reason: str) -> None:
    place = for_nobody(folder / "w", folder, "forky" if kind == "xfs" else "own")
    with_layout(place, "a", kind, [Member("z", b"z"), member])
    refused(place, "a", f"error: mkfs:a: {reason}" if reason.startswith("/") else reason, "or choose ext4")
    assert place.leftovers() == [] and list((place.root / "cache" / "tmp").iterdir()) == []


# --- what is left ----------------------------------------------------------------------------


def test_what_a_killed_build_leaves_is_removed_by_the_next(folder: Path) -> None:
    """Its folder belongs to ids that are not nobody's, so it takes a namespace to remove it."""
    log = folder / "log"
    place = for_nobody(folder / "w", folder, "own", FLEDGE_CRASH_LOG=str(log))
    with_layout(place, "a", "btrfs", odd("btrfs"))
    with_layout(place, "b", "btrfs", [Member("b", b"b")])
    log.touch()
    log.chmod(0o666)
    place.build("a", "-j", "1")
    at = log.read_text().splitlines().index("rootless: folder filled") + 1
    for clean in (("build", "b"), ("clean", "--cache"), ("cache", "trim", "--ci")):
        for name in ("build", "cache"):
            shutil.rmtree(place.root / name, ignore_errors=True)
        (place.root / "fledge.lock").unlink(missing_ok=True)
        log.write_text("")
        killing = Workspace(place.root, folder, env={**place.env, "FLEDGE_CRASH_AT": str(at)}, prefix=place.prefix)
        command, env = killing.command("build", "a", "-j", "1"), killing.environment()
        done = subprocess.run(command, env=env, capture_output=True, check=False, start_new_session=True)
        assert done.returncode == -signal.SIGKILL
        temp = place.root / "cache" / "tmp"
        assert {path.lstat().st_uid for path in temp.rglob("*")} > {65534}
        result = place.fledge(*clean)
        assert result.code == 0, result.stderr
        assert not temp.exists() or list(temp.iterdir()) == []


@pytest.mark.parametrize(("kind", "suite"), [("btrfs", "own"), ("btrfs", "forky"), ("xfs", "forky")])
def test_an_image_that_is_in_use_elsewhere_is_made_again(folder: Path, kind: str, suite: str) -> None:
    place = for_nobody(folder / "w", folder, suite)
    with_layout(place, "a", kind, [Member("a", b"a" * 10_000)])
    place.build()
    shutil.move(place.output("a"), folder / "image")
    shutil.rmtree(place.root / "cache")
    with attached(folder / "image"):
        place.build()
    verified(place, "a")


@pytest.mark.parametrize(("kind", "suite"), [("btrfs", "own"), ("xfs", "forky")])
def test_a_fixed_size_and_a_label(folder: Path, kind: str, suite: str) -> None:
    place = for_nobody(folder / "w", folder, suite)
    with_layout(place, "fixed", kind, [Member("big", os.urandom(90 * MIB)), Member("a", b"a")], buffer_mb=260)
    file = place.root / "fixed/fledge.toml"
    plain = file.read_text()
    buffer, feature = "size_buffer_mb = 260\n", {"xfs": "rmapbt", "btrfs": "mixed-bg"}[kind]
    file.write_text(plain.replace(buffer, f'{buffer}size_mb = 310\nlabel = "nobody"\n'))
    result = place.fledge("build")
    assert result.code == 1
    found = re.search(r"size_mb: found 310, and this image needs (\d+) MiB, 260 of them free", result.stderr)
    assert found is not None, result.stderr
    file.write_text(plain.replace(buffer, f'{buffer}size_mb = {found[1]}\nlabel = "nobody"\n'))
    place.build()
    image = place.output("fixed")
    checked(image, kind)
    assert image.stat().st_size == int(found[1]) * MIB
    command = ["blkid", "-p", "-s", "LABEL", "-o", "value", str(image)]
    assert subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout == "nobody\n"
    with mounted(Path(shutil.copy(image, folder / "image")), kind, "rw") as root:
        status = os.statvfs(root)
        assert status.f_bavail * status.f_frsize >= 260 * MIB
    file.write_text(plain.replace(buffer, f'{buffer}features = ["{feature}"]\n'))
    result = place.fledge("build")
    assert result.code == 1
    assert "without a mount: they have the features and the block size of the type and no others" in result.stderr
    assert "leave features and block_size out" in result.stderr
