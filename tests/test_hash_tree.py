"""dm-verity: hash trees that others can check, the same each time, and builds that keep them in step with the image."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fledge_tasks import hash_tree
from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.hash_tree import BLOCK_BYTES, Superblock
from tests.layers import Member, folder
from tests.layouts import Place
from tests.test_drills_disk import mounted
from tests.tools import PATH, as_nobody, have_only, need, need_root, put_before
from tests.trees import tool
from tests.workspaces import Workspace, doit, sha256_of

SALT = "5a" * 32
UUID = "11111111-2222-4333-8444-555555555555"
BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + random.Random(1).randbytes(200_000), mode=0o755)]
VERITY = "[output]\nverity = true\n"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("veritysetup", "qemu-img", "mke2fs", "e2fsck")


def image_of(path: Path, blocks: int, seed: int = 3) -> Path:
    """Write a sparse image with data in some of its blocks."""
    draw = random.Random(seed)
    with path.open("wb") as file:
        for block in sorted({0, blocks - 1, *(draw.randrange(blocks) for _ in range(20))}):
            file.seek(block * BLOCK_BYTES)
            file.write(draw.randbytes(BLOCK_BYTES))
    return path


def make(image: Path, name: str = "tree") -> tuple[Path, str]:
    tree = image.with_name(name)
    return tree, hash_tree.make(image, tree, salt=SALT, uuid=UUID)


def reference(image: bytes, salt: bytes) -> str:
    """Return the root hash as the kernel's documentation defines it, without any tree in a file."""
    level = [image[at : at + BLOCK_BYTES] for at in range(0, len(image), BLOCK_BYTES)]
    while True:
        hashes = b"".join(hashlib.sha256(salt + block).digest() for block in level)
        if len(hashes) == 32:
            return hashes.hex()
        hashes += bytes(-len(hashes) % BLOCK_BYTES)
        level = [hashes[at : at + BLOCK_BYTES] for at in range(0, len(hashes), BLOCK_BYTES)]


def patch(path: Path, at: int, data: bytes = b"\xff") -> None:
    with path.open("r+b") as file:
        file.seek(at)
        assert file.read(len(data)) != data
        file.seek(at)
        file.write(data)


# --- the tree ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 127, 128, 129, 128 * 128, 128 * 128 + 1])
def test_a_tree_is_what_it_should_be(tmp_path: Path, blocks: int) -> None:
    image = image_of(tmp_path / "image", blocks)
    before = image.stat().st_mtime_ns
    tree, root_hash = make(image)
    assert root_hash == reference(image.read_bytes(), bytes.fromhex(SALT))
    tool("veritysetup", "verify", image, tree, root_hash)
    assert image.stat().st_mtime_ns == before
    assert hash_tree.superblock(tree) == Superblock(blocks, SALT)
    # As veritysetup makes it by itself, without the room that we take beforehand.
    alone = tmp_path / "alone"
    tool("veritysetup", "format", f"--salt={SALT}", f"--uuid={UUID}", image, alone)
    assert tree.read_bytes() == alone.read_bytes()
    assert tree.stat().st_size == hash_tree.tree_bytes(image.stat().st_size)
    assert tree.stat().st_mode & 0o777 == 0o644


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    one, other = (image_of(tmp_path / name, 300) for name in ("one", "other"))
    other.write_bytes(one.read_bytes())  # without holes
    made = [make(image, f"tree{at}") for at, image in enumerate((one, other, one))]
    assert len({root_hash for _, root_hash in made}) == len({sha256_of(tree) for tree, _ in made}) == 1
    changed, root_hash = make(image_of(tmp_path / "changed", 300, seed=4), "tree-of-changed")
    assert root_hash != made[0][1] and sha256_of(changed) != sha256_of(made[0][0])


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", 300)
    tree, root_hash = make(image)
    assert list(hash_tree.problems(image, tree, root_hash)) == []
    draw = random.Random(5)
    for at in (0, image.stat().st_size - 1, *(draw.randrange(image.stat().st_size) for _ in range(10))):
        before = image.read_bytes()[at : at + 1]
        patch(image, at, bytes([before[0] ^ 0x10]))
        [*_, last] = hash_tree.problems(image, tree, root_hash)
        assert last.startswith("veritysetup: Verification")
        patch(image, at, before)
    assert list(hash_tree.problems(image, tree, root_hash)) == []
    for at in (
        BLOCK_BYTES,
        BLOCK_BYTES + 40,
        tree.stat().st_size - BLOCK_BYTES,
    ):  # the root block, and the lowest level
        before = tree.read_bytes()[at : at + 1]
        patch(tree, at, bytes([before[0] ^ 1]))
        assert list(hash_tree.problems(image, tree, root_hash)) != []
        patch(tree, at, before)
    assert list(hash_tree.problems(image, tree, "0" * 64)) == ["veritysetup: Verification of root hash failed."]


