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
from doit.cmd_base import Command, TaskLoader2, check_tasks_exist
from doit.cmd_info import Info
from doit.control import TaskControl
from doit.dependency import Dependency
from doit.exceptions import InvalidCommand, InvalidDodoFile, InvalidTask
from doit.task import Stream

from fledge_tasks.errors import FledgeError, InputError
from fledge_tasks.interrupt import interruptible
from fledge_tasks.reporter import Listener, Reporter, TaskResult
from fledge_tasks.shapes import suggestion
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
        """Remember a value of a task. Raises InvalidCommand for `doit ignore`, which asks for more than that."""
        if dependency == "ignore:":
            raise InvalidCommand(f"{task_id} cannot be ignored: nothing is kept for the next run")
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
    """Make `doit` in this process use the runners above, for every `-n` and `-P`. Idempotent.

    `-P thread` runs processes too: a thread cannot be ended, and doit mixes up the output of threads.
    For an unknown task `doit run` says what may have been meant, and `doit info` no longer crashes.
    """
    cmd_run.Runner = SafeRunner
    cmd_run.MRunner = cmd_run.MThreadRunner = WorkerRunner
    TaskControl.process = _process
    Info._execute = _info


class _UnknownTaskError(InvalidCommand):  # type: ignore[misc]  # doit has no types
    """What doit says of an unknown task, and a hint."""

    def __init__(self, name: str, hint: str) -> None:
        super().__init__(not_found=name)
        self.hint = hint

    def __str__(self) -> str:
        return f"{super().__str__().rstrip()}\n  hint: {self.hint}"


_doit_process, _doit_info = TaskControl.process, Info._execute


def _process(self: TaskControl, task_selection: Sequence[str] | None) -> None:
    try:
        _doit_process(self, task_selection)
    except InvalidCommand as error:
        if hint := suggestion(error.not_found, [name for name in self.tasks if not name.startswith("_")]):
            raise _UnknownTaskError(error.not_found, hint) from None
        raise


def _info(self: Info, pos_args: Sequence[str], hide_status: bool = False) -> int:  # doit looks at the names
    check_tasks_exist({task.name for task in self.task_list}, pos_args)
    return int(_doit_info(self, pos_args, hide_status))


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
