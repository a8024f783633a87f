"""The manifest: what users may write, and what is derived from the image."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import manifest, shapes
from fledge_tasks.errors import ManifestError, SourceError

CHECKSUM = "sha256:" + "0" * 63 + "1"
DIGEST = "sha256:" + "a" * 64
NGINX = {
    "architecture": "amd64",
    "config": {
        "Entrypoint": ["/docker-entrypoint.sh"],
        "Cmd": ["nginx", "-g", "daemon off;"],
        "Env": ["PATH=/usr/sbin:/bin", "V=1.0", "V=1.25", "EMPTY=", "ODD", "=x", " =x", "N\0=x", "A=b=c"],
        "ExposedPorts": {"443/tcp": {}, "80/tcp": {}, "53/udp": {}},
        "WorkingDir": "",
        "Labels": None,
    },
}


def rendered(user: dict[str, object], oci_config: dict[str, Any], filesystem: str = "ext4") -> dict[str, Any]:
    data = manifest.render(
        user,
        oci_config,
        name="nginx",
        image="nginx:alpine",
        image_digest=DIGEST,
        rootfs=Path("/ws/build/nginx/rootfs.img"),
        checksum=CHECKSUM,
        filesystem=filesystem,
    )
    assert data.endswith(b"}\n")
    assert data.isascii()
    document: dict[str, Any] = json.loads(data)
    return document


def test_everything_is_derived_from_the_image() -> None:
    document = rendered({}, NGINX)
    assert document == {
        "$schema": "https://raw.githubusercontent.com/volantvm/volant/main/docs/schemas/plugin-manifest-v1.json",
        "schema_version": "1.0",
        "name": "nginx",
        "version": "0.1.0",
        "runtime": "nginx",
        "enabled": True,
        "image": "nginx:alpine",
        "image_digest": DIGEST,
        "rootfs": {"url": "/ws/build/nginx/rootfs.img", "checksum": CHECKSUM, "format": "raw"},
        "resources": {"cpu_cores": 1, "memory_mb": 1024},
        "workload": {
            "type": "http",
            "entrypoint": ["/docker-entrypoint.sh", "nginx", "-g", "daemon off;"],
            "base_url": "http://127.0.0.1:80",
            "env": {"A": "b=c", "EMPTY": "", "PATH": "/usr/sbin:/bin", "V": "1.25"},
        },
        "health_check": {"endpoint": "/", "timeout_ms": 10000},
        "labels": {"volant.rootfs_device": "vda", "volant.rootfs_fstype": "ext4"},
    }
    assert list(document) == [
        "$schema", "schema_version", "name", "version", "runtime", "enabled", "image", "image_digest",
        "rootfs", "resources", "workload", "health_check", "labels",
    ]  # fmt: skip
    assert list(document["workload"]) == ["type", "entrypoint", "base_url", "env"]


def test_user_wins_key_by_key_and_lists_are_replaced() -> None:
    user: dict[str, object] = {
        "labels": {"volant.rootfs_device": "vdb", "team": "web"},
        "resources": {"memory_mb": 64},
        "workload": {"env": {"EMPTY": "no"}, "entrypoint": ["/bin/true"], "base_url": "http://127.0.0.1:9"},
        "health_check": {"timeout_ms": 0},
        "enabled": False,
        "actions": {"b": {"path": "/b", "method": "GET"}, "a": {"method": "POST", "path": "/a", "timeout_ms": 5}},
        "disks": [{"source": "/d.img", "name": "d", "readonly": True}],
        "network": {"mode": "dhcp"},
    }
    assert manifest.check(user) == []
    document = rendered(user, NGINX, "xfs")
    assert document["labels"] == {"volant.rootfs_fstype": "xfs", "volant.rootfs_device": "vdb", "team": "web"}
    assert document["resources"] == {"cpu_cores": 1, "memory_mb": 64}
    assert document["workload"]["entrypoint"] == ["/bin/true"]
    assert document["workload"]["env"]["EMPTY"] == "no"
    assert document["workload"]["env"]["A"] == "b=c"
    assert document["health_check"] == {"endpoint": "/", "timeout_ms": 0}
    assert document["enabled"] is False
    assert list(document["actions"]) == ["a", "b"]
    assert list(document["disks"][0]) == ["name", "source", "readonly"]
    assert list(document)[-3:] == ["disks", "network", "labels"]


@pytest.mark.parametrize(
    ("user", "disk", "tree"),
    [
        ({}, "/ws/build/nginx/rootfs.qcow2", "/ws/build/nginx/rootfs.verity"),
        ({"url_prefix": "https://h/v1/"}, "https://h/v1/nginx/rootfs.qcow2", "https://h/v1/nginx/rootfs.verity"),
    ],
)
def test_the_hash_tree_is_where_the_disk_is(user: dict[str, object], disk: str, tree: str) -> None:
    data = manifest.render(
        user,
        NGINX,
        name="nginx",
        image="nginx:alpine",
        image_digest=DIGEST,
        rootfs=Path("/ws/build/nginx/rootfs.qcow2"),
        checksum=CHECKSUM,
        filesystem="ext4",
        disk_format="qcow2",
        labels={manifest.HASH_TREE: "/ws/build/nginx/rootfs.verity"},
    )
    document = json.loads(data)
    assert document["rootfs"] == {"url": disk, "checksum": CHECKSUM, "format": "qcow2"}
    assert document["labels"]["fledge.verity_hash_tree"] == tree


def test_the_order_of_keys_in_the_input_does_not_show() -> None:
    forth: dict[str, object] = {"version": "2", "labels": {"a": "1", "b": "2"}, "openapi": "/x"}
    back: dict[str, object] = {"openapi": "/x", "labels": {"b": "2", "a": "1"}, "version": "2"}
    assert json.dumps(rendered(forth, NGINX)) == json.dumps(rendered(back, NGINX))


@pytest.mark.parametrize(
    ("config", "entrypoint"),
    [
        ({"Entrypoint": None, "Cmd": None}, ["/bin/sh"]),
        ({"Entrypoint": [], "Cmd": []}, ["/bin/sh"]),
        ({"Entrypoint": [""], "Cmd": ["sh", ""]}, ["sh", ""]),
        ({"Entrypoint": ["/e"], "Cmd": None}, ["/e"]),
        ({"Cmd": ["bash"]}, ["bash"]),
        (None, ["/bin/sh"]),
        ({}, ["/bin/sh"]),
    ],
)
def test_entrypoint(config: object, entrypoint: list[str]) -> None:
    assert rendered({}, {"config": config})["workload"]["entrypoint"] == entrypoint


@pytest.mark.parametrize(
    ("ports", "expected"),
    [
        (None, 80),
        ({}, 80),
        ({"53/udp": {}}, 80),
        ({"8080": {}}, 8080),
        ({"8000-8010/tcp": None, "9000/tcp": {}}, 8000),
        ({"9/tcp": {}, "10/tcp": {}, "1/sctp": {}}, 9),
        ({"0/tcp": {}, "65536/tcp": {}, "http/tcp": {}, "-5/tcp": {}, "1/TCP\n": {}, "٣/tcp": {}}, 80),
    ],
)
def test_base_url(ports: object, expected: int) -> None:
    workload = rendered({}, {"config": {"ExposedPorts": ports}})["workload"]
    assert workload["base_url"] == f"http://127.0.0.1:{expected}"


def test_working_folder() -> None:
    assert rendered({}, {"config": {"WorkingDir": "/srv"}})["workload"]["workdir"] == "/srv"
    for blank in ("", " "):
        assert "workdir" not in rendered({}, {"config": {"WorkingDir": blank}})["workload"]


@pytest.mark.parametrize(
    ("oci_config", "message"),
    [
        ({"config": []}, "malformed at config: found an empty array, expected an object"),
        ({"config": {"Entrypoint": "sh"}}, 'config.Entrypoint: found string "sh", expected an array of strings'),
        ({"config": {"Cmd": ["sh", None]}}, "config.Cmd[1]: found null, expected a string"),
        ({"config": {"Env": {"A": "b"}}}, "config.Env: found a table, expected an array of strings"),
        ({"config": {"ExposedPorts": ["80"]}}, "config.ExposedPorts: found an array, expected an object"),
        ({"config": {"WorkingDir": 3}}, "config.WorkingDir: found integer 3, expected a string"),
    ],
)
def test_a_malformed_oci_config_is_named(oci_config: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError) as caught:
        rendered({}, oci_config)
    assert caught.value.message.endswith(message)
    assert caught.value.where == "nginx:alpine"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
WORDS = st.sampled_from(["", " ", "\n", "\0", "=", "a", "A=b", " =b", "\0=b", "/", "80", "80/tcp"]) | st.text(
    max_size=4
)
OCI_CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "Entrypoint": st.lists(WORDS, max_size=3),
        "Cmd": st.lists(WORDS, max_size=3),
        "Env": st.lists(WORDS, max_size=4),
        "WorkingDir": WORDS,
        "ExposedPorts": st.dictionaries(WORDS, JSON, max_size=3),
        "Labels": JSON,
    },
)
OCI_KEYS = st.sampled_from(["Entrypoint", "Cmd", "Env", "WorkingDir", "ExposedPorts", "Labels"])


@given(OCI_CONFIGS)
def test_what_an_image_says_gives_a_manifest_that_volant_takes(config: object) -> None:
    assert list(manifest.FINISHED.findings("", rendered({}, {"config": config}))) == []


@given(st.dictionaries(OCI_KEYS, JSON | st.lists(st.text(), max_size=3)) | JSON)
def test_any_oci_config_gives_a_manifest_or_a_source_error(config: object) -> None:
    try:
        document = rendered({}, {"config": config})
    except SourceError:
        return
    assert list(manifest.FINISHED.findings("", document)) == []


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ({"nam": "a"}, ("nam", "unknown key, allowed here: $schema, schema_version, name, version,", 'mean "name"?')),
        ({"name": "a/b"}, ("name", 'found string "a/b", expected a name of at most 128', None)),
        ({"name": "a\n"}, ("name", 'found string "a\\n"', None)),
        ({"name": ".."}, ("name", 'found string ".."', None)),
        ({"schema_version": "2.0"}, ("schema_version", 'found string "2.0", expected the string "1.0"', None)),
        ({"version": " "}, ("version", 'found string " ", expected a non-empty string', None)),
        ({"enabled": 1}, ("enabled", "found integer 1, expected true or false", None)),
        ({"resources": {"cpu_cores": 0}}, ("resources.cpu_cores", "found integer 0, expected an integer from 1", None)),
        ({"resources": {"memory_mb": True}}, ("resources.memory_mb", "found boolean true, expected an integer", None)),
        ({"resources": {"memory": 1}}, ("resources.memory", "unknown key", '"memory_mb"?')),
        ({"labels": {"a.b": 1}}, ('labels."a.b"', "found integer 1, expected a string", None)),
        ({"workload": {"type": "grpc"}}, ("workload.type", 'found string "grpc", expected the string "http"', None)),
        ({"workload": {"entrypoint": []}}, ("workload.entrypoint", "found an empty array, expected an array of", None)),
        ({"workload": {"entrypoint": [""]}}, ("workload.entrypoint", "found an array, expected an array of", None)),
        ({"workload": {"entrypoint": [" "]}}, ("workload.entrypoint", "found an array, expected an array of", None)),
        ({"workload": {"entrypoint": ["a", 1.5]}}, ("workload.entrypoint[1]", "found float 1.5, expected a str", None)),
        ({"workload": {"base_url": "localhost"}}, ("workload.base_url", 'found string "localhost"', None)),
        ({"workload": {"env": {"A=": ""}}}, ("workload.env", 'found the key "A=", expected the name of', None)),
        ({"health_check": {"timeout_ms": -1}}, ("health_check.timeout_ms", "found integer -1", None)),
        ({"actions": {"go": {"method": "GET"}}}, ("actions.go.path", "missing, expected a non-empty string", None)),
        ({"rootfs": {"url": "file:///x"}}, ("rootfs.url", 'found string "file:///x", expected an absolute', None)),
        ({"rootfs": {"checksum": "md5:1"}}, ("rootfs.checksum", 'found string "md5:1", expected a checksum', None)),
        ({"rootfs": {"format": ""}}, ("rootfs.format", "found an empty string", None)),
        (
            {"rootfs": {"format": "qcow"}},
            ("rootfs.format", 'found string "qcow", expected the string "raw"', '"qcow2"?'),
        ),
        ({"rootfs": {"format": "vmdk"}}, ("rootfs.format", 'found string "vmdk", expected the string "raw"', None)),
        ({"url_prefix": "images"}, ("url_prefix", 'found string "images", expected an absolute path or an', None)),
        ({"url_prefix": "https://h/x?y"}, ("url_prefix", 'found string "https://h/x?y", expected an absolute', None)),
        ({"disks": [{"name": "a"}]}, ("disks[0].source", "missing", None)),
        ({"disks": {}}, ("disks", "found a table, expected an array of tables", None)),
        ({"cloud_init": {"user_data": {"content": "x"}}}, ("cloud_init.user_data", "found content without", None)),
        ({"cloud_init": {"meta_data": {"content": "x", "path": "y"}}}, ("cloud_init.meta_data", "found both", None)),
        ({"cloud_init": {"meta_data": {"inline": True, "path": "y"}}}, ("cloud_init.meta_data", "found path", None)),
        ({"network": {"mode": "bridge"}}, ("network.mode", 'found string "bridge"', '"bridged"?')),
        ({"network": {"mode": "bridged", "subnet": "10.0.0.0/8"}}, ("network", "found a subnet", None)),
        ({"devices": {"allowlist": [1]}}, ("devices.allowlist[0]", "found integer 1", None)),
        ({"initramfs": {"url": "/x"}}, ("initramfs", "unknown key", None)),
    ],
)
def test_each_mistake_is_found(user: dict[str, object], expected: tuple[str, str, str | None]) -> None:
    [(path, message, hint)] = manifest.check(user)
    assert path == expected[0]
    assert message.startswith(expected[1])
    assert (hint or "").endswith(expected[2] or "")
    assert (hint is None) == (expected[2] is None)


def test_all_mistakes_come_at_once() -> None:
    user: dict[str, object] = {"name": 1, "x": 2, "resources": {"cpu_cores": "1", "memory_mb": 0}, "disks": [1, {}]}
    paths = [path for path, _, _ in manifest.check(user)]
    assert paths == [
        "name", "x", "resources.cpu_cores", "resources.memory_mb", "disks[0]", "disks[1].name", "disks[1].source",
    ]  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(manifest.MANIFEST.fields)), JSON, max_size=3))
def test_check_never_raises_and_what_it_passes_can_be_rendered(user: dict[str, object]) -> None:
    if manifest.check(user) == []:
        with contextlib.suppress(ManifestError):  # a checksum that is not the image's
            assert list(manifest.FINISHED.findings("", rendered(user, NGINX))) == []


def test_a_checksum_is_that_of_the_image_or_a_mistake() -> None:
    for written in (CHECKSUM, CHECKSUM[7:], CHECKSUM.upper()[7:]):
        assert rendered({"rootfs": {"checksum": written}}, NGINX)["rootfs"]["checksum"] == CHECKSUM
    with pytest.raises(ManifestError, match=f"nginx: rootfs.checksum: found {CHECKSUM}, expected {DIGEST}"):
        rendered({"rootfs": {"checksum": DIGEST}}, NGINX)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 << 70, "an integer beyond 64 bits"),
        ("x" * 100, f'string "{"x" * 60}..."'),
        ("\x1b[31m\u202e", 'string "\\u001b[31m\\u202e"'),
        ("größe", 'string "größe"'),
    ],
)
def test_shown_is_short_and_safe(value: object, expected: str) -> None:
    assert shapes.shown(value) == expected
