"""Images from every transport but the daemon's, through the real skopeo and a registry on loopback."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fledge_tasks.digest import sha256_bytes, sha256_file
from fledge_tasks.errors import (
    BlobError,
    CommandError,
    FledgeError,
    ImageNotFoundError,
    OfflineError,
    SourceError,
    StoreError,
    ToolError,
)
from fledge_tasks.index import signature
from fledge_tasks.oci.layout import adopt
from fledge_tasks.oci.manifest import Image, LayerRef
from fledge_tasks.oci.reference import parse
from fledge_tasks.oci.source import Resolution, fetch, identity, resolve
from tests.tools import wait_for

AMD64 = "linux/amd64"
LAYER = "application/vnd.oci.image.layer.v1.tar"


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    if missing and os.environ.get("FLEDGE_REQUIRE_TOOLS"):
        raise RuntimeError(f"missing: {missing}")
    return pytest.mark.skipif(bool(missing), reason=f"missing: {missing}")


needs_skopeo = needs("skopeo")
needs_registry = needs("skopeo", "docker-registry")


def layer_tar(name: str, data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


TARS = (layer_tar("a", bytes(range(256)) * 400), layer_tar("b", b"b" * 30_000), layer_tar("c", b"c"))
DIFF_IDS = [sha256_bytes(tar) for tar in TARS]


class Layout:
    """An OCI image layout that is written by hand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        (path / "blobs" / "sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def put(self, data: bytes, **fields: Any) -> dict[str, Any]:
        digest = sha256_bytes(data)
        self.blob(digest).write_bytes(data)
        return {"digest": digest, "size": len(data), **fields}

    def blob(self, digest: str) -> Path:
        return self.path / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def image(
        self, architecture: str = "amd64", tars: Sequence[bytes] = TARS, plain: int | None = None
    ) -> dict[str, Any]:
        """Write an image whose layers are gzip blobs, but for layer `plain`; return its descriptor."""
        config = {
            "os": "linux",
            "architecture": architecture,
            "config": {"Cmd": ["/a"]},
            "rootfs": {"type": "layers", "diff_ids": [sha256_bytes(tar) for tar in tars]},
        }
        layers = [
            self.put(tar, mediaType=LAYER)
            if number == plain
            else self.put(gzip.compress(tar, mtime=0), mediaType=f"{LAYER}+gzip")
            for number, tar in enumerate(tars)
        ]
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.put(json.dumps(config).encode(), mediaType="application/vnd.oci.image.config.v1+json"),
            "layers": layers,
        }
        platform = {"os": "linux", "architecture": architecture}
        return self.put(json.dumps(manifest).encode(), mediaType=manifest["mediaType"], platform=platform)

    def index(self, *entries: dict[str, Any]) -> dict[str, Any]:
        kind = "application/vnd.oci.image.index.v1+json"
        return self.put(
            json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).encode(), mediaType=kind
        )

    def tag(self, name: str | None, descriptor: dict[str, Any]) -> None:
        names = {"annotations": {"org.opencontainers.image.ref.name": name}} if name else {}
        self.entries.append({**descriptor, **names})
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self.entries}))


def archive_of(folder: Path, target: Path, mode: str = "w") -> Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        for path in sorted(folder.rglob("*")):
            archive.add(path, f"./{path.relative_to(folder)}", recursive=False)
    return target


def skopeo(*arguments: str) -> None:
    subprocess.run(["skopeo", *arguments], check=True, capture_output=True, timeout=60)


class Workspace(NamedTuple):
    """`folder` has a ':' in its path, which skopeo cannot stand."""

    folder: Path
    scratch: Path
    into: Path

    def resolve(self, image: str, platform: str = AMD64, *, offline: bool = False) -> Resolution:
        return resolve(parse(image), folder=self.folder, platform=platform, scratch=self.scratch, offline=offline)

    def identity(self, image: str, platform: str = AMD64) -> str | None:
        return identity(parse(image), folder=self.folder, platform=platform)

    def fetch(self, image: str, found: Image, wanted: Sequence[LayerRef], *, offline: bool = False) -> list[int]:
        """Fetch, check that exactly the wanted blobs are there, and return the steps of the progress."""
        steps: list[int] = []
        fetch(
            parse(image),
            found,
            wanted,
            folder=self.folder,
            into=self.into,
            scratch=self.scratch,
            advance=steps.append,
            offline=offline,
        )
        assert {f"sha256:{path.name}" for path in self.into.iterdir()} == {layer.blob for layer in wanted}
        for layer in wanted:
            path = self.into / layer.blob.removeprefix("sha256:")
            assert sha256_file(path) == layer.blob
            assert path.stat().st_size == layer.size
        return steps


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # no logins of the host
    found = Workspace(tmp_path / "a:b", tmp_path / "s:c", tmp_path / "into")
    for folder in found:
        folder.mkdir()
    return found


