"""Ends a launcher's ranks when the launcher itself is killed: `python guard.py [folder]`.

A process of its own, in a session of its own, that holds the reading end of a pipe from the launcher. Every line
"+pid" is a process group to end and "-pid" one that has ended. When the pipe closes, for whatever reason, the
groups that are left are killed and the launcher's temporary folder is removed.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Keep the list until standard input ends, then kill what is on it."""
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        (groups.add if line[0] == "+" else groups.discard)(group)
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    for folder in sys.argv[1:]:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
