"""JSON Schemas: they say what the checker does, and take what Volant's own take of an image with a root filesystem."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, ValidationError, validators

from fledge_tasks import config, manifest
from fledge_tasks.schema import document
from fledge_tasks.shapes import (
    Anything,
    Array,
    Conflict,
    Holds,
    Shape,
    Table,
    TableOf,
    Value,
    Variants,
    integer,
    matching,
    one_of,
    text,
)
from tests.layouts import Place
from tests.test_manifest import NGINX, rendered
from tests.workspaces import REPOSITORY

VOLANT = REPOSITORY.parent / "shared" / "schemas"


def ecma_pattern(_: object, pattern: str, instance: object, __: object) -> Iterator[ValidationError]:
    """Search as ECMA-262 does: `$` is not before a newline."""
    if isinstance(instance, str) and re.search(pattern.replace("$", r"\Z"), instance) is None:
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


Validator = validators.extend(Draft7Validator, {"pattern": ecma_pattern})  # type: ignore[no-untyped-call]


def validator(shape: Shape) -> Any:
    schema = json.loads(json.dumps(document(shape, "a title")))
    Draft7Validator.check_schema(schema)
    return Validator(schema)


# --- what the schema accepts, the checker accepts, and the other way round ---------------------------

STRINGS = st.text(max_size=6) | st.sampled_from(
    ["", " ", "\n", "\x1c", "a", "a\n", "web", "/", "/x", "/x/", "//x", "/..", "/../x", "/x/..\n", "/..x", "/a\0", "A=",
     "http://h", "https://h/x", "http://h\n", "http:///x", "http://ä", "ftp://h", "sha256:" + "aB" * 32, "0" * 63,
     "linux/amd64", "linux/arm/v7", "nginx:alpine", "a b", "A\0", "raw", "1.0", "1"]
)  # fmt: skip
# JSON Schema takes 1.0 for an integer, and the checker does not.
FLOATS = st.floats().filter(lambda number: not number.is_integer())
OTHER: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | FLOATS | st.builds(list) | st.builds(dict) | STRINGS | st.integers(-2, 2)
)


def right(shape: Shape) -> st.SearchStrategy[Any]:
    """Return documents that are nearly always right; numbers are about their limits."""
    match shape:
        case Value():
            return values(shape)
        case Array():
            rest = st.lists(right(shape.item), max_size=2)
            if shape.first is None:
                return rest
            return st.builds(lambda first, others: [first, *others], values(shape.first), rest)
        case TableOf():
            return st.dictionaries(values(shape.key or text()), right(shape.item), max_size=2)
        case Table():
            fields = {key: right(each) for key, each in shape.fields.items()}
            needed = {key: fields.pop(key) for key in shape.required}
            return st.fixed_dictionaries(needed, optional=fields)
        case Variants():
            return st.one_of(*(right(table) for table in shape.by_choice.values()))
        case Anything():
            return OTHER


def values(value: Value) -> st.SearchStrategy[Any]:
    if value.choices:
        return st.sampled_from(value.choices)
    if value.kind is int:
        edges = [edge for edge in (value.minimum, value.maximum) if edge is not None]
        return st.sampled_from([number for edge in edges for number in (edge, edge, edge - 1, edge + 1)])
    if value.kind is bool:
        return st.booleans()
    return STRINGS if value.pattern is None else st.from_regex(value.pattern.replace("$", r"\Z"))


@st.composite
def documents(draw: st.DrawFn, shape: Shape) -> Any:
    """Return documents in which up to two parts are something else, there is something more, or something is gone."""
    top = {"": draw(right(shape))}
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        place, key = draw(st.sampled_from(list(places(top))))
        match draw(st.sampled_from(["other", "more", "less"])):
            case "less" if key != "":
                del place[key]
            case "more" if isinstance(place[key], dict):
                place[key][draw(STRINGS)] = draw(OTHER)
            case _:
                place[key] = draw(OTHER)
    return top[""]


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Yield everything in a document as its table or array, and its place there."""
    for key, below in part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ():
        yield part, key
        yield from places(below)


def agree(shape: Shape, schema: Any, found: object) -> bool:
    is_valid: bool = schema.is_valid(found)
    is_right = list(shape.findings("", found)) == []
    if json.dumps(found, ensure_ascii=False).isascii():
        assert is_valid == is_right
    else:  # labels that no pattern can tell apart
        assert is_right or not is_valid
    return is_valid


def several(count: int) -> settings:
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)


