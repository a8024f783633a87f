"""Workspaces that tests make, and `fledge` run in them as a user runs it: as a program."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.tools import PATH

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Result:
    """What a run printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed."""
        summary: dict[str, Any] = json.loads(self.stdout)
        return summary

    def image(self, name: str) -> dict[str, Any]:
        """Return an image's part of the summary."""
        [image] = [image for image in self.summary["images"] if image["name"] == name]
        return dict(image)

    def tasks(self, name: str, status: str = "built") -> list[str]:
        """Return the names of an image's tasks that ended with `status`."""
        return [stage["task"] for stage in self.image(name)["stages"] if stage["status"] == status]

    def stages(self, name: str, status: str = "built") -> list[str]:
        """Return the stages of an image that ended with `status`, one for each task, in order."""
        return [stage["stage"] for stage in self.image(name)["stages"] if stage["status"] == status]


@dataclass
class Workspace:
    """A folder with images. `cache` is None for the one inside; `prefix` is put before the command line."""

    root: Path
    home: Path
    cache: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()

    def add(
        self,
        name: str,
        image: str,
        *,
        buffer_mb: int = 100,
        mappings: Mapping[str, str] | None = None,
        more: str = "",
    ) -> Path:
        """Write the fledge.toml of an image and return its folder."""
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(source)} = {json.dumps(target)}" for source, target in (mappings or {}).items()]
        (folder / "fledge.toml").write_text(
            f'version = "1"\nstrategy = "oci_rootfs"\n[source]\nimage = {json.dumps(image)}\n'
            f'[filesystem]\ntype = "ext4"\nsize_buffer_mb = {buffer_mb}\n[mappings]\n' + "\n".join(lines) + f"\n{more}"
        )
        return folder

    def output(self, name: str) -> Path:
        """Return where an image's disk is published."""
        return self.root / "build" / name / "rootfs.img"

    def command(self, *arguments: str) -> list[str]:
        """Return the command line of `fledge` in this workspace."""
        return [*self.prefix, sys.executable, "-m", "fledge_tasks", "-C", str(self.root), *arguments]

    def environment(self) -> dict[str, str]:
        """Return the environment it runs in: nothing of the caller's but the PATH."""
        cache = {"FLEDGE_CACHE_DIR": str(self.cache)} if self.cache else {}
        fixed = {
            "PATH": PATH,
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**fixed, **cache, **self.env}

    def fledge(self, *arguments: str, timeout: float = 300) -> Result:
        """Run `fledge` to its end."""
        return self.run(self.command(*arguments), Path("/"), timeout)

    def run(self, command: Sequence[str], cwd: Path, timeout: float) -> Result:
        """Run any command in the environment of this workspace to its end."""
        done = subprocess.run(
            command,
            env=self.environment(),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def build(self, *arguments: str) -> Result:
        """Run `fledge build --json`, which must succeed."""
        result = self.fledge("build", "--json", *arguments)
        assert result.code == 0, result.stderr
        return result

    def leftovers(self) -> list[Path]:
        """Return the files below the build folder and in the cache's folders of unfinished work."""
        places = [self.root / "build", (self.cache or self.root / "cache") / "tmp"]
        return [path for place in places for path in place.rglob("*") if not path.is_dir()]


def doit(workspace: Workspace, *arguments: str) -> str:
    """Run doit in a workspace, which must succeed, and return what it printed."""
    result = workspace.run([*workspace.prefix, sys.executable, "-m", "doit", *arguments], workspace.root, 120)
    assert result.code == 0, result.stdout + result.stderr
    return result.stdout


def processes_about(path: Path) -> list[str]:
    """Return the command lines of all processes that name `path`."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                line = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(path) in line:
                found.append(line.replace(b"\0", b" ").decode(errors="replace"))
    return found


def sha256_of(path: Path) -> str:
    """Return 'sha256:…' of a file's content, without any help from what is tested."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
