"""The cycle collector is off while a build plans, and on while a task runs."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from fledge_tasks import collector, stages, tree
from fledge_tasks.planner import Planner
from tests.layers import Member
from tests.layouts import Place
from tests.tools import need


def test_on_and_off() -> None:
    assert gc.isenabled()
    with collector.paused():
        assert not gc.isenabled()
        with collector.resumed():
            assert gc.isenabled()
            with collector.paused():
                assert not gc.isenabled()
            assert gc.isenabled()
        assert not gc.isenabled()
    with pytest.raises(OSError, match="mine"), collector.paused():
        raise OSError("mine")
    assert gc.isenabled()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_build(jobs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("mke2fs")
    place = Place(tmp_path / "w", tmp_path)
    place.add_layout("web", [Member("app", b"app" * 1000)])
    notes = tmp_path / "notes"  # a file, for what runs in a worker, too

    def noting(name: str, function: object) -> object:
        def call(*arguments: object, **options: object) -> object:
            with notes.open("a") as file:
                file.write(f"{name} {gc.isenabled()}\n")
            return function(*arguments, **options)  # type: ignore[operator]

        return call

    monkeypatch.setattr(Planner, "check", noting("check", Planner.check))
    monkeypatch.setattr(stages, "unpack", noting("unpack", stages.unpack))
    monkeypatch.setattr("fledge_tasks.stages.merge", noting("merge", tree.merge))
    place.build("-j", jobs)
    assert notes.read_text().splitlines() == ["check False", "unpack True", "merge False"]
