"""What goes into a guest, tried out on this host: the archive, the program that becomes a user, the scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks.boot import become, initramfs
from fledge_tasks.boot.workload import DEFAULT_PATH, Workload
from fledge_tasks.errors import BootError, ToolError
from tests.tools import PATH, need, need_root

SCRIPTS = Path(initramfs.__file__).parent
WORKLOAD = Workload(
    name="web", argv=("/bin/app",), env={}, workdir="/", user="", cpus=1, memory_mb=64, check=None
)  # fmt: skip


# --- the archive -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    mode: int
    data: bytes
    rdev: tuple[int, int]


def read(archive: bytes) -> dict[str, Entry]:
    """Read a cpio archive in the format 'newc', every field of which is what it must be."""
    found: dict[str, Entry] = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701" and offset % 4 == 0
        ino, mode, uid, gid, nlink, mtime, size, *devices, namesize, check = (
            int(archive[offset + at : offset + at + 8], 16) for at in range(6, 110, 8)
        )
        name = archive[offset + 110 : offset + 110 + namesize]
        start = -(-(offset + 110 + namesize) // 4) * 4
        assert (uid, gid, nlink, mtime, check, devices[:2]) == (0, 0, 1, 0, 0, [0, 0]) and ino > len(found)
        assert name.endswith(b"\0") and b"\0" not in name[:-1]
        if name == b"TRAILER!!!\0":
            assert archive[start:] == b""
            return found
        parent = name.decode().rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent].mode)
        found[name[:-1].decode()] = Entry(mode, archive[start : start + size], (devices[2], devices[3]))
        offset = -(-(start + size) // 4) * 4


def test_the_archive() -> None:
    need("busybox")
    made = initramfs.make(WORKLOAD, "ext4", [b"first", b"second module"])
    found = read(made)
    assert found["init"] == Entry(stat.S_IFREG | 0o755, (SCRIPTS / "init.sh").read_bytes(), (0, 0))
    assert found["dev/console"] == Entry(stat.S_IFCHR | 0o600, b"", (5, 1))
    assert [found[f"modules/{number:03}.ko"].data for number in range(2)] == [b"first", b"second module"]
    assert found["bin/mount"] == Entry(stat.S_IFLNK | 0o777, b"/fledge/busybox", (0, 0))
    assert found["fledge/busybox"].data == Path(str(shutil.which("busybox"))).read_bytes()
    assert found["fledge/become"] == Entry(stat.S_IFREG | 0o755, become.program(), (0, 0))
    assert {"fledge/enter.sh", "fledge/workload.sh", "fledge/settings.sh"} < set(found)
    assert initramfs.make(WORKLOAD, "ext4", [b"first", b"second module"]) == made
    listed = subprocess.run(["busybox", "cpio", "-t"], input=made, capture_output=True, check=True).stdout.decode()
    assert listed.split() == list(found)


def test_every_program_that_the_scripts_call_is_there() -> None:
    need("busybox")
    found = read(initramfs.make(WORKLOAD, "ext4", []))
    builtin = {"echo", "cd", "exec", "exit", "[", "set", "unset", "break", "while", "if", "for", "case", "read", "."}
    offered = set(subprocess.run(["busybox", "--list"], capture_output=True, text=True, check=True).stdout.split())
    linked = {name.removeprefix("bin/") for name in found if name.startswith("bin/")}
    assert linked <= offered and not linked & builtin
    assert {"sh", "env", "setsid", "chown", "mkdir"} <= offered
    words = set((SCRIPTS / "init.sh").read_text().split()) | set((SCRIPTS / "enter.sh").read_text().split())
    assert linked <= words


@pytest.mark.parametrize(("kind", "read_only"), [("ext4", ""), ("xfs", ""), ("squashfs", "yes"), ("erofs", "yes")])
def test_what_a_type_needs(kind: str, read_only: str) -> None:
    assert initramfs.modules(kind)[:4] == ("virtio_mmio", "virtio_blk", "virtio_net", kind)
    assert ("overlay" in initramfs.modules(kind)) == bool(read_only)
    assert f"\nis_read_only={read_only or shlex.quote('')}\n" in initramfs.settings(WORKLOAD, kind, None)


def test_busybox_must_be_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("busybox")
    static = Path(str(shutil.which("busybox"))).read_bytes()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="busybox is not installed"):
        initramfs.make(WORKLOAD, "ext4", [])
    program = tmp_path / "busybox"
    arm = static[:18] + (183).to_bytes(2, "little") + static[20:]
    for data in (Path("/bin/ls").read_bytes(), arm, b"", b"#!/bin/sh\n"):
        program.write_bytes(data)
        program.chmod(0o755)
        with pytest.raises(BootError, match="this busybox needs libraries, expected a static one for x86-64"):
            initramfs.make(WORKLOAD, "ext4", [])
    program.write_bytes(static)
    assert read(initramfs.make(WORKLOAD, "ext4", []))["fledge/busybox"].data == static


# --- become ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """The program, where everybody can run it."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "become"
        path.write_bytes(become.program())
        path.chmod(0o755)
        yield path


