"""A dodo.py with tasks of its own beside ours, and what a run of doit leaves in the index."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import usage
from fledge_tasks.index import Index
from tests.dodos import DodoPlace, end, installed, make_place, two_modes
from tests.workspaces import REPOSITORY

pytestmark = installed

IMAGE = {"assemble:web", "manifest:web", "mkfs:web"}
QUIET = {"PYTHONWARNINGS": "ignore"}
"""doit itself leaves the pipes of programs that are actions to the garbage collector."""


@pytest.fixture
def place(tmp_path: Path) -> DodoPlace:
    return make_place(tmp_path)


def documented(place: DodoPlace, backend: str) -> None:
    """Write the dodo.py that the README shows, with another backend."""
    text = (REPOSITORY / "README.md").read_text()
    [block] = [part for part in text.split("```python\n")[1:] if "fledge_tasks.dodo" in part]
    code = block.partition("```")[0]
    assert code.count('"json"') == 1
    (place.root / "dodo.py").write_text(code.replace('"json"', f'"{backend}"'))
    (place.root / "app.c").write_text("int main;\n")
    (place.root / "build").mkdir(exist_ok=True)


@pytest.mark.parametrize(
    ("backend", "mode"), [("json", ()), ("json", ("-n", "4")), ("sqlite3", ("-n", "4")), ("dbm", ())]
)
def test_tasks_of_the_user_beside_ours(place: DodoPlace, mode: tuple[str, ...], backend: str) -> None:
    """One makes a file that is mapped into an image, another uses the image."""
    documented(place, backend)
    (place.root / "web" / "conf").unlink()
    assert place.doit(*mode, env=QUIET).began == {*place.tasks("web", "api"), "compile", "sign"}
    assert (place.root / "web" / "conf").read_text() == "int main;\n"
    signed = (place.root / "build" / "web.sums").read_text()
    assert place.build().stages("web") == []
    assert place.doit(*mode, env=QUIET).ran == set()
    (place.root / "app.c").write_text("int main = 1;\n")
    assert place.doit(*mode, env=QUIET).ran == {"compile", "sign", *IMAGE}
    assert (place.root / "build" / "web.sums").read_text() != signed
    assert place.build().stages("web") == []
    place.output("web").unlink()
    assert place.doit(*mode, env=QUIET).ran == {"assemble:web"}


@two_modes
def test_an_image_whose_files_cannot_be_made(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.build()
    before = place.results()
    place.write_dodo(
        after="task_fledge = images_after('make')\ndef task_make():\n    return {'actions': [lambda: False]}\n"
    )
    run = place.doit(*mode, "-c", code=2)
    assert (run.ran, run.fresh) == ({"make"}, set())
    assert "UnmetDependency - taskid:build:web" in run.out
    assert place.results() == before
    place.write_dodo(after="task_fledge = images_after('mkae')\n")
    process = place.start(*mode)
    assert "Task dependency 'mkae' does not exist" in process.communicate(timeout=60)[1]
    assert process.returncode == 3


def test_without_a_backend_tasks_of_the_user_run_each_time(place: DodoPlace) -> None:
    more = "def task_more():\n    return {'actions': ['true'], 'file_dep': ['dodo.py'], 'task_dep': ['build:web']}\n"
    place.write_dodo(after=more)
    assert "more" in place.doit("more", env=QUIET).ran
    assert place.doit("more", env=QUIET).ran == {"more"}
    place.write_dodo(after=more + 'DOIT_CONFIG = {"default_tasks": ["more"]}\n')  # doit's own backend, then
    assert place.doit(env=QUIET).ran == {"more"}
    assert place.doit("-n", "2", env=QUIET).ran == set()


def test_a_task_of_the_user_fails(place: DodoPlace) -> None:
    place.write_dodo(
        after="def task_more():\n    return {'actions': ['false'], 'task_dep': ['mkfs:web']}\n"
        "def task_last():\n    return {'actions': ['true'], 'task_dep': ['more']}\n"
    )
    run = place.doit("-n", "2", "-c", "last", "build:api", code=2, env=QUIET)
    assert "TaskFailed - taskid:more" in run.out
    assert "UnmetDependency - taskid:last" in run.out
    assert place.output("api").exists()


def test_ignoring_works_with_a_backend(place: DodoPlace) -> None:
    place.write_dodo(after='DOIT_CONFIG = {**DOIT_CONFIG, "backend": "json", "dep_file": "state"}\n')
    place.doit("ignore", "manifest:web")
    ran = place.doit().ran
    assert "manifest:api" in ran
    assert "manifest:web" not in ran
    place.doit("forget", "-a")
    assert place.doit().ran == {"manifest:web"}


# --- what is noted ------------------------------------------------------------------------------------


def noted(place: DodoPlace) -> tuple[int, int]:
    """Return how many stages were found and made, as it is noted."""
    index = Index(place.root / "cache" / "index")
    days = usage.days(index).values()
    index.close()
    return sum(day.hits for day in days), sum(day.misses for day in days)


@two_modes
def test_a_run_is_noted_once(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.doit(*mode)
    stages = len([task for task in place.tasks("web", "api") if not task.startswith("fetch")])
    hits, misses = noted(place)
    assert misses == stages
    assert hits == 1  # the base of api, for web
    place.doit(*mode)
    assert noted(place) == (hits + stages + 1, misses)


def test_questions_are_not_noted(place: DodoPlace) -> None:
    def ask() -> None:
        for command in (("list", "--all", "-s"), ("clean", "-n"), ("reset-dep",)):
            place.doit(*command)
        end(place.start("info", "manifest:web"))

    ask()
    assert noted(place) == (0, 0)
    place.doit()
    before = noted(place)
    assert before != (0, 0)
    ask()
    assert noted(place) == before


FORKING = """
import atexit, os, sys
from fledge_tasks import usage
real = usage.record

