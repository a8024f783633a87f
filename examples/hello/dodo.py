"""`doit`, `doit list`, `doit build:hello`: the graph of `fledge build`."""

from fledge_tasks.dodo import *  # noqa: F403
