"""The merged tree: a table of rules, and a small reference merge for random layers.

Umoci is the judge of the table in tests/real/test_conformance.py.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fledge_tasks import tree
from fledge_tasks.errors import TreeError
from fledge_tasks.oci.layer import unpack
from fledge_tasks.oci.layer_index import Entry, Kind, read_index
from fledge_tasks.tree import MAX_LINKS, Inode, Layer, merge, walk
from tests import layers as tar
from tests.layers import Member, folder, hardlink, symlink

DEFAULT_NS = 1_234_000_000_000

Stack = list[list[Member]]


def f(path: str, data: str = "", mode: int = 0o644, mtime: str = "100") -> Member:
    """A file."""
    return Member(path, data.encode(), mode=mode, mtime=mtime)


def hide(path: str) -> Member:
    """The whiteout of `path`."""
    head, _, name = path.rpartition("/")
    return Member(f"{head}/.wh.{name}" if head else f".wh.{name}")


def opaque(path: str) -> Member:
    """The mark that hides what lower layers brought below `path`."""
    return Member(f"{path}/.wh..wh..opq" if path else ".wh..wh..opq")


def chain(count: int) -> list[Member]:
    """A path through that many symbolic links: l0 leads to the folder 'end'."""
    return [folder("end"), *(symlink(f"l{at}", f"l{at + 1}" if at + 1 < count else "end") for at in range(count))]


LOWER = [folder("d"), f("d/a", "low"), f("d/b", "low"), folder("d/s"), f("d/s/x", "low")]

CASES: dict[str, tuple[Stack, str | None]] = {
    # name: (layers, what comes out; None for an error)
    "empty": ([[]], ""),
    "missing parents": ([[f("a/b/c/f", "1")]], "a/ a/b/ a/b/c/ a/b/c/f=1"),
    "parent after its content": ([[f("a/f", "1"), folder("a", 0o700)]], "a/ a/f=1"),
    "duplicate": ([[f("a", "1"), f("a", "2", 0o600)]], "a=2"),
    "file over file": ([[f("a", "1", 0o755)], [f("a", "2")]], "a=2"),
    "folder over folder": ([LOWER, [folder("d", 0o700)]], "d/ d/a=low d/b=low d/s/ d/s/x=low"),
    "folder over file": ([[f("a", "1")], [folder("a"), f("a/b", "2")]], "a/ a/b=2"),
    "file over folder": ([LOWER, [f("d", "1")]], "d=1"),
    "symlink over folder": ([LOWER, [folder("e"), symlink("d", "e"), f("d/n", "1")]], "d->e e/ e/n=1"),
    "folder over symlink": ([[folder("e"), symlink("d", "e")], [folder("d"), f("d/n", "1")]], "d/ d/n=1 e/"),
    "file over symlink": ([[f("t", "1"), symlink("l", "t")], [f("l", "2")]], "l=2 t=1"),
    "symlink over file": ([[f("a", "1")], [symlink("a", "b")]], "a->b"),
    "type there and back": ([LOWER, [f("d", "1")], [folder("d")]], "d/"),
    "root entry": ([[folder(".", 0o700), f("a", "1")]], "a=1"),
    "leading slash and dots": ([[f("/a", "1"), f("./b", "2"), f("c/../../d", "3")]], "a=1 b=2 d=3"),
    # whiteouts
    "whiteout of a file": ([LOWER, [hide("d/a")]], "d/ d/b=low d/s/ d/s/x=low"),
    "whiteout of a folder": ([LOWER, [hide("d/s")]], "d/ d/a=low d/b=low"),
    "whiteout of a symlink": ([[folder("t"), f("t/f"), symlink("l", "t")], [hide("l")]], "t/ t/f="),
    "whiteout of nothing": (
        [LOWER, [hide("d/none"), hide("none/none"), opaque("none")]],
        "d/ d/a=low d/b=low d/s/ d/s/x=low"),
    "whiteout, then the file": ([LOWER, [hide("d/a"), f("d/a", "up")]], "d/ d/a=up d/b=low d/s/ d/s/x=low"),
    "the file, then its whiteout": ([LOWER, [f("d/a", "up"), hide("d/a")]], "d/ d/a=up d/b=low d/s/ d/s/x=low"),
    "whiteout, then below": ([LOWER, [hide("d"), f("d/n", "up")]], "d/ d/n=up"),
    "below, then whiteout": ([LOWER, [f("d/s/n", "up"), hide("d")]], "d/ d/s/ d/s/n=up"),
    "folder, then whiteout of it": ([LOWER, [folder("d"), hide("d")]], "d/"),
    "whiteout through a symlink": ([[*LOWER, symlink("l", "/d")], [hide("l/a")]], "d/ d/b=low d/s/ d/s/x=low l->/d"),
    "own file, whiteout through a symlink": (
        [[*LOWER, symlink("l", "d")], [f("d/a", "up"), hide("l/a"), hide("l/b")]], "d/ d/a=up d/s/ d/s/x=low l->d"),
    "own file through a symlink, whiteout": (
        [[*LOWER, symlink("l", "d")], [f("l/a", "up"), hide("d/a"), hide("d/b")]], "d/ d/a=up d/s/ d/s/x=low l->d"),
    "whiteout in the lowest layer": ([[f("a", "1"), hide("a"), hide("b"), f("b", "2")]], "a=1 b=2"),
    "whiteout of one name of two": ([[f("a", "1"), hardlink("b", "a")], [hide("a")]], "b=1"),
    "whiteout of a parent symlink": (
        [[folder("t"), symlink("l", "t")], [hide("l"), f("l/f", "1")]], "l/ l/f=1 t/"),
    "whiteout as a hard link": (
        [LOWER, [Member("d/.wh.a", type=tarfile.LNKTYPE, link="d/b")]],
        "d/ d/b=low d/s/ d/s/x=low"),
    "opaque first": ([LOWER, [folder("d"), opaque("d"), f("d/n", "up")]], "d/ d/n=up"),
    "opaque last": ([LOWER, [f("d/n", "up"), f("d/s/y", "up"), opaque("d")]], "d/ d/n=up d/s/ d/s/y=up"),
    "opaque alone": ([LOWER, [opaque("d")]], "d/"),
    "opaque of the root": ([LOWER, [f("n", "up"), opaque("")]], "n=up"),
    "opaque through a symlink": ([[*LOWER, symlink("l", "d")], [opaque("l")]], "d/ l->d"),
    "opaque twice": ([LOWER, [opaque("d"), f("d/a", "up"), opaque("d")]], "d/ d/a=up"),
    "opaque of a file": ([[f("a", "1")], [opaque("a")]], "a=1"),
    "whiteout does not reach the next layer": (
        [LOWER, [hide("d/a")], [f("d/a", "up")]],
        "d/ d/a=up d/b=low d/s/ d/s/x=low"),
    # parents that are symlinks
    "relative": ([[folder("a/b"), symlink("l", "a/b"), f("l/f", "1")]], "a/ a/b/ a/b/f=1 l->a/b"),
    "relative to where it stands": (
        [[folder("a/b"), folder("a/c"), symlink("a/c/l", "../b"), f("a/c/l/f", "1")]],
        "a/ a/b/ a/b/f=1 a/c/ a/c/l->../b"),
    "absolute": ([[folder("a/b"), symlink("l", "/a/b"), f("l/f", "1")]], "a/ a/b/ a/b/f=1 l->/a/b"),
    "absolute from below": ([[folder("a"), folder("b"), symlink("a/l", "/b"), f("a/l/f", "1")]], "a/ a/l->/b b/ b/f=1"),
    "chained": (
        [[folder("e"), symlink("a", "b"), symlink("b", "/c"), symlink("c", "./e/."), f("a/f", "1")]],
        "a->b b->/c c->./e/. e/ e/f=1"),
    "dangling": ([[symlink("l", "x/y"), f("l/f", "1")]], "l->x/y x/ x/y/ x/y/f=1"),
    "dangling, absolute": ([[symlink("l", "/x"), f("l/m/f", "1")]], "l->/x x/ x/m/ x/m/f=1"),
    "out of the root": ([[symlink("l", "../../../x"), f("l/f", "1")]], "l->../../../x x/ x/f=1"),
    "to the root": ([[symlink("l", "/"), f("l/f", "1")]], "f=1 l->/"),
    "to the root by ..": ([[folder("a"), symlink("a/l", ".."), f("a/l/f", "1")]], "a/ a/l->.. f=1"),
    ".. after what is missing": ([[symlink("l", "x/../y"), f("l/f", "1")]], "l->x/../y y/ y/f=1"),
    ".. after a file": ([[f("x", "1"), symlink("l", "x/../y"), f("l/f", "1")]], "l->x/../y x=1 y/ y/f=1"),
    ".. after a symlink": (
        [[folder("a/b"), symlink("s", "a/b"), symlink("l", "s/../y"), f("l/f", "1")]],
        "a/ a/b/ a/y/ a/y/f=1 l->s/../y s->a/b"),
    "what was missing becomes a symlink": (
        [[folder("a/b"), symlink("l", "x/../y"), f("l/f", "1"), symlink("x", "a/b"), f("l/g", "2")]],
        "a/ a/b/ a/y/ a/y/g=2 l->x/../y x->a/b y/ y/f=1"),
    "what was a file becomes a symlink": (
        [[folder("a/b"), f("x"), symlink("l", "x/../y"), f("l/f", "1"), symlink("x", "a/b"), f("l/g", "2")]],
        "a/ a/b/ a/y/ a/y/g=2 l->x/../y x->a/b y/ y/f=1"),
    "a symlink changes its target": (
        [[folder("a"), folder("b"), symlink("l", "a"), f("l/f", "1"), symlink("l", "b"), f("l/f", "2")]],
        "a/ a/f=1 b/ b/f=2 l->b"),
    "a hard link to a symlink changes a path": (
        [[folder("a/b"), symlink("s", "a/b"), symlink("l", "x/../y"), f("l/f", "1"), hardlink("x", "s"),
          f("l/g", "2")]],
        "a/ a/b/ a/y/ a/y/g=2 l->x/../y s->a/b x=s y/ y/f=1"),
    "loop": ([[symlink("a", "b"), symlink("b", "a"), f("a/f", "1")]], None),
    "loop onto itself": ([[symlink("a", "a"), f("a/f", "1")]], None),
    "loop, whiteout": ([[symlink("a", "a"), hide("a/f")]], None),
    "as many links as allowed": ([[*chain(MAX_LINKS), f("l0/f", "1")]], "end/ end/f=1 " + " ".join(
        sorted(f"l{at}->{f'l{at + 1}' if at + 1 < MAX_LINKS else 'end'}" for at in range(MAX_LINKS)))),
    "one link too many": ([[*chain(MAX_LINKS + 1), f("l0/f", "1")]], None),
    "below a file": ([[f("a", "1"), f("a/b", "2")]], None),
    "below a file through a symlink": ([[f("a", "1"), symlink("l", "a"), f("l/b", "2")]], None),
    "below a lower file": ([[f("a", "1")], [f("a/b/c", "2")]], None),
    "replaced parent": ([[folder("a"), f("a/f", "1")], [f("a"), folder("a"), f("a/g", "2")]], "a/ a/g=2"),
    # hard links
    "hard link": ([[f("a", "1"), hardlink("b", "a"), hardlink("c/d", "b")]], "a=1 b=a c/ c/d=a"),
    "hard link into a lower layer": ([[f("a", "1")], [hardlink("b", "/a")]], "a=1 b=a"),
    "hard link through a symlink": (
        [[folder("d"), f("d/a", "1"), symlink("l", "d"), hardlink("b", "l/a")]],
        "b=1 d/ d/a=b l->d"),
    "hard link to a symlink": ([[f("t", "1"), symlink("a", "t"), hardlink("b", "a")]], "a->t b=a t=1"),
    "hard link, then its target is replaced": ([[f("a", "1"), hardlink("b", "a"), f("a", "2")]], "a=2 b=1"),
    "hard link, then it is replaced": ([[f("a", "1"), hardlink("b", "a")], [f("b", "2")]], "a=1 b=2"),
    "hard link over a file": ([[f("a", "1"), f("b", "2")], [hardlink("b", "a")]], "a=1 b=a"),
    "hard link over a folder": ([[f("a", "1"), *LOWER], [hardlink("d", "a")]], "a=1 d=a"),
    "hard link to a hidden file": ([[f("a", "1")], [hide("a"), hardlink("b", "a")]], None),
    "hard link to a file that is hidden later": ([[f("a", "1")], [hardlink("b", "a"), hide("a")]], "b=1"),
    "hard link to nothing": ([[hardlink("b", "a")]], None),
    "hard link before its target": ([[hardlink("b", "a"), f("a", "1")]], None),
    "hard link to a folder": ([[folder("a"), hardlink("b", "a")]], None),
    "hard link to itself": ([[f("a", "1")], [hardlink("a", "a")]], None),
    "hard link out of the root": ([[f("a", "1"), hardlink("b", "../../a")]], "a=1 b=a"),
}  # fmt: skip


def unpacked(members: Sequence[Member]) -> list[Entry]:
    """Return the entries of a layer by way of its archive."""
    blob, diff_id = tar.layer(members, "none")
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as payload:
        index = Path(scratch, "index")
        with index.open("wb") as file:
            unpack(
                io.BytesIO(blob),
                diff_id=diff_id,
                blob_digest=tar.digest(blob),
                blob_size=len(blob),
                limits=tar.LIMITS,
                payload_fd=payload.fileno(),
                index_file=file,
                advance=lambda _: None,
                where="layer",
            )
        return read_index(index)


def merged(stack: Stack) -> tuple[Inode, dict[int, bytes]]:
    """Return the tree, and the data of its files by the identity of their entries."""
    layers = [(f"layer {at}", unpacked(members), members) for at, members in enumerate(stack)]
    data = {
        id(entry): member.data for _, entries, members in layers for entry, member in zip(entries, members, strict=True)
    }
    root = merge([Layer(name, entries) for name, entries, _ in layers], DEFAULT_NS)
    return root, data


def compact(stack: Stack) -> str:
    """Return what a stack comes to in the notation of the table."""
    root, data = merged(stack)
    first: dict[int, str] = {}
    words = []
    for path, inode in walk(root):
        name = path.decode()
        if inode.children is not None:
            words.append(name + "/")
        elif id(inode) in first:
            words.append(f"{name}={first[id(inode)]}")
        elif inode.entry.kind is Kind.SYMLINK:
            words.append(f"{name}->{inode.entry.link.decode()}")
        else:
            words.append(f"{name}={data[id(inode.entry)].decode()}")
        first.setdefault(id(inode), name)
    return " ".join(sorted(words[1:]))


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    stack, expected = CASES[name]
    if expected is None:
        with pytest.raises(TreeError) as caught:
            merged(stack)
        assert caught.value.where == f"layer {len(stack) - 1}"
    else:
        assert compact(stack) == " ".join(sorted(expected.split()))


def test_folders_without_entries_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of 4 KiB makes 2,048 folders, whose paths take 4 MiB: a layer of a megabyte would fill all memory."""
    deep = [Entry(b"%d/" % at + b"d/" * 2000 + b"f", Kind.FILE) for at in range(10)]
    monkeypatch.setattr(tree, "MAX_IMPLICIT_BYTES", 30 << 20)
    assert len(list(walk(merge([Layer("a", deep[:5])], 0)))) == 1 + 5 * 2002
    layers = [Layer("a", deep[:5]), Layer("b", deep[5:])]
    with pytest.raises(
        TreeError, match=r"^b: /[0-9]/d/d.* too many folders that have no entry of their own$"
    ) as caught:
        merge(layers, 0)
    assert len(caught.value.message) < 300


