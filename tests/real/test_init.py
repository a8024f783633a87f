"""`fledge init` on real images: what it writes builds, from wherever the image comes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import tomli

from tests.real.conftest import Built
from tests.real.dockerd import Daemon
from tests.real.images import Images
from tests.real.registry import Registry
from tests.tools import PATH
from tests.workspaces import Workspace

MIB = 1 << 20


def begin(workspace: Workspace, image: str) -> None:
    """Begin with an image, and check that the file says what the image `web` says of itself."""
    result = workspace.fledge("init", "web", "--image", image)
    assert result.code == 0, result.stderr
    workload = tomli.loads((workspace.root / "web" / "fledge.toml").read_text())["manifest"]["workload"]
    assert workload["entrypoint"] == ["/usr/sbin/nginx", "-g", "daemon off;"]
    assert workload["base_url"] == "http://127.0.0.1:443"
    assert sorted(path.name for path in workspace.root.rglob("*") if path.is_file()) == ["dodo.py", "fledge.toml"]


def test_an_image_in_a_registry(workspace: Workspace, web: Built, images: Images, registry: Registry) -> None:
    """Its config is looked at, and nothing else moved; the build is that of a fledge.toml written by hand."""
    workspace.cache = web.workspace.cache
    with registry.transfers() as moved:
        begin(workspace, f"docker://{images.reference('web')}")
    config = registry.manifest("web", images.reference("web").rpartition(":")[2])
    assert config is not None
    assert moved == [config["config"]["digest"]]
    result = workspace.build()
    assert {"fetch", "unpack"}.isdisjoint(result.stages("web"))
    ours, theirs = (
        json.loads(place.output("web").with_name("manifest.json").read_bytes()) for place in (workspace, web.workspace)
    )
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing == {"rootfs"}, "another file, without the mapped page"
    verified = workspace.fledge("verify")
    assert verified.code == 0, verified.stdout
    assert workspace.build().stages("web") == []


@pytest.mark.parametrize("with_transport", [True, False])
def test_an_image_of_the_daemon(
    workspace: Workspace, daemon: Daemon, web: Built, images: Images, registry: Registry, with_transport: bool
) -> None:
    source = images.reference("web")
    daemon.docker("pull", "--quiet", source)
    workspace.env, workspace.cache = {"DOCKER_HOST": daemon.host}, web.workspace.cache
    with registry.down():
        begin(workspace, f"docker-daemon:{source}" if with_transport else source)
        workspace.build()


@pytest.mark.parametrize(
    "transport", ["oci:image:tag", "oci-archive:image:tag", "dir:image", "docker-archive:image:web:1"]
)
def test_an_image_in_a_file_or_folder(
    workspace: Workspace, folder: Path, web: Built, images: Images, registry: Registry, transport: str
) -> None:
    """The path is told from where the command runs, and written down as it is seen from the file."""
    kind, _, rest = transport.partition(":")
    target = f"{kind}:{folder}/{rest}"
    copy = ["skopeo", "copy", "--quiet", f"docker://{images.reference('web')}", target]
    subprocess.run(copy, env={"PATH": PATH, "HOME": str(registry.home)}, check=True, stdout=subprocess.DEVNULL)
    workspace.cache = web.workspace.cache
    begin(workspace, f"{kind}:../{rest}")
    written = tomli.loads((workspace.root / "web" / "fledge.toml").read_text())["source"]["image"]
    assert written == f"{kind}:../../{rest}"
    workspace.build()


def test_an_image_of_podman(workspace: Workspace, folder: Path, images: Images, registry: Registry) -> None:
    config = folder / "storage.conf"
    config.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n')
    workspace.env = {"CONTAINERS_STORAGE_CONF": str(config)}
    copy = ["skopeo", "copy", "--quiet", f"docker://{images.reference('web')}", "containers-storage:localhost/web:1"]
    environment = {"PATH": PATH, "HOME": str(registry.home), **workspace.env}
    subprocess.run(copy, env=environment, check=True, stdout=subprocess.DEVNULL)
    with registry.down():
        begin(workspace, "containers-storage:localhost/web:1")
        workspace.build()
