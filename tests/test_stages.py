"""What the stages make: the same bytes everywhere, the right files in them, and nothing half-made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fledge_tasks import download
from fledge_tasks.digest import Digest
from fledge_tasks.errors import FledgeError, SourceError
from fledge_tasks.oci.manifest import LayerRef
from fledge_tasks.store import Store
from tests.layers import Member, digest, folder, symlink
from tests.layouts import CREATED_SECONDS, Place
from tests.test_agent import Handler, Server, body
from tests.tools import PATH, need, need_root
from tests.workspaces import Workspace, sha256_of

BASE = [folder("usr"), folder("usr/bin"), symlink("bin", "usr/bin"), Member("usr/bin/app", b"\x7fELF", mode=0o755)]
MORE = [folder("etc"), Member("etc/motd", b"hello\n", uid=70000, gid=80000, mode=0o640)]
AGENT = b"\x7fELF" + b"agent one" * 1000
OTHER_AGENT = b"\x7fELF" + b"agent two" * 1000


def fill(place: Workspace) -> None:
    """Add an image `web` with a local agent and mappings of all kinds."""
    mappings = {"conf": "/srv/conf", "tool": "/usr/local/bin/tool", "tree": "/opt/tree", "libx.so.1": "/usr/lib/"}
    web = place.add(
        "web",
        "oci:../layouts/web",
        buffer_mb=1,
        mappings=mappings,
        more='[agent]\nsource_strategy = "local"\npath = "kestrel"\n',
    )
    (web / "kestrel").write_bytes(AGENT)
    (web / "conf").write_text("conf\n")
    (web / "tool").write_text("#!/bin/sh\n")
    (web / "libx.so.1").write_bytes(b"\x7fELF lib")
    (web / "tree" / "deep").mkdir(parents=True)
    (web / "tree" / "run").write_text("run\n")
    (web / "tree" / "run").chmod(0o750)
    (web / "tree" / "deep" / "data").write_bytes(bytes(range(256)) * 40)
    (web / "tree" / "link").symlink_to("deep/data")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    need("mke2fs", "debugfs", "e2fsck")
    (tmp_path / "w").mkdir()
    place = Place(tmp_path / "w", tmp_path)
    fill(place)
    place.layout("web").write(BASE, MORE)
    return place


def debugfs(image: Path, command: str) -> bytes:
    """Return what debugfs prints."""
    done = subprocess.run(
        ["debugfs", "-R", command, image], env={"PATH": PATH, "TZ": "UTC"}, capture_output=True, check=True
    )
    return done.stdout


def facts(image: Path, path: str) -> tuple[str, str, int, int, int]:
    """Return (type, octal mode, uid, gid, mtime) of a file in an image."""
    text = debugfs(image, f"stat {path}").decode()
    words = text.split()
    mtime = next(line for line in text.splitlines() if line.strip().startswith("mtime:"))
    return (
        words[words.index("Type:") + 1],
        words[words.index("Mode:") + 1],
        int(words[words.index("User:") + 1]),
        int(words[words.index("Group:") + 1]),
        int(mtime.split()[1].partition(":")[0], 16),
    )


# --- what is in the image -------------------------------------------------------------------------


def test_files_and_their_modes(place: Place) -> None:
    place.build()
    image = place.output("web")
    contents = {
        "/srv/conf": b"conf\n",
        "/usr/local/bin/tool": b"#!/bin/sh\n",
        "/usr/lib/libx.so.1": b"\x7fELF lib",
        "/opt/tree/run": b"run\n",
        "/opt/tree/deep/data": bytes(range(256)) * 40,
        "/bin/kestrel": AGENT,
        "/usr/bin/kestrel": AGENT,
        "/etc/motd": b"hello\n",
    }
    for path, content in contents.items():
        assert debugfs(image, f"cat {path}") == content, path
    modes = {
        "/srv": "0755",
        "/srv/conf": "0644",
        "/usr/local/bin/tool": "0755",
        "/usr/lib/libx.so.1": "0755",
        "/opt/tree": "0755",
        "/opt/tree/run": "0750",
        "/opt/tree/deep/data": "0644",
        "/usr/bin/kestrel": "0755",
        "/etc/fsify-entrypoint": "0644",
    }
    for path, mode in modes.items():
        assert facts(image, path)[1:] == (mode, 0, 0, CREATED_SECONDS), path
    assert facts(image, "/bin") == ("symlink", "0777", 0, 0, 0)  # the agent did not replace it
    assert facts(image, "/etc/motd") == ("regular", "0640", 70000, 80000, 0)
    assert b'"deep/data"' in debugfs(image, "stat /opt/tree/link")
    checked = subprocess.run(["e2fsck", "-fn", image], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert b"has_journal" in debugfs(image, "stats")


def test_the_oci_config_is_in_the_image_byte_for_byte(place: Place) -> None:
    place.build()
    config = debugfs(place.output("web"), "cat /etc/fsify-entrypoint")
    assert json.loads(config)["config"] == {"Cmd": ["/bin/app"]}
    assert (place.layout("web").path / "blobs" / "sha256" / digest(config)[7:]).read_bytes() == config


def test_an_empty_image_has_its_few_files(tmp_path: Path) -> None:
    """Their data lies where mke2fs had put folders of its own."""
    need("mke2fs", "debugfs")
    place = Place(tmp_path, tmp_path)
    place.add_layout("web", mappings={"conf": "/conf"}, buffer_mb=0)
    (place.root / "web" / "conf").write_text("conf\n")
    result = place.build()
    assert result.image("web")["sha256"] == sha256_of(place.output("web"))
    assert debugfs(place.output("web"), "cat /conf") == b"conf\n"
    assert b"has_journal" in debugfs(place.output("web"), "stats")
    checked = subprocess.run(
        ["e2fsck", "-fn", place.output("web")], env={"PATH": PATH}, capture_output=True, check=False
    )
    assert checked.returncode == 0, checked.stdout


def test_the_manifest_fits_the_image(place: Place) -> None:
    result = place.build()
    written = json.loads(place.output("web").with_name("manifest.json").read_bytes())
    assert written["name"] == "web"
    assert written["rootfs"] == {
        "url": str(place.output("web")),
        "checksum": sha256_of(place.output("web")),
        "format": "raw",
    }
    assert written["workload"]["entrypoint"] == ["/bin/app"]
    assert (
        written["image_digest"]
        == json.loads((place.root / "fledge.lock").read_bytes())["images"]["oci:layouts/web linux/amd64"]["image"][
            "manifest"
        ]
    )
    assert result.image("web")["bytes"] == place.output("web").stat().st_size


# --- the same bytes everywhere ----------------------------------------------------------------------


def test_nothing_of_the_place_is_in_the_bytes(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.build("-j", "1")
    sums = {sha256_of(place.output("web"))}
    before = os.umask(0o077)
    try:
        for jobs, zone in (("1", "Asia/Tokyo"), ("2", "America/New_York")):
            (tmp_path / f"deeper-{jobs}" / "elsewhere").mkdir(parents=True)
            other = Place(tmp_path / f"deeper-{jobs}" / "elsewhere", tmp_path)
            fill(other)
            shutil.copytree(place.root / "layouts", other.root / "layouts")
            for path in (other.root / "web").rglob("*"):
                os.utime(path, (int(jobs), int(jobs)), follow_symlinks=False)
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            other.build("-j", jobs)
            sums.add(sha256_of(other.output("web")))
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert len(sums) == 1


def test_the_file_can_be_read_by_others(place: Place) -> None:
    place.build()
    assert place.output("web").stat().st_mode & 0o777 == 0o644
    assert place.output("web").with_name("manifest.json").stat().st_mode & 0o777 == 0o644


# --- the agent ----------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "BACKOFF_SECONDS", (0.0,))
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def with_agent(place: Place, table: str) -> None:
    place.add("web", "oci:../layouts/web", buffer_mb=1, more=f"[agent]\n{table}\n")


def test_an_agent_from_a_server(place: Place, server: Server) -> None:
    url = server.url(body(AGENT))
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"')
    place.build()
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == AGENT
    assert facts(place.output("web"), "/usr/bin/kestrel") == ("regular", "0755", 0, 0, CREATED_SECONDS)
    content = json.loads((place.root / "fledge.lock").read_bytes())
    assert content["agents"] == {f"agent:{url}": {"digest": digest(AGENT)}}
    assert place.build().stages("web") == []
    shutil.rmtree(place.root / "build")
    assert place.build("--offline", "--locked").stages("web") == ["assemble", "manifest"]
    place.add_layout("api", BASE, more=f'[agent]\nsource_strategy = "http"\nurl = "{url}"\n')
    assert place.build().stages("api") == ["resolve", "mkfs", "assemble", "manifest"]
    assert len(server.requests) == 1


def test_an_agent_that_changes_on_its_server(place: Place, server: Server) -> None:
    url = server.url(body(AGENT), body(OTHER_AGENT))
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"')
    place.build()
    before = sha256_of(place.output("web"))
    assert place.build().stages("web") == []  # nobody asks
    shutil.rmtree(place.root / "cache")
    place.output("web").unlink()
    result = place.fledge("build")
    assert result.code == 1
    assert f"found {digest(OTHER_AGENT)}, expected {digest(AGENT)}" in result.stderr
    assert "`fledge lock --update` accepts the new one" in result.stderr
    assert not place.output("web").exists()
    assert place.fledge("lock", "--update").code == 0
    assert place.build().stages("web")[-3:] == ["mkfs", "assemble", "manifest"]
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == OTHER_AGENT
    assert sha256_of(place.output("web")) != before


def test_an_agent_with_a_checksum(place: Place, server: Server) -> None:
    url = server.url(body(OTHER_AGENT))
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"\nchecksum = "{digest(AGENT)}"')
    result = place.fledge("build")
    assert result.code == 1
    assert f"found {digest(OTHER_AGENT)}, expected {digest(AGENT)}" in result.stderr
    assert "change agent.checksum in fledge.toml" in result.stderr
    assert place.leftovers() == []
    assert not (place.root / "fledge.lock").exists()
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"\nchecksum = "{digest(OTHER_AGENT)}"')
    place.build()
    with_agent(place, f'source_strategy = "http"\nurl = "{url}"\nchecksum = "{digest(AGENT)}"')
    assert f"expected {digest(AGENT)}" in place.fledge("build").stderr


def test_an_agent_of_a_release(place: Place, server: Server) -> None:
    base = server.url(body(AGENT))
    server.scripts[f"{base.rpartition('/')[2]}"] = []
    server.scripts["/0/v1.2/kestrel"] = [body(AGENT)]
    with_agent(place, f'source_strategy = "release"\nversion = "v1.2"\nbase_url = "{base}"')
    place.build()
    assert [path for path, _ in server.requests] == ["/0/v1.2/kestrel"]
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == AGENT


def test_offline_without_the_agent(place: Place, server: Server) -> None:
    with_agent(place, f'source_strategy = "http"\nurl = "{server.url(body(AGENT))}"')
    result = place.fledge("build", "--offline")
    assert result.code == 1
    assert "the agent would have to be downloaded from http://127.0.0.1" in result.stderr
    assert server.requests == []


def test_a_local_agent(place: Place) -> None:
    place.build()
    (place.root / "web" / "kestrel").write_bytes(OTHER_AGENT)
    assert place.build().stages("web") == ["mkfs", "assemble", "manifest"]
    assert debugfs(place.output("web"), "cat /usr/bin/kestrel") == OTHER_AGENT
    (place.root / "web" / "kestrel").unlink()
    result = place.fledge("build")
    assert result.code == 2, "the user's input is wrong, and nothing was started"
    assert f"agent.path: {place.root}/web/kestrel: cannot be read: No such file or directory" in result.stderr


def test_a_killed_download_leaves_its_folder_to_the_next_build(place: Place, server: Server) -> None:
    """SIGKILL while `resolve` runs: its scratch folder is found again, and removed."""
    arrived, go_on = threading.Event(), threading.Event()

    def stall(_: Handler) -> None:
        arrived.set()
        go_on.wait(20)

    with_agent(place, f'source_strategy = "http"\nurl = "{server.url(stall, body(AGENT))}"')
    program = Workspace(place.root, place.home)
    process = subprocess.Popen(
        program.command("build", "-j", "1"), env={**program.environment(), "no_proxy": "*"}, stderr=subprocess.DEVNULL
    )
    assert arrived.wait(20)
    assert place.leftovers() != []
    process.kill()
    process.wait()
    go_on.set()
    assert place.leftovers() != []
    place.build()
    assert list((place.root / "cache" / "tmp").iterdir()) == []


# --- when things go wrong -------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Make a filesystem of some MiB."""
    need("mount", "umount")
    need_root()
    folder = tmp_path / "disk"

    def make(mib: int) -> Path:
        folder.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], check=False)
        if mounted.returncode:
            pytest.skip("mounting is not allowed here")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", folder], check=True)


