"""Many builds at once on one store, and clean-up beside them: nothing is made twice, lost or spoiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from fledge_tasks import stages, workspace
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests.layers import Member, folder
from tests.layouts import Layout, Place
from tests.tools import need
from tests.workspaces import Result, Workspace, processes_about, sha256_of

BASE = [folder("usr"), Member("usr/base", os.urandom(300_000))]
MIDDLE = [folder("opt"), Member("opt/middle", os.urandom(200_000))]
OWN = {name: [Member(name, name.encode() * 5000)] for name in ("a", "b", "c")}
IMAGES = {"a": [BASE, MIDDLE, OWN["a"]], "b": [BASE, MIDDLE, OWN["b"]], "c": [BASE, OWN["c"]], "d": [BASE, MIDDLE]}
LAYERS, SKELETONS = 5, 4


def add(workspace: Workspace, names: Sequence[str]) -> Workspace:
    for name in names:
        workspace.add(name, f"oci:../layouts/{name}", buffer_mb=1)
        Layout(workspace.root / "layouts" / name).write(*IMAGES[name])
    (workspace.root / "dodo.py").write_text("from fledge_tasks.dodo import *\n")
    return workspace


def start(workspace: Workspace, command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=workspace.environment(),
        cwd=workspace.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[Result]:
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        results.append(Result(process.returncode, output, errors))
    return results


@pytest.fixture
def places(tmp_path: Path) -> list[Workspace]:
    """Workspaces with overlapping images and one cache; a log counts what is published, over all processes."""
    need("mke2fs")
    env = {"FLEDGE_CRASH_LOG": str(tmp_path / "points")}
    sets = ["ab", "bc", "cd", "abcd"]
    return [
        add(Workspace(tmp_path / f"w{at}", tmp_path, tmp_path / "cache", env), names) for at, names in enumerate(sets)
    ]


def check(places: Sequence[Workspace], home: Path) -> None:
    """Look at what eight builds have made."""
    points = Counter((home / "points").read_text().splitlines())
    assert points["publish unpack: renamed"] == LAYERS
    assert points["publish mkfs: renamed"] == points["publish customize: renamed"] == SKELETONS
    assert points["set aside: renamed"] == 0
    sums: dict[str, set[str]] = {}
    for place in places:
        for output in (place.root / "build").glob("*/rootfs.img"):
            sums.setdefault(output.parent.name, set()).add(sha256_of(output))
            manifest = json.loads(output.with_name("manifest.json").read_bytes())
            assert manifest["rootfs"]["checksum"] == sha256_of(output)
    assert sorted(sums) == ["a", "b", "c", "d"]
    assert all(len(each) == 1 for each in sums.values())
    assert list((home / "cache" / "tmp").iterdir()) == []
    kinds = Counter(
        json.loads(record.read_bytes())["stage"] for record in (home / "cache" / "objects").glob("*/*/entry.json")
    )
    assert kinds == {"config": SKELETONS, "unpack": LAYERS, "customize": SKELETONS, "mkfs": SKELETONS}
    for place in places:
        assert list(place.root.rglob(".fledge-tmp-*")) == []
        assert place.fledge("cache", "verify").code == 0
        again = place.build()
        assert {stage for image in again.summary["images"] for stage in again.stages(image["name"])} == set()
    assert processes_about(home) == []


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_eight_builds(places: list[Workspace], tmp_path: Path, jobs: str) -> None:
    results = ends([start(each, each.command("build", "--json", "-j", jobs)) for each in places * 2])
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 8
    check(places, tmp_path)


def test_eight_times_doit(places: list[Workspace], tmp_path: Path) -> None:
    results = ends([start(each, [sys.executable, "-m", "doit", "-n", "4"]) for each in places * 2])
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 8
    check(places, tmp_path)


def test_eight_builds_while_gc_runs(places: list[Workspace], tmp_path: Path) -> None:
    """Everything that nobody holds and no lock file reaches goes at once, over and over; nobody notices."""
    cleaner = Workspace(places[0].root, tmp_path, tmp_path / "cache")
    command = " ".join(cleaner.command("cache", "gc", "--max-size", "0", "--max-age", "0d"))
    script = f"while test ! -e {tmp_path}/stop; do {command} || exit 9; echo round; done"
    builds = [start(each, each.command("build", "--json", "-j", "2")) for each in places * 2]
    gc = start(cleaner, ["sh", "-c", script])
    results = ends(builds)
    (tmp_path / "stop").touch()
    [cleaned] = ends([gc])
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 8
    assert (cleaned.code, cleaned.stderr) == (0, "")
    assert cleaned.stdout.count("round") >= 1
    check(places, tmp_path)


def test_eight_builds_that_find_the_index_corrupt(places: list[Workspace], tmp_path: Path) -> None:
    """One of them sets it aside; whatever the others meet then is a miss at worst."""
    (tmp_path / "cache" / "index").mkdir(parents=True)
    (tmp_path / "cache" / "index" / "cache.db").write_bytes(b"no database" * 1000)
    results = ends([start(each, each.command("build", "--json", "-j", "2")) for each in places * 2])
    assert [result.code for result in results] == [0] * 8
    lines = [line for result in results for line in result.stderr.splitlines()]
    assert lines and all("is damaged (" in line for line in lines), lines
    assert (tmp_path / "cache" / "aside" / "index" / "cache.db").exists()
    (tmp_path / "points").write_text((tmp_path / "points").read_text().replace("set aside: renamed", "index set aside"))
    check(places, tmp_path)


def test_a_blob_that_somebody_is_at_is_left_to_them(tmp_path: Path) -> None:
    """Another process fetches meanwhile: what it may be publishing stays until the image is put together."""
    place = Place(tmp_path, tmp_path)
    place.add_layout("web", BASE)
    assert place.fledge("lock").code == 0
    found = workspace.load(place.root)
    planner = Planner(found, Store(found.cache))
    plan = planner.plan(found.images[0])
    assert plan is not None
    [layer] = plan.layers
    stages.fetch(planner, plan, layer)
    blob = planner.store.folder(layer.blob.key())
    with Store(found.cache).building(layer.blob.key()):
        assert stages.unpack(planner, plan, layer)["bytes"] > 0
        assert sorted(path.name for path in blob.iterdir()) == ["blob", "entry.json"]
    assert place.build().stages("web") == ["mkfs", "assemble", "manifest"]
    assert not blob.exists()
    planner.store.close()
