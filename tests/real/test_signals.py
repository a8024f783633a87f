"""A build that is interrupted: the right exit code, no process and no file of it left, and the next one succeeds."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from tests.real.conftest import Built
from tests.real.images import Images
from tests.workspaces import Workspace, processes_about

_WAIT_SECONDS = 60.0


def wait_until(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS

    def is_so() -> object:
        try:
            return condition()
        except FileNotFoundError:  # a folder of the build's, gone while it was looked into
            return False

    while not is_so():
        assert process.poll() is None, "the build ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def start(workspace: Workspace) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        workspace.command("build", "-j", "2"),
        env=workspace.environment(),
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["fetching", "unpacking"])
def test_an_interrupted_build_leaves_nothing(
    web: Built, workspace: Workspace, images: Images, number: signal.Signals, moment: str
) -> None:
    folder = workspace.add("web", f"docker://{images.reference('web')}", mappings={"page.html": "/srv/page.html"})
    (folder / "page.html").write_text("first\n")
    cache = workspace.root / "cache"
    process = start(workspace)
    sign = "tmp/**/layout/**/*" if moment == "fetching" else "tmp/**/payload"
    wait_until(lambda: any(path.is_file() and path.stat().st_size for path in cache.glob(sign)), process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=_WAIT_SECONDS)
    assert process.returncode == 128 + number, stderr
    assert b"Traceback" not in stderr
    assert processes_about(workspace.root) == []
    assert workspace.leftovers() == []
    assert not workspace.output("web").exists()
    assert workspace.build().image("web")["sha256"] == web.result.image("web")["sha256"]


def test_a_killed_build_does_no_harm(web: Built, workspace: Workspace, images: Images) -> None:
    folder = workspace.add("web", f"docker://{images.reference('web')}", mappings={"page.html": "/srv/page.html"})
    (folder / "page.html").write_text("first\n")
    process = start(workspace)
    wait_until(lambda: any((workspace.root / "cache").glob("tmp/**/payload")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert workspace.build().image("web")["sha256"] == web.result.image("web")["sha256"]
    assert processes_about(workspace.root) == []
