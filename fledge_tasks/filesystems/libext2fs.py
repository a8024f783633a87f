"""libext2fs, the library of e2fsprogs, through cffi in ABI mode: no compiler and no headers needed.

Declarations are those of `ext2fs/ext2fs.h`, whose ABI is stable since e2fsprogs 1.42 (checked with
1.47.0). `struct_ext2_filsys` is declared up to the last field that is used here. Data that the
library calls `struct ext2_inode_large` or a directory block is passed as bytes, built in
`ext4_inode` and `ext4_directory`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi

from fledge_tasks.errors import FilesystemError, ToolError

LIBRARY = "libext2fs.so.2"

_DECLARATIONS = """
typedef long errcode_t;
typedef unsigned int ext2_ino_t;
typedef unsigned long long blk64_t;
typedef unsigned int blk_t;
typedef struct struct_io_manager *io_manager;
struct ext2_xattr_handle;

struct struct_ext2_filsys {
    errcode_t magic;
    void *io;
    int flags;
    char *device_name;
    unsigned char *super;
    unsigned int blocksize;
    int fragsize;
    unsigned int group_desc_count;
    unsigned long desc_blocks;
    void *group_desc;
    unsigned int inode_blocks_per_group;
    void *inode_map;
    void *block_map;
    void *get_blocks, *check_directory, *write_bitmaps, *read_inode, *write_inode;
    void *badblocks;
    void *dblist;
    unsigned int stride;
    void *orig_super;
    void *image_header;
    unsigned int umask;
    long now;
    ...;
};
typedef struct struct_ext2_filsys *ext2_filsys;

extern io_manager unix_io_manager;
errcode_t ext2fs_open2(const char *, const char *, int, int, unsigned int, io_manager, ext2_filsys *);
errcode_t ext2fs_read_bitmaps(ext2_filsys);
errcode_t ext2fs_close_free(ext2_filsys *);
void ext2fs_free(ext2_filsys);
errcode_t ext2fs_read_inode_full(ext2_filsys, ext2_ino_t, void *, int);
errcode_t ext2fs_write_inode_full(ext2_filsys, ext2_ino_t, const void *, int);
void ext2fs_inode_alloc_stats2(ext2_filsys, ext2_ino_t, int, int);
void ext2fs_block_alloc_stats_range(ext2_filsys, blk64_t, blk_t, int);
unsigned int ext2fs_group_blocks_count(ext2_filsys, unsigned int);
unsigned int ext2fs_bg_free_blocks_count(ext2_filsys, unsigned int);
void ext2fs_bg_flags_clear(ext2_filsys, unsigned int, unsigned short);
void ext2fs_group_desc_csum_set(ext2_filsys, unsigned int);
errcode_t ext2fs_find_first_zero_block_bitmap2(void *, blk64_t, blk64_t, blk64_t *);
errcode_t ext2fs_find_first_set_block_bitmap2(void *, blk64_t, blk64_t, blk64_t *);
errcode_t ext2fs_write_dir_block4(ext2_filsys, blk64_t, const void *, int, ext2_ino_t);
errcode_t ext2fs_extent_block_csum_set(ext2_filsys, ext2_ino_t, void *);
errcode_t io_channel_write_blk64(void *, unsigned long long, int, const void *);
errcode_t ext2fs_dirhash(int, const char *, int, const unsigned char *, unsigned int *, unsigned int *);
errcode_t ext2fs_xattrs_open(ext2_filsys, ext2_ino_t, struct ext2_xattr_handle **);
errcode_t ext2fs_xattr_set(struct ext2_xattr_handle *, const char *, const void *, size_t);
errcode_t ext2fs_xattrs_write(struct ext2_xattr_handle *);
errcode_t ext2fs_xattrs_close(struct ext2_xattr_handle **);
errcode_t ext2fs_xattrs_read(struct ext2_xattr_handle *);
errcode_t ext2fs_xattrs_iterate(
    struct ext2_xattr_handle *, int (*)(char *name, char *value, size_t length, void *), void *);

