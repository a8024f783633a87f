"""Leases: what a running process holds stays held, and no longer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from fledge_tasks.digest import sha256_bytes
from fledge_tasks.leases import Leases

KEYS = [sha256_bytes(bytes([number])) for number in range(5)]


def held(folder: Path) -> set[str]:
    with Leases(folder).frozen() as keys:
        return set(keys)


def test_what_is_held(tmp_path: Path) -> None:
    one, other = Leases(tmp_path), Leases(tmp_path)
    assert held(tmp_path) == set()
    one.hold(KEYS[:2])
    other.hold(KEYS[1:3])
    one.hold(KEYS[:1])
    one.hold([KEYS[3]])
    assert held(tmp_path) == set(KEYS[:4])
    one.release()
    assert held(tmp_path) == set(KEYS[1:3])
    other.release()
    other.release()
    assert held(tmp_path) == set()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"], "leases without an owner are deleted"
    one.hold(KEYS[:1])
    assert held(tmp_path) == {KEYS[0]}


def test_a_lease_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fledge_tasks.leases import Leases\n"
        f"Leases(Path({str(tmp_path)!r})).hold([{KEYS[0]!r}]); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert held(tmp_path) == {KEYS[0]}
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert held(tmp_path) == set()


def test_who_makes_a_lease_deletes_those_without_an_owner(tmp_path: Path) -> None:
    other = Leases(tmp_path)
    other.hold(KEYS[:1])
    for _ in range(3):
        one = Leases(tmp_path)
        one.hold(KEYS[1:2])
        assert len(list(tmp_path.iterdir())) == 3, "the lock, the other, and this one"
        one.release()
    assert held(tmp_path) == {KEYS[0]}


def test_what_is_forked_adds_to_the_lease_and_keeps_it(tmp_path: Path) -> None:
    lease = Leases(tmp_path)
    lease.hold([])
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lease.hold([KEYS[1]])
        os.write(ready[1], b"x")
        os.read(go_on[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    assert len(list(tmp_path.iterdir())) == 2, "one lease for both"
    lease.release()
    assert held(tmp_path) == {KEYS[1]}, "the child still runs"
    os.write(go_on[1], b"x")
    os.waitpid(child, 0)
    assert held(tmp_path) == set()
    for fd in (*ready, *go_on):
        os.close(fd)


def test_nothing_is_added_while_they_are_frozen(tmp_path: Path) -> None:
    lease = Leases(tmp_path)
    lease.hold(KEYS[:1])
    adding = threading.Thread(target=lease.hold, args=(KEYS[1:2],))
    with Leases(tmp_path).frozen() as keys:
        adding.start()
        time.sleep(0.2)
        assert adding.is_alive()
        assert set(keys) == {KEYS[0]}
        assert KEYS[1].removeprefix("sha256:") not in "".join(path.read_text() for path in tmp_path.iterdir())
    adding.join(20)
    assert held(tmp_path) == set(KEYS[:2])


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    Leases(tmp_path / "file" / "leases").hold(KEYS)  # no error: nothing can be removed there either
