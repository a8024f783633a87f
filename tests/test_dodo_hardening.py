"""What goes wrong with a stock doit 0.37, each tried with a bare `doit` on our graph.

What was measured of doit, and the test that shows that it does not concern us (here, where no module is named):

| doit 0.37 | test |
|---|---|
| a failure with `-n`: no new tasks start, results of running ones are kept | test_a_failure_ends_the_run |
| a failure with `--continue`: what needs it is unmet, exit code 2 | test_a_failure_and_continue |
| a worker that is killed: waits for ever, nothing saved | test_a_killed_worker |
| an outcome that cannot be pickled: waits for ever | test_an_outcome_that_cannot_leave_its_worker |
| `meta` that cannot be pickled: waits for ever | test_runner.test_meta_that_cannot_be_pickled_does_no_harm |
| a value that is no JSON: exit code 3, the state of the run is lost | test_values_that_are_no_json |
| SIGINT: traceback, `finally` blocks skipped | test_a_signal |
| SIGINT to the main process alone: programs go on | test_a_signal |
| SIGTERM, SIGHUP: no cleanup, orphans for ever | test_a_signal |
| two doits: one dies of a locked database or loses its state | test_two_at_once |
| a corrupt database: exit code 3, never heals | test_a_corrupt_database_of_doit |
| state is saved at the end only: SIGKILL loses it | test_after_a_kill |
| `-P thread` mixes up outputs, leaves stdout replaced | test_output_of_tasks_is_not_mixed_up |
| `-n` on 3.12: DeprecationWarning | test_threads_of_the_user_warn_nobody |
| forkserver: closures and lambdas fail | test_dodo_commands.test_bare_doit, test_closures_of_the_user |
| no state (CI): everything runs again | test_dodo_commands.test_a_restored_cache |
| a dbm depends on the interpreter | test_dodo_commands.test_bare_doit: there is none |
| a check that raises ends the run, or hangs | test_a_check_that_raises |
| `list -s` and `info` ask before anything is resolved | test_dodo_commands.test_list_of_a_new_workspace |
| `setup` edges: what stands behind an up-to-date task is not asked for | test_a_cache_that_lost_its_layers |
| `--continue` runs a task whose setup task failed | test_dodo.test_a_failure |
| a late creator overwrites a task that exists | test_a_base_that_is_known_late |
| `=` and `*` in names of tasks | test_dodo_commands.test_names_of_images_are_names_of_tasks |
| `file_dep` and `targets` believe in times, and traceback on folders | test_no_task_has_files_in_the_sense_of_doit |
| a teardown that fails ends workers | test_a_teardown_that_fails |
| `[tool.doit]` in pyproject.toml overrides settings | test_dodo_commands.test_settings_of_doit_in_pyproject |
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from fledge_tasks import workspace as workspaces
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from fledge_tasks.tasks import Graph
from tests.dodos import MODES, DodoPlace, all_modes, end, installed, make_place, processes, session, two_modes
from tests.test_cli import slow
from tests.tools import wait_for

pytestmark = installed

INSTEAD = """
import os, signal, threading, time
from pathlib import Path
from fledge_tasks import tasks
from fledge_tasks.errors import FledgeError

def instead(stage):
    real = getattr(tasks, "_" + stage)
    def replace(function):
        setattr(tasks, "_" + stage, lambda planner, image: function(planner, image, real))
    return replace
"""
"""Lets a dodo.py put something else in the place of a stage of an image."""

FAIL_WEB = """
@instead("mkfs")
def mkfs(planner, image, real):
    if image.name == "web":
        raise FledgeError("it is broken", where="web", hint="mend it")
    return real(planner, image)
