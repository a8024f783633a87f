from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fledge_tasks.digest import sha256_bytes
from fledge_tasks.errors import BlobError, InputError, SourceError
from fledge_tasks.oci.manifest import (
    CONFIG_LIMIT_BYTES,
    MANIFEST_LIMIT_BYTES,
    Descriptor,
    Image,
    Index,
    LayerRef,
    Manifest,
    Platform,
    find_manifest,
    image_from,
    parse,
    select_platform,
)

AMD64 = Platform.parse("linux/amd64")
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
A, B, C = (f"sha256:{digit * 64}" for digit in "abc")


def encode(value: object) -> bytes:
    return json.dumps(value).encode()


def config_of(**changes: Any) -> bytes:
    return encode({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [A]}, **changes})


def manifest_of(config: bytes, /, **changes: Any) -> bytes:
    descriptor = {"mediaType": "x", "digest": sha256_bytes(config), "size": len(config)}
    layers = [{"mediaType": GZIP, "digest": B, "size": 7}]
    return encode({"schemaVersion": 2, "config": descriptor, "layers": layers, **changes})


def image_of(config: bytes, manifest: bytes | None = None, platform: Platform = AMD64) -> Image:
    manifest = manifest_of(config) if manifest is None else manifest
    return image_from(manifest, config, origin="oci", platform=platform, where="here")


def index_of(*platforms: str | None) -> Index:
    """An index whose entry i has the digest of 64 times the digit i."""
    entries = []
    for number, text in enumerate(platforms):
        parts = dict(zip(("os", "architecture", "variant"), text.split("/"), strict=False)) if text else None
        entries.append({"digest": f"sha256:{str(number) * 64}", "size": 1} | ({"platform": parts} if parts else {}))
    index = parse(encode({"schemaVersion": 2, "manifests": entries}), where="here")
    assert isinstance(index, Index)
    return index


def refusal(data: bytes) -> SourceError:
    with pytest.raises(SourceError) as caught:
        parse(data, where="here")
    assert caught.value.where == "here"
    return caught.value


def test_an_image_is_what_manifest_and_config_say() -> None:
    config = config_of()
    manifest = manifest_of(config)
    assert image_of(config, manifest) == Image(
        origin="oci",
        manifest=sha256_bytes(manifest),
        config=sha256_bytes(config),
        platform="linux/amd64",
        layers=(LayerRef(A, B, 7, GZIP),),
    )


@pytest.mark.parametrize("nothing", [[], None])
def test_an_image_may_have_no_layers(nothing: object) -> None:
    config = config_of(rootfs={"type": "layers", "diff_ids": nothing})
    assert image_of(config, manifest_of(config, layers=nothing)).layers == ()


def test_foreign_layers_are_told_apart() -> None:
    kinds = [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "",
    ]
    config = config_of(rootfs={"type": "layers", "diff_ids": [A] * 4})
    layers = [{"mediaType": kind, "digest": B, "size": 7, "urls": ["https://x.invalid/"]} for kind in kinds]
    image = image_of(config, manifest_of(config, layers=layers))
    assert [layer.is_foreign for layer in image.layers] == [True, True, False, False]


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (b"", "not well-formed"),
        (b"[]", "not well-formed"),
        (b"\xff\xfe", "not well-formed"),
        (b'{"schemaVersion": 2, "x": ' + b"[" * 200_000, "not well-formed"),
        (b'{"schemaVersion": 2, "config": ' + b'{"platform":' * 200_000, "not well-formed"),
        (b" " * (MANIFEST_LIMIT_BYTES + 1), "larger than 4 MiB"),
        (b"{}", "schemaVersion of the manifest is 0"),
        (b'{"schemaVersion": 3}', "schemaVersion of the manifest is 3"),
        (b'{"schemaVersion": 1, "fsLayers": []}', "schema 1"),
        (b'{"schemaVersion": 2}', "no config"),
        (b'{"schemaVersion": 2, "mediaType": "application/x", "layers": []}', "(application/x): it has no config"),
        (b'{"schemaVersion": 2, "manifests": 3}', "not well-formed"),
        (b'{"schemaVersion": 2, "manifests": [], "layers": []}', "at once"),
        (manifest_of(b"", layers=[{"digest": B, "size": -1}]), "$.layers[0].size"),
        (manifest_of(b"", layers=[{"digest": B, "size": 1 << 70}]), "not well-formed"),
        (manifest_of(b"", layers=[{"digest": B}]), "size"),
        (manifest_of(b"", layers=[{"digest": "sha512:" + "a" * 128, "size": 1}]), "'sha512:aaa"),
        (manifest_of(b"", layers=[{"digest": "../../x", "size": 1}]), "'../../x'"),
        (manifest_of(b"", config={"digest": A.upper(), "size": 1}), "is not 'sha256:'"),
    ],
    ids=itertools.count(),
)
def test_malformed_manifests_are_refused(manifest: bytes, expected: str) -> None:
    assert expected in str(refusal(manifest))


