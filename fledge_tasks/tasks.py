"""The doit graph of a workspace.

    build:<image> ─► manifest:<image> ─► assemble:<image> ─► mkfs:<image> ─► unpack:<layer> ─► fetch:<layer>
                 └► verity:<image> ─┘                   └──────────────────► unpack:<layer>    resolve:<image>

The arrows behind assemble are doit's `setup` edges: what stands there is looked at only when the
task before it has to run. Whether a task has to run is asked of the store and of the output files;
doit keeps no state. A layer's tasks exist once, however many images share it. An image that is not
resolved yet gets its layers' tasks late, when its resolve task has run.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from doit.cmd_base import TaskLoader2
from doit.task import DelayedLoader, Task

from fledge_tasks import fresh, output, usage
from fledge_tasks.action import StageAction, StageFailed
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import short
from fledge_tasks.errors import FledgeError
from fledge_tasks.explain import why
from fledge_tasks.plan import ImagePlan, Layer
from fledge_tasks.planner import Planner

Values = dict[str, Any]

STAGES = ("resolve", "fetch", "unpack", "mkfs", "assemble", "verity", "manifest")
DOIT_CONFIG = {"backend": "fledge-memory", "dep_file": ":none:", "default_tasks": ["build"], "verbosity": 0}
_DOCS = {
    "resolve": "look up references and pin them in fledge.lock",
    "fetch": "get the blobs of layers that are not unpacked yet",
    "unpack": "turn blobs into payload and index",
    "mkfs": "make filesystems without their file data",
    "assemble": "put image files together",
    "verity": "make hash trees for dm-verity",
    "manifest": "write manifests",
    "build": "build images: all of the above",
}


_BUILDERS = ("fledge_tasks.resolve", "fledge_tasks.results")  # and what they import: the other stages


class _Fresh:
    """An up-to-date check: asks `function`, and takes an error for 'no', since the action will meet it, too."""

    # doit looks at the signature of each check; building it anew for thousands of tasks takes its time.
    __signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("task", "values")]
    )

    def __init__(self, function: Callable[[], bool], missing: Callable[[], None], missed: dict[str, bool]) -> None:
        self._function = function
        self._missing = missing
        self._missed = missed

    def __repr__(self) -> str:
        return "cache and results: `fledge explain` tells"  # what `doit info` shows of a task that has to run

    def __call__(self, task: Task, values: object) -> bool:
        del values
        self._missed[task.name] = True
        with contextlib.suppress(FledgeError):
            if self._function():
                self._missed[task.name] = False
                return True
            self._missing()
        # Now that something has to run: workers are forked from this process, and need not import it.
        for name in _BUILDERS:
            importlib.import_module(name)
        return False


class Graph:
    """Makes the tasks of the planner's workspace.

    `update` is that of `resolve`; `tell` is told, once for each image that is not up to date, its
    name and in one line why. `after` are tasks of somebody else that make files which images need:
    they run before anything of an image is looked at.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        update: bool = False,
        tell: Callable[[str, str], None] | None = None,
        after: Iterable[str] = (),
    ) -> None:
        self._planner = planner
        self._after = tuple(after)
        self._update = update
        self._tell = tell
        self._told: set[str] = set()
        self._layers: set[str] = set()
        self._agents: set[str] = set()
        self._images: list[ImageConfig] = []
        self._missed: dict[str, bool] = {}

    def record(self) -> None:
        """Note in the index what a run of the tasks came to, see `usage`. For the process that ran doit."""
        usage.record(self._planner, self._images, self._missed)

    def tasks(self, images: Iterable[ImageConfig]) -> list[Task]:
        """Return the tasks of these images, and one group for each stage."""
        tasks: list[Task] = []
        self._images = list(images)
        with self._planner.digest_of.together():
            for image in self._images:
                tasks.extend(self._image(image))
        groups = []
        for stage in (*STAGES, "build"):
            members = [task.name for task in tasks if task.subtask_of == stage or task.name.startswith(f"_{stage}:")]
            groups.append(Task(stage, None, task_dep=members, has_subtask=True, doc=_DOCS[stage]))
        return groups + tasks

    def _image(self, image: ImageConfig) -> Iterator[Task]:
        planner, name = self._planner, image.name
        try:
            plan = planner.plan(image)
        except FledgeError:
            plan = None  # whoever runs a task of this image is told
        missing = partial(self._missing, image)
        check = self._check_resolve(image)
        after = [f"_files:{name}"] if self._after else []
        for task in after:
            yield Task(task, None, uptodate=[partial(self._reread, image)], task_dep=self._after)
        yield self._task(
            "resolve", name, _resolve, (planner, image, *self._updates(image)), check, missing, task_dep=after
        )  # fmt: skip
        if plan is None:
            yield from self._late_tasks(image)
            before, layers = [*after, f"resolve:{name}"], [f"_layers:{name}"]
        else:
            before, layers = after, _names("unpack", plan)
            yield from self._layer_tasks(plan)
        needs = [f"resolve:{name}"] if plan else []
        yield self._task(
            "mkfs", name, _mkfs, (planner, image), self._check(image, partial(fresh.is_made, planner.store)),
            partial(self._missing_filesystem, image),
            setup=[*needs, *layers], task_dep=before,
        )  # fmt: skip
        yield self._task(
            "assemble", name, _assemble, (planner, image), self._check(image, _is_assembled), missing,
            setup=[f"mkfs:{name}", *layers], task_dep=before,
            clean=[(_remove, [planner.workspace.output(image)])],
        )  # fmt: skip
        described = [f"assemble:{name}"]
        if image.output.verity:
            described.append(f"verity:{name}")
            yield self._task(
                "verity", name, _verity, (planner, image), self._check(image, _is_hashed), missing,
                setup=needs, task_dep=[f"assemble:{name}"],
                clean=[(_remove, [planner.workspace.tree_output(image)])],
            )  # fmt: skip
        yield self._task(
            "manifest", name, _manifest, (planner, image), self._check(image, _is_described), missing,
            setup=needs, task_dep=described,
            clean=[(_remove, [planner.workspace.manifest_output(image)])],
        )  # fmt: skip
        yield Task(f"build:{name}", None, task_dep=[f"manifest:{name}"], subtask_of="build", doc=f"build {name}")

    def _late_tasks(self, image: ImageConfig) -> Iterator[Task]:
        """Yield what stands for the layers of an image until it is resolved; `doit list` hides these names.

        `_fetch` and `_unpack` are members of the groups of these names.
        """
        for stage in ("layers", "fetch", "unpack"):
            name = f"_{stage}:{image.name}"
            loader = DelayedLoader(partial(self._late, image, name, stage), executed=f"resolve:{image.name}")
            yield Task(name, None, loader=loader)

    def _late(self, image: ImageConfig, name: str, stage: str) -> Iterator[Task]:
        try:
            plan = self._planner.plan(image)
        except FledgeError:
            plan = None
        if plan is None:
            # Of an image that is built, mkfs will say it.
            says_it = [] if stage == "layers" else [(StageAction(_unplanned, (self._planner, image)),)]
            yield Task(name, says_it or None, has_subtask=not says_it)
            return
        yield from self._layer_tasks(plan)
        of = "unpack" if stage == "layers" else stage
        yield Task(name, None, task_dep=_names(of, plan), has_subtask=True)

    def _layer_tasks(self, plan: ImagePlan) -> Iterator[Task]:
        planner = self._planner
        missing, store = partial(self._missing, plan.image), planner.store
        for layer in plan.layers:
            if layer.ref.diff_id in self._layers:
                continue
            self._layers.add(layer.ref.diff_id)
            name = short(layer.ref.diff_id)
            yield self._task(
                "fetch", name, _fetch, (planner, plan, layer), partial(fresh.is_fetched, store, layer), missing,
                turn=f"fetch for {plan.image.name}",  # the first gets the blobs of all
            )  # fmt: skip
            yield self._task(
                "unpack", name, _unpack, (planner, plan, layer), partial(fresh.is_unpacked, store, layer), missing,
                setup=[f"fetch:{name}"],
            )  # fmt: skip

    def _reread(self, image: ImageConfig, task: Task, values: Values) -> bool:  # noqa: ARG002  # doit looks at the names
        self._planner.reread(image)
        return False

    def _missing(self, image: ImageConfig) -> None:
        """Prepare for running a task of an image, before anything that stands behind it is looked for, and found."""
        self._planner.hold(image)
        if self._tell and image.name not in self._told:
            self._told.add(image.name)
            self._tell(image.name, why(self._planner, image))

    def _missing_filesystem(self, image: ImageConfig) -> None:
        self._missing(image)
        if image.filesystem.type != "ext4":
            return
        from fledge_tasks.filesystems import ext4

        with contextlib.suppress(FledgeError):  # mkfs will say it
            ext4.load()  # here, and not in each worker anew

    def _updates(self, image: ImageConfig) -> tuple[bool, bool]:
        """Return whether to ask anew for an image, and for its agent: that is done for the first image that has it."""
        agent = self._planner.agent_name(image)
        is_first = agent is not None and agent not in self._agents
        if agent is not None:
            self._agents.add(agent)
        return self._update, self._update and is_first

    def _check_resolve(self, image: ImageConfig) -> Callable[[], bool]:
        return lambda: not self._update and fresh.is_resolved(self._planner, image)

    def _check(self, image: ImageConfig, check: Callable[[ImagePlan], bool]) -> Callable[[], bool]:
        def function() -> bool:
            plan = self._planner.plan(image)
            return plan is not None and check(plan)

        return function

    def _task(
        self,
        stage: str,
        name: str,
        function: Callable[..., Values],
        arguments: tuple[object, ...],
        check: Callable[[], bool],
        missing: Callable[[], None],
        *,
        setup: Iterable[str] = (),
        task_dep: Iterable[str] = (),
        clean: Iterable[Any] = (),
        turn: str | None = None,
    ) -> Task:
        return Task(
            f"{stage}:{name}",
            [(StageAction(function, arguments),)],
            uptodate=[_Fresh(check, missing, self._missed)],
            setup=list(setup),
            task_dep=list(task_dep),
            clean=list(clean),
            subtask_of=stage,
            doc=f"{stage} {name}",
            meta={"turn": turn, "is_done": check},
            io={"capture": False},
        )


