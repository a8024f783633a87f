"""Running as root of a user namespace of our own, in which other owners than ourselves can be given to files.

A plain user becomes root of the new namespace, and the ids subordinate to that user are the ids from
1 on (user_namespaces(7), subuid(5)). What is made in it belongs to those ids outside as well, so a
folder of them can only be removed by the same way: see `remove_tree`. Whoever may give files to
anybody already, as root in a container does, needs no namespace and gets none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fledge_tasks import fsutil, interrupt
from fledge_tasks.errors import CommandError, FilesystemError, FledgeError, ToolError
from fledge_tasks.interrupt import Interrupted
from fledge_tasks.run import package_of, run

if TYPE_CHECKING:  # the store asks for this module, and a build that does nothing for no process
    from multiprocessing import connection

T = TypeVar("T")
SUBUID, SUBGID = Path("/etc/subuid"), Path("/etc/subgid")
_GRANT = re.compile(r"([^:]+):([0-9]{1,10}):([0-9]{1,10})")  # subuid(5)
CAP_SYS_ADMIN = 21
# What root needs to write a tree as it is: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_FSETID, CAP_SETFCAP.
_OWNING = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 31
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_GRACE_SECONDS = 2.0
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Ids:
    """The ids that files can be given inside, as (first, count) in order, for users and for groups."""

    users: tuple[tuple[int, int], ...]
    groups: tuple[tuple[int, int], ...]

    def hold(self, uid: int, gid: int) -> bool:
        """Tell whether a file can belong to this user and this group."""
        return _is_in(uid, self.users) and _is_in(gid, self.groups)


def capabilities() -> int:
    """Return the bits of this process's effective capabilities (capabilities(7), /proc/self/status)."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1], 16) if match else 0


def ids() -> Ids:
    """Return the ids that there are where `call` runs things. Raises FilesystemError when there are none but ours."""
    if _is_needless():
        return Ids(_mapped(Path("/proc/self/uid_map")), _mapped(Path("/proc/self/gid_map")))
    counts = [sum(count for _, count in _subordinate(file)) for file in (SUBUID, SUBGID)]
    return Ids(((0, 1 + counts[0]),), ((0, 1 + counts[1]),))


def obstacle() -> FilesystemError | None:
    """Return why files cannot be given to others here, None if they can. It is tried out."""
    try:
        call(_give_away)
    except FilesystemError as error:
        return error
    except OSError as error:
        limits = "user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_userns"
        hint = f"allow them: a container may forbid them, or sysctl ({limits})"
        return FilesystemError(f"user namespaces cannot be used here: {error.strerror}", hint=hint)
    return None


def call(function: Callable[[], T]) -> T:
    """Return what a function returns that runs as root of a user namespace, in a process forked for it.

    The result must be one that can be pickled. Raises what it raises, if that is a FledgeError or an
    OSError, and FilesystemError when there is no such namespace to be had. The process ends with us;
    when we are interrupted it gets SIGTERM, which is raised in it, and a little later SIGKILL.
    """
    if _is_needless():
        return function()
    import multiprocessing

    ranges = _subordinate(SUBUID), _subordinate(SUBGID)
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    waiting, go = fork.Pipe(duplex=False)
    # As in workers.py: nobody may lose the process, and it must not run our handlers.
    with interrupt.held(), warnings.catch_warnings(), sender, waiting:
        warnings.simplefilter("ignore", DeprecationWarning)
        process = fork.Process(target=_inside, args=(function, waiting, sender, (receiver, go), os.getpid()))
        process.start()
    with receiver, go:
        try:
            _answer(receiver)
            _map_ids(process.pid, ranges)
            go.send(None)
            return _answer(receiver)  # type: ignore[return-value]  # what the function returned
        except BaseException:
            process.terminate()
            raise
        finally:
            process.join(_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def remove_tree(path: Path) -> None:
    """Delete a file or folder, also if it belongs to subordinate ids. Idempotent; what cannot be deleted stays.

    A signal is raised when all is gone.
    """

    def remove() -> None:
        fsutil.remove_tree(path)
        if path.is_dir() and not _is_needless():
            with contextlib.suppress(FledgeError, OSError):
                call(lambda: shutil.rmtree(path, ignore_errors=True))

    interrupt.finish(remove)


def _give_away() -> None:
    import tempfile

    with tempfile.TemporaryFile() as file:
        os.fchown(file.fileno(), 1, 1)


def _is_needless() -> bool:
    return capabilities() & _OWNING == _OWNING


def _is_in(number: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(first <= number < first + count for first, count in ranges)


def _mapped(file: Path) -> tuple[tuple[int, int], ...]:
    """Return (first, count) of the ids inside, of a uid_map or gid_map."""
    return tuple((int(first), int(count)) for first, _, count in map(str.split, file.read_text().splitlines()))


def _subordinate(file: Path) -> list[tuple[int, int]]:
    """Return (first, count) of the ids that a file in the format of subuid(5) grants to this user."""
    uid = os.getuid()
    names = {str(uid)}
    with contextlib.suppress(KeyError):
        names.add(pwd.getpwuid(uid).pw_name)
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    found: list[tuple[int, int]] = []
    for line in filter(None, map(_GRANT.fullmatch, lines)):
        first, count = int(line[2]), int(line[3])
        # Linux takes no empty range, and no id twice, as when a user is granted the same by name and by number.
        is_free = all(first + count <= other or other + size <= first for other, size in found)
        if line[1] in names and count and is_free:
            found.append((first, count))
    if not found:
        name = min(names, key=str.isdecimal)
        raise FilesystemError(
            f"{file} grants no subordinate ids to {name}",
            hint=f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}",
        )
    return found


def _map_ids(pid: int | None, ranges: tuple[list[tuple[int, int]], list[tuple[int, int]]]) -> None:
    """Make our own id 0 in the namespace of a process, and our subordinate ids those from 1 on."""
    for program, own, found in zip(("newuidmap", "newgidmap"), (os.getuid(), os.getgid()), ranges, strict=True):
        lines, inside = [0, own, 1], 1
        for first, count in found:
            lines += [inside, first, count]
            inside += count
        try:
            run([program, str(pid), *map(str, lines)])
        except ToolError as error:
            raise FilesystemError(error.message, hint=error.hint) from None
        except CommandError as error:
            hint = f"as root, if it is not set-user-ID any more: apt-get install --reinstall {package_of(program)}"
            raise FilesystemError(f"a user namespace cannot be set up: {error.stderr.strip()}", hint=hint) from None


def _answer(receiver: connection.Connection) -> object:
    try:
        while not receiver.poll(interrupt.LISTEN_SECONDS):
            pass
        outcome = receiver.recv()  # of our own child
    except EOFError:
        raise FilesystemError("the process in the user namespace ended without a result") from None
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _inside(
    function: Callable[[], object],
    waiting: connection.Connection,
    sender: connection.Connection,
    others: tuple[connection.Connection, ...],
    parent: int,
) -> None:
    """Run in the new process, to its end."""
    try:
        interrupt.handle_in_worker()
        for end in others:
            end.close()
        try:
            if _libc.unshare(_CLONE_NEWUSER) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            sender.send(None)
            waiting.recv()  # until the ids are there
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # forgotten when ids change (prctl(2))
            if os.getppid() != parent:
                os._exit(1)
            sender.send(function())
        except EOFError:
            os._exit(1)  # nobody waits for us any more
        except (FledgeError, OSError) as error:
            sender.send(error)
    except Interrupted as interrupted:
        sys.exit(interrupted.exit_code)
    os._exit(0)
