"""xfs images filled by `mkfs.xfs -p FOLDER`. What it leaves out is added by xfs_db, and in inodes by ourselves.

mkfs.xfs 7.2 stores access control lists as attributes that the kernel does not look at, drops attributes
without a value and the time of the root folder, and devices cannot be in a folder that a plain user makes.
Before 6.17 it knows no folders, and before 7.1 it takes some hard links for files of their own.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from fledge_tasks.errors import CommandError, FilesystemError
from fledge_tasks.filesystems import rootless, sizing, xfs
from fledge_tasks.filesystems.libext2fs import crc32c
from fledge_tasks.filesystems.parameters import Filled, Parameters
from fledge_tasks.filesystems.sizing import Search, Wanted
from fledge_tasks.oci.layer_index import FILE_TYPES, Entry, Kind
from fledge_tasks.run import run
from fledge_tasks.tree import Inode, show, walk

_MAX_TARGET_BYTES = 1023  # XFS_SYMLINK_MAXLEN is 1024, and 6.17 to 7.0 counted the zero at its end
_MAX_MAJOR, _MAX_MINOR = 0x1FF, 0x3FFFF  # xfs_vn_mknod
_TELLABLE = re.compile(rb"[\w.,:+=@%~\x80-\xff][\w.,:+=@%~\x80-\xff-]*")
_DEVICES = {Kind.CHAR_DEVICE, Kind.BLOCK_DEVICE}
# The names of ACLs in the namespace of root, and the flags with which xfs_db sets an attribute of a namespace.
_ACLS = {b"system.posix_acl_access": b"SGI_ACL_FILE", b"system.posix_acl_default": b"SGI_ACL_DEFAULT"}
_NAMESPACES = {b"user": "-u", b"trusted": "-r", b"security": "-s"}
_POSIX_ACL, _XFS_ACL = struct.Struct("<HHI"), struct.Struct(">IIHH")  # posix_acl_xattr_entry, xfs_acl_entry
# In the superblock: blocksize, rootino, agblocks, inodesize, inopblog, agblklog. In an inode: mode, mtime, crc, device.
_BLOCK, _ROOT, _AG_BLOCKS, _INODE, _INODES_LOG, _AG_LOG = 4, 56, 84, 104, 123, 124
_MODE, _MTIME, _CRC, _DEVICE = 2, 40, 100, 176
_START_NS = -(1 << 31) * 10**9  # XFS_BIGTIME_EPOCH_OFFSET


def make(root: Inode, parameters: Parameters, payloads: Mapping[int, Path], image: Path, scratch: Path) -> Filled:
    """Make an image as `parameters.Make` says."""
    kind = rootless.Type("xfs", _refusal, _is_taken, True, _populate, ("xfs_repair", "-n", "-f"))
    return rootless.make(kind, root, parameters, payloads, image, scratch)


def _refusal(path: bytes, entry: Entry) -> str | None:
    names = [name for name in entry.xattrs if name not in _ACLS and name.partition(b".")[0] not in _NAMESPACES]
    if names:
        return f"has the extended attribute {names[0].decode(errors='backslashreplace')}, which xfs does not know"
    if len(entry.link) > _MAX_TARGET_BYTES:
        return f"is a link to {len(entry.link)} bytes, and xfs holds {_MAX_TARGET_BYTES}"
    if entry.kind in _DEVICES:
        major, minor = entry.rdev
        if major > _MAX_MAJOR or minor > _MAX_MINOR:
            return f"is a device of numbers that xfs does not hold ({major}, {minor})"
        if not _TELLABLE.fullmatch(path.rpartition(b"/")[2]):
            return "is a device with a name that xfs_db cannot be told"
    if entry.mtime_ns < _START_NS:
        return "has a time before 1901, which xfs cannot hold"
    return None


def _is_taken(name: bytes, value: bytes) -> bool:
    return bool(value) and (name.startswith(b"user.") or name == b"security.capability")


def _populate(image: Path, root: Inode, parameters: Parameters, scratch: Path) -> tuple[int, int]:
    maker = _Maker(image, root, parameters, scratch)
    sizing.fit(maker, "xfs", parameters.wanted, xfs.MIN_BYTES, sizing.xfs_bytes(maker.content))
    return _free(image)


class _Maker:
    """Makes images as `sizing.Maker` says. `content` is what the tree comes to."""

    def __init__(self, image: Path, root: Inode, parameters: Parameters, scratch: Path) -> None:
        self._image = image
        self._root = root
        self._parameters = parameters
        self._scratch = scratch
        self._size = 0
        self.content = sizing.measure(root)

    def empty(self, size: int) -> int:
        self._size = size
        self._mkfs()
        return _free(self._image)[0]

    def fill(self, search: Search, wanted: Wanted) -> tuple[int, int]:
        """Make an image with the tree in it: no other one can get it."""
        del search  # mkfs cannot change a size
        env = {"SOURCE_DATE_EPOCH": str(self._parameters.epoch), "DETERMINISTIC_SEED": "1"}
        try:
            self._mkfs("-p", rootless.FOLDER, env=env, cwd=self._scratch)
        except CommandError as error:
            if os.strerror(errno.ENOSPC) not in error.stderr:
                raise
            return self._size, sizing.lacking_when_full(self._size)
        _complete(self._image, self._root, self._scratch, env)
        free_bytes, free_inodes = _free(self._image)
        inodes = sizing.spare_inodes(self.content.inodes) - free_inodes
        return self._size, max(wanted.buffer_bytes - free_bytes, inodes * sizing.XFS_INODE_BYTES)

    def _mkfs(self, *more: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        os.truncate(self._image, 0)
        os.truncate(self._image, self._size)
        xfs.mkfs(self._image, self._parameters, *more, env=env, cwd=cwd)


def _free(image: Path) -> tuple[int, int]:
    """Return what a mount for writing would tell as available: bytes (f_bavail) and inodes (f_favail).

    It is what is free, but for 5 % or 8192 blocks, for what each allocation group keeps back for its trees,
    and for 8 blocks in each of them (xfs_fs_statfs, xfs_default_resblks, xfs_fs_reserve_ag_blocks and
    xfs_alloc_set_aside of Linux). Of what is kept back, two blocks are taken already.
    """
    numbers = "print fdblocks icount ifree imax_pct agcount dblocks blocksize inopblock"
    text = run(["xfs_db", "-r", "-f", "-c", "sb 0", "-c", numbers, "-c", "agresv", image]).decode()
    value = {name: int(number) for name, number in re.findall(r"^(\w+) = (\d+)$", text, re.MULTILINE)}
    groups = re.findall(r"reserved: (\d+) used: (\d+)", text)
    kept = sum(int(reserved) - min(int(used), 2) for reserved, used in groups) + 8 * value["agcount"]
    free = max(0, value["fdblocks"] - min(value["dblocks"] // 20, 8192) - kept)
    limit = value["dblocks"] * value["imax_pct"] // 100
    most = min(value["icount"] + free * value["inopblock"], limit * value["inopblock"])
    return free * value["blocksize"], most - (value["icount"] - value["ifree"])


# --- what mkfs.xfs leaves out ----------------------------------------------------------------


class _Inodes:
    """The inodes of an image by their numbers, to be changed in place (XFS disk format, 'Inodes')."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        block = os.pread(fd, 512, 0)
        self._block_bytes = int.from_bytes(block[_BLOCK : _BLOCK + 4], "big")
        self._inode_bytes = int.from_bytes(block[_INODE : _INODE + 2], "big")
        self._group_blocks = int.from_bytes(block[_AG_BLOCKS : _AG_BLOCKS + 4], "big")
        self._per_block_log, self._group_log = block[_INODES_LOG], block[_AG_LOG]
        self.root = int.from_bytes(block[_ROOT : _ROOT + 8], "big")

    def set_device(self, number: int, entry: Entry) -> None:
        """Make the device of an entry out of a FIFO."""
        major, minor = entry.rdev
        mode = FILE_TYPES[entry.kind] | entry.mode
        self._patch(number, {_MODE: mode.to_bytes(2, "big"), _DEVICE: (major << 18 | minor).to_bytes(4, "big")})

    def set_mtime(self, number: int, entry: Entry) -> None:
        """Set the time at which an inode was modified (XFS_DIFLAG2_BIGTIME)."""
        self._patch(number, {_MTIME: (entry.mtime_ns - _START_NS).to_bytes(8, "big")})

    def _patch(self, number: int, fields: Mapping[int, bytes]) -> None:
        block = number >> self._per_block_log
        group, in_group = block >> self._group_log, block & ((1 << self._group_log) - 1)
        in_block = number & ((1 << self._per_block_log) - 1)
        offset = (group * self._group_blocks + in_group) * self._block_bytes + in_block * self._inode_bytes
        inode = bytearray(os.pread(self._fd, self._inode_bytes, offset))
        for at, value in fields.items():
            inode[at : at + len(value)] = value
        inode[_CRC : _CRC + 4] = bytes(4)
        inode[_CRC : _CRC + 4] = crc32c(inode).to_bytes(4, "little")
        os.pwrite(self._fd, inode, offset)