def test_schema_1_has_a_way_out() -> None:
    assert "skopeo copy --format v2s2" in (refusal(b'{"schemaVersion": 1}').hint or "")


@settings(max_examples=40)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["digest", "size", "platform", "annotations", "mediaType"]), inner)
        ),
    )
)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    for key in ("manifests", "layers", "config"):
        data = encode({"schemaVersion": 2, key: value})
        try:
            assert isinstance(parse(data, where="here"), Index | Manifest)
        except SourceError:
            continue


@given(st.binary(max_size=200))
def test_any_config_is_read_or_refused(data: bytes) -> None:
    with pytest.raises(SourceError):
        image_of(data)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (b"{}", "not an image but another artifact"),
        (config_of(rootfs={"type": "other", "diff_ids": [A]}), "not an image but another artifact"),
        (config_of(rootfs={"type": "layers", "diff_ids": []}), "has 1 layers, the config has 0 diff_ids"),
        (config_of(rootfs={"type": "layers", "diff_ids": [A, A]}), "has 1 layers, the config has 2 diff_ids"),
        (config_of(rootfs={"type": "layers", "diff_ids": ["md5:1"]}), "'md5:1'"),
        (config_of(rootfs=[]), "the config is not well-formed"),
        (config_of(os=3), "the config is not well-formed"),
        (config_of(config={"Env": ["@"]}).replace(b"@", b"\xff"), "the config is not well-formed: 'utf-8' codec"),
        (config_of(history="@").replace(b'"@"', b"NaN"), "the config is not well-formed"),
        (config_of(history="@").replace(b'"@"', b"[" * 100_000), "the config is not well-formed: maximum recursion"),
        (
            config_of(history="@").replace(b'"@"', b"9" * 5000),
            "the config is not well-formed: Integer value out of range",
        ),
        (config_of(x="y" * CONFIG_LIMIT_BYTES), "larger than 8 MiB"),
        (config_of(architecture="arm64"), "the image is for linux/arm64, asked for was linux/amd64"),
        (config_of(os="windows"), "the image is for windows/amd64, asked for was linux/amd64"),
    ],
    ids=itertools.count(),
)
def test_bad_configs_are_refused(config: bytes, expected: str) -> None:
    with pytest.raises(SourceError, match=r".") as caught:
        image_of(config)
    assert expected in caught.value.message


def test_another_platform_has_a_way_out() -> None:
    with pytest.raises(SourceError) as caught:
        image_of(config_of(architecture="arm64", variant="v8"))
    assert 'platform = "linux/arm64/v8" in [source]' in (caught.value.hint or "")


def test_the_variant_counts_only_when_both_name_one() -> None:
    config = config_of(architecture="arm", variant="v6")
    for asked in ("linux/arm", "linux/arm/v6"):
        assert image_of(config, platform=Platform.parse(asked)).platform == asked
    with pytest.raises(SourceError, match="linux/arm/v6, asked for was linux/arm/v7"):
        image_of(config, platform=Platform.parse("linux/arm/v7"))
    assert image_of(config_of(architecture="arm"), platform=Platform.parse("linux/arm/v7")).platform == "linux/arm/v7"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"), ("application/wasm", "not a tar archive")],
)
def test_layers_that_are_no_tar_archives_are_refused(kind: str, expected: str) -> None:
    config = config_of()
    with pytest.raises(SourceError, match=expected):
        image_of(config, manifest_of(config, layers=[{"mediaType": kind, "digest": B, "size": 7}]))


def test_another_config_than_the_manifest_names_is_refused() -> None:
    config = config_of()
    with pytest.raises(BlobError) as caught:
        image_of(config + b" ", manifest_of(config))
    assert sha256_bytes(config) in caught.value.message
    assert sha256_bytes(config + b" ") in caught.value.message


