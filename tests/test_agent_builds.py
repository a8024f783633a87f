"""Agents in builds: pinned once for all, found again when 'latest' moved on, and put where /bin really leads."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import workspace
from fledge_tasks.planner import Planner
from fledge_tasks.resolve import resolve
from fledge_tasks.store import Store
from tests.layers import Member, digest, folder, hardlink, symlink
from tests.layouts import CREATED_SECONDS, Place
from tests.scene import Scene, scene
from tests.test_agent import Server, body, moved, status
from tests.test_stages import AGENT, BASE, OTHER_AGENT, debugfs, facts, place, server, with_agent
from tests.tools import need
from tests.workspaces import sha256_of

__all__ = ["place", "scene", "server"]


def agents(place: Place) -> dict[str, Any]:
    """Return what the lock file says of agents."""
    found: dict[str, Any] = json.loads((place.root / "fledge.lock").read_bytes())["agents"]
    return found


def forget(place: Place) -> None:
    """Remove what was built and all that is cached, as if another machine had cloned the workspace."""
    shutil.rmtree(place.root / "cache")
    shutil.rmtree(place.root / "build")


# --- releases -----------------------------------------------------------------------------------------


class Releases:
    """A server with releases as on GitHub: 'latest' leads to one of them, and that to a storage on another host."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.top = server.url(status(404)).rpartition("/")[0]
        self.base = f"{self.top}/releases/download"
        self.latest = f"{self.top}/releases/latest/download/kestrel"

    def release(self, version: str, content: bytes) -> None:
        """Make a release, which becomes the latest one."""
        storage = self.top.replace("127.0.0.1", "localhost")
        self.server.scripts[f"/storage/{version}"] = [body(content)]
        self.server.scripts[f"/releases/download/{version}/kestrel"] = [
            moved(f"{storage}/storage/{version}?sig=secret")
        ]
        self.server.scripts["/releases/latest/download/kestrel"] = [moved(self.url(version))]

    def url(self, version: str) -> str:
        return f"{self.base}/{version}/kestrel"

    def paths(self) -> list[str]:
        """Return what was asked for since the last call."""
        paths = [path for path, _ in self.server.requests]
        self.server.requests.clear()
        return paths


@pytest.fixture
def releases(server: Server) -> Releases:
    return Releases(server)


def with_latest(place: Place, releases: Releases) -> None:
    with_agent(place, f'source_strategy = "release"\nversion = "latest"\nbase_url = "{releases.base}"')


def test_latest_is_resolved_once(place: Place, releases: Releases) -> None:
    """It is pinned with its digest and the address of the release that it was then, without the storage's secret."""
    with_latest(place, releases)
    releases.release("v1", AGENT)
    place.build()
    assert releases.paths() == [
        "/releases/latest/download/kestrel",
        "/releases/download/v1/kestrel",
        "/storage/v1?sig=secret",
    ]
    pinned = {f"agent:{releases.latest}": {"digest": digest(AGENT), "url": releases.url("v1")}}
    assert agents(place) == pinned
    before = sha256_of(place.output("web"))

    releases.release("v2", OTHER_AGENT)
    assert place.build().stages("web") == []
    assert releases.paths() == []
    forget(place)
    place.build("--locked")
    assert releases.paths() == ["/releases/download/v1/kestrel", "/storage/v1?sig=secret"]
    assert sha256_of(place.output("web")) == before
    assert agents(place) == pinned
    shutil.rmtree(place.root / "build")
    assert place.build("--offline").stages("web") == ["assemble", "manifest"]
    assert releases.paths() == []

    result = place.fledge("lock", "--update")
    was, now = digest(AGENT)[7:19], digest(OTHER_AGENT)[7:19]
    assert result.stdout == f"agent:{releases.latest}: {now} (was {was})\n"
    assert agents(place) == {f"agent:{releases.latest}": {"digest": digest(OTHER_AGENT), "url": releases.url("v2")}}
    place.build()
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == OTHER_AGENT


