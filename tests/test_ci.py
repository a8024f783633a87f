"""The recipes for CI: the commands in them are ours, the paths and keys fit each other."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from fledge_tasks.cli.context import Context
from fledge_tasks.cli.group import cli
from fledge_tasks.workspace import LOCK_NAME
from tests.workspaces import REPOSITORY

GITHUB = REPOSITORY / "examples/ci/github-actions.yml"
GITLAB = REPOSITORY / "examples/ci/gitlab-ci.yml"
DOCS = REPOSITORY / "docs/ci.md"
PACKAGES = {"skopeo", "e2fsprogs"}


def document(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def github_steps() -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = document(GITHUB)["jobs"]["images"]["steps"]
    return steps


def github_lines() -> list[str]:
    return [line for step in github_steps() for line in step.get("run", "").splitlines()]


def gitlab_lines() -> list[str]:
    job = document(GITLAB)["images"]
    return [*job["before_script"], *job["script"]]


def docs_lines() -> list[str]:
    """Return the commands of ci.md: indented lines, and what stands in backticks and has arguments."""
    text = DOCS.read_text()
    quoted = re.findall(r"`(fledge [^`]+)`", text)
    return [*quoted, *re.findall(r"^    (fledge .*)$", text, re.MULTILINE)]


def ours(lines: list[str]) -> Iterator[list[str]]:
    """Yield the arguments of each `fledge` in shell lines."""
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["fledge"]:
            yield words[1 : words.index("||") if "||" in words else None]


@pytest.mark.parametrize("lines", [github_lines(), gitlab_lines(), docs_lines()], ids=["github", "gitlab", "docs"])
def test_every_command_is_one_of_ours(lines: list[str]) -> None:
    commands = list(ours(lines))
    assert ["build", "--locked"] in commands
    assert ["cache", "trim", "--ci"] in commands
    for words in commands:
        command: click.Command = cli
        context = click.Context(cli, obj=Context(Path()))
        while isinstance(command, click.Group):
            name, *words = words  # noqa: PLW2901
            found = command.get_command(context, name)
            assert found is not None, name
            command = found
        with command.make_context(command.name, words, parent=context):  # parses, and raises for what it does not know
            pass


@pytest.mark.parametrize("lines", [github_lines(), gitlab_lines()], ids=["github", "gitlab"])
def test_what_is_installed(lines: list[str]) -> None:
    [install] = [shlex.split(line) for line in lines if "apt-get install" in line]
    assert {word for word in install[install.index("install") + 1 :] if not word.startswith("-")} == PACKAGES
    assert "pip install fledge-tasks" in lines
    makefile = (REPOSITORY / "Makefile").read_text()
    assert all(re.search(rf"^DEMO_TOOLS := .*:{package}\b", makefile, re.MULTILINE) for package in PACKAGES)


def test_github_restores_builds_tidies_and_saves() -> None:
    steps = github_steps()
    kinds = [step.get("uses", step.get("run", "")).strip() for step in steps]
    order = ["actions/cache/restore@v4", "fledge build --locked", "fledge cache trim --ci", "actions/cache/save@v4"]
    assert [kind for kind in kinds if kind in order] == order
    restore, save = (step for step in steps if "actions/cache" in step.get("uses", ""))
    key = restore["with"]["key"]
    assert key.startswith(restore["with"]["restore-keys"].strip())
    assert f"hashFiles('{LOCK_NAME}')" in key
    assert restore["with"]["path"] == save["with"]["path"] == "cache"
    assert save["with"]["key"] == f"${{{{ steps.{restore['id']}.outputs.cache-primary-key }}}}"


def test_only_main_writes_the_cache_of_github() -> None:
    triggers = document(GITHUB)[True]  # 'on' is a boolean of YAML 1.1
    assert set(triggers) == {"push", "pull_request"}
    assert triggers["push"] == {"branches": ["main"]}
    writers = [
        step for step in github_steps() if str(step.get("uses")).startswith(("actions/cache/save", "actions/cache@"))
    ]
    assert len(writers) == 1
    assert all(step["if"].startswith("github.ref == 'refs/heads/main' &&") for step in writers)
    assert set(document(GITHUB)["permissions"].values()) == {"read"}


def test_gitlab_keys_and_paths() -> None:
    job = document(GITLAB)["images"]
    first, latest = job["cache"]
    assert first["key"]["files"] == [LOCK_NAME]
    assert first["fallback_keys"] == [latest["key"]]
    assert latest["key"].startswith(first["key"]["prefix"])
    assert first["paths"] == latest["paths"] == ["cache/"]
    assert latest["policy"] == "push"
    assert not any("unprotect" in cache for cache in job["cache"])
    assert list(ours(job["script"])) == [["build", "--locked"], ["cache", "trim", "--ci"]]
    assert job["variables"]["FF_DISABLE_UMASK_FOR_DOCKER_EXECUTOR"] == "true"


@pytest.mark.parametrize("path", [GITHUB, GITLAB], ids=["github", "gitlab"])
def test_logins_are_outside_of_what_is_saved(path: Path) -> None:
    [place] = re.findall(r"REGISTRY_AUTH_FILE[=:] ?(\S+?)\"?(?: |$)", path.read_text(), re.MULTILINE)
    assert place.startswith(("$RUNNER_TEMP/", "/tmp/"))
    assert "skopeo login" in path.read_text()


def test_every_link_of_the_docs_leads_somewhere() -> None:
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    assert (REPOSITORY / "README.md", "docs/ci.md") in links
    assert [(page.name, link) for page, link in links if "://" not in link and not (page.parent / link).exists()] == []
