"""The runner, on graphs of its own: each row is something that stock doit 0.37 gets wrong, or a status."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from doit import cmd_run
from doit.cmd_base import TaskLoader2
from doit.task import DelayedLoader, Task
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks import progress
from fledge_tasks.action import StageAction, StageFailed
from fledge_tasks.errors import CommandError, ConfigError, FledgeError, InputError, LockError, MappingError, Problem
from fledge_tasks.interrupt import Interrupted, interruptible
from fledge_tasks.reporter import NullListener, TaskResult
from fledge_tasks.runner import MemoryDB, Outcome, harden, run
from fledge_tasks.workers import SafeRunner, WorkerRunner
from tests.tools import wait_for

ROOT = Path(__file__).parent.parent
JOBS = pytest.mark.parametrize("jobs", [1, 4])


class Loader(TaskLoader2):  # type: ignore[misc]  # doit has no types
    def __init__(self, tasks: Iterable[Task], default: Sequence[str] = ()) -> None:
        super().__init__()
        self.tasks = list(tasks)
        self.default = list(default)

    def setup(self, opt_values: Mapping[str, Any]) -> None: ...

    def load_doit_config(self) -> dict[str, Any]:
        return {"default_tasks": self.default} if self.default else {}

    def load_tasks(self, cmd: Any, pos_args: list[str]) -> list[Task]:
        assert cmd.execute_tasks
        assert isinstance(pos_args, list)
        return self.tasks


class Recorder(NullListener):
    """Records every event, and that it came in the process and thread that started the run."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.ticks = 0
        self.pid = os.getpid()

    def _add(self, *event: Any) -> None:
        assert os.getpid() == self.pid
        assert threading.current_thread() is threading.main_thread()
        self.events.append(event)

    def started(self, task: str) -> None:
        self._add("started", task)

    def finished(self, task: str, result: TaskResult) -> None:
        self._add(result.status, task)

    def advanced(self, task: str, done_bytes: int, total_bytes: int | None) -> None:
        self._add("advanced", task, done_bytes, total_bytes)

    def tick(self) -> None:
        self.ticks += 1


def task(
    name: str,
    function: Callable[..., Mapping[str, Any] | None] | None = None,
    *args: object,
    fresh: bool | Callable[[], bool] = False,
    setup: Sequence[str] = (),
    needs: Sequence[str] = (),
    key: object = None,
) -> Task:
    action = [StageAction(function or build, args)]
    return Task(name, action, uptodate=[fresh], setup=setup, task_dep=needs, meta={"key": key})


def group(name: str, *needs: str) -> Task:
    return Task(name, None, task_dep=needs, has_subtask=True)


def build() -> dict[str, Any]:
    return {"bytes": 7}


def find_it_done() -> dict[str, Any]:
    return {"status": "hit"}


def fail(error: BaseException) -> None:
    raise error


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def status(outcome: Outcome) -> dict[str, str]:
    return {name: result.status for name, result in outcome.results.items()}


def run_tasks(jobs: int, *tasks: Task, targets: Sequence[str] = (), keep_going: bool = True) -> Outcome:
    return run(Loader(tasks), targets, jobs=jobs, listener=Recorder(), keep_going=keep_going)


# Statuses and events


@JOBS
def test_statuses_values_and_keys(jobs: int) -> None:
    outcome = run_tasks(
        jobs,
        task("hit", fresh=True, key="k1"),
        task("built", setup=["hit"], key="k2"),
        task("late-hit", find_it_done),
        task("failed", fail, FledgeError("no")),
        task("skipped", needs=["failed"]),
        task("also-skipped", needs=["all"]),
        group("all", "hit", "skipped"),
    )
    assert status(outcome) == {
        "hit": "hit",
        "built": "built",
        "late-hit": "hit",
        "failed": "failed",
        "skipped": "skipped",
        "also-skipped": "skipped",
    }
    assert outcome.results["built"].values == {"bytes": 7}
    assert (outcome.results["hit"].key, outcome.results["built"].key) == ("k1", "k2")
    assert outcome.results["hit"].seconds == 0
    assert 0 < outcome.results["built"].seconds < 30
    assert "failed" in str(outcome.results["skipped"].error)
    assert list(outcome.failures) == ["failed"]