def test_a_release_that_is_gone_is_looked_for_where_it_was_asked_for(place: Place, releases: Releases) -> None:
    with_latest(place, releases)
    releases.release("v1", AGENT)
    place.build()
    releases.server.scripts["/releases/download/v1/kestrel"] = [status(404)]
    releases.release("v2", AGENT)
    forget(place)
    releases.paths()
    place.build()
    assert releases.paths()[:2] == ["/releases/download/v1/kestrel", "/releases/latest/download/kestrel"]
    assert agents(place) == {f"agent:{releases.latest}": {"digest": digest(AGENT), "url": releases.url("v2")}}

    releases.server.scripts["/releases/download/v2/kestrel"] = [status(404)]
    releases.release("v3", OTHER_AGENT)
    forget(place)
    result = place.fledge("build")
    assert result.code == 1
    assert f"found {digest(OTHER_AGENT)}, expected {digest(AGENT)}" in result.stderr
    assert "`fledge lock --update` accepts the new one" in result.stderr
    assert "secret" not in result.stderr


def test_a_release_without_a_redirect_is_pinned_by_its_digest(place: Place, releases: Releases) -> None:
    with_latest(place, releases)
    releases.server.scripts["/releases/latest/download/kestrel"] = [body(AGENT)]
    place.build()
    assert agents(place) == {f"agent:{releases.latest}": {"digest": digest(AGENT)}}


def test_a_checksum_of_a_release(place: Place, releases: Releases) -> None:
    releases.release("v1", AGENT)
    table = f'source_strategy = "release"\nversion = "v1"\nbase_url = "{releases.base}"\n'
    with_agent(place, f'{table}checksum = "{digest(OTHER_AGENT)}"')
    result = place.fledge("build")
    assert result.code == 1
    assert f"found {digest(AGENT)}, expected {digest(OTHER_AGENT)}" in result.stderr
    assert place.leftovers() == []
    with_agent(place, f'{table}checksum = "{digest(AGENT)[7:].upper()}"')
    place.build()
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == AGENT


def test_many_images_ask_once(place: Place, releases: Releases) -> None:
    """Also when they are looked up at the same time, and when they are asked for anew."""
    with_latest(place, releases)
    releases.release("v1", AGENT)
    table = f'[agent]\nsource_strategy = "release"\nversion = "latest"\nbase_url = "{releases.base}"\n'
    for name in ("api", "worker", "zoo"):
        place.add_layout(name, BASE, [Member(f"{name}")], more=table)
    place.fledge("lock", "-j", "4")
    assert len(releases.paths()) == 3
    releases.release("v2", OTHER_AGENT)
    place.fledge("lock", "-j", "4", "--update")
    assert len(releases.paths()) == 3
    assert list(agents(place).values()) == [{"digest": digest(OTHER_AGENT), "url": releases.url("v2")}]
    place.build("-j", "4")
    assert releases.paths() == []
    for name in ("web", "api", "worker", "zoo"):
        assert debugfs(place.output(name), "cat /usr/bin/kestrel") == OTHER_AGENT


def test_a_lost_agent_does_not_keep_an_update_from_the_new_one(place: Place, server: Server) -> None:
    """The image that does not ask anew for the agent may come before the one that does."""
    url = server.url(body(AGENT), body(OTHER_AGENT))
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"')
    assert place.fledge("lock").code == 0
    shutil.rmtree(place.root / "cache")
    found = workspace.load(place.root)
    store = Store(found.cache)
    resolve(Planner(found, store), found.images[0], update=True, update_agent=False)
    store.close()
    assert agents(place) == {f"agent:{url}": {"digest": digest(OTHER_AGENT)}}


# --- local agents -----------------------------------------------------------------------------------------