struct ext2_dir_entry {
    unsigned int inode;
    unsigned short rec_len;
    unsigned short name_len;    /* the upper half is the file type */
    char name[255];
};
errcode_t ext2fs_dir_iterate2(ext2_filsys, ext2_ino_t, int, char *, int (*)(
    ext2_ino_t, int entry, struct ext2_dir_entry *, int offset, int blocksize, char *buf, void *), void *);

struct ext2fs_extent { blk64_t e_pblk; blk64_t e_lblk; unsigned int e_len; unsigned int e_flags; };
struct ext2_extent_handle;
errcode_t ext2fs_extent_open2(ext2_filsys, ext2_ino_t, void *, struct ext2_extent_handle **);
errcode_t ext2fs_extent_get(struct ext2_extent_handle *, int, struct ext2fs_extent *);
void ext2fs_extent_free(struct ext2_extent_handle *);
int ext2fs_get_library_version(const char **, const char **);
unsigned int ext2fs_crc32c_le(unsigned int, const unsigned char *, size_t);
void initialize_ext2_error_table(void);
"""

_NO_OPTIONS = b""  # not NULL: what follows a question mark in the path would be taken for some
_FLAG_RW, _FLAG_CHANGED, _FLAG_DIRTY, _FLAG_64BITS, _FLAG_MASTER_SB_ONLY = 0x01, 0x02, 0x04, 0x20000, 0x200
_HALF_MD4 = 1  # EXT2_HASH_HALF_MD4, signed characters
_SB_KBYTES_WRITTEN, _SB_FLAGS = 0x178, 0x160  # ext4 disk layout, 'The Super Block'
_SIGNED_HASH, _UNSIGNED_HASH = 0x1, 0x2
_BLOCK_UNINIT = 0x2  # EXT2_BG_BLOCK_UNINIT
_EXTENT_ROOT, _EXTENT_NEXT = 0x1, 0x9  # EXT2_EXTENT_ROOT, _NEXT
_EXTENT_IS_LEAF, _EXTENT_IS_UNWRITTEN = 0x1, 0x2  # EXT2_EXTENT_FLAGS_LEAF, _UNINIT
_NO_NEXT_EXTENT = 2133571328 + 124  # EXT2_ET_EXTENT_NO_NEXT
_ENTRY_ABORT = 2  # DIRENT_ABORT
INODE_BYTES = 256


@functools.cache
def _library() -> tuple[Any, Any]:
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS.replace("    ...;\n", ""))
    try:
        library = ffi.dlopen(LIBRARY)
        com_err = cffi.FFI()
        com_err.cdef("const char *error_message(long);")
        messages = com_err.dlopen("libcom_err.so.2")
    except OSError as error:
        raise ToolError(
            f"{LIBRARY} cannot be loaded: {error}", hint="install it, for example: sudo apt-get install e2fsprogs"
        ) from None
    library.initialize_ext2_error_table()
    return ffi, (library, lambda code: com_err.string(messages.error_message(code)).decode())


def load() -> None:
    """Load the library into this process and all that fork from it: it takes its time. Raises ToolError."""
    _library()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C (RFC 3720, B.4) of some bytes: that of b"123456789" is 0xe3069283. Raises ToolError."""
    ffi, (library, _) = _library()
    return int(library.ext2fs_crc32c_le(0xFFFFFFFF, ffi.from_buffer("unsigned char[]", data), len(data))) ^ 0xFFFFFFFF


def version() -> str:
    """Return the version of the library, for example '1.47.0'. Raises ToolError."""
    ffi, (library, _) = _library()
    text = ffi.new("const char **")
    library.ext2fs_get_library_version(text, ffi.NULL)
    return str(ffi.string(text[0]).decode())


