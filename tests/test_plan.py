"""Plans: all keys known before anything is fetched, from the lock file and local files alone."""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fledge_tasks import workspace
from fledge_tasks.errors import (
    ConfigError,
    FilesystemError,
    FledgeError,
    ImageNotFoundError,
    InputError,
    LockError,
    MappingError,
)
from fledge_tasks.oci import reference, source
from fledge_tasks.oci.reference import Reference
from fledge_tasks.plan import ImagePlan, source_date_epoch
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from fledge_tasks.tools import MKE2FS, Tool
from tests.layers import Member, folder
from tests.layouts import CREATED_SECONDS, Place
from tests.tools import need, take_rights

BASE = [folder("bin"), Member("bin/app", b"\x7fELF", mode=0o755)]
MORE = [Member("more", b"more")]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace with one image `web` that is locked and not built."""
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, MORE, mappings={"conf": "/srv/conf"})
    (place.root / "web" / "conf").write_text("one\n")
    assert place.fledge("lock").code == 0
    return place


def planner(place: Place, *, locked: bool = False, offline: bool = False) -> Planner:
    found = workspace.load(place.root)
    return Planner(found, Store(found.cache), locked=locked, offline=offline)


def plan(place: Place, name: str = "web") -> ImagePlan:
    made = planner(place)
    [image] = made.workspace.select([name])
    found = made.plan(image)
    assert found is not None
    return found


def edit(place: Place, old: str, new: str) -> None:
    file = place.root / "web" / "fledge.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def test_what_a_plan_holds(place: Place) -> None:
    made = plan(place)
    layout = place.layout("web").write(BASE, MORE)
    assert tuple(layer.ref.diff_id for layer in made.layers) == layout.diff_ids
    assert tuple(layer.blob.digest for layer in made.layers) == layout.blobs
    assert made.mkfs.layers == (*(layer.unpack.key() for layer in made.layers), made.customize.key())
    assert made.assemble.filesystem == made.mkfs.key()
    assert made.customize.epoch == made.mkfs.epoch == CREATED_SECONDS
    assert [file.destination for file in made.customize.mapped] == ["/srv/conf"]
    assert made.sources == {"/srv/conf": place.root / "web" / "conf"}
    assert (made.agent, made.agent_path, made.customize.agent) == (None, None, None)
    assert uuid.UUID(made.mkfs.uuid).version == 4
    [tool] = made.mkfs.tools
    assert tool.startswith("e2fsprogs 1.")
    manifest = made.manifest("sha256:x")
    assert (manifest.checksum, manifest.image) == ("sha256:x", "oci:../layouts/web")


def test_the_most_generous_limits_hold_for_all_layers(place: Place) -> None:
    usual = planner(place).limits
    assert usual == (64 << 30, 5_000_000, 200)
    place.add_layout("wide", BASE, more="[limits]\nlayer_mb = 100000\nentries = 3\n")
    place.add_layout("narrow", BASE, more="[limits]\nlayer_mb = 1\nratio = 1\n")
    assert planner(place).limits == (100_000 << 20, 5_000_000, 200)
    assert place.fledge("lock").code == 0
    before = plan(place)
    edit(place, "[mappings]", "[limits]\nratio = 1\n[mappings]")
    assert plan(place).mkfs == before.mkfs, "limits are in no key"


def test_no_path_of_the_host_is_in_a_key(place: Place, tmp_path: Path) -> None:
    made = plan(place)
    for record in (made.config, made.customize, made.mkfs, made.assemble, *(layer.unpack for layer in made.layers)):
        assert str(tmp_path) not in record.text()
    assert str(tmp_path) in made.manifest("sha256:x").text()  # as its content does


def test_the_uuid_follows_the_content_and_not_the_tools(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    before = plan(place)
    monkeypatch.setattr("fledge_tasks.tools.Tool.version", lambda *_: "9.99")
    newer = plan(place)
    assert newer.mkfs.uuid == before.mkfs.uuid
    assert newer.mkfs.key() != before.mkfs.key()
    (place.root / "web" / "conf").write_text("two\n")
    assert plan(place).mkfs.uuid != before.mkfs.uuid


def test_images_of_equal_content_share_everything_but_the_manifest(place: Place) -> None:
    place.add("twin", "oci:../layouts/web", buffer_mb=1, mappings={"file": "/srv/conf"})
    (place.root / "twin" / "file").write_text("one\n")
    one, other = plan(place), plan(place, "twin")
    assert one.assemble.key() == other.assemble.key()
    assert one.manifest("sha256:x").key() != other.manifest("sha256:x").key()


def test_a_plan_is_made_once_for_one_state_of_the_lock(place: Place) -> None:
    made = planner(place)
    [image] = made.workspace.images
    first = made.plan(image)
    assert made.plan(image) is first
    content = json.loads(made.lock.path.read_bytes())
    content["images"]["oci:layouts/web linux/amd64"]["created"] = 5
    made.lock.path.write_text(json.dumps(content))
    changed = made.plan(image)
    assert changed is not None and first is not None
    assert (changed.customize.epoch, first.customize.epoch) == (5, CREATED_SECONDS)


def test_what_does_not_change_is_asked_once_in_a_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.add_layout("api", BASE)
    place.build()
    asked: list[Tool] = []
    version = Tool.version
    reference.parse.cache_clear()
    monkeypatch.setattr(Tool, "version", lambda self, index: asked.append(self) or version(self, index))  # type: ignore[func-returns-value]
    result = place.build()
    names = [image["name"] for image in result.summary["images"]]
    assert len(names) > 1 and all(result.stages(name) == [] for name in names)
    assert reference.parse.cache_info().misses == len(names)
    assert asked == [MKE2FS]


def test_a_local_source_is_looked_at_once_in_a_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Reference] = []
    real = source.identity

    def recording(reference: Reference, **options: Any) -> str | None:
        seen.append(reference)
        return real(reference, **options)

    monkeypatch.setattr(source, "identity", recording)
    made = planner(place)
    [image] = made.workspace.images
    for _ in range(3):
        assert made.unresolved(image) is None
    assert len(seen) == 1
    made.forget(image)
    assert made.unresolved(image) is None
    assert len(seen) == 2


def test_why_an_image_is_not_resolved(place: Place) -> None:
    def why() -> str | None:
        made = planner(place)
        [image] = made.workspace.images
        reason = made.unresolved(image)
        assert (made.plan(image) is None) == (reason is not None)
        return reason

    assert why() is None
    with_agent = '[agent]\nsource_strategy = "http"\nurl = "http://127.0.0.1:1/k"\n'
    edit(place, "[mappings]", f"{with_agent}[mappings]")
    assert why() == "agent:http://127.0.0.1:1/k is not in fledge.lock"
    content = json.loads((place.root / "fledge.lock").read_bytes())
    content["agents"] = {"agent:http://127.0.0.1:1/k": {"digest": "sha256:" + "1" * 64}}
    (place.root / "fledge.lock").write_text(json.dumps(content))
    assert why() is None
    checksum = "2" * 64
    edit(place, 'k"\n', f'k"\nchecksum = "{checksum}"\n')
    assert why() == "agent.checksum is no longer the one in fledge.lock"
    edit(place, with_agent + f'checksum = "{checksum}"\n', "")
    place.layout("web").write(BASE)
    assert why() == "oci:../layouts/web is another image than fledge.lock says"
    (place.root / "fledge.lock").unlink()
    assert why() == "oci:layouts/web linux/amd64 is not in fledge.lock"


def test_a_source_that_went_away(place: Place) -> None:
    (place.root / "layouts").rename(place.root / "elsewhere")
    for options in ({"locked": True}, {"offline": True}):
        made = planner(place, **options)
        assert made.plan(made.workspace.images[0]) is not None  # the lock file decides
    made = planner(place)
    for _ in range(2):
        with pytest.raises(ImageNotFoundError, match="there is nothing at"):
            made.plan(made.workspace.images[0])


def test_lock_names_are_the_same_from_everywhere(place: Place) -> None:
    place.add("deep/er", "oci:../../layouts/web")
    place.add("far", f"oci:{place.root}/layouts/web")
    made = planner(place)
    assert {made.lock_name(image) for image in made.workspace.images} == {"oci:layouts/web linux/amd64"}


# --- check ---------------------------------------------------------------------------------------------


def check(place: Place, *, locked: bool = False) -> FledgeError:
    made = planner(place, locked=locked)
    with pytest.raises(FledgeError) as caught:
        made.check(made.workspace.images)
    return caught.value


def test_nothing_is_wrong(place: Place) -> None:
    made = planner(place, locked=True)
    made.check(made.workspace.images)


def test_one_problem_is_raised_as_it_is(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mkfs.xfs")
    edit(place, "[filesystem]", '[agent]\nsource_strategy = "local"\npath = "gone"\n[filesystem]')
    error = check(place)
    assert (type(error), error.where) == (
        InputError,
        f"{place.root}/web/fledge.toml: agent.path: {place.root}/web/gone",
    )
    edit(place, '[agent]\nsource_strategy = "local"\npath = "gone"\n', "")
    (place.root / "web" / "conf").unlink()
    assert type(check(place)) is MappingError
    (place.root / "web" / "conf").write_text("")
    edit(place, '"ext4"', '"xfs"')
    take_rights(monkeypatch)
    error = check(place)
    assert (type(error), error.exit_code) == (FilesystemError, 1)


def test_several_problems_come_together(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    take_rights(monkeypatch)
    edit(place, "[filesystem]", '[agent]\nsource_strategy = "local"\npath = "gone"\n[filesystem]')
    (place.root / "web" / "conf").unlink()
    place.add("api", "oci:../layouts/web", mappings={"gone": "/gone"})
    xfs = place.add("db", "oci:../layouts/web") / "fledge.toml"
    xfs.write_text(xfs.read_text().replace("ext4", "xfs"))
    error = check(place)
    assert error.exit_code == 2
    for text in (
        'web/fledge.toml: mappings."conf"', "web/fledge.toml: agent.path", "api/gone does not exist",
        "db/fledge.toml: filesystem.type: xfs",
    ):  # fmt: skip
        assert text in str(error)


def test_all_that_the_lock_misses_comes_together(place: Place) -> None:
    place.layout("web").write(BASE)
    place.add("api", "docker://localhost:1/api")
    error = check(place, locked=True)
    assert type(error) is LockError
    assert error.message.splitlines() == [
        "api: docker://localhost:1/api:latest linux/amd64 is not in fledge.lock",
        "web: oci:../layouts/web is another image than fledge.lock says",
    ]


def test_what_is_made_already_need_not_be_possible(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mkfs.btrfs")
    edit(place, '"ext4"', '"btrfs"')
    take_rights(monkeypatch)
    assert "btrfs images can only be made by root" in str(check(place))
    found = planner(place)
    made = found.plan(found.workspace.images[0])
    assert made is not None and made.mkfs.tools[0].startswith("btrfs-progs ")
    with found.store.building(made.mkfs.key()), found.store.staging(made.mkfs.key()) as folder_:
        (folder_ / "map").write_bytes(b"map")
        found.store.publish(made.mkfs.text(), "mkfs", folder_)
    found.store.close()
    again = planner(place)
    again.check(again.workspace.images)


def test_a_type_whose_program_is_gone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(place, 'type = "ext4"\nsize_buffer_mb = 1\n', 'type = "squashfs"\n')
    monkeypatch.setattr("fledge_tasks.tools.environment", lambda: {"PATH": "/nothing"})
    error = check(place)
    assert type(error) is FilesystemError
    assert str(error).startswith(f"{place.root}/web/fledge.toml: filesystem.type: squashfs images need tar2sqfs, or ")


def test_a_local_agent_that_is_missing(place: Place) -> None:
    edit(place, "[mappings]", '[agent]\nsource_strategy = "local"\npath = "kestrel"\n[mappings]')
    found = planner(place)
    with pytest.raises(InputError, match=r"kestrel: cannot be read") as caught:
        found.check(found.workspace.images)
    assert str(caught.value.where).startswith(f"{place.root}/web/fledge.toml: agent.path: ")
    assert place.fledge("build").code == 2


@pytest.mark.parametrize("source", [".", "..", "../build", "../cache/../cache"])
def test_what_builds_write_to_is_not_mapped(place: Place, source: str) -> None:
    edit(place, '"conf" = "/srv/conf"', f'"conf" = "/srv/conf"\n"{source}" = "/srv/all"')
    if source == ".":
        (place.root / "fledge.toml").write_text((place.root / "web" / "fledge.toml").read_text())
        (place.root / "conf").write_text("one\n")
        shutil.rmtree(place.root / "web")
    result = place.fledge("build")
    assert result.code == 2
    assert f"mappings.{source}: maps a folder that holds {place.root}/" in result.stderr
    assert "map what is in it one by one" in result.stderr


def test_configuration_is_checked_before(place: Place) -> None:
    edit(place, '"ext4"', '"ext5"')
    with pytest.raises(ConfigError):
        planner(place)


# --- times ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"), [("", None), ("0", 0), ("1700000000", 1_700_000_000), ("4294967295", 2**32 - 1)]
)
def test_source_date_epoch(text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    assert source_date_epoch() == expected


@pytest.mark.parametrize("text", ["-1", "1.5", "now", "4294967296", " 1", "1_000", "٣", "²", "9" * 5000])
def test_a_source_date_epoch_that_is_wrong(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(InputError, match="expected seconds since 1970"):
        source_date_epoch()


@pytest.mark.parametrize(
    ("created", "epoch"),
    [
        ("2024-01-02T03:04:05Z", CREATED_SECONDS),
        ("2024-01-02T03:04:05.999999999Z", CREATED_SECONDS),
        ("2024-01-02T05:04:05+02:00", CREATED_SECONDS),
        ("0001-01-01T00:00:00Z", 0),
        ("1969-12-31T23:59:59Z", 0),
        ("2400-01-01T00:00:00Z", 2**32 - 1),
        ("2024-13-45T99:00:00Z", 0),
        ("yesterday", 0),
        ("", 0),
    ],
)
def test_the_time_of_an_image(place: Place, created: str, epoch: int) -> None:
    place.layout("web").write(BASE, created=created)
    assert place.fledge("lock").code == 0
    assert plan(place).customize.epoch == epoch


def test_records_are_plain_values(place: Place) -> None:
    made = plan(place)
    for record in (made.customize, made.mkfs, made.assemble):
        assert msgspec.convert(msgspec.to_builtins(record), type(record)) == record
