"""Real images in a real registry, and the builds of them that several tests look at."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.real.dockerd import Daemon
from tests.real.images import Images, cache_folder
from tests.real.reference import Reference, unpack_reference
from tests.real.registry import Registry
from tests.tools import need, need_root
from tests.workspaces import Result, Workspace

WEB_BUFFER_MB = 100
SCIENCE_BUFFER_MB = 37


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder, and run it last."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("real")
    items.sort(key=lambda item: item.path.is_relative_to(here))


@dataclass(frozen=True)
class Built:
    """A finished cold build: what it reported, and the digests of the blobs that the registry gave it."""

    workspace: Workspace
    result: Result
    transfers: list[str]


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """A folder for the session on the disk of the checkout: the images are too large for a /tmp in memory."""
    need_root()
    folder = Path(tempfile.mkdtemp(prefix="work-", dir=cache_folder()))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def folder(scratch: Path) -> Iterator[Path]:
    """A folder for one test, removed after it, whatever it weighs."""
    path = Path(tempfile.mkdtemp(dir=scratch))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def registry(scratch: Path) -> Iterator[Registry]:
    need("docker-registry", "skopeo")
    registry = Registry(cache_folder() / "registry", scratch)
    registry.start()
    yield registry
    registry.stop()


@pytest.fixture(scope="session")
def daemon(scratch: Path) -> Iterator[Daemon]:
    """A Docker daemon, without images at first."""
    need("dockerd", "docker")
    daemon = Daemon(scratch / "docker")
    yield daemon
    daemon.stop()


@pytest.fixture(scope="session")
def images(registry: Registry) -> Iterator[Images]:
    need("buildah", "mmdebstrap")
    images = Images(registry, cache_folder())
    yield images
    images.close()


@pytest.fixture(scope="session")
def shared(scratch: Path, registry: Registry) -> Workspace:
    """The workspace of `web` and `science`: tests may change mappings in it, not what is below."""
    return Workspace(scratch / "shared", registry.home, scratch / "cache")


@pytest.fixture(scope="session")
def web(shared: Workspace, images: Images, registry: Registry) -> Built:
    """`web`, built into an empty cache."""
    source = images.reference("web")
    folder = shared.add("web", f"docker://{source}", buffer_mb=WEB_BUFFER_MB, mappings={"page.html": "/srv/page.html"})
    (folder / "page.html").write_text("first\n")
    with registry.transfers() as moved:
        result = shared.build("web")
    return Built(shared, result, moved)


@pytest.fixture(scope="session")
def science(web: Built, images: Images, registry: Registry) -> Built:
    """`science`, built into the cache that holds `web`, which is on the same base."""
    source = images.reference("science")
    web.workspace.add("science", f"docker://{source}", buffer_mb=SCIENCE_BUFFER_MB)
    with registry.transfers() as moved:
        result = web.workspace.build("science")
    return Built(web.workspace, result, moved)


@pytest.fixture(scope="session")
def reference(images: Images, registry: Registry, scratch: Path) -> Callable[[str], Reference]:
    """Return what `umoci unpack` makes of an image, once for each."""
    need("umoci")
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = unpack_reference(images.reference(name), scratch / f"reference-{name}", registry.home)
        return made[name]

    return get


@pytest.fixture
def workspace(folder: Path, registry: Registry) -> Workspace:
    """An empty workspace with a cache of its own."""
    os.mkdir(folder / "workspace")
    return Workspace(folder / "workspace", registry.home)
