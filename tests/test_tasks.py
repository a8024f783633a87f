"""The pipeline by its counters: which stages run after which change, never how long they take."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from doit.task import Task

from fledge_tasks import stages, tasks, workspace
from fledge_tasks.digest import short
from fledge_tasks.filesystems import libext2fs
from fledge_tasks.keys import Unpack
from fledge_tasks.lock import LockFile
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests.layers import Compression, Member, folder
from tests.layouts import CREATED_SECONDS, Place
from tests.tools import need
from tests.workspaces import Result, sha256_of

BASE = [folder("bin"), Member("bin/app", b"\x7fELF" + bytes(range(256)) * 100, mode=0o755)]
MORE = [folder("etc"), Member("etc/motd", b"hello\n")]
THIRD = [Member("etc/third", b"3\n")]
LAST = ["mkfs", "assemble", "manifest"]
ALL = ["resolve", "fetch", "fetch", "unpack", "unpack", *LAST]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace with one image `web` of two layers and one mapping."""
    need("mke2fs")
    (tmp_path / "w").mkdir()
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, MORE, mappings={"conf": "/srv/conf"})
    (place.root / "web" / "conf").write_text("one\n")
    return place


@pytest.fixture(params=["1", "2"], ids=["one job", "two jobs"])
def jobs(request: pytest.FixtureRequest) -> tuple[str, str]:
    return ("-j", str(request.param))


@pytest.fixture
def built(place: Place) -> Place:
    """The same, built."""
    place.build()
    return place


def edit(place: Place, old: str, new: str, name: str = "web") -> None:
    """Change the fledge.toml of an image."""
    file = place.root / name / "fledge.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def layer_task(stage: str, diff_id: str) -> str:
    return f"{stage}:{short(diff_id)}"


def is_right(place: Place, result: Result, name: str = "web") -> bool:
    """Tell whether the image on the disk is the one in the report, and nothing else lies around."""
    return result.image(name)["sha256"] == sha256_of(place.output(name)) and not [
        path for path in place.leftovers() if path.name not in {"rootfs.img", "manifest.json", ".fledge.json"}
    ]


# --- from nothing, and nothing to do --------------------------------------------------------------


def test_cold_then_nothing_changed(place: Place, jobs: tuple[str, str]) -> None:
    cold = place.build(*jobs)
    assert cold.stages("web") == ALL
    assert is_right(place, cold)
    before = place.output("web").stat()
    again = place.build(*jobs)
    assert again.stages("web") == []
    assert again.stages("web", "hit") == ["assemble", "manifest"]
    assert again.stages("web", "not-needed") == ["resolve", "fetch", "fetch", "unpack", "unpack", "mkfs"]
    assert place.output("web").stat() == before
    assert again.image("web")["sha256"] == cold.image("web")["sha256"]


