"""Why a build runs what it runs: hits, misses, and the values that changed."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from fledge_tasks.digest import sha256_bytes, short
from tests.layers import Member, folder
from tests.layouts import Place
from tests.tools import need

BASE = [folder("bin"), Member("bin/app", b"\x7fELF", mode=0o755)]
MORE = [Member("more", b"more")]
LAST = [Member("last", b"last")]


@pytest.fixture
def place(tmp_path: Any) -> Place:
    """A workspace with one image `web` that is built."""
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", BASE, MORE, mappings={"conf": "/srv/conf", "tree": "/srv/tree"})
    (place.root / "web" / "conf").write_text("one\n")
    (place.root / "web" / "tree").mkdir()
    (place.root / "web" / "tree" / "a").write_text("a\n")
    place.build()
    return place


def edit(place: Place, old: str, new: str) -> None:
    file = place.root / "web" / "fledge.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def explained(place: Place) -> dict[str, dict[str, Any]]:
    result = place.fledge("explain", "--json")
    assert (result.code, result.stderr) == (0, "")
    [image] = json.loads(result.stdout)["images"]
    return {stage["task"]: stage for stage in image["stages"]}


def misses(place: Place) -> list[str]:
    return [task for task, stage in explained(place).items() if stage["status"] == "miss"]


def changes(place: Place, task: str) -> list[tuple[str, Any, Any]]:
    found = explained(place)[task]
    assert found["status"] == "miss"
    return [(change["what"], change["old"], change["new"]) for change in found["changes"]]


def test_all_hits(place: Place) -> None:
    found = explained(place)
    names = [short(diff_id) for diff_id in place.layout("web").write(BASE, MORE).diff_ids]
    layers = [f"{stage}:{name}" for name in names for stage in ("fetch", "unpack")]
    assert list(found) == ["resolve:web", *layers, "mkfs:web", "assemble:web", "manifest:web"]
    assert {stage["status"] for stage in found.values()} == {"hit"}
    assert {stage["reason"] for stage in found.values()} == {""}


def test_a_mapped_file(place: Place) -> None:
    (place.root / "web" / "conf").write_text("other\n")
    (place.root / "web" / "tree" / "b").write_text("b\n")
    (place.root / "web" / "tree" / "a").unlink()
    assert misses(place) == ["mkfs:web", "assemble:web", "manifest:web"]
    old, new, gone, added = (json.dumps(sha256_bytes(text)) for text in (b"one\n", b"other\n", b"a\n", b"b\n"))
    assert changes(place, "mkfs:web") == [
        ("/srv/conf digest", old, new),
        ("/srv/conf size", "4", "6"),
        *[(f"/srv/tree/a {what}", value, None) for what, value in
          (("digest", gone), ("kind", '"file"'), ("link", '""'), ("mode", "420"), ("size", "2"))],
        *[(f"/srv/tree/b {what}", None, value) for what, value in
          (("digest", added), ("kind", '"file"'), ("link", '""'), ("mode", "420"), ("size", "2"))],
    ]  # fmt: skip
    shown = place.fledge("explain", "web").stdout
    assert "  mkfs:web                 miss: what goes in has changed\n" in shown
    assert f"      /srv/conf size: 4 -> 6 ({place.root}/web/conf)\n" in shown
    assert "resolve:web              hit\n" in shown


@pytest.mark.parametrize(
    ("old", "new", "change", "origin"),
    [
        (
            "size_buffer_mb = 1",
            "size_buffer_mb = 2",
            ("filesystem.size_buffer_mb", "1", "2"),
            "[filesystem] size_buffer_mb",
        ),
        ('"/srv/conf"', '"/srv/conf2"', ("/srv/conf2 kind", None, '"file"'), "/web/conf"),
    ],
)
def test_a_setting(place: Place, old: str, new: str, change: tuple[str, Any, Any], origin: str) -> None:
    edit(place, old, new)
    assert change in changes(place, "mkfs:web")
    shown = place.fledge("explain").stdout
    [line] = [line for line in shown.splitlines() if line.startswith(f"      {change[0]}: ")]
    assert line.endswith(f"{origin})")


def test_preallocate_concerns_the_image_file_alone(place: Place) -> None:
    edit(place, "size_buffer_mb = 1", "size_buffer_mb = 1\npreallocate = true")
    assert misses(place) == ["assemble:web", "manifest:web"]
    assert changes(place, "assemble:web") == [("preallocate", "false", "true")]


def test_what_the_manifest_says(place: Place) -> None:
    edit(place, "[mappings]", '[manifest]\nversion = "2.0.0"\n[mappings]')
    assert misses(place) == ["manifest:web"]
    assert changes(place, "manifest:web") == [("manifest.version", None, '"2.0.0"')]


def test_each_key_of_the_manifest_is_a_value(place: Place) -> None:
    """However long the table is, the line shows what is different in it."""
    table = '[manifest]\nhealth_check = { endpoint = "/a" }\n[manifest.workload]\nentrypoint = ["/bin/app"]\n'
    labels = "".join(f'"label.{number}" = "{"x" * 40}"\n' for number in range(4))
    edit(place, "[mappings]", f"{table}[manifest.labels]\n{labels}[mappings]")
    place.build()
    edit(place, '"/a"', '"/b"')
    edit(place, '["/bin/app"]', '["/bin/app", "-v"]')
    edit(place, f'"label.2" = "{"x" * 40}"\n', "")
    assert changes(place, "manifest:web") == [
        ("manifest.health_check.endpoint", '"/a"', '"/b"'),
        ("manifest.labels.label.2", f'"{"x" * 40}"', None),
        ("manifest.workload.entrypoint", '["/bin/app"]', '["/bin/app", "-v"]'),
    ]
    shown = place.fledge("explain").stdout
    assert '      manifest.health_check.endpoint: "/a" -> "/b" ([manifest] health_check.endpoint)\n' in shown


def test_modes_are_shown_in_octal(place: Place) -> None:
    (place.root / "web" / "conf").chmod(0o755)
    assert changes(place, "mkfs:web") == [("/srv/conf mode", "420", "493")]
    assert f"      /srv/conf mode: 0644 -> 0755 ({place.root}/web/conf)\n" in place.fledge("explain").stdout


def test_times(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "5")
    assert ("epoch", "1704164645", "5") in changes(place, "mkfs:web")


def test_a_new_layer(place: Place) -> None:
    layout = place.layout("web").write(BASE, MORE, LAST)
    assert misses(place) == ["resolve:web"]
    place.fledge("lock")
    name = short(layout.diff_ids[2])
    assert misses(place) == [f"fetch:{name}", f"unpack:{name}", "mkfs:web", "assemble:web", "manifest:web"]
    size = layout.blob(2).stat().st_size
    assert explained(place)[f"fetch:{name}"]["reason"] == f"the layer is new to this image ({size} bytes to move)"
    assert ("layer", None, layout.diff_ids[2]) in changes(place, "mkfs:web")
    assert "config" in [what for what, _, _ in changes(place, "mkfs:web")]


def test_an_evicted_layer_is_missed_only_when_it_is_needed(place: Place) -> None:
    shutil.rmtree(place.root / "cache" / "objects")
    assert misses(place) == []
    statuses = {stage["status"] for task, stage in explained(place).items() if task.startswith(("resolve", "unpack"))}
    assert statuses == {"not-needed"}
    place.output("web").unlink()
    found = explained(place)
    assert misses(place)[0] == "resolve:web"
    reasons = {stage["reason"] for task, stage in found.items() if task.startswith("unpack")}
    assert reasons == {"the layer is not in the cache any more"}
    assert found["mkfs:web"]["reason"] == "the filesystem is not in the cache any more"
    assert found["assemble:web"]["reason"] == "rootfs.img is not there"


def test_without_an_index_no_earlier_build_is_known(place: Place) -> None:
    shutil.rmtree(place.root / "cache" / "index")
    (place.root / "web" / "conf").write_text("other\n")
    found = explained(place)["mkfs:web"]
    assert found["reason"] == "no such filesystem in the cache, and no earlier build is known"
    assert found["changes"] == []


def test_why_in_one_line(place: Place) -> None:
    (place.root / "web" / "conf").write_text("two\n")
    lines = place.fledge("build").stderr.splitlines()
    assert lines[0].startswith("web: /srv/conf digest: sha256:")
    assert lines[0].endswith(f"({place.root}/web/conf)")
    (place.root / "web" / "conf").write_text("three\n")
    assert place.fledge("build").stderr.splitlines()[0].endswith(" and 1 more")
    place.output("web").unlink()
    assert place.fledge("build").stderr.splitlines()[0] == "web: rootfs.img is not there"


def test_plan_for_machines(place: Place) -> None:
    assert json.loads(place.fledge("plan", "--json").stdout) == {"images": [{"name": "web", "tasks": []}]}
    edit(place, "size_buffer_mb = 1", "size_buffer_mb = 2")
    [image] = json.loads(place.fledge("plan", "--json").stdout)["images"]
    assert [task["task"] for task in image["tasks"]] == ["mkfs:web", "assemble:web", "manifest:web"]
    assert image["tasks"][0]["changes"] == [
        {"what": "filesystem.size_buffer_mb", "old": "1", "new": "2", "origin": "[filesystem] size_buffer_mb"}
    ]
