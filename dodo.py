"""`doit list`, `doit build:hello` in this checkout: its workspace holds all of examples/, and its cache is cache/."""

from fledge_tasks.dodo import *  # noqa: F403