@pytest.mark.parametrize("shape", [config.FLEDGE, manifest.MANIFEST, manifest.FINISHED])
def test_documents(shape: Shape) -> None:
    schema, outcomes = validator(shape), set[bool]()

    @several(120)
    @given(documents(shape))
    def check(found: object) -> None:
        outcomes.add(agree(shape, schema, found))

    check()
    assert outcomes == {True, False}, "what is right and what is wrong was both tried"


@pytest.mark.parametrize(
    "shape",
    [
        config.FLEDGE.fields["agent"],
        config.FLEDGE.fields["filesystem"],
        config.FLEDGE.fields["mappings"],
        manifest.FINISHED.fields["workload"],
        manifest.FINISHED.fields["cloud_init"],
        manifest.FINISHED.fields["network"],
        matching("a+|b", "as or b"),
        integer(-1, 1),
        Value(bool, "true", choices=(True,)),
        Array(one_of("a", "b"), first=one_of("a")),
        Array(one_of("a", "b"), distinct=True),
        Table({"a": Array(one_of("a", "b"))}, conflicts=[Conflict("x", {"a": Holds("a")}, {"a": Holds("b")})]),
        TableOf(integer(0), matching("[a-z]", "a letter")),
        Table({"a": text(), "b": text()}, conflicts=[Conflict("both", {"a": text(), "b": text()})]),
        Table({"a": text(), "b": text()}, conflicts=[Conflict("alone", {"a": text()}, {"b": one_of("c")})]),
        Variants("kind", {"a": Table({"x": text()}, required=("x",)), "b": Table({"y": integer(1)})}),
    ],
)
def test_parts(shape: Shape) -> None:
    """Some keys are rare in whole documents."""
    schema, outcomes = validator(shape), set[bool]()

    @several(100)
    @given(documents(shape))
    def check(found: object) -> None:
        outcomes.add(agree(shape, schema, found))

    check()
    assert outcomes == {True, False}


def test_a_label_beyond_ascii_is_right_and_not_in_the_schema() -> None:
    """Its length is one of bytes."""
    document = {"type": "xfs", "label": "é" * 6}
    assert list(config.FLEDGE.fields["filesystem"].findings("", document)) == []
    assert not validator(config.FLEDGE.fields["filesystem"]).is_valid(document)


def test_an_integer_is_one_in_toml_and_may_be_a_float_in_json_schema() -> None:
    assert validator(integer(0)).is_valid(1.0)
    assert list(integer(0).findings("x", 1.0)) == [
        ("x", "found float 1.0, expected an integer from 0 to 2147483647", None)
    ]