def test_where_names_the_layer_and_the_message_the_path() -> None:
    layers = [Layer("sha256:aaa", []), Layer("sha256:bbb", [Entry(b"b", Kind.HARDLINK, link=b"a\xff")])]
    with pytest.raises(TreeError, match=r"^sha256:bbb: /b is a hard link to /a\\xff, which does not exist$"):
        merge(layers, 0)


def test_metadata() -> None:
    lower = Entry(b"d", Kind.DIRECTORY, 0o700, 1, 2, 3, xattrs={b"user.a": b"1"})
    upper = Entry(b"d", Kind.DIRECTORY, 0o1777, 4, 5, 6, xattrs={b"user.b": b"2"})
    top = Entry(b"", Kind.DIRECTORY, 0o711, 7, 8, 9)
    root = merge([Layer("0", [lower, Entry(b"x/y", Kind.FILE)]), Layer("1", [upper, top])], DEFAULT_NS)
    assert root.children is not None
    assert root.entry == top or root.entry is top
    assert root.children[b"d"].entry is upper
    made = root.children[b"x"].entry
    assert (made.mode, made.uid, made.gid, made.mtime_ns) == (0o755, 0, 0, DEFAULT_NS)


def test_walk_is_sorted_and_folders_come_first() -> None:
    paths = [b"b", b"a/z", b"a/b/c", b"a.x", b"a/a"]
    root = merge([Layer("0", [Entry(path, Kind.FILE) for path in paths])], 0)
    assert [path for path, _ in walk(root)] == [b"", b"a", b"a/a", b"a/b", b"a/b/c", b"a/z", b"a.x", b"b"]


