"""What builds leave in the index for later: what each image was last made of, and what reuse saved.

    image:<lock file>:<name>   {"lock": [names in the lock file], "keys": {stage: [key]}, "texts": {stage: key text},
                                "seconds", "bytes", "time"}
    day:<YYYY-MM-DD>           {"hits", "misses", "seconds_built", "seconds_saved", "bytes_built", "bytes_saved"}

Of an image there are the keys of its entries by stage, and the key texts of the stages that make no
entry. `seconds` and `bytes` are what all its stages come to: what a build saves that finds
everything. Days are those of UTC. Like all of the index this may be lost: then gc knows only the
workspace that it is called in, `explain` knows no earlier build, and counting starts anew.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from fledge_tasks import fresh, output
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import Digest, short
from fledge_tasks.errors import FledgeError
from fledge_tasks.index import Index
from fledge_tasks.plan import ImagePlan
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store

REFRESH_SECONDS = 86_400
_T = TypeVar("_T")


class Made(msgspec.Struct, frozen=True):
    """What an image was last made of. `lock` names its entries in the lock file, `time` is when this was noted."""

    lock: list[str]
    keys: dict[str, list[Digest]]
    texts: dict[str, str]
    seconds: float
    bytes: int
    time: int

    def all_keys(self) -> set[Digest]:
        """Return the keys of all its entries."""
        return {key for keys in self.keys.values() for key in keys}


class Sums(msgspec.Struct):
    """Numbers that can be added up."""

    def add(self, other: Self) -> None:
        """Add the numbers of `other`."""
        for field in self.__struct_fields__:
            setattr(self, field, round(getattr(self, field) + getattr(other, field), 3))


class Counts(Sums):
    """What builds did: stages found and made, seconds and bytes that those saved and these took.

    What a stage saves is what it took to make, for each image that needs it: what it would take
    if every image were built by itself, from nothing.
    """

    hits: int = 0
    misses: int = 0
    seconds_built: float = 0.0
    seconds_saved: float = 0.0
    bytes_built: int = 0
    bytes_saved: int = 0


def record(planner: Planner, images: Iterable[ImageConfig], missed: Mapping[str, bool]) -> None:
    """Note what a run came to, and that what it used was used now.

    `missed` tells for each task that was looked at whether it had to run.
    """
    store, counts, built = planner.store, Counts(), set[str]()
    with store.index.together():
        for image in images:
            if f"manifest:{image.name}" not in missed:
                continue
            try:
                plan = planner.plan(image)
            except FledgeError:
                continue
            if plan is not None:
                counts.add(_note(store, planner, plan, missed, built))
        if counts != Counts():
            name = f"day:{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
            today = _decoded(store.index.get(name), Counts) or Counts()
            today.add(counts)
            store.index.set(name, msgspec.to_builtins(today))


def _note(store: Store, planner: Planner, plan: ImagePlan, missed: Mapping[str, bool], built: set[str]) -> Counts:
    """Note what an image is made of, and return its counts; `built` are the tasks that others have counted."""
    made = made_image(planner, plan.image)
    now = int(time.time())
    tasks = list(_tasks(plan))
    is_changed = any(missed.get(task) for task, _ in tasks)
    if made is None or is_changed or not 0 <= now - made.time < REFRESH_SECONDS:
        written = fresh.is_described(plan)
        if not isinstance(written, output.Written):
            return Counts()  # it failed, or was not asked for
        made = _made(store, planner, plan, now)
        store.index.set(_name(planner, plan.image), msgspec.to_builtins(made))
        for used in made.all_keys():
            store.touch(used)
    if not is_changed:
        return Counts(hits=len(tasks), seconds_saved=made.seconds, bytes_saved=made.bytes)
    counts = Counts()
    for task, key in tasks:
        seconds, size = _cost(store, plan, key)
        if missed.get(task) and task not in built:
            built.add(task)
            counts.add(Counts(misses=1, seconds_built=seconds, bytes_built=size))
        else:
            counts.add(Counts(hits=1, seconds_saved=seconds, bytes_saved=size))
    return counts


def made_images(index: Index) -> dict[str, Made]:
    """Return what is noted of images, by '<lock file>:<name>'."""
    return _all_noted(index, "image", Made)


def made_image(planner: Planner, image: ImageConfig) -> Made | None:
    """Return what is noted of one image."""
    return _decoded(planner.store.index.get(_name(planner, image)), Made)


def days(index: Index) -> dict[str, Counts]:
    """Return what was counted, by day."""
    return _all_noted(index, "day", Counts)


def lock_path(name: str) -> Path:
    """Return the lock file in the name of an image's note."""
    return Path(name.rpartition(":")[0])


def _made(store: Store, planner: Planner, plan: ImagePlan, now: int) -> Made:
    costs = [_cost(store, plan, key) for _, key in _tasks(plan)]
    names = [planner.lock_name(plan.image), planner.agent_name(plan.image)]
    keys = {
        "config": [plan.config.key()],
        "agent": [plan.agent.key()] if plan.agent else [],
        "unpack": [layer.unpack_key for layer in plan.layers],
        "customize": [plan.customize.key()],
        "mkfs": [plan.mkfs.key()],
    }
    texts = {"assemble": plan.assemble.text()}
    if plan.image.output.verity and isinstance(image := fresh.is_assembled(plan), output.Written):
        texts["verity"] = plan.verity(image.raw_checksum).text()
    if not isinstance(record := fresh.description(plan), str):
        texts["manifest"] = record.text()
    return Made(
        [name for name in names if name], keys, texts,
        round(sum(seconds for seconds, _ in costs), 3), sum(size for _, size in costs), now,
    )  # fmt: skip


def _tasks(plan: ImagePlan) -> Iterator[tuple[str, Digest | None]]:
    """Yield the tasks of an image with the keys of their entries, where they have one that stays.

    Fetches are left out: their cost is with the layers, and which of them has to run is a matter of
    chance, since one connection serves all layers of an image.
    """
    name = plan.image.name
    yield f"resolve:{name}", plan.config.key()
    for layer in dict.fromkeys(plan.layers):
        yield f"unpack:{short(layer.ref.diff_id)}", layer.unpack_key
    yield f"mkfs:{name}", plan.mkfs.key()
    yield f"assemble:{name}", plan.assemble.key()
    if plan.image.output.verity:
        yield f"verity:{name}", None
    yield f"manifest:{name}", None


def _cost(store: Store, plan: ImagePlan, key: Digest | None) -> tuple[float, int]:
    """Return the seconds and bytes of what a task made; those of a fetch are with its layer."""
    if key is None:
        return 0.0, 0
    if key == plan.assemble.key():
        written = fresh.is_assembled(plan)
        return (written.seconds, written.size) if isinstance(written, output.Written) else (0.0, 0)
    entry = store.look(key)
    return (entry.cost_seconds, entry.size) if entry else (0.0, 0)


def _name(planner: Planner, image: ImageConfig) -> str:
    return f"image:{planner.workspace.lock}:{image.name}"


def _all_noted(index: Index, kind: str, type_: type[_T]) -> dict[str, _T]:
    noted = {name: _decoded(value, type_) for name, value in sorted(index.items(kind).items())}
    return {name: value for name, value in noted.items() if value is not None}


def _decoded(value: Any, kind: type[_T]) -> _T | None:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return None
