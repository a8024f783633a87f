"""Skeletons and image files: holes, order, checksums, failures, and the means of copying."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fledge_tasks import fsutil
from fledge_tasks.assemble import Assembled, assemble, segments
from fledge_tasks.errors import CommandError, StoreError, ToolError
from fledge_tasks.filesystems.skeleton import ImageExtent, ImageMap, merge_extents, read_map, save
from fledge_tasks.run import environment, run

BLOCK = 4096


def make(folder: Path, *, preallocate: bool = False, payload_blocks: int = 40) -> tuple[Assembled, bytes]:
    """Assemble an image of 64 blocks: skeleton at 0, 1 and 60, a payload at 10..29, holes elsewhere."""
    payload = os.urandom(payload_blocks * BLOCK)
    (folder / "payload").write_bytes(payload)
    parts = {0: b"first", 1: b"second", 60: b"late"}
    with (folder / "bare").open("wb") as bare:
        bare.truncate(64 * BLOCK)
        for block, data in parts.items():
            bare.seek(block * BLOCK)
            bare.write(data)
        bare.seek(5 * BLOCK)
        bare.write(bytes(BLOCK))  # written, but zero
    extents = [ImageExtent(20, 0, 30, 10), ImageExtent(10, 0, 20, 10)]
    image_map = save(folder / "bare", extents, folder / "skeleton", folder / "map")
    assert image_map == read_map(folder / "map")
    expected = bytearray((folder / "bare").read_bytes())
    expected[10 * BLOCK : 30 * BLOCK] = payload[20 * BLOCK : 40 * BLOCK].ljust(20 * BLOCK, b"\0")
    made = assemble(
        image_map,
        folder / "skeleton",
        {0: folder / "payload"},
        folder / "out",
        preallocate=preallocate,
        advance=lambda _: None,
    )
    return made, bytes(expected)


def test_image(tmp_path: Path) -> None:
    made, expected = make(tmp_path)
    data = (tmp_path / "out").read_bytes()
    assert data == expected
    assert made.sha256 == "sha256:" + hashlib.sha256(data).hexdigest()
    assert made.size == 64 * BLOCK
    assert made.shared_bytes + made.copied_bytes == 20 * BLOCK
    assert (tmp_path / "out").stat().st_blocks * 512 <= 24 * BLOCK
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "map", "out", "payload", "skeleton"]


def test_zero_blocks_are_in_no_range_and_neighbours_are_joined(tmp_path: Path) -> None:
    make(tmp_path)
    image_map = read_map(tmp_path / "map")
    assert image_map.ranges == [(0, 2), (60, 1)]
    assert image_map.extents == [ImageExtent(10, 0, 20, 20)]


def test_preallocated_file_has_no_hole(tmp_path: Path) -> None:
    _, expected = make(tmp_path, preallocate=True)
    assert (tmp_path / "out").read_bytes() == expected
    assert (tmp_path / "out").stat().st_blocks * 512 >= 64 * BLOCK


def test_a_short_payload_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    with pytest.raises((StoreError, OSError)):
        make(tmp_path, payload_blocks=30)
    assert (tmp_path / "out").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_assembly_left_is_removed(tmp_path: Path) -> None:
    stale, foreign = fsutil.temp_sibling(tmp_path / "out"), fsutil.temp_sibling(tmp_path / "other")
    stale.write_bytes(b"")
    foreign.write_bytes(b"")
    make(tmp_path)
    assert (stale.exists(), foreign.exists()) == (False, True)


@pytest.mark.parametrize(
    "bad",
    [
        {"ranges": [(0, 3)], "extents": [ImageExtent(2, 0, 0, 1)]},
        {"ranges": [(9, 2)], "extents": []},
        {"ranges": [], "extents": [ImageExtent(0, 0, 0, 11)]},
    ],
)
def test_parts_that_lie_over_each_other_or_outside(bad: dict[str, object]) -> None:
    image_map = msgspec.convert({"magic": "m", "version": 1, "blocks": 10, **bad}, dict)
    made = ImageMap(**image_map)
    with pytest.raises(StoreError, match="used twice or lies outside"):
        list(segments(made))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 50)), max_size=12))
def test_merged_extents_cover_the_same_blocks(parts: list[tuple[int, int, int, int]]) -> None:
    extents, block = [], 0
    for gap, count, source, payload in parts:
        extents.append(ImageExtent(block + gap, source, payload, count))
        block += gap + count

    def cover(some: list[ImageExtent]) -> dict[int, tuple[int, int]]:
        return {each.block + at: (each.source, each.payload_block + at) for each in some for at in range(each.count)}

    assert cover(merge_extents(reversed(extents))) == cover(extents)


def copied(folder: Path) -> tuple[bytes, fsutil.RangeCopier]:
    (folder / "from").write_bytes(bytes(range(256)) * 256)
    with (folder / "from").open("rb") as source, (folder / "to").open("w+b") as target:
        copier = fsutil.RangeCopier(target.fileno(), lambda _: None)
        copier.copy(source.fileno(), 4096, 0, 8192)
        copier.copy(source.fileno(), 0, 8192, 4096)
        return (folder / "to").read_bytes(), copier


@pytest.mark.parametrize("failure", [errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, 0])
def test_every_means_of_copying_copies_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int) -> None:
    expected, _ = copied(tmp_path)
    assert len(expected) == 12288

    def refuse(*_: object) -> int:
        if failure:
            raise OSError(failure, os.strerror(failure))
        return 0  # some filesystems say so instead

    monkeypatch.setattr(os, "copy_file_range", refuse)
    monkeypatch.setattr(fsutil, "_clone", lambda *_: False)
    data, copier = copied(tmp_path)
    assert data == expected
    assert (copier.shared_bytes, copier.copied_bytes) == (0, 12288)


def test_a_full_disk_is_no_reason_to_copy_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(fsutil, "_clone", lambda *_: False)
    with pytest.raises(OSError, match="full"):
        copied(tmp_path)


def test_replacing_keeps_the_old_file_on_an_error(tmp_path: Path) -> None:
    target = tmp_path / "file"
    fsutil.write_atomic(target, b"one")
    with pytest.raises(TypeError), fsutil.replacing(target) as fd:
        fsutil.write_all(fd, "no bytes")  # type: ignore[arg-type]
    assert target.read_bytes() == b"one"
    assert os.listdir(tmp_path) == ["file"]


def test_run_says_what_failed_and_how_to_repeat_it() -> None:
    with pytest.raises(CommandError) as caught:
        run(["sh", "-c", "echo 'it broke' >&2; exit 3"], env={"A": "b c"})
    assert caught.value.returncode == 3
    assert "it broke" in str(caught.value)
    assert "A='b c' sh -c 'echo " in str(caught.value)


def test_run_of_a_missing_program() -> None:
    with pytest.raises(ToolError, match="no-such-program is not installed"):
        run(["no-such-program"])


def test_programs_get_a_clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "tr_TR.UTF-8")
    monkeypatch.setenv("SECRET_OF_OURS", "leaks")
    monkeypatch.setenv("MKE2FS_CONFIG", "/nowhere")
    seen = run(["env"]).decode()
    assert "SECRET_OF_OURS" not in seen
    assert "MKE2FS_CONFIG" not in seen
    assert "LC_ALL=C.UTF-8\n" in seen
    assert {"/usr/sbin", "/sbin"} <= set(environment()["PATH"].split(":"))
    assert run(["cat"]) == b""  # stdin is empty


def test_an_interrupted_run_ends_the_whole_group(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        code = 0
        try:
            import signal

            signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            run(["sh", "-c", f"sleep 60 & echo $! >{tmp_path}/pid; wait"])
        except KeyboardInterrupt:
            code = 7
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    state = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat")
    deadline = time.monotonic() + 5
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":  # whoever inherits it may be slow
        assert time.monotonic() < deadline
        time.sleep(0.02)
