"""What other monitors get: fields as their documents have them, scripts that reach them word for word, no surprises."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks import hash_tree
from fledge_tasks.errors import ExportError
from fledge_tasks.export import MONITORS, monitor
from fledge_tasks.export.guest import Guest, Verity
from fledge_tasks.hash_tree import Superblock
from tests.layers import Member, folder
from tests.layouts import Place
from tests.tools import PATH, need

PROGRAMS = {"firecracker": "firecracker", "cloud-hypervisor": "cloud-hypervisor", "qemu": "qemu-system-x86_64"}
GUEST = Guest(
    name="web",
    architecture="amd64",
    image=Path("/w/build/web/rootfs.img"),
    disk_format="raw",
    filesystem="ext4",
    kernel=Path("/boot/vmlinux"),
    initrd=None,
    cpus=2,
    memory_mib=512,
)
VERITY = Verity(Path("/w/build/web/rootfs.verity"), Superblock(2476, "5a" * 32), "ab" * 32)


def with_(**changes: Any) -> Guest:
    return Guest(**{**{name: getattr(GUEST, name) for name in GUEST.__dataclass_fields__}, **changes})


def files(name: str, guest: Guest = GUEST, place: Path = Path("/w/out")) -> dict[str, bytes]:
    return {file.name: file.data for file in monitor(name).files(guest, place)}


def config(guest: Guest = GUEST) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("firecracker", guest)["vm_config.json"])
    return found


def run(script: Path, programs: Path, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    """Run a script with only those programs that `fake` made, and return name and arguments of the one it became."""
    record = programs / "argv"
    record.unlink(missing_ok=True)
    path = f"{programs}:/usr/bin:/bin"
    subprocess.run([script, *arguments], env={"PATH": path, "RECORD": str(record), **(env or {})}, check=True, cwd="/")
    return [os.fsdecode(word) for word in record.read_bytes().split(b"\0")[:-1]]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder with programs that note what they are called with."""
    place = tmp_path / "programs"
    place.mkdir()
    for name in (*PROGRAMS.values(), "qemu-system-aarch64"):
        (place / name).write_text('#!/bin/sh\nprintf "%s\\0" "${0##*/}" "$@" >"$RECORD"\n')
        (place / name).chmod(0o755)
    return place


def argv(name: str, guest: Guest, programs: Path, *arguments: str, env: Mapping[str, str] | None = None) -> list[str]:
    script = programs / "run.sh"
    script.write_bytes(files(name, guest)["run.sh"])
    script.chmod(0o755)
    return run(script, programs, *arguments, env=env)


def values(words: list[str], option: str) -> list[str]:
    """Return what stands behind each occurrence of an option."""
    return [words[at + 1] for at, word in enumerate(words) if word == option]


# --- kernel arguments -------------------------------------------------------------------------------------


def kernel_words(line: str) -> list[str]:
    """Split a command line as Linux does (lib/cmdline.c, next_arg): blanks count but in double quotes, which go."""
    words, quoted, word = [], False, ""
    for char in line + " ":
        if char == '"':
            quoted = not quoted
        elif char == " " and not quoted:
            words += [word] if word else []
            word = ""
        else:
            word += char
    assert not quoted
    return words


def test_kernel_arguments() -> None:
    assert GUEST.arguments("console=ttyS0") == (
        "console=ttyS0 root=/dev/vda rw rootfstype=ext4 volant.rootfs_device=vda volant.rootfs_fstype=ext4"
    )
    assert with_(filesystem="xfs", is_read_only=True, init="/bin/app", more="quiet loglevel=3").arguments() == (
        "root=/dev/vda ro rootfstype=xfs volant.rootfs_device=vda volant.rootfs_fstype=xfs "
        "init=/bin/app quiet loglevel=3"
    )


@pytest.mark.parametrize("name", MONITORS)
def test_kernel_arguments_with_a_hash_tree(name: str) -> None:
    words = kernel_words(monitor(name).arguments(with_(verity=VERITY)))
    assert "rw" not in words and "root=/dev/vda" not in words
    expected = (
        f"dm-mod.create=verity,,0,ro,0 19808 verity 1 /dev/vda /dev/vdb 4096 4096 2476 1 sha256 {'ab' * 32} {'5a' * 32}"
    )
    for word in (expected, "root=/dev/dm-0", "ro", "volant.rootfs_device=dm-0", "rootfstype=ext4"):
        assert words.count(word) == 1, word


