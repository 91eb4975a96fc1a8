"""Random generators: seed them, keep their state, put it back."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightlite import distributed
from lightlite.utilities.rank_zero import rank_zero_info, rank_zero_warn

MIN_SEED = 0
MAX_SEED = 2**32 - 1
SEED_VARIABLE = "PL_GLOBAL_SEED"
WORKERS_VARIABLE = "PL_SEED_WORKERS"


def seed_everything(seed: int | None = None, workers: bool = False, verbose: bool = True) -> int:
    """Seed Python's, NumPy's and PyTorch's generators, on every device there is.

    The seed is kept in the environment variable PL_GLOBAL_SEED, so that processes started later find it.

    Args:
        seed: 0 … 2**32 - 1. None means what PL_GLOBAL_SEED says, and 0 with a warning where it says nothing.
        workers: Whether the loaders' worker processes are to be seeded too; kept in PL_SEED_WORKERS.
        verbose: Whether to log the seed.

    Returns:
        The seed.

    Raises:
        ValueError: Where the seed is no whole number, or out of bounds.
    """
    seed = _choose_seed(seed)
    os.environ[SEED_VARIABLE] = str(seed)
    os.environ[WORKERS_VARIABLE] = str(int(workers))
    if verbose:
        rank_zero_info(f"Seed set to {seed}")
    random.seed(seed)
    import numpy

    numpy.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def _choose_seed(seed: int | str | None) -> int:
    given, source = (seed, "seed") if seed is not None else (os.environ.get(SEED_VARIABLE), SEED_VARIABLE)
    if given is None:
        rank_zero_warn(f"No seed was given and {SEED_VARIABLE} is not set: the seed is 0", stacklevel=4)
        return 0
    try:
        chosen = int(given)
    except ValueError:
        raise ValueError(
            f"{source} is {given!r}; a seed is a whole number from {MIN_SEED} to {MAX_SEED}, such as 42"
        ) from None
    if not MIN_SEED <= chosen <= MAX_SEED:
        raise ValueError(f"{source} is {chosen}; NumPy accepts seeds from {MIN_SEED} to {MAX_SEED}")
    return chosen


def reset_seed() -> int | None:
    """Seed again with what `seed_everything` was last called with; None, and nothing done, where it never was."""
    seed = os.environ.get(SEED_VARIABLE)
    if seed is None:
        return None
    return seed_everything(int(seed), workers=seed_workers(), verbose=False)


def seed_workers() -> bool:
    """Whether `seed_everything(workers=True)` asked for seeded loader workers."""
    return os.environ.get(WORKERS_VARIABLE) == "1"


def pl_worker_init_function(worker_id: int, rank: int | None = None) -> None:
    """Seed a loader worker's generators, NumPy's included, apart from those of all other workers and ranks.

    A `worker_init_fn` for loaders that no Trainer deals out.

    Args:
        worker_id: Which worker.
        rank: Of which rank; by default this process's.
    """
    import numpy

    rank = distributed.rank() if rank is None else rank
    base = torch.initial_seed() - worker_id  # the loader's own
    seeds = numpy.random.SeedSequence([base % 2**64, worker_id, rank]).generate_state(3)
    random.seed(int(seeds[0]))
    numpy.random.seed(seeds[1])
    torch.manual_seed(int(seeds[2]))


def capture_rng() -> dict[str, Any]:
    """The state of Python's, NumPy's and PyTorch's generators on the CPU.

    Returns:
        "python", "torch" and, where NumPy's generator is in use, "numpy": numbers, strings, lists, tuples and one
        tensor of bytes, so that `torch.load(weights_only=True)` reads it.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        state["numpy"] = _plain(numpy_random.get_state(legacy=False))
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned. A generator that `state` does not name is left as it is."""
    if "python" in state:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(state["numpy"])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


collect_rng_states = capture_rng
set_rng_states = restore_rng


@contextmanager
def isolate_rng(include_cuda: bool = True) -> Iterator[None]:
    """A block that leaves the random generators as it found them.

    Args:
        include_cuda: Whether that holds for the generators of the accelerator too, whichever it is. An
            accelerator that the process has not used yet is not touched.
    """
    state = capture_rng()
    devices = _device_states() if include_cuda else {}
    try:
        yield
    finally:
        restore_rng(state)
        for where, device_state in devices.items():
            torch.get_device_module().set_rng_state(device_state, *where)


def _device_states() -> dict[tuple[int, ...], torch.Tensor]:
    if not torch.accelerator.is_available():
        return {}
    module = torch.get_device_module()
    if not getattr(module, "is_initialized", lambda: True)():
        return {}
    count = torch.accelerator.device_count()
    # A kind that only ever has one device takes no index.
    places: list[tuple[int, ...]] = [()] if count == 1 else [(index,) for index in range(count)]
    return {where: module.get_rng_state(*where) for where in places}
