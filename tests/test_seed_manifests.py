"""The two sample manifests of the text that this project was made from: matching fledge.toml files give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.layers import Member, folder
from tests.layouts import Layout, Place
from tests.tools import need
from tests.workspaces import sha256_of

FIRST: dict[str, Any] = {
    "$schema": "https://raw.githubusercontent.com/volantvm/volant/main/docs/schemas/plugin-manifest-v1.json",
    "schema_version": "1.0",
    "name": "nginx",
    "version": "0.1.0",
    "runtime": "nginx",
    "enabled": True,
    "rootfs": {"url": "/path/to/rootfs.img", "format": "ext4"},
    "resources": {"cpu_cores": 1, "memory_mb": 1024},
    "workload": {
        "type": "http",
        "entrypoint": ["/docker-entrypoint.sh", "nginx", "-g", "daemon off;"],
        "base_url": "http://127.0.0.1:80",
    },
    "health_check": {"endpoint": "/", "timeout_ms": 10000},
}
SECOND: dict[str, Any] = {
    "$schema": "./../schemas/plugin-manifest-v1.json",
    "schema_version": "1.0",
    "name": "nginx",
    "version": "0.1.0",
    "runtime": "nginx",
    "enabled": True,
    # The sample has '…' in both: a host, and the digits.
    "rootfs": {"url": "https://images.example.org/rootfs.img"},
}
SEED_TOML = """\
version = "1"
strategy = "oci_rootfs"
[source]
image = "oci:../layouts/nginx"
[filesystem]
type = "ext4" # ext4|xfs|btrfs
size_buffer_mb = 1 # extra free space on top of extracted rootfs
preallocate = false # use sparse file (dd) or preallocate (fallocate)
"""
NGINX = {
    "Entrypoint": ["/docker-entrypoint.sh"],
    "Cmd": ["nginx", "-g", "daemon off;"],
    "ExposedPorts": {"80/tcp": {}},
}
ADDED = {"image", "image_digest", "labels", "resources", "workload", "health_check"}
"""What a sample may lack."""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A workspace with an image `nginx` whose config says what nginx's does."""
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    Layout(place.root / "layouts" / "nginx").write(
        [folder("usr"), Member("docker-entrypoint.sh", b"#!/bin/sh\n", mode=0o755)], config=NGINX
    )
    (place.root / "nginx").mkdir()
    return place


def written(place: Place, manifest: str = "", beside: str = "") -> dict[str, Any]:
    """Build the image with this at the end of the seed's fledge.toml, or in a manifest.toml beside it."""
    file = place.root / "nginx" / "fledge.toml"
    file.write_text(SEED_TOML + manifest)
    file.with_name("manifest.toml").unlink(missing_ok=True)
    if beside:
        file.with_name("manifest.toml").write_text(beside)
    place.build()
    document: dict[str, Any] = json.loads(place.output("nginx").with_name("manifest.json").read_bytes())
    return document


def compare(document: dict[str, Any], sample: dict[str, Any], place: Place, **rootfs: str) -> None:
    """Assert that the document has each field of the sample; `rootfs` are those that are expected to differ there."""
    for key, value in sample.items():
        if key != "rootfs":
            assert document[key] == value, key
    image = place.output("nginx")
    expected = {"checksum": sha256_of(image), "format": "raw", **sample["rootfs"], **rootfs}
    assert document["rootfs"] == expected
    assert document.keys() - sample.keys() <= ADDED
    assert document["labels"] == {"volant.rootfs_fstype": "ext4", "volant.rootfs_device": "vda"}
    assert [key for key in document if key in FIRST] == list(FIRST), "the order of the sample"


def test_the_first_without_a_manifest_table(place: Place) -> None:
    """All of it comes from the image's config and the folder's name; the type of the filesystem is a label."""
    document = written(place)
    compare(document, FIRST, place, url=str(place.output("nginx")), format="raw")