def test_libext2fs_is_loaded_once_for_all_workers(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.build("-j", "1")
    libext2fs._library.cache_clear()
    assert place.build("-j", "2").stages("web") == []
    assert libext2fs._library.cache_info().currsize == 0, "a build that makes no filesystem does not need it"
    shutil.rmtree(place.root / "build")
    assert place.build("-j", "2").stages("web") == ["assemble", "manifest"]
    assert libext2fs._library.cache_info().currsize == 0
    edit(place, "size_buffer_mb = 1", "size_buffer_mb = 2")
    loaded: list[int] = []
    monkeypatch.setattr(stages, "mkfs", lambda *_: loaded.append(1))
    place.fledge("build", "-j", "2")
    assert loaded == [], "it ran in a worker"
    assert libext2fs._library.cache_info().misses == 1, "this process has it, for that and all further workers"


def test_one_layer_twice_is_one_task(place: Place) -> None:
    place.layout("web").write(BASE, MORE, BASE)
    result = place.build()
    assert result.stages("web") == ALL
    assert is_right(place, result)


def test_an_image_without_layers(place: Place) -> None:
    place.layout("web").write()
    result = place.build()
    assert result.stages("web") == ["resolve", *LAST]
    assert is_right(place, result)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_another_compression_is_the_same_image(built: Place, compression: Compression) -> None:
    before = sha256_of(built.output("web"))
    built.layout("web").write(BASE, MORE, compression=compression)
    result = built.build()
    assert result.stages("web") == ["resolve", "manifest"]  # the manifest names the image's digest
    assert sha256_of(built.output("web")) == before


# --- one thing changes ----------------------------------------------------------------------------


def test_a_mapped_file(built: Place) -> None:
    before = sha256_of(built.output("web"))
    (built.root / "web" / "conf").write_text("two\n")
    result = built.build()
    assert result.stages("web") == LAST
    assert is_right(built, result)
    assert result.image("web")["sha256"] != before
    (built.root / "web" / "conf").write_text("one\n")  # and back: its filesystem is still there
    back = built.build()
    assert back.stages("web") == ["assemble", "manifest"]
    assert back.image("web")["sha256"] == before


def test_the_mode_of_a_mapped_file(built: Place) -> None:
    (built.root / "web" / "conf").chmod(0o755)
    assert built.build().stages("web") == LAST
    (built.root / "web" / "conf").chmod(0o750)  # still executable, and no longer readable by all
    assert built.build().stages("web") == LAST


def test_the_times_of_a_mapped_file(built: Place) -> None:
    os.utime(built.root / "web" / "conf", (5, 5))
    assert built.build().stages("web") == []


def test_a_mapping_is_added_and_removed(built: Place) -> None:
    edit(built, '"conf" = "/srv/conf"', '"conf" = "/srv/conf"\n"more" = "/srv/more"')
    (built.root / "web" / "more").write_text("more")
    assert built.build().stages("web") == LAST
    edit(built, '\n"more" = "/srv/more"', "")
    assert built.build().stages("web") == ["assemble", "manifest"]


def test_the_size_of_the_buffer(built: Place) -> None:
    sizes = []
    for before, after in ((1, 20), (20, 23)):
        edit(built, f"size_buffer_mb = {before}\n", f"size_buffer_mb = {after}\n")
        result = built.build()
        assert result.stages("web") == LAST
        sizes.append(result.image("web")["bytes"])
    assert 2 << 20 <= sizes[1] - sizes[0] <= 4 << 20


def test_preallocate(built: Place) -> None:
    before = built.output("web").stat()
    edit(built, "size_buffer_mb = 1", "size_buffer_mb = 1\npreallocate = true")
    result = built.build()
    # The bytes are the same, and so is what the manifest says of them.
    assert result.stages("web") == ["assemble"]
    after = built.output("web").stat()
    assert after.st_size == before.st_size
    assert after.st_blocks * 512 >= after.st_size > before.st_blocks * 512


def test_the_manifest_table(built: Place) -> None:
    file = built.root / "web" / "fledge.toml"
    file.write_text(file.read_text() + '[manifest]\nlabels = { tier = "front" }\n')
    assert built.build().stages("web") == ["manifest"]
    assert '"tier": "front"' in built.output("web").with_name("manifest.json").read_text()


def test_one_more_layer(built: Place) -> None:
    layout = built.layout("web").write(BASE, MORE, THIRD)
    result = built.build()
    new = layout.diff_ids[-1]
    assert result.tasks("web") == [
        "resolve:web",
        layer_task("fetch", new),
        layer_task("unpack", new),
        *(f"{stage}:web" for stage in LAST),
    ]
    assert is_right(built, result)


def test_a_second_image_on_the_same_base(built: Place) -> None:
    layout = built.add_layout("api", BASE, THIRD)
    result = built.build()
    new = layout.diff_ids[-1]
    assert result.stages("web") == []
    assert result.tasks("api") == [
        "resolve:api",
        layer_task("fetch", new),
        layer_task("unpack", new),
        *(f"{stage}:api" for stage in LAST),
    ]


def test_two_images_of_one_layer_at_once(place: Place, jobs: tuple[str, str]) -> None:
    layout = place.add_layout("api", BASE, THIRD)
    result = place.build(*jobs)
    shared = [layer_task(stage, layout.diff_ids[0]) for stage in ("fetch", "unpack")]
    for name in ("web", "api"):
        assert result.stages(name) == ALL
        assert set(shared) <= set(result.tasks(name))
        assert is_right(place, result, name)
    objects = place.root / "cache" / "objects"
    payloads = [path for path in objects.rglob("payload") if path.with_name("index").exists()]
    assert len(payloads) == 3 + 2  # layers, and a customization of each image
    assert list(objects.rglob("blob")) == []  # dropped once unpacked


def test_one_image_of_several(built: Place) -> None:
    built.add_layout("api", BASE, THIRD)
    result = built.build("api")
    assert [image["name"] for image in result.summary["images"]] == ["api"]
    assert not built.output("web").with_name("nothing").exists()
    assert built.build().stages("api") == []


def test_the_local_source_becomes_another_image(built: Place) -> None:
    before = built.root.joinpath("fledge.lock").read_bytes()
    built.layout("web").write(BASE, MORE, config={"Cmd": ["/bin/other"]})
    result = built.build()
    assert result.stages("web") == ["resolve", *LAST]
    assert built.root.joinpath("fledge.lock").read_bytes() != before
    assert '"/bin/other"' in built.output("web").with_name("manifest.json").read_text()


@pytest.mark.parametrize("epoch", ["0", "1500000000"])
def test_source_date_epoch(built: Place, epoch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sha256_of(built.output("web"))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    result = built.build()
    assert result.stages("web") == LAST
    assert result.image("web")["sha256"] != before
    monkeypatch.setenv("SOURCE_DATE_EPOCH", str(CREATED_SECONDS))  # what it is by itself
    assert built.build().image("web")["sha256"] == before


# --- the files that were made are changed by others -------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, 5000)


def boot(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1024 + 0x34)  # the superblock's mount count
        file.write(b"\x01")


def replace_it(path: Path) -> None:
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


@pytest.mark.parametrize("change", [Path.unlink, Path.touch, truncate, boot, replace_it])
def test_the_image_file(built: Place, change: Callable[[Path], object]) -> None:
    before = sha256_of(built.output("web"))
    change(built.output("web"))
    result = built.build()
    assert result.stages("web") == ["assemble"]  # what the manifest says is true again
    assert sha256_of(built.output("web")) == before
    assert is_right(built, result)


@pytest.mark.parametrize("change", [Path.unlink, Path.touch, truncate])
def test_the_manifest_file(built: Place, change: Callable[[Path], object]) -> None:
    manifest = built.output("web").with_name("manifest.json")
    before = manifest.read_bytes()
    change(manifest)
    assert built.build().stages("web") == ["manifest"]
    assert manifest.read_bytes() == before


def test_all_of_the_build_folder(built: Place) -> None:
    before = sha256_of(built.output("web"))
    shutil.rmtree(built.root / "build")
    assert built.build().stages("web") == ["assemble", "manifest"]
    assert sha256_of(built.output("web")) == before


# --- the cache is damaged, lost or moved --------------------------------------------------------------


def entries(place: Place, file: str) -> list[Path]:
    return sorted((place.root / "cache" / "objects").rglob(file))


def flip(path: Path) -> None:
    status = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_damage_is_not_looked_for_while_the_output_is_good(built: Place) -> None:
    for path in entries(built, "payload"):
        flip(path)
    assert built.build().stages("web") == []


@pytest.mark.parametrize("number", [0, 1])
def test_a_payload_rots(built: Place, number: int, jobs: tuple[str, str]) -> None:
    before = sha256_of(built.output("web"))
    diff_id = diff_ids(built)[number]
    entry = Store(built.root / "cache").find(Unpack(diff_id=diff_id).key())
    assert entry is not None
    flip(entry.file("payload"))
    built.output("web").unlink()
    result = built.build(*jobs)
    assert result.tasks("web") == [layer_task("fetch", diff_id), layer_task("unpack", diff_id), "assemble:web"]
    assert sha256_of(built.output("web")) == before


def diff_ids(place: Place) -> list[str]:
    """Return the diff IDs of the layers of `web`."""
    [locked] = LockFile(place.root / "fledge.lock").read().images.values()
    return [layer.diff_id for layer in locked.image.layers]


@pytest.mark.parametrize("file", ["skeleton", "map"])
def test_a_filesystem_rots(built: Place, file: str) -> None:
    before = sha256_of(built.output("web"))
    [path] = entries(built, file)
    flip(path)
    built.output("web").unlink()
    assert built.build().stages("web") == ["mkfs", "assemble"]
    assert sha256_of(built.output("web")) == before


def test_the_customization_rots(built: Place) -> None:
    before = sha256_of(built.output("web"))
    for path in entries(built, "payload"):
        if b"one\n" in path.read_bytes():
            flip(path)
    built.output("web").unlink()
    result = built.build()
    assert result.stages("web") == ["assemble"]
    assert "mkfs" in result.stages("web", "hit")  # it ran for the customization; its own entry was good
    assert sha256_of(built.output("web")) == before


def test_the_config_is_lost(built: Place) -> None:
    [path] = entries(built, "data")
    shutil.rmtree(path.parent)
    assert built.build().stages("web") == []
    (built.root / "web" / "conf").write_text("two\n")
    assert built.build().stages("web") == ["resolve", *LAST]
    shutil.rmtree(path.parent)
    built.output("web").with_name("manifest.json").unlink()
    assert built.build().stages("web") == ["resolve", "manifest"]


def test_the_index_is_lost(built: Place) -> None:
    shutil.rmtree(built.root / "cache" / "index")
    assert built.build().stages("web") == []
    shutil.rmtree(built.root / "cache" / "index")
    built.output("web").unlink()
    assert built.build().stages("web") == ["assemble"]


def test_everything_but_the_objects_is_lost(built: Place) -> None:
    for name in ("index", "locks", "tmp"):
        shutil.rmtree(built.root / "cache" / name)
    (built.root / "cache" / "CACHEDIR.TAG").unlink()
    built.output("web").unlink()
    assert built.build().stages("web") == ["assemble"]


def test_all_of_the_cache_is_lost(built: Place) -> None:
    before = sha256_of(built.output("web"))
    shutil.rmtree(built.root / "cache")
    assert built.build().stages("web") == []
    built.output("web").unlink()
    result = built.build()
    assert result.stages("web") == [*ALL[:-1]]
    assert sha256_of(built.output("web")) == before


def test_a_restored_cache_is_all_that_is_needed(
    built: Place, tmp_path: Path, jobs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CI does: the cache at another place, copied with new times; no outputs, no source, no network."""
    before = sha256_of(built.output("web"))
    shutil.copytree(built.root / "cache", tmp_path / "restored", copy_function=shutil.copyfile)
    for gone in ("cache", "build", "layouts"):
        shutil.rmtree(built.root / gone)
    monkeypatch.setenv("FLEDGE_CACHE_DIR", str(tmp_path / "restored"))
    result = built.build(*jobs, "--locked", "--offline")
    assert result.stages("web") == ["assemble", "manifest"]
    assert result.image("web")["sha256"] == before
    assert not (built.root / "cache").exists()


def test_a_moved_workspace(built: Place, tmp_path: Path) -> None:
    before = sha256_of(built.output("web"))
    built.root.rename(tmp_path / "moved")
    moved = Place(tmp_path / "moved", tmp_path)
    assert moved.build().stages("web") == ["manifest"]  # it names the image by its path
    assert sha256_of(moved.output("web")) == before


# --- the lock file ------------------------------------------------------------------------------------


def test_the_lock_file_is_deleted(built: Place) -> None:
    before = (built.root / "fledge.lock").read_bytes()
    (built.root / "fledge.lock").unlink()
    assert built.build().stages("web") == ["resolve"]
    assert (built.root / "fledge.lock").read_bytes() == before


def test_locked_with_a_lock_that_fits(built: Place) -> None:
    assert built.build("--locked").stages("web") == []


def refused(place: Place, *messages: str) -> None:
    """`fledge build --locked` must fail, and leave the lock file as it is."""
    file = place.root / "fledge.lock"
    before = file.read_bytes() if file.exists() else None
    result = place.fledge("build", "--locked")
    assert result.code == 2
    for message in messages:
        assert message in result.stderr
    assert (file.read_bytes() if file.exists() else None) == before


def test_locked_with_a_lock_that_lies(built: Place) -> None:
    """The config that it names is in no cache, so the source is asked, which knows better."""
    file = built.root / "fledge.lock"
    lock = json.loads(file.read_bytes())
    [entry] = lock["images"].values()
    entry["image"]["config"] = f"sha256:{'1' * 64}"
    file.write_text(json.dumps(lock))
    shutil.rmtree(built.root / "cache")
    refused(built, "web linux/amd64 is not what the image itself says", "hint: fledge.lock was edited by hand")
    assert built.fledge("lock").code == 0
    assert built.build("--locked").code == 0


@pytest.mark.parametrize("layers", [slice(None, None, -1), slice(0, 1), slice(0, 0)])
def test_a_lock_with_other_layers_than_the_image(built: Place, layers: slice) -> None:
    file = built.root / "fledge.lock"
    lock = json.loads(file.read_bytes())
    [entry] = lock["images"].values()
    assert len(entry["image"]["layers"]) == 2
    entry["image"]["layers"] = entry["image"]["layers"][layers]
    file.write_text(json.dumps(lock))
    before = sha256_of(built.output("web"))
    refused(built, "the layers of oci:layouts/web linux/amd64 are not those of its config", "hint: if it was edited")
    assert sha256_of(built.output("web")) == before
    assert built.fledge("lock", "--update").code == 0
    assert built.build("--locked").stages("web") == []


def test_locked_without_an_entry(place: Place) -> None:
    refused(place, "web: oci:layouts/web linux/amd64 is not in fledge.lock", "hint: run `fledge lock` without --locked")
    assert not (place.root / "build").exists()


def test_locked_with_a_stale_entry(built: Place) -> None:
    built.layout("web").write(BASE, THIRD)
    refused(built, "web: oci:../layouts/web is another image than fledge.lock says")


def test_a_platform_has_its_own_entry(built: Place) -> None:
    edit(built, 'web"\n', 'web"\nplatform = "linux/arm64"\n')
    refused(built, "oci:layouts/web linux/arm64 is not in fledge.lock")


def test_workers_need_not_import_the_stages() -> None:
    """All that tasks import late is in what is imported before the first worker is forked."""
    late = {
        alias.name if node.module == "fledge_tasks" else str(node.module).rpartition(".")[2]
        for function in ast.walk(ast.parse(inspect.getsource(tasks)))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"resolve", "stages", "results"} <= late
    code = f"import importlib, sys\nfor name in {tasks._BUILDERS}: importlib.import_module(name)\nprint(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {f"fledge_tasks.{name}" for name in late} <= set(found)


def test_the_largest_layer_comes_first(place: Place) -> None:
    """Its fetch brings all blobs, so that the others are unpacked before it ends, also where layers get known late."""
    content = (b"", os.urandom(9_000), os.urandom(10_000), os.urandom(99))
    layout = place.add_layout("api", *([Member("f", data)] for data in content))
    expected = [layer_task("unpack", layout.diff_ids[number]) for number in (2, 1, 3, 0)]
    found = workspace.load(place.root)
    planner = Planner(found, Store(found.cache))
    [image] = found.select(["api"])

    def graph() -> dict[str, Task]:
        return {task.name: task for task in tasks.Graph(planner).tasks([image])}

    late = graph()["_layers:api"]
    place.build("api")
    assert [task.task_dep for task in late.loader.creator() if task.name == "_layers:api"] == [expected]
    assert graph()["mkfs:api"].setup_tasks == ["resolve:api", *expected]
    planner.store.close()
