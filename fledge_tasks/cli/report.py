"""What a build did, for machines and for the closing table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec

from fledge_tasks import fresh, output
from fledge_tasks.config import ImageConfig
from fledge_tasks.digest import short
from fledge_tasks.errors import FledgeError
from fledge_tasks.plan import ImagePlan
from fledge_tasks.planner import Planner
from fledge_tasks.reporter import TaskResult

Status = Literal["hit", "built", "not-needed", "failed"]


class StageReport(msgspec.Struct, omit_defaults=True):
    """One task of an image. `bytes` were moved or made, 0 for a hit. `error` only when it failed."""

    stage: str
    task: str
    key: str | None
    status: Status
    seconds: float
    bytes: int
    error: str | None = None


class ImageReport(msgspec.Struct):
    """One image; `sha256` and `bytes` are those of the image file, null and 0 when there is none."""

    name: str
    image: str
    manifest: str
    sha256: str | None
    bytes: int
    stages: list[StageReport]

    def count(self, status: Status) -> int:
        """Return how many stages ended like this."""
        return sum(stage.status == status for stage in self.stages)


class Summary(msgspec.Struct):
    """The object that `--json` prints."""

    images: list[ImageReport]
    seconds: float


@dataclass(frozen=True)
class Report:
    """A summary, and what failed."""

    summary: Summary
    errors: list[str]
    exit_code: int


def make_report(
    planner: Planner, images: Iterable[ImageConfig], results: Mapping[str, TaskResult], seconds: float
) -> Report:
    """Sum up a run."""
    # One connection fetches all missing layers of an image: the task that had it knows them.
    fetched = {
        f"fetch:{short(diff_id)}": count
        for result in results.values()
        for diff_id, count in result.values.get("fetched", {}).items()
    }
    reports = [_image(planner, image, results, fetched) for image in images]
    failures = {name: result for name, result in results.items() if result.status == "failed"}
    errors = list(dict.fromkeys(f"{name}: {result.error}" for name, result in failures.items()))
    codes = {result.error.exit_code if isinstance(result.error, FledgeError) else 1 for result in failures.values()}
    return Report(Summary(reports, round(seconds, 3)), errors, min(codes, default=0))


def _image(
    planner: Planner, image: ImageConfig, results: Mapping[str, TaskResult], fetched: Mapping[str, int]
) -> ImageReport:
    try:
        plan = planner.plan(image)
    except FledgeError:
        plan = None
    written = fresh.is_assembled(plan) if plan else ""
    reports = []
    for stage, task, key in _tasks(image, plan):
        result = results.get(task)
        status: Status = "not-needed"
        if result is not None and result.status != "skipped":
            status = result.status
        count = int(result.values.get("bytes", 0)) if result is not None else 0
        if task in fetched and status != "failed":
            status, count = "built", fetched[task]
        error = str(result.error) if result is not None and status == "failed" else None
        reports.append(StageReport(stage, task, key, status, round(result.seconds if result else 0.0, 3), count, error))
    return ImageReport(
        image.name,
        str(planner.workspace.output(image)),
        str(planner.workspace.manifest_output(image)),
        written.sha256 if isinstance(written, output.Written) else None,
        written.size if isinstance(written, output.Written) else 0,
        reports,
    )


def _tasks(image: ImageConfig, plan: ImagePlan | None) -> Iterator[tuple[str, str, str | None]]:
    """Yield (stage, task name, key), in the order of the pipeline."""
    yield "resolve", f"resolve:{image.name}", plan.config.key() if plan else None
    layers = {layer.ref.diff_id: layer for layer in plan.layers} if plan else {}
    for diff_id, layer in layers.items():
        yield "fetch", f"fetch:{short(diff_id)}", layer.blob.key()
    for diff_id, layer in layers.items():
        yield "unpack", f"unpack:{short(diff_id)}", layer.unpack_key
    yield "mkfs", f"mkfs:{image.name}", plan.mkfs.key() if plan else None
    yield "assemble", f"assemble:{image.name}", plan.assemble.key() if plan else None
    if image.output.verity:
        tree = fresh.is_hashed(plan) if plan else ""
        yield "verity", f"verity:{image.name}", None if isinstance(tree, str) else tree.key
    record = fresh.description(plan) if plan else ""
    yield "manifest", f"manifest:{image.name}", None if isinstance(record, str) else record.key()
