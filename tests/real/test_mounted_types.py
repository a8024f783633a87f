"""xfs and btrfs images, made by Linux: judged by their checkers, by a read-only mount, and by what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fledge_tasks.filesystems import btrfs, options, xfs
from tests.layers import Member, hardlink, symlink
from tests.layers import folder as directory
from tests.layouts import Layout
from tests.real.compare import compare_trees
from tests.real.images import Images
from tests.real.reference import Reference
from tests.real.registry import Registry
from tests.test_ext4_images import ACL
from tests.tools import PATH, as_nobody, need
from tests.workspaces import Workspace, sha256_of

KINDS = ("xfs", "btrfs")
MIB = 1 << 20
BUFFER_MB = 60
MIN_BYTES = {"xfs": xfs.MIN_BYTES, "btrfs": btrfs.MIN_BYTES}
CHECKERS = {"xfs": ["xfs_repair", "-n", "-f"], "btrfs": ["btrfs", "check", "--readonly"]}
OPTIONS = {"xfs": "loop,nouuid", "btrfs": "loop", "ext4": "loop"}
ADDED = ("etc/fsify-entrypoint",)

References = Callable[[str], Reference]


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("mkfs.xfs", "xfs_repair", "xfs_growfs", "mkfs.btrfs", "btrfs", "btrfstune", "losetup", "blkid")


def set_kind(place: Workspace, name: str, kind: str) -> None:
    file = place.root / name / "fledge.toml"
    text = re.sub("^type = .*$", f'type = "{kind}"', file.read_text(), flags=re.MULTILINE)
    if options.OPTIONS[kind].is_read_only:
        text = re.sub("^size_buffer_mb = .*\n", "", text, flags=re.MULTILINE)
    file.write_text(text)


@contextmanager
def mounted(image: Path, kind: str, how: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-o", f"{OPTIONS[kind]},{how}", image, place], check=True, env={"PATH": PATH})
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True, env={"PATH": PATH})


def checked(image: Path, kind: str) -> None:
    done = subprocess.run([*CHECKERS[kind], image], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def attached(image: Path) -> Iterator[None]:
    """Have an image be a loop device that libblkid remembers."""
    command = ["losetup", "--find", "--show", "--read-only", str(image)]
    device = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout.strip()
    try:
        subprocess.run(["blkid", device], env={"PATH": PATH}, capture_output=True, check=True)
        yield
    finally:
        subprocess.run(["losetup", "--detach", device], env={"PATH": PATH}, check=True)
        subprocess.run(["blkid", "-g"], env={"PATH": PATH}, check=True)


def loop_devices() -> str:
    return subprocess.run(["losetup", "-a"], env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout


def held_by_us(below: Path) -> list[str]:
    """Return the mounts of image files in any mount namespace, and the loop devices, of builds below a folder."""
    mounts = {
        line
        for process in Path("/proc").iterdir()
        if process.name.isdigit()
        for line in _lines(process / "mounts")
        if f"{below}/" in line and "/mnt " in line
    }
    return [*mounts, *(line for line in loop_devices().splitlines() if f"{below}/" in line and "image" in line)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, scratch: Path, images: Images, registry: Registry) -> Workspace:
    """A workspace with `web` of each kind, built."""
    del tmp_path_factory
    place = Workspace(scratch / "typed", registry.home, scratch / "typed-cache")
    for kind in KINDS:
        mappings = {"page": "/srv/page"}
        source = f"docker://{images.reference('web')}"
        (place.add(kind, source, buffer_mb=BUFFER_MB, mappings=mappings) / "page").write_text("first\n")
        set_kind(place, kind, kind)
    place.build("-j", "1")
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_image(place: Workspace, reference: References, kind: str) -> None:
    expected, image = reference("web"), place.output(kind)
    checked(image, kind)
    with mounted(image, kind, "ro") as root:
        assert compare_trees(expected.root, root, added=(*ADDED, "srv/page"), unstamped=expected.unstamped) == []
        assert (root / "srv/page").read_text() == "first\n"
    assert place.fledge("verify", kind).code == 0
    assert held_by_us(place.root.parent) == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_free_is_what_was_asked_for(place: Workspace, folder: Path, kind: str) -> None:
    image = Path(shutil.copy(place.output(kind), folder / "image"))
    size = image.stat().st_size
    with mounted(image, kind, "rw") as root:  # as the guest will see it
        status = os.statvfs(root)
        free = status.f_bavail * status.f_frsize
        assert free >= BUFFER_MB * MIB
        assert size == MIN_BYTES[kind] or free <= BUFFER_MB * MIB + max(16 * MIB, size // 20)
        if kind == "xfs":  # btrfs has no such limit
            assert status.f_favail >= max(10_000, (status.f_files - status.f_ffree) // 5)
        (root / "fill").write_bytes(os.urandom(BUFFER_MB * MIB - MIB))
        os.sync()


@pytest.mark.parametrize("kind", KINDS)
def test_the_least_size_is_kept(folder: Path, kind: str) -> None:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "small").write([Member("a", b"a")])
    place.add("small", "oci:../layouts/small", buffer_mb=0)
    set_kind(place, "small", kind)
    place.build()
    assert MIN_BYTES[kind] <= place.output("small").stat().st_size <= MIN_BYTES[kind] + 16 * MIB
    checked(place.output("small"), kind)


def uuid_in(image: Path) -> str:
    command = ["blkid", "-p", "-s", "UUID", "-o", "value", str(image)]
    return subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_what_two_builds_have_in_common(folder: Path, kind: str) -> None:
    """As ARCHITECTURE.md has it: UUID, content and times of files are the same, creation times are not."""
    images = []
    for name in ("one", "two"):
        place = Workspace(folder / name, folder)
        Layout(place.root / "layouts" / "small").write([Member("a", b"a" * 9000, mtime="1600000000.5")])
        place.add("small", "oci:../layouts/small", buffer_mb=0)
        set_kind(place, "small", kind)
        place.build()
        assert place.fledge("verify").code == 0
        images.append(place.output("small"))
    assert uuid_in(images[0]) == uuid_in(images[1])
    assert sha256_of(images[0]) != sha256_of(images[1]), "then ARCHITECTURE.md can say better of it"


@pytest.mark.parametrize("kind", KINDS)
def test_the_uuid_is_that_of_the_content(place: Workspace, kind: str) -> None:
    def uuid() -> str:
        return uuid_in(place.output(kind))

    first = uuid()
    assert re.fullmatch("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", first)
    page = place.root / kind / "page"
    page.write_text("second\n")
    assert place.build(kind).stages(kind) == ["mkfs", "assemble", "manifest"]
    assert uuid() != first
    checked(place.output(kind), kind)
    page.write_text("first\n")
    assert place.build(kind).stages(kind) == ["assemble", "manifest"]
    assert uuid() == first


def test_payloads_are_shared_by_all_kinds(place: Workspace) -> None:
    assert place.cache is not None
    kinds: dict[str, int] = {}
    for record in (place.cache / "objects").glob("*/*/entry.json"):
        stage = re.search('"stage": "(.*?)"', record.read_text())
        assert stage is not None
        kinds[stage[1]] = kinds.get(stage[1], 0) + sum(path.stat().st_size for path in record.parent.iterdir())
    assert kinds["unpack"] > 150 * MIB
    assert kinds["mkfs"] < 8 * MIB, "file data is in the payloads alone"


@pytest.mark.parametrize("kind", KINDS)
def test_preallocate_leaves_no_hole(folder: Path, kind: str) -> None:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "small").write([Member("a", b"a" * 100_000)])
    file = place.add("small", "oci:../layouts/small", buffer_mb=0) / "fledge.toml"
    file.write_text(file.read_text().replace("size_buffer_mb = 0", "size_buffer_mb = 0\npreallocate = true"))
    set_kind(place, "small", kind)
    place.build()
    status = place.output("small").stat()
    assert status.st_blocks * 512 >= status.st_size
    checked(place.output("small"), kind)


ODD = [
    Member("plain", b"p" * 5000, mode=0o4755, uid=100_000, gid=4_000_000_000),
    Member("old", b"o", mtime="-1000000.25"),
    Member("late", b"l", mtime="4102444800.123456789"),
    Member("bytes\udcff\n'", b"name"),
    Member("n" * 255, b"long"),
    Member("capable", b"c", mode=0o755, xattrs={"security.capability": bytes.fromhex("0100000200200000" + "00" * 12)}),
    Member("attributes", b"a", xattrs={"user.a": b"v" * 300, "trusted.b": b"\0\1"}),
    Member("listed", b"l", mode=0o775, xattrs={"system.posix_acl_access": ACL}),
    symlink("link", "plain"), symlink("dangling", "x/" * 400),
    Member("null", type=b"3", mode=0o666, rdev=(1, 3)), Member("block", type=b"4", mode=0o660, rdev=(259, 70_000)),
    Member("fifo", type=b"6", mode=0o620),
    Member("hard", type=b"1", link="plain"),
    directory("deep", 0o1777), *(directory("deep" + "/d" * depth) for depth in range(1, 300)),
    Member("deep" + "/d" * 299 + "/end", b"end"),
    Member("empty"), Member("zeros", bytes(50_000)),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_odd_members(folder: Path, kind: str) -> None:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "odd").write(ODD)
    place.add("odd", "oci:../layouts/odd", buffer_mb=1)
    set_kind(place, "odd", kind)
    place.build()
    checked(place.output("odd"), kind)
    result = place.fledge("verify")
    assert (result.code, result.stdout) == (0, f"odd: {place.output('odd')} holds what it should\n")
    changed = Path(shutil.copy(place.output("odd"), folder / "image"))
    with mounted(changed, kind, "rw") as root:
        (root / "plain").chmod(0o600)
        (root / "attributes").write_bytes(b"b")
    result = place.fledge("verify", str(changed), "--manifest", str(place.output("odd").with_name("manifest.json")))
    assert result.code == 1
    assert "/hard: mode is 0600, and should be 4755" in result.stdout  # the first name of that inode
    assert "/attributes: content differs at byte 0" in result.stdout


def built(folder: Path, kind: str, *layers: list[Member], more: str = "") -> Workspace:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "odd").write(*layers)
    place.add("odd", "oci:../layouts/odd", buffer_mb=1)
    set_kind(place, "odd", kind)
    file = place.root / "odd" / "fledge.toml"
    file.write_text(file.read_text().replace("[mappings]", f"{more}\n[mappings]"))
    place.build()
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_paths_beyond_path_max(folder: Path, kind: str) -> None:
    """Each layer has its folders behind a link of the one below."""
    names = ["d" * 180] * 5
    layers = []
    for level in range(6):
        start = [f"link{level - 1}"] if level else []
        folders = ["/".join([*start, *names[:depth]]) for depth in range(1, 6)]
        layers.append([*map(directory, folders), symlink(f"link{level}", folders[-1])])
    last = [
        Member("link5/file", b"data", xattrs={"user.a": b"1"}), hardlink("link5/hard", "link5/file"),
        Member("link5/fifo", type=b"6", xattrs={"trusted.b": b"2"}), symlink("link5/symlink", "file"),
    ]  # fmt: skip
    place = built(folder, kind, *layers, last)
    checked(place.output("odd"), kind)
    result = place.fledge("verify")
    assert (result.code, result.stdout) == (0, f"odd: {place.output('odd')} holds what it should\n")
    with mounted(place.output("odd"), kind, "ro") as root:
        assert (root / "link5" / "hard").stat().st_nlink == 2


@pytest.mark.parametrize(
    ("kind", "more", "seconds"),
    [("xfs", "", [-(1 << 31), 5_000_000_000]), ("xfs", 'features = ["^bigtime"]', [-(1 << 31), (1 << 31) - 1]),
     ("btrfs", "", [-5_000_000_000, 5_000_000_000])],
)  # fmt: skip
def test_times_that_a_type_holds(folder: Path, kind: str, more: str, seconds: list[int]) -> None:
    members = [Member("old", mtime="-5000000000"), Member("late", mtime="5000000000")]
    place = built(folder, kind, members, more=more)
    with mounted(place.output("odd"), kind, "ro") as root:
        assert [int((root / name).stat().st_mtime) for name in ("old", "late")] == seconds
    assert place.fledge("verify").stdout == f"odd: {place.output('odd')} holds what it should\n"


def test_an_attribute_that_btrfs_cannot_hold(folder: Path) -> None:
    """Linux calls it a full filesystem, and no size would do."""
    most = 16_384 - 101 - 25 - 30
    place = built(folder, "btrfs", [Member("file", xattrs={"user.a": b"v" * (most - 6)})])
    Layout(place.root / "layouts" / "odd").write([Member("file", xattrs={"user.a": b"v" * (most - 5)})])
    result = place.fledge("build")
    assert result.code == 1
    assert f"error: mkfs:odd: /file: has the extended attribute user.a of {most + 1} bytes, and btrfs" in result.stderr
    assert held_by_us(folder) == []


def test_damaged_data_is_told(folder: Path) -> None:
    """btrfs has checksums of data, and gives none that do not fit."""
    place = built(folder, "btrfs", [Member("file", b"needle" * 5000)])
    whole = place.output("odd").read_bytes()
    assert whole.count(b"needle" * 5000) == 1
    changed = folder / "changed"
    changed.write_bytes(whole.replace(b"needle" * 5000, b"Needle" + b"needle" * 4999))
    result = place.fledge("verify", str(changed), "--manifest", str(place.output("odd").with_name("manifest.json")))
    assert (result.code, result.stderr) == (1, "")
    assert re.search(r"^changed: /file: content cannot be read: inode \d+: Input/output error$", result.stdout, re.M)


def test_what_xfs_cannot_hold_is_named(folder: Path) -> None:
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layouts" / "long").write([symlink("link", "t" * 1024)])
    place.add("long", "oci:../layouts/long", buffer_mb=1)
    set_kind(place, "long", "xfs")
    result = place.fledge("build")
    assert result.code == 1
    assert "error: mkfs:long: /link: cannot be written: File name too long" in result.stderr
    assert held_by_us(folder) == [] and place.leftovers() == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_killed_build(folder: Path, images: Images, registry: Registry, kind: str) -> None:
    place = Workspace(folder / "w", registry.home)
    # So much that Linux can shrink the btrfs in place: a tighter one is made twice, and slowly.
    place.add("web", f"docker://{images.reference('web')}", buffer_mb=120)
    set_kind(place, "web", kind)
    process = subprocess.Popen(
        place.command("build", "-j", "1"), env=place.environment(), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not held_by_us(folder):
        assert process.poll() is None and time.monotonic() < deadline
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while held_by_us(folder):
        assert time.monotonic() < deadline, held_by_us(folder)
        time.sleep(0.05)
    place.build()
    assert [path for path in place.leftovers() if "build" not in path.parts] == []
    assert place.fledge("verify").code == 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_root_it_is_refused_before_any_work(folder: Path, kind: str) -> None:
    place = Workspace(folder / "w", folder, prefix=as_nobody())
    Layout(place.root / "layouts" / "small").write([Member("a", b"a")])
    place.add("small", "oci:../layouts/small", buffer_mb=1)
    set_kind(place, "small", kind)
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    result = place.fledge("build")
    assert result.code == 1
    assert f"filesystem.type: {kind} images can only be made by root" in result.stderr
    assert "choose ext4, which needs none" in result.stderr
    assert not (place.root / "fledge.lock").exists() and not (place.root / "cache").exists()
    # What root has made before can be put together by anybody.
    by_root = Workspace(place.root, folder)
    first = by_root.build().image("small")["sha256"]
    shutil.rmtree(place.root / "build")
    for path in [folder, *folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    again = place.build()
    assert again.stages("small") == ["assemble", "manifest"]
    assert again.image("small")["sha256"] == first == sha256_of(place.output("small"))


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_an_image_that_is_in_use_elsewhere_is_made_again(folder: Path, kind: str) -> None:
    """The tools of btrfs refuse a UUID that another device has."""
    place = Workspace(folder / "w", folder)
    Layout(place.root / "layout").write([Member("a", b"a" * 10_000)])
    place.add("a", "oci:../layout", buffer_mb=1)
    set_kind(place, "a", kind)
    place.build()
    shutil.move(place.output("a"), folder / "image")
    shutil.rmtree(place.root / "cache")
    with attached(folder / "image"):
        place.build()
    assert place.fledge("verify", "a").code == 0