def test_tree_of_many_levels() -> None:
    path = b"/".join([b"d"] * 2000)
    root = merge([Layer("0", [Entry(path, Kind.FILE)]), Layer("1", [Entry(b"d", Kind.WHITEOUT)])], 0)
    assert root.children == {}


# Customization layers.


def customized(image: list[Entry], mapped: list[Entry]) -> dict[bytes, Inode]:
    root = merge([Layer("image", image), Layer("mappings", mapped, is_customization=True)], DEFAULT_NS)
    return dict(walk(root))


def kept(path: bytes) -> Entry:
    return Entry(path, Kind.DIRECTORY, 0o755, keep=True)


def test_kept_folder_leaves_the_one_of_the_image() -> None:
    own = Entry(b"d", Kind.DIRECTORY, 0o1777, uid=5, xattrs={b"user.a": b"1"})
    found = customized([own, Entry(b"d/f", Kind.FILE)], [kept(b"d"), Entry(b"d/g", Kind.FILE), kept(b"e"), kept(b"")])
    assert list(found) == [b"", b"d", b"d/f", b"d/g", b"e"]
    assert found[b"d"].entry is own
    assert found[b"e"].entry.mode == 0o755
    assert (found[b"d/f"].source, found[b"d/g"].source) == (0, 1)