class Loader(TaskLoader2):  # type: ignore[misc]  # doit has no types
    """Gives doit the graph of some images of a workspace."""

    def __init__(self, graph: Graph, images: Iterable[ImageConfig]) -> None:
        super().__init__()
        self._graph = graph
        self._images = tuple(images)

    def setup(self, opt_values: object) -> None:
        """Do nothing: there are no options."""

    def load_doit_config(self) -> dict[str, Any]:
        """Return doit's settings."""
        return dict(DOIT_CONFIG)

    def load_tasks(self, cmd: object, pos_args: object) -> list[Task]:  # noqa: ARG002
        """Return the tasks."""
        return self._graph.tasks(self._images)


def _names(stage: str, plan: ImagePlan) -> list[str]:
    """Return the names of an image's tasks of a stage, the largest layer first.

    Its fetch brings the blobs of all, and the others are unpacked while it is on its way.
    """
    layers = sorted(dict.fromkeys(plan.layers), key=lambda layer: -layer.ref.size)
    return [f"{stage}:{short(layer.ref.diff_id)}" for layer in layers]


def _plan(planner: Planner, image: ImageConfig) -> ImagePlan:
    plan = planner.plan(image)
    if plan is None:
        raise FledgeError(str(planner.unresolved(image)), where=image.name, hint="it changed meanwhile: run again")
    return plan


