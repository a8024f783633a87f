"""User namespaces: run as nobody, to whom subordinate ids are granted in a mount namespace of the test alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import userns
from fledge_tasks.errors import FilesystemError
from tests.tools import CHECKOUT, PATH, as_subordinate, take_rights
from tests.workspaces import processes_about

Run = Callable[..., Any]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder of nobody: pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        yield Path(folder)


def command(grants: Path, code: str, *, count: int = 65536) -> list[str]:
    grants.mkdir(exist_ok=True)
    imports = "import json, os, sys, time\nfrom pathlib import Path\nfrom fledge_tasks import userns\n"
    return [*as_subordinate(grants, count), sys.executable, "-c", imports + textwrap.dedent(code)]


def environment() -> dict[str, str]:
    return {"PATH": PATH, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def run(tmp_path: Path, place: Path) -> Run:
    """Run code as nobody, and return what it prints as JSON."""

    def run(code: str, **options: int) -> Any:
        prefix = command(tmp_path / "grants", code, **options)
        done = subprocess.run(prefix, env=environment(), cwd=place, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


# --- ids -------------------------------------------------------------------------------------


def test_root_needs_no_namespace() -> None:
    if os.geteuid() == 0:
        assert userns.call(os.getpid) == os.getpid()
        assert userns.ids().hold(0, 4_000_000_000)
        assert userns.obstacle() is None


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("root:100:10\n", 11),
        ("0:100:10", 11),
        ("other:1:1\nroot:100:10\nroot:500:5\n0:7:1\n\nbroken\nroot:x:1\n", 17),
        ("root:100:10\n0:100:10\nroot:95:6\nroot:109:1\nroot:102:3\nroot:90:30\nroot:110:1\n", 12),
        (f"root:50:0\nroot:{'9' * 5000}:1\nroot:1:{'9' * 5000}\nroot:\u0661:1\nroot:-1:5\nroot:100:10\n", 11),
        ("# f\udcfcr alle\nroot:100:10\n", 11),
    ],
)
def test_what_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, ids: int) -> None:
    take_rights(monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    for name in ("SUBUID", "SUBGID"):
        monkeypatch.setattr(userns, name, tmp_path / "file")
    (tmp_path / "file").write_text(text, errors="surrogateescape")
    found = userns.ids()
    assert found.users == found.groups == ((0, ids),)
    assert found.hold(0, ids - 1) and not found.hold(ids, 0) and not found.hold(0, ids)


@pytest.mark.parametrize("text", [None, "", "other:1:1\n", "root:100:0\n", "root:100\n"])
def test_nothing_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    take_rights(monkeypatch)
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(userns, "SUBUID", tmp_path / "file")
    if text is not None:
        (tmp_path / "file").write_text(text)
    error = userns.obstacle()
    assert error is not None and str(error).startswith(f"{tmp_path}/file grants no subordinate ids to root\n")
    assert "usermod --add-subuids" in str(error)
    with pytest.raises(FilesystemError, match="grants no subordinate ids"):
        userns.ids()


# --- namespaces ------------------------------------------------------------------------------


def test_inside_one_is_root_of_what_is_granted(run: Run) -> None:
    found = run(
        """
        def inside():
            Path("file").touch()
            os.chown("file", 65536, 3)
            return os.getuid(), os.getgid(), Path("/proc/self/uid_map").read_text().split()
        uid, gid, numbers = userns.call(inside)
        status = os.stat("file")
        print(json.dumps([uid, gid, numbers, status.st_uid, status.st_gid, os.getuid(), userns.obstacle()]))
        """
    )
    assert found == [0, 0, ["0", "65534", "1", "1", "100000", "65536"], 165_535, 100_002, 65534, None]


def test_what_is_granted_twice_or_not_at_all_is_no_obstacle(run: Run) -> None:
    found = run(
        """
        Path("grants").write_bytes(b"nobody:100000:65536\\n65534:100000:65536\\nnobody:100005:0\\n\\xff\\n")
        userns.SUBUID = userns.SUBGID = Path("grants")
        print(json.dumps(str(userns.obstacle())))
        """
    )
    assert found == "None"


def test_errors_come_out_of_it(run: Run) -> None:
    found = run(
        """
        from fledge_tasks.errors import CommandError, FilesystemError, FledgeError
        from fledge_tasks.run import run
        def ours():
            raise FilesystemError("text", where="where", hint="hint")
        def failing():
            run(["sh", "-c", "echo no >&2; exit 3"])
        def killed():
            os.kill(os.getpid(), 9)
        def caught(function):
            try:
                userns.call(function)
            except (FledgeError, OSError) as error:
                return type(error).__name__, str(error)
        print(json.dumps([caught(ours), caught(failing), caught(lambda: os.mkdir("/no/such")), caught(killed)]))
        """
    )
    assert found[0] == ["FilesystemError", "where: text\n  hint: hint"]
    assert found[1][0] == "CommandError" and "exited with 3" in found[1][1]
    assert found[2] == ["FileNotFoundError", "[Errno 2] No such file or directory: '/no/such'"]
    assert found[3] == ["FilesystemError", "the process in the user namespace ended without a result"]


def test_without_grants_there_is_none(run: Run) -> None:
    assert "/etc/subuid grants no subordinate ids to nobody" in run(
        "print(json.dumps(str(userns.obstacle())))", count=0
    )


def test_programs_that_are_missing_or_refuse(run: Run) -> None:
    found = run(
        """
        os.environ["PATH"] = os.getcwd()
        os.mkdir("bin")
        from fledge_tasks import run as run_module
        run_module.environment = lambda extra=None: {"PATH": os.getcwd() + "/bin"}
        missing = str(userns.obstacle())
        Path("bin/newuidmap").write_text("#!/bin/sh\\necho it is not allowed >&2\\nexit 1\\n")
        os.chmod("bin/newuidmap", 0o755)
        print(json.dumps([missing, str(userns.obstacle())]))
        """
    )
    assert "newuidmap is not installed" in found[0] and "apt-get install uidmap" in found[0]
    assert found[1].startswith(
        "a user namespace cannot be set up: it is not allowed\n  hint: as root, if it is not set-"
    )


def test_user_namespaces_that_are_not_allowed(run: Run) -> None:
    found = run(
        """
        class Refusing:
            def unshare(self, flags):
                import ctypes
                ctypes.set_errno(28)
                return -1
        userns._libc = Refusing()
        print(json.dumps(str(userns.obstacle())))
        """
    )
    assert found.startswith("user namespaces cannot be used here: No space left on device\n  hint: ")
    assert "user.max_user_namespaces" in found


def test_what_belongs_to_others_is_removed(run: Run) -> None:
    found = run(
        """
        import shutil
        def make():
            os.makedirs("tree/folder/deep")
            Path("tree/folder/file").touch()
            for path in ("tree/folder/deep", "tree/folder", "tree"):
                os.chown(path, 5, 5)
                os.chmod(path, 0o500)
        userns.call(make)
        shutil.rmtree("tree", ignore_errors=True)
        left = os.path.exists("tree")
        userns.remove_tree(Path("tree"))
        userns.remove_tree(Path("tree"))
        print(json.dumps([left, os.path.exists("tree")]))
        """
    )
    assert found == [True, False]


# --- ends ------------------------------------------------------------------------------------

SLEEPER = """
    def inside():
        try:
            Path("begun").touch()
            time.sleep(60)
        finally:
            Path("ended").touch()
    userns.call(inside)
    """


TAKEN_BY_A_THREAD = """
    import threading
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [15])  # in this thread alone
    """


@pytest.mark.parametrize(
    ("signum", "before"), [(signal.SIGTERM, ""), (signal.SIGTERM, TAKEN_BY_A_THREAD), (signal.SIGKILL, "")]
)
def test_it_ends_with_us(tmp_path: Path, place: Path, signum: signal.Signals, before: str) -> None:
    """Also when we are killed: `finally` blocks in it run."""
    code = "\n".join(
        (
            f"# in {place}",
            "import signal",
            "signal.signal(15, lambda *_: sys.exit(1))",
            *map(textwrap.dedent, (before, SLEEPER)),
        )
    )
    process = subprocess.Popen(
        command(tmp_path / "grants", code), env=environment(), cwd=place, stdin=subprocess.DEVNULL, process_group=0
    )
    deadline = time.monotonic() + 20
    while not (place / "begun").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert len(processes_about(place)) == 2
    process.send_signal(signum)
    process.wait(20)
    while not (place / "ended").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    while processes_about(place):
        assert time.monotonic() < deadline, processes_about(place)
        time.sleep(0.01)
