"""What a CI runner does with the cache: it carries the folder, or an archive of it, to another machine and user."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.layers import Member, archive, folder
from tests.real.push import Layer, Pusher
from tests.real.registry import Registry
from tests.tools import as_nobody, need
from tests.workspaces import Result, Workspace, doit, sha256_of

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + bytes(range(256)) * 400, mode=0o755)]
NOBODY = 65534
NAMES = ("api", "web")


@dataclass(frozen=True)
class FirstJob:
    """A workspace that was built and trimmed with the registry in reach, as the job on the main branch does."""

    workspace: Workspace
    registry: Registry
    pusher: Pusher
    base: Layer
    result: Result


@pytest.fixture(scope="module")
def first(scratch: Path) -> Iterator[FirstJob]:
    need("docker-registry", "skopeo", "mke2fs", "tar", "unshare")
    place = Path(tempfile.mkdtemp(prefix="ci-", dir=scratch))
    place.chmod(0o755)
    registry = Registry(place / "storage", place)
    registry.start()
    pusher = Pusher(registry.host)
    try:
        base = pusher.layer("base", archive(BASE))
        workspace = Workspace(place / "repository", registry.home)
        for name in NAMES:
            own = pusher.layer(name, archive([Member("srv/own", f"{name} one\n".encode() * 3000)]))
            pusher.image(name, "1", [base, own])
            source = workspace.add(
                name, f"docker://{registry.host}/{name}:1", buffer_mb=1, mappings={"static": "/srv/static"}
            )
            (source / "static").mkdir()
            (source / "static" / "page.html").write_text(f"{name}\n")
            (source / "static" / "run").write_text("#!/bin/app\n")
            (source / "static" / "run").chmod(0o755)
        (workspace.root / "dodo.py").write_text("from fledge_tasks.dodo import *\n")
        result = workspace.build()
        assert workspace.fledge("cache", "trim", "--ci").code == 0
        yield FirstJob(workspace, registry, pusher, base, result)
    finally:
        registry.stop()


Carry = Callable[[Path, Workspace], None]


def by_folder(cache: Path, theirs: Workspace) -> None:
    """Carry the folder as it is, with tar; -m gives everything the time of now."""
    packed = theirs.root.parent / "cache.tar"
    tool("tar", "--create", f"--file={packed}", f"--directory={cache.parent}", "cache")
    tool(*as_nobody(), "tar", "--extract", "-m", f"--file={packed}", f"--directory={theirs.root}")


def by_archive(cache: Path, theirs: Workspace) -> None:
    """Carry an archive of ours."""
    packed = theirs.root.parent / "cache.tar.zst"
    ours = Workspace(cache.parent, theirs.home)
    assert ours.fledge("cache", "export", str(packed)).code == 0
    assert theirs.fledge("cache", "import", str(packed)).code == 0


def tool(*command: str) -> None:
    subprocess.run(command, stdin=subprocess.DEVNULL, check=True)


@pytest.fixture(params=[by_folder, by_archive])
def runner(request: pytest.FixtureRequest, first: FirstJob, folder: Path) -> Workspace:
    """The second job's machine: a checkout and the restored cache, all of it owned by nobody; no build folder."""
    home = folder / "home"
    shutil.copytree(first.registry.home, home)
    (home / "run").mkdir()
    theirs = Workspace(folder / "checkout", home, prefix=as_nobody(), env={"XDG_RUNTIME_DIR": str(home / "run")})
    shutil.copytree(first.workspace.root, theirs.root, ignore=shutil.ignore_patterns("cache", "build"))
    for path in (theirs.root, home, *theirs.root.rglob("*"), *home.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
        os.utime(path)
    carry: Carry = request.param
    carry(first.workspace.root / "cache", theirs)
    assert not (theirs.root / "build").exists()
    assert {path.stat().st_uid for path in (theirs.root / "cache").rglob("*")} == {NOBODY}
    return theirs


def without_network(workspace: Workspace) -> Workspace:
    """Return the workspace with its commands in a network namespace that has no interface up."""
    return Workspace(
        workspace.root, workspace.home, env=workspace.env, prefix=["unshare", "--net", "--", *workspace.prefix]
    )


def ran(output: str) -> set[str]:
    """Return the tasks that were not up to date."""
    return {line[3:] for line in output.splitlines() if line.startswith(".  ")}


def test_doit_only_puts_images_together(runner: Workspace, first: FirstJob) -> None:
    runner = without_network(runner)
    with first.registry.down():
        assert ran(doit(runner)) == {f"{stage}:{name}" for stage in ("assemble", "manifest") for name in NAMES}
        assert ran(doit(runner)) == set()
    for name in NAMES:
        assert sha256_of(runner.output(name)) == first.result.image(name)["sha256"]
        assert runner.output(name).stat().st_uid == NOBODY


def test_a_locked_build_runs_what_has_changed(runner: Workspace, first: FirstJob) -> None:
    runner = without_network(runner)
    page = runner.root / "web" / "static" / "page.html"
    with first.registry.down():
        result = runner.build("--locked", "--offline")
        assert {name: result.stages(name) for name in NAMES} == {name: ["assemble", "manifest"] for name in NAMES}
        for name in NAMES:
            assert result.image(name)["sha256"] == first.result.image(name)["sha256"] == sha256_of(runner.output(name))
        page.write_text("new\n")
        result = runner.build("--locked", "--offline")
    assert (result.stages("api"), result.stages("web")) == ([], ["mkfs", "assemble", "manifest"])


def test_one_changed_layer_is_one_blob(runner: Workspace, first: FirstJob) -> None:
    own = first.pusher.layer("web", archive([Member("srv/own", b"web two\n" * 3000)]))
    first.pusher.image("web", "2", [first.base, own])
    toml = runner.root / "web" / "fledge.toml"
    toml.write_text(toml.read_text().replace("/web:1", "/web:2"))
    with first.registry.transfers() as moved:
        result = runner.build()
    layers = {first.base.blob, own.blob}
    assert [blob for blob in moved if blob in layers] == [own.blob]
    assert result.stages("web") == ["resolve", "fetch", "unpack", "mkfs", "assemble", "manifest"]
    assert result.stages("api") == ["assemble", "manifest"]
