"""How tasks run, hardened: in this process, or each in a worker process of its own.

Both replace parts of doit 0.37's `doit/runner.py`; what runs when stays doit's choice.

- A worker is forked for one task. One that is killed is the failure of its task, where doit waits for
  ever. Only the outcome travels back, through a pipe of its own: no queue, no feeder thread, nothing
  of the task is pickled, so closures and tasks that were created late work too.
- SIGINT, SIGTERM and SIGHUP end the run: workers get SIGTERM, their `finally` blocks run, and what is
  left after a grace time is killed.
- A check that raises, or a setup task that failed, is the failure of one task, not of the run.

The fork and the end of a worker cost 5 ms to 10 ms with a graph of some thousand tasks: nothing
beside a task's work, and only tasks that have to run are forked for. Modules that a task imports late
are imported in each worker anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
import warnings
from collections import deque
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

from doit.control import ExecNode, TaskDispatcher
from doit.dependency import Dependency
from doit.exceptions import BaseFail, DependencyError, InvalidDodoFile, TaskError, UnmetDependency
from doit.runner import Runner
from doit.task import Stream, Task

from fledge_tasks import collector, interrupt, progress
from fledge_tasks.action import StageFailed
from fledge_tasks.errors import FledgeError
from fledge_tasks.interrupt import Interrupted
from fledge_tasks.reporter import Reporter

GRACE_SECONDS = 2.5  # more than run.py grants a program between SIGTERM and SIGKILL
_TICK_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl
_fork = multiprocessing.get_context("fork")


class SafeRunner(Runner):  # type: ignore[misc]  # doit has no types
    """doit's serial runner, hardened. `has_run` tells whether one was started in this process."""

    has_run = False

    def run_all(self, task_dispatcher: TaskDispatcher) -> int:
        """Run everything. Raises Interrupted, or FledgeError of a late task creator.

        When nobody else handles signals, that is in a bare `doit`, both end the way doit ends: a
        signal is SystemExit with 128 plus its number, an error is shown without a traceback.
        """
        SafeRunner.has_run = True
        with interrupt.interruptible() as bare:
            try:
                return int(super().run_all(task_dispatcher))
            except Interrupted as interrupted:
                if not bare:
                    raise
                sys.stderr.write("interrupted\n")
                raise SystemExit(interrupted.exit_code) from None
            except FledgeError as error:
                if not bare:
                    raise
                raise InvalidDodoFile(str(error)) from None

    def select_task(self, node: ExecNode, tasks_dict: dict[str, Task]) -> bool:
        """Tell whether a task has to run now; whatever goes wrong is the failure of this task."""
        interrupt.check()
        # Stock doit does not look at the setup tasks' failures when it selects a task again after them.
        if node.run_status == "run" and (bad := node.bad_deps + node.ignored_deps):
            self._handle_task_error(node, UnmetDependency(" ".join(dep.task.name for dep in bad)))
            return False
        try:
            return bool(super().select_task(node, tasks_dict))
        except FledgeError as error:
            self._handle_task_error(node, StageFailed(error))
        except Exception as error:
            self._handle_task_error(node, DependencyError(f"the check of {node.task.name} failed", error))
        return False

    def execute_task(self, task: Task) -> BaseFail | None:
        """Run a task's actions in this process."""
        if not isinstance(self.reporter, Reporter):
            return super().execute_task(task)
        listener = self.reporter.listener
        task.io.capture = False  # a listener that draws must find the real sys.stdout

        def sink(name: str, done_bytes: int, total_bytes: int | None) -> None:
            listener.advanced(name, done_bytes, total_bytes)
            listener.tick()

        with progress.reporting(task.name, sink), collector.resumed():
            return super().execute_task(task)


class _Outcome(NamedTuple):
    """What a worker sends: all that the main process needs to know of a task that ran elsewhere."""

    failure: BaseFail | None
    result: object
    values: dict[str, Any]
    out: list[str | None]
    err: list[str | None]