class NameHash:
    """The half-MD4 hash by which ext4 orders the names of an indexed folder, for one hash seed."""

    def __init__(self, seed: bytes) -> None:
        self._ffi, (self._library, _) = _library()
        self._seed = self._ffi.new("unsigned char[16]", seed)
        self._major = self._ffi.new("unsigned int *")
        self._minor = self._ffi.new("unsigned int *")

    def __call__(self, name: bytes) -> tuple[int, int]:
        """Return (hash, minor hash); the lowest bit of the hash is 0."""
        self._library.ext2fs_dirhash(_HALF_MD4, name, len(name), self._seed, self._major, self._minor)
        return self._major[0], self._minor[0]


class Ext2Filesystem:
    """An ext4 filesystem in an image file that is open for filling. Made by `opened`."""

    def __init__(self, ffi: Any, library: Any, handle: Any, message: Any) -> None:
        self._ffi, self._library, self._fs, self._message = ffi, library, handle, message
        self._inode = ffi.new(f"unsigned char[{INODE_BYTES}]")

    def read_inode(self, number: int) -> bytes:
        """Return the 256 bytes of an inode."""
        self._check(self._library.ext2fs_read_inode_full(self._fs, number, self._inode, INODE_BYTES))
        return bytes(self._ffi.buffer(self._inode))

    def write_inode(self, number: int, data: bytes) -> None:
        """Write the 256 bytes of an inode; the checksum is filled in."""
        self._check(self._library.ext2fs_write_inode_full(self._fs, number, data, INODE_BYTES))

    def take_inode(self, number: int, *, is_directory: bool) -> None:
        """Mark an inode as used."""
        self._library.ext2fs_inode_alloc_stats2(self._fs, number, 1, is_directory)

    def mark_blocks(self, start: int, count: int, *, used: bool) -> None:
        """Mark a run of blocks as used or free."""
        self._library.ext2fs_block_alloc_stats_range(self._fs, start, count, 1 if used else -1)

    def free_runs(self, blocks: int) -> Iterator[tuple[int, int]]:
        """Yield (start, count) of the runs of free blocks below `blocks`, in order."""
        bitmap, found = self._fs.block_map, self._ffi.new("blk64_t *")
        start = 0
        while start < blocks:
            if self._library.ext2fs_find_first_zero_block_bitmap2(bitmap, start, blocks - 1, found):
                return
            start = found[0]
            error = self._library.ext2fs_find_first_set_block_bitmap2(bitmap, start, blocks - 1, found)
            end = blocks if error else found[0]
            yield start, end - start
            start = end

    def _write_bitmaps_in_use(self) -> None:
        """Have the bitmap of every group written that holds as much as a copy of the superblock.

        mke2fs 1.47.2 writes them, up to 1.47.0 it leaves them for the kernel to work out.
        """
        for group in range(self._fs.group_desc_count):
            free = self._library.ext2fs_bg_free_blocks_count(self._fs, group)
            if free != self._library.ext2fs_group_blocks_count(self._fs, group):
                self._library.ext2fs_bg_flags_clear(self._fs, group, _BLOCK_UNINIT)
                self._library.ext2fs_group_desc_csum_set(self._fs, group)

    def write_directory_block(self, block: int, data: bytes, inode: int) -> None:
        """Write a folder's block, index blocks included; the checksum is filled in."""
        self._check(self._library.ext2fs_write_dir_block4(self._fs, block, data, 0, inode))

    def write_extent_block(self, block: int, data: bytes, inode: int) -> None:
        """Write a block of an inode's extent tree; the checksum is filled in."""
        buffer = self._ffi.new("unsigned char[]", data)
        self._check(self._library.ext2fs_extent_block_csum_set(self._fs, inode, buffer))
        self._check(self._library.io_channel_write_blk64(self._fs.io, block, 1, buffer))

    def write_block(self, block: int, data: bytes) -> None:
        """Write a block that carries no checksum."""
        self._check(self._library.io_channel_write_blk64(self._fs.io, block, 1, data))

    def set_xattrs(self, number: int, xattrs: list[tuple[bytes, bytes]], where: str) -> None:
        """Store extended attributes, inside the inode first, then in a block of their own.

        POSIX ACLs are converted to ext4's form. Raises FilesystemError naming `where` when they
        do not fit.
        """
        handle = self._ffi.new("struct ext2_xattr_handle **")
        self._check(self._library.ext2fs_xattrs_open(self._fs, number, handle))
        try:
            for name, value in xattrs:
                self._check(self._library.ext2fs_xattr_set(handle[0], name, value, len(value)), where, name)
            self._check(self._library.ext2fs_xattrs_write(handle[0]), where)
        finally:
            self._library.ext2fs_xattrs_close(handle)

    def _check(self, code: int, where: str | None = None, xattr: bytes | None = None) -> None:
        if code:
            about = f"extended attribute {xattr.decode(errors='backslashreplace')}: " if xattr else ""
            raise FilesystemError(f"{about}libext2fs: {self._message(code)}", where=where)