def test_the_first_with_the_path_of_the_image(place: Place) -> None:
    document = written(place, '[manifest.rootfs]\nurl = "/path/to/rootfs.img"\n')
    compare(document, FIRST, place, format="raw")


def test_the_first_with_the_format_that_it_has(place: Place) -> None:
    document = written(place, '[manifest.rootfs]\nurl = "/path/to/rootfs.img"\nformat = "ext4"\n')
    compare(document, FIRST, place)


FIRST_TOML = """
schema_version = "1.0"
name = "nginx"
version = "0.1.0"
runtime = "nginx"
enabled = true
rootfs = { url = "/path/to/rootfs.img", format = "ext4" }
resources = { cpu_cores = 1, memory_mb = 1024 }
health_check = { endpoint = "/", timeout_ms = 10000 }
[workload]
type = "http"
entrypoint = ["/docker-entrypoint.sh", "nginx", "-g", "daemon off;"]
base_url = "http://127.0.0.1:80"
"""


def test_the_first_said_in_full_in_a_file_of_its_own(place: Place) -> None:
    Layout(place.root / "layouts" / "nginx").write([folder("usr")], config={"Cmd": ["/other"]})
    document = written(place, beside=FIRST_TOML)
    compare(document, FIRST, place)
    assert document == written(place, "[manifest]\n" + FIRST_TOML.replace("[workload]", "[manifest.workload]"))


def test_the_second(place: Place) -> None:
    table = """
[manifest]
"$schema" = "./../schemas/plugin-manifest-v1.json"
rootfs = { url = "https://images.example.org/rootfs.img" }
"""
    document = written(place, table)
    compare(document, SECOND, place)
    # With the checksum that the image has, as a pin: it is what comes out, in its normal form.
    digits = sha256_of(place.output("nginx")).removeprefix("sha256:")
    pinned = table.replace(" }", f', checksum = "{digits.upper()}" }}')
    assert written(place, pinned) == document


def test_a_checksum_of_another_file_is_refused(place: Place) -> None:
    written(place)
    manifest = place.output("nginx").with_name("manifest.json")
    (place.root / "nginx" / "fledge.toml").write_text(
        SEED_TOML + f'[manifest]\nrootfs.checksum = "sha256:{"a" * 64}"\n'
    )
    for _ in range(2):
        result = place.fledge("build")
        assert result.code == 1
        found, wanted = sha256_of(place.output("nginx")), "sha256:" + "a" * 64
        assert f"error: manifest:nginx: nginx: rootfs.checksum: found {found}, expected {wanted}" in result.stderr
        assert "leave the key out" in result.stderr
        assert not manifest.exists(), "nothing beside the image says what is not true of it"
    assert sorted(path.name for path in place.leftovers()) == [".fledge.json", "rootfs.img"]


@pytest.mark.parametrize(
    ("prefix", "url"),
    [
        ("https://images.example.org", "https://images.example.org/nginx/rootfs.img"),
        ("https://images.example.org/v1//", "https://images.example.org/v1/nginx/rootfs.img"),
        ("/srv/images/", "/srv/images/nginx/rootfs.img"),
        ("/", "/nginx/rootfs.img"),
    ],
)
def test_images_that_will_be_published(place: Place, prefix: str, url: str) -> None:
    """The prefix is where the content of the build folder goes; it is no key of the manifest."""
    before = written(place)
    document = written(place, f'[manifest]\nurl_prefix = "{prefix}"\n')
    assert document == {**before, "rootfs": {**before["rootfs"], "url": url}}
    assert place.build().stages("nginx") == []
    assert written(place, beside=f'url_prefix = "{prefix}"\n') == document


def test_a_whole_url_is_more_than_a_prefix(place: Place) -> None:
    document = written(
        place, '[manifest]\nurl_prefix = "https://a.example.org"\nrootfs.url = "https://b.example.org/x"\n'
    )
    assert document["rootfs"]["url"] == "https://b.example.org/x"
