"""Keys: whatever a record holds changes its key, and the text behind a key can be read."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import keys
from fledge_tasks.digest import is_digest, sha256_bytes
from fledge_tasks.filesystem_settings import Filesystem
from fledge_tasks.keys import Agent, Assemble, Blob, Config, Content, Customize, Manifest, Mkfs, Stage, Unpack, Verity
from fledge_tasks.mappings import MappedFile

CUSTOMIZE = Customize(
    config="sha256:c",
    agent=None,
    mapped=(MappedFile("/srv/a", "file", 0o644, "sha256:a", 3), MappedFile("/srv/b", "symlink", 0o777, link="a")),
    epoch=1704164645,
)
FILESYSTEM = Filesystem("ext4", size_buffer_mb=100, features=("verity",))
RECORDS: list[Stage] = [
    Config(digest="sha256:c"),
    Agent(digest="sha256:g"),
    Blob(digest="sha256:b", size=10),
    Unpack(diff_id="sha256:d"),
    CUSTOMIZE,
    Content(diff_ids=("sha256:d",), customization=CUSTOMIZE, filesystem=FILESYSTEM),
    Mkfs(
        layers=("sha256:1", "sha256:2"),
        filesystem=FILESYSTEM,
        epoch=1,
        uuid="11111111-1111-4111-8111-111111111111",
        tools=("e2fsprogs 1.47.0",),
    ),
    Assemble(
        filesystem="sha256:m", preallocate=False, format="qcow2", compression="zstd", tools=("qemu-utils 7.2.22",)
    ),
    Verity(
        checksum="sha256:w", salt="0a", uuid="22222222-2222-5222-8222-222222222222", tools=("cryptsetup-bin 2.6.1",)
    ),
    Manifest(
        user="{}",
        name="web",
        image="docker.io/library/nginx:alpine",
        image_digest="sha256:i",
        config="sha256:c",
        filesystem="ext4",
        rootfs="/w/build/web/rootfs.qcow2",
        format="qcow2",
        checksum="sha256:r",
        labels={"fledge.raw_checksum": "sha256:w"},
    ),
]
GOLDEN = {
    "config": ["digest = \"sha256:c\""],
    "agent": ["digest = \"sha256:g\""],
    "blob": ["digest = \"sha256:b\"", "size = 10"],
    "unpack": ["diff_id = \"sha256:d\""],
    "customize": [
        "agent = null",
        "config = \"sha256:c\"",
        "epoch = 1704164645",
        "mapped[0].destination = \"/srv/a\"",
        "mapped[0].digest = \"sha256:a\"",
        "mapped[0].kind = \"file\"",
        "mapped[0].link = \"\"",
        "mapped[0].mode = 420",
        "mapped[0].size = 3",
        "mapped[1].destination = \"/srv/b\"",
        "mapped[1].digest = \"\"",
        "mapped[1].kind = \"symlink\"",
        "mapped[1].link = \"a\"",
        "mapped[1].mode = 511",
        "mapped[1].size = 0",
    ],
    "mkfs": [
        "epoch = 1",
        "filesystem.features[0] = \"verity\"",
        "filesystem.size_buffer_mb = 100",
        "filesystem.type = \"ext4\"",
        "layers[0] = \"sha256:1\"",
        "layers[1] = \"sha256:2\"",
        "tools[0] = \"e2fsprogs 1.47.0\"",
        "uuid = \"11111111-1111-4111-8111-111111111111\"",
    ],
    "assemble": [
        "compression = \"zstd\"",
        "filesystem = \"sha256:m\"",
        "format = \"qcow2\"",
        "preallocate = false",
        "tools[0] = \"qemu-utils 7.2.22\"",
    ],
    "verity": [
        "checksum = \"sha256:w\"",
        "salt = \"0a\"",
        "tools[0] = \"cryptsetup-bin 2.6.1\"",
        "uuid = \"22222222-2222-5222-8222-222222222222\"",
    ],
    "manifest": [
        "checksum = \"sha256:r\"",
        "config = \"sha256:c\"",
        "filesystem = \"ext4\"",
        "format = \"qcow2\"",
        "image = \"docker.io/library/nginx:alpine\"",
        "image_digest = \"sha256:i\"",
        "labels.fledge.raw_checksum = \"sha256:w\"",
        "name = \"web\"",
        "rootfs = \"/w/build/web/rootfs.qcow2\"",
        "user = \"{}\"",
    ],
}  # fmt: skip
"""The texts of RECORDS. A change here is a change of every user's keys: say so in the changelog."""


def ids(record: Stage) -> str:
    return record.stage()


def test_every_record_is_tested() -> None:
    assert [type(record) for record in RECORDS] == Stage.__subclasses__()


