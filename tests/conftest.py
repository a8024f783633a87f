"""What every test gets: none of the caller's settings."""

from __future__ import annotations

import pytest

_SETTINGS = ("FLEDGE_CACHE_DIR", "FLEDGE_AGENT_BASE_URL", "SOURCE_DATE_EPOCH", "REGISTRY_AUTH_FILE", "DOCKER_HOST")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
