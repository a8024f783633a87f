"""What runs again after a change, and what does not: counted in stages and in blobs, never in seconds."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.real.conftest import Built
from tests.real.images import Images
from tests.real.reference import fsck, mounted
from tests.real.registry import Registry
from tests.tools import put_before
from tests.workspaces import Workspace, sha256_of


def layers(registry: Registry, images: Images, name: str) -> list[str]:
    """Return the digests of an image's layer blobs, the base first."""
    manifest = registry.manifest(name, images.tag(name))
    assert manifest is not None
    return [layer["digest"] for layer in manifest["layers"]]


def moved_layers(transfers: list[str], known: list[str]) -> list[str]:
    """Return the transferred blobs that are layers, each as often as it was moved."""
    return sorted(digest for digest in transfers if digest in known)


def test_a_cold_build_moves_and_unpacks_every_layer_once(web: Built, registry: Registry, images: Images) -> None:
    own = layers(registry, images, "web")
    assert len(own) == 3
    assert moved_layers(web.transfers, own) == sorted(own)
    assert sorted(web.result.stages("web")) == sorted(
        ["resolve", *["fetch"] * 3, *["unpack"] * 3, "mkfs", "assemble", "manifest"]
    )


def test_layers_are_unpacked_while_the_largest_is_on_its_way(
    workspace: Workspace, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """skopeo has all blobs, but does not end before two layers are unpacked, for a minute at most."""
    unpacked = f"ls -d {workspace.root}/cache/objects/*/*/payload"
    script = f"""
        case " $* " in *" copy "*) ;; *) exec {shutil.which("skopeo")} "$@" ;; esac
        {shutil.which("skopeo")} "$@" || exit
        for _ in $(seq 600); do [ "$({unpacked} 2>/dev/null | wc -l)" -lt 2 ] || exit 0; sleep 0.1; done
        exit 9"""
    put_before(monkeypatch, workspace.root.parent, "skopeo", script)
    workspace.env = {"PATH": os.environ["PATH"]}
    workspace.add("web", f"docker://{images.reference('web')}")
    assert sorted(workspace.build("-j", "2").stages("web")) == sorted(
        ["resolve", *["fetch"] * 3, *["unpack"] * 3, "mkfs", "assemble", "manifest"]
    )


def test_a_second_image_on_the_same_base_moves_its_own_layer_only(
    science: Built, registry: Registry, images: Images
) -> None:
    base, own = layers(registry, images, "science")
    assert base == layers(registry, images, "web")[0]
    assert moved_layers(science.transfers, [base, own]) == [own]
    assert science.result.stages("science").count("unpack") == 1
    assert science.result.stages("science").count("fetch") == 1


def test_nothing_runs_the_second_time(web: Built, science: Built, registry: Registry) -> None:
    before = {name: web.workspace.output(name).stat() for name in ("web", "science")}
    with registry.down():
        result = web.workspace.build()
    assert result.stages("web") == []
    assert result.stages("science") == []
    assert before == {name: web.workspace.output(name).stat() for name in ("web", "science")}
    assert result.image("web")["sha256"] == web.result.image("web")["sha256"]
    assert science.result.image("science")["sha256"] == result.image("science")["sha256"]


def test_a_changed_mapping_runs_three_stages_of_one_image(web: Built, science: Built, registry: Registry) -> None:
    del science
    page = web.workspace.root / "web" / "page.html"
    page.write_text("second\n")
    with registry.down():
        result = web.workspace.build()
    assert result.stages("web") == ["mkfs", "assemble", "manifest"]
    assert result.stages("science") == []
    assert fsck(web.workspace.output("web")) == ""
    with mounted(web.workspace.output("web")) as root:
        assert (root / "srv/page.html").read_text() == "second\n"
    page.write_text("first\n")
    again = web.workspace.build("web")
    assert again.stages("web") == ["assemble", "manifest"], "the first filesystem is still in the cache"
    assert again.image("web")["sha256"] == web.result.image("web")["sha256"]


def test_one_added_layer_is_one_blob_and_one_unpacked_layer(
    web: Built, workspace: Workspace, registry: Registry, images: Images
) -> None:
    workspace.cache = web.workspace.cache
    workspace.add("plus", f"docker://{images.reference('web-plus')}")
    known = layers(registry, images, "web-plus")
    assert known[:3] == layers(registry, images, "web")
    with registry.transfers() as moved:
        result = workspace.build()
    assert moved_layers(moved, known) == known[3:]
    assert result.stages("plus") == ["resolve", "fetch", "unpack", "mkfs", "assemble", "manifest"]
    with mounted(workspace.output("plus")) as root:
        assert (root / "var/www/html/more.html").read_text() == "more\n"
        assert not (root / "var/www/html/index.html").exists()


def test_an_output_that_was_touched_is_made_again(web: Built) -> None:
    image = web.workspace.output("web")
    with image.open("r+b") as file:
        file.seek(5_000_000)
        file.write(b"booted")
    assert "assemble" in web.workspace.build("web").stages("web")
    assert sha256_of(image) == web.result.image("web")["sha256"]
    image.unlink()
    assert "assemble" in web.workspace.build("web").stages("web")
    assert sha256_of(image) == web.result.image("web")["sha256"]


def test_a_moved_cache_is_all_that_a_build_needs(
    web: Built, science: Built, workspace: Workspace, registry: Registry
) -> None:
    origin = web.workspace
    assert origin.cache is not None
    for name in ("web", "science"):
        shutil.copytree(origin.root / name, workspace.root / name)
    shutil.copy(origin.root / "fledge.lock", workspace.root)
    moved = workspace.root.parent / "moved-cache"
    origin.cache.rename(moved)
    workspace.cache = moved
    try:
        for path in [moved, *moved.rglob("*")]:
            os.utime(path, (1_000_000_000, 1_000_000_000), follow_symlinks=False)
        with registry.down(), registry.transfers() as transfers:
            result = workspace.build()
    finally:
        moved.rename(origin.cache)
    assert transfers == []
    for name, built in (("web", web), ("science", science)):
        assert result.stages(name) == ["assemble", "manifest"]
        assert result.image(name)["sha256"] == built.result.image(name)["sha256"]
        assert sha256_of(workspace.output(name)) == built.result.image(name)["sha256"]


def test_a_lost_index_costs_nothing(web: Built, workspace: Workspace) -> None:
    origin = web.workspace
    assert origin.cache is not None
    workspace.cache = origin.cache
    shutil.copytree(origin.root / "web", workspace.root / "web")
    shutil.copy(origin.root / "fledge.lock", workspace.root)
    shutil.rmtree(origin.cache / "index")
    assert workspace.build("--locked").stages("web") == ["assemble", "manifest"]
