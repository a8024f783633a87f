"""A Docker daemon of our own: reached through a socket, without a network, with its data in a folder."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.tools import PATH

_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


class Daemon:
    """dockerd with everything below `folder`; `host` is its DOCKER_HOST."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.host = f"unix://{folder}/docker.sock"
        self._log = folder / "log"
        self._environment = {"PATH": PATH, "HOME": str(folder)}
        command = [
            "dockerd", "--host", self.host, "--data-root", str(folder / "data"), "--exec-root", str(folder / "exec"),
            "--pidfile", str(folder / "pid"), "--config-file", str(folder / "none.json"),
            "--iptables=false", "--ip6tables=false", "--bridge=none",
        ]  # fmt: skip
        (folder / "none.json").write_text("{}")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._docker("version").returncode == 0:
                return
            time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"dockerd does not answer:\n{self._log.read_text()[-3000:]}")

    def _docker(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["docker", "--host", self.host, *arguments]
        return subprocess.run(
            command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    def docker(self, *arguments: str) -> str:
        """Run a docker command and return what it printed. Raises RuntimeError when it fails."""
        done = self._docker(*arguments)
        if done.returncode:
            raise RuntimeError(f"docker {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def stop(self) -> None:
        """End the daemon; it ends the containerd that it started."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_STOP_SECONDS)
