"""Which kernel a guest gets, and which of its modules, in which order."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import zstandard

from fledge_tasks.boot import kernel
from fledge_tasks.boot.kernel import Kernel, find, folder
from fledge_tasks.errors import BootError, InputError

VERSION = "6.1.0-9-cloud-amd64"


def add_kernel(root: Path, version: str = VERSION, modules: str = "lib/modules") -> Kernel:
    (root / "boot").mkdir(parents=True, exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").write_bytes(b"")
    place = root / modules / version
    place.mkdir(parents=True)
    (place / "modules.order").touch()
    (place / "modules.builtin").touch()
    return Kernel(root / "boot" / f"vmlinuz-{version}", place)


def add_module(found: Kernel, path: str, *tags: str, suffix: str = "") -> bytes:
    assert found.modules is not None
    data = b"\x7fELF code\0" + b"".join(f"{tag}\0".encode() for tag in ("license=GPL", *tags)) + b"more"
    file = found.modules / f"{path}{suffix}"
    file.parent.mkdir(parents=True, exist_ok=True)
    packed = {"": data, ".xz": lzma.compress(data), ".zst": zstandard.compress(data)}[suffix]
    file.write_bytes(packed)
    with (found.modules / "modules.order").open("a") as order:
        order.write(f"{path}\n")
    return data


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(kernel.FOLDER_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder() == home / ".cache/fledge-tasks/kernel"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/fledge-tasks/kernel")
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, "/k")
    assert folder() == Path("/k")


def test_the_newest_one_is_found_with_its_modules(home: Path) -> None:
    root = home / ".cache/fledge-tasks/kernel"
    add_kernel(root)
    newest = add_kernel(root, "6.1.0-10-cloud-amd64", "usr/lib/modules")
    add_kernel(root, "5.10.0-99-cloud-amd64")
    add_kernel(root, "6.12.0-1-amd64")
    assert find() == newest
    assert find().name == "linux 6.1.0-10-cloud-amd64"


def test_the_variable_decides(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_kernel(home / ".cache/fledge-tasks/kernel")
    other = add_kernel(tmp_path / "other", "6.0-cloud-amd64")
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, str(tmp_path / "other"))
    assert find() == other
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, str(tmp_path / "nothing"))
    with pytest.raises(BootError) as caught:
        find()
    assert caught.value.message == (
        f"there is no kernel to boot: looked for {tmp_path}/nothing/boot/vmlinuz-*-cloud-amd64"
    )
    assert caught.value.hint is not None
    assert "apt-get download $(apt-cache depends linux-image-cloud-amd64" in caught.value.hint
    assert f"dpkg-deb -x linux-image-*-cloud-amd64_*.deb {tmp_path}/nothing" in caught.value.hint


def test_one_that_is_given(tmp_path: Path) -> None:
    known = add_kernel(tmp_path)
    assert find(known.image) == known
    (tmp_path / "bzImage").write_bytes(b"")
    assert find(tmp_path / "bzImage") == Kernel(tmp_path / "bzImage", None)
    assert find(tmp_path / "bzImage").load_order(["ext4"]) == []
    with pytest.raises(InputError, match="there is no such kernel"):
        find(tmp_path / "none")


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    found = add_kernel(tmp_path)
    assert found.modules is not None
    (found.modules / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/lib/built-in-thing.ko\n")
    xfs = add_module(found, "kernel/fs/xfs.ko", "depends=lib-crc,zlib", suffix=".xz")
    crc = add_module(found, "kernel/lib/lib-crc.ko", "softdep=pre: crypto-crc32c sha256", "depends=")
    generic = add_module(found, "kernel/crypto/crc32c_generic.ko", "depends=built_in_thing", suffix=".zst")
    zlib = add_module(found, "kernel/lib/zlib.ko", "softdep=pre: late post: other", "softdep=post: other", "depends=")
    late = add_module(found, "kernel/lib/late.ko", "softdep=pre: zlib", "depends=")
    add_module(found, "kernel/lib/other.ko", "depends=")
    assert found.load_order(["xfs", "ext4", "zlib"]) == [generic, crc, late, zlib, xfs]
    assert found.load_order(["ext4"]) == []


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    found = add_kernel(tmp_path)
    with pytest.raises(BootError, match="the kernel has no xfs, neither built in nor as a module"):
        found.load_order(["xfs"])
    add_module(found, "kernel/fs/xfs.ko", "depends=")
    assert found.modules is not None
    (found.modules / "kernel/fs/xfs.ko").write_bytes(b"not a module")
    with pytest.raises(BootError, match="xfs is not a kernel module"):
        found.load_order(["xfs"])
    (found.modules / "kernel/fs/xfs.ko").unlink()
    with pytest.raises(BootError, match=r"the modules cannot be read: .*xfs\.ko is not there"):
        found.load_order(["xfs"])
    (found.modules / "modules.order").unlink()
    with pytest.raises(BootError, match="the modules cannot be read"):
        found.load_order(["xfs"])
