"""The layout of the house: imports go one way, and some things are done in one module only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fledge_tasks"

FLOORS = (
    ("__main__",),
    ("cli",),
    ("dodo",),
    # The runner knows tasks, not what they build: it and the graph meet in cli and dodo.
    ("runner", "workers", "reporter"),
    ("tasks",),
    ("action", "resolve"),
    ("results", "verify"),
    ("stages",),
    ("collect", "explain"),
    ("usage",),
    ("fresh",),
    ("planner",),
    ("plan",),
    ("workspace", "output", "lock", "keys"),
    ("config",),
    ("starter", "filesystem_settings"),
    ("assemble", "boot", "filesystems", "manifest", "mappings", "agent", "download", "qcow2", "hash_tree", "export"),
    ("tree",),
    ("archive",),
    ("oci",),
    ("store", "tools"),
    ("userns",),
    ("index", "leases", "run", "progress"),
    ("fsutil", "digest", "errors", "interrupt", "notices", "shapes", "schema", "collector"),
    ("__init__",),
)
"""From the top down. A module may import what is below its own floor, and its neighbours on it; a package is one."""

ONLY_IN: dict[str, set[str]] = {
    "subprocess": {"run"},
    "pickle": {"workers"},  # outcomes of our own children
    "cffi": {"filesystems.libext2fs"},
    "diskcache": {"index"},
    "filelock": {"store"},
}
RENAMES = {"rename", "renames", "replace", "link"}
RENAMES_ALLOWED = {
    "fsutil": RENAMES,
    # A checked blob gets a second name in a scratch folder; nothing is published by that.
    "oci.layout": {"link"},
    # Hard links inside an image that is being filled.
    "filesystems.fill": {"link"},
}


def modules() -> dict[str, ast.Module]:
    """Return every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the dotted names of all modules that a module imports, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    prefix = "fledge_tasks."
    names = {each.removeprefix(prefix) for each in imported(MODULES[name]) if each.startswith(prefix)}
    return names & MODULES.keys() - {name}


def floor(name: str) -> int:
    [number] = [number for number, names in enumerate(FLOORS) if name.partition(".")[0] in names]
    return number


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    assert {other for other in ours(name) if floor(other) < floor(name)} == set()


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path, name))
        if name not in done:
            for other in ours(name):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("library", ONLY_IN)
def test_what_only_some_modules_import(library: str) -> None:
    users = {
        name for name, tree in MODULES.items() if any(each.partition(".")[0] == library for each in imported(tree))
    }
    assert users == ONLY_IN[library]


@pytest.mark.parametrize("name", MODULES)
def test_only_fsutil_renames(name: str) -> None:
    calls = {
        node.attr
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and ((node.value.id == "os" and node.attr in RENAMES) or (node.value.id == "shutil" and node.attr == "move"))
    }
    methods = {
        node.func.attr
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"rename", "hardlink_to"}
    }
    assert calls | methods <= RENAMES_ALLOWED.get(name, set())


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_prints(name: str) -> None:
    names = {node.id for node in ast.walk(MODULES[name]) if isinstance(node, ast.Name)}
    assert "print" not in names
    if not name.startswith("cli"):
        assert not any(each.partition(".")[0] in {"click", "rich"} for each in imported(MODULES[name]))


def test_modules_are_named_after_an_idea() -> None:
    last = {name.rpartition(".")[2] for name in MODULES}
    assert not last & {"util", "utils", "helper", "helpers", "common", "manager", "misc"}
