"""Notices: every line arrives, whoever wrote it and however it ended."""

from __future__ import annotations

import os
import signal

from fledge_tasks.notices import Notices


def test_lines_come_once_and_in_order() -> None:
    notices = Notices()
    assert notices.take() == []
    for line in ("one", "two", "one", "\udcff"):
        notices.add(line)
    assert notices.take() == ["one", "two", "?"]
    notices.add("three")
    assert notices.take() == ["three"]
    assert notices.take() == []


def test_lines_of_forked_processes_that_were_killed() -> None:
    notices = Notices()
    notices.add("before")
    children = []
    for number in range(4):
        if not (pid := os.fork()):
            for count in range(100):
                notices.add(f"{number} {count} " + "x" * 100)
            os.kill(os.getpid(), signal.SIGKILL)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    notices.add("after")
    first, *lines, last = notices.take()
    assert (first, last) == ("before", "after")
    assert sorted(lines) == sorted(f"{number} {count} " + "x" * 100 for number in range(4) for count in range(100))
