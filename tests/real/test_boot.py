"""Images of every type boot, and are from inside what they should be: real QEMU, real Linux, real nginx."""

from __future__ import annotations

import base64
import hashlib
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import time
import urllib.request
from pathlib import Path
from tarfile import DIRTYPE

import pytest

from fledge_tasks.boot.initramfs import READ_ONLY
from fledge_tasks.boot.initramfs import modules as modules_for
from fledge_tasks.boot.kernel import FOLDER_VARIABLE, find
from tests.layers import Member, symlink
from tests.layouts import Layout
from tests.real.conftest import Built
from tests.real.test_mounted_types import set_kind
from tests.tools import need, need_kernel
from tests.workspaces import REPOSITORY, Workspace, processes_about, sha256_of

KINDS = ("ext4", "xfs", "btrfs", "squashfs", "erofs")
BUFFER_MB = 40
FILL_MB = 39
GREETING = 'it\'s "quoted", $HOME and\ntwo lines'
# struct vfs_cap_data, revision 2, effective: cap_net_bind_service=ep (linux/capability.h).
MAY_BIND = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
REPORT = b"""#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
echo "ids=$(id -u) $(id -g) $(id -G)"
echo "greeting=$(printf %s "$GREETING" | base64 -w 0)"
echo "home=$HOME"
echo "first=$(cat /proc/1/comm)"
echo "command=$(cat /proc/1/cmdline | tr '\\0' ' ')"
echo "host=$(hostname) $(date +%Y)"
echo "root=$(grep ' / ' /proc/mounts | tail -n 1)"
for file in /files/* /srv/httpd "/www/not there"; do
    echo "$file=$(stat -c '%a %u %g' "$file")"
done
echo "big=$(sha256sum /files/big | cut -c 1-64)"
echo "secret=$(cat /files/secret)"
echo "not=$(cat /files/not-ours 2>&1)"
echo "free=$(df -k / | tail -n 1 | tr -s ' ' | cut -d ' ' -f 4)"
echo "filled=$(dd if=/dev/zero of=/files/open/fill bs=1M count=FILL conv=fsync 2>&1 | tail -n 1)"
echo "device=$(stat -c '%a %u' /dev/console)"
""".replace(b"FILL", str(FILL_MB).encode())
BIG = bytes(range(256)) * 5000


APPLETS = (
    "sh",
    "id",
    "base64",
    "cat",
    "tr",
    "hostname",
    "date",
    "grep",
    "tail",
    "stat",
    "sha256sum",
    "cut",
    "df",
    "dd",
    "tty",
)


@pytest.fixture(scope="module", autouse=True)
def kernel() -> Path:
    need("qemu-system-x86_64", "busybox")
    return need_kernel()


@pytest.fixture(scope="module")
def place(scratch: Path, kernel: Path) -> Workspace:
    """A workspace with the image `report` in each type of filesystem, and the job `job`, built."""
    place = Workspace(scratch / "booted", scratch, env={FOLDER_VARIABLE: str(kernel)})
    busybox = Path(str(shutil.which("busybox"))).read_bytes()
    base = [
        Member("bin/busybox", busybox, mode=0o755),
        *(symlink(f"bin/{applet}", "busybox") for applet in APPLETS),
        Member("etc/passwd", b"root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
        Member("etc/group", b"root:x:0:\napp:x:1000:\nextra:x:2000:app\n"),
        Member("etc/motd", b"welcome\n"),
    ]
    report = [
        Member("srv/httpd", busybox, mode=0o755, xattrs={"security.capability": MAY_BIND}),
        Member("www/cgi-bin/report", REPORT, mode=0o755),
        Member("files/big", BIG, mode=0o640, uid=1000, gid=70000),
        Member("files/secret", b"for app alone", mode=0o400, uid=1000, gid=100000),
        Member("files/not-ours", b"no", mode=0o600, uid=1001),
        Member("files/suid", b"", mode=0o4755, gid=5),
        Member("files/open", type=DIRTYPE, mode=0o1777, uid=4294967294),
    ]
    server = {
        "User": "app",
        "Env": [f"GREETING={GREETING}", "PATH=/bin", "IT.IS=odd"],
        "WorkingDir": "/www/not there",
        "Entrypoint": ["/srv/httpd"],
        "Cmd": ["-f", "-p", "80", "-h", "/www"],
        "ExposedPorts": {"80/tcp": {}},
    }
    Layout(place.root / "layouts/report").write(base, report, config=server)
    Layout(place.root / "layouts/job").write(base, config={"Cmd": ["sh", "-c", "echo out; id; exit 5"]})
    more = """[manifest]
resources = { memory_mb = 256 }
health_check = { endpoint = "/cgi-bin/report", timeout_ms = 60000 }
"""
    for kind in KINDS:
        place.add(kind, "oci:../layouts/report", buffer_mb=BUFFER_MB, more=more)
        set_kind(place, kind, kind)
    place.add("job", "oci:../layouts/job", buffer_mb=1)
    place.build()
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_from_inside(place: Workspace, kind: str) -> None:
    """One boot: that it answers at a port below 1024, as a user who is not root, takes the file's capability."""
    before = sha256_of(place.output(kind))
    result = place.fledge("boot", kind, "--json", "--timeout", "120")
    assert result.code == 0, result.stdout + result.stderr
    found = dict(line.split("=", 1) for line in result.summary["body"].splitlines())
    assert found["ids"] == "1000 1000 1000 2000"
    assert base64.b64decode(found["greeting"]).decode() == GREETING
    assert (found["home"], found["first"]) == ("/home/app", "httpd")
    assert found["command"] == "/srv/httpd -f -p 80 -h /www "
    assert found["host"] == f"{kind} {time.gmtime().tm_year}"
    mounted = "image / overlay " if kind in READ_ONLY else f"/dev/vda / {kind} "
    assert found["root"].startswith(mounted) and " rw" in found["root"]
    assert found["/files/big"] == "640 1000 70000"
    assert found["big"] == hashlib.sha256(BIG).hexdigest()
    assert (found["/files/secret"], found["secret"]) == ("400 1000 100000", "for app alone")
    assert found["/files/not-ours"] == "600 1001 0" and "Permission denied" in found["not"]
    assert found["/files/suid"] == "4755 0 5"
    assert found["/files/open"] == "1777 4294967294 0"
    assert found["/srv/httpd"] == "755 0 0"
    assert found["/www/not there"] == "755 0 0"
    assert found["filled"] == f"{FILL_MB}+0 records out"
    if kind not in READ_ONLY:
        assert int(found["free"]) >= BUFFER_MB << 10
    # What it wrote is gone with it.
    assert sha256_of(place.output(kind)) == before
    assert place.build(kind).stages(kind) == []
    assert place.fledge("verify", kind).code == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in READ_ONLY])
