"""The exceptions that lightlite raises on its own account.

    LightliteError
    ├── MisconfigurationException      what the user asked for cannot be done; says what can
    │   └── UnknownPluginError         no accelerator, strategy, … of that name (also a KeyError)
    ├── CheckpointError                a checkpoint cannot be used
    │   ├── CheckpointNotFoundError    there is no such file (also a FileNotFoundError)
    │   ├── CorruptCheckpointError     the file is damaged or is no checkpoint
    │   └── MismatchedCheckpointError  it is of another model, optimizer or scheduler (also a RuntimeError)
    ├── MetricError                    a logged value cannot be reduced over the ranks
    └── LaunchError                    something about processes
        ├── NotSendableError           an object cannot be sent to the other ranks
        └── RankFailedError            a rank died; carries `rank` and the remote traceback
            └── RankTimeoutError       a rank kept the others waiting too long (also a TimeoutError)

    SystemExit
    └── SIGTERMException               a signal told a fit to end; its exit code is 143

A user's own exception is never wrapped: it passes through as it was raised.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class LightliteError(Exception):
    """Root of every exception that lightlite raises on its own account."""


class MisconfigurationException(LightliteError):
    """What was asked for cannot be done. The message says what was given and what is allowed."""


class UnknownPluginError(MisconfigurationException, KeyError):
    """No plugin is registered under the name given."""

    __str__ = Exception.__str__


class CheckpointError(LightliteError):
    """A checkpoint cannot be written, found or used."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path given."""

    __str__ = Exception.__str__


class CorruptCheckpointError(CheckpointError):
    """The file is truncated, damaged, or not a checkpoint at all."""


class MismatchedCheckpointError(CheckpointError, RuntimeError):
    """The checkpoint is of another model, optimizer or scheduler than is to go on from it."""


class SIGTERMException(SystemExit):
    """A fit was told to end by a signal; it has saved where it was. Raised on every rank, to exit with code 143."""

    on_every_rank = True

    def __init__(self) -> None:
        super().__init__(128 + 15)


class MetricError(LightliteError):
    """A logged value cannot be reduced over the ranks."""


class LaunchError(LightliteError):
    """Processes could not be started, or did not do what they were started for."""


class NotSendableError(LaunchError):
    """An object that the other ranks need cannot be sent to them."""


class RankFailedError(LaunchError):
    """A rank failed and its exception could not be handed over as such.

    Attributes:
        rank: The global rank that failed first.
        exitcode: Its exit code; negative for a signal, None when unknown.
        remote_traceback: What the rank printed of its failure, or an empty string.
    """

    def __init__(self, message: str, rank: int = -1, exitcode: int | None = None, remote_traceback: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.exitcode = exitcode
        self.remote_traceback = remote_traceback

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (str(self), self.rank, self.exitcode, self.remote_traceback))


class RankTimeoutError(RankFailedError, TimeoutError):
    """A rank kept the others waiting for longer than `Trainer(timeout=…)` allows: it hangs, or somebody stopped it."""


LEFT_OUT = {
    r"fsdp.?precision|fsdp.?mixedprecision": "it is left out of lightlite, whose FSDPStrategy follows "
    "Trainer(precision=…), or its own mixed_precision",
    r"xla|(?<!ou)tpu": "TPUs and XLA are left out of lightlite",
    r"deepspeed": "DeepSpeed is left out of lightlite",
    r"bitsandbytes|nf4|fp4|int8": "bitsandbytes is left out of lightlite",
    r"transformer.?engine": "TransformerEngine is left out of lightlite",
    r"comet": "Comet is left out of lightlite",
    r"neptune": "Neptune is left out of lightlite",
    r"litlogger": "LitLogger is left out of lightlite",
    r"pruning": "pruning is left out of lightlite",
    r"servable|^serve$": "serving is left out of lightlite",
    r"layer_?sync|torchsyncbatchnorm": "plugins that synchronize layers are left out of lightlite, which has "
    "Trainer(sync_batchnorm=True)",
    r"^(lightning)?transformer$|lstm$|wikitext|sequencesampler": "demos that download data are left out of lightlite",
    r"^parallelstrategy": "the base class of parallel strategies is left out of lightlite, which has Strategy",
    r"lightningenvironment": "it is left out of lightlite, whose Trainer(devices=…) starts its ranks without one",
}
"""What of Lightning's lightlite does not have, on purpose: patterns of names, and what to say of them."""


def why_left_out(name: str) -> str | None:
    """A sentence, where a name of Lightning's belongs to what lightlite leaves out; else None."""
    return next((text for pattern, text in LEFT_OUT.items() if re.search(pattern, name, re.IGNORECASE)), None)


def missing_name(module: str, name: str, there: Iterable[str]) -> str:
    """What to say of a name that a module does not have.

    Args:
        module: The module's name.
        name: What was asked of it.
        there: What it has.
    """
    there = sorted(there)
    close = difflib.get_close_matches(name, there, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    why = why_left_out(name)
    reason = f" ({why})" if why else ""
    return f"lightlite has no {name} in {module}{reason}; {hint}there is: {', '.join(there) or 'nothing'}"


def missing_attribute(module: str, name: str) -> Exception:
    """What a module's `__getattr__` raises for a name that it does not have.

    Returns:
        An ImportError for what is left out on purpose, since its message, unlike that of an AttributeError, reaches
        who writes `from module import name`; else an AttributeError.
    """
    why = why_left_out(name)
    if why:
        return ImportError(f"there is no {name} in {module}: {why}", name=module)
    return AttributeError(f"module {module!r} has no attribute {name!r}")