@pytest.mark.parametrize(
    ("name", "amd64", "arm64"),
    [
        ("firecracker", "console=ttyS0 reboot=k panic=1 pci=off", "console=ttyS0 reboot=k panic=1"),
        ("cloud-hypervisor", "console=ttyS0", "console=ttyAMA0"),
        ("qemu", "console=ttyS0 panic=1", "console=ttyAMA0 panic=1"),
    ],
)
def test_consoles(name: str, amd64: str, arm64: str) -> None:
    for architecture, own in (("amd64", amd64), ("arm64", arm64)):
        assert monitor(name).arguments(with_(architecture=architecture)) == GUEST.arguments(own)
    with pytest.raises(ExportError, match="runs amd64 and arm64 images, and this one is for riscv64"):
        monitor(name).files(with_(architecture="riscv64"), Path("/w/out"))


# --- firecracker ------------------------------------------------------------------------------------------


class BootSource(msgspec.Struct, forbid_unknown_fields=True):
    kernel_image_path: str
    boot_args: str | None = None
    initrd_path: str | None = None


class Drive(msgspec.Struct, forbid_unknown_fields=True):
    drive_id: str
    is_root_device: bool
    path_on_host: str
    is_read_only: bool
    partuuid: str | None = None
    cache_type: str | None = None
    io_engine: str | None = None


class MachineConfiguration(msgspec.Struct, forbid_unknown_fields=True):
    vcpu_count: int
    mem_size_mib: int
    smt: bool = False
    track_dirty_pages: bool = False


class NetworkInterface(msgspec.Struct, forbid_unknown_fields=True):
    iface_id: str
    host_dev_name: str
    guest_mac: str | None = None