"""


@pytest.fixture
def place(tmp_path: Path) -> DodoPlace:
    return make_place(tmp_path)


OF_API = {f"{stage}:api" for stage in ("mkfs", "assemble", "manifest")}


def test_every_test_of_the_table_exists() -> None:
    rows = re.findall(r"^\| (?!-|doit 0)(.+?) \| (.+) \|$", str(__doc__), re.MULTILINE)
    assert len(rows) == str(__doc__).count("\n|") - 2
    for _, names in rows:
        for name in re.findall(r"(?:test_\w+\.)?test_\w+", names):
            module, _, function = name.rpartition(".")
            assert callable(getattr(importlib.import_module(f"tests.{module}" if module else __name__), function))


@two_modes
def test_a_failure_ends_the_run(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.doit("unpack")
    place.write_dodo(INSTEAD + FAIL_WEB)
    run = place.doit("run", *mode, "mkfs:web", "build:api", code=1)
    assert "error: web: it is broken\n  hint: mend it\n" in run.out
    assert not place.output("api").exists()
    place.write_dodo()
    # With workers, mkfs:api was running when the other failed, and is not lost.
    again = place.doit("run", *mode)
    assert "mkfs:web" in again.ran
    assert ("mkfs:api" in again.ran) == (not mode)


@all_modes
def test_a_failure_and_continue(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.write_dodo(INSTEAD + FAIL_WEB)
    run = place.doit(*mode, "-c", code=2)
    assert run.ran >= OF_API
    assert "UnmetDependency - taskid:build:web" in run.out
    assert run.out.count("error: web: it is broken") == 1
    assert not place.output("web").exists()
    place.write_dodo()
    assert place.doit(*mode).ran == {"mkfs:web", "assemble:web", "manifest:web"}


@processes
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9 (Killed)\n  hint: the machine may have run out"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11 (Segmentation fault)"),
        ("os._exit(0)", "ended without a result (exit code 0)"),
    ],
    ids=["killed", "crashed", "left"],
)
def test_a_killed_worker(place: DodoPlace, mode: tuple[str, ...], how: str, message: str) -> None:
    place.write_dodo(INSTEAD + f'@instead("mkfs")\ndef mkfs(planner, image, real):\n    {how}\n')
    run = place.doit(*mode, "-c", "mkfs:api", "resolve:web", code=1)
    assert message in run.out
    assert "resolve:web" in run.ran | run.fresh
    if how == "os._exit(0)":
        place.write_dodo()
        assert place.doit(*mode, "build:api").ran == OF_API


@processes
def test_an_outcome_that_cannot_leave_its_worker(place: DodoPlace, mode: tuple[str, ...]) -> None:
    lock = '@instead("mkfs")\ndef mkfs(planner, image, real):\n    return {"lock": threading.Lock()}\n'
    place.write_dodo(INSTEAD + lock)
    run = place.doit(*mode, "mkfs:api", code=2)
    assert "the outcome of the task cannot leave its worker process" in run.out


@two_modes
def test_values_that_are_no_json(place: DodoPlace, mode: tuple[str, ...]) -> None:
    path = '@instead("mkfs")\ndef mkfs(planner, image, real):\n    return {**real(planner, image), "path": Path("/")}\n'
    place.write_dodo(INSTEAD + path)
    assert place.doit(*mode, "build:api").ran >= OF_API
    assert place.doit(*mode, "build:api").ran == set()


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        (MODES["serial"], signal.SIGHUP),
        (MODES["processes"], signal.SIGHUP),
        (MODES["processes"], signal.SIGINT),
        (MODES["threads"], signal.SIGTERM),
    ],
)
def test_a_signal(place: DodoPlace, tmp_path: Path, mode: tuple[str, ...], number: signal.Signals) -> None:
    """It goes to the main process alone, in the midst of a program that a stage runs."""
    busy, started = slow(place, tmp_path)
    place.write_dodo("import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n")
    process = place.start(*mode, "mkfs:web", env=busy.environment())
    wait_for(started.exists)
    process.send_signal(number)
    run = end(process)
    assert (run.code, run.err) == (128 + number, "interrupted\n")
    assert "Traceback" not in run.out
    assert place.leftovers() == []
    assert place.doit(*mode, "mkfs:web").ran == {"mkfs:web"}


@processes
def test_two_at_once(place: DodoPlace, mode: tuple[str, ...]) -> None:
    """Neither waits in vain, none fails, and what one makes the other finds."""
    place.doit("resolve")
    log = place.root / "log"
    once = f"""
@instead("mkfs")
def mkfs(planner, image, real):
    values = real(planner, image)
    with open({str(log)!r}, "a") as file:
        file.write(f"{{image.name}} {{values.get('status')}}\\n")
    return values
"""
    place.write_dodo(INSTEAD + once)
    processes = [place.start(*mode) for _ in range(3)]
    for process in processes:
        run = end(process)
        assert (run.code, run.err) == (0, ""), run.out
    lines = log.read_text().splitlines()
    assert sorted(line for line in lines if not line.endswith("hit")) == ["api None", "web None"]
    assert place.doit(*mode).ran == set()
    assert place.build().stages("web") == []


def test_a_corrupt_database_of_doit(place: DodoPlace) -> None:
    for name in (".doit.db", ".doit.db.dat", ".doit.db.dir"):
        (place.root / name).write_bytes(b"\0no database\xff" * 100)
    before = {path.name: path.read_bytes() for path in place.root.glob(".doit*")}
    for command in (("-n", "4"), ("list", "--all", "-s"), ("forget", "-a")):
        place.doit(*command)
    assert {path.name: path.read_bytes() for path in place.root.glob(".doit*")} == before


@two_modes
def test_after_a_kill(place: DodoPlace, tmp_path: Path, mode: tuple[str, ...]) -> None:
    busy, started = slow(place, tmp_path)
    process = place.start(*mode, "build:web", env=busy.environment())
    wait_for(started.exists)
    process.kill()
    run = end(process)  # and nothing of it is left
    assert run.code == -signal.SIGKILL
    assert place.doit(*mode, "build:web").ran == {"mkfs:web", "assemble:web", "manifest:web"}
    assert place.leftovers() and not list((place.root / "cache" / "tmp").iterdir())


TALKERS = """
import atexit
from fledge_tasks.action import StageAction