def test_kept_folder_over_a_symlink_to_a_folder() -> None:
    image = [Entry(b"usr/bin", Kind.DIRECTORY, 0o711), Entry(b"bin", Kind.SYMLINK, link=b"usr/bin")]
    found = customized(image, [kept(b"bin"), Entry(b"bin/kestrel", Kind.FILE, 0o755)])
    assert list(found) == [b"", b"bin", b"usr", b"usr/bin", b"usr/bin/kestrel"]
    assert found[b"bin"].entry.kind is Kind.SYMLINK
    assert found[b"usr/bin"].entry.mode == 0o711


def test_kept_folder_over_a_dangling_symlink_makes_its_target() -> None:
    found = customized([Entry(b"data", Kind.SYMLINK, link=b"/var/data")], [kept(b"data")])
    assert list(found) == [b"", b"data", b"var", b"var/data"]


@pytest.mark.parametrize(
    "image",
    [
        [Entry(b"d", Kind.FILE)],
        [Entry(b"d", Kind.FIFO)],
        [Entry(b"f", Kind.FILE), Entry(b"d", Kind.SYMLINK, link=b"f")],
        [Entry(b"d", Kind.SYMLINK, link=b"d")],
    ],
    ids=["file", "fifo", "symlink to a file", "symlink to itself"],
)
def test_kept_folder_over_what_is_none_is_refused(image: list[Entry]) -> None:
    with pytest.raises(TreeError, match="/d"):
        customized(image, [kept(b"d")])


