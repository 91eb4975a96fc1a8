"""Do it once, not once per rank: functions and messages of rank zero.

Messages go to the standard library's logger "lightlite". They show on stderr in a program that never
configured logging, and follow the program's own configuration in one that did.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, overload

from lightlite import distributed

T = TypeVar("T")
P = ParamSpec("P")


class _WhenUnconfigured(logging.Handler):
    """Writes to stderr as long as the root logger has no handler, which is to say nobody configured logging."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            sys.stderr.write(self.format(record) + "\n")


log = logging.getLogger("lightlite")
if log.level == logging.NOTSET:
    log.setLevel(logging.INFO)
if not log.handlers:
    log.addHandler(_WhenUnconfigured())


class _RankZeroOnly:
    """A decorator: the function runs on rank zero; on the others the call returns `default`.

    Attributes:
        rank: This process's global rank now.
    """

    @property
    def rank(self) -> int:
        return distributed.rank()

    @overload
    def __call__(self, fn: Callable[P, T]) -> Callable[P, T | None]: ...

    @overload
    def __call__(self, fn: Callable[P, T], default: T) -> Callable[P, T]: ...

    def __call__(self, fn: Callable[P, Any], default: Any = None) -> Callable[P, Any]:
        @wraps(fn)
        def on_rank_zero(*args: P.args, **kwargs: P.kwargs) -> Any:
            return fn(*args, **kwargs) if distributed.rank() == 0 else default

        return on_rank_zero


rank_zero_only = _RankZeroOnly()


@rank_zero_only
def rank_zero_debug(message: object, *args: object, stacklevel: int = 3, **kwargs: Any) -> None:
    """Log at level DEBUG, on rank zero."""
    log.debug(message, *args, stacklevel=stacklevel, **kwargs)


@rank_zero_only
def rank_zero_info(message: object, *args: object, stacklevel: int = 3, **kwargs: Any) -> None:
    """Log at level INFO, on rank zero."""
    log.info(message, *args, stacklevel=stacklevel, **kwargs)


@rank_zero_only
def rank_zero_warn(message: Warning | str, stacklevel: int = 3, category: type[Warning] = UserWarning) -> None:
    """Warn, on rank zero.

    Args:
        message: What to say.
        stacklevel: Whose line the warning names; the default is the caller of this function.
        category: The class of the warning.
    """
    warnings.warn(message, category=category, stacklevel=stacklevel)


class LightningDeprecationWarning(DeprecationWarning):
    """Of something that a later version will not have."""


def rank_prefixed_message(message: str, rank: int | None) -> str:
    """A message that says which rank it is from; as it is, where that is None."""
    return message if rank is None else f"[rank: {rank}] {message}"


def rank_zero_deprecation(
    message: Warning | str, stacklevel: int = 4, category: type[Warning] = LightningDeprecationWarning
) -> None:
    """Warn of something deprecated, on rank zero."""
    rank_zero_warn(message, stacklevel=stacklevel, category=category)


class WarningCache(set[str]):
    """Remembers what it has said, and says it once."""

    def warn(self, message: str, stacklevel: int = 4, category: type[Warning] = UserWarning) -> None:
        """Warn on rank zero, the first time this message comes."""
        if message not in self:
            self.add(message)
            rank_zero_warn(message, stacklevel=stacklevel, category=category)

    def info(self, message: str) -> None:
        """Log at level INFO on rank zero, the first time this message comes."""
        if message not in self:
            self.add(message)
            rank_zero_info(message, stacklevel=4)
