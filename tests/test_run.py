"""Starting programs: their environment, their failures, and that none outlives us."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import run as run_module
from fledge_tasks.errors import CommandError, FilesystemError, ToolError
from fledge_tasks.fsutil import write_all
from fledge_tasks.interrupt import Interrupted, interruptible
from fledge_tasks.run import PASSED, STDERR_TAIL_BYTES, package_of, run, running
from tests.tools import wait_for


def sh(script: str) -> bytes:
    return run(["sh", "-c", script])


def failure(script: str) -> CommandError:
    with pytest.raises(CommandError) as caught:
        sh(script)
    return caught.value


def test_stdout_is_returned() -> None:
    assert sh(r"printf 'a\0\377'; echo not this >&2") == b"a\0\xff"


def test_much_output_on_both_sides_does_not_block() -> None:
    assert len(sh("head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero")) == 3_000_000


def test_missing_program() -> None:
    with pytest.raises(ToolError) as caught:
        run(["fledge-no-such-program", "--version"])
    assert caught.value.message == "fledge-no-such-program is not installed (not found on PATH)"
    assert caught.value.hint == "install it, for example: sudo apt-get install fledge-no-such-program"


def test_package_names() -> None:
    assert package_of("/usr/sbin/mke2fs") == "e2fsprogs"
    assert package_of("mkfs.xfs") == package_of("xfs_repair") == package_of("xfs_growfs") == "xfsprogs"
    assert package_of("btrfs") == package_of("btrfstune") == package_of("mkfs.btrfs") == "btrfs-progs"
    assert package_of("qemu-system-x86_64") == "qemu-system-x86"
    assert package_of("busybox") == "busybox-static"
    assert package_of("tar2sqfs") == "squashfs-tools-ng" and package_of("sqfstar") == "squashfs-tools"
    assert package_of("mkfs.erofs") == package_of("fsck.erofs") == "erofs-utils"
    assert package_of("skopeo") == "skopeo"


def test_program_that_may_not_be_started(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(ToolError, match="script cannot be started: Permission denied"):
        run([script])


def test_exit_code_stderr_and_a_line_that_runs_it_again() -> None:
    script = "echo 'what went wrong' >&2; exit 3"
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", script, "a b"], env={"WHERE": "x y"}, hint="do this")
    error = caught.value
    assert (error.returncode, error.stderr, error.hint) == (3, "what went wrong\n", "do this")
    head, replay, tail = error.message.split("\n")
    assert (head, tail) == ("sh exited with 3", "  what went wrong")
    assert replay == f"  command: WHERE='x y' sh -c {shlex.quote(script)} 'a b'"
    again = subprocess.run(replay.removeprefix("  command: "), shell=True, capture_output=True, check=False)
    assert (again.returncode, again.stderr) == (3, b"what went wrong\n")


def test_only_the_end_of_stderr_is_kept() -> None:
    error = failure("seq 100000 >&2; exit 1")
    assert len(error.stderr) == STDERR_TAIL_BYTES
    assert error.stderr.endswith("\n99999\n100000\n")


def test_silent_failure_and_odd_bytes() -> None:
    assert failure("exit 1").message.endswith("(it printed nothing)")
    assert failure(r"printf '\377' >&2; exit 1").stderr == "\ufffd"


@pytest.mark.parametrize(("number", "name"), [(9, "SIGKILL"), (15, "SIGTERM"), (40, "signal 40")])
def test_program_killed_by_a_signal(number: int, name: str) -> None:
    error = failure(f"kill -{number} $$")
    assert error.returncode == -number
    assert error.message.startswith(f"sh was killed by {name}\n")


def test_nothing_of_ours_leaks_into_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MKE2FS_CONFIG", "LANG", "LC_MESSAGES", "PYTHONPATH", "E2FSPROGS_FAKE_TIME", "LD_PRELOAD_NOT"):
        monkeypatch.setenv(name, "leak")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    lines = run(["env"], env={"EXTRA": "1"}).decode().splitlines()
    found = dict(line.split("=", 1) for line in lines)
    assert set(found) <= {*PASSED, "LC_ALL", "TZ", "EXTRA"}
    assert (found["LC_ALL"], found["TZ"], found["EXTRA"]) == ("C.UTF-8", "UTC", "1")
    assert found["https_proxy"] == "http://127.0.0.1:1"


def test_relative_paths_in_the_environment_start_where_we_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auth.json").write_text("logins")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", "auth.json")
    monkeypatch.setenv("DOCKER_CONFIG", "")
    script = 'cat "$REGISTRY_AUTH_FILE"; echo "<$DOCKER_CONFIG>"'
    assert run(["sh", "-c", script], cwd=tmp_path / "elsewhere") == b"logins<>\n"


def test_paths_in_the_environment_lead_where_they_led(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of a list; and '..' behind a link, which is the folder above the link's target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSL_CERT_DIR", "/etc/ssl/certs:mine:../ours")
    monkeypatch.setenv("DOCKER_CONFIG", "/somewhere/link/../docker")
    found = run(["sh", "-c", 'echo "$SSL_CERT_DIR $DOCKER_CONFIG"'], cwd=Path("/")).decode()
    assert found == f"/etc/ssl/certs:{tmp_path}/mine:{tmp_path}/../ours /somewhere/link/../docker\n"


@pytest.mark.parametrize("path", ["/usr/bin:/bin", None])
def test_path_holds_the_folders_of_mke2fs(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if path is None:
        monkeypatch.delenv("PATH")
    else:
        monkeypatch.setenv("PATH", path)
    folders = run(["/usr/bin/env"]).decode().split("PATH=")[1].splitlines()[0].split(":")
    assert folders[-2:] == ["/usr/sbin", "/sbin"]
    assert "/bin" in folders


def test_stdin_is_closed_and_no_descriptor_is_inherited(tmp_path: Path) -> None:
    assert sh("cat") == b""
    with (tmp_path / "open").open("wb") as file:
        os.set_inheritable(file.fileno(), True)
        assert str(tmp_path) not in sh("ls -l /proc/self/fd").decode()


def test_working_folder(tmp_path: Path) -> None:
    assert run(["pwd"], cwd=tmp_path).decode().strip() == str(tmp_path.resolve())


def test_what_a_program_reads_comes_from_us() -> None:
    data = os.urandom(3_000_000)
    assert run(["cat"], feed=lambda fd: write_all(fd, data)) == data


def test_a_program_that_does_not_read_all_is_no_failure_of_ours() -> None:
    assert run(["echo", "done"], feed=lambda fd: write_all(fd, bytes(3_000_000))) == b"done\n"
    with pytest.raises(CommandError, match="sh exited with 3"):
        run(["sh", "-c", "exit 3"], feed=lambda fd: write_all(fd, bytes(3_000_000)))


def test_what_goes_wrong_while_writing_ends_the_program() -> None:
    def feed(fd: int) -> None:
        write_all(fd, b"begun")
        raise FilesystemError("no more")

    started = time.monotonic()
    with pytest.raises(FilesystemError, match="no more"):
        run(["sleep", "100"], feed=feed)
    assert time.monotonic() - started < 50


def is_running(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


CALLER = """
    import os, signal, sys
    from fledge_tasks import run
    run._TERMINATE_SECONDS = 0.5
    def end(*_):
        raise SystemExit(5)
    signal.signal(signal.SIGTERM, end)
    def feed(fd):
        while True:
            os.write(fd, bytes(4096))
    run.run(["sh", "-c", sys.argv[1]], feed=feed if "fed" in sys.argv else None)
