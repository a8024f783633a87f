"""What tests need from the machine: missing, they are skipped; in CI and in `make test`, they fail."""

from __future__ import annotations

import os
import shutil

import pytest

PATH = ":".join(dict.fromkeys([*os.environ["PATH"].split(":"), "/usr/sbin", "/sbin"]))
"""Where programs are looked for: a plain user's PATH on Debian lacks the folders of mke2fs and its kind."""


def need(*programs: str) -> None:
    """Skip or fail the calling test when a program is not installed."""
    if missing := [program for program in programs if shutil.which(program, path=PATH) is None]:
        _lacking(f"not installed: {', '.join(missing)}")


def need_root() -> None:
    """Skip or fail the calling test when it does not run as root."""
    if os.geteuid() != 0:
        _lacking("needs root")


def _lacking(reason: str) -> None:
    if os.environ.get("FLEDGE_REQUIRE_TOOLS") == "1" or os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
