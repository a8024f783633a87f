"""What a run tells: a result for each task, and events for whoever shows them.

doit speaks to a reporter; this one writes nothing itself. It turns doit's calls into `TaskResult`
values and into calls of a `Listener`, all in the main process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from doit.exceptions import BaseFail, UnmetDependency
from doit.task import Task

from fledge_tasks.action import StageFailed


@dataclass(frozen=True)
class TaskResult:
    """How one task ended.

    status   'hit' nothing had to be done, 'built', 'failed', or 'skipped' because a task that it
             needs failed
    seconds  from its start to its end, 0 for a task that was not started
    values   what its action returned
    error    of a failed task: the FledgeError, or a text (with traceback) for anything unforeseen;
             of a skipped one: a text that names what failed
    key      `task.meta['key']`, as its up-to-date check left it
    """

    status: Literal["hit", "built", "failed", "skipped"]
    seconds: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    error: BaseException | str | None = None
    key: str | None = None


class Listener(Protocol):
    """Follows a run. Called in the main process only, and not by two threads at once."""

    def started(self, task: str) -> None:
        """A task's action is about to run."""

    def finished(self, task: str, result: TaskResult) -> None:
        """A task ended; for hits, skipped tasks and failed checks without `started` before it."""

    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        """A running task counted further; numbers may start again when a task has several parts."""

    def tick(self) -> None:
        """Time has passed: about ten times a second while workers run."""


class NullListener:
    """Listens to nothing."""

    def started(self, task: str) -> None: ...
    def finished(self, task: str, result: TaskResult) -> None: ...
    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None: ...
    def tick(self) -> None: ...


class Reporter:
    """doit's reporter interface. `results` holds a result for each task with actions, once it ended."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.results: dict[str, TaskResult] = {}
        self.runtime_errors: list[str] = []
        self._started: dict[str, float] = {}

    def execute_task(self, task: Task) -> None:
        """doit: an action is about to run."""
        if task.actions:
            self._started[task.name] = time.monotonic()
            self.listener.started(task.name)

    def add_success(self, task: Task) -> None:
        """doit: all actions ended well."""
        self._finish(task, "hit" if task.values.get("status") == "hit" else "built")

    def add_failure(self, task: Task, fail: BaseFail) -> None:
        """doit: an action or a check failed, or a task cannot run since another failed."""
        if isinstance(fail, UnmetDependency):
            self._finish(task, "skipped", f"not run, because it needs what failed: {fail.message}")
        elif isinstance(fail, StageFailed):
            self._finish(task, "failed", fail.error)
        else:
            self._finish(task, "failed", fail.get_msg().strip())

    def skip_uptodate(self, task: Task) -> None:
        """doit: up to date."""
        self._finish(task, "hit")

    def runtime_error(self, message: str) -> None:
        """doit: the run cannot go on, and no single task is to blame."""
        self.runtime_errors.append(message)

    def cleanup_error(self, fail: BaseFail) -> None:
        """doit: a teardown action failed."""
        self.runtime_errors.append(fail.get_msg().strip())

    def get_status(self, task: Task) -> None:
        """doit: a task is about to be checked."""

    def skip_ignore(self, task: Task) -> None:
        """doit: `doit ignore` was said of a task; there is no such thing without a state file."""

    def teardown_task(self, task: Task) -> None:
        """doit: a teardown action is about to run."""

    def complete_run(self) -> None:
        """doit: the run is over, whatever its end."""

    def _finish(
        self,
        task: Task,
        status: Literal["hit", "built", "failed", "skipped"],
        error: BaseException | str | None = None,
    ) -> None:
        if not task.actions:
            return
        started = self._started.pop(task.name, None)
        seconds = 0.0 if started is None else time.monotonic() - started
        result = TaskResult(status, seconds, dict(task.values), error, (task.meta or {}).get("key"))
        self.results[task.name] = result
        self.listener.finished(task.name, result)
