"""A generated monorepo: how time and disk grow with the number of images, and what a build costs that does nothing.

See README.md. Exit code 1 when a target is missed. `--write` puts the results into docs/scale.md and docs/scale.svg.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import plot
from bench.generated import MAPPED_FILES, Monorepo, Shape
from tests.real.images import cache_folder
from tests.real.registry import Registry
from tests.workspaces import REPOSITORY, Workspace

SERVICES = Shape(bases=3, base=(600, 40_960), own=(32, 32_768))
TINY = Shape(bases=3, base=(20, 2_048), own=(3, 1_000))
LARGE = Shape(bases=2, base=(3_000, 102_400), own=(3, 1_000))

COUNTS = (25, 50, 100, 200)
NOTHING_SECONDS = {1: 0.35, 200: 1.0, 1000: 2.5}
STORE_RATIO, GROWTH_RATIO, JOBS_RATIO = 1.2, 1.2, 1.5

_PAGE = """# Scale

Written by `make bench-monorepo` (`bench/monorepo.py`). {machine}, most of it not ours.
Times of another machine will differ; counts and ratios should not.

N images on {bases}, each with a layer of its own of {own},
a mapped file and a mapped folder of {mapped} files, from a registry on loopback into an empty cache:

{table}

![Seconds and store by the number of images](scale.svg)

The bases are transferred and unpacked once, whatever the number of images. Each image adds its own layer, the
skeleton of its filesystem, and one copy of all its data into its disk. *Payload* is the bytes of all files in all
layers, each layer counted once; *store* is what `cache/` takes on the disk, index and folders included.

A mapped file changed in one of {images} images: {mapping:.2f} s. *mkfs*, *assemble* and *manifest* of that image run.

```text
{checks}
```

Times are those of whole processes: medians of five where nothing changed, the best of three for the jobs.
"""
_SETTLE_SECONDS = 2.5  # mapped files younger than two seconds are read in each run
_NOTHING_RUNS = 5


@dataclass(frozen=True)
class Cold:
    """A cold build of `images`. `base_moves` are the transfers of base layers, `unpacked` the layers unpacked."""

    images: int
    seconds: float
    moved_bytes: int
    base_moves: int
    own_moves: int
    unpacked: int
    store_bytes: int
    payload_bytes: int

    @property
    def store_ratio(self) -> float:
        """The store's bytes on the disk for each byte of payload."""
        return self.store_bytes / self.payload_bytes


@dataclass(frozen=True)
class Check:
    """A measured value beside its target."""

    found: str
    target: str
    is_met: bool

    def __str__(self) -> str:
        return f"{'PASS' if self.is_met else 'FAIL'}  {self.found:<64} target {self.target}"


@dataclass(frozen=True)
class Run:
    """A finished build: seconds of the whole process, processor seconds of it and its children, and its summary."""

    seconds: float
    processor_seconds: float
    summary: dict[str, Any]