def _unplanned(planner: Planner, image: ImageConfig) -> Values:
    """Raise why an image has no plan though it was resolved."""
    _plan(planner, image)
    return {}


# What builds is imported when something has to be built: it takes longer than a build that does nothing.


def _resolve(planner: Planner, image: ImageConfig, update: bool, update_agent: bool) -> Values:
    from fledge_tasks.resolve import resolve

    return resolve(planner, image, update=update, update_agent=update_agent)


def _fetch(planner: Planner, plan: ImagePlan, layer: Layer) -> Values:
    from fledge_tasks import stages

    return stages.fetch(planner, plan, layer)


def _unpack(planner: Planner, plan: ImagePlan, layer: Layer) -> Values:
    from fledge_tasks import stages

    return stages.unpack(planner, plan, layer)


def _mkfs(planner: Planner, image: ImageConfig) -> Values:
    from fledge_tasks import stages

    return stages.mkfs(planner, _plan(planner, image))


def _assemble(planner: Planner, image: ImageConfig) -> Values:
    from fledge_tasks import results

    return results.assemble(planner, _plan(planner, image))


def _verity(planner: Planner, image: ImageConfig) -> Values:
    from fledge_tasks import results

    return results.make_hash_tree(planner, _plan(planner, image))


def _manifest(planner: Planner, image: ImageConfig) -> Values:
    from fledge_tasks import results

    return results.write_manifest(planner, _plan(planner, image))


def _remove(path: Path) -> StageFailed | None:
    """Clean: doit takes False for a failure, and shows what is raised with its traceback."""
    try:
        output.remove(path)
    except OSError as error:
        return StageFailed(FledgeError(str(error)))
    return None


def _is_assembled(plan: ImagePlan) -> bool:
    return isinstance(fresh.is_assembled(plan), output.Written)


def _is_hashed(plan: ImagePlan) -> bool:
    return isinstance(fresh.is_hashed(plan), output.Written)


def _is_described(plan: ImagePlan) -> bool:
    return isinstance(fresh.is_described(plan), output.Written)
