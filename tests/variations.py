"""What must not matter to a build: each changes one thing about the golden image's workspace before it is built."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests import golden
from tests.layers import compress, digest
from tests.layouts import Layout
from tests.tools import PATH
from tests.workspaces import Result, Workspace

MKE2FS_CONF = """[defaults]
	base_features = sparse_super,filetype
	default_mntopts = journal_data
	hash_alg = tea
	blocksize = 1024
	inode_size = 128
	inode_ratio = 65536
	reserved_ratio = 20
	enable_periodic_fsck = 1
	errors = panic
	lazy_itable_init = 1
[fs_types]
	ext4 = {
		features = has_journal,extent,inline_data,casefold,quota,^metadata_csum
		inode_size = 512
	}
"""
"""A mke2fs.conf that makes another filesystem wherever it is asked."""


@dataclass
class Ground:
    """A workspace that a build is made in. `folder` is outside of it, `arguments` are those of `fledge build`."""

    workspace: Workspace
    folder: Path
    arguments: list[str] = field(default_factory=list)

    def env(self, **variables: str) -> None:
        """Set variables for the build."""
        self.workspace.env = {**self.workspace.env, **variables}

    def prefix(self, *command: str) -> None:
        """Put a command before the build's."""
        self.workspace.prefix = [*self.workspace.prefix, *command]

    def build(self) -> Result:
        """Build it."""
        return self.workspace.build(*self.arguments)


Variation = Callable[[Ground], None]


def ground(folder: Path, name: str = "w") -> Ground:
    """Make a new workspace of the golden image in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Ground(golden.lay_out(folder / name, folder / "home"), folder)


# --- the process and its surroundings -----------------------------------------------------------------------


def environment(**variables: str) -> Variation:
    """Run with these variables."""
    return lambda ground: ground.env(**variables)


def arguments(*words: str) -> Variation:
    """Build with these arguments."""
    return lambda ground: ground.arguments.extend(words)


def umask(bits: str) -> Variation:
    """Run with another umask."""
    return lambda ground: ground.prefix("sh", "-c", f'umask {bits}; exec "$@"', "sh")


def clock(offset: str) -> Variation:
    """Run with a clock that is off; the programs that are started too, which get a clean environment from us."""

    def vary(ground: Ground) -> None:
        programs = wrappers(ground.folder, offset)
        ground.env(PATH=f"{programs}:{ground.workspace.env.get('PATH', PATH)}")
        ground.prefix("faketime", "-m", "-f", offset)

    return vary


def wrappers(folder: Path, offset: str) -> Path:
    """Return a folder with a mke2fs whose clock is off; what year it is there goes into the file `years`."""
    programs = folder / "programs"
    programs.mkdir()
    script = programs / "mke2fs"
    real = shutil.which("mke2fs", path=PATH)
    faked = f"env -u LD_PRELOAD faketime -m -f '{offset}'"
    script.write_text(f"#!/bin/sh\n{faked} date +%Y >> '{programs}/years'\nexec {faked} {real} \"$@\"\n")
    script.chmod(0o755)
    return programs


def mke2fs_conf(ground: Ground) -> None:
    """Have the caller's variables ask for another filesystem, at another time, in another way."""
    configuration = ground.folder / "mke2fs.conf"
    configuration.write_text(MKE2FS_CONF)
    ground.env(
        MKE2FS_CONFIG=str(configuration),
        E2FSPROGS_FAKE_TIME="1234567890",
        MKE2FS_FIRST_META_BG="1",
        MKE2FS_DEVICE_SECTSIZE="4096",
        MKE2FS_DEVICE_PHYS_SECTSIZE="4096",
        MKE2FS_SYNC="1",
    )


def other_home(ground: Ground) -> None:
    """Have another HOME, and settings in it."""
    home = ground.folder / "other home"
    (home / ".config").mkdir(parents=True)
    ground.env(HOME=str(home), XDG_CONFIG_HOME=str(home / ".config"), USER="somebody", LOGNAME="somebody")


def other_tmpdir(ground: Ground) -> None:
    """Have another TMPDIR."""
    place = ground.folder / "temporary files"
    place.mkdir()
    ground.env(TMPDIR=str(place))


def path_backwards(ground: Ground) -> None:
    """Have the PATH in another order."""
    ground.env(PATH=":".join(reversed(ground.workspace.env.get("PATH", PATH).split(":"))))


def cache_elsewhere(ground: Ground) -> None:
    """Have the cache outside the workspace."""
    ground.workspace.cache = ground.folder / "the cache"


# --- files of the workspace ---------------------------------------------------------------------------------


def old_files(ground: Ground) -> None:
    """Make all files of the workspace old."""
    for number, path in enumerate([ground.workspace.root, *ground.workspace.root.rglob("*")]):
        os.utime(path, (10**9 + number, 10**9 - number), follow_symlinks=False)


def written_backwards(ground: Ground) -> None:
    """Write the mapped files anew in another order; what cannot be executed has other permissions."""
    folder = ground.workspace.root / golden.NAME
    shutil.rmtree(folder)
    golden.describe(ground.workspace)
    golden.write_files(folder, list(reversed(golden.FILES)))
    (folder / "page.html").chmod(0o600)
    (folder / "conf" / "main.conf").chmod(0o666)


