"""What every test gets: none of the caller's settings, and its fixtures' end even when the run is terminated."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from fledge_tasks import index as index_module
from fledge_tasks.digest import sha256_file

_SETTINGS = ("FLEDGE_CACHE_DIR", "FLEDGE_AGENT_BASE_URL", "SOURCE_DATE_EPOCH", "REGISTRY_AUTH_FILE", "DOCKER_HOST")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were really read."""
    seen: list[Path] = []

    def recording(path: Path) -> str:
        seen.append(path)
        return sha256_file(path)

    monkeypatch.setattr(index_module, "sha256_file", recording)
    return seen


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    # Compressed bytes hold the time; the workers of xdist must agree on the name of each test.
    return argname if isinstance(val, bytes) else None


def pytest_configure() -> None:
    # Servers and mounts that fixtures made would outlive a run that SIGTERM ends at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell without job control has what it runs in the background ignore SIGINT, and programs inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup has them ignore that