@JOBS
def test_events_come_in_order(jobs: int) -> None:
    recorder = Recorder()
    tasks = [task("a"), task("b", setup=["a"]), task("c", fresh=True), group("all", "b", "c")]
    run(Loader(tasks), ["all"], jobs=jobs, listener=recorder)
    events = [event for event in recorder.events if event[0] != "advanced"]
    assert events.index(("started", "a")) < events.index(("built", "a")) < events.index(("started", "b"))
    assert sorted(events) == sorted([("started", "a"), ("built", "a"), ("started", "b"), ("built", "b"), ("hit", "c")])


@JOBS
def test_only_what_is_selected_is_looked_at(jobs: int) -> None:
    tasks = [task("a"), task("b"), task("c", setup=["d"], fresh=True), task("d")]
    assert status(run_tasks(jobs, *tasks, targets=["a", "a", "c"])) == {"a": "built", "c": "hit"}
    assert status(run(Loader(tasks, ["b"]), [], jobs=jobs, listener=NullListener())) == {"b": "built"}


def test_the_key_is_the_one_that_the_check_left(tmp_path: Path) -> None:
    def check(task: Task, values: Mapping[str, Any]) -> bool:  # noqa: ARG001  # doit looks at the names
        task.meta["key"] = "from the check"
        return False

    tasks = [Task("a", [StageAction(build)], uptodate=[check], meta={})]
    assert run(Loader(tasks), [], jobs=2, listener=NullListener()).results["a"].key == "from the check"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_printed_or_written(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.doit]\nbackend = "json"\nverbosity = 2\n')
    monkeypatch.chdir(tmp_path)
    run_tasks(2, task("a"), task("b", fail, FledgeError("no")), task("c", fail, ValueError("bug")))
    run_tasks(1, task("a"), task("b", fail, FledgeError("no")), task("c", fail, ValueError("bug")))
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == ["pyproject.toml"]


@JOBS
def test_a_late_task_runs_with_a_closure_as_its_action(jobs: int, tmp_path: Path) -> None:
    def plan() -> Iterator[Task]:
        yield Task("unpack:1", [lambda: append(tmp_path / "log", "unpack")], uptodate=[False])
        yield group("plan", "unpack:1")

    tasks = [
        task("resolve"),
        Task("plan", None, loader=DelayedLoader(plan, executed="resolve")),
        task("mkfs", setup=["plan"]),
    ]
    outcome = run(Loader(tasks, ["mkfs"]), [], jobs=jobs, listener=NullListener())
    assert status(outcome) == {"resolve": "built", "unpack:1": "built", "mkfs": "built"}
    assert (tmp_path / "log").read_text() == "unpack\n"


