"""How batches are dealt out to ranks, and how a place in them is found again.

In training, W ranks with batch size b see the global batches that one process with batch size W x b sees, in
the same order: every rank runs the loader's own sampler from the same random state and keeps its slice. In
evaluation, the batches are the ones that one process would make, and rank r gets batches r, r + W, r + 2W, …

The user's loader is never changed: a rank iterates a shallow copy of it that draws from a `dealing.Dealt`.
With one process and nothing to skip, it is the user's loader itself.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lightlite import distributed
from lightlite.dealing import Dealt, Draw, slices
from lightlite.errors import MisconfigurationException
from lightlite.utilities.seed import capture_rng, restore_rng


class RankLoader:
    """What this rank iterates of a user's loader.

    Args:
        loader: Any iterable of batches; a DataLoader is dealt out by index, without loading what others get.
        training: Whether to deal slices of global batches, or, for evaluation, whole batches in turn.
        deal: Whether to deal at all; False where the data is split by the user.

    Attributes:
        loader: The iterable that this rank iterates; the user's own where there is nothing to deal.
        length: In training, this rank's number of batches; in evaluation, the number over all ranks. None if unknown.
    """

    def __init__(self, loader: Any, training: bool, deal: bool = True) -> None:
        self.source = loader
        self._training = training
        self._rank, self._world = (distributed.rank(), distributed.world_size()) if deal else (0, 1)
        self._dealt: Dealt | None = None
        self._passing = False
        # Items drawn for a batch, from what is dealt out.
        self._draws = self._world if training and self._splits_batches else 1
        self.loader = loader
        self.length: int | None
        if self._world > 1 and not _is_split_by_user(loader):
            self.loader = self._dealt_out()
        self.length = self._count()

    @property
    def first(self) -> int:
        """Index of this rank's first batch among all."""
        return 0 if self._training or not self._splits_batches else self._rank

    @property
    def stride(self) -> int:
        """Distance between the indices of this rank's batches."""
        return 1 if self._training or not self._splits_batches else self._world

    @property
    def _splits_batches(self) -> bool:
        return self._world > 1 and not _is_split_by_user(self.source)

    def _dealt_out(self) -> Any:
        rank, world = self._rank, self._world
        if not _is_map_style(self.source):
            self._passing = True
            # Persistent workers of the user's own would be at another point of their random stream than new ones.
            return twin_of(self.source) if isinstance(self.source, DataLoader) else self.source
        loader: DataLoader[Any] = self.source
        if not self._training:
            batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
            return self._copy(
                batches, lambda items: itertools.islice(items, rank, None, world), loader.batch_sampler is None
            )
        if loader.batch_sampler is not None and type(loader.batch_sampler) is BatchSampler:
            size, drop_last = loader.batch_sampler.batch_size, loader.batch_sampler.drop_last
            sampler = loader.batch_sampler.sampler
            return self._copy(
                sampler, lambda items: slices(items, size, drop_last, rank, world), False, size, drop_last
            )
        batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        drop_last = bool(getattr(batches, "drop_last", False))
        deal = lambda items: slices(items, None, drop_last, rank, world)  # noqa: E731
        return self._copy(batches, deal, loader.batch_sampler is None, 1, drop_last)

    def _copy(
        self,
        source: Iterable[Any],
        deal: Callable[[Iterator[Any]], Iterator[Any]],
        unbatched: bool,
        size: int | None = None,
        drop_last: bool = False,
    ) -> Any:
        total = _length(source)
        length = None
        if total is not None and size is not None:
            length = total // (size * self._world) if drop_last else -(-total // (size * self._world))
        elif total is not None:
            length = len(range(self._rank, total, self._world))
        self._dealt = Dealt(source, deal, length)
        self._draws = 1 if size is None else size * self._world
        twin = with_sampler(self.source, self._dealt, unbatched)
        twin.worker_init_fn = WorkerSeed(self._rank, twin.worker_init_fn)
        return twin

    def _count(self) -> int | None:
        if self._dealt is not None and not self._training:
            return _length(self._dealt.source)
        count = _length(self.loader)
        if count is None or not (self._passing and self._training):
            return count
        return count // self._world if self._drops_last else -(-count // self._world)

    def start(self, skip: int = 0, limit: int | None = None) -> Iterator[Any]:
        """This rank's batches of one pass. A collective call where batches are dealt out.

        Args:
            skip: Batches of this rank to pass over: by index where the loader allows it, else by loading them.
            limit: After how many batches to end: in training of this rank, in evaluation of all ranks together. Nothing
                more is drawn then, so that generators stand where one process would leave them.

        Raises:
            MisconfigurationException: On every rank, where the ranks' samplers do not draw the same.
        """
        stop = None if limit is None else limit * self._draws
        loader = self.loader
        if skip and self._dealt is None and _is_map_style(loader):
            loader = self._pass_on()
        if self._dealt is not None:
            self._dealt.skip, self._dealt.limit = skip, stop
        mine: Iterator[Any] = self._start_alike(loader, stop) if self._splits_batches else iter(loader)
        if self._dealt is not None:
            self._dealt.draw_first()
            return mine
        if stop is not None and not self._passing:
            mine = itertools.islice(mine, stop)
        if self._passing:
            dealt = slices(mine, None, self._drops_last, self._rank, self._world) if self._training else mine
            mine = dealt if self._training else itertools.islice(mine, self._rank, None, self._world)
        return itertools.islice(mine, skip, None) if skip else mine

    def _pass_on(self) -> Any:
        """A copy of the loader that draws what it would draw anyway, through this file's sampler."""
        loader = self.source
        unbatched = loader.batch_sampler is None
        self._dealt, self._draws = Dealt(loader.sampler if unbatched else loader.batch_sampler, iter, self.length), 1
        self.loader = with_sampler(loader, self._dealt, unbatched)
        return self.loader

    def track(self) -> deque[Any] | None:
        """Note the indices of each batch from the next pass on; None where the loader has no indices."""
        if not _is_map_style(self.source):
            return None
        if self._dealt is None:
            self._pass_on()
        assert self._dealt is not None
        self._dealt.kept = deque()
        return self._dealt.kept

    @property
    def _drops_last(self) -> bool:
        return bool(getattr(self.source, "drop_last", False))

    def _start_alike(self, loader: Any, stop: int | None) -> Iterator[Any]:
        """Begin a pass from rank zero's random state on every rank; the others get their own back."""
        own = capture_rng()
        state = distributed.broadcast_object(own)
        if self._rank:
            restore_rng(state)
        mine: Iterator[Any] = iter(loader)
        if self._dealt is not None:
            self._dealt.draw_first()
        elif getattr(loader, "num_workers", 0):
            mine = itertools.islice(mine, stop)
        else:
            mine = Draw(itertools.islice(mine, stop), 1)
            mine.draw()
        if self._rank:
            restore_rng(own)
        if self._dealt is not None:
            self._check_alike(self._dealt)
        return mine

    @staticmethod
    def _check_alike(dealt: Dealt) -> None:
        drawn = distributed.gather_objects(dealt.first_drawn())
        for rank, items in enumerate(drawn):
            if items != drawn[0]:
                raise MisconfigurationException(
                    f"{type(dealt.source).__name__} draws other indices on rank {rank} than on rank 0: {items} there, "
                    f"{drawn[0]} here; let it draw from torch's, NumPy's or Python's global generator, or from one of "
                    "its own with a fixed seed, or split the data yourself and pass use_distributed_sampler=False"
                )

    def close(self) -> None:
        """End persistent workers with the call that started them, as Lightning does.

        Left to the garbage collector, they are waited for in vain, five seconds each.
        """
        workers: Any = getattr(self.loader, "_iterator", None)
        if hasattr(workers, "_shutdown_workers"):
            workers._shutdown_workers()
            object.__setattr__(self.loader, "_iterator", None)

    def _generators(self) -> list[Any]:
        """The random generators that the loader and its samplers own, each once."""
        found = [getattr(holder, "generator", None) for holder in self._holders()]
        return list({id(generator): generator for generator in found if hasattr(generator, "get_state")}.values())

    def state_dict(self) -> dict[str, Any]:
        """States of the generators that the loader owns."""
        return {"generators": [generator.get_state() for generator in self._generators()]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put back what `state_dict` returned."""
        for generator, kept in zip(self._generators(), (state or {}).get("generators", ()), strict=False):
            generator.set_state(kept)

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that shuffle by epoch which one it is."""
        for holder in self._holders():
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(epoch)

    def _holders(self) -> list[Any]:
        """The loader and its samplers, each once."""
        loader = self.source
        batches = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
        return list({id(holder): holder for holder in holders}.values())


class WorkerSeed:
    """Random numbers of their own for each rank's loader workers, which torch would seed alike on every rank.

    Args:
        rank: Rank zero's workers keep what torch gave them.
        init: The loader's own `worker_init_fn`, called afterwards.
    """

    def __init__(self, rank: int, init: Callable[[int], None] | None) -> None:
        self._rank, self._init = rank, init

    def __call__(self, worker_id: int) -> None:
        """Seed a worker; called within it."""
        if self._rank:
            seed = hash((torch.initial_seed(), self._rank)) % 2**63
            random.seed(seed)
            torch.manual_seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)
        if self._init is not None:
            self._init(worker_id)


