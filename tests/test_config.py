"""fledge.toml: good and bad files, and the exact problems of the bad ones."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fledge_tasks import config
from fledge_tasks.config import Agent, ImageConfig, Limits, Mapping, Output, Source
from fledge_tasks.errors import ConfigError
from fledge_tasks.filesystem_settings import Filesystem

MINIMAL = """
version = "1"
strategy = "oci_rootfs"
[source]
image = "nginx:alpine"
[filesystem]
type = "ext4" # ext4|xfs|btrfs
size_buffer_mb = 100 # extra free space on top of extracted rootfs
preallocate = false # use sparse file (dd) or preallocate (fallocate)
"""


@pytest.fixture(autouse=True)
def no_base_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(config.BASE_URL_VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "web").mkdir()
    return tmp_path / "web"


def load(folder: Path, content: str | bytes, manifest: str | None = None) -> ImageConfig:
    data = content.encode() if isinstance(content, str) else content
    (folder / "fledge.toml").write_bytes(data)
    if manifest is not None:
        (folder / "manifest.toml").write_text(manifest)
    return config.load(folder / "fledge.toml", "web/fledge.toml")


def problems(folder: Path, content: str | bytes, manifest: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(folder, content, manifest)
    return str(caught.value).splitlines()


def test_the_minimal_sample(folder: Path) -> None:
    assert load(folder, MINIMAL) == ImageConfig(
        file=folder / "fledge.toml",
        folder=folder,
        name="web",
        source=Source("nginx:alpine", "linux/amd64"),
        filesystem=Filesystem("ext4", 100),
        mappings=(),
        agent=None,
        manifest={},
    )


def test_the_sample_with_mappings_below_filesystem(folder: Path) -> None:
    content = """
version = "1"
strategy = "oci_rootfs"
[source]
image = "docker://nginx:1.25"
[filesystem]
type = "ext4" # ext4|xfs|btrfs
size_buffer_mb = 100 # extra free space beyond image size
preallocate = false # optionally preallocate file
# Optional file placements
mappings = { "./my.conf" = "/etc/my.conf" }
"""
    image = load(folder, content)
    assert image.source.image == "docker://nginx:1.25"
    assert image.mappings == (Mapping("./my.conf", "/etc/my.conf"),)


def test_every_key(folder: Path) -> None:
    content = """
