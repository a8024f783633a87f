"""Whatever is wrong: one clear message, the right exit code, and nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.real.images import Images
from tests.real.layout import Member, write_layout, write_tar
from tests.real.registry import Registry
from tests.tools import PATH
from tests.workspaces import Result, Workspace

FILES = [Member("bin/", b"5", mode=0o755), *(Member(f"bin/{n}", content=os.urandom(50_000)) for n in range(20))]


@pytest.fixture
def layout(folder: Path) -> Path:
    """A small image, `oci:LAYOUT:latest`."""
    write_tar(folder / "layer.tar", FILES)
    write_layout(folder / "layout", [folder / "layer.tar"])
    return folder / "layout"


def refused(workspace: Workspace, code: int, *words: str, arguments: tuple[str, ...] = ("build",)) -> Result:
    """Run `fledge`, which must fail like this and leave nothing behind."""
    result = workspace.fledge(*arguments)
    assert result.code == code, result.stderr
    assert "Traceback" not in result.stderr
    assert [word for word in words if word not in result.stderr] == []
    assert workspace.leftovers() == []
    return result


def test_no_fledge_toml(workspace: Workspace) -> None:
    refused(workspace, 2, "fledge.toml", str(workspace.root))


def test_no_such_folder(workspace: Workspace) -> None:
    workspace.root.rmdir()
    refused(workspace, 2, str(workspace.root))


def test_broken_toml(workspace: Workspace) -> None:
    (workspace.add("web", "oci:x") / "fledge.toml").write_text('version = "1\n')
    refused(workspace, 2, "web/fledge.toml", "line 1")


def test_all_mistakes_of_all_files_at_once(workspace: Workspace) -> None:
    workspace.add("a", "oci:x", more="[filesytem]\nx = 1")
    (workspace.add("b", "oci:x") / "fledge.toml").write_text('version = "1"\nstrategy = "oci_rootfs"\n[source]\n')
    refused(workspace, 2, "a/fledge.toml", "filesytem", '"filesystem"', "b/fledge.toml", "source.image", "filesystem")


def test_unknown_name(workspace: Workspace, layout: Path) -> None:
    workspace.add("web", f"oci:{layout}:latest")
    refused(workspace, 2, "wbe", "web", arguments=("build", "wbe"))


def test_missing_local_image(workspace: Workspace) -> None:
    workspace.add("web", "oci:nowhere:latest")
    refused(workspace, 1, str(workspace.root / "web" / "nowhere"))


def test_missing_repository_and_missing_tag(workspace: Workspace, images: Images, registry: Registry) -> None:
    source = images.reference("odd")
    workspace.add("web", f"docker://{registry.host}/no-such-image:1")
    refused(workspace, 1, "no-such-image")
    workspace.add("web", f"docker://{source.rpartition(':')[0]}:no-such-tag")
    refused(workspace, 1, "no-such-tag")


def test_registry_down(workspace: Workspace, images: Images, registry: Registry) -> None:
    workspace.add("web", f"docker://{images.reference('odd')}")
    with registry.down():
        refused(workspace, 1, registry.host)


def test_unreachable_daemon(workspace: Workspace, folder: Path) -> None:
    workspace.env = {"DOCKER_HOST": f"unix://{folder}/none.sock"}
    workspace.add("web", "docker-daemon:nginx:alpine")
    refused(workspace, 1, "daemon", f"{folder}/none.sock")


def test_missing_mapping(workspace: Workspace, layout: Path) -> None:
    workspace.add("web", f"oci:{layout}:latest", mappings={"./absent.conf": "/etc/absent.conf"})
    refused(workspace, 2, "./absent.conf", str(workspace.root / "web" / "absent.conf"))


def test_no_skopeo(workspace: Workspace, folder: Path, images: Images) -> None:
    programs = folder / "programs"
    programs.mkdir()
    for place in PATH.split(":"):
        for program in Path(place).glob("*"):
            if program.name != "skopeo" and not os.path.lexists(programs / program.name):
                (programs / program.name).symlink_to(program)
    workspace.env = {"PATH": str(programs)}
    workspace.add("web", f"docker://{images.reference('odd')}")
    refused(workspace, 1, "skopeo is not installed", "apt-get install skopeo")


def descriptor(layout: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the index, the manifest and the config of a layout."""
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(blob(layout, index["manifests"][0]["digest"]).read_bytes())
    return index, manifest, json.loads(blob(layout, manifest["config"]["digest"]).read_bytes())


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs" / digest.replace(":", "/")