def test_many_tasks_each_run_once_after_what_they_need(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tasks = [task("base", append, log, "base")]
    for number in range(20):
        tasks.append(task(f"layer:{number}", append, log, f"layer:{number}", setup=["base"]))
        tasks.append(task(f"image:{number}", append, log, f"image:{number}", setup=[f"layer:{number}"]))
    outcome = run_tasks(3, *tasks, targets=[f"image:{number}" for number in range(20)])
    lines = log.read_text().split()
    assert sorted(lines) == sorted(task.name for task in tasks)
    assert lines[0] == "base"
    assert all(lines.index(f"layer:{number}") < lines.index(f"image:{number}") for number in range(20))
    assert set(status(outcome).values()) == {"built"}


def test_jobs_run_at_once_and_no_more_than_allowed(tmp_path: Path) -> None:
    def overlap(name: str) -> dict[str, int]:
        (tmp_path / name).touch()
        time.sleep(0.2)
        count = len(os.listdir(tmp_path))
        (tmp_path / name).unlink()
        return {"count": count}

    outcome = run_tasks(3, *(task(f"t{number}", overlap, f"t{number}") for number in range(6)))
    counts = [result.values["count"] for result in outcome.results.values()]
    assert 1 < max(counts) <= 3


# Failures


@JOBS
def test_what_takes_turns_is_looked_at_when_its_turn_has_come(jobs: int, tmp_path: Path) -> None:
    def fetch() -> None:
        if jobs > 1:
            while not (tmp_path / "other").exists():  # it gets the second worker, in which `late` does not wait
                time.sleep(0.01)
        append(tmp_path / "fetched", "x")

    def is_fetched(*_: object) -> bool:
        return (tmp_path / "fetched").exists()

    def turn(name: str, action: Callable[[], None], uptodate: Callable[..., bool]) -> Task:
        return Task(name, [action], uptodate=[uptodate], meta={"turn": "fetch", "is_done": uptodate})

    tasks = [
        turn("first", fetch, is_fetched),
        turn("late", fetch, is_fetched),
        turn("last", lambda: append(tmp_path / "fetched", "y"), lambda *_: False),
        Task("other", [lambda: append(tmp_path / "other", "x")], uptodate=[False]),
        Task("end", [lambda: append(tmp_path / "end", "x")], uptodate=[False], task_dep=["late", "last"]),
    ]
    outcome = run_tasks(min(jobs, 2), *tasks)
    assert status(outcome) == {
        "first": "built", "late": "hit", "last": "built", "other": "built", "end": "built",
    }  # fmt: skip
    assert (tmp_path / "fetched").read_text().split() == ["x", "y"]


@pytest.mark.parametrize("jobs", [2, 4])
def test_what_another_has_done_does_not_wait_for_its_end(jobs: int, tmp_path: Path) -> None:
    """`first` brings what `second` is to bring, and goes on until `user`, which needs that, has run."""

    def fetch() -> None:
        append(tmp_path / "second", "x")
        wait_for((tmp_path / "used").exists)

    def is_there(*_: object) -> bool:
        return (tmp_path / "second").exists()

    tasks = [
        Task("first", [fetch], uptodate=[False], meta={"turn": "fetch", "is_done": lambda: False}),
        Task("second", [fetch], uptodate=[is_there], meta={"turn": "fetch", "is_done": is_there}),
        Task("user", [lambda: append(tmp_path / "used", "x")], uptodate=[False], task_dep=["second"]),
    ]
    assert status(run_tasks(jobs, *tasks)) == {"first": "built", "second": "hit", "user": "built"}


def test_a_failure_lets_the_next_have_its_turn() -> None:
    def bad() -> None:
        raise FledgeError("mine")

    meta = {"turn": "t", "is_done": lambda: False}
    tasks = [Task(name, [StageAction(bad)], uptodate=[False], meta=meta) for name in "abc"]
    assert status(run_tasks(2, *tasks)) == dict.fromkeys("abc", "failed")
    assert status(run_tasks(2, *tasks, keep_going=False)) == {"a": "failed"}


@JOBS
def test_one_failure_does_not_stop_the_others(jobs: int) -> None:
    tasks = [task("a", fail, FledgeError("no")), task("b"), task("c", needs=["b"])]
    assert status(run_tasks(jobs, *tasks)) == {"a": "failed", "b": "built", "c": "built"}


@JOBS
def test_without_keep_going_nothing_new_starts(jobs: int) -> None:
    tasks = [task("a", fail, FledgeError("no")), *(task(f"b{number}", needs=["slow"]) for number in range(3))]
    outcome = run_tasks(jobs, *tasks, task("slow", time.sleep, 0.3), keep_going=False)
    assert status(outcome).pop("a") == "failed"
    assert not any(name.startswith("b") for name in outcome.results)


@JOBS
def test_a_task_does_not_run_when_its_setup_task_failed(jobs: int, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    tasks = [task("fetch", fail, FledgeError("no")), task("unpack", marker.touch, setup=["fetch"])]
    assert status(run_tasks(jobs, *tasks, targets=["unpack"])) == {"fetch": "failed", "unpack": "skipped"}
    assert not marker.exists()


@JOBS
@pytest.mark.parametrize("error", [ValueError("broken check"), LockError("stale", where="fledge.lock")])
def test_a_check_that_raises_fails_its_task_only(jobs: int, error: Exception) -> None:
    def check() -> bool:
        raise error

    outcome = run_tasks(jobs, task("a", fresh=check, setup=["b"]), task("b"), task("c", needs=["a"]))
    assert status(outcome) == {"a": "failed", "b": "built", "c": "skipped"}
    assert str(error) in str(outcome.results["a"].error)
    assert isinstance(outcome.results["a"].error, LockError) == isinstance(error, LockError)


ERRORS: list[FledgeError] = [
    FledgeError("message", where="web", hint="try"),
    MappingError("not there", where="fledge.toml"),
    CommandError("mke2fs failed", returncode=3, stderr="no space", hint="more"),
    ConfigError([Problem("fledge.toml", "source.image", "missing", "add it")]),
]


@JOBS
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_our_errors_come_back_whole(jobs: int, error: FledgeError) -> None:
    back = run_tasks(jobs, task("a", fail, error)).results["a"].error
    assert isinstance(back, FledgeError)
    assert type(back) is type(error)
    assert (str(back), vars(back), back.exit_code) == (str(error), vars(error), error.exit_code)


@JOBS
def test_a_full_disk_is_no_bug(jobs: int) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    back = run_tasks(jobs, task("a", fail, error)).results["a"].error
    assert isinstance(back, FledgeError)
    assert "No space left on device" in str(back)
    assert "/data/x" in str(back)


@JOBS
def test_a_bug_is_a_failure_with_traceback(jobs: int) -> None:
    error = run_tasks(jobs, task("a", fail, ZeroDivisionError("oops"))).results["a"].error
    assert isinstance(error, str)
    assert "Traceback" in error
    assert "ZeroDivisionError: oops" in error
    assert "in fail" in error


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])
def test_a_killed_worker_fails_its_task_only(number: signal.Signals) -> None:
    tasks = [
        task("a", lambda: os.kill(os.getpid(), number)),
        task("b", needs=["a"]),
        *(task(f"c{index}", time.sleep, 0.05) for index in range(6)),
    ]
    outcome = run_tasks(4, *tasks)
    assert status(outcome).pop("a") == "failed"
    assert f"killed by signal {number:d}" in str(outcome.results["a"].error)
    assert outcome.results["b"].status == "skipped"
    assert all(outcome.results[f"c{index}"].status == "built" for index in range(6))