def test_nginx(web: Built, scratch: Path, kernel: Path, kind: str) -> None:
    place = Workspace(scratch / "nginx", web.workspace.home, web.workspace.cache, env={FOLDER_VARIABLE: str(kernel)})
    source = re.search('^image = "(.*)"$', (web.workspace.root / "web/fledge.toml").read_text(), re.MULTILINE)
    assert source is not None
    # The image exposes 8080 and 443, and listens at 80.
    more = '[manifest]\nworkload = { base_url = "http://127.0.0.1:80" }\n'
    place.add(kind, source[1], buffer_mb=BUFFER_MB, more=more)
    set_kind(place, kind, kind)
    place.build(kind)
    result = place.fledge("boot", kind, "--show", "--timeout", "120")
    assert result.code == 0, result.stderr
    line, page = result.stdout.strip().splitlines()
    assert line.startswith(f"{kind}: healthy: GET / at port 80: 200 OK, ")
    assert page == "<h1>fledge</h1>"


def test_the_example(scratch: Path, kernel: Path) -> None:
    """What `make demo` ends with."""
    examples = scratch / "examples"
    shutil.copytree(REPOSITORY / "examples", examples, ignore=shutil.ignore_patterns("build", "cache", "layouts"))
    subprocess.run([examples / "hello/make-image.sh"], check=True, stdout=subprocess.DEVNULL)
    place = Workspace(examples / "hello", scratch, env={FOLDER_VARIABLE: str(kernel)})
    place.build()
    result = place.fledge("boot", "hello", "--show", "--timeout", "120")
    assert result.code == 0, result.stderr
    assert "hello: healthy: GET / at port 8080: 200 OK, " in result.stdout
    assert "\n<h1>Hello from a microVM</h1>\n" in result.stdout


def test_a_job(place: Workspace) -> None:
    result = place.fledge("boot", "job", "--timeout", "120")
    assert result.code == 5, result.stderr
    assert result.stdout.splitlines()[:2] == ["out", "uid=0(root) gid=0(root)"]
    assert "error: job: the workload ended with 5, " in result.stderr


def test_a_shell(place: Workspace) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        command = place.command("boot", "job", "--shell")
        os.execve(command[0], command, {**place.environment(), "TERM": "dumb"})
    printed = read_until(terminal, b"# ")
    os.write(terminal, b"cat /etc/motd; tty; echo $TERM-$$; exit 6\n")
    printed += read_until(terminal, None)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    lines = [line for line in printed.decode().splitlines() if line]
    assert "Ctrl-A X ends the guest." in lines
    assert lines[-4:] == ["welcome", "/dev/ttyS0", "dumb-1", "fledge: the workload ended with 6"]


def read_until(terminal: int, end: bytes | None) -> bytes:
    """Read until `end` was written, or everything."""
    data, deadline = b"", time.monotonic() + 120
    while end is None or end not in data:
        assert select.select([terminal], [], [], deadline - time.monotonic())[0], data
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # EIO: nobody has it open any more
            chunk = b""
        if not chunk:
            assert end is None, data
            break
        data += chunk
    return data


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_no_guest_outlives_us(place: Workspace, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        # Emulated from the start: where KVM is tried first, and fails, there is a moment without any guest.
        place.command("boot", "ext4", "--keep", "--accel", "tcg", "--timeout", "120"),
        env=place.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    if number == signal.SIGINT:  # the others need not wait for it
        while not (url := re.search(r"http://127\.0\.0\.1:\d+/", line := process.stderr.readline())):
            assert line
        with urllib.request.urlopen(f"{url[0]}cgi-bin/report", timeout=60) as answer:
            assert answer.read().startswith(b"ids=1000 1000 ")
    else:
        deadline = time.monotonic() + 60
        while len(processes_about(place.output("ext4"))) == 0:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    assert processes_about(place.output("ext4")) != []
    process.send_signal(number)
    assert process.wait(30) == code
    deadline = time.monotonic() + 10
    while processes_about(place.output("ext4")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.communicate()
    assert {path.name for path in place.leftovers()} == {"rootfs.img", "manifest.json", ".fledge.json"}


def test_the_kernels_modules_are_those_that_are_listed(kernel: Path) -> None:
    """Each type that images can have is in Debian's kernel, and every module stands after what it needs."""
    found = find()
    assert found.image.is_relative_to(kernel)
    for kind in (*KINDS, *sorted(READ_ONLY)):
        modules = found.load_order(modules_for(kind))
        assert all(module.startswith(b"\x7fELF") for module in modules)
        assert len(modules) == len(set(modules)) >= 6
