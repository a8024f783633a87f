"""Indexes, manifests and configs that lie, and every blob of an image damaged in turn: one error that names it."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.layers import Member, digest
from tests.layouts import Layout
from tests.scene import Change, Scene, encoded, rewrite, scene

__all__ = ["scene"]

MIB = 1 << 20
DEEP = b"[" * 100_000
A = "sha256:" + "a" * 64
Value = dict[str, Any]


def put(**fields: Any) -> Change:
    """Return a change that sets fields of a document."""
    return lambda value: value | fields


def entry(**fields: Any) -> Change:
    """Return a change that sets fields of the only descriptor in an index."""
    return lambda value: value | {"manifests": [value["manifests"][0] | fields]}


def layer(**fields: Any) -> Change:
    """Return a change that sets fields of the only layer in a manifest."""
    return lambda value: value | {"layers": [value["layers"][0] | fields]}


def diff_ids(found: object) -> Change:
    """Return a change that sets the diff IDs in a config."""
    return put(rootfs={"type": "layers", "diff_ids": found})


def insert(text: bytes) -> Callable[[Value], bytes]:
    """Return a change that puts `text`, one or more members of an object, in front of all others."""
    return lambda value: b"{" + text + b"," + encoded(value)[1:]


NO_DIGESTS = {
    "sha512": "sha512:" + "a" * 128,
    "md5": "md5:" + "a" * 32,
    "upper case": A.upper(),
    "upper-case digits": "sha256:" + "A" * 64,
    "a path": "sha256:../../outside/secret",
    "an absolute path": "sha256:/etc/passwd",
    "too short": A[:-1],
    "a line end": A + "\n",
    "nothing": "",
}
BAD_JSON: dict[str, tuple[Callable[[Value], bytes], str]] = {
    "huge": (lambda value: encoded({**value, "x": "y" * 9 * MIB}), "is larger than"),
    "deep": (insert(b'"x": ' + DEEP), "is not well-formed"),
    "a list": (lambda _: b"[]", "Expected `object`, got `array`"),
    "nothing": (lambda _: b"", "is not well-formed"),
    "null": (lambda _: b"null", "Expected `object`, got `null`"),
    "NaN": (insert(b'"x": NaN'), "is not well-formed"),
    "Infinity": (insert(b'"x": -Infinity'), "is not well-formed"),
    "a lone surrogate": (insert(rb'"mediaType": "\ud800", "os": "\ud800"'), "is not well-formed"),
    "no UTF-8": (insert(b'"mediaType": "\xff", "os": "\xff"'), "is not well-formed"),
    "a byte order mark": (lambda value: b"\xef\xbb\xbf" + encoded(value), "is not well-formed"),
    "something behind it": (lambda value: encoded(value) + b"{}", "is not well-formed"),
    "half of it": (lambda value: encoded(value)[:-20], "is not well-formed"),
}
BAD_IMAGES: dict[str, tuple[dict[str, Change], str]] = {
    # what is wrong: (changes, words of the error)
    **{f"{part}: {name}": ({part: change}, words)
       for part in ("index", "manifest", "config") for name, (change, words) in BAD_JSON.items()},
    **{f"a manifest's digest: {name}": ({"index": entry(digest=to)}, "is not 'sha256:'")
       for name, to in NO_DIGESTS.items()},
    **{f"a layer's digest: {name}": ({"manifest": layer(digest=to)}, "is not 'sha256:'")
       for name, to in NO_DIGESTS.items()},
    **{f"a diff ID: {name}": ({"config": diff_ids([to])}, "is not 'sha256:'") for name, to in NO_DIGESTS.items()},
    "the config's digest": ({"manifest": put(config={"digest": "md5:1", "size": 1})}, "'md5:1' is not 'sha256:'"),
    "a manifest of another size": ({"index": entry(size=1)}, "expected 1 bytes"),
    "a manifest of no size": ({"index": entry(size=None)}, "Expected `int`"),
    "a manifest of size -1": ({"index": entry(size=-1)}, "Expected `int` >= 0"),
    "a manifest of size 2^64": ({"index": entry(size=1 << 64)}, "Expected `int` <= "),
    "a manifest of size 1e3": ({"index": entry(size=1e3)}, "Expected `int`, got `float`"),
    "a manifest that is not there": ({"index": entry(digest=A)}, f"{A}: found no such file"),
    "a config that is not there": ({"manifest": put(config={"digest": A, "size": 1})}, f"{A}: found no such file"),
    "a config of another size": (
        {"manifest": lambda value: value | {"config": value["config"] | {"size": 1}}}, "expected 1 bytes",
    ),
    "annotations that are no strings": ({"index": entry(annotations={"a": 1})}, "Expected `str`, got `int`"),
    "annotations in a list": ({"index": entry(annotations=["a"])}, "Expected `object | null`, got `array`"),
    "no manifests": ({"index": put(manifests=[])}, "there is no image"),
    "manifests in an object": ({"index": put(manifests={})}, "got `object`"),
    "an index that is a manifest": ({"index": put(layers=[])}, "a manifest and an index at once"),
    "an index of schema 1": ({"index": put(schemaVersion=1)}, "schema 1"),
    "an index of schema 3": ({"index": put(schemaVersion=3)}, "schemaVersion of the manifest is 3"),
    "a schema that is a string": ({"index": put(schemaVersion="2")}, "Expected `int`, got `str`"),
    "layers in an object": ({"manifest": put(layers={})}, "got `object`"),
    "layers that are strings": ({"manifest": put(layers=[A])}, "got `str`"),
    "no config": ({"manifest": put(config=None)}, "it has no config"),
    "the last of two configs": (
        {"manifest": lambda value: encoded(value)[:-1] + b', "config": {"digest": "x:y", "size": 1}}'}, "'x:y' is not",
    ),
    "no layers": ({"manifest": put(layers=[])}, "has 0 layers, the config has 1 diff_ids"),
    "a layer twice": (
        {"manifest": lambda value: value | {"layers": value["layers"] * 2}}, "2 layers, the config has 1 diff_ids",
    ),
    "an encrypted layer": ({"manifest": layer(mediaType="application/x.tar+gzip+encrypted")}, "is encrypted"),
    "a layer that is no archive": ({"manifest": layer(mediaType="text/html")}, "not a tar archive but 'text/html'"),
    "no rootfs": ({"config": put(rootfs=None)}, "describes no rootfs"),
    "another rootfs": ({"config": put(rootfs={"type": "x"})}, "describes no rootfs"),
    "diff IDs in an object": ({"config": diff_ids({})}, "got `object`"),
    "no diff IDs": ({"config": diff_ids(None)}, "has 1 layers, the config has 0 diff_ids"),
    "another platform": ({"config": put(os="plan9")}, "the image is for plan9/amd64"),
    "an architecture that is a number": ({"config": put(architecture=64)}, "Expected `str`, got `int`"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image(scene: Scene, name: str) -> None:
    changes, words = BAD_IMAGES[name]
    layout = scene.image().write([Member("a")])
    rewrite(layout, **changes)
    scene.refused("resolve:bad: oci:../layouts/bad", words, stage="resolve")
    assert scene.cached() == set()
    assert not (scene.place.root / "fledge.lock").exists()


@pytest.mark.parametrize("value", [3, "x", [1], {"Cmd": "x"}, {"Env": {}}, {"ExposedPorts": []}, {"WorkingDir": 1}])
def test_a_config_of_other_types(scene: Scene, value: Any) -> None:
    """What only the manifest is made from is looked at then."""
    rewrite(scene.image().write([Member("a")]), config=lambda config: {**config, "config": value})
    result = scene.build()
    assert (result.code, result.stderr.count("error: ")) == (1, 1)
    assert "error: manifest:bad: " in result.stderr and "the OCI config is malformed at config" in result.stderr
    assert not (scene.place.output("bad").parent / "manifest.json").exists()
    scene.recovers()


@pytest.mark.parametrize(
    "created",
    [None, 1, "", "9999-99-99T99:99:99Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", ["2024"], "2" * 99],
)
def test_any_time_of_creation(scene: Scene, created: object) -> None:
    rewrite(scene.image().write([Member("a")]), config=lambda config: {**config, "created": created})
    assert scene.build().code == 0
    [locked] = json.loads((scene.place.root / "fledge.lock").read_bytes())["images"].values()
    assert 0 <= locked["created"] < 1 << 32


@pytest.mark.parametrize("what", ["three levels", "a circle"])
def test_indexes_in_indexes(scene: Scene, what: str) -> None:
    layout = scene.image().write([Member("a")])
    top = json.loads((layout.path / "index.json").read_bytes())
    for _ in range(3):
        data = json.dumps(top).encode()
        if what == "a circle":  # as near as one comes: the name of what it is in
            top = {"schemaVersion": 2, "manifests": [{"digest": A, "size": 0}]}
            top["manifests"][0]["size"] = len(json.dumps(top)) + 2
            data, name = json.dumps(top).encode(), A
        else:
            name = digest(data)
            top = {"schemaVersion": 2, "manifests": [{"digest": name, "size": len(data)}]}
        (layout.path / "blobs" / name.replace(":", "/")).write_bytes(data)
    (layout.path / "index.json").write_bytes(json.dumps(top).encode())
    words = "indexes inside indexes, more than 2 deep" if what == "three levels" else f"blob {A}: found "
    scene.refused("resolve:bad: oci:../layouts/bad", words, stage="resolve")
    scene.recovers()


def test_links_in_a_layout_lead_to_bytes_that_are_checked(scene: Scene) -> None:
    """The layout is the user's own; what a link in it leads to is read, never written, and must be the blob."""
    layout = scene.image().write([Member("a")])
    layout.blob(0).unlink()
    layout.blob(0).symlink_to(scene.outside / "secret")
    scene.refused(layout.blobs[0], "found 6 bytes", stage="fetch")
    layout.blob(0).unlink()
    layout.blob(0).symlink_to(scene.outside / "fifo")
    scene.refused(layout.blobs[0], "found no such file", stage="fetch")
    scene.recovers()


