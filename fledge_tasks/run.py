"""The only place that starts programs.

Programs run in a session of their own, with stdin empty, or fed by us, and a clean environment, so that no
setting of the caller leaks into a result; what happens to us happens to them: when a signal or an
exception ends the wait, the whole process group is ended too, and it does not outlive us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shlex
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fledge_tasks import interrupt
from fledge_tasks.errors import CommandError, ToolError

STDERR_TAIL_BYTES = 4096
_PACKAGES = {
    "mke2fs": "e2fsprogs", "e2fsck": "e2fsprogs",
    "mkfs.xfs": "xfsprogs", "xfs_growfs": "xfsprogs", "xfs_repair": "xfsprogs", "xfs_db": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs", "btrfs": "btrfs-progs", "btrfstune": "btrfs-progs",
    "qemu-system-x86_64": "qemu-system-x86", "busybox": "busybox-static",
    "qemu-img": "qemu-utils", "veritysetup": "cryptsetup-bin",
    "newuidmap": "uidmap", "newgidmap": "uidmap",
    "tar2sqfs": "squashfs-tools-ng", "sqfstar": "squashfs-tools",
    "mkfs.erofs": "erofs-utils", "fsck.erofs": "erofs-utils",
}  # fmt: skip
_READ_BYTES = 1 << 16
_TERMINATE_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None, use_errno=True).prctl

PASSED_PATHS = (
    "HOME", "TMPDIR", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME",
    "REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "DOCKER_CERT_PATH",
    "CONTAINERS_CONF", "CONTAINERS_REGISTRIES_CONF", "CONTAINERS_STORAGE_CONF",
    "SSL_CERT_FILE",
)  # fmt: skip
PASSED = (
    *PASSED_PATHS, "SSL_CERT_DIR", "PATH", "DOCKER_HOST", "DOCKER_TLS_VERIFY", "STORAGE_DRIVER",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "no_proxy", "all_proxy",
)  # fmt: skip


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment that programs get: a fixed locale and zone, and a few variables of ours.

    The passed ones only say where things are (home, proxies, credentials), never what comes out.
    """
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    # Relative ones start at our folder, and programs run in others.
    passed |= {name: _absolute(passed[name]) for name in PASSED_PATHS if passed.get(name)}
    if folders := passed.get("SSL_CERT_DIR"):  # a list (Go's crypto/x509, OpenSSL)
        passed["SSL_CERT_DIR"] = ":".join(map(_absolute, folders.split(":")))
    path = passed.get("PATH", "/usr/local/bin:/usr/bin:/bin")
    # mke2fs and its kind live where a plain user's PATH does not look on Debian.
    path = ":".join(dict.fromkeys([*path.split(":"), "/usr/sbin", "/sbin"]))
    return {**passed, "PATH": path, "LC_ALL": "C.UTF-8", "TZ": "UTC", **(extra or {})}


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    hint: str | None = None,
    feed: Callable[[int], None] | None = None,
) -> bytes:
    """Run a program to its end and return what it wrote to stdout.

    `feed` writes what the program reads to the descriptor of a pipe, in a thread of its own; what it raises
    ends the program and is raised here. When the program ends before it has read all, its own failure counts.

    Raises ToolError when it is not there, CommandError when it exits with anything but 0; the
    message holds a line that runs the same command again and the end of its stderr. When this call
    is interrupted, the program and its children get SIGTERM, then SIGKILL.
    """
    command = [str(argument) for argument in argv]
    with tempfile.TemporaryFile() as errors:
        with _started(command, errors, env=env, cwd=cwd, feed=feed) as process:
            output = _output(process)
        if process.returncode == 0:
            return output
        stderr = _tail(errors)
    replay = " ".join([*(f"{key}={shlex.quote(value)}" for key, value in (env or {}).items()), shlex.join(command)])
    ended = (
        f"exited with {process.returncode}"
        if process.returncode > 0
        else f"was killed by {_signal_name(-process.returncode)}"
    )
    raise CommandError(
        f"{Path(command[0]).name} {ended}\n  command: {replay}\n  {stderr.strip() or '(it printed nothing)'}",
        returncode=process.returncode,
        stderr=stderr,
        output=output,
        hint=hint,
    )


def _output(process: subprocess.Popen[bytes]) -> bytes:
    """Wait for the program's end, and return what it wrote to stdout."""
    assert process.stdout is not None
    descriptor, pieces = process.stdout.fileno(), []
    readable = select.poll()
    readable.register(descriptor, select.POLLIN)
    while True:
        if readable.poll(interrupt.LISTEN_SECONDS * 1000):
            if not (piece := os.read(descriptor, _READ_BYTES)):
                break
            pieces.append(piece)
    process.wait()
    return b"".join(pieces)