@dataclass(frozen=True, slots=True)
class Extent:
    """`count` blocks of a file from `logical` on lie in the image from `physical` on; unwritten ones read as zeros."""

    logical: int
    physical: int
    count: int
    is_unwritten: bool


class Ext2Reader:
    """An ext4 filesystem in an image file that is open for reading. Made by `opened_for_reading`.

    Every method raises FilesystemError when the library finds the filesystem damaged there; checksums
    of inodes, folders and extent trees are among what it looks at.
    """

    def __init__(self, ffi: Any, library: Any, handle: Any, message: Any) -> None:
        self._ffi, self._library, self._fs, self._message = ffi, library, handle, message
        self._inode = ffi.new(f"unsigned char[{INODE_BYTES}]")
        self._found: list[Any] = []
        # Kept: the library holds no reference to them.
        self._on_name = ffi.callback(
            "int(ext2_ino_t, int, struct ext2_dir_entry *, int, int, char *, void *)", self._add_name, _ENTRY_ABORT
        )
        self._on_xattr = ffi.callback("int(char *, char *, size_t, void *)", self._add_xattr)

    def inode(self, number: int) -> bytes:
        """Return the 256 bytes of an inode."""
        self._check(self._library.ext2fs_read_inode_full(self._fs, number, self._inode, INODE_BYTES), number)
        return bytes(self._ffi.buffer(self._inode))

    def names(self, number: int) -> list[tuple[bytes, int, int]]:
        """Return (name, inode number, file type) of all entries of a folder, '.' and '..' among them."""
        found: list[tuple[bytes, int, int]] = []
        self._found, null = found, self._ffi.NULL
        self._check(self._library.ext2fs_dir_iterate2(self._fs, number, 0, null, self._on_name, null), number)
        return found

    def extents(self, number: int) -> list[Extent]:
        """Return the extents of an inode that has the extents flag, in order."""
        handle, extent = self._ffi.new("struct ext2_extent_handle **"), self._ffi.new("struct ext2fs_extent *")
        self._check(self._library.ext2fs_extent_open2(self._fs, number, self._ffi.NULL, handle), number)
        found: list[Extent] = []
        try:
            code = self._library.ext2fs_extent_get(handle[0], _EXTENT_ROOT, extent)
            while not code:
                if extent.e_flags & _EXTENT_IS_LEAF:
                    is_unwritten = bool(extent.e_flags & _EXTENT_IS_UNWRITTEN)
                    found.append(Extent(extent.e_lblk, extent.e_pblk, extent.e_len, is_unwritten))
                code = self._library.ext2fs_extent_get(handle[0], _EXTENT_NEXT, extent)
            if code != _NO_NEXT_EXTENT:
                self._check(code, number)
        finally:
            self._library.ext2fs_extent_free(handle[0])
        return found

    def xattrs(self, number: int) -> dict[bytes, bytes]:
        """Return the extended attributes of an inode by full name, as they lie on the disk."""
        handle = self._ffi.new("struct ext2_xattr_handle **")
        self._check(self._library.ext2fs_xattrs_open(self._fs, number, handle), number)
        found: list[tuple[bytes, bytes]] = []
        self._found = found
        try:
            self._check(self._library.ext2fs_xattrs_read(handle[0]), number)
            self._check(self._library.ext2fs_xattrs_iterate(handle[0], self._on_xattr, self._ffi.NULL), number)
        finally:
            self._library.ext2fs_xattrs_close(handle)
        return dict(found)

    def _add_name(self, folder: int, entry: int, dirent: Any, offset: int, size: int, buffer: Any, private: Any) -> int:
        del folder, entry, offset, size, buffer, private
        length = dirent.name_len
        self._found.append((bytes(self._ffi.buffer(dirent.name, length & 0xFF)), dirent.inode, length >> 8))
        return 0

    def _add_xattr(self, name: Any, value: Any, length: int, private: Any) -> int:
        del private
        self._found.append((self._ffi.string(name), bytes(self._ffi.buffer(value, length))))
        return 0

    def _check(self, code: int, number: int | None = None) -> None:
        if code:
            where = f"inode {number}" if number else None
            raise FilesystemError(f"libext2fs: {self._message(code)}", where=where)