"""


@pytest.mark.parametrize(
    "script",
    [
        "sleep 100 & echo $! > child; echo $$ > leader; wait",
        "(trap '' TERM; echo $(exec sh -c 'echo $PPID') > child; while :; do sleep 100; done) & echo $$ > leader; wait",
        "trap '' TERM; sleep 100 & echo $! > child; echo $$ > leader; while :; do wait; done",
    ],
    ids=["both end at once", "the child ignores SIGTERM", "the leader ignores SIGTERM"],
)
@pytest.mark.parametrize(
    ("number", "more"), [(signal.SIGTERM, []), (signal.SIGINT, []), (signal.SIGTERM, ["fed"])], ids=str
)
def test_an_interrupted_call_ends_the_whole_group(
    tmp_path: Path, script: str, number: signal.Signals, more: list[str]
) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CALLER), f"cd {shlex.quote(str(tmp_path))}; {script}", *more],
        cwd=Path(__file__).parents[1],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        names = [tmp_path / "leader", tmp_path / "child"]
        wait_for(lambda: all(name.exists() and name.read_text().endswith("\n") for name in names), 10)
        processes = [int(name.read_text()) for name in names]
        assert all(is_running(process) for process in processes)
        time.sleep(0.2)  # let it come back from starting the program
        caller.send_signal(number)
        assert caller.wait(15) != 0
        wait_for(lambda: not any(is_running(process) for process in processes), 1)
    finally:
        caller.kill()
        caller.wait()


@pytest.mark.parametrize("threads", [0, 1])
def test_a_signal_while_a_program_starts_ends_it(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """With a second thread, the kernel may give the signal to that one, which does not hold it."""
    go_on = threading.Event()
    others = [threading.Thread(target=go_on.wait) for _ in range(threads)]
    for other in others:
        other.start()
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def start_and_signal(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(start(*arguments, **options))
        os.kill(os.getpid(), signal.SIGTERM)  # held until the program is noted
        time.sleep(0.1)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_signal)
    try:
        with interruptible(), pytest.raises(Interrupted):
            run(["sleep", "100"])
    finally:
        go_on.set()
        for other in others:
            other.join()
    assert started[0].returncode == -signal.SIGTERM


def test_a_killed_caller_takes_the_program_with_it(tmp_path: Path) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CALLER), "echo $$ > $TMPDIR/leader; exec sleep 100"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    leader = tmp_path / "leader"
    wait_for(lambda: leader.exists() and leader.read_text().endswith("\n"), 10)
    number = int(leader.read_text())
    caller.kill()
    caller.wait()
    wait_for(lambda: not is_running(number), 10)


# --- beside us -------------------------------------------------------------------------------------------------


def test_a_running_program_is_read_while_it_runs(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.write_text("from a descriptor")
    with (
        given.open() as file,
        running(
            ["sh", "-c", f"cat /dev/fd/{file.fileno()}; echo; echo complaint >&2; read line; exec sleep 100"],
            descriptors=[file.fileno()],
        ) as child,
    ):
        assert child.stdout.readline() == b"from a descriptor\n"
        wait_for(lambda: child.complaint() == "complaint", 10)
        assert child.ended() is None
        child.end()
        assert child.ended() == -signal.SIGTERM
        child.end()
        assert child.stdout.read() == b""
    assert child.stdout.closed


def test_it_may_end_by_itself() -> None:
    with running(["sh", "-c", "echo all; exit 3"]) as child:
        assert child.stdout.read() == b"all\n"
        wait_for(lambda: child.ended() == 3, 10)


@pytest.mark.parametrize("has_our_stdin", [False, True])
def test_stdin_is_ours_on_request(has_our_stdin: bool) -> None:
    script = f"""
        import sys
        from fledge_tasks.run import running
        with running(["cat"], has_our_stdin={has_our_stdin}) as child:
            sys.stdout.buffer.write(child.stdout.read())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], input=b"typed", capture_output=True, check=True
    )
    assert done.stdout == (b"typed" if has_our_stdin else b"")