class VmConfig(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    """What Firecracker reads of us (swagger/firecracker.yaml; its records refuse unknown fields)."""

    boot_source: BootSource
    drives: list[Drive]
    machine_config: MachineConfiguration
    network_interfaces: list[NetworkInterface] = []


def test_the_configuration_of_firecracker() -> None:
    found = msgspec.convert(config(), VmConfig)
    assert found == VmConfig(
        BootSource("/boot/vmlinux", GUEST.arguments("console=ttyS0 reboot=k panic=1 pci=off")),
        [Drive("rootfs", True, "/w/build/web/rootfs.img", False)],
        MachineConfiguration(2, 512),
    )
    found = msgspec.convert(config(with_(initrd=Path("/boot/i rd"), tap="tap0", is_read_only=True)), VmConfig)
    assert found.boot_source.initrd_path == "/boot/i rd"
    assert found.drives == [Drive("rootfs", True, "/w/build/web/rootfs.img", True)]
    assert found.network_interfaces == [NetworkInterface("eth0", "tap0")]


def test_with_a_hash_tree_firecracker_gets_no_root_device() -> None:
    """It would tell the kernel of it after we did, and that kernel would mount the disk itself."""
    assert msgspec.convert(config(with_(verity=VERITY)), VmConfig).drives == [
        Drive("rootfs", False, "/w/build/web/rootfs.img", True),
        Drive("verity", False, "/w/build/web/rootfs.verity", True),
    ]


def test_what_firecracker_cannot_do() -> None:
    with pytest.raises(ExportError, match=r"reads raw disks only, and rootfs\.qcow2 is a qcow2") as caught:
        files("firecracker", with_(image=Path("/w/rootfs.qcow2"), disk_format="qcow2"))
    assert caught.value.hint and '[output] format = "raw"' in caught.value.hint
    with pytest.raises(ExportError, match="32 CPUs at most, and not 33"):
        files("firecracker", with_(cpus=33))
    with pytest.raises(ExportError, match="not UTF-8"):
        files("firecracker", with_(kernel=Path(os.fsdecode(b"/\xff/vmlinux"))))
    assert config(with_(kernel=Path("/ü/vmlinux"), cpus=32))["boot-source"]["kernel_image_path"] == "/ü/vmlinux"


def test_the_script_of_firecracker(programs: Path) -> None:
    assert argv("firecracker", GUEST, programs, "--id", "x") == [
        "firecracker", "--no-api", "--config-file", "/w/out/vm_config.json", "--id", "x",
    ]  # fmt: skip


# --- cloud hypervisor -------------------------------------------------------------------------------------


def cloud_options(text: str) -> dict[str, str]:
    """Take an option apart as Cloud Hypervisor does (option_parser/src/lib.rs, split_commas)."""
    parts, quoted, depth = [""], False, 0
    for char in text.strip():
        depth += {"[": 1, "]": -1}.get(char, 0)
        if char == '"':
            quoted = not quoted
        elif char == "," and not quoted and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    assert not quoted and depth == 0
    return {name: value.strip() for name, _, value in (part.partition("=") for part in parts)}


def test_the_script_of_cloud_hypervisor(programs: Path) -> None:
    assert argv("cloud-hypervisor", GUEST, programs, "-v") == [
        "cloud-hypervisor",
        "--kernel", "/boot/vmlinux",
        "--cmdline", GUEST.arguments("console=ttyS0"),
        "--disk", "path=/w/build/web/rootfs.img,image_type=raw,readonly=off",
        "--cpus", "boot=2",
        "--memory", "size=512M",
        "--serial", "tty",
        "--console", "off",
        "-v",
    ]  # fmt: skip
    words = argv(
        "cloud-hypervisor",
        with_(initrd=Path("/boot/initrd"), tap="tap0", verity=VERITY, disk_format="qcow2"),
        programs,
    )
    assert values(words, "--initramfs") == ["/boot/initrd"]
    assert values(words, "--net") == ["tap=tap0"]
    at = words.index("--disk")  # once only, with all disks
    assert words.count("--disk") == 1 and words[at + 3] == "--cpus"
    assert [cloud_options(word) for word in words[at + 1 : at + 3]] == [
        {"path": "/w/build/web/rootfs.img", "image_type": "qcow2", "readonly": "on"},
        {"path": "/w/build/web/rootfs.verity", "image_type": "raw", "readonly": "on"},
    ]


@pytest.mark.parametrize("path", ['/a"b/rootfs.img', "/a[b/rootfs.img", "/a]b/rootfs.img"])
def test_paths_that_its_options_cannot_hold(path: str) -> None:
    with pytest.raises(ExportError, match="cannot hold a path with"):
        files("cloud-hypervisor", with_(image=Path(path)))


# --- qemu -------------------------------------------------------------------------------------------------


def qemu_options(text: str) -> dict[str, str]:
    """Take an option apart as QEMU does (util/qemu-option.c, get_opt_value: a doubled comma is one of the value)."""
    parts = text.replace(",,", "\0").split(",")
    return {name: value.replace("\0", ",") for name, _, value in (part.partition("=") for part in parts)}


def test_the_script_of_qemu(programs: Path) -> None:
    accel = "kvm" if os.access("/dev/kvm", os.W_OK) else "tcg -icount shift=auto"
    assert argv("qemu", GUEST, programs, "-name", "x") == [
        "qemu-system-x86_64", "-accel", *accel.split(),
        "-M", "microvm,rtc=on", "-cpu", "max", "-smp", "2", "-m", "512M",
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "mon:stdio",
        "-kernel", "/boot/vmlinux",
        "-append", GUEST.arguments("console=ttyS0", "panic=1"),
        "-drive", "id=rootfs,if=none,format=raw,file=/w/build/web/rootfs.img",
        "-device", "virtio-blk-device,drive=rootfs",
        "-name", "x",
    ]  # fmt: skip
    guest = with_(initrd=Path("/boot/initrd"), tap="tap0", verity=VERITY, disk_format="qcow2")
    words = argv("qemu", guest, programs, env={"ACCEL": "tcg -icount shift=7"})
    assert words[1:5] == ["-accel", "tcg", "-icount", "shift=7"]
    assert values(words, "-initrd") == ["/boot/initrd"]
    assert [qemu_options(word) for word in values(words, "-drive")] == [
        {"id": "rootfs", "if": "none", "format": "qcow2", "file": "/w/build/web/rootfs.img", "readonly": "on"},
        {"id": "verity", "if": "none", "format": "raw", "file": "/w/build/web/rootfs.verity", "readonly": "on"},
    ]
    assert values(words, "-device") == [
        "virtio-blk-device,drive=rootfs", "virtio-blk-device,drive=verity", "virtio-net-device,netdev=eth0",
    ]  # fmt: skip
    assert values(words, "-netdev") == ["tap,id=eth0,ifname=tap0,script=no,downscript=no"]


def test_qemu_on_arm64(programs: Path) -> None:
    words = argv("qemu", with_(architecture="arm64", tap="tap0"), programs)
    assert words[0] == "qemu-system-aarch64"
    assert values(words, "-M") == ["virt"]
    assert values(words, "-device") == ["virtio-blk-pci,drive=rootfs", "virtio-net-pci,netdev=eth0"]


def fake_kernel(path: Path) -> Path:
    """Write what QEMU takes for a kernel: a sector of setup, protocol 2.6 (Linux, Documentation/arch/x86/boot.rst)."""
    data = bytearray(16384)
    data[0x1F1] = 1
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x208] = b"HdrS" + struct.pack("<H", 0x0206)
    path.write_bytes(data)
    return path


