"""Writes the seed corpus of the fuzz targets: small inputs of every kind that the readers tell apart.

Run it after changing a target: python -m tests.corpus.make. Findings, whose names start with
'found-', are kept.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import zstandard

from tests.layers import Member, archive, compress, folder, hardlink, symlink

HERE = Path(__file__).parent
"""Has a folder for each target."""

_RS = b"\x1e"


def _tar(*members: Member, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002
    """Return an archive without the zeros at its end, which no reader needs."""
    return archive(members, format).rstrip(b"\0").ljust(1, b"\0")


def _padded(tar: bytes) -> bytes:
    return tar + bytes(-len(tar) % 512)


def _sparse(**records: str) -> bytes:
    return _pax({f"GNU.sparse.{key}": value for key, value in records.items()})


def _pax(records: dict[str, str]) -> bytes:
    """Return an archive of one file with these extended records; its data is a sparse map of format 1.0."""
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("f")
            info.pax_headers = records
            info.size = 512
            tar.addfile(info, io.BytesIO(b"1\n0\n1\n".ljust(512, b"x")))
        return _padded(file.getvalue().rstrip(b"\0"))


def _header(name: bytes, kind: bytes, size: int, magic: bytes = b"ustar  \0") -> bytearray:
    info = tarfile.TarInfo(name.decode())
    info.size = size
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = kind
    header[257:265] = magic
    return header


def _old_gnu_sparse() -> bytes:
    header = _header(b"sparse", b"S", 512)
    header[386:410] = b"%011o\0%011o\0" % (4096, 512)
    header[483:495] = b"%011o\0" % 8192
    return bytes(header) + b"y" * 512


def layers() -> dict[str, bytes]:
    """Return archives, and blobs that are more than a compressed archive."""
    tree = _padded(
        _tar(folder("./a"), Member("a/f", b"data", mtime="-1.5"), symlink("a/s", "../f"), hardlink("a/h", "a/f"))
    )
    archives = {
        "tree": tree,
        "gnu": _padded(_tar(Member("n" * 120, b"x", uid=1 << 22), symlink("s", "t" * 120), format=tarfile.GNU_FORMAT)),
        "ustar": _padded(_tar(Member("p" * 90 + "/" + "n" * 90), format=tarfile.USTAR_FORMAT)),
        "devices": _padded(_tar(
            Member("c", type=tarfile.CHRTYPE, rdev=(1, 3)), Member("b", type=tarfile.BLKTYPE, rdev=(259, 70_000)),
            Member("p", type=tarfile.FIFOTYPE),
        )),
        "xattrs": _padded(_tar(Member("f", xattrs={"user.a": b"\0\xff", "security.capability": b"\1" * 20}))),
        "libarchive": _pax({"LIBARCHIVE.xattr.user.a": "YQ"}),
        "whiteouts": _padded(_tar(folder("a"), Member("a/.wh.b"), Member("a/.wh..wh..opq"), Member(".wh.l"))),
        "out": _padded(_tar(Member("../../x"), Member("/out/y"), Member("loop/z"), hardlink("o", "../../etc/passwd"))),
        "sparse-0.0": _sparse(offset="0", numbytes="512", numblocks="1", size="9000"),
        "sparse-0.1": _sparse(map="4096,512", numblocks="1", size="9000", name="g"),
        "sparse-1.0": _sparse(major="1", minor="0", realsize="9000"),
        "sparse-old": _old_gnu_sparse(),
        "numbers": _pax(
            {"uid": "4294967295", "gid": "0", "mtime": "-9223372036.854775807", "size": "512", "path": "q"}
        ),
        "global": bytes(_header(b"g", b"g", 11, b"ustar\x0000")) + b"11 mtime=1\n".ljust(512, b"\0") + tree,
    }  # fmt: skip
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(tree)
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip"
    blobs = {
        "members.gz": compress(tree[:700]) + compress(tree[700:]) + bytes(20),
        "garbage.gz": compress(tree) + b"garbage",
        "frames.zst": skippable + frame + frame,
        "garbage.zst": frame + b"garbage",
        "bomb.gz": compress(bytes(5 << 20)),
        "bomb.zst": compress(bytes(5 << 20), "zstd"),
    }
    found = {f"{name}-{mode}": bytes([mode]) + tar for name, tar in archives.items() for mode in (4,)}
    found |= {f"tree-{mode}": bytes([mode]) + tree for mode in (0, 5, 6, 13, 14)}
    return found | {name: b"\3" + blob for name, blob in blobs.items()}


def _image(config: object, *, count: int = 1, index: bool = False, **fields: object) -> bytes:
    """Return the blobs of an image, joined: config, manifest, perhaps an inner index, index."""
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": "sha256:" + "1" * 64, "size": 10}
    manifest = {"schemaVersion": 2, "config": {"digest": "@D0", "size": 0, "mediaType": "c"}, "layers": [layer] * count}
    parts = [json.dumps(config), json.dumps({**manifest, **fields}).replace('"size": 0', '"size": @S0')]
    for number in range(1, 3 if index else 2):
        entry = {"digest": f"@D{number}", "size": 0, "platform": {"os": "linux", "architecture": "amd64"}}
        text = json.dumps({"schemaVersion": 2, "manifests": [entry]})
        parts.append(text.replace('"size": 0', f'"size": @S{number}'))
    return _RS.join(part.encode() for part in parts)


def manifests() -> dict[str, bytes]:
    """Return inputs of the parsers; the first byte chooses one."""
    config = {
        "created": "2024-01-02T03:04:05.678Z", "architecture": "amd64", "os": "linux", "variant": "v1",
        "config": {
            "Cmd": ["/bin/app"], "Entrypoint": [""], "Env": ["A=b"], "WorkingDir": "/", "ExposedPorts": {"80/tcp": {}},
        },
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "2" * 64]},
    }  # fmt: skip
    flat = _image(config).rpartition(_RS)[0]
    blobs = io.BytesIO()
    with tarfile.open(fileobj=blobs, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("index.json")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
        info = tarfile.TarInfo("é" * 80)
        info.type, info.linkname = tarfile.LNKTYPE, "index.json"
        tar.addfile(info)
    gnu = io.BytesIO()
    with tarfile.open(fileobj=gnu, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("n" * 120))
    digest = "sha256:" + "3" * 64
    lock = {
        "version": 1,
        "images": {"oci:x linux/amd64": {"identity": digest, "created": 1, "image": {
            "origin": "oci", "manifest": digest, "config": digest, "platform": "linux/amd64",
            "layers": [{"diff_id": digest, "blob": digest, "size": 1, "media_type": ""}],
        }}},
        "agents": {"http": {"digest": digest}},
    }  # fmt: skip
    toml = (
        'version = "1"\nstrategy = "oci_rootfs"\n[source]\nimage = "nginx:alpine"\nplatform = "linux/arm/v7"\n'
        '[filesystem]\ntype = "ext4"\nsize_buffer_mb = 1\npreallocate = true\n[mappings]\n"./a" = "/b"\n'
        '[agent]\nsource_strategy = "http"\nurl = "http://h/k"\n[limits]\nlayer_mb = 1\nentries = 2\nratio = 3\n'
        '[manifest]\nname = "n"\n[manifest.labels]\na = "b"\n'
    )
    inner = 'name = "n"\n[workload]\nentrypoint = ["/a"]\nenv = { A = "b" }\n[[disks]]\nname = "d"\nsource = "/d"\n'
    texts = {
        "0-image": _image(config),
        "0-index": _image(config, index=True),
        "0-none": _image({**config, "rootfs": {"type": "layers", "diff_ids": None}}, count=0),
        "1-folder": flat,
        "2-pax.tar": _padded(blobs.getvalue().rstrip(b"\0")),
        "2-gnu.tar": gnu.getvalue()[:2048],
        "2-pax.tar.gz": compress(blobs.getvalue()),
        "3-name": b"localhost:5000/a/b:tag@sha256:" + b"4" * 64,
        "3-daemon": b"docker-daemon:sha256:" + b"4" * 64,
        "3-path": b"oci-archive:../x.tar:tag",
        "3-storage": b"containers-storage:[overlay@/x]y",
        "4-lock": json.dumps(lock).encode(),
        "5-fledge.toml": toml.encode(),
        "6-manifest.toml": inner.encode(),
        "7-daemon": json.dumps({"Id": digest, "Os": "linux", "Architecture": "amd64", "Descriptor": {}}).encode(),
    }
    return {name: bytes([int(name[0])]) + text for name, text in texts.items()}


def main() -> None:
    """Replace the seeds."""
    for target, inputs in (("layer", layers()), ("manifest", manifests())):
        place = HERE / target
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            if not old.name.startswith("found-"):
                old.unlink()
        for name, data in inputs.items():
            (place / name).write_bytes(data)


if __name__ == "__main__":
    main()