ASK = 'cat /proc/$$/status; tr "\\0" "\\n" </proc/$$/cmdline; env'


@pytest.mark.parametrize(
    ("uid", "gid", "groups"),
    [(0, 0, []), (1000, 1001, []), (1, 2, [3]), (70000, 5, [6, 0, 4294967294]), (4294967294, 7, list(range(300)))],
)
def test_becoming_a_user(program: Path, uid: int, gid: int, groups: list[int]) -> None:
    need_root()
    ids = ",".join(map(str, [uid, gid, *groups]))
    command = [str(program), ids, "/bin/sh", "zeroth", "-c", ASK, "a b"]
    lines = subprocess.run(
        command, env={"PATH": PATH, "A": "b"}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Uid"].split() == [str(uid)] * 4
    assert status["Gid"].split() == [str(gid)] * 4
    assert sorted(map(int, status["Groups"].split())) == sorted(groups)
    at = lines.index("zeroth")
    assert lines[at : at + 4] == ["zeroth", "-c", ASK, "a b"]
    assert "A=b" in lines[at + 4 :]


def test_what_it_may_not_become_and_what_cannot_be_run(program: Path) -> None:
    need_root()
    assert subprocess.run([program, "1,1", "/no/program", "x"], check=False).returncode == 127
    again = [str(program), "1,1", str(program), "become", "2,2", "/bin/true", "true"]
    assert subprocess.run(again, check=False).returncode == 126


# --- what is said to the scripts, and what they make of it -----------------------------------------------------

# What an argument of a program and a variable can hold.
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
NAMES = st.text(st.characters(exclude_characters="\0=", exclude_categories=["Cs"]), min_size=1)
SHOW = "import json, os, sys; print(json.dumps([sys.argv, {k.hex(): v.hex() for k, v in os.environb.items()}]))"


@settings(max_examples=50, deadline=None)
@given(argv=st.lists(TEXTS, min_size=1, max_size=4), env=st.dictionaries(NAMES, TEXTS, max_size=4))
def test_whatever_stands_in_a_manifest_reaches_the_workload(argv: list[str], env: dict[str, str]) -> None:
    need("busybox")
    text = initramfs.settings(replace(WORKLOAD, argv=tuple(argv), env=env), "ext4", None)
    text += f"busybox=busybox home=/home/it\nlaunch {shlex.quote(sys.executable)} -ISc {shlex.quote(SHOW)}\n"
    env_of_init = {"PATH": PATH, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["busybox", "sh", "-c", text], env=env_of_init, capture_output=True, check=True)
    found, environment = json.loads(done.stdout)
    assert found == ["-c", *argv]
    expected = {"HOME": "/home/it", "PATH": DEFAULT_PATH, **env}
    assert {key: environment.get(key) for key in {name.encode().hex() for name in expected}} == {
        name.encode().hex(): value.encode().hex() for name, value in expected.items()
    }


PASSWD = (
    "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\n1002:x:9:9::/:\nodd::70000:70001:::\nlast:x:5:6::/l:"
)
GROUP = "root:x:0:\nwheel:x:10:root,app\nstaff:x:50:other,app\nvideo:x:44:app2,xapp\napp:x:1001:\nnums:x:77:odd"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks as an image does to the scripts when the guest is ready."""
    need_root()
    need("busybox", "chroot")
    folder = tmp_path_factory.mktemp("image")
    folder.chmod(0o755)
    for path in ("bin", "etc", "srv/bin", "dev/fledge"):
        (folder / path).mkdir(parents=True)
    for path in ("bin/busybox", "dev/fledge/busybox"):
        shutil.copy(str(shutil.which("busybox")), folder / path)
    os.symlink("busybox", folder / "bin/sh")
    (folder / "dev/fledge/become").write_bytes(become.program())
    (folder / "dev/fledge/become").chmod(0o755)
    shutil.copy(SCRIPTS / "workload.sh", folder / "dev/fledge")
    for name in ("null", "console"):
        (folder / "dev" / name).touch()
    (folder / "srv/plain").write_text("not a program")
    (folder / "srv/bin/tool").write_text('#!/bin/sh\necho "tool $0"\n')
    (folder / "srv/bin/tool").chmod(0o755)
    return folder


def start(root: Path, workload: Workload) -> tuple[int, list[str]]:
    """Run the last script in `root`, and return what it ended with, and the lines that it wrote."""
    (root / "dev/fledge/settings.sh").write_text(initramfs.settings(workload, "ext4", None))
    done = subprocess.run(
        ["chroot", root, "/dev/fledge/busybox", "sh", "/dev/fledge/workload.sh"],
        env={"PATH": PATH}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


WHO = replace(WORKLOAD, argv=("sh", "-c", "busybox id -u; busybox id -g; busybox id -G; echo $HOME; pwd"), workdir="/")


@pytest.mark.parametrize(
    ("user", "uid", "gid", "groups", "home"),
    [
        ("", 0, 0, {0, 10}, "/root"),
        ("root", 0, 0, {0, 10}, "/root"),
        ("0", 0, 0, {0, 10}, "/root"),
        ("app", 1000, 1001, {1001, 10, 50}, "/home/app"),
        ("1000", 1000, 1001, {1001, 10, 50}, "/home/app"),
        ("app:", 1000, 1001, {1001, 10, 50}, "/home/app"),
        ("app:staff", 1000, 50, {50}, "/home/app"),
        ("app:44", 1000, 44, {44}, "/home/app"),
        ("1234", 1234, 0, {0}, "/"),
        ("1234:4321", 1234, 4321, {4321}, "/"),
        ("1234:wheel", 1234, 10, {10}, "/"),
        ("1002", 9, 9, {9}, "/"),
        ("odd", 70000, 70001, {70001, 77}, "/"),
        ("last", 5, 6, {6}, "/l"),
        (":staff", 0, 50, {50}, "/root"),
    ],
)
def test_the_user(root: Path, user: str, uid: int, gid: int, groups: set[int], home: str) -> None:
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    code, lines = start(root, replace(WHO, user=user))
    assert code == 0
    assert lines[:2] == [str(uid), str(gid)]
    assert set(map(int, lines[2].split())) == groups
    assert lines[3:] == [home, "/"]
    assert (root / "dev/console").stat().st_uid == uid


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("nobody", "fledge: the image has no user nobody"),
        ("app:nobody", "fledge: the image has no group nobody"),
        ("-1", "fledge: the image has no user -1"),
    ],
)
def test_a_user_that_is_not_there(root: Path, user: str, message: str) -> None:
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    assert start(root, replace(WHO, user=user)) == (127, [message])


def test_an_image_without_users(root: Path) -> None:
    for name in ("passwd", "group"):
        (root / "etc" / name).unlink(missing_ok=True)
    assert start(root, WHO)[1] == ["0", "0", "0", "/", "/"]
    assert start(root, replace(WHO, user="7:8"))[1] == ["7", "8", "8", "/", "/"]
    assert start(root, replace(WHO, user="root")) == (127, ["fledge: the image has no user root"])


def test_names_that_resolve_are_there(root: Path) -> None:
    for name in ("hosts", "resolv.conf"):
        (root / "etc" / name).unlink(missing_ok=True)
    (root / "etc/hosts").touch()
    assert start(root, WHO)[0] == 0
    assert (root / "etc/hosts").read_text() == "127.0.0.1 localhost web\n"
    assert (root / "etc/resolv.conf").read_text() == "nameserver 10.0.2.3\n"
    (root / "etc/hosts").write_text("own\n")
    assert start(root, WHO)[0] == 0
    assert (root / "etc/hosts").read_text() == "own\n"


@pytest.mark.parametrize(
    ("argv", "path", "expected"),
    [
        (("tool",), "/nowhere:/srv/bin:/bin", (0, ["tool /srv/bin/tool"])),
        (("bin/tool",), "/nowhere", (0, ["tool bin/tool"])),
        (("/srv/bin/tool",), "/nowhere", (0, ["tool /srv/bin/tool"])),
        (("tool",), "/nowhere::/bin", (127, ["fledge: the image has no program tool"])),
        (("plain",), "/srv", (127, ["fledge: the image has no program plain"])),
        (("/srv",), "/srv", (127, ["fledge: the image has no program /srv"])),
        (("*",), "/srv/bin", (127, ["fledge: the image has no program *"])),
    ],
)
def test_the_program(root: Path, argv: tuple[str, ...], path: str, expected: tuple[int, list[str]]) -> None:
    assert start(root, replace(WORKLOAD, argv=argv, env={"PATH": path}, workdir="/srv")) == expected


def test_the_working_folder(root: Path) -> None:
    shutil.rmtree(root / "new", ignore_errors=True)
    assert start(root, replace(WHO, workdir="/new/one two"))[1][-1] == "/new/one two"
    assert start(root, replace(WHO, workdir="/srv/plain/below"))[1][-1] == (
        "fledge: there is no working folder /srv/plain/below"
    )