def test_qemu_takes_it(tmp_path: Path) -> None:
    """Started, but not running: it has the devices that were asked for, of files whose path is not an easy one."""
    need("qemu-system-x86_64", "veritysetup", "qemu-img")
    place = tmp_path / "it's a, b"
    place.mkdir()
    raw, tree, image = place / "raw", place / "tree", place / "rootfs.qcow2"
    raw.write_bytes(os.urandom(1 << 20))
    root_hash = hash_tree.make(raw, tree, salt="5a" * 32, uuid="11111111-2222-4333-8444-555555555555")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, image], check=True)
    guest = with_(
        image=image, disk_format="qcow2", kernel=fake_kernel(place / "kernel"), cpus=1, memory_mib=64,
        verity=Verity(tree, hash_tree.superblock(tree), root_hash),
    )  # fmt: skip
    script = place / "run.sh"
    script.write_bytes(files("qemu", guest)["run.sh"])
    script.chmod(0o755)
    done = subprocess.run(
        [script, "-S"],
        input=b"\x01cinfo block\ninfo qtree\nquit\n",  # Ctrl-A c: from the console to the monitor
        env={"PATH": PATH, "ACCEL": "tcg"}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    shown = done.stdout.decode()
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert f"{image} (qcow2, read-only)" in shown and f"{tree} (raw, read-only)" in shown
    # Linux finds the last bus first; that was seen with a real one, which had the disks as vda and vdb.
    assert bus_of(shown, "rootfs") > bus_of(shown, "verity")


def bus_of(tree: str, drive: str) -> int:
    """Return the number of the bus that the monitor's `info qtree` shows above a drive."""
    above = tree[: tree.index(f'drive = "{drive}"')]
    return int(above.rpartition("bus: virtio-mmio-bus.")[2].split()[0])


# --- quoting ----------------------------------------------------------------------------------------------

PATHS = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name not in {".", ".."}
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATHS, PATHS)
def test_every_path_reaches_the_program(programs: Path, one: str, other: str) -> None:
    image, kernel = Path("/", one, "rootfs.img"), Path("/", other, "vmlinux")
    guest = with_(image=image, kernel=kernel, initrd=kernel)
    words = argv("qemu", guest, programs)
    assert values(words, "-kernel") == values(words, "-initrd") == [str(kernel)]
    assert qemu_options(values(words, "-drive")[0])["file"] == str(image)
    assert msgspec.convert(config(guest), VmConfig).drives[0].path_on_host == str(image)
    try:
        words = argv("cloud-hypervisor", guest, programs)
    except ExportError:
        assert set(one) & set('"[]')
    else:
        assert values(words, "--kernel") == [str(kernel)]
        assert cloud_options(values(words, "--disk")[0])["path"] == str(image)


def test_bytes_that_are_no_text(programs: Path) -> None:
    kernel = Path(os.fsdecode(b"/b\xff/vmlinux"))
    for name, option in (("qemu", "-kernel"), ("cloud-hypervisor", "--kernel")):
        assert values(argv(name, with_(kernel=kernel), programs), option) == [str(kernel)]