@pytest.mark.parametrize("fails", [False, True])
def test_it_does_not_outlive_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    monkeypatch.setattr(run_module, "_TERMINATE_SECONDS", 0.2)
    script = f"trap '' TERM; sleep 100 & echo $! > {tmp_path}/child; echo $$; while :; do wait; done"
    numbers = []
    with contextlib.suppress(ZeroDivisionError), running(["sh", "-c", script]) as child:
        numbers = [int(child.stdout.readline()), int((tmp_path / "child").read_text())]
        assert all(map(is_running, numbers))
        if fails:
            1 / 0  # noqa: B018
    assert not is_running(numbers[0])
    wait_for(lambda: not is_running(numbers[1]), 1)


def test_a_program_that_is_not_there_cannot_run_beside_us() -> None:
    with pytest.raises(ToolError, match="fledge-no-such-program is not installed"), running(["fledge-no-such-program"]):
        pytest.fail("it runs")


def test_a_signal_in_the_midst_of_starting_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupted_popen(*argv: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*argv, **options))
        os.kill(os.getpid(), signal.SIGTERM)  # held until the program is noted
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted_popen)
    with interruptible(), pytest.raises(Interrupted):
        sh("sleep 60")
    process = started[0]
    assert process.returncode == -signal.SIGTERM
    assert process.stdout is not None and process.stdout.closed


def test_a_signal_that_another_thread_takes_ends_the_wait(tmp_path: Path) -> None:
    began = tmp_path / "began"

    def take() -> None:
        wait_for(began.exists, 10)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=take)
    thread.start()
    with interruptible(), pytest.raises(Interrupted):
        sh(f"touch {began}; sleep 20; touch {tmp_path}/ended")
    thread.join()
    assert not (tmp_path / "ended").exists()