version = "1"
strategy = "oci_rootfs"
[source]
image = "oci:my layouts/layout:tag"
platform = "linux/arm64/v8"
[filesystem]
type = "btrfs"
size_buffer_mb = 0
preallocate = false
[filesystem.mappings]
"two files" = "/usr/share/"
[mappings]
"one" = "/usr/share/"
"/abs/../x" = "//etc/x..y/."
[agent]
source_strategy = "http"
url = "https://example.org/kestrel"
checksum = "%s"
[manifest]
name = "Web.1_x-y"
labels = { a = "b" }
[limits]
layer_mb = 7
entries = 8
ratio = 9
[output]
format = "qcow2"
compression = "zstd"
verity = true
""" % ("AB" * 32)
    image = load(folder, content)
    assert image.name == "Web.1_x-y"
    assert image.source == Source("oci:my layouts/layout:tag", "linux/arm64/v8")
    assert (image.filesystem, image.preallocate) == (Filesystem("btrfs", 0), False)
    assert image.mappings == (
        Mapping("one", "/usr/share/"),
        Mapping("/abs/../x", "//etc/x..y/."),
        Mapping("two files", "/usr/share/"),
    )
    assert image.agent == Agent("http", url="https://example.org/kestrel", checksum="sha256:" + "ab" * 32)
    assert image.manifest == {"name": "Web.1_x-y", "labels": {"a": "b"}}
    assert image.limits == Limits(7, 8, 9)
    assert image.output == Output("qcow2", "zstd", True)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ('format = "qcow"', ['output.format: found string "qcow", expected the string "raw" or "qcow2"', "qcow2"]),
        ("format = 1", ['output.format: found integer 1, expected the string "raw" or "qcow2"']),
        (
            'format = "qcow2"\ncompression = "gzip"\nfmt = 1',
            [
                'output.compression: found string "gzip", expected the string "zlib" or "zstd"',
                "output.fmt: unknown key, allowed here: format, compression, verity", "format",
            ],
        ),
        ("verity = 1", ["output.verity: found integer 1, expected true or false"]),
        ('compression = "zstd"', ['output.compression: found with a raw disk, expected format = "qcow2" beside it']),
        (
            'format = "raw"\ncompression = "zlib"',
            ['output.compression: found with a raw disk, expected format = "qcow2" beside it'],
        ),
    ],
)  # fmt: skip
def test_bad_outputs(folder: Path, lines: str, expected: list[str]) -> None:
    found = problems(folder, f"{MINIMAL}[output]\n{lines}\n")
    assert found == [
        f"web/fledge.toml: {line}" if ":" in line else f'  hint: did you mean "{line}"?' for line in expected
    ]


def test_preallocated_qcow2_disks(folder: Path) -> None:
    content = MINIMAL.replace("preallocate = false", "preallocate = true") + '[output]\nformat = "qcow2"\n'
    assert problems(folder, content) == [
        'web/fledge.toml: filesystem.preallocate: found true with output.format = "qcow2", '
        "expected false: a qcow2 file holds what is used"
    ]
    assert load(folder, content.replace('"qcow2"', '"raw"')).preallocate
    assert problems(folder, "output = 1\n" + MINIMAL) == ["web/fledge.toml: output: found integer 1, expected a table"]


def test_records_are_frozen(folder: Path) -> None:
    image = load(folder, MINIMAL)
    with pytest.raises(AttributeError):
        image.name = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        image.source.image = "other"  # type: ignore[misc]


def test_manifest_file_beside(folder: Path) -> None:
    image = load(folder, MINIMAL, 'name = "shop"\n[resources]\nmemory_mb = 64\n')
    assert image.name == "shop"
    assert image.manifest == {"name": "shop", "resources": {"memory_mb": 64}}


def test_problems_of_both_files_in_one_error(folder: Path) -> None:
    unknown = (
        'unknown key, allowed with type "ext4": type, size_buffer_mb, size_mb, shrink, preallocate, label, uuid, '
        "block_size, inode_ratio, features, mappings"
    )
    assert problems(folder, MINIMAL + "x = 1\n", "[resources]\nmemory_mb = 0\n") == [
        f"web/fledge.toml: filesystem.x: {unknown}",
        "web/manifest.toml: resources.memory_mb: found integer 0, expected an integer from 1 to 2147483647",
    ]
    assert problems(folder, MINIMAL + "x = 1\n", "[") == [
        f"web/fledge.toml: filesystem.x: {unknown}",
        "web/manifest.toml: not valid TOML: Invalid initial character for a key part (at end of document)",
    ]


def test_two_manifests(folder: Path) -> None:
    assert problems(folder, MINIMAL + "[manifest]\n", "") == [
        "web/fledge.toml: manifest: found this table and web/manifest.toml, expected one of them"
    ]


def test_a_manifest_file_is_the_table_itself(folder: Path) -> None:
    first, hint = problems(folder, MINIMAL, '[manifest]\nname = "web"\n[manifest.resources]\nmemory_mb = 64\n')
    assert first.startswith("web/manifest.toml: manifest: unknown key, allowed here: ")
    assert hint.startswith("  hint: the file is that table: [manifest.workload] is [workload] here")


def test_a_bom_is_no_mistake(folder: Path) -> None:
    assert load(folder, b"\xef\xbb\xbf" + MINIMAL.encode()).name == "web"


def test_many_problems_at_once(folder: Path) -> None:
    content = """