@pytest.mark.parametrize("code", [0, 5])
def test_a_worker_that_exits_early_fails_its_task(code: int) -> None:
    outcome = run_tasks(2, task("a", os._exit, code), task("b"))
    assert status(outcome) == {"a": "failed", "b": "built"}
    assert f"exit code {code}" in str(outcome.results["a"].error)


class StubbornError(FledgeError):
    def __init__(self) -> None:
        super().__init__("the real reason")

    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise TypeError("cannot be made again")


def test_what_cannot_be_pickled_is_a_failure() -> None:
    outcome = run_tasks(2, task("a", lambda: {"lock": threading.Lock()}), task("b", fail, StubbornError()), task("c"))
    assert status(outcome) == {"a": "failed", "b": "failed", "c": "built"}
    assert "cannot leave its worker" in str(outcome.results["a"].error)
    assert "the real reason" in str(outcome.results["b"].error)


def test_meta_that_cannot_be_pickled_does_no_harm() -> None:
    assert status(run_tasks(2, task("a", key=threading.Lock()))) == {"a": "built"}


def test_large_outcomes_arrive() -> None:
    outcome = run_tasks(2, *(task(f"t{number}", lambda: {"text": "x" * 3_000_000}) for number in range(3)))
    assert [len(result.values["text"]) for result in outcome.results.values()] == [3_000_000] * 3


def test_an_unknown_target_is_an_input_error() -> None:
    with pytest.raises(InputError, match="there is no task nope"):
        run_tasks(2, task("a"), targets=["nope"])


