"""Starts a script over as ranks, for a call that means "from here on, on every rank" and has no function to send."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import sysconfig
from collections.abc import Sequence
from typing import NoReturn

from lightlite.errors import MisconfigurationException

log = logging.getLogger("lightlite")

_NOT_SCRIPTS = tuple(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib", "scripts"))


def start_over(accelerator: str, devices: Sequence[int]) -> NoReturn:
    """Become `python -m lightlite.launch … script.py args`, in this very process.

    Raises:
        MisconfigurationException: In a notebook or a shell, and in a program that is installed, such as pytest: only a
            script, or a module of one's own, can be started over.
    """
    options = ["--accelerator", accelerator, "--devices", ",".join(map(str, devices))]
    script = _script()
    command = [sys.executable, "-m", "lightlite.launch", *options, *(script or ["script.py"])]
    if script is None:
        raise MisconfigurationException(
            f"{len(devices)} ranks were asked for, and this is no script that could be started over on each of them; "
            "put the code that they are to run into a function train(fabric) and call fabric.launch(train), or make it "
            f"a script and start it by `python {shlex.join(command[1:])}`"
        )
    log.info("fabric.launch(): the script starts over on %d ranks, as `%s`", len(devices), shlex.join(command))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, command)


def _script() -> list[str] | None:
    """What the command line is to run again, with its arguments; None where it is nothing to be run again."""
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or not os.path.isfile(file) or os.path.abspath(file).startswith(_NOT_SCRIPTS):
        return None
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return None
    what = [os.path.abspath(file)] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
    return [*what, *sys.argv[1:]]
