"""Why does a build of an image run what it runs? Each stage, hit or miss, with what changed in its key.

The new key text is compared, value by value, with the newest one of the same image: `usage` knows
its keys, the store its texts. Where a value comes from is said in the words of fledge.toml.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from fledge_tasks import fresh, usage
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import short
from fledge_tasks.errors import FledgeError
from fledge_tasks.plan import ImagePlan, Layer
from fledge_tasks.planner import Planner
from fledge_tasks.usage import Made

_LINE = re.compile(r"([a-z_.]+)(?:\[([0-9]+)\])?(?:\.([a-z_]+))? = (.*)")  # field, number, field below, value
_ORIGINS = {
    "preallocate": "[filesystem] preallocate",
    "format": "[output] format", "compression": "[output] compression",
    "epoch": "SOURCE_DATE_EPOCH, else the image's 'created'", "tools": "the host's tools", "config": "the OCI config",
    "agent": "[agent]", "name": "[manifest] name", "image": "[source] image",
    "image_digest": "the image", "rootfs": "where the workspace is", "checksum": "the image file",
}  # fmt: skip
_DERIVED = {"uuid", "salt", "layers", "filesystem"}  # follow from what is shown elsewhere


class Change(NamedTuple):
    """One value of a key text. None: it is not there. `origin` is what sets it."""

    what: str
    old: str | None
    new: str | None
    origin: str

    def __str__(self) -> str:
        shown = _octal if self.what.endswith(" mode") else _shown
        values = " -> ".join("(none)" if value is None else shown(value) for value in (self.old, self.new))
        return f"{self.what}: {values}" + (f" ({self.origin})" if self.origin else "")


class Explanation(NamedTuple):
    """One task of an image. `reason` is one line for a miss and '' otherwise.

    hit         what it makes is there          not-needed  it is not, and nobody asks for it
    miss        a build would run it
    """

    stage: str
    task: str
    status: Literal["hit", "miss", "not-needed"]
    reason: str = ""
    changes: tuple[Change, ...] = ()

    def __str__(self) -> str:
        """Return reason and changes in one line."""
        more = f" and {len(self.changes) - 1} more" if len(self.changes) > 1 else ""
        return f"{self.changes[0]}{more}" if self.changes else self.reason


def explain(planner: Planner, image: ImageConfig) -> Iterator[Explanation]:
    """Yield the tasks of an image in the order of the pipeline; only the first of one that must be resolved.

    Runs nothing. Raises what `Planner.plan` raises.
    """
    plan = planner.plan(image)
    if plan is None:
        yield Explanation("resolve", f"resolve:{image.name}", "miss", str(planner.unresolved(image)))
        return
    store, made = planner.store, usage.made_image(planner, image)
    assembled, image_file = fresh.is_assembled(plan), fresh.expected(plan)
    hashed = fresh.is_hashed(plan, image_file) if image.output.verity else None
    tree = fresh.expected_tree(plan, image_file) if image.output.verity and image_file else None
    record = fresh.description(plan, image_file, tree)
    described = fresh.is_written(plan, record)
    assembles = isinstance(assembled, str)
    makes = assembles and not fresh.is_made(store, plan)

    def task(stage: str, name: str, is_there: bool, is_needed: bool, why: str) -> Explanation:
        status: Literal["hit", "miss", "not-needed"] = "hit" if is_there else "miss" if is_needed else "not-needed"
        return Explanation(stage, f"{stage}:{name}", status, why if status == "miss" else "")

    missing = "the OCI config or the agent is not in the cache"
    resolves = makes or isinstance(hashed, str) or isinstance(described, str)
    yield task("resolve", image.name, fresh.is_resolved(planner, image), resolves, missing)
    for layer in dict.fromkeys(plan.layers):
        name, reason = short(layer.ref.diff_id), _layer_reason(layer, made)
        moving = f"{reason} ({layer.ref.size} bytes to move)"
        yield task("fetch", name, fresh.is_fetched(store, layer), assembles, moving)
        yield task("unpack", name, fresh.is_unpacked(store, layer), assembles, reason)
    yield _mkfs(planner, plan, made) if makes else Explanation("mkfs", f"mkfs:{image.name}", "hit")
    if isinstance(assembled, str):
        changes = _changes(_noted(made, "assemble"), _values(plan.assemble.text()))
        yield Explanation("assemble", f"assemble:{image.name}", "miss", assembled, tuple(changes))
    else:
        yield Explanation("assemble", f"assemble:{image.name}", "hit")
    if image_file is None:
        for stage in [*(["verity"] if image.output.verity else []), "manifest"]:
            yield Explanation(stage, f"{stage}:{image.name}", "miss", "the image file is made anew")
        return
    if image.output.verity:
        if isinstance(hashed, str):
            changes = _changes(_noted(made, "verity"), _values(plan.verity(image_file.raw_checksum).text()))
            yield Explanation("verity", f"verity:{image.name}", "miss", hashed, tuple(changes))
        else:
            yield Explanation("verity", f"verity:{image.name}", "hit")
    if isinstance(described, str):
        changes = iter(()) if isinstance(record, str) else _changes(_noted(made, "manifest"), _values(record.text()))
        yield Explanation("manifest", f"manifest:{image.name}", "miss", described, tuple(changes))
    else:
        yield Explanation("manifest", f"manifest:{image.name}", "hit")


def why(planner: Planner, image: ImageConfig) -> str:
    """Return one line about why a build of the image runs anything, '' if it does not. Never raises."""
    try:
        misses = [each for each in explain(planner, image) if each.status == "miss"]
    except FledgeError as error:
        return error.message.partition("\n")[0]
    # What changed says more than what is missing because of that.
    return str(next((each for each in misses if each.changes), misses[0])) if misses else ""


def _layer_reason(layer: Layer, made: Made | None) -> str:
    if made is None:
        return "the layer is not in the cache"
    is_known = layer.unpack_key in made.keys.get("unpack", ())
    return "the layer is not in the cache any more" if is_known else "the layer is new to this image"


def _mkfs(planner: Planner, plan: ImagePlan, made: Made | None) -> Explanation:
    name = f"mkfs:{plan.image.name}"
    if made is None:
        return Explanation("mkfs", name, "miss", "no such filesystem in the cache, and no earlier build is known")
    changes = _layer_changes(plan, made)
    for stage, record in (("customize", plan.customize), ("mkfs", plan.mkfs)):
        changes += _changes(_stored(planner, made, stage), _values(record.text()), plan.sources)
    if changes:
        return Explanation("mkfs", name, "miss", "what goes in has changed", tuple(changes))
    is_same = made.keys.get("mkfs") == [plan.mkfs.key()]
    lost = "the filesystem is not in the cache any more"
    return Explanation("mkfs", name, "miss", lost if is_same else "what goes in has changed; what it was is not known")


def _layer_changes(plan: ImagePlan, made: Made) -> list[Change]:
    old, new = made.keys.get("unpack", []), [layer.unpack_key for layer in plan.layers]
    names = {layer.unpack_key: layer.ref.diff_id for layer in plan.layers}
    gone = [Change("layer", key, None, "the image") for key in old if key not in new]
    added = [Change("layer", None, names[key], "the image") for key in new if key not in old]
    moved = [Change("layers", "in another order", "in this order", "the image")]
    return gone + added or (moved if old != new else [])


def _stored(planner: Planner, made: Made, stage: str) -> dict[str, str]:
    entries = (planner.store.look(key) for key in made.keys.get(stage, ()))
    return _values(next((entry.key_text for entry in entries if entry), ""))


def _noted(made: Made | None, stage: str) -> dict[str, str]:
    return _values(made.texts.get(stage, "") if made else "")


def _values(text: str) -> dict[str, str]:
    """Return the values of a key text by name. Values of lists of records are named by what they are about."""
    values: dict[str, str] = {}
    items: dict[str, dict[str, str]] = {}
    for line in text.splitlines()[1:]:
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        field, number, below, value = match.groups()
        if number is not None and below is not None:
            items.setdefault(f"{field}[{number}]", {})[below] = value
        elif field == "user":  # the table [manifest], JSON in a JSON string
            values |= _leaves("manifest", json.loads(json.loads(value)))
        else:
            values[field if number is None else f"{field}[{number}]"] = value
    for name, item in items.items():
        title = json.loads(item["destination"]) if "destination" in item else name
        for below, value in item.items():
            if below != "destination":
                values[f"{title} {below}"] = value
    return values


def _leaves(name: str, value: object) -> dict[str, str]:
    """Return the values in a table and in those below it, as JSON, by the path of their key."""
    if not isinstance(value, dict):
        return {name: json.dumps(value)}
    return {path: leaf for key, below in value.items() for path, leaf in _leaves(f"{name}.{key}", below).items()}


def _changes(
    old: Mapping[str, str], new: Mapping[str, str], sources: Mapping[str, object] | None = None
) -> Iterator[Change]:
    if not old:
        return
    for name in sorted(old.keys() | new.keys()):
        field = name.partition("[")[0]
        table, _, key = field.partition(".")
        if old.get(name) == new.get(name) or field in _DERIVED or table == "labels":
            continue
        destination = name.rpartition(" ")[0]
        mapped = str((sources or {}).get(destination, "")) if destination else ""
        origin = f"[{table}] {key}" if key else _ORIGINS.get(field, "")
        yield Change(name, old.get(name), new.get(name), mapped or origin)


def _octal(value: str) -> str:
    return f"{int(value):04o}"


def _shown(value: str) -> str:
    text = value.strip('"')
    if re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        return f"{text[:19]}..."
    return value if len(value) <= 80 else f"{value[:77]}..."