def test_what_is_no_tree(tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", 40)
    tree, root_hash = make(image)
    whole = tree.read_bytes()
    for data in (
        b"",
        b"verity\0\0",
        bytes(8192),
        whole[:200],
        b"VERITY" + whole[6:],
        whole[:32] + b"sha1\0\0" + whole[38:],
    ):
        tree.write_bytes(data)
        with pytest.raises(FilesystemError, match="not a hash tree that fledge made"):
            hash_tree.superblock(tree)
    tree.write_bytes(bytes(8192))
    assert list(hash_tree.problems(image, tree, root_hash)) == [
        f"veritysetup: Device {tree} is not a valid VERITY device."
    ]
    with pytest.raises(CommandError, match="Invalid salt"):
        hash_tree.make(image, tmp_path / "salted", salt="no", uuid=UUID)
    with pytest.raises(FileExistsError):
        make(image)


@pytest.mark.parametrize("blocks", [1, 2, 300])
@pytest.mark.parametrize("what", ["nothing", "another salt", "another root hash"])
def test_a_veritysetup_that_only_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, what: str
) -> None:
    image, real = image_of(tmp_path / "image", blocks), shutil.which("veritysetup", path=PATH)
    script = {
        "nothing": f"echo 'Root hash: {'0' * 64}'",
        "another salt": f'shift 7; exec {real} format --salt=00 "$@"',
        "another root hash": f"{real} \"$@\" | sed 's/Root hash:.*/Root hash: {'0' * 64}/'",
    }[what]
    put_before(monkeypatch, tmp_path, "veritysetup", script)
    with pytest.raises(FilesystemError, match=r"(not a|made no) hash tree"):
        make(image)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    image = image_of(tmp_path / "image", 128 * 300)
    with mounted(tmp_path / "disk", 1) as disk, pytest.raises(OSError, match="No space left on device"):
        hash_tree.make(image, disk / "tree", salt=SALT, uuid=UUID)


def test_what_a_kernel_is_told() -> None:
    """As in the example of Linux, Documentation/admin-guide/device-mapper/dm-init.rst."""
    found = hash_tree.early_device(Superblock(204800, SALT), "ab" * 32, image="/dev/vda", tree="/dev/vdb")
    assert found == (f"verity,,0,ro,0 1638400 verity 1 /dev/vda /dev/vdb 4096 4096 204800 1 sha256 {'ab' * 32} {SALT}")


# --- builds -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return placed(tmp_path, "w", VERITY)


def placed(parent: Path, name: str, more: str) -> Place:
    place = Place(parent / name, parent)
    place.add_layout("web", BASE, mappings={"conf": "/srv/conf"}, more=more)
    (place.root / "web" / "conf").write_text("one\n")
    return place


def tree_of(place: Workspace) -> Path:
    return place.output("web").with_name("rootfs.verity")


def labels(place: Workspace) -> dict[str, str]:
    found: dict[str, str] = json.loads(place.output("web").with_name("manifest.json").read_bytes())["labels"]
    return {name: value for name, value in found.items() if name.startswith("fledge.")}


