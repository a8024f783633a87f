"""The image itself: the same tree as `umoci unpack`, a clean filesystem, the promised space, the same bytes for all."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.real.compare import compare_trees
from tests.real.conftest import SCIENCE_BUFFER_MB, WEB_BUFFER_MB, Built
from tests.real.images import Images
from tests.real.reference import Reference, fsck, mounted
from tests.real.registry import Registry
from tests.real.special import MANY_FILES
from tests.tools import as_nobody
from tests.workspaces import Workspace, sha256_of

MIB = 1 << 20
CUSTOMIZATION = ("lost+found", "etc/fsify-entrypoint", "srv/page.html")

References = Callable[[str], Reference]


def free_bytes(folder: Path) -> int:
    facts = os.statvfs(folder)
    return facts.f_bavail * facts.f_frsize


def test_web_equals_the_unpacked_image(web: Built, reference: References) -> None:
    expected, image = reference("web"), web.workspace.output("web")
    assert fsck(image) == ""
    with mounted(image) as root:
        assert compare_trees(expected.root, root, added=CUSTOMIZATION, unstamped=expected.unstamped) == []
        assert (root / "srv/page.html").read_text() == "first\n"
        assert json.loads((root / "etc/fsify-entrypoint").read_bytes())["config"]["Entrypoint"] == ["/usr/sbin/nginx"]
        assert abs(free_bytes(root) - WEB_BUFFER_MB * MIB) <= MIB


def test_science_equals_the_unpacked_image(science: Built, reference: References) -> None:
    expected, image = reference("science"), science.workspace.output("science")
    assert fsck(image) == ""
    with mounted(image) as root:
        assert compare_trees(expected.root, root, added=CUSTOMIZATION, unstamped=expected.unstamped) == []
        assert abs(free_bytes(root) - SCIENCE_BUFFER_MB * MIB) <= MIB
        assert sum(len(files) for _, _, files in os.walk(root)) > 30_000
        assert image.stat().st_size > 1000 * MIB


def test_odd_members_equal_the_unpacked_image(workspace: Workspace, images: Images, reference: References) -> None:
    workspace.add("odd", f"docker://{images.reference('odd')}", buffer_mb=0)
    workspace.build()
    expected, image = reference("odd"), workspace.output("odd")
    assert fsck(image) == ""
    with mounted(image) as root:
        assert compare_trees(expected.root, root, added=CUSTOMIZATION, unstamped=expected.unstamped) == []
        assert free_bytes(root) <= MIB
        assert root.stat().st_mtime == 1_500_000_000
        assert (root / "sparse").stat().st_blocks * 512 < 1 * MIB


def test_a_folder_of_many_files(workspace: Workspace, images: Images) -> None:
    workspace.add("many", f"docker://{images.reference('manyfiles')}", buffer_mb=10)
    workspace.build()
    image = workspace.output("many")
    assert fsck(image) == ""
    with mounted(image) as root:
        assert len(os.listdir(root / "many")) == MANY_FILES
        for number in range(0, MANY_FILES, 997):
            assert (root / f"many/{number:06d}.txt").read_bytes() == b"%d\n" % number
        assert abs(free_bytes(root) - 10 * MIB) <= MIB


def test_the_manifest_names_the_image_as_it_is(web: Built) -> None:
    report = web.result.image("web")
    manifest = json.loads(Path(report["manifest"]).read_bytes())
    assert Path(report["image"]) == web.workspace.output("web")
    assert report["sha256"] == sha256_of(web.workspace.output("web"))
    assert report["bytes"] == web.workspace.output("web").stat().st_size
    assert manifest["rootfs"] == {"url": report["image"], "checksum": report["sha256"], "format": "raw"}
    assert manifest["workload"]["entrypoint"] == ["/usr/sbin/nginx", "-g", "daemon off;"]
    assert manifest["workload"]["base_url"] == "http://127.0.0.1:443"
    assert manifest["workload"]["env"]["APP"] == "web"


@pytest.mark.parametrize("name", ["web", "odd"])
def test_an_unprivileged_user_makes_the_same_bytes(
    name: str, workspace: Workspace, folder: Path, images: Images, registry: Registry
) -> None:
    source, home = f"docker://{images.reference(name)}", folder / "home"
    theirs = Workspace(folder / "theirs", home, prefix=as_nobody(), env={"XDG_RUNTIME_DIR": str(home / "run")})
    for place in (workspace, theirs):
        (place.add(name, source, mappings={"a": "/srv/a"}) / "a").write_text("a")
    shutil.copytree(registry.home, home)
    (home / "run").mkdir()
    for path in [theirs.root, home, *theirs.root.rglob("*"), *home.rglob("*")]:
        os.chown(path, 65534, 65534)
    sums = [place.build().image(name)["sha256"] for place in (workspace, theirs)]
    assert theirs.output(name).stat().st_uid == 65534
    assert sums[0] == sums[1] == sha256_of(theirs.output(name))
    if name == "odd":
        with mounted(theirs.output(name)) as root:
            found = {path: (root / path).lstat() for path in ("dev/null", "dev/loop200", "dev/large-minor", "run/fifo")}
        assert {path: stat.filemode(facts.st_mode) for path, facts in found.items()} == {
            "dev/null": "crw-rw-rw-",
            "dev/loop200": "brw-rw----",
            "dev/large-minor": "crw-------",
            "run/fifo": "prw--w----",
        }
        devices = [(os.major(facts.st_rdev), os.minor(facts.st_rdev)) for facts in found.values()]
        assert devices == [(1, 3), (7, 200), (259, 70_000), (0, 0)]