def test_mapped_file_over_a_folder_is_refused() -> None:
    with pytest.raises(TreeError, match=r"^mappings: /d is a folder in the image.*\n  hint: end .* with '/'"):
        customized([Entry(b"d/f", Kind.FILE)], [Entry(b"d", Kind.FILE)])


def test_mapped_file_takes_the_place_of_a_file_or_symlink() -> None:
    image = [Entry(b"a", Kind.FILE), Entry(b"b", Kind.SYMLINK, link=b"a")]
    found = customized(image, [Entry(b"a", Kind.FILE, 0o600), Entry(b"b", Kind.FILE, 0o600)])
    assert [(inode.source, inode.entry.mode) for path, inode in found.items() if path] == [(1, 0o600), (1, 0o600)]


# Random layers against a merge that keeps one flat dict of paths.

PathTuple = tuple[bytes, ...]


class ReferenceMergeError(Exception):
    """The reference cannot apply an entry."""


class Reference:
    """`nodes` maps each path to a list that stands for its inode: [entry, number of the layer]."""

    def __init__(self) -> None:
        self.nodes: dict[PathTuple, list[object]] = {}
        self.root: Entry | None = None

    def kind(self, path: PathTuple) -> Kind | None:
        if not path:
            return Kind.DIRECTORY
        node = self.nodes.get(path)
        return None if node is None else self.entry(node).kind

    @staticmethod
    def entry(node: list[object]) -> Entry:
        entry = node[0]
        assert isinstance(entry, Entry)
        return entry

    def resolve(self, path: bytes) -> PathTuple:
        """filepath-securejoin, word by word."""
        done: PathTuple = ()
        links, rest = 0, path
        while rest:
            if links > 255:
                raise ReferenceMergeError
            name, _, rest = rest.partition(b"/")
            here = done[:-1] if name == b".." else done if name in {b"", b"."} else (*done, name)
            if self.kind(here) is Kind.SYMLINK and here != done:
                links += 1
                target = self.entry(self.nodes[here]).link
                done = () if target.startswith(b"/") else done
                rest = target + b"/" + rest
            else:
                done = here
        return done

    def place_of(self, path: bytes) -> PathTuple:
        head, _, name = path.rpartition(b"/")
        return (*self.resolve(head), name)

    def remove(self, path: PathTuple) -> None:
        for other in [other for other in self.nodes if other[: len(path)] == path]:
            del self.nodes[other]

    def apply(self, entries: Sequence[Entry], number: int) -> None:
        upper: set[PathTuple] = set()
        for entry in entries:
            if entry.kind is Kind.OPAQUE:
                top = self.resolve(entry.path)
                doomed = [path for path in self.nodes if len(path) > len(top) and path[: len(top)] == top]
            elif entry.kind is Kind.WHITEOUT:
                top = self.place_of(entry.path)
                doomed = [path for path in self.nodes if path[: len(top)] == top]
            elif not entry.path:
                self.root = entry
                continue
            else:
                place = self.place_of(entry.path)
                for depth in range(1, len(place)):
                    if self.kind(place[:depth]) is None:
                        made = Entry(b"", Kind.DIRECTORY, 0o755, mtime_ns=DEFAULT_NS)
                        self.nodes[place[:depth]] = [made, number]
                    elif self.kind(place[:depth]) is not Kind.DIRECTORY:
                        raise ReferenceMergeError
                upper.update(place[:depth] for depth in range(1, len(place) + 1))
                if entry.kind is Kind.DIRECTORY and self.kind(place) is Kind.DIRECTORY:
                    self.nodes[place][0] = entry
                    continue
                self.remove(place)
                if entry.kind is Kind.HARDLINK:
                    target = self.place_of(entry.link)
                    if self.kind(target) in {None, Kind.DIRECTORY}:
                        raise ReferenceMergeError
                    self.nodes[place] = self.nodes[target]
                else:
                    self.nodes[place] = [entry, number]
                continue
            for path in doomed:
                # Gone with its folder, unless this layer brought it, which then brought the folder too.
                if path not in upper:
                    self.nodes.pop(path, None)


