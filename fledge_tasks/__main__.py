"""`python -m fledge_tasks` is `fledge`."""

from fledge_tasks.cli import main

main()