def patterns(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, below in schema.items():
            if key == "pattern" and isinstance(below, str):
                yield below
            yield from patterns(below)
    elif isinstance(schema, list):
        for below in schema:
            yield from patterns(below)


@pytest.mark.parametrize("shape", [config.FLEDGE, manifest.FINISHED])
def test_patterns_mean_the_same_everywhere(shape: Shape) -> None:
    """RE2, which validators in Go and Rust use, has no look-around; `$` in a class would be taken for the end by us."""
    found = set(patterns(document(shape, "")))
    assert len(found) > 3
    for pattern in found:
        assert not re.search(r"\(\?(?!:)|\\[pPuZAbB]|\\[0-9]", pattern), pattern
        assert not re.search(r"\[[^]]*\$|\$.*[^)]*\[", pattern), pattern


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [((), manifest.FINISHED), (("manifest",), manifest.FINISHED), (("fledge",), config.FLEDGE)],
)
def test_command(tmp_path: Path, arguments: tuple[str, ...], shape: Table) -> None:
    result = Place(tmp_path, tmp_path).fledge("schema", *arguments)
    assert (result.code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    assert list(schema["properties"]) == list(shape.fields)
    assert schema["required"] == list(shape.required)


def test_command_for_what_there_is_no_schema_of(tmp_path: Path) -> None:
    result = Place(tmp_path, tmp_path).fledge("schema", "lock")
    assert result.code == 2
    assert "'lock' is not one of 'manifest', 'fledge'" in result.stderr


# --- Volant's own schemas ------------------------------------------------------------------------------

beside_volant = pytest.mark.skipif(not VOLANT.is_dir(), reason="Volant's schemas are not beside this checkout")

LEFT_OUT: dict[str, set[str]] = {
    "plugin-manifest-v1.json": {"initramfs"},  # a manifest has this or a root filesystem, and ours have the latter
    # Keys of the strategy that we do not build, and one that we have a default for.
    "fledge-toml-v1.json": {
        "strategy=initramfs", "init", "source.busybox_url", "source.busybox_sha256", "filesystem!size_buffer_mb",
    },
}  # fmt: skip


def volant(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((VOLANT / name).read_text())
    return schema


def below(schema: dict[str, Any], root: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the schemas of what is in a table or array, by key; `*` stands for any key, `[]` for any item."""
    found: dict[str, Any] = {}
    for rule in schema.get("allOf", []):
        found |= rule.get("then", {}).get("properties", {})
    found |= schema.get("properties", {})
    items = schema.get("additionalItems", schema.get("items"))
    found |= {"[]": items} if isinstance(items, dict) else {}
    others = schema.get("additionalProperties")
    found |= {"*": others} if isinstance(others, dict) else {}
    for key, each in found.items():
        if isinstance(each, dict) and "$ref" in each:
            found[key] = root["definitions"][each["$ref"].rpartition("/")[2]]
    return {key: each for key, each in found.items() if isinstance(each, dict)}


def compare(theirs: dict[str, Any], ours: dict[str, Any], path: str, left_out: set[str], root: dict[str, Any]) -> int:
    """Assert that ours has every key of theirs, requires what they require, and takes their words; count the keys."""
    words = theirs.get("enum", [theirs["const"]] if "const" in theirs else [])
    for word in words:
        if f"{path}={word}" not in left_out:
            assert Validator(ours).is_valid(word), f"{path}={word}"
    count = 0
    their_parts, our_parts = below(theirs, root), below(ours, root)
    names = {key: f"{path}.{key}".lstrip(".") for key in their_parts}
    for key, part in their_parts.items():
        if names[key] not in left_out:
            assert key in our_parts, names[key]
            count += 1 + compare(part, our_parts[key], names[key], left_out, root)
    needed = {key for key in theirs.get("required", ()) if f"{path}!{key}" not in left_out}
    assert needed <= set(ours.get("required", ())), path
    return count


@beside_volant
@pytest.mark.parametrize(
    ("name", "shape", "least"),
    [("plugin-manifest-v1.json", manifest.FINISHED, 60), ("fledge-toml-v1.json", config.FLEDGE, 15)],
)
def test_everything_in_volants_schema_is_in_ours(name: str, shape: Shape, least: int) -> None:
    theirs = volant(name)
    assert compare(theirs, document(shape, ""), "", LEFT_OUT[name], theirs) >= least


@beside_volant
def test_the_draft_is_that_of_volants_manifest() -> None:
    assert volant("plugin-manifest-v1.json")["$schema"] == document(manifest.FINISHED, "")["$schema"]


@beside_volant
def test_what_we_write_is_valid_for_volant() -> None:
    """Whatever the user says and the checker lets pass; but who sets an older word for the format gets it."""
    schema = Draft7Validator(volant("plugin-manifest-v1.json"))
    written = 0

    @several(150)
    @given(right(manifest.MANIFEST))
    def check(user: dict[str, Any]) -> None:
        nonlocal written
        user.get("rootfs", {}).pop("checksum", None)  # any other than the image's is a mistake
        if not manifest.check(user) and user.get("rootfs", {}).get("format") in {None, "raw", "qcow2"}:
            written += 1
            assert list(schema.iter_errors(rendered(user, NGINX))) == []

    check()
    assert written > 10


SAMPLE: dict[str, Any] = {
    "version": "1",
    "strategy": "oci_rootfs",
    "source": {"image": "nginx:alpine"},
    "filesystem": {"type": "ext4", "size_buffer_mb": 100, "preallocate": False},
    "mappings": {"./a": "/etc/a"},
}


@beside_volant
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mappings": {}},
        {"filesystem": {"type": "btrfs", "size_buffer_mb": 0}},
        {"version": "2"},
        {"version": 1},
        {"strategy": "oci"},
        {"source": {}},
        {"source": {"image": ""}},
        {"filesystem": {"type": "ext3", "size_buffer_mb": 0}},
        {"filesystem": {"type": "ext4", "size_buffer_mb": -1}},
        {"filesystem": {"type": "ext4", "size_buffer_mb": 1.5}},
        {"filesystem": {"type": "ext4", "size_buffer_mb": 1, "preallocate": "no"}},
        {"mappings": {"a": "etc/a"}},
        {"mappings": {"a": "/../a"}},
        {"mappings": {"a": 1}},
        {"surplus": 1},
    ],
)
def test_volants_schema_and_ours_agree_about_fledge_toml(change: dict[str, Any]) -> None:
    changed = {**SAMPLE, **change}
    theirs = validators.validator_for(volant("fledge-toml-v1.json"))(volant("fledge-toml-v1.json"))
    assert theirs.is_valid(changed) == validator(config.FLEDGE).is_valid(changed)
