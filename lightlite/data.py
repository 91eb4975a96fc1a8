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
import math
import operator
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightlite import distributed
from lightlite.dealing import Column, Cycle, Dealt, Draw, same_rng, slices
from lightlite.errors import CheckpointError, MisconfigurationException
from lightlite.positions import WorkerPasses, WorkerStart, endable
from lightlite.storage import plain
from lightlite.utilities.combined_loader import CombinedLoader, combined_length, draw_together, is_nest, sized_len
from lightlite.utilities.rank_zero import rank_zero_warn
from lightlite.utilities.seed import capture_rng, restore_rng

ABSENT = object()
"""Stands for the batch that a rank has not, of the last global batch of a stream."""


class _Pass:
    """What a pass through one or more loaders has of its own: the random state in which its order is drawn."""

    order: dict[str, Any] | None = None
    """That state, in the present pass, where hooks have drawn random numbers since the pass was begun."""

    def _begin(
        self,
        loaders: Sequence[RankLoader],
        skips: Sequence[int],
        limit: int | None,
        at: dict[str, Any] | None,
        seek: bool,
    ) -> tuple[Iterator[Any], list[Iterator[Any]]]:
        """Begin a pass of each loader, all before any of them draws, as where all are iterated.

        The order is drawn with the first batch, as any loader does, and at once where a place in it is sought.

        Returns:
            An iterator that yields nothing, to be used up first: by every rank, whether it has a batch or not; and
            the iterators.
        """
        dealt = [loader for loader in loaders if loader._splits_batches]
        with _alike() if dealt else nullcontext():
            begun = [
                loader._open(skip, limit, (at or {}).get("place")) for loader, skip in zip(loaders, skips, strict=True)
            ]
        began = capture_rng()
        self.order = (at or {}).get("order")

        def draw() -> Iterator[Any]:
            if self.order is not None:
                restore_rng(self.order)
            elif not same_rng(now := capture_rng(), began):
                self.order = now
            with _alike() if dealt else nullcontext():
                for loader in loaders if seek else dealt:
                    loader._draw_beginning()
            for loader in dealt:
                loader._check_alike()
            yield from ()

        first = draw()
        return (iter(list(first)) if seek else first), begun


