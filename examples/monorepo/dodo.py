"""`doit`, `doit list`, `doit build:api`: the graph of `fledge build`."""

from fledge_tasks.dodo import *  # noqa: F403