NAMES = st.sampled_from([b"a", b"b", b"c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
TARGETS = st.builds(
    lambda start, names: start + b"/".join(names),
    st.sampled_from([b"", b"", b"/"]),
    st.lists(st.sampled_from([b"a", b"b", b"c", b"..", b"."]), min_size=1, max_size=3),
)
ENTRIES = st.one_of(
    st.builds(Entry, PATHS, st.sampled_from([Kind.FILE, Kind.DIRECTORY, Kind.DIRECTORY, Kind.CHAR_DEVICE])),
    st.builds(lambda path, link: Entry(path, Kind.SYMLINK, link=link), PATHS, TARGETS),
    st.builds(lambda path, link: Entry(path, Kind.HARDLINK, link=link), PATHS, PATHS),
    st.builds(Entry, PATHS, st.sampled_from([Kind.WHITEOUT, Kind.OPAQUE])),
    st.builds(Entry, st.just(b""), st.sampled_from([Kind.DIRECTORY, Kind.OPAQUE])),
)
STACKS = st.lists(st.lists(ENTRIES, max_size=7), min_size=1, max_size=4)


def groups(found: dict[bytes, tuple[object, object, int]]) -> dict[bytes, tuple[object, object, bytes]]:
    """Replace the identity of each inode by the first of its paths."""
    first: dict[int, bytes] = {}
    return {path: (*found[path][:2], first.setdefault(found[path][2], path)) for path in sorted(found)}


@settings(max_examples=400, deadline=None)
@given(STACKS)
@example([[Entry(b"a", Kind.SYMLINK, link=b"b/../c"), Entry(b"a/a", Kind.FILE), Entry(b"b", Kind.SYMLINK, link=b"a/b"),
           Entry(b"a/b", Kind.FILE)]])  # fmt: skip
def test_random_layers_agree_with_the_reference(stack: list[list[Entry]]) -> None:
    reference = Reference()
    try:
        for number, entries in enumerate(stack):
            reference.apply(entries, number)
    except ReferenceMergeError:
        with pytest.raises(TreeError):
            merge([Layer("", entries) for entries in stack], DEFAULT_NS)
        return
    root = merge([Layer("", entries) for entries in stack], DEFAULT_NS)
    ours: dict[bytes, tuple[object, object, int]] = {}
    for path, inode in walk(root):
        if path:
            is_made = inode.entry.mtime_ns == DEFAULT_NS
            ours[path] = ("made" if is_made else id(inode.entry), inode.source, id(inode))
    theirs: dict[bytes, tuple[object, object, int]] = {}
    for names, node in reference.nodes.items():
        entry = Reference.entry(node)
        theirs[b"/".join(names)] = ("made" if entry.mtime_ns == DEFAULT_NS else id(entry), node[1], id(node))
    assert groups(ours) == groups(theirs)
    assert reference.root is None or root.entry is reference.root


def test_all_paths_together_lead_through_so_many_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each path alone is within the limit for one; a layer of many would keep a processor busy for days."""
    deep = "/".join(["."] * 50)
    members = [folder("end"), symlink("a", f"{deep}/end"), *(f(f"a/{number}/x", "1") for number in range(10))]
    monkeypatch.setattr("fledge_tasks.tree.MAX_LINKED_NAMES", 10 * 51)
    merge([Layer("layer", unpacked(members))], DEFAULT_NS)
    monkeypatch.setattr("fledge_tasks.tree.MAX_LINKED_NAMES", 10 * 51 - 1)
    with pytest.raises(TreeError, match="/a/9 leads through too many symbolic links"):
        merge([Layer("layer", unpacked(members))], DEFAULT_NS)
