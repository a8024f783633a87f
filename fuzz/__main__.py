"""`python -m fuzz TARGET [libFuzzer's options]`, from the repository's root. Needs atheris; `make fuzz` installs it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

_WORK = Path(".fuzz")
"""Inputs that reached something new, and findings; not tracked."""


def main() -> None:
    """Fuzz until libFuzzer's limits are reached, or something other than a result or a FledgeError comes out."""
    program, target, *options = sys.argv
    # What is not instrumented gives no coverage, by which libFuzzer chooses its inputs.
    with atheris.instrument_imports(include=["fledge_tasks", "tarfile"]):
        module = importlib.import_module(f"fuzz.{target}")
    found = _WORK / target
    found.mkdir(parents=True, exist_ok=True)
    limits = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=1500"]
    places = [f"-dict=fuzz/{target}.dict", f"-artifact_prefix={_WORK}/{target}-"]
    atheris.Setup([program, *limits, *places, *options, str(found), f"tests/corpus/{target}"], module.one_input)
    atheris.Fuzz()


main()
