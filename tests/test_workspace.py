"""Workspaces: which images are found, under which names, and where their results go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fledge_tasks import workspace
from fledge_tasks.errors import ConfigError, InputError

FLEDGE = """
version = "1"
strategy = "oci_rootfs"
source = { image = "nginx" }
filesystem = { type = "ext4", size_buffer_mb = 1 }
"""


@pytest.fixture(autouse=True)
def no_cache_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(workspace.CACHE_VARIABLE, raising=False)


def add(folder: Path, name: str | None = None, content: str = FLEDGE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    named = f'[manifest]\nname = "{name}"\n' if name else ""
    (folder / "fledge.toml").write_text(content + named)


def names(root: Path) -> list[str]:
    return [image.name for image in workspace.load(root).images]


def test_one_image_in_the_root(tmp_path: Path) -> None:
    root = tmp_path / "web"
    add(root)
    found = workspace.load(root)
    [image] = found.images
    assert image.name == "web"
    assert found.root == image.folder == root
    assert found.cache == root / "cache"
    assert found.lock == root / "fledge.lock"
    assert found.output(image) == root / "build/web/rootfs.img"
    assert found.manifest_output(image) == root / "build/web/manifest.json"
    assert not found.build.exists()
    assert not found.cache.exists()


def test_images_are_sorted_by_name(tmp_path: Path) -> None:
    add(tmp_path / "b")
    add(tmp_path / "z/deep/er", "a")
    add(tmp_path / "c/build")
    add(tmp_path / "c/cache")
    assert names(tmp_path) == ["a", "b", "build", "cache"]


def test_what_is_not_looked_into(tmp_path: Path) -> None:
    add(tmp_path / "web")
    for skipped in ("build/x", "cache/x", ".git/x", ".venv", "web/.hidden", "web/node_modules/y"):
        add(tmp_path / skipped)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "web")
    assert names(tmp_path) == ["web"]


def test_a_root_that_is_hidden_or_called_build_counts(tmp_path: Path) -> None:
    for name in (".hidden", "build"):
        add(tmp_path / name / "web")
        assert names(tmp_path / name) == ["web"]


def test_a_linked_file_counts(tmp_path: Path) -> None:
    (tmp_path / "shared.toml").write_text(FLEDGE)
    (tmp_path / "web").mkdir()
    (tmp_path / "web/fledge.toml").symlink_to("../shared.toml")
    [image] = workspace.load(tmp_path).images
    assert (image.name, image.folder) == ("web", tmp_path / "web")


def test_the_root_may_be_a_link_or_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    found = workspace.load(tmp_path / "link")
    assert found.root == tmp_path / "real"
    monkeypatch.chdir(tmp_path / "real")
    assert workspace.load(Path()) == found


def test_cache_folder_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path / "ws/web")
    add(tmp_path / "ws/store/objects/x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv(workspace.CACHE_VARIABLE, "../ws/store")
    found = workspace.load(tmp_path / "ws")
    assert found.cache == tmp_path / "ws/store"
    assert [image.name for image in found.images] == ["web"]
    monkeypatch.setenv(workspace.CACHE_VARIABLE, "")
    assert workspace.load(tmp_path / "ws").cache == tmp_path / "ws/cache"


def test_problems_of_all_files_in_one_error(tmp_path: Path) -> None:
    add(tmp_path / "a", content=FLEDGE.replace('"ext4"', '"ext5"'))
    add(tmp_path / "b/c", content="x = ")
    (tmp_path / "d/fledge.toml").mkdir(parents=True)
    add(tmp_path / "e", "same")
    add(tmp_path / "f", "same")
    add(tmp_path / "g", "SAME")
    with pytest.raises(ConfigError) as caught:
        workspace.load(tmp_path)
    hint = "  hint: give one of them another name in its [manifest] table"
    assert str(caught.value).splitlines() == [
        'a/fledge.toml: filesystem.type: found string "ext5", '
        'expected the string "ext4", "xfs", "btrfs", "squashfs" or "erofs"',
        '  hint: did you mean "ext4"?',
        "b/c/fledge.toml: not valid TOML: Invalid value (at end of document)",
        "d/fledge.toml: not a regular file, expected a TOML file",
        'f/fledge.toml: manifest.name: found the image name "same", which e/fledge.toml has already',
        hint,
        'g/fledge.toml: manifest.name: found the image name "SAME", which e/fledge.toml has already as "same"',
        hint,
    ]
    assert caught.value.exit_code == 2


def test_a_folder_with_an_unprintable_name(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/w\xff\x1b"))
    add(folder)
    with pytest.raises(ConfigError) as caught:
        workspace.load(tmp_path)
    line = str(caught.value).splitlines()[0]
    assert line.startswith("w\\udcff\\x1b/fledge.toml: manifest.name: missing, and the folder's name")
    assert line.isprintable()
    add(folder, "web")
    assert names(tmp_path) == ["web"]


def test_a_workspace_whose_path_is_no_text(tmp_path: Path) -> None:
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/w\xff"))
    add(root, "web")
    with pytest.raises(InputError, match="its path is not UTF-8") as caught:
        workspace.load(root)
    assert str(caught.value).isprintable()


def test_nothing_found(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        workspace.load(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert caught.value.message == "found no fledge.toml in this folder or below"
    assert caught.value.hint
    assert 'strategy = "oci_rootfs"' in caught.value.hint


def test_the_hint_is_a_good_file(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        workspace.load(tmp_path)
    sample = (caught.value.hint or "").split("\n", 1)[1]
    add(tmp_path / "web", content=sample + "\n")
    assert names(tmp_path) == ["web"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        workspace.load(tmp_path / "absent")
    add(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        workspace.load(tmp_path / "fledge.toml")


@pytest.mark.parametrize("denied_is_root", [True, False])
def test_folders_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied_is_root: bool) -> None:
    add(tmp_path / "web")
    denied = tmp_path if denied_is_root else tmp_path / "database"
    denied.mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path: str) -> object:  # root may read everything, so the refusal is played
        if path == str(denied):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if denied_is_root:
        with pytest.raises(InputError, match="cannot be read: Permission denied"):
            workspace.load(tmp_path)
    else:
        assert names(tmp_path) == ["web"]


def test_select(tmp_path: Path) -> None:
    for name in ("web", "api", "db"):
        add(tmp_path / name)
    found = workspace.load(tmp_path)
    assert found.select([]) == found.images
    assert [image.name for image in found.select(["web", "api", "web"])] == ["api", "web"]
    with pytest.raises(InputError) as caught:
        found.select(["api", "wep", "nonsense"])
    assert caught.value.message == 'no image is named "nonsense", "wep"'
    assert caught.value.hint == '"wep": did you mean "web"?\nthere are: api, db, web'
    with pytest.raises(InputError) as caught:
        found.select(["ap"])
    assert caught.value.hint == 'did you mean "api"?\nthere are: api, db, web'
