"""What a workspace's dodo.py needs: `from fledge_tasks.dodo import *`.

Makes `doit`, `doit list`, `doit -n 4` and `doit build:<image>` run the graph that `fledge build`
runs, with the same safety. The workspace is the folder of dodo.py. SOURCE_DATE_EPOCH and
FLEDGE_CACHE_DIR hold as they do for `fledge`.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator
from pathlib import Path

from doit.task import Task

from fledge_tasks import collector, workspace
from fledge_tasks.errors import FledgeError
from fledge_tasks.plan import Planner, source_date_epoch
from fledge_tasks.runner import harden
from fledge_tasks.store import Store
from fledge_tasks.tasks import DOIT_CONFIG, Graph

__all__ = ["DOIT_CONFIG", "task_fledge"]

harden()


def task_fledge() -> Iterator[Task]:
    """Yield the tasks of the workspace in the current folder, where doit changes to."""
    try:
        found = workspace.load(Path.cwd())
        source_date_epoch()  # what is wrong with it is wrong with all images, and found before any is looked up
        planner = Planner(found, Store(found.cache))
        graph = Graph(planner)
        with collector.paused():
            tasks = graph.tasks(found.images)
    except FledgeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from None
    atexit.register(_end, graph, planner.store)
    yield from tasks


def _end(graph: Graph, store: Store) -> None:
    """Run at the end of doit's process; workers end without."""
    graph.record()
    store.close()
    for line in store.notices.take():
        sys.stderr.write(f"{line}\n")