def _absolute(path: str) -> str:
    """Return where a path leads. 'link/..' stays: it is not where the link is."""
    return path if os.path.isabs(path) else os.path.join(os.getcwd(), path)


@dataclass(frozen=True)
class Child:
    """A program that runs beside us. `stdout` is for the caller to read, or the program waits."""

    process: subprocess.Popen[bytes]
    stdout: IO[bytes]
    errors: IO[bytes]

    def ended(self) -> int | None:
        """Return its exit code, minus the number of the signal that killed it, None while it runs."""
        return self.process.poll()

    def complaint(self) -> str:
        """Return the end of what it wrote to stderr so far."""
        return _tail(self.errors).strip()

    def end(self) -> None:
        """End it, with SIGTERM and then SIGKILL. Idempotent; what it wrote can be read still."""
        _end(self.process)


@contextlib.contextmanager
def running(
    argv: Sequence[str | Path], *, descriptors: Sequence[int] = (), has_our_stdin: bool = False
) -> Iterator[Child]:
    """Run a program beside this block, which it does not outlive.

    It inherits `descriptors`, under the same numbers, and on request stdin. Raises ToolError as `run`.
    """
    command = [str(argument) for argument in argv]
    with (
        tempfile.TemporaryFile() as errors,
        _started(command, errors, descriptors=descriptors, has_our_stdin=has_our_stdin) as process,
    ):
        assert process.stdout is not None
        child = Child(process, process.stdout, errors)
        yield child
        child.end()


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    errors: IO[bytes],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    descriptors: Sequence[int] = (),
    has_our_stdin: bool = False,
    feed: Callable[[int], None] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program and yield it; any exception of the block, or of `feed`, ends it and its children."""
    process: subprocess.Popen[bytes] | None = None
    feeder: _Feeder | None = None
    try:
        # A signal between the fork and the note of it would leave a program that nobody ends. One that
        # was held is raised where the block ends, when the program is noted.
        with interrupt.held():
            process = subprocess.Popen(
                command,
                stdin=None if has_our_stdin else subprocess.PIPE if feed else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(env),
                cwd=cwd,
                pass_fds=descriptors,
                start_new_session=True,
                preexec_fn=_begin,  # noqa: PLW1509
            )
            # Its thread takes no signals either: they must interrupt whoever waits.
            feeder = _Feeder(process, feed) if feed else None
        with process.stdout or contextlib.nullcontext():
            yield process
    except BaseException as error:
        if process is not None:
            _end(process)
            if feeder:
                feeder.join()
            if process.stdout:  # open still when a held signal was raised
                process.stdout.close()
            raise
        if isinstance(error, FileNotFoundError):
            raise ToolError(
                f"{command[0]} is not installed (not found on PATH)",
                hint=f"install it, for example: sudo apt-get install {package_of(command[0])}",
            ) from None
        if isinstance(error, PermissionError):
            raise ToolError(f"{command[0]} cannot be started: {error.strerror}") from None
        raise
    if feeder and (failure := feeder.join()):
        raise failure


class _Feeder:
    """A thread that writes what a program reads."""

    def __init__(self, process: subprocess.Popen[bytes], feed: Callable[[int], None]) -> None:
        assert process.stdin is not None
        self._process, self._feed, self._stdin = process, feed, process.stdin
        self._failure: BaseException | None = None
        process.stdin = None  # closed here, and by nobody else
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._stdin:
                self._feed(self._stdin.fileno())
        except BrokenPipeError:
            pass  # the program has ended: its exit code says how
        except BaseException as error:
            self._failure = error
            self._process.kill()

    def join(self) -> BaseException | None:
        """Wait for the end, which comes when the program's does, and return what was raised."""
        self._thread.join()
        return self._failure


def package_of(program: str) -> str:
    """Return the Debian package that holds a program of ours."""
    name = Path(program).name
    return _PACKAGES.get(name, name)


def _begin() -> None:
    """Run in the new process: die with the parent, and listen to signals, which were held."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupt.SIGNALS)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # else its number may be somebody else's by now
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(_TERMINATE_SECONDS)
        # Whatever became of the leader: its children may be slower, or not listen at all.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _signal_name(number: int) -> str:
    # Most real-time signals have no name.
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _tail(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - STDERR_TAIL_BYTES))
    return file.read().decode(errors="replace")