# --- the command ------------------------------------------------------------------------------------------

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" * 100, mode=0o755)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    need("mke2fs")
    place = Place(tmp_path / "w x", tmp_path)  # a blank is in each path
    place.add_layout("web", BASE, more="[manifest]\nresources = { cpu_cores = 3, memory_mb = 256 }\n")
    return place


def exported(place: Place, *arguments: str) -> dict[str, Any]:
    result = place.fledge("export", "web", "--json", *arguments)
    assert result.code == 0, result.stderr
    return result.summary


@pytest.mark.parametrize("name", MONITORS)
def test_an_export(place: Place, programs: Path, name: str) -> None:
    place.build()
    result = place.fledge("export", "web", "--for", name)
    assert result.code == 0
    at = place.root / "build" / "web" / name
    expected = [at / file for file in ("vm_config.json", "run.sh") if name == "firecracker" or file == "run.sh"]
    assert result.stdout.splitlines() == [f"web: {path}" for path in expected]
    assert sorted(at.iterdir()) == sorted(expected)
    assert result.stderr == f"note: there is no kernel at {at}/vmlinux yet: put one there, or give --kernel\n"
    words = run(at / "run.sh", programs)
    assert words[0] == PROGRAMS[name]
    before = {path: path.read_bytes() for path in expected}
    (at / "vmlinux").write_bytes(b"kernel")
    found = exported(place, "--for", name)
    assert {path: path.read_bytes() for path in expected} == before, "the same bytes"
    assert found == {
        "name": "web",
        "monitor": name,
        "files": [str(path) for path in expected],
        "kernel": str(at / "vmlinux"),
        "initrd": None,
        "arguments": found["arguments"],
        "cpus": 3,
        "memory_mb": 256,
        "disks": [{"name": "rootfs", "path": str(place.output("web")), "format": "raw", "is_read_only": False}],
    }
    assert "root=/dev/vda rw rootfstype=ext4" in found["arguments"]
    assert any(found["arguments"] in data.decode() for data in before.values())
    assert place.build().stages("web") == [], "nothing of that is the build's business"


def test_read_only_types_are_mounted_read_only(place: Place) -> None:
    file = place.root / "web" / "fledge.toml"
    text = re.sub("^size_buffer_mb = .*\n", "", file.read_text(), flags=re.MULTILINE)
    file.write_text(text.replace('type = "ext4"', 'type = "erofs"'))
    place.build()
    found = exported(place, "--for", "qemu")
    assert found["disks"][0]["is_read_only"] is True
    assert "root=/dev/vda ro rootfstype=erofs " in found["arguments"]


def test_options(place: Place, tmp_path: Path, programs: Path) -> None:
    place.build()
    (tmp_path / "kernel").write_bytes(b"kernel")
    found = exported(
        place, "--for", "firecracker", "--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "none"),
        "--cpus", "4", "--memory", "1024", "--read-only", "--init", "/bin/app", "--append", "quiet a=b",
        "--tap", "tap0", "--output", str(tmp_path / "out"),
    )  # fmt: skip
    assert found["files"] == [f"{tmp_path}/out/vm_config.json", f"{tmp_path}/out/run.sh"]
    assert (found["kernel"], found["initrd"]) == (f"{tmp_path}/kernel", f"{tmp_path}/none")
    assert found["arguments"].endswith("volant.rootfs_fstype=ext4 init=/bin/app quiet a=b")
    made = msgspec.convert(json.loads((tmp_path / "out" / "vm_config.json").read_bytes()), VmConfig)
    assert made.machine_config == MachineConfiguration(4, 1024)
    assert made.drives == [Drive("rootfs", True, str(place.output("web")), True)]
    assert made.network_interfaces == [NetworkInterface("eth0", "tap0")]
    assert run(tmp_path / "out" / "run.sh", programs)[-1] == f"{tmp_path}/out/vm_config.json"
    assert not (place.root / "build" / "web" / "firecracker").exists()