def _complete(image: Path, root: Inode, scratch: Path, env: Mapping[str, str]) -> None:
    """Add to an image what mkfs.xfs left out of it. Raises FilesystemError when xfs_db does not do it."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        inodes = _Inodes(fd)
        specials = _specials(root)
        numbers = {**_numbers(image), b"": inodes.root} if specials else {b"": inodes.root}
        touched = {b"": root.entry}
        commands: list[str] = []
        for paths, inode in specials:
            number = _number(numbers, paths)
            commands.append(f"inode {number}")
            for name, value in inode.entry.xattrs.items():
                if not _is_taken(name, value):
                    commands.append(_attribute(name, value, scratch, len(commands)))
            if inode.entry.kind in _DEVICES:
                inodes.set_device(number, inode.entry)
                for path in paths:
                    folder, _, name = path.rpartition(b"/")
                    touched[folder] = _find(root, folder).entry
                    # Names hold the type as well. Without a second name the inode would be freed.
                    commands += [f"inode {_number(numbers, [folder])}", f"link -i {number} fledge-{number}"]
                    commands += [f"unlink {os.fsdecode(name)}", f"link -i {number} {os.fsdecode(name)}"]
                    commands += [f"unlink fledge-{number}"]
        if commands:
            _run_commands(image, commands, scratch, env)
        for folder, entry in touched.items():
            inodes.set_mtime(_number(numbers, [folder]), entry)
    finally:
        os.close(fd)


def _specials(root: Inode) -> list[tuple[list[bytes], Inode]]:
    """Return the inodes that something has to be added to, with all their names."""
    found: dict[int, tuple[list[bytes], Inode]] = {}
    for path, inode in walk(root):
        entry = inode.entry
        if entry.kind in _DEVICES or not all(_is_taken(name, value) for name, value in entry.xattrs.items()):
            found.setdefault(id(inode), ([], inode))[0].append(path)
    return list(found.values())


def _find(root: Inode, path: bytes) -> Inode:
    for name in path.split(b"/") if path else ():
        assert root.children is not None
        root = root.children[name]
    return root


def _numbers(image: Path) -> dict[bytes, int]:
    """Return the number of each inode by a name of it, as xfs_db tells them."""
    text = run(["xfs_db", "-r", "-f", "-c", "blockget -n", "-c", "ncheck", image])
    numbers: dict[bytes, int] = {}
    twice = set()
    for number, path in re.findall(rb"^ *(\d+) (.*?)(?:/\.)?$", text, re.MULTILINE):
        if numbers.setdefault(path, int(number)) != int(number):
            twice.add(path)
    # A name with a line break in it can look like any other.
    return {path: number for path, number in numbers.items() if path not in twice}


def _number(numbers: Mapping[bytes, int], paths: Iterable[bytes]) -> int:
    for path in paths:
        if path in numbers:
            return numbers[path]
    raise FilesystemError("xfs_db does not tell which inode it is", where=show(path), hint=rootless.WAY_OUT)


def _attribute(name: bytes, value: bytes, scratch: Path, serial: int) -> str:
    """Return the command that sets an attribute of the current inode; name and value are in files beside the image."""
    space, _, rest = name.partition(b".")
    flag = _NAMESPACES.get(space, "-r")
    if name in _ACLS:
        rest, value = _ACLS[name], _acl(value)
    (scratch / f"name{serial}").write_bytes(rest)
    (scratch / f"value{serial}").write_bytes(value)
    return f"attr_set {flag} -N name{serial} " + (f"-V value{serial}" if value else "")


def _acl(value: bytes) -> bytes:
    """Return an access control list as xfs has it, of one as setxattr(2) has it (posix_acl_xattr_header, version 2)."""
    entries = _POSIX_ACL.iter_unpack(value[4:])
    packed = [_XFS_ACL.pack(tag, number, bits, 0) for tag, bits, number in entries]
    return len(packed).to_bytes(4, "big") + b"".join(packed)


def _run_commands(image: Path, commands: list[str], scratch: Path, env: Mapping[str, str]) -> None:
    (scratch / "commands").write_bytes(os.fsencode("\n".join(commands) + "\n"))
    shell = ["/bin/sh", "-c", 'exec "$@" 2>&1', "sh"]
    printed = run([*shell, "xfs_db", "-x", "-f", "-c", "source commands", image], env=env, cwd=scratch)
    if printed:  # its exit code is 0 whatever happened
        raise FilesystemError(f"xfs_db says: {printed.decode(errors='replace').strip()}", hint=rootless.WAY_OUT)