def test_a_bad_graph_is_our_error() -> None:
    with pytest.raises(FledgeError, match="does not exist"):
        run_tasks(1, task("a", needs=["nope"]))
    for jobs in (1, 2):
        with pytest.raises(FledgeError, match="yclic"):
            run_tasks(jobs, task("a", needs=["b"]), task("b", needs=["a"]))


@JOBS
def test_an_error_of_a_late_creator_comes_out(jobs: int) -> None:
    def plan() -> Iterator[Task]:
        raise LockError("stale")
        yield

    tasks = [task("resolve"), Task("plan", None, loader=DelayedLoader(plan, executed="resolve"))]
    with pytest.raises(LockError, match="stale"):
        run_tasks(jobs, *tasks)


def test_forking_beside_threads_warns_nobody() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert status(run_tasks(2, task("a"))) == {"a": "built"}
    finally:
        stop.set()
        thread.join()


def test_no_descriptor_is_left() -> None:
    before = os.listdir("/proc/self/fd")
    run_tasks(4, task("a"), task("b", os._exit, 1), task("c", fail, FledgeError("no")))
    assert os.listdir("/proc/self/fd") == before


class Node(NamedTuple):
    """A task of a random graph; what it depends on stands before it."""

    kind: str
    needs: frozenset[int]
    setup: frozenset[int]


@st.composite
def graphs(draw: st.DrawFn) -> list[Node]:
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 7))):
        before = st.frozensets(st.integers(0, number - 1), max_size=3) if number else st.just(frozenset())
        nodes.append(Node(draw(st.sampled_from(["built", "failed", "hit"])), draw(before), draw(before)))
    return nodes


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_every_graph_ends_as_its_dependencies_say(graph: list[Node]) -> None:
    expected: list[str] = []
    for node in graph:
        wanted = node.needs if node.kind == "hit" else node.needs | node.setup
        unmet = any(expected[number] in {"failed", "skipped"} for number in wanted)
        expected.append("skipped" if unmet else node.kind)
    for jobs in (1, 3):
        tasks = [
            task(
                f"t{number}",
                *((fail, FledgeError("no")) if node.kind == "failed" else (build,)),
                fresh=node.kind == "hit",
                needs=[f"t{other}" for other in node.needs],
                setup=[f"t{other}" for other in node.setup],
            )
            for number, node in enumerate(graph)
        ]
        assert status(run_tasks(jobs, *tasks)) == {f"t{number}": end for number, end in enumerate(expected)}


# Progress


def count(total: int) -> None:
    meter = progress.meter(total)
    for _ in range(total):
        meter.add(1)
        time.sleep(0.01)


@JOBS
def test_progress_arrives(jobs: int) -> None:
    recorder = Recorder()
    run(Loader([task("a", count, 30), task("b", count, 20)]), [], jobs=jobs, listener=recorder)
    for name, total in (("a", 30), ("b", 20)):
        numbers = [event for event in recorder.events if event[:2] == ("advanced", name)]
        assert numbers[-1] == ("advanced", name, total, total)
        assert 2 <= len(numbers) < 15
        assert recorder.events.index(("started", name)) < recorder.events.index(numbers[0])
        assert recorder.events.index(("built", name)) > recorder.events.index(numbers[-1])
    assert recorder.ticks >= 2


def test_time_ticks_while_workers_are_silent() -> None:
    recorder = Recorder()
    run(Loader([task("a", time.sleep, 0.5)]), [], jobs=2, listener=recorder)
    assert 3 <= recorder.ticks <= 20


# Parts


def test_memory_db_remembers_until_told_otherwise() -> None:
    state = MemoryDB("name", None)
    state.set("a", "x", object)
    assert (state.get("a", "x"), state.get("a", "y"), state.get("b", "x")) == (object, None, None)
    assert state.in_("a")
    state.remove("a")
    state.remove("a")
    assert not state.in_("a")
    state.set("b", "x", 1)
    state.remove_all()
    state.dump()
    assert not state.in_("b")


