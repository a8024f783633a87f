"""What every test gets: none of the caller's settings, and its fixtures' end even when the run is terminated."""

from __future__ import annotations

import signal

import pytest

_SETTINGS = ("FLEDGE_CACHE_DIR", "FLEDGE_AGENT_BASE_URL", "SOURCE_DATE_EPOCH", "REGISTRY_AUTH_FILE", "DOCKER_HOST")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)


def pytest_configure() -> None:
    # Servers and mounts that fixtures made would outlive a run that SIGTERM ends at once.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell without job control has what it runs in the background ignore SIGINT, and programs inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