def test_with_verity(place: Place) -> None:
    need("veritysetup")
    (place.root / "web" / "fledge.toml").open("a").write("[output]\nverity = true\n")
    place.build()
    found = exported(place, "--for", "qemu")
    manifest = json.loads(place.output("web").with_name("manifest.json").read_bytes())
    tree = place.output("web").with_name("rootfs.verity")
    blocks = place.output("web").stat().st_size // 4096
    [created] = [word for word in kernel_words(found["arguments"]) if word.startswith("dm-mod.create=")]
    assert created == (
        f"dm-mod.create=verity,,0,ro,0 {blocks * 8} verity 1 /dev/vda /dev/vdb 4096 4096 {blocks} 1 sha256 "
        f"{manifest['labels']['fledge.verity_root_hash']} {hash_tree.superblock(tree).salt}"
    )
    assert [(disk["path"], disk["is_read_only"]) for disk in found["disks"]] == [
        (str(place.output("web")), True), (str(tree), True),
    ]  # fmt: skip
    tree.unlink()
    result = place.fledge("export", "web", "--for", "qemu")
    assert (result.code, "rootfs.verity is not there" in result.stderr) == (2, True)


def test_a_qcow2(place: Place) -> None:
    need("qemu-img")
    (place.root / "web" / "fledge.toml").open("a").write('[output]\nformat = "qcow2"\n')
    place.build()
    assert exported(place, "--for", "qemu")["disks"][0]["format"] == "qcow2"
    result = place.fledge("export", "web", "--for", "firecracker")
    assert result.code == 2
    assert "error: Firecracker reads raw disks only, and rootfs.qcow2 is a qcow2\n  hint: " in result.stderr
    assert not (place.root / "build" / "web" / "firecracker").exists()


def test_what_is_not_built(place: Place) -> None:
    def refused(*arguments: str) -> str:
        result = place.fledge("export", *arguments)
        assert (result.code, result.stdout) == (2, "")
        assert "Traceback" not in result.stderr
        return result.stderr

    assert "web linux/amd64 is not in fledge.lock\n  hint: run `fledge build web`" in refused("web", "--for", "qemu")
    place.build()
    place.output("web").unlink()
    assert "rootfs.img is not there" in refused("web", "--for", "qemu")
    place.build()
    file = place.root / "web" / "fledge.toml"
    file.write_text(file.read_text().replace("memory_mb = 256", "memory_mb = 128"))
    assert "what goes in has changed" in refused("web", "--for", "qemu")
    assert "no image is named" in refused("wed", "--for", "qemu")
    place.build()
    for bad in (
        ["--for", "xen"], [], ["--for", "qemu", "--cpus", "0"], ["--for", "qemu", "--memory", "x"],
        ["--for", "qemu", "--init", "bin/sh"], ["--for", "qemu", "--init", "/bin/a b"],
        ["--for", "qemu", "--append", "a\nb"], ["--for", "qemu", "--append", "ü"],
        ["--for", "qemu", "--tap", "a,b"], ["--for", "qemu", "--tap", "a-name-too-long0"],
    ):  # fmt: skip
        assert "Error: " in refused("web", *bad), bad
    assert not (place.root / "build" / "web" / "qemu").exists()


def test_clean_removes_exports(place: Place) -> None:
    place.build()
    for name in MONITORS:
        place.fledge("export", "web", "--for", name)
    mine = place.root / "build" / "web" / "qemu" / "vmlinux"
    mine.write_bytes(b"kernel")
    result = place.fledge("clean")
    assert f"removed {place.root}/build/web/firecracker/vm_config.json" in result.stdout
    left = [path for path in (place.root / "build").rglob("*") if path.is_file()]
    assert left == [mine], "what somebody put there stays"
    shutil.rmtree(place.root / "build")
    place.build()
    place.fledge("export", "web", "--for", "qemu")
    place.fledge("clean")
    assert list((place.root / "build").iterdir()) == []


def test_a_folder_that_cannot_be_written_to(place: Place, tmp_path: Path) -> None:
    place.build()
    (tmp_path / "file").write_bytes(b"")
    result = place.fledge("export", "web", "--for", "qemu", "-o", str(tmp_path / "file" / "below"))
    assert result.code == 1
    assert "Not a directory" in result.stderr and "Traceback" not in result.stderr