# --- archives --------------------------------------------------------------------------------


def packed(layout: Layout, *hostile: tarfile.TarInfo, into: Path) -> None:
    """Write a layout as an archive, with members in it that nobody asked for."""
    with tarfile.open(into, "w") as archive:
        for info in hostile:
            archive.addfile(info, io.BytesIO(b"x" * info.size) if info.isreg() else None)
        archive.add(layout.path, arcname="")


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 4 if kind == tarfile.REGTYPE else 0
    return info


def test_hostile_members_of_an_archive_are_left_alone(scene: Scene) -> None:
    layout = scene.image(source="oci-archive:../bad.tar").write([Member("a")])
    secret = str(scene.outside / "secret")
    packed(
        layout,
        member(secret), member("../" * 40 + secret), member("link", tarfile.SYMTYPE, str(scene.outside)),
        member("link/secret"), member("hard", tarfile.LNKTYPE, secret), member("blobs", tarfile.SYMTYPE, "/"),
        member("fifo", tarfile.FIFOTYPE), member("device", tarfile.CHRTYPE), member("n" * 10_000),
        into=scene.place.root / "bad.tar",
    )  # fmt: skip
    assert scene.build().code == 0


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_a_blob_that_is_no_file_in_an_archive(scene: Scene, kind: bytes) -> None:
    layout = scene.image(source="oci-archive:../bad.tar").write([Member("a")])
    layout.blob(0).unlink()
    name = f"blobs/sha256/{layout.blobs[0][7:]}"
    packed(layout, member(name, kind, str(scene.outside / "secret")), into=scene.place.root / "bad.tar")
    scene.refused(layout.blobs[0], "found no such file", stage="fetch")


