"""A registry that wants to know who asks: logins from the files where other tools keep them."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.layout import Member, write_layout, write_tar
from tests.real.registry import Registry
from tests.tools import PATH, need
from tests.workspaces import Workspace

LOGIN = "user:secret"
HTPASSWD = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


@pytest.fixture
def guarded(folder: Path) -> Iterator[Registry]:
    """A registry that holds the image `app:1` for who has the login."""
    need("docker-registry", "skopeo")
    write_tar(folder / "layer.tar", [Member("app", content=b"app" * 5000)])
    write_layout(folder / "layout", [folder / "layer.tar"])
    registry = Registry(folder / "storage", folder, HTPASSWD)
    registry.start()
    try:
        subprocess.run(
            ["skopeo", "copy", "--quiet", f"--dest-creds={LOGIN}", f"oci:{folder}/layout:latest",
             f"docker://{registry.host}/app:1"],
            env={"PATH": PATH, "HOME": str(registry.home)}, stdin=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        yield registry
    finally:
        registry.stop()


def login(registry: Registry, text: str) -> str:
    """Return the content of a file of logins (containers-auth.json(5))."""
    return json.dumps({"auths": {registry.host: {"auth": base64.b64encode(text.encode()).decode()}}})


@pytest.mark.parametrize(
    ("place", "variable"),
    [
        ("logins.json", "REGISTRY_AUTH_FILE"),
        ("run/containers/auth.json", "XDG_RUNTIME_DIR"),
        ("home/.docker/config.json", None),
    ],
)
def test_a_login_is_found(guarded: Registry, folder: Path, place: str, variable: str | None) -> None:
    file = folder / place
    value = {"REGISTRY_AUTH_FILE": str(file), "XDG_RUNTIME_DIR": str(folder / "run")}
    env = {variable: value[variable]} if variable else {}
    workspace = Workspace(folder / "workspace", guarded.home, env=env)
    workspace.add("app", f"docker://{guarded.host}/app:1")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(login(guarded, "user:wrong"))
    refused = workspace.fledge("build")
    assert refused.code == 1
    assert "Traceback" not in refused.stderr and "skopeo login" in refused.stderr
    assert workspace.leftovers() == []
    file.write_text(login(guarded, LOGIN))
    assert workspace.build().stages("app") == ["resolve", "fetch", "unpack", "mkfs", "assemble", "manifest"]


def test_nobody_gets_nothing(guarded: Registry, folder: Path) -> None:
    workspace = Workspace(folder / "workspace", guarded.home)
    workspace.add("app", f"docker://{guarded.host}/app:1")
    refused = workspace.fledge("build")
    assert refused.code == 1
    assert "REGISTRY_AUTH_FILE" in refused.stderr
    assert workspace.leftovers() == []
