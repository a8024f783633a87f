"""`doit` in a workspace: the same graph, the same results and the same safety as `fledge build`."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fledge_tasks.digest import short
from tests.dodos import BASE, MORE, make_place
from tests.layouts import Layout
from tests.test_cli import slow
from tests.tools import need, need_root, wait_for
from tests.workspaces import Workspace, processes_about, sha256_of

pytestmark = pytest.mark.skipif(
    os.environ.get("FLEDGE_REQUIRE_TOOLS") != "1"
    and not any(entry.name == "fledge-memory" for entry in importlib.metadata.entry_points(group="doit.BACKEND")),
    reason="fledge-tasks is not installed, so doit does not know its state backend",
)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace of two images on one base, with a dodo.py, not built yet."""
    place = make_place(tmp_path)
    return Workspace(place.root, place.home)


def doit(workspace: Workspace, *arguments: str, code: int = 0) -> list[str]:
    """Run doit in the workspace, and return the lines that it prints."""
    done = subprocess.run(
        [*workspace.prefix, sys.executable, "-m", "doit", *arguments],
        env=workspace.environment(),
        cwd=workspace.root,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout.splitlines()


def ran(lines: list[str]) -> set[str]:
    """Return the tasks that were not up to date."""
    return {line[3:] for line in lines if line.startswith(".  ")}


def layers(workspace: Workspace) -> list[str]:
    tasks = workspace.build("web").image("web")["stages"]
    return [stage["task"].partition(":")[2] for stage in tasks if stage["stage"] == "unpack"]


def everything(*names: str) -> set[str]:
    return {f"{stage}:{name}" for stage in ("resolve", "mkfs", "assemble", "manifest") for name in names}


@pytest.mark.parametrize("jobs", [(), ("-n", "2")], ids=["serial", "processes"])
def test_doit_builds_what_fledge_builds(workspace: Workspace, tmp_path: Path, jobs: tuple[str, ...]) -> None:
    first = ran(doit(workspace, *jobs))
    assert everything("web", "api") <= first
    assert len([task for task in first if task.startswith("unpack:")]) == 2  # the base once
    assert ran(doit(workspace, *jobs)) == set()
    assert workspace.build().stages("web") == []
    assert not (workspace.root / ".doit.db").exists()
    sums = {name: sha256_of(workspace.output(name)) for name in ("web", "api")}
    other = Workspace(workspace.root, workspace.home, tmp_path / "other-cache")
    for name in sums:
        workspace.output(name).unlink()
    result = other.build()
    assert {name: result.image(name)["sha256"] for name in sums} == sums


def test_doit_finds_what_fledge_built(workspace: Workspace) -> None:
    workspace.build()
    assert ran(doit(workspace)) == set()
    assert "-- manifest:web" in doit(workspace)
    (workspace.root / "web" / "conf").write_text("two\n")
    assert ran(doit(workspace)) == {"mkfs:web", "assemble:web", "manifest:web"}
    assert workspace.build().stages("web") == []


def test_one_image(workspace: Workspace) -> None:
    tasks = ran(doit(workspace, "build:web"))
    assert everything("web") <= tasks
    assert not any(task.endswith(":api") for task in tasks)
    assert not workspace.output("api").exists()


def test_list_and_info(workspace: Workspace) -> None:
    groups = ["assemble", "build", "fetch", "manifest", "mkfs", "resolve", "unpack", "verity"]
    assert [line.split()[0] for line in doit(workspace, "list")] == groups
    before = [line.split()[0] for line in doit(workspace, "list", "--all")]
    assert {"build:web", "mkfs:api", "resolve:web"} <= set(before)
    assert not any(name.startswith(("_", "unpack:")) for name in before)  # not known yet
    names = layers(workspace)
    after = [line.split()[0] for line in doit(workspace, "list", "--all")]
    assert {f"unpack:{name}" for name in names} | {f"fetch:{name}" for name in names} <= set(after)
    info = "\n".join(doit(workspace, "info", "build:web", code=1))
    assert "manifest:web" in info
    assert "status     : run" in "\n".join(doit(workspace, "info", "mkfs:api", code=1))
    assert "status     : up-to-date" in "\n".join(doit(workspace, "info", "mkfs:web"))


def test_clean_and_forget(workspace: Workspace) -> None:
    doit(workspace)
    doit(workspace, "forget")
    assert ran(doit(workspace)) == set()
    doit(workspace, "clean", "-c", "build:api")
    assert not workspace.output("api").exists()
    assert workspace.output("web").exists()
    doit(workspace, "clean")
    assert list((workspace.root / "build").rglob("*")) == []
    assert ran(doit(workspace)) == {f"{stage}:{name}" for stage in ("assemble", "manifest") for name in ("web", "api")}


@pytest.mark.parametrize("jobs", [(), ("-n", "2")], ids=["serial", "processes"])
def test_a_failure(workspace: Workspace, jobs: tuple[str, ...]) -> None:
    found = Layout(workspace.root / "layouts" / "web").write(BASE, MORE)
    found.write(BASE, MORE, diff_ids=[found.diff_ids[0], "sha256:" + "2" * 64])
    text = "\n".join(doit(workspace, "--continue", *jobs, code=2))
    assert "error: web: layer 222222222222: the layer has the diff ID sha256:" in text
    assert "Traceback" not in text
    assert workspace.output("api").exists()
    assert not workspace.output("web").exists()


def test_input_that_is_wrong(workspace: Workspace) -> None:
    (workspace.root / "web" / "conf").unlink()
    text = "\n".join(doit(workspace, "build:web", code=1))
    assert f"{workspace.root}/web/conf does not exist" in text
    assert "Traceback" not in text
    (workspace.root / "web" / "fledge.toml").write_text("version = 1\n")
    for command in ((), ("list",)):
        text = "\n".join(doit(workspace, *command, code=2))
        assert "error: web/fledge.toml: version: found integer 1" in text
        assert "Traceback" not in text


def test_a_filesystem_that_cannot_be_made(workspace: Workspace) -> None:
    file = workspace.root / "web" / "fledge.toml"
    file.write_text(file.read_text().replace('"ext4"', '"xfs"'))
    need("setpriv", "mkfs.xfs")
    need_root()
    workspace.prefix = ["setpriv", "--bounding-set=-sys_admin"]
    text = "\n".join(doit(workspace, "build:web", code=1))
    assert "xfs images can only be made by root" in text
    assert not workspace.output("web").exists()
    assert ran(doit(workspace, "build:api")) >= everything("api")


@pytest.mark.parametrize("jobs", [(), ("-n", "2")], ids=["serial", "processes"])
def test_a_signal(workspace: Workspace, tmp_path: Path, jobs: tuple[str, ...]) -> None:
    busy, started = slow(workspace, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "doit", *jobs, "build:web"],
        env=busy.environment(),
        cwd=workspace.root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(started.exists)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (143, "interrupted\n")
    assert workspace.leftovers() == []
    wait_for(lambda: processes_about(workspace.root) == [])
    assert ran(doit(workspace, "build:web")) == {"mkfs:web", "assemble:web", "manifest:web"}


def test_a_layer_has_the_name_of_its_diff_id(workspace: Workspace) -> None:
    diff_ids = Layout(workspace.root / "layouts" / "web").write(BASE, MORE).diff_ids
    assert layers(workspace) == [short(diff_id) for diff_id in diff_ids]
    assert ran(doit(workspace, f"unpack:{short(diff_ids[0])}")) == set()


def test_a_wrong_epoch_ends_it_before_anything_runs(workspace: Workspace) -> None:
    late = Workspace(workspace.root, workspace.home, env={"SOURCE_DATE_EPOCH": "tomorrow"})
    assert doit(late, code=2)[0].startswith("error: variable SOURCE_DATE_EPOCH: found 'tomorrow', expected seconds")
    assert not (workspace.root / "fledge.lock").exists()