class WorkerRunner(SafeRunner):
    """Runs up to `num_process` tasks at once, each in a forked process of its own.

    Tasks with the same `meta["turn"]` run one after the other, and each is looked at when its turn
    has come: one may have done the work of the next, which would only wait for it in a worker. Whose
    work is done by the one that runs, as `meta["is_done"]` tells, does not wait for its end.
    """

    def __init__(  # doit passes everything by position
        self,
        dep_manager: Dependency,
        reporter: object,
        continue_: bool = False,
        always_execute: bool = False,
        stream: Stream | None = None,
        num_process: int = 1,
    ) -> None:
        super().__init__(dep_manager, reporter, continue_, always_execute, stream)
        self.num_process = max(1, num_process)
        self._running: dict[connection.Connection, tuple[ExecNode, BaseProcess]] = {}
        self._held: list[ExecNode] = []
        self._channel: progress.Channel | None = None

    @staticmethod
    def available() -> bool:
        """doit asks this of its process runner."""
        return True

    def run_tasks(self, task_dispatcher: TaskDispatcher) -> None:
        """Run what the dispatcher gives, until all is done or a failure stops the run.

        No worker is left when this returns or raises.
        """
        if isinstance(self.reporter, Reporter):
            self._channel = progress.Channel()
        try:
            self._run_tasks(task_dispatcher)
        finally:
            self._end_workers()
            if self._channel:
                self._channel.close()

    def _run_tasks(self, dispatcher: TaskDispatcher) -> None:
        finished: deque[ExecNode] = deque()  # the dispatcher has not been told yet
        more = True
        while more or self._running or self._held:
            while not self._stop_running and len(self._running) < self.num_process:
                node = self._take_held()
                if node is None:
                    if not more:
                        break
                    try:
                        node = dispatcher.generator.send(finished.popleft() if finished else None)
                    except StopIteration:
                        more = False
                        continue
                    if node == "hold on":  # every other task waits for one that runs
                        if finished:
                            continue
                        if not self._running:
                            raise InvalidDodoFile("tasks wait for each other in a circle")
                        break
                    if self._is_taken(node):
                        self._held.append(node)
                        continue
                if not self.select_task(node, dispatcher.tasks):
                    finished.appendleft(node)
                elif not self._start(node):
                    finished.append(node)
            if self._stop_running:
                more = False
                self._held.clear()
            finished.extend(self._wait())
            interrupt.check()

    def _is_taken(self, node: ExecNode) -> bool:
        """Tell whether a task of the same turn runs, and has not done the work of this one yet."""
        turn = _turn(node.task)
        if turn is None or all(_turn(other.task) != turn for other, _ in self._running.values()):
            return False
        return not node.task.meta["is_done"]()

    def _take_held(self) -> ExecNode | None:
        """Return the first task that was held back and whose turn has come."""
        for node in self._held:
            if not self._is_taken(node):
                self._held.remove(node)
                return node
        return None

    def _start(self, node: ExecNode) -> bool:
        """Start the task's worker. False: there is nothing to run in it, and the task is done."""
        task = node.task
        if task.teardown:
            self.teardown_list.append(task)
        self.reporter.execute_task(task)
        if not task.actions:
            self.process_task_result(node, task.execute(self.stream))
            return False
        receiver, sender = _fork.Pipe(duplex=False)
        # An interrupt between the fork and the note of it would lose the worker; in the worker it would
        # run the main process's handlers.
        with interrupt.held(), warnings.catch_warnings(), sender:
            # Python 3.12 warns of any fork beside threads. Ours has none; a program that embeds us may.
            warnings.simplefilter("ignore", DeprecationWarning)
            worker = _fork.Process(target=self._work, args=(task, sender, os.getpid()), name=task.name)
            worker.start()
            self._running[receiver] = node, worker
        return True

    def _work(self, task: Task, sender: connection.Connection, parent: int) -> None:
        """Run in the worker: execute one task and send what came of it."""
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
        try:
            interrupt.handle_in_worker()
            collector.resume_in_worker()
            with progress.reporting(task.name, self._channel.send) if self._channel else contextlib.nullcontext():
                failure = task.execute(self.stream)
            sys.stdout.flush()
            sys.stderr.flush()
            sender.send_bytes(_pickled(task, failure))
        except Interrupted as interrupted:
            sys.exit(interrupted.exit_code)
        os._exit(0)  # without waiting for threads that a task may have left

    def _wait(self) -> list[ExecNode]:
        """Wait for workers, a tick long at most; return the nodes of those that ended."""
        with interrupt.held():
            ready = connection.wait(list(self._running), _TICK_SECONDS) if self._running else []
            if self._channel:
                self._channel.drain(self.reporter.listener.advanced)
                self.reporter.listener.tick()
            return [self._collect(receiver) for receiver in list(self._running) if receiver in ready]

    def _collect(self, receiver: connection.Connection) -> ExecNode:
        node, worker = self._running[receiver]
        task, outcome = node.task, None
        with contextlib.suppress(EOFError, OSError):  # it died before or while it sent
            outcome = _Outcome(*pickle.loads(receiver.recv_bytes()))  # of our own child
        worker.join()
        receiver.close()
        del self._running[receiver]
        if outcome is None:
            failure: BaseFail | None = StageFailed(_death(worker.exitcode))
        else:
            failure, task.result = outcome.failure, outcome.result
            task.values.update(outcome.values)
            for action, out, err in zip(task.actions, outcome.out, outcome.err, strict=True):
                action.out, action.err = out, err
        task.executed = True
        self.process_task_result(node, failure)
        return node

    def _end_workers(self) -> None:
        workers = [worker for _, worker in self._running.values()]
        for worker in workers:
            worker.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.kill()
                worker.join()
        for receiver in self._running:
            receiver.close()
        self._running.clear()


def _turn(task: Task) -> object:
    return (task.meta or {}).get("turn")


def _pickled(task: Task, failure: BaseFail | None) -> bytes:
    """Return the outcome of a task as bytes that are known to come back."""
    out, err = [action.out for action in task.actions], [action.err for action in task.actions]
    try:
        data = pickle.dumps(tuple(_Outcome(failure, task.result, task.values, out, err)))
        pickle.loads(data)
    except Exception as error:
        lost = TaskError(
            f"the outcome of the task cannot leave its worker process: {error}\n{failure.get_msg() if failure else ''}"
        )
        return pickle.dumps(tuple(_Outcome(lost, None, {}, out, err)))
    return data


def _death(exitcode: int | None) -> FledgeError:
    if exitcode is not None and exitcode < 0:
        how = f"was killed by signal {-exitcode} ({signal.strsignal(-exitcode)})"
        hint = "the machine may have run out of memory: try fewer jobs" if exitcode == -signal.SIGKILL else None
        return FledgeError(f"the worker process of this task {how}", hint=hint)
    return FledgeError(f"the worker process of this task ended without a result (exit code {exitcode})")