@pytest.fixture
def layout(workspace: Workspace) -> Layout:
    return Layout(workspace.folder / "img")


def check_image(found: Resolution, origin: str, descriptor: dict[str, Any] | None) -> None:
    assert found.image.origin == origin
    assert found.image.platform == AMD64
    assert found.image.config == sha256_bytes(found.config)
    assert [layer.diff_id for layer in found.image.layers] == DIFF_IDS
    if descriptor:
        assert found.image.manifest == descriptor["digest"]


class TestLocal:
    """Sources that are read without skopeo."""

    def test_an_image_in_a_layout(self, workspace: Workspace, layout: Layout) -> None:
        amd64, arm64 = layout.image(), layout.image("arm64")
        layout.tag("one", amd64)
        layout.tag("multi", layout.index(arm64, amd64))
        for tag in ("one", "multi"):
            found = workspace.resolve(f"oci:img:{tag}")
            check_image(found, "oci", amd64)
            assert found.identity == amd64["digest"] == workspace.identity(f"oci:img:{tag}")
            assert found.blobs is None
        assert workspace.identity("oci:img:multi", "linux/arm64") == arm64["digest"]
        assert sum(workspace.fetch("oci:img:one", found.image, found.image.layers)) == sum(
            layer.size for layer in found.image.layers
        )
        assert list(workspace.scratch.iterdir()) == []

    def test_without_a_tag_there_must_be_one_image(self, workspace: Workspace, layout: Layout) -> None:
        one = layout.image()
        layout.tag("one", one)
        check_image(workspace.resolve("oci:img"), "oci", one)
        layout.tag("two", layout.image("arm64"))
        with pytest.raises(SourceError, match="more than one image: one, two"):
            workspace.resolve("oci:img")
        with pytest.raises(ImageNotFoundError, match="no image named 'three'; there are: one, two"):
            workspace.resolve("oci:img:three")

    @pytest.mark.parametrize("name", [None, "v1"])
    def test_one_name_may_stand_for_several_platforms(
        self, workspace: Workspace, layout: Layout, name: str | None
    ) -> None:
        amd64, arm64 = layout.image(), layout.image("arm64")
        layout.tag(name, arm64)
        layout.tag(name, amd64)
        check_image(workspace.resolve("oci:img"), "oci", amd64)

    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
    def test_an_archive_of_a_layout(self, workspace: Workspace, layout: Layout, mode: str) -> None:
        amd64 = layout.image()
        layout.tag("one", amd64)
        path = archive_of(layout.path, workspace.folder / "x.tar", mode)
        found = workspace.resolve("oci-archive:x.tar:one")
        check_image(found, "oci-archive", amd64)
        assert found.identity == workspace.identity("oci-archive:x.tar:one")
        assert sum(workspace.fetch("oci-archive:x.tar", found.image, found.image.layers[1:])) > 0
        os.utime(path, ns=(1, 1))
        assert found.identity == workspace.identity("oci-archive:x.tar:one") == sha256_file(path)
        seen: list[Path] = []
        reference = parse("oci-archive:x.tar:one")
        arguments: dict[str, Any] = {"folder": workspace.folder, "platform": AMD64}

        def digest_of(path: Path) -> str:
            seen.append(path)
            return "known"

        assert identity(reference, digest_of=digest_of, **arguments) == "known"
        assert seen == [path]

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
    def test_only_regular_members_of_archives_are_read(self, workspace: Workspace, kind: bytes) -> None:
        with tarfile.open(workspace.folder / "x.tar", "w") as archive:
            member = tarfile.TarInfo("index.json")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        with pytest.raises(ImageNotFoundError, match=r"holds no index\.json"):
            workspace.resolve("oci-archive:x.tar")

    @pytest.mark.parametrize("part", [0, 0.1, 0.5])
    @pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
    def test_a_torn_archive_is_refused(self, workspace: Workspace, layout: Layout, mode: str, part: float) -> None:
        layout.tag("one", layout.image())
        path = archive_of(layout.path, workspace.folder / "x.tar", mode)
        os.truncate(path, int(path.stat().st_size * part))
        with pytest.raises(SourceError):
            workspace.resolve("oci-archive:x.tar")

    @pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
    def test_a_damaged_archive_is_refused(self, workspace: Workspace, layout: Layout, mode: str) -> None:
        layout.tag("one", layout.image())
        path = archive_of(layout.path, workspace.folder / "x.tar", mode)
        image, data = workspace.resolve("oci-archive:x.tar").image, path.read_bytes()
        refused = 0
        for at in range(0, len(data), len(data) // 40):
            path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
            try:
                assert workspace.resolve("oci-archive:x.tar").image == image
                workspace.fetch("oci-archive:x.tar", image, image.layers)
            except SourceError:
                refused += 1
            for blob in workspace.into.iterdir():
                blob.unlink()
        assert refused > 20

    @pytest.mark.parametrize(
        "size", [b"\x80" + b"\x7f" * 11, b"\x80" + bytes(5) + b"\x40" + bytes(5), b"0" * 11 + b" "]
    )
    def test_extended_headers_of_no_archive_are_refused(self, workspace: Workspace, size: bytes) -> None:
        """They are of more bytes than a file has, or than memory; or there are more of them than fit the stack."""
        header = tarfile.TarInfo("x")
        header.type = tarfile.XHDTYPE
        data = bytearray(header.tobuf())
        data[124:136], data[148:156] = size, b" " * 8
        data[148:156] = b"%06o\0 " % sum(data)
        (workspace.folder / "x.tar").write_bytes(bytes(data) * 2000 + bytes(10240))
        with pytest.raises(SourceError, match=r"cannot be read: ."):
            workspace.resolve("oci-archive:x.tar")

    def test_wrong_forms_are_named(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image())
        archive_of(layout.path, workspace.folder / "x.tar")
        wrong = {"oci-archive:img": "a folder", "docker-archive:img:x": "a folder", "oci:x.tar": "a file"}
        wrong["dir:x.tar"] = "a file"
        for image, found in wrong.items():
            for ask in (workspace.resolve, workspace.identity):
                with pytest.raises(SourceError, match=f"is {found}") as caught:
                    ask(image)
                assert type(caught.value) is SourceError
        with pytest.raises(ImageNotFoundError, match=r"holds no manifest\.json"):
            workspace.resolve("dir:img")

    @pytest.mark.parametrize("image", ["oci:no/img", "oci-archive:no.tar", "docker-archive:no.tar:x", "dir:no"])
    def test_a_missing_path_is_named_in_full(self, workspace: Workspace, image: str) -> None:
        reference = parse(image)
        for ask in (workspace.resolve, workspace.identity):
            with pytest.raises(ImageNotFoundError) as caught:
                ask(image)
            assert str(workspace.folder / reference.path) in caught.value.message
            assert caught.value.where == image
            assert str(workspace.folder) in (caught.value.hint or "")

    def test_every_damaged_blob_is_found(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag(None, layout.image())
        found = workspace.resolve("oci:img").image
        for digest in [found.manifest, found.config, *(layer.blob for layer in found.layers)]:
            blob = layout.blob(digest)
            good = blob.read_bytes()
            for bad in (good[:-1], good + b"\0", bytes([good[0] ^ 1]) + good[1:], None):
                blob.unlink()
                if bad is not None:
                    blob.write_bytes(bad)
                with pytest.raises(BlobError, match=digest) as caught:
                    workspace.fetch("oci:img", workspace.resolve("oci:img").image, found.layers)
                assert "oci:img" in (caught.value.where or "")
                assert not (workspace.into / digest.removeprefix("sha256:")).exists()
            blob.unlink(missing_ok=True)
            blob.write_bytes(good)
        assert list(workspace.scratch.iterdir()) == []

    def test_a_fifo_among_the_blobs_does_not_hang(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag(None, layout.image())
        found = workspace.resolve("oci:img").image
        layout.blob(found.layers[0].blob).unlink()
        os.mkfifo(layout.blob(found.layers[0].blob))
        with pytest.raises(BlobError, match="no such file"):
            workspace.fetch("oci:img", found, found.layers)

    def test_a_layer_that_is_there_twice_is_fetched_once(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag(None, layout.image(tars=[TARS[0], TARS[1], TARS[0]]))
        found = workspace.resolve("oci:img").image
        assert len(found.layers) == 3
        assert sum(workspace.fetch("oci:img", found, found.layers)) == found.layers[0].size + found.layers[1].size

    def test_a_platform_that_is_not_there(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag("multi", layout.index(layout.image()))
        layout.tag("one", layout.image())
        with pytest.raises(SourceError, match="no image for linux/arm64; there are: linux/amd64"):
            workspace.resolve("oci:img:multi", "linux/arm64")
        with pytest.raises(SourceError, match="the image is for linux/amd64, asked for was linux/arm64"):
            workspace.resolve("oci:img:one", "linux/arm64")

    def test_an_unnecessary_fetch_starts_nothing(self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nonexistent")
        image = Image("docker", DIFF_IDS[0], DIFF_IDS[0], AMD64, ())
        assert workspace.fetch("no.invalid/x", image, []) == []

    def test_adopting_checks_and_keeps_the_blob(self, tmp_path: Path) -> None:
        layer = LayerRef(DIFF_IDS[0], sha256_bytes(b"good"), 4, "")
        target = tmp_path / layer.blob.removeprefix("sha256:")
        (tmp_path / "blob").write_bytes(b"good")
        target.write_bytes(b"torn")
        adopt(tmp_path / "blob", layer, tmp_path, where="here")
        assert target.read_bytes() == b"good"
        (tmp_path / "bad").write_bytes(b"evil")
        with pytest.raises(BlobError, match=sha256_bytes(b"evil")):
            adopt(tmp_path / "bad", layer, tmp_path, where="here")
        assert not target.exists()


@needs_skopeo
class TestExports:
    """Sources that skopeo exports, and what it writes itself."""

    def test_a_dir_of_skopeo(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", amd64 := layout.image())
        layout.tag("multi", layout.index(layout.image("arm64"), amd64))
        (workspace.folder.parent / "link").symlink_to(layout.path)
        link = workspace.folder.parent / "link"
        for number, options in enumerate([["copy"], ["copy", "--all"]]):
            target = workspace.folder.parent / f"d{number}"
            skopeo("--override-os", "linux", "--override-arch", "amd64", *options, f"oci:{link}:multi", f"dir:{target}")
            target.rename(workspace.folder / target.name)
            image = f"dir:{target.name}"
            found = workspace.resolve(image)
            check_image(found, "dir", amd64)
            assert found.identity == workspace.identity(image)
            workspace.fetch(image, found.image, found.image.layers)
            (workspace.folder / target.name / "version").write_text("other")
            assert found.identity != workspace.identity(image)

    def docker_archive(self, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image())
        target = workspace.folder.parent / "d.tar"
        (workspace.folder.parent / "link").symlink_to(layout.path)
        skopeo("copy", f"oci:{workspace.folder.parent}/link:one", f"docker-archive:{target}:x/y:1")
        target.rename(workspace.folder / "d:1.tar")
        (workspace.folder / "d.tar").symlink_to("d:1.tar")

    @pytest.mark.parametrize("image", ["docker-archive:d.tar", "docker-archive:d.tar:x/y:1"])
    def test_a_docker_archive(self, workspace: Workspace, layout: Layout, image: str) -> None:
        self.docker_archive(workspace, layout)
        found = workspace.resolve(image)
        check_image(found, "docker-archive", None)
        assert [layer.blob for layer in found.image.layers] == DIFF_IDS
        assert found.identity == workspace.identity(image)
        # The export can be taken as it is; fetch would export again.
        assert found.blobs is not None and found.blobs.is_relative_to(workspace.scratch)
        for layer in found.image.layers:
            adopt(found.blobs / layer.blob.removeprefix("sha256:"), layer, workspace.into, where=image)
        shutil.rmtree(found.blobs.parent)
        shutil.rmtree(workspace.into)
        workspace.into.mkdir()
        wanted = found.image.layers[1:]
        assert sum(workspace.fetch(image, found.image, wanted)) == sum(layer.size for layer in wanted)
        assert list(workspace.scratch.iterdir()) == []

    def test_a_name_that_is_not_in_the_archive(self, workspace: Workspace, layout: Layout) -> None:
        self.docker_archive(workspace, layout)
        with pytest.raises(ImageNotFoundError, match="no such image"):
            workspace.resolve("docker-archive:d.tar:x/y:2")
        assert list(workspace.scratch.iterdir()) == []

    def test_an_archive_that_changed_meanwhile(self, workspace: Workspace, layout: Layout) -> None:
        self.docker_archive(workspace, layout)
        found = workspace.resolve("docker-archive:d.tar").image
        layout.entries.clear()
        layout.tag("one", layout.image(tars=TARS[:2]))
        (workspace.folder / "d:1.tar").unlink()
        target = workspace.folder.parent / "d.tar"
        skopeo("copy", f"oci:{workspace.folder.parent}/link:one", f"docker-archive:{target}:x/y:1")
        target.rename(workspace.folder / "d:1.tar")
        with pytest.raises(SourceError, match="changed meanwhile") as caught:
            workspace.fetch("docker-archive:d.tar", found, found.layers)
        assert caught.value.hint == "run again"
        assert list(workspace.into.iterdir()) == []

    def test_containers_storage(self, workspace: Workspace, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
        store = workspace.folder.parent / "storage"
        config = workspace.folder.parent / "storage.conf"
        config.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{store}"\nrunroot = "{store}/run"\n')
        monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(config))
        layout.tag("one", amd64 := layout.image())
        (workspace.folder.parent / "link").symlink_to(layout.path)
        try:
            skopeo("copy", f"oci:{workspace.folder.parent}/link:one", "containers-storage:localhost/x:1")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"containers-storage cannot be used here: {error.stderr!r}")
        image = "containers-storage:localhost/x:1"
        found = workspace.resolve(image)
        check_image(found, "containers-storage", None)
        assert found.identity == workspace.identity(image) == amd64["digest"]
        workspace.fetch(image, found.image, found.image.layers[:1])
        for ask in (workspace.resolve, workspace.identity):
            with pytest.raises(ImageNotFoundError):
                ask("containers-storage:localhost/x:2")


class Registry:
    """A docker-registry on loopback and its access log."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{probe.getsockname()[1]}"
        self.data = folder / "data"
        self._log = folder / "log"
        config = {
            "version": "0.1",
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(self.data)}},
            "http": {"addr": self.host},
        }
        (folder / "config.yml").write_text(json.dumps(config))
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", str(folder / "config.yml")], stdout=log, stderr=log
            )
        self._wait(self._connects)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(10)

    def blob(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self.data / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def forget(self) -> None:
        """Empty the access log."""
        os.truncate(self._log, 0)

    def requests(self, until: str) -> list[str]:
        """Return the 'METHOD path' of all requests since `forget`; one of them must hold `until`."""
        found: list[str] = []

        def is_there() -> bool:
            found[:] = [
                " ".join(part.split()[:2])
                for part in self._log.read_text().split('"')
                if part.startswith(("GET /v2/", "HEAD /v2/"))
            ]
            return any(until in line for line in found)

        self._wait(is_there)
        return found

    def _connects(self) -> bool:
        with socket.socket() as probe:
            host, port = self.host.split(":")
            return probe.connect_ex((host, int(port))) == 0

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not done():
            assert time.monotonic() < deadline, self._log.read_text()
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.02)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    registry = Registry(tmp_path_factory.mktemp("registry"))
    yield registry
    registry.stop()


@pytest.fixture
def registry(served: Registry, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry that the user's registries.conf allows to speak plain HTTP."""
    home = workspace.folder.parent / "home"
    (home / ".config/containers").mkdir(parents=True)
    (home / ".config/containers/registries.conf").write_text(
        f'[[registry]]\nlocation = "{served.host}"\ninsecure = true\n'
    )
    monkeypatch.setenv("HOME", str(home))
    return served


def push(registry: Registry, layout: Layout, tag: str, name: str, *options: str) -> str:
    link = layout.path.parent.parent / "pushed"
    link.unlink(missing_ok=True)
    link.symlink_to(layout.path)
    skopeo("copy", *options, f"oci:{link}:{tag}", f"docker://{registry.host}/{name}")
    return f"{registry.host}/{name}"


@needs_registry
class TestRegistry:
    @pytest.mark.parametrize("prefix", ["docker://", ""])
    def test_an_index_leads_to_the_image_of_a_platform(
        self, registry: Registry, workspace: Workspace, layout: Layout, prefix: str
    ) -> None:
        amd64, arm64 = layout.image(), layout.image("arm64")
        layout.tag("multi", index := layout.index(arm64, amd64))
        image = prefix + push(registry, layout, "multi", "t/multi:1", "--all")
        found = workspace.resolve(image)
        check_image(found, "docker", amd64)
        assert found.identity == amd64["digest"]
        assert workspace.identity(image) is None
        assert workspace.resolve(image, "linux/arm64").image.manifest == arm64["digest"]
        pinned = image.rpartition(":")[0] + f":no-such-tag@{index['digest']}"
        assert workspace.resolve(pinned) == found
        with pytest.raises(SourceError, match="no image for linux/s390x; there are: linux/arm64, linux/amd64"):
            workspace.resolve(image, "linux/s390x")

    @pytest.mark.parametrize("form", ["oci", "v2s2"])
    def test_only_wanted_blobs_are_transferred_and_by_digest(
        self, registry: Registry, workspace: Workspace, layout: Layout, form: str
    ) -> None:
        layout.tag("one", layout.image())
        image = push(registry, layout, "one", f"t/{form}:1", "--format", form)
        found = workspace.resolve(image).image
        assert [layer.diff_id for layer in found.layers] == DIFF_IDS
        first, second, third = found.layers
        registry.forget()
        assert sum(workspace.fetch(image, found, [second])) == second.size
        asked = registry.requests(until=second.blob)
        assert any(found.manifest in line for line in asked)
        assert not any(first.blob in line or third.blob in line for line in asked), asked
        assert not any(line.endswith("/manifests/1") for line in asked), asked
        assert list(workspace.scratch.iterdir()) == []

    def test_layers_that_are_not_compressed_stay_so(
        self, registry: Registry, workspace: Workspace, layout: Layout
    ) -> None:
        layout.tag("one", layout.image(plain=0))
        dir_target = workspace.folder.parent / "plain"
        push(registry, layout, "one", "t/first:1")
        skopeo("copy", f"oci:{workspace.folder.parent}/pushed:one", f"dir:{dir_target}")
        skopeo("copy", "--preserve-digests", f"dir:{dir_target}", f"docker://{registry.host}/t/plain:1")
        found = workspace.resolve(f"{registry.host}/t/plain:1").image
        assert found.layers[0].blob == found.layers[0].diff_id == DIFF_IDS[0]
        workspace.fetch(f"{registry.host}/t/plain:1", found, found.layers)

    def test_a_moved_tag_does_not_change_what_is_fetched(
        self, registry: Registry, workspace: Workspace, layout: Layout
    ) -> None:
        layout.tag("one", layout.image())
        layout.tag("two", layout.image(tars=TARS[::-1]))
        image = push(registry, layout, "one", "t/moving:1")
        found = workspace.resolve(image).image
        push(registry, layout, "two", "t/moving:1")
        workspace.fetch(image, found, found.layers)
        assert workspace.resolve(image).image != found

    def test_a_damaged_blob_is_named(self, registry: Registry, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image(tars=[layer_tar("damaged", b"1"), layer_tar("damaged", b"2")]))
        image = push(registry, layout, "one", "t/damaged:1")
        found = workspace.resolve(image).image
        blob = registry.blob(found.layers[0].blob)
        good = blob.read_bytes()
        blob.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        with pytest.raises(BlobError, match=f"blob {found.layers[0].blob}: found sha256:") as caught:
            workspace.fetch(image, found, found.layers)
        assert registry.host in (caught.value.where or "")
        blob.write_bytes(good[:-3])
        with pytest.raises(SourceError):
            workspace.fetch(image, found, found.layers)
        blob.unlink()
        with pytest.raises(SourceError):
            workspace.fetch(image, found, found.layers)
        assert not (workspace.into / found.layers[0].blob.removeprefix("sha256:")).exists()

    def test_a_damaged_config_is_found(self, registry: Registry, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image(tars=[layer_tar("config", b"")]))
        image = push(registry, layout, "one", "t/config:1")
        blob = registry.blob(workspace.resolve(image).image.config)
        good = blob.read_bytes()
        blob.write_bytes(good.replace(b"/a", b"/b"))
        with pytest.raises(BlobError, match=f"blob {sha256_bytes(good)}: found sha256:"):
            workspace.resolve(image)

    def test_what_is_not_there(self, registry: Registry, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image())
        image = push(registry, layout, "one", "t/there:1")
        for missing in (image + "2", f"{registry.host}/t/nowhere", f"{registry.host}/t/there@{DIFF_IDS[0]}"):
            with pytest.raises(ImageNotFoundError, match="no such image") as caught:
                workspace.resolve(f"docker://{missing}")
            assert "command: " in caught.value.message
            assert "Docker daemon" not in caught.value.message
            with pytest.raises(ImageNotFoundError, match="no such image") as caught:
                workspace.resolve(missing)
            assert "the Docker daemon was asked first: there is no Docker daemon" in caught.value.message

    def test_offline_nothing_is_asked(self, registry: Registry, workspace: Workspace, layout: Layout) -> None:
        layout.tag("one", layout.image())
        image = push(registry, layout, "one", "t/offline:1")
        found = workspace.resolve(image).image
        registry.forget()
        for text in (image, f"docker://{image}"):
            with pytest.raises(OfflineError):
                workspace.resolve(text, offline=True)
            with pytest.raises(OfflineError, match="would have to be fetched, which --offline forbids"):
                workspace.fetch(text, found, found.layers, offline=True)
        assert workspace.fetch(image, found, [], offline=True) == []
        workspace.resolve(image)
        assert len(registry.requests(until="/blobs/")) < 10  # those of the last call

    def test_plain_http_must_be_allowed(self, served: Registry, workspace: Workspace, monkeypatch: Any) -> None:
        monkeypatch.setenv("HOME", str(workspace.scratch))
        with pytest.raises(SourceError, match="speaks plain HTTP") as caught:
            workspace.resolve(f"docker://{served.host}/x")
        assert "insecure = true" in (caught.value.hint or "")


@needs_skopeo
def test_a_registry_that_is_not_there(workspace: Workspace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(SourceError, match="cannot be reached"):
        workspace.resolve(f"docker://127.0.0.1:{port}/x")


def test_skopeo_is_needed(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(argv: Sequence[str], **_: object) -> bytes:
        raise ToolError(f"{argv[0]} is not installed")

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", absent)
    with pytest.raises(ToolError, match="skopeo"):
        workspace.resolve("docker://no.invalid/x")


@pytest.mark.parametrize(
    ("stderr", "kind", "meaning", "hint"),
    [
        ("open /etc/containers/policy.json: no such file or directory", SourceError, "policy", "policy.json"),
        ("Source image rejected: Running image docker://x is rejected by policy.", SourceError, "policy", "policy"),
        ('reading JSON file "/run/containers/9/auth.json": open /run/containers/9/auth.json: permission denied',
         SourceError, "may not read its file with logins", "XDG_RUNTIME_DIR"),
        ("x509: certificate signed by unknown authority", SourceError, "certificate", "certs.d"),
        ("errors:\ndenied: requested access to the resource is denied\nunauthorized: authentication required",
         SourceError, "does not let us read", "skopeo login"),
        ("unable to retrieve auth token: invalid username/password", SourceError, "let us", "REGISTRY_AUTH"),
        ("toomanyrequests: You have reached your pull rate limit", SourceError, "limits the rate", "skopeo login"),
        ("reading manifest 9 in docker.io/library/x: manifest unknown", ImageNotFoundError, "no such image", "name"),
        ("name unknown: repository name not known to registry", ImageNotFoundError, "no such image", "name"),
        ("StatusCode: 404, <html>", ImageNotFoundError, "no such image", "name"),
        ("dial tcp: lookup no.invalid: no such host", SourceError, "cannot be reached", "network"),
        ("read tcp 1.2.3.4: i/o timeout", SourceError, "cannot be reached", "proxy"),
        ("write /tmp/x: no space left on device", SourceError, "no space", "TMPDIR"),
        (f"Digest did not match, expected {DIFF_IDS[0]}, got {DIFF_IDS[1]}",
         BlobError, f"blob {DIFF_IDS[0]}: found {DIFF_IDS[1]}", "push"),
        (f"reading blob {DIFF_IDS[0]}: Error fetching blob: invalid status code from registry 404 (Not Found)",
         BlobError, f"blob {DIFF_IDS[0]}: the registry has not got it", "push"),
        ("Error reading configuration blob: Error fetching blob: invalid status code from registry 404 (Not Found)",
         BlobError, "has not got a blob that its manifest names", "push"),
        (f"reading blob {DIFF_IDS[0]}: fetching blob: blob unknown to registry",
         BlobError, f"blob {DIFF_IDS[0]}: the registry has not got it", "push"),
        ("something new", SourceError, "skopeo exited", ""),
    ],
)  # fmt: skip
def test_failures_of_skopeo_are_explained(
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
    *,
    stderr: str,
    kind: type[FledgeError],
    meaning: str,
    hint: str,
) -> None:
    def fails(argv: Sequence[str], **_: object) -> bytes:
        raise CommandError(f"skopeo exited with 1\n  command: {argv}\n  {stderr}", returncode=1, stderr=stderr)

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", fails)
    with pytest.raises(SourceError) as caught:
        workspace.resolve("docker://host.invalid/x")
    assert type(caught.value) is kind
    assert meaning in caught.value.message
    assert stderr in caught.value.message
    assert hint in (caught.value.hint or "")
    assert caught.value.where == "docker://host.invalid/x:latest"
    assert list(workspace.scratch.iterdir()) == []


def test_foreign_layers_are_exported(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The OCI layout that skopeo writes leaves them out; a `dir:` folder does not."""
    config = b'{"os":"linux","architecture":"amd64"}'
    layer = LayerRef(DIFF_IDS[0], DIFF_IDS[0], len(TARS[0]), "application/vnd.oci.image.layer.nondistributable.v1.tar")
    image = Image("docker", DIFF_IDS[1], sha256_bytes(config), AMD64, (layer,))
    seen: list[Sequence[str]] = []

    def exports(argv: Sequence[str], *, cwd: Path, **_: object) -> bytes:
        seen.append(argv)
        folder = cwd / "export"
        folder.mkdir()
        (folder / hashlib.sha256(TARS[0]).hexdigest()).write_bytes(TARS[0])
        manifest = {"schemaVersion": 2, "config": {"digest": image.config, "size": len(config)}, "layers": []}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return b""

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", exports)
    assert sum(workspace.fetch("host.invalid/x:1", image, [layer])) == layer.size
    assert [argv[-2:] for argv in seen] == [[f"docker://host.invalid/x@{image.manifest}", "dir:export"]]


def test_blobs_are_told_while_others_are_on_their_way(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, whole and checked; what is moved away is not missed, and placeholders are not told."""
    layers = [LayerRef(digest, digest, len(tar), "tar") for digest, tar in zip(DIFF_IDS, TARS, strict=True)]
    kept = LayerRef(DIFF_IDS[0], f"sha256:{9:064}", 7, "tar")
    image = Image("docker", DIFF_IDS[1], DIFF_IDS[0], AMD64, (kept, *layers))
    told: list[str] = []

    def copies(_argv: Sequence[str], *, cwd: Path, **_: object) -> bytes:
        blobs = cwd / "layout" / "blobs" / "sha256"
        assert [path.name for path in blobs.iterdir()] == [f"{9:064}"]
        for layer, tar in zip(layers, TARS, strict=True):
            (cwd / "layout" / "part").write_bytes(tar)
            (cwd / "layout" / "part").rename(blobs / layer.blob.removeprefix("sha256:"))
            if layer != layers[-1]:
                wait_for(partial(told.__contains__, layer.blob))
        return b""

    def arrived(layer: LayerRef) -> None:
        path = workspace.into / layer.blob.removeprefix("sha256:")
        assert sha256_file(path) == layer.blob
        path.unlink()
        told.append(layer.blob)

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", copies)
    steps: list[int] = []
    fetch(
        parse("host.invalid/x:1"), image, layers, folder=workspace.folder, into=workspace.into,
        scratch=workspace.scratch, advance=steps.append, arrived=arrived,
    )  # fmt: skip
    assert told == [layer.blob for layer in layers]
    assert sum(steps) == sum(layer.size for layer in layers)
    assert list(workspace.into.iterdir()) == list(workspace.scratch.iterdir()) == []


@pytest.mark.parametrize("media_type", ["tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"])
def test_what_arrived_does_not_change(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, media_type: str) -> None:
    """Nobody needs to read it again; and a skopeo that tries again finds something in the place of what it had."""
    config = b'{"os":"linux","architecture":"amd64"}'
    layers = [LayerRef(digest, digest, len(tar), media_type) for digest, tar in zip(DIFF_IDS, TARS, strict=True)]
    image = Image("docker", DIFF_IDS[1], sha256_bytes(config), AMD64, tuple(layers))
    seen: dict[Path, list[int]] = {}

    def copies(argv: Sequence[str], *, cwd: Path, **_: object) -> bytes:
        is_export = argv[-1] == "dir:export"
        blobs = cwd / "export" if is_export else cwd / "layout" / "blobs" / "sha256"
        blobs.mkdir(exist_ok=True)
        for number, (layer, tar) in enumerate(zip(layers, TARS, strict=True)):
            blob = blobs / layer.blob.removeprefix("sha256:")
            (cwd / "part").write_bytes(tar)
            (cwd / "part").rename(blob)
            if not is_export and number == 0:
                wait_for(lambda: len(seen) == 1)
                assert (blob.stat().st_size, blob.stat().st_blocks) == (layer.size, 0)
        manifest = {"schemaVersion": 2, "config": {"digest": image.config, "size": len(config)}, "layers": []}
        (blobs / "manifest.json").write_text(json.dumps(manifest))
        return b""

    def arrived(layer: LayerRef) -> None:
        path = workspace.into / layer.blob.removeprefix("sha256:")
        seen[path] = signature(path.stat())

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", copies)
    fetch(
        parse("host.invalid/x:1"), image, layers, folder=workspace.folder, into=workspace.into,
        scratch=workspace.scratch, advance=lambda _: None, arrived=arrived,
    )  # fmt: skip
    assert len(seen) == len(layers)
    assert {path: signature(path.stat()) for path in seen} == seen


def test_what_cannot_be_taken_is_an_error_of_the_fetch(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LayerRef(DIFF_IDS[0], DIFF_IDS[0], len(TARS[0]), "tar")
    tries: list[LayerRef] = []

    def copies(_argv: Sequence[str], *, cwd: Path, **_: object) -> bytes:
        (cwd / "layout" / "blobs" / "sha256" / layer.blob.removeprefix("sha256:")).write_bytes(TARS[0])
        wait_for(lambda: len(tries) == 1)
        return b""

    def arrived(layer: LayerRef) -> None:
        tries.append(layer)
        raise StoreError("no space left")

    monkeypatch.setattr("fledge_tasks.oci.skopeo.run", copies)
    with pytest.raises(StoreError, match="no space left"):
        fetch(
            parse("host.invalid/x:1"), Image("docker", DIFF_IDS[1], DIFF_IDS[0], AMD64, (layer,)), [layer],
            folder=workspace.folder, into=workspace.into, scratch=workspace.scratch, advance=lambda _: None,
            arrived=arrived,
        )  # fmt: skip
    assert tries == [layer]
    assert list(workspace.scratch.iterdir()) == []
