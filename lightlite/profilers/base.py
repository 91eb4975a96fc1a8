"""The profiler of a Trainer that was given none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from lightlite.profilers.profiler import Profiler

T = TypeVar("T")


class PassThroughProfiler(Profiler):
    """Records nothing, and leaves what the Trainer would record as it is, so that it costs nothing."""

    def start(self, action_name: str) -> None:
        """Do nothing."""

    def stop(self, action_name: str) -> None:
        """Do nothing."""

    def profile(self, action_name: str) -> AbstractContextManager[str]:
        """A context that does nothing."""
        return nullcontext(action_name)

    def wrap(self, action_name: str, function: Callable[..., T]) -> Callable[..., T]:
        """`function` itself."""
        return function

    def profile_iterable(self, iterable: Iterable[T], action_name: str) -> Iterator[T]:
        """`iterable`'s own iterator."""
        return iter(iterable)
