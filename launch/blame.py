"""Tells a rank's own failure from the echo of another's."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist

from lightlite.errors import RankFailedError
from lightlite.launch import echoes


class OtherRankFailed(RankFailedError):
    """Raised inside of a rank that does not notice; Python makes it there without arguments."""

    def __init__(
        self, message: str = "the run has ended: another rank failed, or gave up waiting for this one"
    ) -> None:
        super().__init__(message)


def is_consequence(error: BaseException) -> bool:
    """Whether an exception may be no more than the loss of another rank, as a collective call reports it.

    `torch.distributed` raises plain RuntimeErrors for that, with gloo's or NCCL's words in them.
    """
    return any(_is_echo(link) for link in _chain(error))


def starts_as_consequence(error: BaseException) -> bool:
    """The same of the exception that stands at the beginning of the chain, before others came in its handling."""
    return _is_echo(list(_chain(error))[-1])


def is_timeout(error: BaseException) -> bool:
    """Whether an exception tells that another rank was waited for in vain."""
    return any(_is_echo(link) and echoes.is_timeout(str(link)) for link in _chain(error))


def _is_echo(error: BaseException) -> bool:
    if isinstance(error, (dist.DistError, OtherRankFailed)):
        return True
    return isinstance(error, RuntimeError) and echoes.is_echo(str(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
