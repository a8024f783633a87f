"""The merged namespace of an image: layers applied one on the other, in memory.

The rules are those of `umoci unpack`, which follow the OCI image spec ('layer.md', 'Applying
Changesets'): the parent of an entry is found by following symlinks inside the image, missing
parents are made, the last component is never followed, a folder keeps its content when a folder
comes over it, everything else is replaced, whiteouts hide what lower layers brought and never
what their own layer brings, hard links join the inode that the target has at that moment.

No host path is ever made from a name found in a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fledge_tasks.errors import TreeError
from fledge_tasks.oci.layer_index import Entry, Kind

MAX_LINKS = 255  # as filepath-securejoin, which umoci uses
MAX_LINKED_NAMES = 50_000_000
"""Names in the targets of all symbolic links that paths lead through: each path alone may have half a million."""

MAX_IMPLICIT_BYTES = 1 << 30
"""What folders that no entry describes may take: one entry can make 2,048 of them, each with a path of 4 KiB."""

_INODE_BYTES = 1 << 9  # about what a folder takes beside its path
_DIRECTORY_MODE = 0o755


class Inode:
    """A file, folder, link or device. Names are in the folders; hard links share one object.

    `source` is the number of the layer that holds the data; `children` is None but for folders.
    """

    __slots__ = ("children", "entry", "source")

    def __init__(self, entry: Entry, source: int) -> None:
        self.entry = entry
        self.source = source
        self.children: dict[bytes, Inode] | None = {} if entry.kind is Kind.DIRECTORY else None


@dataclass(frozen=True)
class Layer:
    """The entries of one layer, in archive order. `name` is for messages.

    `is_customization`: made from mappings, not from an image, so that replacing a folder by a
    file, which wipes what is in it, is refused as a mistake.
    """

    name: str
    entries: Sequence[Entry]
    is_customization: bool = False


def merge(layers: Sequence[Layer], default_mtime_ns: int) -> Inode:
    """Apply the layers from the lowest up and return the root folder.

    Folders that no entry describes get mode 0755, owner root and `default_mtime_ns`, the root the
    mtime 0, as umoci gives it. Raises TreeError, naming layer and path, for an entry that cannot be
    applied.
    """
    merger = _Merger(default_mtime_ns)
    for source, layer in enumerate(layers):
        merger.apply(layer, source)
    return merger.root


def walk(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    """Yield (path, inode) of every name below `root`, folders before their content, sorted by name."""
    stack: list[tuple[bytes, Inode]] = [(b"", root)]
    while stack:
        path, inode = stack.pop()
        yield path, inode
        if inode.children:
            prefix = path + b"/" if path else b""
            stack.extend((prefix + name, inode.children[name]) for name in sorted(inode.children, reverse=True))


class _Merger:
    def __init__(self, default_mtime_ns: int) -> None:
        self._default_mtime_ns = default_mtime_ns
        self._layer = Layer("", ())
        self._source = 0
        self._upper: set[bytes] | None = None
        # Parents already found, by path as written. Removing a folder or symlink can change where a
        # path leads, and so can a new symlink: 'x/..' in a link's target needs no 'x' to be there.
        self._found: dict[bytes, tuple[Inode, bytes]] = {}
        self._implicit_bytes = 0
        self._linked_names = 0
        self.root = Inode(Entry(b"", Kind.DIRECTORY, _DIRECTORY_MODE), 0)

    def apply(self, layer: Layer, source: int) -> None:
        self._layer, self._source = layer, source
        self._found.clear()
        hides = any(entry.kind >= Kind.WHITEOUT for entry in layer.entries)
        # Paths of this layer and their ancestors, links resolved: what its whiteouts must not touch.
        self._upper = set() if hides else None
        for entry in layer.entries:
            if entry.kind is Kind.WHITEOUT:
                self._whiteout(entry)
            elif entry.kind is Kind.OPAQUE:
                self._opaque(entry)
            elif entry.kind is Kind.DIRECTORY and entry.keep:
                self._ensure_directory(entry)
            else:
                self._place(entry)

    def _place(self, entry: Entry) -> None:
        if not entry.path:
            self.root.entry = entry
            return
        head, _, name = entry.path.rpartition(b"/")
        parent, where = self._parent(head)
        assert parent.children is not None
        old = parent.children.get(name)
        if self._upper is not None:
            self._mark(where + b"/" + name)
        if entry.kind is Kind.DIRECTORY and old is not None and old.children is not None:
            old.entry = entry
            return
        if old is not None:
            if self._layer.is_customization and old.children is not None:
                raise self._error(
                    entry.path,
                    "is a folder in the image, and a file is mapped over it",
                    "end the destination with '/' to put the file inside the folder",
                )
            if old.children is not None or old.entry.kind is Kind.SYMLINK:
                self._found.clear()
            del parent.children[name]
        inode = self._link_target(entry) if entry.kind is Kind.HARDLINK else Inode(entry, self._source)
        parent.children[name] = inode
        if inode.entry.kind is Kind.SYMLINK:
            self._found.clear()

    def _link_target(self, entry: Entry) -> Inode:
        head, _, name = entry.link.rpartition(b"/")
        found = self._find(head)
        target = found[0].children.get(name) if found and found[0].children else None
        if target is None:
            raise self._error(entry.path, f"is a hard link to {show(entry.link)}, which does not exist")
        if target.children is not None:
            raise self._error(entry.path, f"is a hard link to {show(entry.link)}, which is a folder")
        return target

    def _ensure_directory(self, entry: Entry) -> None:
        head, _, name = entry.path.rpartition(b"/")
        if not name:
            return
        parent, _ = self._parent(head)
        assert parent.children is not None
        old = parent.children.get(name)
        if old is None:
            parent.children[name] = Inode(entry, self._source)
            return
        if old.entry.kind is Kind.SYMLINK:
            self._parent(entry.path)
        elif old.children is None:
            raise self._error(entry.path, "is not a folder in the image, and a folder is mapped over it")

    def _whiteout(self, entry: Entry) -> None:
        head, _, name = entry.path.rpartition(b"/")
        found = self._find(head)
        if found is not None:
            self._hide(found[0], name, found[1] + b"/" + name)

    def _opaque(self, entry: Entry) -> None:
        found = self._find(entry.path)
        if found is not None and found[0].children is not None:
            for name in list(found[0].children):
                self._hide(found[0], name, found[1] + b"/" + name)

    def _hide(self, parent: Inode, name: bytes, path: bytes) -> None:
        assert parent.children is not None and self._upper is not None
        pending = [(parent, name, path)]
        while pending:
            folder, name, path = pending.pop()
            assert folder.children is not None
            child = folder.children.get(name)
            if child is None:
                continue
            if path not in self._upper:
                del folder.children[name]
                self._found.clear()
            elif child.children is not None:
                pending.extend((child, below, path + b"/" + below) for below in child.children)

    def _mark(self, path: bytes) -> None:
        assert self._upper is not None
        while path and path not in self._upper:
            self._upper.add(path)
            path = path.rpartition(b"/")[0]

    def _parent(self, path: bytes) -> tuple[Inode, bytes]:
        """Return the folder that `path` leads to and where it really is, making what is missing."""
        found = self._found.get(path)
        if found is None:
            found = self._found[path] = self._resolve(path, create=True)
        return found

    def _find(self, path: bytes) -> tuple[Inode, bytes] | None:
        """Like `_parent`, but None when there is no such folder."""
        found = self._found.get(path)
        if found is not None:
            return found
        try:
            return self._resolve(path, create=False)
        except _MissingError:
            return None

    def _resolve(self, path: bytes, *, create: bool) -> tuple[Inode, bytes]:
        # Components that do not exist stay on the stack as None, so that '..' in a link's target
        # takes them away again without their being made.
        stack: list[Inode | None] = [self.root]
        names: list[bytes] = []
        remaining = path.split(b"/")[::-1]
        links = 0
        while remaining:
            name = remaining.pop()
            if name in {b"", b"."}:
                continue
            if name == b"..":
                if names:
                    stack.pop()
                    names.pop()
                continue
            here = stack[-1]
            child = here.children.get(name) if here is not None and here.children is not None else None
            if child is not None and child.entry.kind is Kind.SYMLINK:
                links += 1
                target = child.entry.link
                self._linked_names += target.count(b"/") + 1
                if links > MAX_LINKS or self._linked_names > MAX_LINKED_NAMES:
                    raise self._error(path, "leads through too many symbolic links")
                if target.startswith(b"/"):
                    del stack[1:], names[:]
                remaining.extend(target.split(b"/")[::-1])
                continue
            stack.append(child)
            names.append(name)
        for depth, name in enumerate(names, 1):
            inode, parent = stack[depth], stack[depth - 1]
            assert parent is not None
            if inode is None or inode.children is None:
                if not create:
                    raise _MissingError
                if inode is not None or parent.children is None:
                    blocked = b"/".join(names[:depth])
                    way = "" if blocked == path else f"leads through {show(blocked)}, which "
                    raise self._error(path, f"{way}is not a folder")
                inode = stack[depth] = self._implicit(b"/".join(names[:depth]))
                parent.children[name] = inode
        last = stack[-1]
        assert last is not None
        return last, b"".join(b"/" + name for name in names)

    def _implicit(self, path: bytes) -> Inode:
        self._implicit_bytes += _INODE_BYTES + len(path)
        if self._implicit_bytes > MAX_IMPLICIT_BYTES:
            raise self._error(path[:200], "is one of too many folders that have no entry of their own")
        return Inode(Entry(path, Kind.DIRECTORY, _DIRECTORY_MODE, mtime_ns=self._default_mtime_ns), self._source)

    def _error(self, path: bytes, message: str, hint: str | None = None) -> TreeError:
        return TreeError(f"{show(path)} {message}", where=self._layer.name, hint=hint)


class _MissingError(Exception):
    pass


def show(path: bytes) -> str:
    """Return a path of an image for messages, absolute."""
    return "/" + path.lstrip(b"/").decode(errors="backslashreplace")