@contextlib.contextmanager
def opened_for_reading(image: Path) -> Iterator[Ext2Reader]:
    """Open the filesystem in `image`, which is not written to. Raises FilesystemError."""
    ffi, (library, message) = _library()
    handle = ffi.new("ext2_filsys *")
    code = library.ext2fs_open2(bytes(image), _NO_OPTIONS, _FLAG_64BITS, 0, 0, library.unix_io_manager, handle)
    if code:
        raise FilesystemError(f"cannot be read as ext4: libext2fs: {message(code)}", where=str(image))
    try:
        yield Ext2Reader(ffi, library, handle[0], message)
    finally:
        library.ext2fs_free(handle[0])


@contextlib.contextmanager
def opened(image: Path, now: int) -> Iterator[Ext2Filesystem]:
    """Open the filesystem in `image` for filling, all its times being `now`, which is not 0.

    Closing writes bitmaps, group descriptors, and all copies of the superblock. On an exception
    nothing more is written, and the image is of no use. Raises FilesystemError.
    """
    ffi, (library, message) = _library()
    handle = ffi.new("ext2_filsys *")
    filesystem = Ext2Filesystem(ffi, library, ffi.NULL, message)
    flags = _FLAG_RW | _FLAG_64BITS
    filesystem._check(library.ext2fs_open2(bytes(image), _NO_OPTIONS, flags, 0, 0, library.unix_io_manager, handle))
    try:
        fs = filesystem._fs = handle[0]
        fs.now = now
        # Which characters of names are negative depends on the machine that ran mke2fs, and the
        # count of written kilobytes on its filesystem: both are fixed, in every superblock.
        fs.super[_SB_FLAGS] = fs.super[_SB_FLAGS] & ~_UNSIGNED_HASH | _SIGNED_HASH
        fs.super[_SB_KBYTES_WRITTEN : _SB_KBYTES_WRITTEN + 8] = list(bytes(8))
        fs.flags = (fs.flags | _FLAG_DIRTY | _FLAG_CHANGED) & ~_FLAG_MASTER_SB_ONLY
        filesystem._check(library.ext2fs_read_bitmaps(fs))
        filesystem._write_bitmaps_in_use()
        yield filesystem
    except BaseException:
        fs = handle[0]
        fs.flags &= ~(_FLAG_DIRTY | _FLAG_CHANGED)
        library.ext2fs_free(fs)
        raise
    filesystem._check(library.ext2fs_close_free(handle))