def mappings_backwards(ground: Ground) -> None:
    """Have the mappings in fledge.toml in another order."""
    golden.describe(ground.workspace, backwards=True)


def neighbours(ground: Ground) -> None:
    """Build it among other images that share layers with it, one before and one after it."""
    for name, tars in (("a", golden.TARS[:2]), ("z", golden.TARS[1:])):
        ground.workspace.add(name, f"oci:../layouts/{name}", buffer_mb=1)
        Layout(ground.workspace.root / "layouts" / name).write_tars(tars)
    ground.arguments.extend(("z", golden.NAME, "a"))


def cached_base(ground: Ground) -> None:
    """Have its lower layers in the cache already."""
    neighbours(ground)
    ground.workspace.build("a")


# --- where the image comes from -----------------------------------------------------------------------------


def gzipped(tar: bytes) -> bytes:
    """Compress best, as a stream of its own for each 100,000 bytes."""
    parts = [tar[start : start + 100_000] for start in range(0, len(tar), 100_000)]
    return b"".join(gzip.compress(part, 9, mtime=1) for part in parts)


def compressed(pack: Callable[[bytes], bytes], suffix: str) -> Variation:
    """Have the layers compressed."""

    def vary(ground: Ground) -> None:
        blobs = dict(enumerate(map(pack, golden.TARS)))
        golden.layout(ground.workspace).write_tars(
            golden.TARS, config=golden.CONFIG, compression="zstd" if suffix == "zstd" else "gzip", blobs=blobs
        )

    return vary


def oci_archive(ground: Ground) -> None:
    """Have the layout as an archive."""
    path = ground.workspace.root / "golden.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(ground.workspace.root / golden.LAYOUT, ".")
    golden.describe(ground.workspace, "oci-archive:../golden.tar")


def directory(ground: Ground) -> None:
    """Have it as skopeo's `dir:`."""
    source, target = ground.workspace.root / golden.LAYOUT, ground.workspace.root / "dir"
    subprocess.run(
        ["skopeo", "copy", "--quiet", f"oci:{source}", f"dir:{target}"],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    golden.describe(ground.workspace, "dir:../dir")


def docker_archive(ground: Ground) -> None:
    """Have it as `docker save` writes it; skopeo would write another config into such an archive."""
    config = _config(golden.layout(ground.workspace).path)
    name = digest(config).removeprefix("sha256:") + ".json"
    layers = {f"{number}/layer.tar": tar for number, tar in enumerate(golden.TARS)}
    manifest = json.dumps([{"Config": name, "RepoTags": ["golden:1"], "Layers": list(layers)}]).encode()
    _write_tar(ground.workspace.root / "docker.tar", {name: config, **layers, "manifest.json": manifest})
    golden.describe(ground.workspace, "docker-archive:../docker.tar:golden:1")


def _config(layout: Path) -> bytes:
    def blob(name: str) -> bytes:
        return (layout / "blobs" / "sha256" / name.removeprefix("sha256:")).read_bytes()

    [entry] = json.loads((layout / "index.json").read_bytes())["manifests"]
    return blob(json.loads(blob(entry["digest"]))["config"]["digest"])


def _write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


SURROUNDINGS: Mapping[str, Sequence[Variation]] = {
    "years ahead": [clock("+4000d")],
    "years back": [clock("-9000d")],
    "hours ahead": [clock("+7h")],
    "umask": [umask("077")],
    "locale": [environment(LC_ALL="POSIX", LANG="de_DE", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")],
    "time zone": [environment(TZ="Asia/Kathmandu")],
    "TMPDIR": [other_tmpdir],
    "HOME": [other_home],
    "PATH": [path_backwards],
    "hash seed": [environment(PYTHONHASHSEED="4242")],
    "mke2fs.conf": [mke2fs_conf],
    "one job": [arguments("-j", "1")],
    "four jobs": [arguments("-j", "4")],
    "cache elsewhere": [cache_elsewhere],
    "old files": [old_files],
    "written backwards": [written_backwards],
    "mappings backwards": [mappings_backwards],
    "neighbours": [neighbours],
    "base in the cache": [cached_base],
}
SOURCES: Mapping[str, Sequence[Variation]] = {
    "gzip": [compressed(gzipped, "gzip")],
    "zstd": [compressed(lambda tar: compress(tar, "zstd"), "zstd")],
    "oci-archive": [oci_archive],
    "dir": [directory],
    "docker-archive": [docker_archive],
}
EVERYTHING: Sequence[Variation] = [
    path_backwards,
    compressed(gzipped, "gzip"),
    written_backwards,
    mappings_backwards,
    oci_archive,
    old_files,
    cached_base,
    umask("027"),
    environment(LC_ALL="POSIX", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", TZ="Asia/Kathmandu", PYTHONHASHSEED="99"),
    other_tmpdir,
    other_home,
    mke2fs_conf,
    cache_elsewhere,
    arguments("-j", "3"),
]
"""Much of it together, but for the clock: what faketime shares between processes, another user may not open."""
