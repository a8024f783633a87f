"""Images from a real Docker daemon: the same layers, the same bytes as from the registry."""

from __future__ import annotations

from tests.real.conftest import Built
from tests.real.dockerd import Daemon
from tests.real.images import Images
from tests.real.registry import Registry
from tests.workspaces import Workspace


def keys(built: dict[str, object], stage: str) -> list[str]:
    stages = built["stages"]
    assert isinstance(stages, list)
    return [entry["key"] for entry in stages if entry["stage"] == stage]


def test_a_daemon_image_is_the_registry_image(
    web: Built, workspace: Workspace, daemon: Daemon, images: Images, registry: Registry
) -> None:
    source = images.reference("web")
    daemon.docker("pull", "--quiet", source)
    workspace.env = {"DOCKER_HOST": daemon.host}
    folder = workspace.add("web", f"docker-daemon:{source}", mappings={"page.html": "/srv/page.html"})
    (folder / "page.html").write_text("first\n")
    with registry.down():
        result = workspace.build()
        again = workspace.build()
    # A daemon only ever hands out all of an image: to resolve it is to fetch it.
    assert sorted(result.stages("web")) == ["assemble", "manifest", "mkfs", "resolve", *["unpack"] * 3]
    assert keys(result.image("web"), "unpack") == keys(web.result.image("web"), "unpack")
    assert result.image("web")["sha256"] == web.result.image("web")["sha256"]
    assert again.stages("web") == []


def test_layers_are_shared_between_daemon_and_registry(
    web: Built, workspace: Workspace, daemon: Daemon, images: Images
) -> None:
    source = images.reference("web")
    daemon.docker("pull", "--quiet", source)
    workspace.env, workspace.cache = {"DOCKER_HOST": daemon.host}, web.workspace.cache
    workspace.add("web", f"docker-daemon:{source}")
    result = workspace.build()
    assert not {"fetch", "unpack"} & set(result.stages("web"))


def test_without_a_transport_the_daemon_comes_first_and_the_registry_second(
    workspace: Workspace, daemon: Daemon, images: Images, registry: Registry
) -> None:
    source = images.reference("web-plus")
    workspace.env = {"DOCKER_HOST": daemon.host}
    workspace.add("plus", source)
    with registry.transfers() as moved:
        first = workspace.build()
    assert len(moved) >= 4, "the daemon does not have it yet"
    daemon.docker("pull", "--quiet", source)
    other = Workspace(workspace.root.parent / "other", registry.home, env=workspace.env)
    other.add("plus", source)
    with registry.down():
        second = other.build()
    assert second.image("plus")["sha256"] == first.image("plus")["sha256"]


def test_a_new_image_of_the_same_name_is_noticed(workspace: Workspace, daemon: Daemon, images: Images) -> None:
    workspace.env = {"DOCKER_HOST": daemon.host}
    workspace.add("moving", "docker-daemon:moving:latest")
    for name in ("web", "web-plus"):
        daemon.docker("pull", "--quiet", images.reference(name))
    daemon.docker("tag", images.reference("web"), "moving:latest")
    workspace.build()
    daemon.docker("tag", images.reference("web-plus"), "moving:latest")
    assert workspace.build().stages("moving") == ["resolve", "unpack", "mkfs", "assemble", "manifest"]
    assert workspace.build().stages("moving") == []