RANDOM = os.urandom(3 << 20)


def test_no_space_for_the_cache(
    place: Place, small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = small_disk(2)
    monkeypatch.setenv("FLEDGE_CACHE_DIR", str(disk))
    place.layout("web").write(BASE, [Member("big", RANDOM)])
    result = place.fledge("build")
    assert result.code == 1
    assert "no space left on the disk" in result.stderr
    assert "set FLEDGE_CACHE_DIR to a folder on a larger disk" in result.stderr
    assert list((disk / "tmp").iterdir()) == []
    assert not place.output("web").exists()


@pytest.mark.parametrize("preallocate", [False, True])
def test_no_space_for_the_image(place: Place, small_disk: Callable[[int], Path], preallocate: bool) -> None:
    (place.root / "build").symlink_to(small_disk(2))
    place.layout("web").write(BASE, [Member("big", RANDOM)])
    if preallocate:
        file = place.root / "web" / "fledge.toml"
        file.write_text(file.read_text().replace("[mappings]", "preallocate = true\n[mappings]"))
    result = place.fledge("build")
    assert result.code == 1
    assert f"{place.output('web')}: no space left on the disk" in result.stderr
    assert "FLEDGE_CACHE_DIR" not in result.stderr
    assert [path for path in (place.root / "build").rglob("*") if path.is_file()] == []


def test_a_mapped_file_that_changes_while_it_is_built(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.staging

    def late(store: Store, key: object) -> object:
        (place.root / "web" / "conf").write_text("late\n")
        return real(store, key)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "staging", late)
    result = place.fledge("build", "-j", "1")
    assert result.code != 0
    assert "changed while it was being built; run again" in result.stderr
    assert not place.output("web").exists()
    monkeypatch.undo()
    place.build()
    assert debugfs(place.output("web"), "cat /srv/conf") == b"late\n"


KILLER = """
import os, signal, sys
from fledge_tasks import fsutil
count = int(os.environ["KILL_AT"])
real = os.rename
def rename(*arguments, **options):
    global count
    count -= 1
    if count < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments, **options)
os.rename = rename
from fledge_tasks.cli import main
sys.argv = ["fledge", *sys.argv[1:]]
main()
"""


def test_builds_that_are_killed_at_a_rename_are_completed_by_the_next(place: Place) -> None:
    place.build("-j", "1")
    expected = sha256_of(place.output("web"))
    program = Workspace(place.root, place.home)
    shutil.rmtree(place.root / "cache")
    shutil.rmtree(place.root / "build")
    (place.root / "fledge.lock").unlink()
    for count in (0, 1, 2, 3, 5):
        done = subprocess.run(
            [sys.executable, "-c", KILLER, "-C", place.root, "build", "-j", "1"],
            env={**program.environment(), "KILL_AT": str(count)},
            capture_output=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    place.build()
    assert sha256_of(place.output("web")) == expected
    assert place.build().stages("web") == []
    assert sorted(path.name for path in place.leftovers()) == [".fledge.json", "manifest.json", "rootfs.img"]


def test_a_layer_beyond_its_limits_is_refused_and_not_remembered(place: Place) -> None:
    toml = place.root / "web" / "fledge.toml"
    given = toml.read_text()
    toml.write_text(f"{given}[limits]\nentries = 2\n")
    result = place.fledge("build")
    assert result.code == 1
    assert "the layer has more than 2 entries" in result.stderr
    assert "raise entries in the [limits] of fledge.toml" in result.stderr
    assert not place.output("web").exists() and place.leftovers() == []
    toml.write_text(f"{given}[limits]\nentries = 4\n")
    assert place.build().stages("web") == ["unpack", "mkfs", "assemble", "manifest"]


def test_errors_are_ours(place: Place) -> None:
    """A stage that is asked for the impossible says so, with what to do."""
    from fledge_tasks import results, stages, workspace
    from fledge_tasks.planner import Planner

    place.build()
    found = workspace.load(place.root)
    planner = Planner(found, Store(found.cache))
    plan = planner.plan(found.images[0])
    assert plan is not None
    shutil.rmtree(place.root / "cache" / "objects")
    shutil.rmtree(place.root / "build")
    for stage in (stages.mkfs, results.assemble, results.write_manifest):
        with pytest.raises(FledgeError, match=r"not in the cache any more|is not there") as caught:
            stage(planner, plan)
        assert caught.value.hint is not None and "run again" in caught.value.hint
    with pytest.raises(FledgeError, match="the blob of layer"):
        stages.unpack(planner, plan, plan.layers[0])
    assert stages.fetch(planner, plan, plan.layers[0])["fetched"].keys() == {layer.ref.diff_id for layer in plan.layers}
    assert stages.fetch(planner, plan, plan.layers[0]) == stages.HIT


def test_a_blob_is_used_while_others_are_on_their_way(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is published, and free to be unpacked and dropped; what came before a failure stays."""
    from fledge_tasks import stages, workspace
    from fledge_tasks.oci import source
    from fledge_tasks.planner import Planner

    assert place.fledge("lock").code == 0
    found = workspace.load(place.root)
    planner = Planner(found, Store(found.cache))
    plan = planner.plan(found.images[0])
    assert plan is not None
    last, first = plan.layers
    fetch = source.fetch

    def breaks_off(*arguments: Any, arrived: Callable[[LayerRef], None], **settings: Any) -> None:
        reference, image, wanted = arguments
        fetch(reference, image, [ref for ref in wanted if ref == first.ref], arrived=arrived, **settings)
        assert planner.store.find(first.blob.key()) is not None
        assert stages.unpack(planner, plan, first)["bytes"] > 0
        assert not planner.store.folder(first.blob.key()).exists()
        raise SourceError("the connection is gone")

    monkeypatch.setattr(source, "fetch", breaks_off)
    with pytest.raises(SourceError, match="the connection is gone"):
        stages.fetch(planner, plan, last)
    planner.store.close()
    assert place.leftovers() == []
    monkeypatch.undo()
    assert place.build().stages("web") == ["fetch", "unpack", "mkfs", "assemble", "manifest"]


def test_what_another_brings_meanwhile_is_not_held(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at a layer, somebody brought it: whoever unpacks it can drop its blob."""
    from fledge_tasks import stages, workspace
    from fledge_tasks.oci import source
    from fledge_tasks.planner import Planner

    assert place.fledge("lock").code == 0
    found = workspace.load(place.root)
    planner, another = (Planner(found, Store(found.cache)) for _ in range(2))
    plan = planner.plan(found.images[0])
    assert plan is not None
    own, brought = plan.layers
    building_if_free, fetch = planner.store.building_if_free, source.fetch

    def late(key: Digest) -> AbstractContextManager[bool]:
        monkeypatch.undo()
        only = replace(plan, layers=(brought,))
        assert stages.fetch(another, only, brought)["fetched"].keys() == {brought.ref.diff_id}
        monkeypatch.setattr(source, "fetch", others_unpack)
        return building_if_free(key)

    def others_unpack(*arguments: Any, **settings: Any) -> None:
        assert arguments[2] == [own.ref]
        assert stages.unpack(another, plan, brought)["bytes"] > 0
        assert not another.store.folder(brought.blob.key()).exists()
        fetch(*arguments, **settings)

    monkeypatch.setattr(planner.store, "building_if_free", late)
    assert stages.fetch(planner, plan, own)["fetched"].keys() == {own.ref.diff_id}
    for store in (planner.store, another.store):
        store.close()