def twin_of(loader: Any) -> Any:
    """A shallow copy of a DataLoader, of its own class, with workers of its own, whose batches come in order."""
    twin = copy.copy(loader)
    object.__setattr__(twin, "_iterator", None)
    object.__setattr__(twin, "in_order", True)
    return twin


def with_sampler(loader: Any, sampler: Any, unbatched: bool) -> Any:
    """The same, drawing from another (batch) sampler."""
    twin = twin_of(loader)
    object.__setattr__(twin, "sampler" if unbatched else "batch_sampler", sampler)
    return twin


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _is_split_by_user(loader: Any) -> bool:
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def check_loader(loader: Any, name: str) -> None:
    """A loader must be an iterable.

    Raises:
        MisconfigurationException: Saying what was given as `name`.
    """
    if isinstance(loader, (str, bytes)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise MisconfigurationException(
            f"{name} is {loader!r} of type {type(loader).__name__}, which is no iterable of batches; give a "
            "torch.utils.data.DataLoader, or any iterable"
        )


def limit_of(limit: int | float, length: int | None, name: str) -> int | None:
    """How many batches `limit_<stage>_batches` leaves of a loader.

    Args:
        limit: An int is a number of batches; a float a share of them, 1.0 meaning all.
        length: Number of batches; None if unknown.
        name: The argument's name, for messages.

    Returns:
        A number of batches; None for all of an unknown number.

    Raises:
        MisconfigurationException: For a share of an unknown number, or of so few that nothing is left.
    """
    if isinstance(limit, int) and not isinstance(limit, bool):
        return limit if length is None else min(limit, length)
    if limit == 1.0 or (length is None and limit == 0.0):
        return length if limit else 0
    if length is None:
        raise MisconfigurationException(
            f"{name}={limit} is a share of the batches, but the loader has no length; give an int, or 1.0 for all"
        )
    count = int(length * limit)
    if count == 0 and limit > 0 and length > 0:
        raise MisconfigurationException(
            f"{name}={limit} of {length} batches is less than one batch; give at least {1 / length:.3g}"
        )
    return count


def sequential(loader: Any) -> Any:
    """A DataLoader like `loader` without shuffling, for `overfit_batches`."""
    from torch.utils.data import RandomSampler, SequentialSampler

    if is_nest(loader):
        parts = loader.items() if isinstance(loader, dict) else enumerate(loader)
        unshuffled = {key: sequential(part) for key, part in parts}
        return unshuffled if isinstance(loader, dict) else type(loader)(unshuffled.values())
    if not _is_map_style(loader) or not isinstance(loader.sampler, RandomSampler):
        return loader
    order = SequentialSampler(loader.dataset)
    if loader.batch_sampler is None:
        return with_sampler(loader, order, unbatched=True)
    batches = BatchSampler(order, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    return with_sampler(loader, batches, unbatched=False)


def as_list(loaders: Any) -> list[Any]:
    """A list of loaders from one loader, a sequence or a mapping of them."""
    if isinstance(loaders, dict):
        return list(loaders.values())
    if isinstance(loaders, (list, tuple)) and any(isinstance(loader, DataLoader) for loader in loaders):
        return list(loaders)
    return [loaders]


def is_nest(loaders: Any) -> bool:
    """Whether training is to draw from several loaders at once."""
    if isinstance(loaders, dict):
        return True
    return (
        isinstance(loaders, Sequence)
        and bool(loaders)
        and all(isinstance(part, (DataLoader, dict)) for part in loaders)
    )


class NestLoader:
    """Several training loaders drawn from at once, as one nest of batches; the shorter ones start over.

    It has the face of a `RankLoader`. As in Lightning, an epoch is as long as the longest loader.

    Args:
        loaders: A dict or sequence of loaders, or of such nests.
        deal: Whether to deal batches out to ranks.
    """

    def __init__(self, loaders: Any, deal: bool = True) -> None:
        self.source = loaders
        self.length: int | None
        self._keys = list(loaders) if isinstance(loaders, dict) else None
        parts = list(loaders.values()) if isinstance(loaders, dict) else list(loaders)
        self._parts = [training_loader(part, deal) for part in parts]
        known: list[int] = [part.length for part in self._parts if part.length is not None]
        self.length = max(known) if len(known) == len(self._parts) else None
        self.loader = self

    def start(self, skip: int = 0, limit: int | None = None) -> Iterator[Any]:
        """The batches of one pass; see `RankLoader.start`."""
        return itertools.islice(self._together(), skip, limit)

    def _together(self) -> Iterator[Any]:
        running = [part.start() for part in self._parts]
        unfinished = set(range(len(running)))
        while True:
            batches = []
            for index, part in enumerate(self._parts):
                batch = next(running[index], _OVER)
                if batch is _OVER:
                    unfinished.discard(index)
                    if not unfinished:
                        return
                    running[index] = part.start()
                    batch = next(running[index])
                batches.append(batch)
            yield dict(zip(self._keys, batches, strict=True)) if self._keys is not None else type(self.source)(batches)

    def state_dict(self) -> dict[str, Any]:
        """States of the generators that the loaders own."""
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put back what `state_dict` returned."""
        for part, kept in zip(self._parts, (state or {}).get("parts", ()), strict=False):
            part.load_state_dict(kept)

    def close(self) -> None:
        """End persistent workers; see `RankLoader.close`."""
        for part in self._parts:
            part.close()

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that shuffle by epoch which one it is."""
        for part in self._parts:
            part.set_epoch(epoch)


_OVER = object()


def training_loader(loaders: Any, deal: bool = True) -> RankLoader | NestLoader:
    """What a rank iterates in training, of one loader or a nest of them."""
    return NestLoader(loaders, deal) if is_nest(loaders) else RankLoader(loaders, training=True, deal=deal)