def results(place: Place) -> list[str]:
    return sorted(path.name for path in place.output("web").parent.iterdir())


def rewrite(place: Place, old: str, new: str) -> None:
    file = place.root / "web" / "fledge.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_build(place: Place, tmp_path: Path) -> None:
    result = place.build()
    assert result.stages("web") == ["resolve", "fetch", "unpack", "mkfs", "assemble", "verity", "manifest"]
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.img", "rootfs.verity"]
    root_hash = labels(place)["fledge.verity_root_hash"]
    assert labels(place) == {"fledge.verity_root_hash": root_hash, "fledge.verity_hash_tree": str(tree_of(place))}
    tool("veritysetup", "verify", place.output("web"), tree_of(place), root_hash)
    assert root_hash == reference(
        place.output("web").read_bytes(), bytes.fromhex(hash_tree.superblock(tree_of(place)).salt)
    )
    assert place.build().stages("web") == []
    assert place.fledge("plan").stdout == "web: up to date\n"

    other = placed(tmp_path, "other", VERITY)
    other.build()
    assert labels(other)["fledge.verity_root_hash"] == root_hash, "the same anywhere"
    assert sha256_of(tree_of(other)) == sha256_of(tree_of(place))
    (other.root / "web" / "conf").write_text("two\n")
    assert other.build().stages("web") == ["mkfs", "assemble", "verity", "manifest"]
    assert labels(other)["fledge.verity_root_hash"] != root_hash
    tool("veritysetup", "verify", other.output("web"), tree_of(other), labels(other)["fledge.verity_root_hash"])


def test_a_qcow2_has_the_tree_of_its_raw_image(place: Place, tmp_path: Path) -> None:
    place.build()
    other = placed(tmp_path, "other", VERITY + 'format = "qcow2"\ncompression = "zstd"\n')
    other.build()
    assert results(other) == [".fledge.json", "manifest.json", "rootfs.qcow2", "rootfs.verity"]
    assert labels(other)["fledge.verity_root_hash"] == labels(place)["fledge.verity_root_hash"]
    assert labels(other)["fledge.raw_checksum"] == sha256_of(place.output("web"))
    assert sha256_of(tree_of(other)) == sha256_of(tree_of(place))
    assert other.build().stages("web") == []
    assert other.fledge("verify").code == 0
    rewrite(other, 'compression = "zstd"', 'compression = "zlib"')
    assert other.build().stages("web") == ["assemble", "manifest"], "the raw image is the same"


@pytest.mark.parametrize(
    "change", [lambda path: patch(path, 5000), os.unlink, Path.touch], ids=["edited", "deleted", "touched"]
)
def test_a_tree_that_is_not_ours_any_more(place: Place, change: Callable[[Path], None]) -> None:
    place.build()
    expected, before = sha256_of(tree_of(place)), place.output("web").stat()
    change(tree_of(place))
    assert place.build().stages("web") == ["verity"]
    assert sha256_of(tree_of(place)) == expected
    assert place.output("web").stat() == before


def test_an_image_that_is_not_ours_any_more(place: Place) -> None:
    place.build()
    patch(place.output("web"), 100_000)
    assert place.build().stages("web") == ["assemble"], "the tree fits the image that it is again"
    assert place.fledge("verify").code == 0