def test_stage_action_is_picklable_and_calls_its_function() -> None:
    action = pickle.loads(pickle.dumps(StageAction(divmod_values, (7, 2))))
    assert action() == {"quotient": 3, "rest": 1}
    failed = pickle.loads(pickle.dumps(StageAction(fail, (FledgeError("no", hint="yes"),))))()
    assert isinstance(failed, StageFailed)
    assert (failed.error.message, failed.error.hint) == ("no", "yes")
    assert failed.get_msg() == "error: no\n  hint: yes\n"


def divmod_values(number: int, divisor: int) -> dict[str, int]:
    return {"quotient": number // divisor, "rest": number % divisor}


def test_harden_replaces_all_runners_and_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Runner", "MRunner", "MThreadRunner"):
        monkeypatch.setattr(cmd_run, name, getattr(cmd_run, name))
    harden()
    harden()
    assert (cmd_run.Runner, cmd_run.MRunner, cmd_run.MThreadRunner) == (SafeRunner, WorkerRunner, WorkerRunner)


def hang_up_and_terminate(outer: bool, inner: bool) -> None:
    assert (outer, inner) == (True, False)
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_interruptible_restores_handlers_and_respects_ignored_signals() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(Interrupted) as info, interruptible() as outer, interruptible() as inner:
            hang_up_and_terminate(outer, inner)
        assert (info.value.signum, info.value.exit_code) == (signal.SIGTERM, 143)
    finally:
        signal.signal(signal.SIGHUP, old)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# Signals and the bare doit, in processes of their own

STAGES = """
import os, signal, subprocess, sys, time
from pathlib import Path
from fledge_tasks import run as programs
from fledge_tasks.action import StageAction
from fledge_tasks.errors import FledgeError

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

def work(name, cleanup_seconds=0.0):
    temp = Path(f"temp-{name}")
    temp.touch()
    try:
        programs.run(["sh", "-c", f"echo $$ >program-{name}; exec sleep 60"])
    finally:
        time.sleep(cleanup_seconds)
        temp.unlink()

def spin(name):
    temp = Path(f"temp-{name}")
    temp.touch()
    try:
        Path(f"program-{name}").write_text(str(os.getpid()))
        time.sleep(60)
    finally:
        temp.unlink()

def deaf(name):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    spin(name)

def fail():
    raise FledgeError("it is broken", where="web", hint="mend it")

def build():
    return {"bytes": 1}
"""

EMBEDDED = """
import sys
from doit.cmd_base import TaskLoader2
from doit.task import Task
from fledge_tasks.interrupt import Interrupted
from fledge_tasks.reporter import NullListener
from fledge_tasks.runner import run
from stages import *

class Loader(TaskLoader2):
    def setup(self, opt_values): pass
    def load_doit_config(self): return {}
    def load_tasks(self, cmd, pos_args):
        return [Task(f"t{n}", [StageAction(globals()[sys.argv[2]], (str(n), *map(float, sys.argv[3:])))])
                for n in range(int(sys.argv[1]))]

try:
    run(Loader(), [], jobs=int(sys.argv[1]), listener=NullListener())
except Interrupted as interrupted:
    sys.exit(interrupted.exit_code)
"""

DODO = """
from fledge_tasks.runner import harden
from stages import *
harden()
DOIT_CONFIG = {"dep_file": "state", "backend": "json"}

def task_work():
    for n in range(3):
        yield {"name": str(n), "actions": [StageAction(work, (str(n),))]}

def task_fail():
    return {"actions": [StageAction(fail)]}

def task_die():
    return {"actions": [lambda: os.kill(os.getpid(), signal.SIGKILL)]}

def task_good():
    return {"actions": [StageAction(build)], "setup": ["say"]}

def task_say():
    return {"actions": [lambda: print("said")], "verbosity": 2}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    for name, text in {"stages.py": STAGES, "embedded.py": EMBEDDED, "dodo.py": DODO}.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    return tmp_path


def start(workspace: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{workspace}", "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def programs(workspace: Path, count: int) -> list[int]:
    """Wait until `count` stages are at work; return the pids that they wrote."""

    def pids() -> list[int]:
        return [int(path.read_text()) for path in workspace.glob("program-*") if path.read_text().strip()]

    wait_for(lambda: len(pids()) == count)
    return pids()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def session(leader: int) -> list[int]:
    """Return the living processes of a session: the run and its workers."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(path.name)) == leader and is_alive(int(path.name)):
                found.append(int(path.name))
        except ProcessLookupError:
            continue
    return found


def assert_all_gone(workspace: Path, process: subprocess.Popen[str], pids: list[int]) -> None:
    wait_for(lambda: not any(is_alive(pid) for pid in pids), 5)
    assert session(process.pid) == []
    assert list(workspace.glob("temp-*")) == []


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize(
    ("number", "stage"),
    [(signal.SIGINT, "work"), (signal.SIGTERM, "work"), (signal.SIGHUP, "work"), (signal.SIGTERM, "spin")],
)
def test_a_signal_ends_the_run_and_leaves_nothing(
    workspace: Path, number: signal.Signals, jobs: int, stage: str
) -> None:
    process = start(workspace, "embedded.py", str(jobs), stage)
    pids = programs(workspace, jobs)
    began = time.monotonic()
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert time.monotonic() - began < 5  # without a signal that arrives it were 60
    assert (process.returncode, output, errors) == (128 + number, "", "")
    assert_all_gone(workspace, process, pids)


def test_ctrl_c_reaches_the_whole_group_and_is_one_signal(workspace: Path) -> None:
    process = start(workspace, "embedded.py", "4", "work", "0.3")
    pids = programs(workspace, 4)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    assert_all_gone(workspace, process, pids)


def test_a_deaf_worker_is_killed(workspace: Path) -> None:
    process = start(workspace, "embedded.py", "2", "deaf")
    pids = programs(workspace, 2)
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert 2 < time.monotonic() - began < 8
    assert process.returncode == 143
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_second_signal_ends_at_once(workspace: Path, jobs: int) -> None:
    process = start(workspace, "embedded.py", str(jobs), "work", "30")
    pids = programs(workspace, jobs)
    process.terminate()
    time.sleep(0.8)
    assert process.poll() is None
    began = time.monotonic()
    process.terminate()
    process.communicate(timeout=20)
    assert time.monotonic() - began < 5  # where the cleanup takes 30
    assert process.returncode == 143
    wait_for(lambda: not any(is_alive(pid) for pid in pids) and not session(process.pid), 5)


def test_workers_do_not_outlive_a_killed_run(workspace: Path) -> None:
    process = start(workspace, "embedded.py", "3", "work")
    pids = programs(workspace, 3)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_alive(pid) for pid in pids) and not session(process.pid), 5)
    assert list(workspace.glob("temp-*")) == []
    process.communicate()


MODES = pytest.mark.parametrize("mode", [(), ("-n", "4"), ("-n", "4", "-P", "thread")], ids=" ".join)


@MODES
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_bare_doit_ends_on_a_signal(workspace: Path, mode: tuple[str, ...], number: signal.Signals) -> None:
    process = start(workspace, "-m", "doit", *mode, "work")
    pids = programs(workspace, 3 if mode else 1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert errors == "interrupted\n"
    assert_all_gone(workspace, process, pids)


@MODES
def test_bare_doit_shows_our_errors_without_traceback(workspace: Path, mode: tuple[str, ...]) -> None:
    process = start(workspace, "-m", "doit", *mode, "-c", "fail", "good")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "error: web: it is broken\n  hint: mend it" in output
    assert ".  good" in output
    assert "said" in output
    assert "Traceback" not in output + errors
    assert "Warning" not in errors


def test_bare_doit_does_not_hang_on_a_killed_worker(workspace: Path) -> None:
    process = start(workspace, "-m", "doit", "-n", "4", "-c", "die", "good")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "killed by signal 9" in output
    assert ".  good" in output
    assert '"good"' in (workspace / "state").read_text()
    assert errors == ""