@pytest.mark.parametrize(
    "data", [b"", b"no archive", bytes(10_240), b"\x1f\x8b\x08" + b"x" * 600, b"BZh9" + b"x" * 600]
)
def test_an_archive_that_is_none(scene: Scene, data: bytes) -> None:
    scene.image(source="oci-archive:../bad.tar")
    (scene.place.root / "bad.tar").write_bytes(data)
    scene.refused("resolve:bad: oci-archive:../bad.tar", stage="resolve")


# --- every blob damaged in turn --------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flipped,
    "truncated": lambda data: data[:-1],
    "longer": lambda data: data + b"\n",
    "empty": lambda _: b"",
    "missing": lambda _: None,
}
PARTS = ("index", "manifest", "config", "layer 0", "layer 1")
FORMS = ("oci", "oci-archive", "dir")


class Image:
    """An image of two layers in one of the forms. `files` are its blobs as they should be, by their part."""

    def __init__(self, scene: Scene, form: str) -> None:
        self.scene, self.form = scene, form
        self.source = {"oci": "oci:../layouts/bad", "oci-archive": "oci-archive:../bad.tar", "dir": "dir:../flat"}[form]
        self.layout = scene.image(source=self.source).write([Member("a", b"x" * 100)], [Member("b", b"y" * 100)])
        index = json.loads((self.layout.path / "index.json").read_bytes())
        top = index["manifests"][0]["digest"]
        manifest = json.loads(self._blob(top).read_bytes())
        self.names = dict(zip(PARTS[1:], (top, manifest["config"]["digest"], *self.layout.blobs), strict=True))
        self.files = {part: self._blob(name) for part, name in self.names.items()}
        self.files["index"] = self.layout.path / "index.json"
        if form == "dir":
            flat = scene.place.root / "flat"
            flat.mkdir()
            for part, name in self.names.items():
                target = flat / ("manifest.json" if part == "manifest" else name.removeprefix("sha256:"))
                self.files[part] = Path(shutil.copy(self.files[part], target))
            del self.files["index"]
        self.pack()

    def pack(self) -> None:
        """Bring what was changed to where it is built from."""
        if self.form == "oci-archive":
            packed(self.layout, into=self.scene.place.root / "bad.tar")

    def _blob(self, name: str) -> Path:
        return self.layout.path / "blobs" / name.replace(":", "/")