def test_an_index_is_no_manifest() -> None:
    with pytest.raises(SourceError, match="an index where a manifest"):
        image_of(config_of(), encode({"schemaVersion": 2, "manifests": []}))


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        (["linux/arm64", "linux/amd64"], "linux/amd64", 1),
        (["linux/x86_64"], "linux/amd64", 0),
        (["linux/amd64"], "linux/x86_64", 0),
        (["linux/aarch64"], "linux/arm64", 0),
        (["linux/amd64/v3", "linux/amd64/v2", "linux/amd64"], "linux/amd64", 2),
        (["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64", 1),
        (["linux/amd64/v3", "linux/amd64/v2"], "linux/amd64", 0),
        (["linux/arm64/v9", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/arm64/v8"], "linux/arm64", 0),
        (["linux/arm64"], "linux/arm64/v8", 0),
        (["linux/arm/v5", "linux/arm/v7"], "linux/arm", 1),
        (["linux/arm/v5", "linux/arm/v7"], "linux/arm/v5", 0),
        (["unknown/unknown", "linux/amd64"], "linux/amd64", 1),
        ([None], "linux/amd64", 0),
        ([None, "unknown/unknown"], "linux/amd64", 0),
        ([None, "linux/amd64"], "linux/amd64", 1),
        (["linux/amd64", "linux/amd64"], "linux/amd64", 0),
    ],
)
def test_the_entry_of_a_platform(there: list[str | None], asked: str, chosen: int) -> None:
    found = select_platform(index_of(*there), Platform.parse(asked), where="here")
    assert found.digest == f"sha256:{str(chosen) * 64}"


@pytest.mark.parametrize(
    ("there", "asked", "listed"),
    [
        (["linux/arm64/v8", "linux/s390x", "unknown/unknown"], "linux/amd64", "there are: linux/arm64/v8, linux/s390x"),
        (["linux/arm64"], "linux/arm64/v9", "there are: linux/arm64"),
        (["linux/amd64"], "linux/amd64/v3", "there are: linux/amd64"),
        (["windows/amd64"], "linux/amd64", "there are: windows/amd64"),
        ([None, None], "linux/amd64", "there are: (none)"),
        (["unknown/unknown"], "linux/amd64", "there are: none"),
        ([], "linux/amd64", "there are: none"),
    ],
)
def test_a_missing_platform_lists_what_is_there(there: list[str | None], asked: str, listed: str) -> None:
    with pytest.raises(SourceError) as caught:
        select_platform(index_of(*there), Platform.parse(asked), where="here")
    assert caught.value.message == f"there is no image for {Platform.parse(asked)}; {listed}"
    assert "[source] platform" in (caught.value.hint or "")


def test_only_the_chosen_entry_needs_a_digest_that_we_know() -> None:
    entries = [
        {"digest": "sha512:x", "size": 1, "platform": {"os": "linux", "architecture": "arm64"}},
        {"digest": A, "size": 1, "platform": {"os": "linux", "architecture": "amd64"}},
    ]
    index = parse(encode({"schemaVersion": 2, "manifests": entries}), where="here")
    assert isinstance(index, Index)
    assert select_platform(index, AMD64, where="here").digest == A
    with pytest.raises(SourceError, match="sha512:x"):
        select_platform(index, Platform.parse("linux/arm64"), where="here")


@pytest.mark.parametrize("text", ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/amd64/"])
def test_what_is_no_platform_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not a platform"):
        Platform.parse(text)


def nested(depth: int) -> tuple[bytes, dict[str, bytes]]:
    data = manifest_of(config_of())
    blobs: dict[str, bytes] = {}
    for _ in range(depth):
        blobs[sha256_bytes(data)] = data
        data = encode({"schemaVersion": 2, "manifests": [{"digest": sha256_bytes(data), "size": len(data)}]})
    return data, blobs


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_indexes_lead_to_a_manifest(depth: int) -> None:
    top, blobs = nested(depth)
    asked = []

    def read(descriptor: Descriptor) -> bytes:
        asked.append(descriptor.digest)
        return blobs[descriptor.digest]

    assert find_manifest(top, AMD64, read, where="here") == manifest_of(config_of())
    assert len(asked) == depth


def test_a_third_level_of_indexes_is_refused() -> None:
    top, blobs = nested(3)
    with pytest.raises(SourceError, match="more than 2 deep"):
        find_manifest(top, AMD64, lambda descriptor: blobs[descriptor.digest], where="here")


def test_what_an_index_leads_to_is_checked() -> None:
    top, blobs = nested(1)
    with pytest.raises(BlobError, match="expected"):
        find_manifest(top, AMD64, lambda descriptor: blobs[descriptor.digest] + b"\n", where="here")