def rewrite(layout: Path, change: Callable[[bytes, dict[str, Any]], bytes]) -> None:
    """Change the layer blob and the config, and make every digest and size above them true again."""
    index, manifest, config = descriptor(layout)

    def put(target: dict[str, Any], data: bytes) -> None:
        target.update(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data))
        blob(layout, target["digest"]).write_bytes(data)

    put(manifest["layers"][0], change(blob(layout, manifest["layers"][0]["digest"]).read_bytes(), config))
    put(manifest["config"], json.dumps(config).encode())
    put(index["manifests"][0], json.dumps(manifest).encode())
    (layout / "index.json").write_text(json.dumps(index))


def wrong_diff_id(data: bytes, config: dict[str, Any]) -> bytes:
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    return data


def truncated_gzip(data: bytes, _: dict[str, Any]) -> bytes:
    return data[: len(data) // 2]


def truncated_tar(data: bytes, config: dict[str, Any]) -> bytes:
    tar = gzip.decompress(data)[:100_000]
    config["rootfs"]["diff_ids"] = [f"sha256:{hashlib.sha256(tar).hexdigest()}"]
    return gzip.compress(tar)


def no_gzip_at_all(data: bytes, _: dict[str, Any]) -> bytes:
    return b"not an archive" + data[14:]


@pytest.mark.parametrize("change", [wrong_diff_id, truncated_gzip, truncated_tar, no_gzip_at_all])
def test_a_layer_that_is_not_what_it_says(
    workspace: Workspace, layout: Path, change: Callable[[bytes, dict[str, Any]], bytes]
) -> None:
    rewrite(layout, change)
    _, _, config = descriptor(layout)
    workspace.add("web", f"oci:{layout}:latest")
    result = refused(workspace, 1, config["rootfs"]["diff_ids"][0].removeprefix("sha256:")[:12])
    assert "web" in result.stderr


@pytest.mark.parametrize("part", ["layer", "config", "manifest"])
def test_a_corrupt_blob(workspace: Workspace, layout: Path, part: str) -> None:
    index, manifest, _ = descriptor(layout)
    digest = {
        "layer": manifest["layers"][0]["digest"],
        "config": manifest["config"]["digest"],
        "manifest": index["manifests"][0]["digest"],
    }[part]
    data = bytearray(blob(layout, digest).read_bytes())
    data[len(data) // 2] ^= 1
    blob(layout, digest).write_bytes(data)
    workspace.add("web", f"oci:{layout}:latest")
    refused(workspace, 1)


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_corrupt_blob_in_the_registry(workspace: Workspace, folder: Path, damage: str) -> None:
    """The registry serves other bytes of a blob than the manifest promises, or none, then the true ones again."""
    write_tar(folder / "layer.tar", FILES)
    write_tar(folder / "other.tar", [Member("other", content=os.urandom(50_000))])
    layout = folder / "layout"
    write_layout(layout, [folder / "layer.tar", folder / "other.tar"])
    broken = Registry(folder / "storage", folder)
    broken.start()
    try:
        source = f"{broken.host}/small:1"
        copy = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:latest", f"docker://{source}"]
        subprocess.run(copy, check=True)
        _, manifest, _ = descriptor(layout)
        workspace.home = broken.home
        workspace.add("web", f"docker://{source}")
        for part in [manifest["config"], *manifest["layers"]]:
            name = part["digest"].removeprefix("sha256:")
            stored = folder / "storage/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"
            data = stored.read_bytes()
            stored.unlink()
            if damage == "flipped":
                stored.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
            words = [] if part is manifest["config"] and damage == "missing" else [f"blob sha256:{name}: "]
            said = {"flipped": "found sha256:", "missing": "the registry has not got"}[damage]
            result = refused(workspace, 1, "web", said, *words)
            assert result.stderr.count("error: ") == 1
            stored.write_bytes(data)
            workspace.build()
            shutil.rmtree(workspace.root / "cache")
            shutil.rmtree(workspace.root / "build")
            (workspace.root / "fledge.lock").unlink()
    finally:
        broken.stop()


@pytest.mark.parametrize("place", ["cache", "build"])
def test_disk_full(workspace: Workspace, layout: Path, place: str) -> None:
    small = workspace.root / place
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", small], check=True, env={"PATH": PATH})
    try:
        workspace.add("web", f"oci:{layout}:latest")
        refused(workspace, 1, "no space left on the disk")
    finally:
        subprocess.run(["umount", small], check=True, env={"PATH": PATH})
    shutil.rmtree(small)
    assert workspace.build().image("web")["sha256"]
