"""The kernel that a guest runs, and its modules: where they are looked for, and what a module needs.

A kernel at ROOT/boot/vmlinuz-VERSION has its modules in ROOT/lib/modules/VERSION (ROOT/usr/lib/modules/VERSION
where /lib is a link), as its Debian package puts them. Of any other kernel all that a guest needs is
taken to be built in. Nothing of it is ever installed: `dpkg-deb -x` makes such a ROOT of the package.
"""

from __future__ import annotations

import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from fledge_tasks.errors import BootError, InputError

FOLDER_VARIABLE = "FLEDGE_KERNEL_DIR"
_PREFIX = "vmlinuz-"
_PATTERN = f"{_PREFIX}*-cloud-amd64"
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".xz": lzma.decompress,
    ".zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}
# Tags of the section .modinfo are 'name=value' and a NUL (include/linux/moduleparam.h, __MODULE_INFO).
_DEPENDS = re.compile(rb"(?<=\0)depends=([^\0]*)")
_SOFT = re.compile(rb"(?<=\0)softdep=pre: ([^\0:]*)(?= post:|\0)")


@dataclass(frozen=True)
class Kernel:
    """A kernel image, and the folder of its modules, None if it needs none."""

    image: Path
    modules: Path | None

    @property
    def name(self) -> str:
        """What to call it: 'linux VERSION', else the name of its file."""
        return f"linux {self.image.name.removeprefix(_PREFIX)}" if self.modules else self.image.name

    def load_order(self, wanted: Iterable[str]) -> list[bytes]:
        """Return the content of these modules and of all that they need, each after what it needs.

        What is built in is left out. Raises BootError for a module that the kernel does not have.
        """
        if self.modules is None:
            return []
        try:
            return list(_Modules(self).load_order(wanted))
        except (OSError, lzma.LZMAError, zstandard.ZstdError) as error:
            raise BootError(f"the modules cannot be read: {error}", where=str(self.modules)) from None


def find(given: Path | None = None) -> Kernel:
    """Return the kernel that was `given`, else the newest of Debian's cloud kernels where they are looked for.

    That is the folder in FLEDGE_KERNEL_DIR if it is set, else `folder()` and then `/`, of which each is a
    ROOT as above. Raises InputError when there is none at `given`, BootError when there is none at all.
    """
    if given is not None:
        if not given.is_file():
            raise InputError("there is no such kernel", where=str(given))
        return _at(given)
    chosen = os.environ.get(FOLDER_VARIABLE)
    places = [Path(chosen)] if chosen else [folder(), Path("/")]
    for place in places:
        if found := sorted(place.glob(f"boot/{_PATTERN}"), key=_version):
            return _at(found[-1])
    looked = " and ".join(str(place / "boot" / _PATTERN) for place in places)
    raise BootError(f"there is no kernel to boot: looked for {looked}", hint=_get_one(places[0]))


def folder() -> Path:
    """Return where `make setup` unpacks the kernel's package: FLEDGE_KERNEL_DIR, else a folder of the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(cache) / "fledge-tasks" / "kernel")


def _get_one(place: Path) -> str:
    return f"""unpack one, which installs nothing:
    apt-get download $(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: //p')
    dpkg-deb -x linux-image-*-cloud-amd64_*.deb {place}
or give one with --kernel"""


def _at(image: Path) -> Kernel:
    root, version = image.absolute().parent.parent, image.name.removeprefix(_PREFIX)
    for place in (root / "lib/modules" / version, root / "usr/lib/modules" / version):
        if version != image.name and place.is_dir():
            return Kernel(image, place)
    return Kernel(image, None)


def _version(image: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", image.name)]


class _Modules:
    """The modules of a kernel by name, as its build lists them (Documentation/kbuild/kbuild.rst)."""

    def __init__(self, kernel: Kernel) -> None:
        assert kernel.modules is not None
        self._kernel, self._folder = kernel, kernel.modules
        self._built_in = set(map(_name, (self._folder / "modules.builtin").read_text().split()))
        self._paths = {_name(path): path for path in (self._folder / "modules.order").read_text().split()}

    def load_order(self, wanted: Iterable[str]) -> Iterator[bytes]:
        done: set[str] = set()

        def load(name: str) -> Iterator[bytes]:
            if name in done or name in self._built_in:
                return
            done.add(name)
            data = self._read(name)
            for needed in self._needed(name, data):
                yield from load(needed)
            yield data

        for name in wanted:
            yield from load(name)

    def _read(self, name: str) -> bytes:
        if name not in self._paths:
            raise BootError(
                f"the kernel has no {name}, neither built in nor as a module",
                where=str(self._kernel.image),
                hint="Debian's linux-image-cloud-amd64 has all that is needed",
            )
        path = self._folder / self._paths[name]
        for suffix, unpack in _UNPACK.items():
            file = path.with_suffix(".ko" if suffix == ".ko" else f".ko{suffix}")
            if file.exists():
                return unpack(file.read_bytes())
        raise FileNotFoundError(f"{path} is not there")

    def _needed(self, name: str, data: bytes) -> Iterator[str]:
        depends = _DEPENDS.search(data)
        if depends is None:
            raise BootError(f"{name} is not a kernel module", where=str(self._folder / self._paths[name]))
        yield from (_name(each) for each in depends[1].decode().split(",") if each)
        # What a module would like to be there first (modprobe.d(5), softdep) may be an algorithm: 'crypto-crc32c'
        # is 'crc32c_generic' or a quicker one.
        for soft in b" ".join(_SOFT.findall(data)).decode().split():
            plain = _name(soft).removeprefix("crypto_")
            yield from (each for each in (plain, f"{plain}_generic") if each in self._paths)


def _name(path: str) -> str:
    """Return a module's name: that of its file, in which - and _ are the same."""
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")
