"""What a loader's workers have of their own: random numbers by a sample's place in the pass, whoever loads it."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

END = signal.SIGRTMIN + 3 if hasattr(signal, "SIGRTMIN") else signal.SIGTERM
"""By which a worker is told to end, for it does not heed SIGTERM."""

AFTERWARDS = -1
"""The place whose random numbers `collate_fn` draws, after a batch's samples."""


class WorkerPasses:
    """The random numbers of a loader's workers, pass by pass.

    A DataLoader draws a base seed where it starts workers: in every pass, or in the first where they persist. That seed
    is drawn here, in its stead and at the same moment, so that a pass can be begun again as it was: with new workers,
    but without drawing where there was nothing to draw.

    Args:
        loader: The user's DataLoader.

    Attributes:
        generator: What the copy of the loader that is iterated is to draw its base seed from.
        state: The generator's state when the workers were started and the number of passes since; None before that.
    """

    def __init__(self, loader: Any) -> None:
        self.generator = torch.Generator()
        self._source, self._persistent = loader.generator, loader.persistent_workers
        self.state: dict[str, Any] | None = None
        self._is_due = False

    def begin(self) -> None:
        """Begin a pass, as soon as its sampler is asked for an iterator; a DataLoader may do so twice."""
        self._is_due = True

    def seed(self) -> int:
        """The seed of the pass's random numbers, after its sampler's iterator was made."""
        if self._is_due:
            self._is_due = False
            self._draw()
        assert self.state is not None
        self.generator.set_state(self.state["generator"])
        seed = hash((_base_seed(self.generator), self.state["passes"]))
        self.generator.set_state(self.state["generator"])
        return seed

    def _draw(self) -> None:
        if self._persistent and self.state is not None:
            self.state = {**self.state, "passes": self.state["passes"] + 1}
        else:
            drawn_from = torch.get_rng_state() if self._source is None else self._source.get_state()
            self.state = {"generator": drawn_from, "passes": 0}
            _base_seed(self._source)


def _base_seed(generator: torch.Generator | None) -> int:
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


class Placed:
    """Indices on their way to a worker, with their places; there they arrive as themselves.

    Args:
        indices: What the sampler, or batch sampler, drew.
        seed: The pass's, from `WorkerPasses.begin`.
        place: Where in the pass a batch or sample is; a list with a place for each sample of the batch.
    """

    __slots__ = ("_indices", "_place", "_seed")

    def __init__(self, indices: Any, seed: int, place: int | list[int]) -> None:
        self._indices, self._seed, self._place = indices, seed, place

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrive, (self._indices, self._seed, self._place)


def _arrive(indices: Any, seed: int, place: int | list[int]) -> Any:
    """In the worker, right before it loads what `indices` say."""
    if type(indices) is not list:
        _reseed(hash((seed, place)))
        return indices
    places = place if isinstance(place, list) else range(len(indices))
    return _Indices(indices, seed if isinstance(place, list) else hash((seed, place)), places)


class _Indices(list[Any]):
    """A batch's indices, which seed the generators for each sample as they are gone through."""

    def __init__(self, indices: list[Any], seed: int, places: Sequence[int]) -> None:
        super().__init__(indices)
        self._seeds = [hash((seed, place)) for place in (*places, *places[:1])]
        self._seeds[-1] = hash((self._seeds[-1], AFTERWARDS))
        _reseed(self._seeds[0])  # for a dataset that loads the batch as a whole

    def __iter__(self) -> Iterator[Any]:
        for seed, index in zip(self._seeds, super().__iter__(), strict=False):
            _reseed(seed)
            yield index
        _reseed(self._seeds[-1])


class WorkerStart:
    """How a worker starts: called in it.

    It does not heed the signals that tell its rank to end, which still needs it. Other ranks than the first seed their
    workers apart, for what is not drawn by place: torch would seed them alike on every rank.

    Args:
        rank: Rank zero's workers keep what torch gave them.
        init: The loader's own `worker_init_fn`, called afterwards.
    """

    def __init__(self, rank: int, init: Callable[[int], None] | None) -> None:
        self._rank, self._init = rank, init

    def __call__(self, worker_id: int) -> None:
        """Start the worker of that number."""
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        signal.signal(END, lambda *_: os._exit(0))
        if self._rank:
            _reseed(hash((torch.initial_seed(), self._rank)))
        if self._init is not None:
            self._init(worker_id)


def endable(batches: Any) -> Any:
    """A DataLoader's iterator whose workers end by another signal where torch or Python would terminate them."""
    for worker in getattr(batches, "_workers", ()):
        process = getattr(worker, "_popen", None)
        if process is not None:
            process.terminate = functools.partial(_end, process)
    return batches


def _end(process: Any) -> None:
    """Ask a worker to end, and kill it where it does not."""
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.kill(process.pid, END)
    if process.wait(1) is None:
        process.kill()


def _reseed(seed: int) -> None:
    torch.default_generator.manual_seed(seed % 2**63)
    random.seed(seed % 2**63)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed % 2**32)
