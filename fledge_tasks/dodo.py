"""What a workspace's dodo.py needs: `from fledge_tasks.dodo import *`.

Makes `doit`, `doit list`, `doit -n 4` and `doit build:<image>` run the graph that `fledge build`
runs, with the same safety. The workspace is the folder that doit changes to: that of dodo.py, or
what `-d` says. SOURCE_DATE_EPOCH and FLEDGE_CACHE_DIR hold as they do for `fledge`.

A dodo.py may have tasks of its own beside these. DOIT_CONFIG keeps no state, so a task with a
`file_dep` runs every time, unless the dodo.py names a backend:

    DOIT_CONFIG = {**DOIT_CONFIG, "backend": "json", "dep_file": ".doit.json"}

Files that images need, say mapped ones, may be made by such tasks:

    task_fledge = images_after("compile")
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from doit import get_initial_workdir
from doit.task import Task

from fledge_tasks import collector, workspace
from fledge_tasks.errors import FledgeError
from fledge_tasks.plan import source_date_epoch
from fledge_tasks.planner import Planner
from fledge_tasks.runner import harden
from fledge_tasks.store import Store
from fledge_tasks.tasks import DOIT_CONFIG, Graph
from fledge_tasks.workers import SafeRunner

__all__ = ["DOIT_CONFIG", "images_after", "task_fledge"]

harden()


def task_fledge() -> Iterator[Task]:
    """Yield the tasks of the workspace in the current folder, where doit changes to."""
    yield from _tasks()


def images_after(*names: str) -> Callable[[], Iterator[Task]]:
    """Return another `task_fledge`: no image is looked at before these tasks have run."""

    def task_fledge() -> Iterator[Task]:
        yield from _tasks(*names)

    return task_fledge


def _tasks(*after: str) -> list[Task]:
    if cache := os.environ.get(workspace.CACHE_VARIABLE):
        # It is relative to the folder in which doit was called.
        os.environ[workspace.CACHE_VARIABLE] = os.path.join(get_initial_workdir() or "", cache)
    try:
        found = workspace.load(Path.cwd())
        source_date_epoch()  # what is wrong with it is wrong with all images, and found before any is looked up
        planner = Planner(found, Store(found.cache))
        graph = Graph(planner, after=after)
        with collector.paused():
            tasks = graph.tasks(found.images)
    except FledgeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    atexit.register(_end, graph, planner.store, os.getpid())
    return tasks


def _end(graph: Graph, store: Store, owner: int) -> None:
    """Run at the end of doit's process. Workers end without, but not what a task of the user may have forked."""
    if os.getpid() != owner:
        return
    try:
        try:
            if SafeRunner.has_run:  # `doit list` and `doit info` ask the same questions, and use nothing
                graph.record()
        finally:
            store.close()
        for line in store.notices.take():
            sys.stderr.write(f"{line}\n")
    except (Exception, KeyboardInterrupt) as error:
        # What was built is built, and doit has said so: nothing here is worth a traceback behind it.
        sys.stderr.write(f"warning: what this run used was not noted: {error!r}\n")
