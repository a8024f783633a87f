"""Versions of programs: read once for each state of the program's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge_tasks.errors import ToolError
from fledge_tasks.index import Index
from fledge_tasks.tools import MKE2FS, SKOPEO, Tool
from tests.tools import need


def program(folder: Path, body: str, name: str = "tool") -> Path:
    """Write a program that notes each run."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho run >> {folder}/runs\n{body}\n")
    path.chmod(0o755)
    return path


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


TOOL = Tool("tool", ("--version",))


@pytest.mark.parametrize(
    ("body", "version"),
    [
        ('echo "tool version 1.9.3"', "1.9.3"),
        ('echo "mke2fs 1.47.0 (5-Feb-2023)" >&2; echo "Using EXT2FS Library version 1.47.0" >&2', "1.47.0"),
        ('echo "tool, $1 v6.1-rc2"', "6.1-rc2"),
        ("echo unreleased; echo more", "unreleased"),
        (f"echo 1.{'2' * 5000}", f"1.{'2' * 108}"),
        (f"echo {'x' * 5000}", "x" * 100),
    ],
)
def test_versions(tmp_path: Path, body: str, version: str) -> None:
    program(tmp_path, body)
    assert TOOL.version() == version
    assert TOOL.path == tmp_path / "tool"


def test_a_version_is_remembered_until_the_program_changes(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    program(tmp_path, "echo 1.0")
    assert TOOL.version(index) == TOOL.version(index) == "1.0"
    assert runs(tmp_path) == 1
    program(tmp_path, "echo 1.1 longer")
    assert TOOL.version(index) == "1.1"
    assert runs(tmp_path) == 2


@pytest.mark.parametrize("memo", [[], [1], "text", {"a": 1}])
def test_a_foreign_memo_is_not_believed(tmp_path: Path, memo: object) -> None:
    index = Index(tmp_path / "index")
    program(tmp_path, "echo 1.0")
    index.set(f"tool:{tmp_path}/tool", memo)
    assert TOOL.version(index) == "1.0"


def test_a_program_that_is_not_there() -> None:
    assert TOOL.path is None
    with pytest.raises(ToolError, match=r"tool is not installed \(not found on PATH\)") as caught:
        TOOL.version()
    assert caught.value.hint == "install it, for example: sudo apt-get install tool"


@pytest.mark.parametrize("body", ["exit 3", "echo failed >&2; exit 1", "exit 0"])
def test_a_program_that_does_not_say_it(tmp_path: Path, body: str) -> None:
    program(tmp_path, body)
    with pytest.raises(ToolError, match="tool does not say its version"):
        TOOL.version()


def test_a_version_in_an_error_message(tmp_path: Path) -> None:
    program(tmp_path, "echo unknown option >&2; echo tool 1.5; exit 1")
    assert Tool("tool", ("-V",), may_fail=True).version() == "1.5"
    program(tmp_path, "echo unknown option >&2; exit 1")
    with pytest.raises(ToolError, match="tool does not say its version: unknown option"):
        Tool("tool", ("-V",), may_fail=True).version()


def test_what_a_program_was_built_with(tmp_path: Path) -> None:
    index = Index(tmp_path / "index")
    tool = Tool("tool", ("--version",), ("--help",))
    program(tmp_path, 'test $1 = --help && echo "-zstd: no; lz4hc, gzip (default)"')
    assert [tool.offers(word, index) for word in ("gzip", "lz4hc", "lz4", "zstd")] == [True, True, False, False]
    assert tool.offers("gzip", index) and runs(tmp_path) == 4
    program(tmp_path, 'test $1 = --help && echo "lz4, another build"')
    assert tool.offers("lz4", index) and not tool.offers("gzip", index)


def test_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/local/bin:/usr/bin:/bin")  # a plain user's: mke2fs is found nevertheless
    need("skopeo", "mke2fs")
    assert SKOPEO.version()[0].isdigit()
    assert MKE2FS.version().startswith("1.")