def test_why(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(place, "verity = true", "verity = false")
    place.build()
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.img"] and labels(place) == {}
    rewrite(place, "verity = false", "verity = true")
    explained = place.fledge("plan").stdout.splitlines()
    assert explained == [
        "web:",
        "  verity:web               rootfs.verity is not there",
        "  manifest:web             rootfs.verity is not there",
    ]
    assert place.build().stages("web") == ["verity", "manifest"]
    newer = f'test "$1" = --version && exec echo veritysetup 99.1\nPATH={PATH} exec veritysetup "$@"'
    put_before(monkeypatch, tmp_path, "veritysetup", newer)
    [miss, _] = place.fledge("plan").stdout.splitlines()[1:]
    assert "tools[0]: " in miss and "cryptsetup-bin 99.1\" (the host's tools)" in miss
    assert place.build().stages("web") == ["verity"]
    place.output("web").unlink()
    assert [line.split()[0] for line in place.fledge("plan").stdout.splitlines()[1:]] == ["assemble:web"]
    assert place.build().stages("web") == ["assemble"], "the plan is what runs"
    place.output("web").with_name("rootfs.verity").unlink()
    assert [line.split() for line in place.fledge("plan").stdout.splitlines()[1:]] == [
        ["verity:web", "rootfs.verity", "is", "not", "there"]
    ]
    assert place.build().stages("web") == ["verity"], "the same tree comes again, and the manifest names it"
    rewrite(place, "size_buffer_mb = 1", "size_buffer_mb = 2")
    assert [line.split()[0] for line in place.fledge("plan").stdout.splitlines()[1:]] == [
        "mkfs:web", "assemble:web", "verity:web", "manifest:web",
    ]  # fmt: skip
    rewrite(place, "verity = true", "verity = false")
    place.build()
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.img"], "a tree that nobody asks for is gone"
    assert labels(place) == {}


def test_without_veritysetup(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_only(monkeypatch, tmp_path / "bin", "mke2fs", "e2fsck", "sh")
    result = place.fledge("build")
    assert result.code == 1
    assert f"{place.root}/web/fledge.toml: output.verity: veritysetup is not installed" in result.stderr
    assert "hint: install it, for example: sudo apt-get install cryptsetup-bin" in result.stderr
    assert not (place.root / "build").exists() and not (place.root / "fledge.lock").exists(), "nothing was begun"
    assert "no       veritysetup    veritysetup is not installed" in place.fledge("doctor").stdout


def test_nobody_needs_root() -> None:
    need_root()
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is root's alone
        place = placed(Path(folder), "w", VERITY + 'format = "qcow2"\n')
        theirs = Workspace(place.root, place.home, prefix=as_nobody())
        for path in (Path(folder), *place.root.parent.rglob("*")):
            os.chown(path, 65534, 65534)
        theirs.build()
        assert tree_of(theirs).stat().st_uid == 65534
        assert theirs.fledge("verify").code == 0


def test_tasks_of_doit(place: Place) -> None:
    (place.root / "dodo.py").write_text("from fledge_tasks.dodo import *\n")
    program = Workspace(place.root, place.home)
    doit(program, "verity:web")
    assert results(place) == [".fledge.json", "rootfs.img", "rootfs.verity"]
    doit(program)
    assert place.build().stages("web") == []
    doit(program, "clean", "verity")
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.img"]
    assert place.build().stages("web") == ["verity"]
    place.fledge("clean")
    assert not place.output("web").parent.exists()


def test_verify(place: Place, tmp_path: Path) -> None:
    place.build()
    assert place.fledge("verify").code == 0
    patch(tree_of(place), BLOCK_BYTES + 3)
    result = place.fledge("verify")
    assert result.code == 1
    assert "web: rootfs.verity: veritysetup: Verification failed at position 8192.\n" in result.stdout
    tree_of(place).unlink()
    assert "web: there is no hash tree " in place.fledge("verify").stdout
    place.build()
    elsewhere = tmp_path / "elsewhere"
    place.output("web").parent.rename(elsewhere)
    assert place.fledge("verify", str(elsewhere / "rootfs.img")).code == 0
    at = elsewhere.joinpath("rootfs.img").read_bytes().rfind(b"one\n")  # the mapped file
    patch(elsewhere / "rootfs.img", at, b"two\n")
    result = place.fledge("verify", str(elsewhere / "rootfs.img"))
    assert result.code == 1
    assert "rootfs.verity: veritysetup: Verification failed at position" in result.stdout
    assert "/srv/conf: content differs at byte 0" in result.stdout
    rewrite(place, "verity = true", "verity = false")
    place.build()
    rewrite(place, "verity = false", "verity = true")
    assert "web: the manifest has no root hash: run `fledge build web`\n" in place.fledge("verify").stdout
