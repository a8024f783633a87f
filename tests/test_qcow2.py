"""qcow2 disks: the same bytes of the same raw image, nothing lost, and builds that know them as well as raw ones."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fledge_tasks import qcow2
from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.run import run
from tests.layers import Member, folder
from tests.layouts import Place
from tests.test_drills_disk import mounted
from tests.tools import PATH, have_only, need, put_before
from tests.trees import tool
from tests.workspaces import Workspace, sha256_of

MIB = 1 << 20
BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + random.Random(1).randbytes(200_000), mode=0o755)]
QCOW2 = '[output]\nformat = "qcow2"\n'


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img", "mke2fs", "e2fsck")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A sparse image with runs of data of all lengths, in which some blocks are zeros that were written."""
    draw, path = random.Random(7), tmp_path / "raw"
    with path.open("wb") as file:
        file.truncate(24 * MIB)
        for _ in range(300):
            file.seek(draw.randrange(24 * MIB // 4096 - 40) * 4096)
            count = draw.choice([1, 1, 2, 5, 40]) * 4096
            file.write(draw.choice([bytes(count), draw.randbytes(count), b"text " * (count // 5)]))
        file.truncate(24 * MIB)
    return path


def made_of(raw: Path, name: str, compression: str | None = None) -> Path:
    target = raw.with_name(name)
    qcow2.convert(raw, target, compression)
    return target


def facts(image: Path) -> dict[str, object]:
    """Return what qemu-img knows of a file's format."""
    info = json.loads(tool("qemu-img", "info", "--output=json", image))
    return {"format": info["format"], "size": info["virtual-size"], **info.get("format-specific", {}).get("data", {})}


# --- the format -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
def test_a_raw_image_there_and_back(raw: Path, compression: str | None) -> None:
    image = made_of(raw, "image", compression)
    tool("qemu-img", "check", "-f", "qcow2", image)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, image)
    found = facts(image)
    assert (found["format"], found["size"], found["compat"]) == ("qcow2", 24 * MIB, "1.1")
    assert found["compression-type"] == (compression or "zlib")
    qcow2.expand(image, raw.with_name("back"))
    assert raw.with_name("back").read_bytes() == raw.read_bytes()
    assert qcow2.is_qcow2(image) and not qcow2.is_qcow2(raw)
    assert list(qcow2.problems(image)) == []


@pytest.mark.parametrize("compression", [None, "zlib", "zstd"])
def test_the_same_bytes_however_the_raw_image_lies_on_the_disk(raw: Path, compression: str | None) -> None:
    dense = raw.with_name("dense")
    dense.write_bytes(raw.read_bytes())
    assert dense.stat().st_blocks > raw.stat().st_blocks
    other = raw.with_name("other")
    subprocess.run(["cp", "--sparse=always", dense, other], check=True)
    images = [made_of(path, f"image{at}", compression) for at, path in enumerate((raw, dense, other, raw))]
    assert len({sha256_of(image) for image in images}) == 1
    assert images[0].stat().st_size < 24 * MIB


@pytest.mark.parametrize("coroutines", [1, 16])
def test_the_same_bytes_however_many_work_at_it(raw: Path, coroutines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What qemu-img does at once by default, 8, does not show; its option -W would, and is not used."""
    seen: list[str] = []

    def counted(argv: list[str | Path]) -> bytes:
        seen.extend(map(str, argv))
        return run([*argv[:2], *(["-m", str(coroutines)] if argv[1] == "convert" else []), *argv[2:]])

    expected = sha256_of(made_of(raw, "expected", "zstd"))
    monkeypatch.setattr("fledge_tasks.qcow2.run", counted)
    assert sha256_of(made_of(raw, "image", "zstd")) == expected
    assert "-W" not in seen and "convert" in seen


def test_compression_makes_less_of_it(raw: Path) -> None:
    sizes = [made_of(raw, f"image-{kind}", kind).stat().st_size for kind in (None, "zlib", "zstd")]
    assert max(sizes[1:]) < sizes[0]


def test_a_disk_that_is_full(tmp_path: Path, raw: Path) -> None:
    with mounted(tmp_path / "disk", 2) as disk, pytest.raises(OSError, match="No space left on device"):
        qcow2.convert(raw, disk / "image", None)


def test_what_qemu_img_refuses(raw: Path) -> None:
    with pytest.raises(CommandError, match="qemu-img exited with 1"):
        qcow2.expand(raw, raw.with_name("back"))
    with pytest.raises(CommandError, match="does not accept value 'gzip'"):
        qcow2.convert(raw, raw.with_name("image"), "gzip")


REAL = f'exec {shutil.which("qemu-img", path=PATH)} "$@"'


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "there is no qcow2"),
        ('for last; do :; done; case "$1" in convert) : > "$last";; esac', "the qcow2 header is cut short"),
        ('for last; do :; done; case "$1" in convert) cp "{raw}" "$last";; esac', "it does not begin as a qcow2"),
        (
            f'for last; do :; done; ( {REAL} ) || exit; case "$1" in convert) truncate -s 300000 "$last";; esac',
            "qemu-img: ",
        ),
        (
            f'for last; do :; done; case "$1" in convert) set -- create -q -f qcow2 "$last" 1M;; esac; {REAL}',
            "the qcow2 has 1048576 bytes, and should have 25165824",
        ),
    ],
)
def test_a_qemu_img_that_only_says_so(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    put_before(monkeypatch, tmp_path, "qemu-img", script.replace("{raw}", str(raw)))
    with pytest.raises(FilesystemError, match=f"says that it made a qcow2, but {re.escape(reason)}"):
        qcow2.convert(raw, tmp_path / "image", None)


def patch(image: Path, at: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_qcow2_that_names_other_files_is_not_opened(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = made_of(raw, "image")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", image, "-F", "qcow2", raw.with_name("above"))
    tool(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file={raw.with_name('data')}",
        raw.with_name("apart"),
        "1M",
    )
    monkeypatch.setattr("fledge_tasks.qcow2.run", None)
    for name in ("above", "apart"):
        [problem] = qcow2.problems(raw.with_name(name))
        assert problem == "the qcow2 refers to another file, and should hold all of its data"


def test_damage_is_told(raw: Path) -> None:
    image = made_of(raw, "image")
    table = struct.unpack(">Q", image.read_bytes()[40:48])[0]  # l1_table_offset
    patch(image, table, bytes.fromhex("00000000deadbe00"))
    assert any(line.startswith("qemu-img: ") for line in qcow2.problems(image))
    image.write_bytes(qcow2.MAGIC + bytes(20))
    assert list(qcow2.problems(image)) == ["the qcow2 header is cut short"]


# --- builds -----------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, mappings={"conf": "/srv/conf"}, more=QCOW2)
    (place.root / "web" / "conf").write_text("one\n")
    return place


def results(place: Place) -> list[str]:
    return sorted(path.name for path in (place.root / "build" / "web").iterdir())


def disk_of(place: Workspace) -> Path:
    return place.root / "build" / "web" / "rootfs.qcow2"


def manifest(place: Workspace) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads((place.root / "build" / "web" / "manifest.json").read_bytes())
    return found


def rewrite(place: Place, old: str, new: str) -> None:
    file = place.root / "web" / "fledge.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_a_build(place: Place, tmp_path: Path) -> None:
    result = place.build()
    assert result.stages("web") == ["resolve", "fetch", "unpack", "mkfs", "assemble", "manifest"]
    image = disk_of(place)
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.qcow2"]
    assert image.stat().st_mode & 0o777 == 0o644
    report = result.image("web")
    assert (report["image"], report["sha256"], report["bytes"]) == (str(image), sha256_of(image), image.stat().st_size)
    qcow2.expand(image, tmp_path / "raw")
    assert manifest(place)["rootfs"] == {"url": str(image), "checksum": sha256_of(image), "format": "qcow2"}
    assert manifest(place)["labels"]["fledge.raw_checksum"] == sha256_of(tmp_path / "raw")
    tool("qemu-img", "check", "-f", "qcow2", image)
    tool("e2fsck", "-fn", tmp_path / "raw")

    assert place.build().stages("web") == []
    other = Place(tmp_path / "other", tmp_path)
    other.add_layout("web", BASE, mappings={"conf": "/srv/conf"}, more=QCOW2)
    (other.root / "web" / "conf").write_text("one\n")
    assert other.build().image("web")["sha256"] == report["sha256"], "the same bytes anywhere"

    other.add("web", "oci:../layouts/web", buffer_mb=1, mappings={"conf": "/srv/conf"})
    assert other.build().image("web")["sha256"] == sha256_of(tmp_path / "raw"), "what a raw disk would be"
    assert results(other) == [".fledge.json", "manifest.json", "rootfs.img"]
    assert "fledge.raw_checksum" not in manifest(other)["labels"]
    assert manifest(other)["rootfs"]["format"] == "raw"


def edit(image: Path) -> None:
    patch(image, 100_000, b"edited")


@pytest.mark.parametrize("change", [edit, os.unlink, Path.touch], ids=["edited", "deleted", "touched"])
def test_a_disk_that_is_not_ours_any_more(place: Place, change: Callable[[Path], None]) -> None:
    expected = place.build().image("web")["sha256"]
    change(disk_of(place))
    assert place.build().stages("web") == ["assemble"]
    assert sha256_of(disk_of(place)) == expected


def test_what_changes_makes_it_anew(place: Place) -> None:
    seen = {place.build().image("web")["sha256"]}
    (place.root / "web" / "conf").write_text("two\n")
    changed = place.build()
    assert changed.stages("web") == ["mkfs", "assemble", "manifest"]
    seen.add(changed.image("web")["sha256"])
    rewrite(place, 'format = "qcow2"', 'format = "qcow2"\ncompression = "zstd"')
    explained = place.fledge("explain").stdout
    assert 'compression: (none) -> "zstd" ([output] compression)' in explained
    packed = place.build()
    assert packed.stages("web") == ["assemble", "manifest"]
    assert disk_of(place).stat().st_size == packed.image("web")["bytes"]
    seen.add(packed.image("web")["sha256"])
    assert len(seen) == 3
    rewrite(place, 'format = "qcow2"\ncompression = "zstd"', 'format = "raw"')
    assert 'format: "qcow2" -> (none) ([output] format)' in place.fledge("explain").stdout
    assert place.build().stages("web") == ["assemble", "manifest"]
    rewrite(place, '[output]\nformat = "raw"', "")
    assert place.build().stages("web") == [], "a default that is written down is the same"
    assert results(place) == [".fledge.json", "manifest.json", "rootfs.img"], "the one that is not asked for is gone"


def test_files_of_the_user_stay(place: Place) -> None:
    place.build()
    mine = disk_of(place).with_name("rootfs.img")
    mine.write_bytes(b"mine")
    (place.root / "web" / "conf").write_text("two\n")
    place.build()
    assert mine.read_bytes() == b"mine"


def test_another_version_of_qemu_img(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.build()
    newer = f'test "$1" = --version && exec echo qemu-img version 99.1.0\nPATH={PATH} exec qemu-img "$@"'
    put_before(monkeypatch, tmp_path, "qemu-img", newer)
    assert "the host's tools" in place.fledge("explain").stdout
    assert place.build().stages("web") == ["assemble"], "the same bytes: the manifest stays"
    rewrite(place, 'format = "qcow2"', 'format = "raw"')
    place.build()
    monkeypatch.setenv("PATH", PATH)
    assert place.build().stages("web") == [], "a raw image does not depend on it"


def test_without_qemu_img(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_only(monkeypatch, tmp_path / "bin", "mke2fs", "e2fsck", "sh")
    result = place.fledge("build")
    assert result.code == 1
    assert f"{place.root}/web/fledge.toml: output.format: qemu-img is not installed" in result.stderr
    assert "hint: install it, for example: sudo apt-get install qemu-utils" in result.stderr
    assert not (place.root / "build").exists() and not (place.root / "fledge.lock").exists(), "nothing was begun"
    found = place.fledge("doctor").stdout
    assert "no       qemu-img       qemu-img is not installed (not found on PATH): install it" in found


def test_clean_removes_all_forms(place: Place) -> None:
    place.build()
    rewrite(place, 'format = "qcow2"', 'format = "raw"')
    result = place.fledge("clean")
    assert sorted(result.stdout.splitlines()) == [
        f"removed {place.root}/build/web/manifest.json",
        f"removed {disk_of(place)}",
    ]
    assert not (place.root / "build" / "web").exists()


# --- verify -----------------------------------------------------------------------------------------------


def test_verify(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("debugfs")
    place.build()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    result = place.fledge("verify")
    assert (result.code, result.stdout) == (0, f"web: {disk_of(place)} holds what it should\n")
    image = disk_of(place)
    qcow2.expand(image, tmp_path / "raw")
    tool("debugfs", "-w", "-R", "sif /srv/conf mode 0100600", tmp_path / "raw")
    image.unlink()
    qcow2.convert(tmp_path / "raw", image, None)
    result = place.fledge("verify")
    assert result.code == 1
    assert "web: /srv/conf: mode is 0600, and should be 0644\n" in result.stdout
    assert "web: the checksum is sha256:" in result.stdout
    assert "web: the raw image's checksum is sha256:" in result.stdout
    assert "3 differences" in result.stdout
    patch(image, 65_536, b"\xff" * 4096)  # the refcount table, or what is first after the header
    result = place.fledge("verify")
    assert result.code == 1 and "web: qemu-img: " in result.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


def test_verify_a_file_from_elsewhere(place: Place, tmp_path: Path) -> None:
    place.build()
    elsewhere = tmp_path / "elsewhere"
    disk_of(place).parent.rename(elsewhere)
    result = place.fledge("verify", str(elsewhere / "rootfs.qcow2"))
    assert (result.code, result.stdout) == (0, f"rootfs.qcow2: {elsewhere}/rootfs.qcow2 holds what it should\n")
    empty = Place(tmp_path / "empty", tmp_path)
    empty.root.mkdir()
    result = empty.fledge("verify", str(elsewhere / "rootfs.qcow2"))
    assert (result.code, result.stdout) == (
        0,
        f"rootfs.qcow2: {elsewhere}/rootfs.qcow2 is what its manifest says, and can be read\n",
    )
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(MIB))
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", secret, "-F", "raw", elsewhere / "bad.qcow2")
    result = empty.fledge("verify", str(elsewhere / "bad.qcow2"))
    assert result.code == 1
    assert "bad.qcow2: the qcow2 refers to another file, and should hold all of its data\n" in result.stdout
