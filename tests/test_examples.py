"""The examples build, with the commands that their READMEs name, by `fledge` and by `doit` alike."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fledge_tasks import config
from fledge_tasks import workspace as workspaces
from tests.tools import need
from tests.workspaces import REPOSITORY, Workspace, doit, sha256_of


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, with their images made."""
    need("busybox", "skopeo", "mke2fs")
    folder = tmp_path_factory.mktemp("examples") / "examples"
    shutil.copytree(
        REPOSITORY / "examples", folder, ignore=shutil.ignore_patterns("build", "cache", "layouts", "*.lock")
    )
    subprocess.run([folder / "hello/make-image.sh"], check=True, stdout=subprocess.DEVNULL)
    subprocess.run([folder / "monorepo/make-images.sh"], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.fixture
def copy(examples: Path, tmp_path: Path) -> Path:
    shutil.copytree(examples, tmp_path / "examples")
    return tmp_path / "examples"


def test_hello(copy: Path, tmp_path: Path) -> None:
    workspace = Workspace(copy / "hello", tmp_path)
    first = workspace.build()
    assert first.stages("hello").count("unpack") == 3
    assert first.image("hello")["sha256"] == sha256_of(workspace.output("hello"))
    assert workspace.build().stages("hello") == []
    (copy / "hello/motd").write_text("hi\n")
    assert workspace.build().stages("hello") == ["mkfs", "assemble", "manifest"]


def test_hello_is_made_of_the_same_bytes_each_time(copy: Path) -> None:
    def content() -> dict[str, bytes]:
        layout = copy / "hello/layouts/hello"
        return {str(path): path.read_bytes() for path in layout.rglob("*") if path.is_file()}

    before = content()
    subprocess.run([copy / "hello/make-image.sh"], check=True, stdout=subprocess.DEVNULL)
    assert before == content()


def test_doit_runs_the_same_graph(copy: Path, examples: Path, tmp_path: Path) -> None:
    expected = Workspace(copy / "hello", tmp_path)
    checksum = expected.build().image("hello")["sha256"]
    shutil.copytree(examples / "hello", tmp_path / "doit" / "hello")
    workspace = Workspace(tmp_path / "doit" / "hello", tmp_path)
    assert "build" in doit(workspace, "list")
    assert not workspace.output("hello").exists()
    doit(workspace)
    assert sha256_of(workspace.output("hello")) == checksum
    assert workspace.build().stages("hello") == []
    workspace.output("hello").unlink()
    doit(workspace, "build:hello")
    assert sha256_of(workspace.output("hello")) == checksum


def test_monorepo_unpacks_the_base_once(copy: Path, tmp_path: Path) -> None:
    workspace = Workspace(copy / "monorepo", tmp_path)
    result = workspace.build()
    unpacked = {name: set(result.tasks(name)) for name in ("api", "web", "worker")}
    layers = {task for tasks in unpacked.values() for task in tasks if task.startswith("unpack:")}
    assert len(layers) == 4
    assert sorted(path.name for path in workspace.root.glob("*.lock")) == ["fledge.lock"]
    (copy / "monorepo/api/service.conf").write_text("name=API\n")
    again = workspace.build()
    assert again.stages("api") == ["mkfs", "assemble", "manifest"]
    assert again.stages("web") == again.stages("worker") == []


def test_monorepo_with_doit_and_four_jobs(copy: Path, tmp_path: Path) -> None:
    workspace = Workspace(copy / "monorepo", tmp_path)
    doit(workspace, "-n", "4")
    result = workspace.build()
    for name in ("api", "web", "worker"):
        assert result.stages(name) == []
        assert result.image(name)["sha256"] == sha256_of(workspace.output(name))


def test_the_checkout_is_a_workspace_of_all_examples(copy: Path, tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "dodo.py", copy.parent)
    workspace = Workspace(copy.parent, tmp_path)
    tasks = doit(workspace, "list", "--all", "--quiet").split()
    assert {f"build:{name}" for name in ("api", "hello", "nginx", "web", "worker")} <= set(tasks)
    doit(workspace, "build:hello", "build:api")
    assert workspace.build("hello", "api").stages("hello") == []
    alone = Workspace(copy / "hello", tmp_path)
    assert alone.build().image("hello")["sha256"] == sha256_of(workspace.output("hello"))
    assert not workspace.output("web").exists()


def test_nginx_is_a_valid_workspace(copy: Path) -> None:
    [image] = workspaces.load(copy / "nginx").images
    assert (image.name, image.source.image, image.filesystem.size_buffer_mb) == ("nginx", "nginx:alpine", 100)
    assert [mapping.destination for mapping in image.mappings] == ["/etc/nginx/conf.d/default.conf"]


def test_the_readmes_fledge_toml_is_right(tmp_path: Path) -> None:
    """As a whole, and the manifest that is shown apart from it."""
    whole, manifest = re.findall(r"```toml\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "web" / "fledge.toml"
    file.parent.mkdir()
    file.write_text(whole)
    assert config.load(file, "README.md").limits == config.Limits(), "these are the defaults"
    file.write_text(whole[: whole.index("[manifest]")] + manifest)
    user = config.load(file, "README.md").manifest
    assert user["url_prefix"] == "https://images.example.org/v1"
    assert user["actions"] == {"reload": {"method": "POST", "path": "/reload"}}


def test_every_script_and_mapped_file_is_there() -> None:
    for example in ("hello", "nginx", "monorepo"):
        assert (REPOSITORY / "examples" / example / "README.md").is_file()
    for script in ("hello/make-image.sh", "monorepo/make-images.sh"):
        assert os.access(REPOSITORY / "examples" / script, os.X_OK)