class Bench:
    """Builds workspaces in one scratch folder, and times whole processes."""

    def __init__(self, scratch: Path, registry: Registry) -> None:
        self._scratch = scratch
        self._registry = registry

    def workspace(self, name: str) -> Workspace:
        """Return an empty workspace with an empty cache."""
        root = self._scratch / name
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        return Workspace(root, self._registry.home)

    def cold(self, monorepo: Monorepo, count: int) -> Cold:
        """Build the first `count` images into an empty cache, with the default number of jobs."""
        place = self.workspace("services")
        monorepo.add(place, count)
        with self._registry.transfers() as moved:
            run = build(place)
        sizes = {layer.blob: layer.size for layer in [*monorepo.bases, *monorepo.own]}
        moves = Counter(blob for blob in moved if blob in sizes)
        bases = sum(moves[layer.blob] for layer in monorepo.bases)
        return Cold(
            images=count,
            seconds=run.seconds,
            moved_bytes=sum(sizes[blob] * times for blob, times in moves.items()),
            base_moves=bases,
            own_moves=moves.total() - bases,
            unpacked=len(
                {task for task, status in _tasks(run.summary) if status == "built" and task.startswith("unpack:")}
            ),
            store_bytes=_disk_bytes(place.root / "cache"),
            payload_bytes=monorepo.shape.payload_bytes(count),
        )

    def mapping(self, monorepo: Monorepo, count: int) -> list[float]:
        """Change a mapped file of one of the images that `cold` built last, three times."""
        place, times = Workspace(self._scratch / "services", self._registry.home), []
        name = monorepo.name(count // 2)
        for number in range(3):
            (place.root / name / "static" / "0.txt").write_text(f"changed {number}\n")
            run = build(place)
            built = sorted(task for task, status in _tasks(run.summary) if status == "built")
            assert built == [f"{stage}:{name}" for stage in ("assemble", "manifest", "mkfs")], built
            times.append(run.seconds)
        return times

    def nothing(self, monorepo: Monorepo, counts: Sequence[int]) -> dict[int, list[Run]]:
        """Build images until there are so many, and time builds that do nothing."""
        place, runs = self.workspace("tiny"), dict[int, list[Run]]()
        for count in counts:
            monorepo.add(place, count)
            build(place)
            time.sleep(_SETTLE_SECONDS)
            build(place)
            runs[count] = [build(place) for _ in range(_NOTHING_RUNS)]
            assert all(status != "built" for run in runs[count] for _, status in _tasks(run.summary))
        return runs

    def jobs(self, monorepo: Monorepo, rounds: int) -> dict[int, list[Run]]:
        """Build two cold images that share nothing, with one job and with two, in turns."""
        runs: dict[int, list[Run]] = {1: [], 2: []}
        for _ in range(rounds):
            for jobs, done in runs.items():
                place = self.workspace("large")
                monorepo.add(place, 2)
                os.sync()  # what the last round left to write is not this round's
                done.append(build(place, "-j", str(jobs)))
        shutil.rmtree(self._scratch / "large")
        return runs


def build(place: Workspace, *arguments: str) -> Run:
    """Run `fledge build --json`."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        place.command("build", "--json", *arguments),
        env=place.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"fledge build failed: {done.stderr.decode(errors='replace')}")
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, busy, json.loads(done.stdout))


def _tasks(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [(stage["task"], stage["status"]) for image in summary["images"] for stage in image["stages"]]


def _disk_bytes(folder: Path) -> int:
    """Return what a folder takes on the disk, folders and all."""
    return int(subprocess.check_output(["du", "--summarize", "--block-size=1", folder]).split()[0])


def cold_checks(results: Sequence[Cold]) -> list[Check]:
    """Return what is wanted of cold builds."""
    checks = []
    for cold in results:
        layers = cold.images + SERVICES.bases
        moved = (cold.base_moves, cold.own_moves, cold.unpacked)
        checks.append(
            Check(
                f"{cold.images} images: {moved[0]} bases and {moved[1]} own layers moved, {moved[2]} unpacked",
                f"{SERVICES.bases}, {cold.images}, {layers}",
                moved == (SERVICES.bases, cold.images, layers),
            )
        )
    last, first = results[-1], results[0]
    checks.append(
        Check(
            f"{last.images} images: store {last.store_ratio:.2f} times the payload", f"<= {STORE_RATIO}",
            last.store_ratio <= STORE_RATIO,
        )
    )  # fmt: skip
    growth = (last.seconds / last.images) / (first.seconds / first.images)
    found = f"time for each image at {last.images} is {growth:.2f} times that at {first.images}"
    checks.append(Check(found, f"<= {GROWTH_RATIO}", growth <= GROWTH_RATIO))
    return checks


def nothing_checks(runs: dict[int, list[Run]]) -> list[Check]:
    """Return what is wanted of builds that do nothing."""
    checks = []
    for count, done in runs.items():
        seconds, busy = statistics.median(run.seconds for run in done), min(run.processor_seconds for run in done)
        found = f"nothing changed, {count} images: {seconds:.2f} s ({busy:.2f} s of processor time)"
        checks.append(Check(found, f"< {NOTHING_SECONDS[count]} s", seconds < NOTHING_SECONDS[count]))
    return checks


def jobs_check(runs: dict[int, list[Run]]) -> Check:
    """Return what is wanted of two jobs."""
    best = [min(runs[jobs], key=lambda run: run.seconds) for jobs in (1, 2)]
    one, two = (run.seconds for run in best)
    busy = " and ".join(f"{run.processor_seconds / run.seconds:.1f}" for run in best)
    found = (
        f"two cold images: {one:.1f} s with -j 1, {two:.1f} s with -j 2 ({busy} processors busy): {one / two:.2f} times"
    )
    return Check(found, f">= {JOBS_RATIO}", one / two >= JOBS_RATIO)


def table(results: Sequence[Cold]) -> list[str]:
    """Return the cold builds as a table of Markdown."""
    rows = [
        "| images | seconds | seconds for each | moved | base layers moved | payload | store | ratio |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cold in results:
        moved, payload, store = (
            f"{size / 1e6:.0f} MB" for size in (cold.moved_bytes, cold.payload_bytes, cold.store_bytes)
        )
        rows.append(
            f"| {cold.images} | {cold.seconds:.1f} | {cold.seconds / cold.images:.2f} | {moved} | {cold.base_moves} "
            f"| {payload} | {store} | {cold.store_ratio:.2f} |"
        )
    return rows


def write_docs(results: Sequence[Cold], checks: Sequence[Check], mapping: Sequence[float]) -> None:
    """Write docs/scale.md and its picture."""
    processors = len(os.sched_getaffinity(0))
    base, own = (files * size / 1e6 for files, size in (SERVICES.base, SERVICES.own))
    text = _PAGE.format(
        machine=f"Python {platform.python_version()}, {processors} processors, load {os.getloadavg()[2]:.1f}",
        bases=f"{SERVICES.bases} bases of {base:.0f} MB ({SERVICES.base[0]} files)",
        own=f"{own:.1f} MB ({SERVICES.own[0]} files)",
        mapped=MAPPED_FILES,
        table="\n".join(table(results)),
        images=results[-1].images,
        mapping=min(mapping),
        checks="\n".join(map(str, checks)),
    )
    docs = REPOSITORY / "docs"
    (docs / "scale.md").write_text(text)
    (docs / "scale.svg").write_text(
        plot.svg(
            "Cold builds of a monorepo on three bases", "images", "seconds; 10 MB",
            {
                "seconds": [(cold.images, cold.seconds) for cold in results],
                "store, in 10 MB": [(cold.images, cold.store_bytes / 1e7) for cold in results],
                "payload, in 10 MB": [(cold.images, cold.payload_bytes / 1e7) for cold in results],
            },
        )
    )  # fmt: skip


def main() -> int:
    """Run what was asked for, all without a word, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("cold", "nothing", "jobs"), action="append", help="only this part")
    parser.add_argument("--rounds", type=int, default=3, help="how often one job and two are compared (default: 3)")
    parser.add_argument("--write", action="store_true", help="write docs/scale.md and docs/scale.svg")
    arguments = parser.parse_args()
    parts = arguments.only or ("cold", "nothing", "jobs")
    if arguments.write and set(parts) != {"cold", "nothing", "jobs"}:
        parser.error("--write wants all parts")
    compileall.compile_dir(REPOSITORY / "fledge_tasks", quiet=1)  # as pip does
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=cache_folder()))
    registry = Registry(scratch / "storage", scratch)
    registry.start()
    bench, checks = Bench(scratch, registry), list[Check]()
    cold, mapping = list[Cold](), list[float]()
    try:
        if "nothing" in parts:
            _say("nothing changed: building up to 1000 images takes minutes")
            checks += nothing_checks(bench.nothing(Monorepo(registry.host, "tiny", TINY), list(NOTHING_SECONDS)))
            shutil.rmtree(scratch / "tiny")
        if "cold" in parts:
            services = Monorepo(registry.host, "service", SERVICES)
            for count in COUNTS:
                _say(f"cold: {count} images")
                cold.append(bench.cold(services, count))
            mapping = bench.mapping(services, COUNTS[-1])
            shutil.rmtree(scratch / "services")
            checks += cold_checks(cold)
        if "jobs" in parts:
            _say("one job against two")
            checks.append(jobs_check(bench.jobs(Monorepo(registry.host, "large", LARGE), arguments.rounds)))
    finally:
        registry.stop()
        shutil.rmtree(scratch)
    if cold:
        print("\n".join([*table(cold), "", f"one mapping changed: {min(mapping):.2f} s to {max(mapping):.2f} s"]))
    print("\n".join(map(str, checks)))
    if arguments.write:
        write_docs(cold, checks, mapping)
    return 0 if all(check.is_met for check in checks) else 1


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
