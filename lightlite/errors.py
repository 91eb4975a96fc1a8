"""The exceptions that lightlite raises on its own account.

    LightliteError
    ├── MisconfigurationException      what the user asked for cannot be done; says what can
    │   └── UnknownPluginError         no accelerator, strategy, … of that name (also a KeyError)
    ├── CheckpointError                a checkpoint cannot be used
    │   ├── CheckpointNotFoundError    there is no such file (also a FileNotFoundError)
    │   └── CorruptCheckpointError     the file is damaged or is no checkpoint
    ├── MetricError                    a logged value cannot be reduced over the ranks
    └── LaunchError                    something about processes
        ├── NotSendableError           an object cannot be sent to the other ranks
        └── RankFailedError            a rank died; carries `rank` and the remote traceback
            └── RankTimeoutError       a rank kept the others waiting too long (also a TimeoutError)

A user's own exception is never wrapped: it passes through as it was raised.
"""

from __future__ import annotations


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
