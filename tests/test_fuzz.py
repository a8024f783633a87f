"""The fuzz targets run on their seeds and on all that was ever found: nothing but results and our own errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fledge_tasks.errors import LayerError
from fuzz import layer, manifest
from tests.corpus import make

SEEDS = {"layer": "tree-4", "manifest": "0-image"}
"""Inputs that pass the readers, so that what comes after them is reached."""

TARGETS = {"layer": layer.one_input, "manifest": manifest.one_input}


def inputs() -> Iterator[Path]:
    """Return all committed inputs."""
    for target in TARGETS:
        yield from sorted((make.HERE / target).iterdir())


@pytest.mark.parametrize("path", list(inputs()), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_an_input(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_no_matter(target: str) -> None:
    TARGETS[target](b"")


def test_all_seeds_are_there() -> None:
    for target, made in (("layer", make.layers()), ("manifest", make.manifests())):
        names = {path.name for path in (make.HERE / target).iterdir() if not path.name.startswith("found-")}
        assert names == set(made)
    assert sum(path.stat().st_size for path in inputs()) < 300_000


@pytest.mark.parametrize("error", [ValueError("x"), RecursionError(), MemoryError(), AssertionError()])
def test_other_errors_are_findings(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(layer, "merge", fail)
    monkeypatch.setattr(manifest, "image_from", fail)
    for target, run in TARGETS.items():
        with pytest.raises(type(error)):
            run((make.HERE / target / SEEDS[target]).read_bytes())


def test_our_own_errors_are_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def fail(*_: object, **__: object) -> None:
        reached.append(True)
        raise LayerError("no")

    monkeypatch.setattr(layer, "merge", fail)
    monkeypatch.setattr(manifest, "image_from", fail)
    for target, run in TARGETS.items():
        run((make.HERE / target / SEEDS[target]).read_bytes())
    assert len(reached) == 2
