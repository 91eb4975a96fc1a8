"""`python -m lightlite.launch …` and the console script `lightlite launch …`."""

from __future__ import annotations

import sys

from lightlite.launch.cli import main

USAGE = """usage: lightlite launch [options] script.py [args...]

Trains with several ranks: runs a script once on every device. `lightlite launch --help` tells the options.
"""


def console() -> int:
    """The console script `lightlite`.

    Returns:
        The exit code: 2 for a usage error, else that of the subcommand.
    """
    if sys.argv[1:2] == ["launch"]:
        return main(sys.argv[2:], program="lightlite launch")
    asked_for_help = sys.argv[1:2] in (["-h"], ["--help"])
    (sys.stdout if asked_for_help else sys.stderr).write(USAGE)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main())
