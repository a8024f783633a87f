"""The real images that tests and benchmarks build from: made once, kept in a registry's storage folder.

An image's tag is the hash of everything that makes it, so a changed recipe is a new image and an
unchanged one is found again by the next run.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import FileLock

from tests.real import layout, special
from tests.real.layout import write_layout
from tests.real.registry import Registry

CACHE_VARIABLE = "FLEDGE_REAL_CACHE"

_APT = "apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends"
_TIDY = "rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin"


@dataclass(frozen=True)
class Recipe:
    """How an image is made: `text` is the rest of a Containerfile when it has a `base`, an option or salt when not."""

    text: str
    base: str | None = None
    write: Callable[[Path], None] | None = None


def write_debian(folder: Path) -> None:
    """Write a minimal Debian 12 as a layout of one layer."""
    with TemporaryDirectory() as scratch:
        tar = Path(scratch) / "debian.tar"
        _run(
            "mmdebstrap", "--quiet", "--variant=minbase", "--dpkgopt=force-unsafe-io",
            "--include=ca-certificates", "bookworm", tar,
        )  # fmt: skip
        write_layout(folder, [tar], {"Cmd": ["bash"]})


RECIPES = {
    "debian": Recipe("1", write=write_debian),
    "web": Recipe(
        f"""RUN {_APT} nginx && {_TIDY}
RUN echo '<h1>fledge</h1>' > /var/www/html/index.html && chmod 0600 /etc/nginx/nginx.conf
ENV APP=web
WORKDIR /var/www
EXPOSE 8080 443
ENTRYPOINT ["/usr/sbin/nginx"]
CMD ["-g", "daemon off;"]
""",
        base="debian",
    ),
    "web-plus": Recipe("RUN echo more > /var/www/html/more.html && rm /var/www/html/index.html\n", base="web"),
    "science": Recipe(f"RUN {_APT} python3-pandas python3-scipy && {_TIDY}\nCMD python3\n", base="debian"),
    "odd": Recipe("1", write=special.write_odd),
    "manyfiles": Recipe("1", write=special.write_manyfiles),
}


def cache_folder() -> Path:
    """Return where the images are kept between runs; its own .gitignore keeps it out of git."""
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(__file__).parents[2] / ".real-cache").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


class Images:
    """Makes images on demand and pushes them to `registry`. `close` throws the builder's own storage away."""

    def __init__(self, registry: Registry, cache: Path) -> None:
        self._registry = registry
        self._cache = cache
        self._storage = cache / "buildah"

    def tag(self, name: str) -> str:
        """Return the tag of an image: a hash over its recipe and those below it."""
        recipe = RECIPES[name]
        below = self.tag(recipe.base) if recipe.base else _code(recipe.write)
        return hashlib.sha256(f"{name}\0{recipe.text}\0{below}".encode()).hexdigest()[:16]

    def reference(self, name: str) -> str:
        """Return 'host:port/name:tag' of an image, which is in the registry from then on."""
        reference, tag = f"{self._registry.host}/{name}:{self.tag(name)}", self.tag(name)
        with self._lock():
            if self._registry.manifest(name, tag) is None:
                self._make(name, reference)
        return reference

    def _lock(self) -> FileLock:
        return FileLock(self._cache / "images.lock")

    def _make(self, name: str, reference: str) -> None:
        recipe = RECIPES[name]
        with TemporaryDirectory() as scratch:
            if recipe.write:
                written = Path(scratch) / "layout"
                recipe.write(written)
                _run("skopeo", "copy", "--dest-tls-verify=false", f"oci:{written}:latest", f"docker://{reference}")
                return
            assert recipe.base is not None
            base = f"{self._registry.host}/{recipe.base}:{self.tag(recipe.base)}"
            if self._registry.manifest(recipe.base, self.tag(recipe.base)) is None:
                self._make(recipe.base, base)
            (Path(scratch) / "Containerfile").write_text(f"FROM {base}\n{recipe.text}")
            self._buildah(
                "bud", "--quiet", "--layers", "--isolation=chroot", "--network=host", "--tls-verify=false",
                "--tag", reference, scratch,
            )  # fmt: skip
            self._buildah("push", "--quiet", "--tls-verify=false", reference, f"docker://{reference}")

    def _buildah(self, *arguments: str) -> None:
        place = ["--storage-driver=overlay", f"--root={self._storage}/root", f"--runroot={self._storage}/run"]
        _run("buildah", *place, *arguments)

    def close(self) -> None:
        """Remove what buildah left; the pushed images stay."""
        with self._lock():  # other workers use and remove it, too
            if self._storage.exists():
                # containers/storage mounts its folder on itself, and a failed RUN leaves its container mounted.
                for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
                    if Path(place := line.split()[1]).is_relative_to(self._storage):
                        subprocess.run(["umount", place], check=True)
                shutil.rmtree(self._storage)


def _code(write: Callable[[Path], None] | None) -> str:
    """Return the source text that a written image comes from."""
    if write is None:
        return ""
    maker = inspect.getmodule(write)
    return inspect.getsource(write if write is write_debian else maker or write) + inspect.getsource(layout)


def _run(*command: str | Path) -> None:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if result.returncode:
        tail = (result.stdout + result.stderr)[-4000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(map(str, command))}: exit code {result.returncode}\n{tail}")