def test_a_checksum_of_a_local_agent(place: Place) -> None:
    for written in (digest(AGENT), digest(AGENT)[7:].upper()):
        with_agent(place, f'source_strategy = "local"\npath = "kestrel"\nchecksum = "{written}"')
        place.build()
        assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == AGENT
    (place.root / "web" / "kestrel").write_bytes(OTHER_AGENT)
    result = place.fledge("build")
    assert result.code == 2, "the user's input is wrong, and nothing was started"
    assert f"found {digest(OTHER_AGENT)}, expected {digest(AGENT)}" in result.stderr
    assert "web/fledge.toml: agent.path: " in result.stderr
    assert "change agent.checksum in fledge.toml" in result.stderr


# --- where it lands ---------------------------------------------------------------------------------------------

OUT = "OUT"
"""Stands for the absolute path of the folder outside."""

USR = [folder("usr"), folder("usr/bin")]
BIN = folder("bin")
LANDS: dict[str, tuple[str, list[Member]]] = {
    # what /bin is: (where the agent lands, members of the layer)
    "not there": ("/bin", []),
    "a folder": ("/bin", [folder("bin", 0o700)]),
    "a relative link": ("/usr/bin", [*USR, symlink("bin", "usr/bin")]),
    "an absolute link": ("/usr/bin", [*USR, symlink("bin", "/usr/bin")]),
    "a link to a link": ("/usr/bin", [*USR, symlink("bin", "a"), symlink("a", "./usr/../b"), symlink("b", "usr/bin")]),
    "a link to nothing": ("/usr/bin", [symlink("bin", "usr/bin")]),
    "a link out of the image": (OUT, [symlink("bin", OUT)]),
    "a relative link out of the image": (OUT, [symlink("bin", "../" * 40 + OUT)]),
    "a link to the root": ("", [symlink("bin", "../..")]),
    "a folder with a link out of the image": ("/bin", [BIN, symlink("bin/kestrel", f"{OUT}/secret")]),
    "a folder with a link to a program": ("/bin", [BIN, Member("bin/sh"), symlink("bin/kestrel", "sh")]),
    "a folder with another agent": ("/bin", [BIN, Member("bin/kestrel", b"old", uid=7, mode=0o600)]),
    "a folder with a hard link": ("/bin", [BIN, Member("bin/sh", b"sh"), hardlink("bin/kestrel", "bin/sh")]),
}
LOCAL = '[agent]\nsource_strategy = "local"\npath = "kestrel"\n'


def placed(members: Sequence[Member], outside: Path) -> list[Member]:
    return [dataclasses.replace(member, link=member.link.replace(OUT, str(outside))) for member in members]


@pytest.mark.parametrize("name", LANDS)
def test_where_an_agent_lands(scene: Scene, name: str) -> None:
    """Links lead as they do inside the image, and what is outside stays as it is."""
    need("mke2fs", "debugfs")
    parent, members = LANDS[name]
    scene.image(LOCAL).write(placed(members, scene.outside))
    (scene.place.root / "bad" / "kestrel").write_bytes(AGENT)
    result = scene.build()
    assert result.code == 0, result.stderr
    image, path = scene.place.output("bad"), f"{parent.replace(OUT, str(scene.outside))}/kestrel"
    assert debugfs(image, f"cat {path}") == AGENT
    assert facts(image, path) == ("regular", "0755", 0, 0, CREATED_SECONDS)
    if name == "a folder with a hard link":
        assert debugfs(image, "cat /bin/sh") == b"sh"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([Member("bin", b"a file")], "/bin is not a folder"),
        ([folder("bin"), folder("bin/kestrel")], "/bin/kestrel is a folder in the image"),
        ([symlink("bin", "bin")], "/bin leads through too many symbolic links"),
        ([symlink("bin", "file"), Member("file")], "/bin leads through /file, which is not a folder"),
    ],
)
def test_where_no_agent_can_land(scene: Scene, members: list[Member], message: str) -> None:
    need("mke2fs")
    scene.image(LOCAL).write(members)
    (scene.place.root / "bad" / "kestrel").write_bytes(AGENT)
    result = scene.build()
    assert result.code == 1
    assert message in result.stderr
    assert not scene.place.output("bad").exists()
    assert scene.place.leftovers() == []
