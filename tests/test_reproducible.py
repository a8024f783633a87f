"""Same inputs, same bytes: the golden image, and what may be different about a build without any effect on it."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fledge_tasks import workspace
from fledge_tasks.plan import ImagePlan
from fledge_tasks.planner import Planner
from fledge_tasks.store import Store
from tests import golden, test_dodo
from tests.layers import digest
from tests.layouts import CREATED_SECONDS
from tests.tools import PATH, need
from tests.trees import debugfs
from tests.variations import EVERYTHING, MKE2FS_CONF, SOURCES, SURROUNDINGS, Ground, Variation, clock, ground, wrappers
from tests.workspaces import sha256_of

MEANT = """
If that is meant to be: raise FORMAT of the stage's record in fledge_tasks/keys.py, say so in a line 'Cache format'
in CHANGELOG.md, and write the new values here. If not, it breaks the promise of the same bytes for the same inputs.
"""
GOLDEN_DIFF_IDS = [
    "sha256:47d42cf91e87f2c11127c18a6f7671680d1423c3e35e5152c7d8518652f26109",
    "sha256:84f624f357bfb332cd03b4879f87d4b7fe697c6b2f3b7616e9cd13b361fa4acd",
    "sha256:bcc411c246a06859c46312c0c5b38baeb70b51d40b294125c04b48ed68729a5a",
]
GOLDEN_IMAGE = "sha256:d336d7c5a3c1045953ee5e62eb626d87c48914012d7e6a5f4f8e804e4a1e809e"
GOLDEN_MANIFEST = "sha256:2a33f275bfdb134544533600118dbad533cf3f4e0110b5fdaa23f180e8aae99a"
GOLDEN_KEYS = {
    "config": "sha256:5103fd404d4038221e4ca063d4b810c7aecab0346b1c31142d7cfb3fd4ffe9ba",
    "customize": "sha256:b5dedcc0206bf7291b5a5a3f56413e5dc4ddf7d9a2c659a9906ba1b55cea6bdd",
    "mkfs": "sha256:a01c3f266d159a6daa89ffeb91831162678042b34afe266b9d125a2b5002294c",
    "assemble": "sha256:ed40b80ca6458096b1b3044ebf4171faf65ded7736d24418369237f2ff9db874",
    "blob 0": "sha256:ec94e1d04a96ff7376d21c01f0261e87ae1ed8e3f4311968e0b351e4082969a1",
    "unpack 0": "sha256:cbc83404e9c3e8a457e1ec319b7539dd7628f0fa6935b7eb435530ca36c026f7",
    "blob 1": "sha256:35abba0de290813f7e5b8ea1ec4e868c964d39e92e1165379abe0887d798decf",
    "unpack 1": "sha256:f35d3eca579ce09a1c74f64896f196b237e1616d69767ed8300ca638dc48c8ab",
    "blob 2": "sha256:c7588ac1af48aafea8b06e9689513e93ae4b03e724c1ad1011f5fd6fc22b53f5",
    "unpack 2": "sha256:1a40ec15e4d7b5c7918e6c551b08de0b2af4c3bb79b2e0305285fb579755b984",
}


@dataclass(frozen=True)
class Outcome:
    """What is the same for all builds: checksum of the image, keys of what it was made from, and the manifest."""

    image: str
    keys: dict[str, list[str]]
    manifest: str


def outcome(place: Ground) -> Outcome:
    """Build, and return what came of it."""
    report = place.build().image(golden.NAME)
    assert sha256_of(place.workspace.output(golden.NAME)) == report["sha256"]
    keys: dict[str, list[str]] = {"unpack": [], "mkfs": [], "assemble": []}
    for stage in report["stages"]:
        if stage["stage"] in keys:
            keys[stage["stage"]].append(stage["key"])
    keys["unpack"].sort()
    manifest, path = Path(report["manifest"]).read_text(), json.dumps(report["image"])
    assert path in manifest
    return Outcome(report["sha256"], keys, manifest.replace(path, '"/w/rootfs.img"'))


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    need("mke2fs")
    return outcome(ground(tmp_path_factory.mktemp("baseline")))


def apply(variations: Sequence[Variation], place: Ground) -> None:
    for vary in variations:
        vary(place)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_do_not_matter(name: str, tmp_path: Path, baseline: Outcome) -> None:
    need("faketime")
    place = ground(tmp_path)
    apply(SURROUNDINGS[name], place)
    assert outcome(place) == baseline


@pytest.mark.parametrize("name", SOURCES)
def test_where_it_comes_from_does_not_matter(name: str, tmp_path: Path, baseline: Outcome) -> None:
    need("skopeo")
    place = ground(tmp_path)
    apply(SOURCES[name], place)
    found = outcome(place)
    assert (found.image, found.keys) == (baseline.image, baseline.keys)  # the manifest names where


def test_the_folder_does_not_matter(tmp_path: Path, baseline: Outcome) -> None:
    deep = tmp_path / "a longer path" / "größer: 'quoted'" / ("x" * 100)
    assert outcome(ground(deep, "work space")) == baseline


def test_all_of_it_at_once(tmp_path: Path, baseline: Outcome) -> None:
    need("faketime")
    place = ground(tmp_path / "elsewhere", "other")
    apply([*EVERYTHING, clock("+12345d")], place)
    found = outcome(place)
    assert (found.image, found.keys) == (baseline.image, baseline.keys)
    years = set((place.folder / "programs" / "years").read_text().split())
    assert years and min(map(int, years)) > datetime.now(UTC).year + 30, "mke2fs did run with that clock"


# --- that the variations are some -------------------------------------------------------------------------------


def plain_mke2fs(folder: Path, program: str = "mke2fs", **env: str) -> bytes:
    """Return the superblock that mke2fs writes if it is told no times and no features."""
    image = folder / "plain.img"
    image.unlink(missing_ok=True)
    subprocess.run(
        [program, "-q", "-F", "-t", "ext4", image, "8M"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={"PATH": PATH, **env},
    )
    return image.read_bytes()[1024:2048]


def test_the_clock_is_one_that_mke2fs_believes(tmp_path: Path) -> None:
    need("faketime", "mke2fs")
    program = wrappers(tmp_path, "+4000d") / "mke2fs"
    made = [struct.unpack_from("<I", plain_mke2fs(tmp_path, each), 0x108)[0] for each in ("mke2fs", str(program))]
    assert abs(made[1] - made[0] - 4000 * 86_400) < 600


def test_the_configuration_is_one_that_mke2fs_follows(tmp_path: Path) -> None:
    need("mke2fs")
    (tmp_path / "mke2fs.conf").write_text(MKE2FS_CONF)
    usual = plain_mke2fs(tmp_path)
    other = plain_mke2fs(tmp_path, MKE2FS_CONFIG=str(tmp_path / "mke2fs.conf"))
    for at in (0x58, 0x5C, 0xFC):  # s_inode_size, s_feature_compat, s_def_hash_version
        assert usual[at : at + 2] != other[at : at + 2]


# --- golden values --------------------------------------------------------------------------------------------------


def plan(place: Ground) -> ImagePlan:
    found = workspace.load(place.workspace.root)
    made = Planner(found, Store(found.cache)).plan(found.images[0])
    assert made is not None
    return made


def test_the_golden_layers() -> None:
    assert [digest(tar) for tar in golden.TARS] == GOLDEN_DIFF_IDS, (
        "tests/golden.py or Python's tarfile makes other layers than before: all golden values change with them"
    )


def test_the_golden_image(baseline: Outcome) -> None:
    assert baseline.image == GOLDEN_IMAGE, f"the golden image has other bytes than before.{MEANT}"


def test_the_golden_manifest(baseline: Outcome) -> None:
    assert digest(baseline.manifest.encode()) == GOLDEN_MANIFEST, (
        f"the golden image's manifest is another one than before:\n{baseline.manifest}{MEANT}"
    )


def test_the_golden_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ground(tmp_path)
    assert place.workspace.fledge("lock").code == 0
    monkeypatch.setattr("fledge_tasks.tools.Tool.version", lambda *_: "1.47.0")
    made = plan(place)
    records = [made.config, made.customize, made.mkfs, made.assemble]
    keys = {record.stage(): record.key() for record in records}
    for number, layer in enumerate(made.layers):
        keys |= {f"blob {number}": layer.blob.key(), f"unpack {number}": layer.unpack.key()}
    assert keys == GOLDEN_KEYS, f"stages have other keys than before, so no cache of before is used any more.{MEANT}"


# --- SOURCE_DATE_EPOCH ----------------------------------------------------------------------------------------------

EPOCH = 1_234_567_890


@pytest.fixture(scope="module")
def dated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ground, Outcome]:
    need("mke2fs")
    place = ground(tmp_path_factory.mktemp("dated"))
    place.env(SOURCE_DATE_EPOCH=str(EPOCH))
    return place, outcome(place)


def mtimes(image: Path, *paths: str) -> list[int]:
    listed = debugfs(image, [f"stat {path}".encode() for path in paths])
    return [int(text.partition(" mtime: 0x")[2][:8], 16) for text in listed]


def test_an_epoch_dates_what_has_no_time_of_its_own(dated: tuple[Ground, Outcome], baseline: Outcome) -> None:
    need("debugfs")
    place, found = dated
    assert found.image != baseline.image
    assert found.keys["unpack"] == baseline.keys["unpack"], "layers have their own times"
    image = place.workspace.output(golden.NAME)
    superblock = image.read_bytes()[1024:2048]
    assert [struct.unpack_from("<I", superblock, at)[0] for at in (0x30, 0x40, 0x108)] == [EPOCH] * 3
    customized = ["/etc/main.conf", "/usr/local/bin/deep", "/bin/kestrel", "/etc/fsify-entrypoint"]
    without_entry = ["/no/entry/for", "/dev", "/lost+found"]
    assert mtimes(image, *customized, *without_entry) == [EPOCH] * 7
    assert mtimes(image, "/bin/app", "/", "/etc/release") == [1_600_000_000, 1_500_000_000, 1_700_000_000]


def test_equal_epochs_make_equal_bytes(tmp_path: Path, dated: tuple[Ground, Outcome], baseline: Outcome) -> None:
    need("faketime")
    place = ground(tmp_path)
    place.env(SOURCE_DATE_EPOCH=str(EPOCH))
    apply(SURROUNDINGS["years ahead"], place)
    assert outcome(place) == dated[1]
    place.env(SOURCE_DATE_EPOCH=str(CREATED_SECONDS))
    assert outcome(place) == baseline, "the image's own time is the default"


def test_the_first_epoch(tmp_path: Path) -> None:
    need("faketime")
    here, there = ground(tmp_path / "here"), ground(tmp_path / "there")
    apply(SURROUNDINGS["years ahead"], there)
    for place in (here, there):
        place.env(SOURCE_DATE_EPOCH="0")
    assert outcome(here) == outcome(there), "e2fsprogs takes 0 for no time at all"


@pytest.mark.parametrize("epoch", ["yesterday", "-1", "4294967296"])
def test_a_wrong_epoch_is_wrong_input(tmp_path: Path, epoch: str) -> None:
    place = ground(tmp_path)
    place.env(SOURCE_DATE_EPOCH=epoch)
    for command in ("build", "plan"):
        result = place.workspace.fledge(command)
        assert result.code == 2
        assert f"variable SOURCE_DATE_EPOCH: found '{epoch}', expected seconds" in result.stderr
    assert not (place.workspace.root / "build").exists()


@test_dodo.pytestmark
def test_bare_doit_honours_it_too(tmp_path: Path, dated: tuple[Ground, Outcome]) -> None:
    place = ground(tmp_path)
    (place.workspace.root / "dodo.py").write_text("from fledge_tasks.dodo import *\n")
    place.env(SOURCE_DATE_EPOCH=str(EPOCH))
    test_dodo.doit(place.workspace)
    assert sha256_of(place.workspace.output(golden.NAME)) == dated[1].image
