"""fledge.lock: what is written is read, reviewed and merged by people."""

from __future__ import annotations

import difflib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks.digest import sha256_bytes
from fledge_tasks.errors import LockError
from fledge_tasks.lock import Content, LockedAgent, LockedImage, LockFile
from fledge_tasks.oci.manifest import Image, LayerRef
from tests.tools import need

DIGESTS = st.binary(max_size=2).map(sha256_bytes)
LAYERS = st.builds(LayerRef, DIGESTS, DIGESTS, st.integers(0, 2**50), st.text(max_size=5))
IMAGES = st.builds(
    LockedImage,
    st.builds(Image, st.text(max_size=5), DIGESTS, DIGESTS, st.text(max_size=5), st.lists(LAYERS).map(tuple)),
    st.text(max_size=5),
    st.integers(0, 2**32),
)


def digest(text: str) -> str:
    return sha256_bytes(text.encode())


def locked(name: str) -> LockedImage:
    layers = tuple(LayerRef(digest(f"{name}{n}"), digest(f"{name}{n}z"), n, "tar") for n in range(2))
    return LockedImage(Image("docker", digest(name), digest(f"{name}c"), "linux/amd64", layers), digest(name), 7)


@pytest.fixture
def file(tmp_path: Path) -> LockFile:
    return LockFile(tmp_path / "fledge.lock")


def test_no_file_is_an_empty_one(file: LockFile) -> None:
    assert file.read() == Content()
    assert not file.path.exists()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.dictionaries(st.text(max_size=5), IMAGES, max_size=3),
    agents=st.dictionaries(st.text(max_size=5), DIGESTS.map(LockedAgent), max_size=3),
)
def test_what_is_written_is_read(
    file: LockFile, images: dict[str, LockedImage], agents: dict[str, LockedAgent]
) -> None:
    file.path.unlink(missing_ok=True)
    file.read()
    file.update(images, agents)
    assert LockFile(file.path).read() == Content(1, images, agents)


def test_the_format(file: LockFile) -> None:
    file.update({"b": locked("b"), "a": locked("a")}, {"agent:x": LockedAgent(digest("x"))})
    text = file.path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert json.loads(text)["images"]["a"] == {
        "created": 7,
        "identity": digest("a"),
        "image": {
            "config": digest("ac"),
            "layers": [
                {"blob": digest("a0z"), "diff_id": digest("a0"), "media_type": "tar", "size": 0},
                {"blob": digest("a1z"), "diff_id": digest("a1"), "media_type": "tar", "size": 1},
            ],
            "manifest": digest("a"),
            "origin": "docker",
            "platform": "linux/amd64",
        },
    }
    assert json.loads(text)["version"] == 1


def test_a_new_entry_only_adds_lines(file: LockFile) -> None:
    file.update({"a": locked("a"), "c": locked("c")}, {})
    before = file.path.read_text().splitlines()
    file.update({"b": locked("b")}, {})
    changes = [line[0] for line in difflib.ndiff(before, file.path.read_text().splitlines())]
    assert "-" not in changes
    assert changes.count("+") > 10


def test_branches_that_lock_different_images_merge(file: LockFile, tmp_path: Path) -> None:
    need("git")
    versions = {}
    for name, images in {"base": "bm", "ours": "bm" + "a", "theirs": "bm" + "z"}.items():
        each = LockFile(tmp_path / name)
        each.update({image: locked(image) for image in images}, {})
        versions[name] = each.path
    merged = subprocess.run(
        ["git", "merge-file", "-p", versions["ours"], versions["base"], versions["theirs"]],
        capture_output=True,
        check=False,
    )
    assert merged.returncode == 0
    file.path.write_bytes(merged.stdout)
    assert set(file.read().images) == set("abmz")


def test_update_and_keep_only(file: LockFile) -> None:
    file.update({"a": locked("a"), "b": locked("b")}, {"x": LockedAgent(digest("x")), "y": LockedAgent(digest("y"))})
    file.update({"a": locked("new")}, {"y": LockedAgent(digest("new"))})
    assert file.read().images == {"a": locked("new"), "b": locked("b")}
    assert file.read().agents == {"x": LockedAgent(digest("x")), "y": LockedAgent(digest("new"))}
    file.keep_only({"b", "z"}, {"y"})
    assert LockFile(file.path).read() == Content(1, {"b": locked("b")}, {"y": LockedAgent(digest("new"))})


def test_nothing_new_writes_nothing(file: LockFile) -> None:
    file.update({}, {})
    assert not file.path.exists()
    file.update({"a": locked("a")}, {})
    before = file.path.stat()
    file.update({"a": locked("a")}, {})
    file.keep_only({"a"}, ())
    assert file.path.stat() == before


def test_a_change_by_somebody_else_is_seen_and_kept(file: LockFile) -> None:
    file.update({"a": locked("a")}, {})
    LockFile(file.path).update({"b": locked("b")}, {})
    assert set(file.read().images) == {"a", "b"}
    LockFile(file.path).update({"c": locked("c")}, {})
    file.update({"d": locked("d")}, {})
    assert set(LockFile(file.path).read().images) == {"a", "b", "c", "d"}
    file.path.unlink()
    assert file.read() == Content()


def merge_conflict(text: str) -> str:
    return "<<<<<<< ours\n" + text + "=======\n>>>>>>> theirs\n"


def without_layers(text: str) -> str:
    content = json.loads(text)
    del content["images"]["a"]["image"]["layers"]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "", "cannot be read: Input data was truncated"),
        (merge_conflict, "cannot be read: JSON is malformed"),
        (lambda _: "[]", "cannot be read: Expected `object`, got `array`"),
        (without_layers, "cannot be read: Object missing required field `layers`"),
        (lambda text: text.replace('"created"', '"made"'), "unknown field `made`"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "is of version 2, expected 1"),
        (lambda text: text.replace(digest("a0z"), "sha256:../../etc/passwd"), "found 'sha256:../../etc/passwd'"),
        (lambda text: text.replace('"linux/amd64"', '"\udcff"'), "cannot be read: 'utf-8' codec"),
        (lambda text: text.replace(digest("a"), "a"), "found 'a', expected 'sha256:' and 64"),
        (lambda text: text.replace(digest("x"), digest("x").upper()), "found 'SHA256:"),
    ],
)
def test_a_file_that_cannot_be_used(file: LockFile, change: object, message: str) -> None:
    file.update({"a": locked("a")}, {"x": LockedAgent(digest("x"))})
    text = change(file.path.read_text())  # type: ignore[operator]
    file.path.write_bytes(text.encode(errors="surrogateescape"))
    before = file.path.read_bytes()
    for use in (file.read, lambda: file.update({"b": locked("b")}, {})):
        with pytest.raises(LockError) as caught:
            use()
        assert message in str(caught.value)
        assert caught.value.where == str(file.path)
        assert caught.value.hint is not None and "fledge lock" in caught.value.hint
        assert caught.value.exit_code == 2
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_something_else_in_its_place(file: LockFile, make: Callable[[Path], None]) -> None:
    make(file.path)
    with pytest.raises(LockError, match="it is not a file"):  # a FIFO would be waited for
        file.read()


def test_a_link_to_itself_in_its_place(file: LockFile) -> None:
    file.path.symlink_to(file.path)
    with pytest.raises(LockError, match="Too many levels of symbolic links") as caught:
        file.read()
    assert caught.value.where == str(file.path)


def test_the_records_hold_what_is_documented() -> None:
    assert [field.name for field in msgspec.structs.fields(LockedImage)] == ["image", "identity", "created"]