version = 1
strategy = "initramfs"
[source]
imagee = "nginx"
platform = "windows/amd64"
[filesystem]
type = "etx4"
size_buffer_mb = -1
preallocate = 0
mappings = { my.conf = "/etc/my.conf", "./a" = "/etc//a" }
[mappings]
"" = "/x"
"./b" = "/etc/./a"
"./c" = "/etc/../c"
[agent]
source_strategy = "local"
version = "1.0"
[manifest]
name = ""
resources = { cpu_cores = 1.0 }
[filesytem]
"""
    mapping_hint = '  hint: a mapping is "path/on/host" = "/path/in/image", with quotes around both'
    assert problems(folder, content) == [
        'web/fledge.toml: version: found integer 1, expected the string "1"',
        'web/fledge.toml: strategy: found string "initramfs", expected the string "oci_rootfs"',
        '  hint: fledge-tasks builds "oci_rootfs" only',
        "web/fledge.toml: source.imagee: unknown key, allowed here: image, platform",
        '  hint: did you mean "image"?',
        'web/fledge.toml: source.platform: found string "windows/amd64", '
        'expected a platform such as "linux/amd64" or "linux/arm/v7"',
        'web/fledge.toml: source.image: missing, expected an image reference such as "nginx:alpine"',
        'web/fledge.toml: filesystem.type: found string "etx4", '
        'expected the string "ext4", "xfs", "btrfs", "squashfs" or "erofs"',
        '  hint: did you mean "ext4"?',
        "web/fledge.toml: filesystem.size_buffer_mb: found integer -1, expected an integer from 0 to 16777216",
        "web/fledge.toml: filesystem.preallocate: found integer 0, expected true or false",
        "web/fledge.toml: filesystem.mappings.my: found a table, expected an absolute path in the image, without '..'",
        mapping_hint,
        'web/fledge.toml: mappings: found the key "", expected a path',
        'web/fledge.toml: mappings."./c": found string "/etc/../c", '
        "expected an absolute path in the image, without '..'",
        mapping_hint,
        'web/fledge.toml: agent.version: unknown key, allowed with source_strategy "local": '
        "source_strategy, path, checksum",
        "web/fledge.toml: agent.path: missing, expected a path",
        "web/fledge.toml: manifest.name: found an empty string, expected a name of at most 128 "
        "of the characters A-Z a-z 0-9 . _ -, the first a letter or digit",
        "web/fledge.toml: manifest.resources.cpu_cores: found float 1.0, expected an integer from 1 to 2147483647",
        "web/fledge.toml: filesytem: unknown key, allowed here: "
        "version, strategy, source, filesystem, mappings, agent, manifest, limits, output",
        '  hint: did you mean "filesystem"?',
        'web/fledge.toml: filesystem.mappings."./a": found the destination "/etc//a", which mappings."./b" has already',
    ]


def test_an_empty_file(folder: Path) -> None:
    assert problems(folder, "") == [
        'web/fledge.toml: version: missing, expected the string "1"',
        'web/fledge.toml: strategy: missing, expected the string "oci_rootfs"',
        "web/fledge.toml: source: missing, expected a table",
        "web/fledge.toml: filesystem: missing, expected a table",
    ]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("100", "16777217", "filesystem.size_buffer_mb: found integer 16777217, expected an integer from 0 to"),
        ("100", "100.0", "filesystem.size_buffer_mb: found float 100.0, expected an integer"),
        ("100", "true", "filesystem.size_buffer_mb: found boolean true, expected an integer"),
        ("100", '"100"', 'filesystem.size_buffer_mb: found string "100", expected an integer'),
        ("100", "0x" + "f" * 5000, "filesystem.size_buffer_mb: found an integer beyond 64 bits, expected an integer"),
        ("100", "9" * 5000, "not valid TOML: Exceeds the limit"),
        ("100", "2020-01-01", "filesystem.size_buffer_mb: found a date or time, expected an integer"),
        ('"ext4"', '"EXT4"', 'filesystem.type: found string "EXT4", expected the string "ext4", "xfs", "btrfs", "squ'),
        ('"ext4"', "{}", "filesystem.type: found a table, expected the string"),
        ('"nginx:alpine"', '""', "source.image: found an empty string, expected an image reference"),
        ('"nginx:alpine"', '"a "', 'source.image: found string "a ", expected an image reference'),
        ('"nginx:alpine"', '"a\\tb"', 'source.image: found string "a\\tb", expected an image reference'),
        ('"nginx:alpine"', '"a\\u0007"', 'source.image: found string "a\\u0007", expected an image reference'),
        ('"nginx:alpine"', "5", "source.image: found integer 5, expected an image reference"),
        ('"nginx:alpine"', '"x"\nplatform = "linux"', 'source.platform: found string "linux", expected a platform'),
        ("[source]", "[[source]]", "source: found an array, expected a table"),
        ('version = "1"', 'version = "2"', 'version: found string "2", expected the string "1"'),
        ('version = "1"', "version = ", "not valid TOML: Invalid value (at line 2, column 11)"),
        ('version = "1"', 'version = "1"\nversion = "1"', "not valid TOML: Cannot overwrite a value (at line 3"),
        ('version = "1"', "x = " + "[" * 5000, "not usable TOML: nested too deeply"),
    ],
)
def test_one_problem(folder: Path, old: str, new: str, line: str) -> None:
    found = problems(folder, MINIMAL.replace(old, new, 1))
    assert found[0].startswith(f"web/fledge.toml: {line}")
    assert sum(not line.startswith("  hint:") for line in found) == 1


@pytest.mark.parametrize("destination", ["etc/x", "", "/etc/..", "/../x", "/a\\u0000b", "C:/x"])
def test_bad_destinations(folder: Path, destination: str) -> None:
    [line, _] = problems(folder, f'{MINIMAL}[mappings]\n"./x" = "{destination}"\n')
    assert line.startswith('web/fledge.toml: mappings."./x": found ')
    assert line.endswith("expected an absolute path in the image, without '..'")


@pytest.mark.parametrize(
    ("first", "second", "clash"),
    [
        ("/etc/a", "/etc/a", True),
        ("/etc/a", "//etc///a", True),
        ("/etc/a", "/etc/./a", True),
        ("/etc/a", "/etc/A", False),
        ("/etc/", "/etc/", False),
        ("/etc/a", "/etc/a/", False),
    ],
)
def test_one_destination_twice(folder: Path, first: str, second: str, clash: bool) -> None:
    content = f'{MINIMAL}mappings = {{ "y" = "{second}" }}\n[mappings]\nx = "{first}"\n'
    if clash:
        assert problems(folder, content) == [
            f'web/fledge.toml: filesystem.mappings.y: found the destination "{second}", which mappings.x has already'
        ]
    else:
        assert load(folder, content).mappings == (Mapping("x", first), Mapping("y", second))


@pytest.mark.parametrize(
    ("lines", "agent"),
    [
        ('source_strategy = "release"\nversion = "v1"', Agent("release", version="v1")),
        (
            'source_strategy = "release"\nversion = "v1"\nbase_url = "http://127.0.0.1:1/{version}"',
            Agent("release", version="v1", base_url="http://127.0.0.1:1/{version}"),
        ),
        ('source_strategy = "local"\npath = "./kestrel"', Agent("local", path="./kestrel")),
        (
            f'source_strategy = "local"\npath = "k"\nchecksum = "{"Ab" * 32}"',
            Agent("local", path="k", checksum="sha256:" + "ab" * 32),
        ),
        ('source_strategy = "http"\nurl = "http://h/k"', Agent("http", url="http://h/k")),
        (
            f'source_strategy = "http"\nurl = "http://h/k"\nchecksum = "sha256:{"Ab" * 32}"',
            Agent("http", url="http://h/k", checksum="sha256:" + "ab" * 32),
        ),
    ],
)
def test_agents(folder: Path, lines: str, agent: Agent) -> None:
    assert load(folder, f"{MINIMAL}[agent]\n{lines}\n").agent == agent


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", ['agent.source_strategy: missing, expected the string "release", "local" or "http"']),
        ('source_strategy = "release"', ["agent.version: missing, expected a non-empty string"]),
        (
            'source_strategy = "http"\npath = "x"',
            [
                'agent.path: unknown key, allowed with source_strategy "http": source_strategy, url, checksum',
                "agent.url: missing, expected an http(s) URL",
            ],
        ),
        (
            'source_strategy = "http"\nurl = "ftp://x"\nchecksum = "sha256:12"',
            [
                'agent.url: found string "ftp://x", expected an http(s) URL',
                'agent.checksum: found string "sha256:12", expected a checksum: "sha256:" and 64 hexadecimal digits',
            ],
        ),
        (
            'source_strategy = "git"\nurl = 5',
            [
                'agent.source_strategy: found string "git", expected the string "release", "local" or "http"',
                "agent.url: found integer 5, expected an http(s) URL",
            ],
        ),
        ('source_strategy = ["http"]', ["agent.source_strategy: found an array, expected the string"]),
    ],
)
def test_bad_agents(folder: Path, lines: str, expected: list[str]) -> None:
    found = problems(folder, f"{MINIMAL}[agent]\n{lines}\n")
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"web/fledge.toml: {start}")


def test_base_url_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = MINIMAL + '[agent]\nsource_strategy = "release"\nversion = "v1"\n'
    monkeypatch.setenv(config.BASE_URL_VARIABLE, "https://mirror.example.org/k")
    assert load(folder, release).agent == Agent("release", "v1", base_url="https://mirror.example.org/k")
    own = load(folder, release + 'base_url = "https://own.example.org"\n').agent
    assert own == Agent("release", "v1", base_url="https://own.example.org")
    monkeypatch.setenv(config.BASE_URL_VARIABLE, "mirror")
    assert problems(folder, release) == [
        'web/fledge.toml: agent.base_url: found "mirror" in the variable FLEDGE_AGENT_BASE_URL, expected an http(s) URL'
    ]
    assert load(folder, MINIMAL).agent is None


def test_the_name_of_the_folder_must_do(tmp_path: Path) -> None:
    folder = tmp_path / "my web"
    folder.mkdir()
    [line, hint] = problems(folder, MINIMAL)
    assert line.startswith('web/fledge.toml: manifest.name: missing, and the folder\'s name "my web" cannot stand in')
    assert hint == '  hint: add a [manifest] table with name = "..."'
    assert load(folder, MINIMAL + '[manifest]\nname = "web"\n').name == "web"


def test_the_name_does_not_depend_on_how_the_file_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = load(folder, MINIMAL)
    monkeypatch.chdir(folder)
    assert config.load(Path("fledge.toml"), "fledge.toml") == image
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert config.load(link / "fledge.toml", "fledge.toml") == image


def test_files_that_are_none(folder: Path) -> None:
    path = folder / "fledge.toml"

    def message() -> str:
        with pytest.raises(ConfigError) as caught:
            config.load(path, "f")
        [problem] = caught.value.problems
        return str(problem)

    assert message() == "f: cannot be read: No such file or directory"
    path.mkdir()
    assert message() == "f: not a regular file, expected a TOML file"
    path.rmdir()
    os.mkfifo(path)
    assert message() == "f: not a regular file, expected a TOML file"
    path.unlink()
    path.symlink_to("fledge.toml")
    assert message() == "f: cannot be read: Too many levels of symbolic links"


def test_not_utf8(folder: Path) -> None:
    assert problems(folder, b'version = "1"\n# gr\xf6\xdfe\n') == ["web/fledge.toml: not UTF-8: byte 0xf6 (at line 2)"]


KEYS = st.sampled_from(
    ["version", "strategy", "source", "image", "platform", "filesystem", "type", "size_buffer_mb", "mappings",
     "agent", "source_strategy", "version", "url", "manifest", "name", "labels", "./x", "\0", "", "é"]
)  # fmt: skip
SCALARS = (
    st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=8)
    | st.sampled_from(["1", "oci_rootfs", "ext4", "release", "local", "http", "/etc/x", "linux/amd64", "http://h/k"])
    | st.datetimes() | st.dates() | st.times()
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
TABLES = st.dictionaries(KEYS, VALUES, max_size=6)


def toml(value: Any) -> str:
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case list():
            return f"[{', '.join(map(toml, value))}]"
        case dict():
            return f"{{{', '.join(f'{toml(key)} = {toml(item)}' for key, item in value.items())}}}"
        case _:
            return repr(value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(TABLES, st.none() | st.sampled_from(["source", "filesystem", "agent", "mappings", "manifest"]))
def test_any_document_gives_a_record_or_a_config_error(
    folder: Path, document: dict[str, Any], part: str | None
) -> None:
    good: dict[str, Any] = {
        "version": "1",
        "strategy": "oci_rootfs",
        "source": {"image": "x"},
        "filesystem": {"type": "xfs", "size_buffer_mb": 1},
    }
    whole = {**good, part: {**good.get(part, {}), **document}} if part else {**good, **document}
    content = "".join(f"{toml(key)} = {toml(value)}\n" for key, value in whole.items())
    outcome: ImageConfig | ConfigError
    try:
        outcome = load(folder, content)
    except ConfigError as error:
        outcome = error
    if isinstance(outcome, ConfigError):
        assert all(problem.file == "web/fledge.toml" and problem.key for problem in outcome.problems), str(outcome)
    else:
        assert outcome.source.image == whole["source"]["image"]
        assert all(mapping.destination.startswith("/") for mapping in outcome.mappings)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_bytes_are_refused(folder: Path, data: bytes) -> None:
    assert problems(folder, data)
