"""Mapped files: modes, expansion, precedence, and the layer made from them."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks.digest import sha256_bytes, sha256_file
from fledge_tasks.errors import MappingError
from fledge_tasks.mappings import MappedFile, entries, expand, mode_for
from fledge_tasks.oci.layer_index import BLOCK_BYTES, Kind
from fledge_tasks.oci.payload import PayloadWriter

EPOCH_NS = 1_700_000_000_000_000_000


def make(root: Path, tree: Mapping[str, str | None]) -> Path:
    """Make files (text), folders (None) and symbolic links ('-> target') below `root`."""
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif content.startswith("-> "):
            path.symlink_to(content.removeprefix("-> "))
        else:
            path.write_text(content)
            path.chmod(0o644)
    return root


def destinations(mappings: Sequence[tuple[str, str]], folder: Path) -> dict[str, str]:
    """Expand and return destination to a short description: kind, or the text of a file, or '-> target'."""
    mapped, sources = expand(mappings, folder, sha256_file)
    assert set(sources) == {file.destination for file in mapped if file.kind == "file"}
    described = {}
    for file in mapped:
        if file.kind == "file":
            described[file.destination] = sources[file.destination].read_text()
        else:
            described[file.destination] = f"-> {file.link}" if file.kind == "symlink" else "/"
    return described


def problems(mappings: Sequence[tuple[str, str]], folder: Path) -> list[str]:
    with pytest.raises(MappingError) as caught:
        expand(mappings, folder, sha256_file)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("destination", "host_mode", "expected"),
    [
        ("/etc/my.conf", 0o644, 0o644),
        ("/etc/my.conf", 0o600, 0o644),
        ("/etc/my.conf", 0o666, 0o644),
        ("/etc/my.conf", 0o4644, 0o644),
        ("/srv/run.sh", 0o755, 0o755),
        ("/srv/run.sh", 0o744, 0o755),
        ("/srv/run.sh", 0o700, 0o700),
        ("/srv/run.sh", 0o654, 0o755),
        ("/srv/run.sh", 0o775, 0o775),
        ("/srv/run.sh", 0o4755, 0o755),
        ("/srv/run.sh", 0o3711, 0o700),
        ("/usr/bin/tool", 0o700, 0o700),
        ("/usr/bin/tool", 0o640, 0o755),
        ("/bin/tool", 0o644, 0o755),
        ("/sbin/tool", 0o644, 0o755),
        ("/usr/sbin/tool", 0o644, 0o755),
        ("/usr/local/bin/tool", 0o644, 0o755),
        ("/usr/local/sbin/tool", 0o644, 0o755),
        ("/opt/bin/tool", 0o644, 0o755),
        ("/opt/sbin/sub/tool", 0o644, 0o755),
        ("/bin", 0o644, 0o644),
        ("/binary/tool", 0o644, 0o644),
        ("/home/bin/tool", 0o644, 0o644),
        ("/lib/libc.so", 0o644, 0o755),
        ("/lib64/libc.so.6", 0o644, 0o755),
        ("/usr/lib/a/b/x.so.1.2", 0o600, 0o755),
        ("/usr/lib64/x.so", 0o644, 0o755),
        ("/usr/local/lib/x.so", 0o644, 0o755),
        ("/usr/local/lib64/x.so", 0o644, 0o755),
        ("/lib/x.so.d/readme", 0o644, 0o644),
        ("/lib/x.sock", 0o644, 0o644),
        ("/lib/x.also", 0o644, 0o644),
        ("/srv/lib/x.so", 0o644, 0o644),
        ("/usr/bin", stat.S_IFDIR | 0o1700, 0o755),
        ("/srv", stat.S_IFDIR | 0o2770, 0o755),
        ("/srv/link", stat.S_IFLNK | 0o777, 0o777),
    ],
)
def test_mode_table(destination: str, host_mode: int, expected: int) -> None:
    assert mode_for(destination, host_mode) == expected


@given(
    st.lists(st.sampled_from(["bin", "usr", "lib", "x.so", "etc", "y"]), min_size=1).map("/".join),
    st.integers(0, 0o7777),
)
def test_mode_invariants(path: str, host_mode: int) -> None:
    mode = mode_for("/" + path, stat.S_IFREG | host_mode)
    assert mode & ~0o777 == 0
    if host_mode & 0o111:
        assert mode & 0o666 == host_mode & 0o666
        assert (mode & 0o111) << 2 == mode & 0o444
    else:
        assert mode in {0o644, 0o755}


def test_file_record_holds_content_only(tmp_path: Path) -> None:
    make(tmp_path, {"my.conf": "hello"})
    mapped, sources = expand([("./my.conf", "/etc//./my.conf")], tmp_path, sha256_file)
    assert mapped == [MappedFile("/etc/my.conf", "file", 0o644, sha256_bytes(b"hello"), 5)]
    assert sources == {"/etc/my.conf": tmp_path / "my.conf"}


def test_absolute_source(tmp_path: Path) -> None:
    make(tmp_path, {"a/x": "1", "b": None})
    assert destinations([(str(tmp_path / "a/x"), "/x")], tmp_path / "b") == {"/x": "1"}


@pytest.mark.parametrize(("destination", "expected"), [("/etc/", "/etc/x"), ("/", "/x"), ("/etc/.", "/etc/x")])
def test_trailing_slash_puts_a_file_inside(tmp_path: Path, destination: str, expected: str) -> None:
    make(tmp_path, {"x": "1"})
    assert destinations([("x", destination)], tmp_path) == {expected: "1"}


@pytest.mark.parametrize("destination", ["/srv", "/srv/"])
def test_folder_content_goes_to_the_destination(tmp_path: Path, destination: str) -> None:
    make(tmp_path, {"www/index": "1", "www/sub/page": "2", "www/empty": None, "www/link": "-> ../../gone"})
    assert destinations([("www", destination)], tmp_path) == {
        "/srv": "/",
        "/srv/empty": "/",
        "/srv/index": "1",
        "/srv/link": "-> ../../gone",
        "/srv/sub": "/",
        "/srv/sub/page": "2",
    }


def test_folder_over_the_root_has_no_entry_for_the_root(tmp_path: Path) -> None:
    make(tmp_path, {"root/etc/x": "1"})
    assert destinations([("root", "/")], tmp_path) == {"/etc": "/", "/etc/x": "1"}


def test_source_that_is_a_link_is_followed_and_keeps_its_own_name(tmp_path: Path) -> None:
    make(tmp_path, {"app-1.2": "1", "app": "-> app-1.2", "d/x": "2", "e": "-> d"})
    assert destinations([("app", "/opt/"), ("e", "/srv")], tmp_path) == {"/opt/app": "1", "/srv": "/", "/srv/x": "2"}


def test_sorted_by_bytes_with_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"\xff\n", "é".encode(), b"a b", "\U0001f600".encode()):
        Path(os.fsdecode(folder + b"/" + name)).write_bytes(b"")
    mapped, _ = expand([(".", "/d")], tmp_path, sha256_file)
    names = [file.destination.encode("utf-8", "surrogateescape") for file in mapped]
    assert names == sorted(names)
    assert names[-1] == b"/d/\xff\n"


def test_more_specific_mapping_wins(tmp_path: Path) -> None:
    make(tmp_path, {"base/etc/x": "base", "base/etc/y": "base", "etc/x": "etc", "etc/y": "etc", "x": "file"})
    expected = {"/etc": "/", "/etc/x": "file", "/etc/y": "etc"}
    pairs = [("base", "/"), ("etc", "/etc"), ("x", "/etc/")]
    assert destinations(pairs, tmp_path) == expected
    assert destinations(pairs[::-1], tmp_path) == expected


def test_path_through_a_mapped_link_is_allowed(tmp_path: Path) -> None:
    make(tmp_path, {"root/lib": "-> usr/lib", "x": "1"})
    assert destinations([("root", "/"), ("x", "/lib/x")], tmp_path) == {"/lib": "-> usr/lib", "/lib/x": "1"}


def test_only_winners_are_hashed(tmp_path: Path) -> None:
    make(tmp_path, {"d/x": "1", "x": "2"})
    hashed: list[Path] = []

    def digest_of(path: Path) -> str:
        hashed.append(path)
        return sha256_file(path)

    expand([("d", "/"), ("x", "/x")], tmp_path, digest_of)
    assert hashed == [tmp_path / "x"]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("d", "/etc"), ("x", "/etc")], "it is a folder in one and not in the other"),
        ([("x", "/etc"), ("y", "/etc/y")], "/etc is a file in the latter"),
        ([("x", "/etc"), ("y", "/etc/a/b/y")], "/etc is a file in the latter"),
        ([("x", "/e"), ("y", "/e")], "neither destination is more specific"),
        ([("d", "/e"), ("e", "/e")], "neither destination is more specific"),
    ],
)
def test_clashes_name_both_mappings(tmp_path: Path, pairs: list[tuple[str, str]], expected: str) -> None:
    make(tmp_path, {"d/f": "1", "d/sub/g": "1", "e/f": "2", "x": "3", "y": "4"})
    (line,) = problems(pairs, tmp_path)
    assert expected in line
    for source, _ in pairs:
        assert f'mappings."{source}"' in line
    assert problems(pairs[::-1], tmp_path) == [line]


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("etc/x", "not an absolute path"),
        ("", "not an absolute path"),
        ("/etc/../x", "holds '..'"),
        ("/a\0b", "NUL"),
        ("/" + "é" * 128, "more than 255 bytes"),
    ],
)
def test_bad_destinations(tmp_path: Path, destination: str, expected: str) -> None:
    make(tmp_path, {"x": "1"})
    (line,) = problems([("x", destination)], tmp_path)
    assert f'{tmp_path}/fledge.toml: mappings."x": ' in line
    assert expected in line


def test_all_problems_in_one_error(tmp_path: Path) -> None:
    make(tmp_path, {"d/ok": "1", "dangling": "-> nowhere", "d/sub/loop": "-> loop"})
    os.mkfifo(tmp_path / "d/fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "d/sub/socket"))
    lines = problems(
        [("gone", "/a"), ("dangling", "/b"), ("~/x", "/c"), ("d", "/d"), ("/dev/null", "/null"), ("a\0b", "/e")],
        tmp_path,
    )
    assert [line.split('"')[1] for line in lines if "mappings" in line] == [
        "/dev/null",
        "a\\u0000b",
        "d",
        "d",
        "dangling",
        "gone",
        "~/x",
    ]
    text = "\n".join(lines)
    assert f'mappings."gone": {tmp_path}/gone does not exist' in text
    assert f"{tmp_path}/d/fifo is a device, FIFO or socket" in text
    assert f"{tmp_path}/d/sub/socket is a device, FIFO or socket" in text
    assert "/dev/null is a device, FIFO or socket" in text
    assert "hint: '~' is not expanded" in text


def test_unreadable_file_is_a_problem(tmp_path: Path) -> None:
    make(tmp_path, {"x": "1"})

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.raises(MappingError, match=f"{tmp_path}/x cannot be read: Permission denied"):
        expand([("x", "/x")], tmp_path, refuse)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["x", "d", "d/sub", "d/link"]),
            st.text(st.sampled_from("/.ab"), max_size=6).map(lambda text: "/" + text),
        ),
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_order_has_no_influence_and_nothing_escapes(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]], random: Random
) -> None:
    tree = {"x": "1", "d/a": "2", "d/sub/a": "3", "d/sub/b": "4", "d/link": "-> a"}
    folder = make(tmp_path_factory.mktemp("order"), tree)

    def outcome(pairs: list[tuple[str, str]]) -> object:
        try:
            return expand(pairs, folder, sha256_file)
        except MappingError as error:
            return str(error)

    first = outcome(pairs)
    shuffled = pairs[:]
    random.shuffle(shuffled)
    assert outcome(shuffled) == first
    if isinstance(first, tuple):
        for file in first[0]:
            names = file.destination.split("/")
            assert names[0] == ""
            assert not {"", ".", ".."} & set(names[1:])


@pytest.fixture
def payload(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BinaryIO]:
    with (tmp_path_factory.mktemp("payload") / "payload").open("w+b", buffering=0) as file:
        yield file


def test_entries(tmp_path: Path, payload: BinaryIO) -> None:
    make(tmp_path, {"d/big": "x" * 5000, "d/empty": "", "d/link": "-> big", "d/sub": None, "small": "y"})
    mapped, sources = expand([("d", "/opt"), ("small", "/usr/bin/")], tmp_path, sha256_file)
    writer = PayloadWriter(payload.fileno())
    writer.write(memoryview(b"what came before"))
    writer.pad()
    found = {entry.path: entry for entry in entries(mapped, sources, writer, EPOCH_NS)}
    size, _ = writer.close()
    assert {path: (entry.kind, entry.mode, entry.keep) for path, entry in found.items()} == {
        b"opt": (Kind.DIRECTORY, 0o755, True),
        b"opt/big": (Kind.FILE, 0o644, False),
        b"opt/empty": (Kind.FILE, 0o644, False),
        b"opt/link": (Kind.SYMLINK, 0o777, False),
        b"opt/sub": (Kind.DIRECTORY, 0o755, True),
        b"usr/bin/small": (Kind.FILE, 0o755, False),
    }
    assert list(found) == sorted(found)
    payload.seek(0)
    assert payload.read() == b"".join(
        data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")
        for data in (b"what came before", b"x" * 5000, b"y")
    )
    assert size == 4 * BLOCK_BYTES
    assert (found[b"opt/big"].size, found[b"opt/big"].block) == (5000, 1)
    assert (found[b"usr/bin/small"].size, found[b"usr/bin/small"].block) == (1, 3)
    assert (found[b"opt/empty"].size, found[b"opt/empty"].block) == (0, 0)
    assert found[b"opt/link"].link == b"big"
    assert {(entry.uid, entry.gid, entry.mtime_ns) for entry in found.values()} == {(0, 0, EPOCH_NS)}


@pytest.mark.parametrize("new", ["other", "longer than before", "", None])
def test_file_that_changed_since_its_digest_was_taken(tmp_path: Path, payload: BinaryIO, new: str | None) -> None:
    make(tmp_path, {"x": "hello"})
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    (tmp_path / "x").unlink()
    if new is not None:
        make(tmp_path, {"x": new})
    with pytest.raises(MappingError, match="run again") as caught:
        entries(mapped, sources, PayloadWriter(payload.fileno()), EPOCH_NS)
    assert str(tmp_path / "x") in str(caught.value)


def test_empty_file_that_got_content(tmp_path: Path, payload: BinaryIO) -> None:
    make(tmp_path, {"x": ""})
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    make(tmp_path, {"x": "now"})
    with pytest.raises(MappingError, match="changed while it was being built; run again"):
        entries(mapped, sources, PayloadWriter(payload.fileno()), EPOCH_NS)


def test_fifo_in_a_files_place_does_not_block(tmp_path: Path, payload: BinaryIO) -> None:
    make(tmp_path, {"x": "hello"})
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    (tmp_path / "x").unlink()
    os.mkfifo(tmp_path / "x")
    with pytest.raises(MappingError, match="run again"):
        entries(mapped, sources, PayloadWriter(payload.fileno()), EPOCH_NS)


def test_folder_in_a_files_place(tmp_path: Path, payload: BinaryIO) -> None:
    make(tmp_path, {"x": "hello"})
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    (tmp_path / "x").unlink()
    (tmp_path / "x").mkdir()
    with pytest.raises(MappingError, match=r"cannot be read any more \(Is a directory\); run again"):
        entries(mapped, sources, PayloadWriter(payload.fileno()), EPOCH_NS)


def test_error_of_the_writer_is_not_taken_for_a_changed_file(tmp_path: Path) -> None:
    make(tmp_path, {"x": "x" * (5 << 20)})
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        entries(mapped, sources, PayloadWriter(full.fileno()), EPOCH_NS)


def test_large_file_is_copied_whole(tmp_path: Path, payload: BinaryIO) -> None:
    (tmp_path / "x").write_bytes(bytes(range(251)) * 20_000)
    mapped, sources = expand([("x", "/x")], tmp_path, sha256_file)
    writer = PayloadWriter(payload.fileno())
    (entry,) = entries(mapped, sources, writer, EPOCH_NS)
    writer.close()
    payload.seek(entry.block * BLOCK_BYTES)
    assert payload.read(entry.size) == (tmp_path / "x").read_bytes()