@pytest.mark.parametrize("stage", GOLDEN)
def test_golden_texts(stage: str) -> None:
    [record] = [record for record in RECORDS if record.stage() == stage]
    expected = f"fledge-tasks {stage} 1\n" + "".join(f"{line}\n" for line in GOLDEN[stage])
    assert record.text() == expected
    assert record.key() == sha256_bytes(expected.encode())
    assert is_digest(record.key())


def others(value: Any, kind: Any) -> Iterator[Any]:
    """Yield values of the type `kind` that differ from `value` in one place."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        yield from (choice for choice in typing.get_args(kind) if choice != value)
    elif origin in (types.UnionType, typing.Union):
        samples: dict[object, object] = {str: "other", int: 7}
        for choice in typing.get_args(kind):
            if typing.get_origin(choice) is Literal:
                yield from others(value, choice)
            elif choice is not type(value):
                yield samples.get(choice)
    elif origin is dict:
        yield from ({}, {**value, "other": "x"}, {name: below + "x" for name, below in value.items()})
    elif kind is bool:
        yield not value
    elif kind is int:
        yield value + 1
    elif kind is str:
        yield from (value + "x", value + "\n", "")
    elif origin is tuple:
        item = typing.get_args(kind)[0]
        yield from (value[1:], value + value[:1])
        if len(value) > 1:
            yield value[::-1]
        for number, each in enumerate(value):
            yield from ((*value[:number], other, *value[number + 1 :]) for other in others(each, item))
    elif isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield from changed(value)
    else:
        raise AssertionError(f"no way to change a value of type {kind}")


def changed(record: msgspec.Struct) -> Iterator[msgspec.Struct]:
    """Yield records that differ from `record` in one place, for every place in it, however deep."""
    for field in msgspec.structs.fields(record):
        value = getattr(record, field.name)
        seen = [other for other in others(value, field.type) if other != value]
        assert seen, f"{field.name} of {record} was not changed"
        yield from (msgspec.structs.replace(record, **{field.name: other}) for other in seen)


@pytest.mark.parametrize("record", RECORDS, ids=ids)
def test_every_field_is_in_the_key(record: Stage) -> None:
    texts = [record.text(), *(typing.cast(Stage, other).text() for other in changed(record))]
    assert len(texts) > len(msgspec.structs.fields(record))
    assert len(set(texts)) == len(texts)


def test_a_key_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    record = msgspec.structs.replace(CUSTOMIZE)
    expected = sha256_bytes(record.text().encode())
    asked: list[Stage] = []
    text = Stage.text
    monkeypatch.setattr(Stage, "text", lambda self: asked.append(self) or text(self))  # type: ignore[func-returns-value]
    assert record.key() == record.key() == expected
    assert len(asked) == 1
    other = msgspec.structs.replace(record, epoch=5)
    assert other.key() != expected, "a changed copy has its own"
    assert record == CUSTOMIZE


def test_stage_and_format_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Config(digest="x").key() != Agent(digest="x").key()
    before = Config(digest="x").key()
    monkeypatch.setattr(Config, "FORMAT", 2)
    assert Config(digest="x").text().startswith("fledge-tasks config 2\n")
    assert Config(digest="x").key() != before


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda below: st.lists(below) | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), below),
    max_leaves=10,
)


def canonical(value: object) -> object:
    """Return a value that is equal for what a key must not tell apart: nothing but the order of names."""
    if isinstance(value, dict):
        return ("dict", tuple((name, canonical(below)) for name, below in sorted(value.items())))
    if isinstance(value, list):
        return ("list", tuple(map(canonical, value)))
    return (type(value).__name__, value)


@given(NESTED, NESTED)
def test_distinct_values_have_distinct_texts(one: object, other: object) -> None:
    texts = ["".join(keys._lines("field", value)) for value in (one, other)]
    assert (texts[0] == texts[1]) == (canonical(one) == canonical(other))


@given(NESTED)
def test_a_value_can_be_read_back_line_by_line(value: object) -> None:
    text = "".join(keys._lines("field", value))
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith("field")
        assert " = " in line
        assert line.isascii()


MAPPED = st.builds(
    MappedFile, st.text(), st.sampled_from(["file", "directory", "symlink"]), st.integers(), st.text(), st.integers()
)
CUSTOMIZED = st.builds(
    Customize,
    config=st.text(),
    agent=st.none() | st.text(),
    mapped=st.lists(MAPPED, max_size=3).map(tuple),
    epoch=st.integers(),
)


@given(CUSTOMIZED, CUSTOMIZED)
def test_distinct_records_have_distinct_texts(one: Customize, other: Customize) -> None:
    assert (one.text() == other.text()) == (one == other)