def record(*arguments):
    with open("noted", "a") as file:
        file.write(str(os.getpid()) + "\\n")
    real(*arguments)

usage.record = record

def fork():
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        sys.exit()  # which ends the child the way a main process ends

def task_fork():
    return {"actions": [fork], "task_dep": ["build:api"]}
"""


@two_modes
def test_only_the_main_process_notes(place: DodoPlace, mode: tuple[str, ...]) -> None:
    place.write_dodo(after=FORKING)
    process = place.start("run", *mode, "fork")
    run = end(process)
    assert run.code == 0, run.out + run.err
    assert (place.root / "noted").read_text() == f"{process.pid}\n"


def breaking(error: str) -> str:
    return f"from fledge_tasks import usage\ndef broken(*arguments):\n    raise {error}\nusage.record = broken\n"


@pytest.mark.parametrize("error", ["ZeroDivisionError('oops')", "OSError(28, 'No space left')", "KeyboardInterrupt()"])
def test_a_note_that_fails_changes_nothing(place: DodoPlace, error: str) -> None:
    place.write_dodo(breaking(error))
    warning = f"warning: what this run used was not noted: {error}\n"
    assert place.doit("build:api", err=warning).ran >= {"manifest:api"}
    place.doit("list")
    place.doit("build:wbe-x", code=3, err=UNKNOWN)
    (place.root / "web" / "conf").unlink()
    assert "conf does not exist" in place.doit("build:web", code=1, err=warning).out


UNKNOWN = """ERROR: Invalid parameter: "build:wbe-x". Must be a command, task, or a target.
Type "-m help" to see available commands.
Type "-m list" to see available tasks.
  hint: did you mean "build:web"?
"""


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (
            lambda path: path.write_bytes(b"no database"),
            "is damaged (file is not a database); set aside, and a new one begun",
        ),
        (lambda path: path.mkdir(), None),
    ],
)
def test_an_index_that_cannot_be_used(place: DodoPlace, damage: Callable[[Path], Any], told: str | None) -> None:
    (place.root / "cache" / "index").mkdir(parents=True)
    damage(place.root / "cache" / "index" / "cache.db")
    # diskcache does not close a database that it could not open; Python 3.13 says so, if it is asked to.
    err = f"{place.root}/cache/index: {told}\n" if told else ""
    assert place.doit("build:api", env=QUIET, err=err).began >= {"manifest:api"}
    assert place.doit("-n", "2", "build:api", env=QUIET).ran == set()
