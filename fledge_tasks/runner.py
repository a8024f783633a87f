"""Runs a doit graph so that nothing hangs, nothing is left behind and no error is lost.

`run` embeds doit in this process and returns what came of each task; `harden` gives the same safety to
a bare `doit`. How tasks run is told in `workers`. Project-independent: this layer knows tasks, not
what they build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from doit import cmd_run
from doit.cmd_base import Command, TaskLoader2
from doit.control import TaskControl
from doit.dependency import Dependency
from doit.exceptions import InvalidCommand, InvalidDodoFile, InvalidTask
from doit.task import Stream

from fledge_tasks.errors import FledgeError, InputError
from fledge_tasks.interrupt import interruptible
from fledge_tasks.reporter import Listener, Reporter, TaskResult
from fledge_tasks.workers import SafeRunner, WorkerRunner


class MemoryDB:
    """A doit state backend that forgets: the content store is the truth, so there is nothing to keep.

    No file, no lock, no corruption. Values need not be JSON.
    """

    desc = "in memory, nothing is saved"

    def __init__(self, name: str, codec: object, *, module_name: str | None = None) -> None:
        del codec, module_name  # part of doit's interface
        self.name = name
        self._state: dict[str, dict[str, Any]] = {}

    def set(self, task_id: str, dependency: str, value: object) -> None:
        """Remember a value of a task."""
        self._state.setdefault(task_id, {})[dependency] = value

    def get(self, task_id: str, dependency: str) -> Any:
        """Return a remembered value, or None."""
        return self._state.get(task_id, {}).get(dependency)

    def in_(self, task_id: str) -> bool:
        """Tell whether anything is remembered of a task."""
        return task_id in self._state

    def remove(self, task_id: str) -> None:
        """Forget a task."""
        self._state.pop(task_id, None)

    def remove_all(self) -> None:
        """Forget everything."""
        self._state.clear()

    def dump(self) -> None:
        """Save nothing."""


def harden() -> None:
    """Make `doit run` in this process use the runners above, for every `-n` and `-P`. Idempotent.

    `-P thread` runs processes too: a thread cannot be ended, and doit mixes up the output of threads.
    """
    cmd_run.Runner = SafeRunner
    cmd_run.MRunner = cmd_run.MThreadRunner = WorkerRunner


class _RunCommand(Command):  # type: ignore[misc]  # doit has no types
    """What a loader sees as the command that it loads tasks for."""

    name = "run"
    execute_tasks = True


@dataclass(frozen=True)
class Outcome:
    """What came of a run: a result for each task with actions that was looked at, by name.

    A task that was never selected, or not reached before a failure ended the run, is absent.
    """

    results: Mapping[str, TaskResult]

    @property
    def failures(self) -> dict[str, TaskResult]:
        """The failed tasks, without those that were skipped because of them."""
        return {name: result for name, result in self.results.items() if result.status == "failed"}


def run(
    loader: TaskLoader2, targets: Sequence[str], *, jobs: int, listener: Listener, keep_going: bool = True
) -> Outcome:
    """Run the tasks `targets` (or the loader's default tasks) and all that they need.

    One job runs in this process, more in worker processes. Failed tasks do not raise: with
    `keep_going` everything that does not need them still runs. doit's state is kept in memory, no
    configuration file is read, nothing is printed.

    Raises InputError for an unknown target, Interrupted for a signal, FledgeError for a graph that
    cannot run, and what the loader raises. No worker is left in any case.
    """
    reporter = Reporter(listener)
    with interruptible():
        try:
            loader.setup({})
            config = loader.load_doit_config()
            control = TaskControl(loader.load_tasks(cmd=_RunCommand(), pos_args=list(targets)))
            # doit loses every target behind one that it has seen before.
            control.process(list(dict.fromkeys(targets)) or config.get("default_tasks"))
            common = (Dependency(MemoryDB, ":memory:"), reporter, keep_going, False, Stream(0))
            runner = SafeRunner(*common) if jobs <= 1 else WorkerRunner(*common, num_process=jobs)
            runner.run_all(control.task_dispatcher())
        except InvalidCommand as error:
            hint = "`fledge list` and `doit list` show what there is"
            raise InputError(f"there is no task {error.not_found}", hint=hint) from None
        except (InvalidTask, InvalidDodoFile) as error:
            raise FledgeError(f"the tasks cannot be run: {error}") from error
    if reporter.runtime_errors:
        raise FledgeError("\n".join(reporter.runtime_errors))
    return Outcome(reporter.results)
