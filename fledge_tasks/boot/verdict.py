"""Waiting for a guest to show what it is worth."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fledge_tasks.boot.health import Answer, ask
from fledge_tasks.boot.qemu import LOOPBACK, TICK_SECONDS, Machine
from fledge_tasks.boot.workload import Workload

_CANNOT_RUN = {126: "it could not be run", 127: "it was not found"}


@dataclass(frozen=True)
class Verdict:
    """Whether a workload is healthy, or a job ended well, in words, and what it was judged by."""

    is_good: bool
    text: str
    answer: Answer | None = None
    exit_code: int | None = None


def judge(machine: Machine, workload: Workload, until: float) -> Verdict:
    """Wait until the workload is healthy, or a job has ended, at most until this moment of the monotonic clock.

    A workload that ends instead of getting healthy has failed, whatever it ends with.
    """
    check, last = workload.check, "the workload did not start"
    while not machine.has_ended():
        left = until - time.monotonic()
        if left <= 0:
            return Verdict(False, f"not healthy in time: {last}" if check else "the job did not end in time")
        if check and machine.port and machine.console.has_started:
            answer = ask(check, LOOPBACK, machine.port, max(TICK_SECONDS, min(left, check.timeout or left)))
            last = f"GET {check.target} at port {check.port}: {answer}"
            if isinstance(answer, Answer) and check.accepts(answer.status):
                return Verdict(True, last, answer)
        time.sleep(TICK_SECONDS)
    code = machine.console.exit_code()
    if code is None:
        return Verdict(False, "the guest ended before its workload did")
    note = f" ({_CANNOT_RUN[code]})" if code in _CANNOT_RUN else ""
    return Verdict(code == 0 and check is None, f"the workload ended with {code}{note}", exit_code=code)