def damages() -> Iterator[tuple[str, str]]:
    return ((form, part) for form in FORMS for part in PARTS if (form, part) != ("dir", "index"))


@pytest.mark.parametrize(("form", "part"), list(damages()))
def test_a_damaged_blob(scene: Scene, form: str, part: str) -> None:
    image = Image(scene, form)
    stage = "fetch" if part.startswith("layer") else "resolve"
    whole = image.files[part].read_bytes()
    # Nothing promises the bytes of the topmost document: it must be damaged where it matters.
    is_top = part == "index" or (form, part) == ("dir", "manifest")
    for name, damage in DAMAGES.items():
        changed = damage(whole)
        if is_top and name in ("flipped", "longer"):
            changed = {"flipped": b"[" + whole[1:], "longer": whole + b"}"}[name]
        image.files[part].unlink()
        if changed is not None:
            image.files[part].write_bytes(changed)
        image.pack()
        broken = image.names[part] if stage == "fetch" else ""
        error = scene.refused(f": {image.source} (", stage=stage, name=broken)
        if is_top:
            file = "index.json" if part == "index" else "manifest.json"
            assert f"it holds no {file}" in error if changed is None else "is not well-formed" in error
        else:
            size = "no such file" if changed is None else f"{len(changed)} bytes"
            assert f"blob {image.names[part]}: found " in error
            assert size in error and f"expected {len(whole)} bytes" in error
        # The other layer is there, whichever was asked for first.
        assert scene.cached() == ({"resolve", "unpack"} if stage == "fetch" else set())
    image.files[part].write_bytes(whole)
    image.pack()
    result = scene.build()
    assert result.code == 0, result.stderr