def talk(name):
    for _ in range(200):
        print(name)
    return False

def task_talk():
    for name in "abcdef":
        yield {"name": name, "actions": [(talk, [name])], "verbosity": 0}

atexit.register(print, "the end")
DOIT_CONFIG["failure_verbosity"] = 2
"""


@all_modes
def test_output_of_tasks_is_not_mixed_up(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.write_dodo(after=TALKERS)
    run = place.doit("run", *mode, "-c", "talk", code=2)
    for name in "abcdef":
        assert f"talk:{name} <stdout>:\n" + f"{name}\n" * 200 in run.out
    assert run.out.endswith("the end\n")


def test_threads_of_the_user_warn_nobody(place: DodoPlace) -> None:
    place.write_dodo("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n")
    assert place.doit("-n", "4").ran >= OF_API


@two_modes
def test_closures_of_the_user(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.write_dodo(
        'import multiprocessing\nmultiprocessing.set_start_method("forkserver")\n',
        "def task_more():\n    for name in 'ab':\n        action = lambda name=name: open(name, 'w').close()\n"
        "        yield {'name': name, 'actions': [action], 'task_dep': ['mkfs:api']}\n",
    )
    run = place.doit("run", *mode, "more")
    assert {"mkfs:api", "more:a", "more:b"} <= run.ran
    assert (place.root / "a").exists() and (place.root / "b").exists()


@two_modes
def test_a_check_that_raises(place: DodoPlace, mode: tuple[str, ...]) -> None:
    """One that raises our error means 'has to run'; any other is a bug, and fails its task alone."""
    place.build()
    check = """
from fledge_tasks import fresh, tasks
real = tasks._is_assembled
def broken(plan):
    if plan.image.name == "web":
        raise {}
    return real(plan)
tasks._is_assembled = broken
"""
    place.write_dodo(INSTEAD + check.format('FledgeError("cannot tell")'))
    assert place.doit(*mode).ran == {"assemble:web"}
    place.write_dodo(INSTEAD + check.format('KeyError("a bug")'))
    run = end(place.start(*mode, "-c"))
    assert (run.code, run.err) == (2, "")
    assert "KeyError: 'a bug'" in run.out
    assert {"assemble:api", "manifest:api"} <= run.fresh


def test_a_cache_that_lost_its_layers(place: DodoPlace) -> None:
    place.doit()
    shutil.rmtree(place.root / "cache" / "objects")
    assert place.doit().ran == set()


@two_modes
def test_a_base_that_is_known_late(place: DodoPlace, mode: tuple[str, ...]) -> None:
    """Of two images on one base, one is resolved already, the other brings the base's tasks once more."""
    place.doit("resolve:api")
    base, more = place.web_layers
    run = place.doit(*mode, "unpack")
    assert run.out.count(f"unpack:{base}") == 1
    assert {f"unpack:{base}", f"unpack:{more}"} <= run.ran


def test_no_task_has_files_in_the_sense_of_doit(place: DodoPlace) -> None:
    place.build()
    found = workspaces.load(place.root)
    planner = Planner(found, Store(found.cache))
    tasks = Graph(planner).tasks(found.images)
    planner.store.close()
    assert {task.name for task in tasks} > place.tasks("web", "api")
    for task in tasks:
        assert not (task.file_dep or task.targets or task.getargs or task.calc_dep or task.wild_dep), task.name


@two_modes
def test_a_teardown_that_fails(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.write_dodo(
        after="def task_more():\n    return {'actions': [], 'task_dep': ['build:api'], 'teardown': [lambda: False]}\n"
    )
    run = end(place.start("run", *mode, "more"))
    assert run.code == 0
    assert run.ran >= OF_API
    assert run.err == "ERROR: task 'more' teardown action\n"


def test_the_session_of_doit_is_looked_at(place: DodoPlace) -> None:
    """A test of these tests: a process that doit leaves behind would be found."""
    place.write_dodo("import subprocess\nsubprocess.Popen(['sleep', '60'], stdout=-3, stderr=-3)\n")
    process = place.start("list")
    assert process.wait(60) == 0
    [orphan] = session(process.pid)
    os.kill(orphan, signal.SIGKILL)
    process.communicate()