class RankLoader(_Pass):
    """What this rank iterates of a user's loader.

    Args:
        loader: Any iterable of batches; a DataLoader is dealt out by index, without loading what others get.
        training: Whether to deal slices of global batches, or, for evaluation, whole batches in turn.
        deal: Whether to deal at all; False where the data is split by the user.
        endless: What gives the indices of the batches where those dealt out in evaluation come again and again, as
            one sequence.
        pin: Whether batches that workers load are to be in page-locked memory, into which a thread copies them.

    Attributes:
        source: What was given as `loader`.
        initial_state: What `state_dict` returned at first, for who has to leave no trace.
        loader: The iterable that this rank iterates; the user's own where there is nothing to deal.
        length: In training, this rank's number of batches; in evaluation, the number over all ranks. None if unknown.
        present: Ranks that have a batch of the global batch drawn last, after `end_as_they_come`.
    """

    def __init__(
        self, loader: Any, training: bool, deal: bool = True, endless: Column | None = None, pin: bool = False
    ) -> None:
        self.source = loader
        self._training, self._endless, self._pin = training, endless, pin
        self._rank, self._world = (distributed.rank(), distributed.world_size()) if deal else (0, 1)
        self._dealt: Dealt | None = None
        self._beginning: Dealt | Draw | None = None
        self._before: Iterator[Any] = iter(())
        self._passing = self._ends_as_they_come = False
        self.present = self._world
        # Items drawn for a batch, from what is dealt out.
        self._draws = self._world if training and self._splits_batches else 1
        self.loader = loader
        self.length: int | None
        if self._splits_batches:
            self.loader = self._dealt_out()
        elif isinstance(loader, DataLoader) and loader.num_workers:
            if _is_map_style(loader) and getattr(loader, "in_order", True):
                self.draw_by_index()
            else:
                self.loader = copy.copy(loader)
                object.__setattr__(self.loader, "_iterator", None)
                self.loader.worker_init_fn = WorkerStart(0, loader.worker_init_fn)
        self._suit_memory()
        self.length = self._count()
        # What can tell its place in the stream, if there is such a thing, and the place before the batch drawn last.
        self._stream = _stateful(self.loader) if training and self._dealt is None else None
        self._place: Any = None
        self._streams = False
        self.initial_state = self.state_dict()

    def _suit_memory(self) -> None:
        # Never the user's own loader; and without workers, this process would do the copying itself.
        if self._pin and self.loader is not self.source and self.loader.num_workers:
            self.loader.pin_memory = True

    @property
    def may_fetch_ahead(self) -> bool:
        """Whether to fetch a batch early costs nothing and changes nothing: others load it, nobody asks for places."""
        return bool(getattr(self.loader, "num_workers", 0)) and self._stream is None

    @property
    def first(self) -> int:
        """Index of this rank's first batch among all."""
        return 0 if self._training or not self._splits_batches else self._rank

    @property
    def stride(self) -> int:
        """Distance between the indices of this rank's batches."""
        return 1 if self._training or not self._splits_batches else self._world

    @property
    def deals_out(self) -> bool:
        """Whether the ranks share the loader's batches, rather than each has its own."""
        return self._splits_batches

    def end_as_they_come(self) -> bool:
        """Have a stream's last global batch be what is left of it, ABSENT on ranks for which there is no batch.

        Returns:
            Whether that is a matter here; else, global batches are whole, or made so from the start of the order.
        """
        self._ends_as_they_come = self._training and self._passing and not self._drops_last
        return self._ends_as_they_come

    def _as_they_come(self, items: Iterator[Any]) -> Iterator[Any]:
        while block := list(itertools.islice(items, self._world)):
            self.present = len(block)
            yield block[self._rank] if self._rank < len(block) else ABSENT

    @property
    def _splits_batches(self) -> bool:
        return self._world > 1 and not _is_split_by_user(self.source)

    def _dealt_out(self) -> Any:
        rank, world = (self._rank, self._world) if self._splits_batches else (0, 1)
        if not _is_map_style(self.source):
            self._passing = True
            # Persistent workers of the user's own would be at another point of their random stream than new ones.
            return twin_of(self.source) if isinstance(self.source, DataLoader) else self.source
        loader: DataLoader[Any] = self.source
        unbatched = loader.batch_sampler is None
        batches: Any = loader.sampler if unbatched else loader.batch_sampler
        if not self._training:
            if self._endless is not None:
                batches = self._endless
            return self._copy(batches, lambda items, _: itertools.islice(items, rank, None, world), unbatched)
        size: int | None = None
        drop_last = bool(getattr(batches, "drop_last", False))
        if type(batches) is BatchSampler:
            size, batches = batches.batch_size, batches.sampler
        deal = lambda items, head: slices(items, head, size, drop_last, rank, world)  # noqa: E731
        return self._copy(batches, deal, unbatched, size or 1, drop_last)

    def _copy(
        self,
        source: Iterable[Any],
        deal: Callable[[Iterator[Any], list[Any]], Iterator[Any]],
        unbatched: bool,
        size: int | None = None,
        drop_last: bool = False,
    ) -> Any:
        world = self._world if self._splits_batches else 1
        total = sized_len(source)
        length = None
        if total is not None and size is not None:
            length = total // (size * world) if drop_last else -(-total // (size * world))
        elif total is not None:
            length = len(range(self._rank if world > 1 else 0, total, world))
        workers = WorkerPasses(self.source) if self.source.num_workers else None
        share = (size or 1) * world
        self._dealt = Dealt(source, deal, length, share, world > 1, workers)
        self._draws = 1 if size is None else share
        twin = with_sampler(self.source, self._dealt, unbatched)
        if workers is not None:
            twin.generator = workers.generator
            twin.worker_init_fn = WorkerStart(self._rank if world > 1 else 0, twin.worker_init_fn)
        return twin

    def _count(self) -> int | None:
        if not self._training:
            return sized_len(self.source)
        count = sized_len(self.loader)
        if count is None or not self._passing:
            return count
        return count // self._world if self._drops_last else -(-count // self._world)

    def start(
        self, skip: int = 0, limit: int | None = None, at: dict[str, Any] | None = None, seek: bool = False
    ) -> Iterator[Any]:
        """This rank's batches of one pass. A collective call where batches are dealt out, and so is its first batch.

        Args:
            skip: Batches of this rank to pass over: by index where the loader allows it, else by loading them.
            limit: After how many batches to end: in training of this rank, in evaluation of all ranks together. Nothing
                more is drawn then, so that generators stand where one process would leave them.
            at: What `state_dict` returned at the place to skip to.
            seek: Whether to draw the order at once; so it is where something is passed over.

        Raises:
            MisconfigurationException: On every rank, with the first batch, where the ranks' samplers do not draw the
                same.
        """
        first, (batches,) = self._begin([self], [skip], limit, at, seek or bool(skip))
        if self.length is not None and not self._training and self._endless is None:
            # Used up, as by a `for` loop, but no more than the loader says it has: there may be no end.
            indices = range(self.first + skip * self.stride, self.length, self.stride)
            batches = map(operator.itemgetter(0), zip(batches, indices, strict=False))
        return itertools.chain(first, batches)

    def _open(self, skip: int, limit: int | None, place: Any = None) -> Iterator[Any]:
        """Begin a pass. `_draw_beginning` comes next."""
        if skip and self._stream is not None and place is not None:
            self._stream.load_state_dict(place)
            skip = 0
        if skip and self._dealt is None and _is_map_style(self.loader):
            self.draw_by_index()
        stop = None if limit is None else limit * self._draws
        self._beginning, self._before = self._dealt, iter(())
        if self._dealt is not None:
            self._dealt.skip, self._dealt.limit = skip, stop
            if self._dealt.workers is not None:
                self._dealt.workers.begin()
            mine: Iterator[Any] = endable(iter(self.loader))
            return mine
        mine = endable(iter(self.loader))
        self._streams = self._stream is not None
        again_and_again = self._passing and self._endless is not None
        if again_and_again:
            mine = itertools.chain(mine, itertools.chain.from_iterable(itertools.repeat(self.loader)))
        if stop is not None:
            mine = itertools.islice(mine, stop)
        if self._passing:
            if again_and_again or not getattr(self.loader, "num_workers", 0):
                mine = self._beginning = Draw(mine, 1)
            if self._ends_as_they_come:
                mine = self._as_they_come(mine)
            elif self._training:
                mine = slices(mine, [], None, self._drops_last, self._rank, self._world)
            else:
                mine = itertools.islice(mine, self._rank, None, self._world)
        self._before = itertools.islice(mine, skip)
        return self._noting_place(mine) if self._stream is not None and self.length is None else mine

    def _noting_place(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Where there is no length, a batch is fetched ahead, and its place is the one before it."""
        while True:
            self._place = None if self._stream is None else self._stream.state_dict()
            try:
                batch = next(batches)
            except StopIteration:
                return
            yield batch

    def _draw_beginning(self) -> None:
        """Draw the order, or its first part, or go to a place in a stream, from the random state of this moment."""
        deque(self._before, maxlen=0)
        if self._beginning is not None:
            self._beginning.draw()

    def draw_by_index(self) -> None:
        """Iterate a copy of the loader that draws what it would draw anyway, by indices that are known beforehand."""
        if self._dealt is None and _is_map_style(self.source):
            self.loader = self._dealt_out()
            self._suit_memory()

    def track(self) -> deque[Any] | None:
        """Note the indices of each batch from the next pass on; None where the loader has no indices."""
        if not _is_map_style(self.source):
            return None
        self.draw_by_index()
        assert self._dealt is not None
        self._dealt.kept = deque()
        return self._dealt.kept

    @property
    def _drops_last(self) -> bool:
        return bool(getattr(self.source, "drop_last", False))

    def _check_alike(self) -> None:
        if self._dealt is None:
            return
        drawn = distributed.gather_objects(self._dealt.first_drawn())
        for rank, items in enumerate(drawn):
            if items != drawn[0]:
                raise MisconfigurationException(
                    f"{type(self._dealt.source).__name__} draws other indices on rank {rank} than on rank 0: {items} "
                    f"there, {drawn[0]} here; let it draw from torch's, NumPy's or Python's global generator, or from "
                    "one of its own with a fixed seed, or split the data yourself and pass "
                    "use_distributed_sampler=False"
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
        """States of the generators that the loader owns, of its workers, and that from which the order was drawn."""
        generators = [generator.get_state() for generator in self._generators()]
        workers = self._dealt.workers if self._dealt is not None else None
        state = {"generators": generators, "workers": workers and workers.state, "order": self.order}
        if self._streams:  # not earlier, for to be asked may begin a pass
            assert self._stream is not None
            place = _keepable(self._place if self.length is None else self._stream.state_dict(), self.source)
            if place is None:
                self._stream, self._streams = None, False
            state["place"] = place
        return state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put back what `state_dict` returned."""
        for generator, kept in zip(self._generators(), (state or {}).get("generators", ()), strict=False):
            generator.set_state(kept)
        if self._dealt is not None and self._dealt.workers is not None:
            self._dealt.workers.state = (state or {}).get("workers")

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that shuffle by epoch which one it is."""
        for holder in self._holders():
            if callable(getattr(holder, "set_epoch", None)):
                holder.set_epoch(epoch)

    def described(self) -> str:
        """By which classes the batches are drawn."""
        holders = [holder for holder in self._holders() if holder is not None]
        return " and ".join(type(holder).__name__ for holder in holders)

    def _holders(self) -> list[Any]:
        """The loader and its samplers, each once."""
        loader = self.source
        batches = getattr(loader, "batch_sampler", None)
        holders = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
        return list({id(holder): holder for holder in holders}.values())


@contextmanager
def _alike() -> Iterator[None]:
    """Within it, every rank has rank zero's random state; the others get their own back."""
    own = capture_rng()
    state = distributed.broadcast_object(own)
    if distributed.rank():
        restore_rng(state)
    yield
    if distributed.rank():
        restore_rng(own)


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


def _stateful(loader: Any) -> Any:
    """What knows its place: a loader such as torchdata's StatefulDataLoader, or the dataset that is read right here."""
    dataset = None if getattr(loader, "num_workers", 0) else getattr(loader, "dataset", None)
    for holder in (loader, dataset):
        if all(callable(getattr(holder, name, None)) for name in ("state_dict", "load_state_dict")):
            return None if holder is dataset and not isinstance(dataset, IterableDataset) else holder
    return None


def _keepable(place: Any, loader: Any) -> Any:
    """A place, if a checkpoint can hold it; None where it cannot, so that a resumed run goes through the stream."""
    try:
        return plain(place)
    except CheckpointError as error:
        rank_zero_warn(
            f"the state_dict of {type(loader).__name__}, or of its dataset, is not kept in checkpoints: {error}. A "
            "resumed run goes through what comes before its place"
        )
        return None


def check_loader(loader: Any, name: str) -> None:
    """A loader must be an iterable.

    Raises:
        MisconfigurationException: Saying what was given as `name`.
    """
    if isinstance(loader, (str, bytes, type)) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise MisconfigurationException(
            f"{name} is {loader!r} of type {type(loader).__name__}, which is no iterable of batches; give a "
            "torch.utils.data.DataLoader, or any iterable"
        )
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        rank_zero_warn(
            f"{name} is a Dataset, {type(loader).__name__}: each of its samples is taken for a batch; for batches of "
            "several give DataLoader(dataset, batch_size=…)"
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
    """A DataLoader like `loader` that takes the samples in the dataset's order, for `overfit_batches`."""
    if isinstance(loader, CombinedLoader):
        unshuffled = copy.copy(loader)
        unshuffled.flattened = [sequential(part) for part in loader.flattened]
        return unshuffled
    if not _is_map_style(loader) or isinstance(loader.sampler, SequentialSampler):
        return loader
    rank_zero_warn(
        "overfit_batches takes the same batches in every epoch, in the dataset's order, and so not those of "
        f"{type(loader.sampler).__name__}; give a loader with shuffle=False to be rid of this warning"
    )
    order = SequentialSampler(loader.dataset)
    if loader.batch_sampler is None:
        return with_sampler(loader, order, unbatched=True)
    batches = BatchSampler(order, loader.batch_sampler.batch_size, loader.batch_sampler.drop_last)
    return with_sampler(loader, batches, unbatched=False)


def undropped(loader: Any) -> Any:
    """A DataLoader like `loader` that leaves no sample out, for predictions of all of them."""
    batches = getattr(loader, "batch_sampler", None)
    if not _is_map_style(loader) or not isinstance(batches, BatchSampler) or not batches.drop_last:
        return loader
    whole = copy.copy(batches)
    whole.drop_last = False
    return with_sampler(loader, whole, unbatched=False)


def combined(loaders: Any, mode: str, name: str) -> Any:
    """A CombinedLoader, where several loaders or one of these were given; else the loader itself.

    Args:
        loaders: An iterable of batches, a CombinedLoader, or a nest of iterables.
        mode: How a nest is combined.
        name: What to call it in messages.

    Raises:
        MisconfigurationException: For what is no iterable, naming it.
    """
    whole = CombinedLoader(loaders, mode) if is_nest(loaders) else loaders
    if not isinstance(whole, CombinedLoader):
        check_loader(whole, name)
        return whole
    if not whole.flattened:
        raise MisconfigurationException(f"{name} is {loaders!r}, in which there is none; give at least one")
    for index, part in enumerate(whole.flattened):
        check_loader(part, name if len(whole.flattened) == 1 else f"number {index} of what was given as {name}")
    return whole


def one_by_one(loaders: Any) -> list[Any]:
    """The loaders that are evaluated one after the other, in order, of what `combined` returned."""
    in_turn = isinstance(loaders, CombinedLoader) and loaders.mode == "sequential"
    return list(loaders.flattened) if in_turn else [loaders]


class RankLoaders(_Pass):
    """What this rank iterates of a CombinedLoader. It has the face of a `RankLoader`, and yields nests of batches.

    Args:
        loader: The CombinedLoader; in "sequential" mode its loaders come one after the other, as one.
        training: See `RankLoader`.
        deal: See `RankLoader`.
        pin: See `RankLoader`.

    Raises:
        MisconfigurationException: Where an evaluation on several ranks would have to cycle through a loader of unknown
            length.
    """

    def __init__(self, loader: CombinedLoader, training: bool, deal: bool = True, pin: bool = False) -> None:
        self.source = loader
        deal = deal and not any(_is_split_by_user(part) for part in loader.flattened)
        cycles = loader.mode == "max_size_cycle"
        # Ranks come to the end of a loader at different batches, where they cannot agree on how it starts over.
        endless = cycles and not training and deal and distributed.world_size() > 1
        self._cycle = Cycle(loader.flattened) if endless else None
        columns = self._cycle.columns if self._cycle else [None] * len(loader.flattened)
        self._parts = [
            RankLoader(part, training, deal, column, pin)
            for part, column in zip(loader.flattened, columns, strict=True)
        ]
        for part in self._parts:
            part.draw_by_index()
        self.loader = loader.unflatten([part.loader for part in self._parts])
        self.first = min((part.first for part in self._parts), default=0)
        self.stride = min((part.stride for part in self._parts), default=1)
        lengths = [math.inf if part.length is None else part.length for part in self._parts]
        length = combined_length(loader.mode, lengths)
        self.length: int | None = None if math.isinf(length) else int(length)
        if endless and self.length is None:
            raise MisconfigurationException(
                "on several ranks, an evaluation with CombinedLoader(mode='max_size_cycle') needs loaders that have a "
                "length; give them __len__, or use mode='min_size' or 'max_size'"
            )
        # By index: where, and from which random state, the loader's present pass began, if that was not at the start.
        self._passes: dict[int, dict[str, Any]] = {}
        self._drawn = 0
        self.initial_state = self.state_dict()

    @property
    def may_fetch_ahead(self) -> bool:
        """See `RankLoader.may_fetch_ahead`; a loader that starts over draws random numbers for that."""
        all_begin_at_once = self.source.mode in ("min_size", "max_size")
        return all_begin_at_once and all(part.may_fetch_ahead for part in self._parts)

    @property
    def deals_out(self) -> bool:
        """Whether the ranks share the loaders' batches, rather than each has its own."""
        return any(part.deals_out for part in self._parts)

    def start(self, skip: int = 0, limit: int | None = None, at: dict[str, Any] | None = None) -> Iterator[Any]:
        """This rank's nests of batches of one pass; see `RankLoader.start`."""
        known = [number for number in (limit, self.length) if number is not None]
        stop = min(known, default=None)
        self._drawn, self._passes = skip, dict((at or {}).get("passes", {}))
        if self._cycle is not None:
            self._cycle.begin(stop)
        begin = self._in_turn if self.source.mode == "sequential" else self._together
        left = None if stop is None else len(range(self.first + skip * self.stride, stop, self.stride))
        first, batches = begin(skip, stop, at)
        return self._counted(itertools.chain(first, itertools.islice(batches, left)))

    def _counted(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._drawn += 1
            yield batch

    def _together(self, skip: int, stop: int | None, at: dict[str, Any] | None) -> tuple[Iterator[Any], Iterator[Any]]:
        skips = [0 if index in self._passes else skip for index in range(len(self._parts))]
        first, running = self._begin(self._parts, skips, stop, at, bool(skip))
        for index in self._passes:
            running[index] = self._go_on(index, skip)
        together = draw_together(self.source.mode, running, self._start_over, self._passes)
        return first, map(self.source.unflatten, together)

    def _in_turn(self, skip: int, stop: int | None, at: dict[str, Any] | None) -> tuple[Iterator[Any], Iterator[Any]]:
        current = max(self._passes, default=0)
        began = at["parts"][0] if at else None
        running = self._go_on(current, skip) if current else self._parts[0].start(skip, stop, began)
        later = (self._start_over(index) for index in range(current + 1, len(self._parts)))
        return iter(()), itertools.chain(running, itertools.chain.from_iterable(later))

    def _start_over(self, index: int) -> Iterator[Any]:
        part = self._parts[index]
        self._passes[index] = {"from": self._drawn, "random": capture_rng(), "loader": part.state_dict()}
        return part.start()

    def _go_on(self, index: int, skip: int) -> Iterator[Any]:
        """Begin the pass again that was in progress in a loader that had started over."""
        began, part = self._passes[index], self._parts[index]
        restore_rng(began["random"])
        part.load_state_dict(began["loader"])
        return part.start(skip - began["from"], seek=True)

    def track(self) -> None:
        """Nothing: a nest of batches has no indices in one dataset."""

    def state_dict(self) -> dict[str, Any]:
        """States of the generators that the loaders own, and how those began that have started over."""
        parts = [part.state_dict() for part in self._parts]
        return {"parts": parts, "passes": dict(self._passes), "order": self.order}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Put back the generators' states that `state_dict` returned."""
        for part, kept in zip(self._parts, (state or {}).get("parts", ()), strict=False):
            part.load_state_dict(kept)

    def described(self) -> str:
        """See `RankLoader.described`."""
        return f"{self.source.mode} of " + ", ".join(part.described() for part in self._parts)

    def close(self) -> None:
        """End persistent workers; see `RankLoader.close`."""
        for part in self._parts:
            part.close()

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that shuffle by epoch which one it is."""
        for part in self._parts:
            part.set_epoch(epoch)


def rank_loader(loader: Any, training: bool, deal: bool = True, pin: bool = False) -> RankLoader | RankLoaders:
    """What a rank iterates of one loader, or of a CombinedLoader."""
    if isinstance(loader, CombinedLoader):
        return RankLoaders(loader, training, deal, pin)
    return RankLoader(loader, training, deal, pin=pin)
