"""Reads what `torch.distributed.checkpoint` has written into a folder, without executing anything.

That library's own reader unpickles the folder's table of contents, and so runs whatever it says. Here the table's
records become plain objects, and no other class is ever looked up.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightlite.errors import CheckpointError, CorruptCheckpointError

TABLE = ".metadata"
"""The file that says which part of which tensor lies where."""

STORED = "lightlite: stored as"
"""What stands in a nest for a tensor that is in the folder: a dict of this key and the tensor's name."""

SPREAD = ("state_dict", "optimizer_states")
"""Entries of a checkpoint all of whose tensors go into the folder."""


class Stored:
    """A tensor in a folder. `stored[slices]`, a slice for each dimension, reads that part of it.

    Attributes:
        shape: Its shape.
        dtype: Its type.
    """

    def __init__(self, folder: Path, name: str, record: Any, places: Mapping[Any, Any]) -> None:
        self.shape, self.dtype = torch.Size(record.size), record.properties.dtype
        self._folder, self._name, self._places = folder, name, places
        self._chunks = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in record.chunks]

    def __getitem__(self, part: tuple[slice, ...]) -> Tensor:
        bounds = [one.indices(size)[:2] for one, size in zip(part, self.shape, strict=True)]
        wanted = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype)
        if not wanted.numel():
            return wanted
        filled = 0
        for offsets, sizes in self._chunks:
            inner, outer = [], []
            for (start, stop), offset, size in zip(bounds, offsets, sizes, strict=True):
                low, high = max(start, offset), min(stop, offset + size)
                inner.append(slice(low - offset, max(high - offset, low - offset)))
                outer.append(slice(low - start, max(high - start, low - start)))
            target = wanted[tuple(outer)]
            if target.numel():
                target.copy_(self._chunk(offsets)[tuple(inner)])
                filled += target.numel()
        if filled != wanted.numel():
            raise CorruptCheckpointError(
                f"{self._folder} holds {filled} of {prod(wanted.shape)} numbers of {self._name}"
            )
        return wanted

    def full_tensor(self) -> Tensor:
        """The whole of it."""
        return self[tuple(slice(None) for _ in self.shape)]

    def _chunk(self, offsets: tuple[int, ...]) -> Tensor:
        place = self._places.get((self._name, offsets))
        if place is None:
            raise CorruptCheckpointError(f"{self._folder / TABLE} does not say where a part of {self._name} is")
        file = self._folder / place.relative_path
        try:
            with file.open("rb") as opened:
                opened.seek(place.offset)
                content = io.BytesIO(opened.read(place.length))
            with zipfile.ZipFile(content) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CorruptCheckpointError(f"its record {damaged} does not have the checksum kept of it")
            content.seek(0)
            chunk: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CorruptCheckpointError(
                f"{file} is truncated or damaged, where {self._name} should be ({type(error).__name__}: {error})"
            ) from None
        return chunk

    def check(self) -> None:
        """See that it is there and undamaged.

        Raises:
            CorruptCheckpointError: Saying which file is damaged.
        """
        for offsets, _ in self._chunks:
            self._chunk(offsets)


def open_folder(folder: Path) -> dict[str, Stored]:
    """The tensors in a folder, by the names that `torch.distributed.checkpoint` gives them.

    Raises:
        CheckpointError: Where the table of contents holds what is no such table.
        CorruptCheckpointError: Where it is damaged.
    """
    path = folder / TABLE
    try:
        with path.open("rb") as file:
            table = _Unpickler(file).load()
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in table.storage_data.items()}
        foreign = next((place.relative_path for place in places.values() if not _lies_beside(place)), None)
        if foreign is not None:
            raise CheckpointError(
                f"{path} names {foreign!r}, which is no file of its own folder; nothing was read of it"
            )
        records = {name: one for name, one in table.state_dict_metadata.items() if hasattr(one, "chunks")}
        return {name: Stored(folder, name, record, places) for name, record in records.items()}
    except CheckpointError:
        raise
    except Exception as error:
        raise CorruptCheckpointError(f"{path} is truncated or damaged ({type(error).__name__}: {error})") from None


def _lies_beside(place: Any) -> bool:
    name = place.relative_path
    return os.path.basename(name) == name and name not in ("", os.curdir, os.pardir)


class _Record:
    """What a record of the table says, whatever its class was."""

    def __new__(cls, *_: Any) -> _Record:
        return super().__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:  # a tensor's properties, of which the first is its type
            self.dtype = state[0]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch.distributed.checkpoint."):
            return _Record
        if module.partition(".")[0] == "pathlib":  # where it was written
            return _Record
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        raise CheckpointError(f"the table of contents names {module}.{name}, which is not looked up: it is no table")


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take the tensors that belong into a folder out of a checkpoint: of which ranks hold parts, or in `SPREAD`.

    Returns:
        These, nested as they were; and the checkpoint with a `STORED` in the place of each.
    """
    tensors: dict[str, Any] = {}
    rest = {key: _taken(value, (key,), key in SPREAD, tensors) for key, value in checkpoint.items()}
    return tensors, rest


def _taken(value: Any, path: tuple[Any, ...], every: bool, tensors: dict[str, Any]) -> Any:
    if isinstance(value, Tensor):
        if not every and not hasattr(value, "device_mesh"):
            return value
        place = tensors
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value.detach()
        return {STORED: ".".join(map(str, path))}
    if isinstance(value, dict):
        return type(value)((key, _taken(item, (*path, key), every, tensors)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_taken(item, (*path, index), every, tensors) for index, item in enumerate(value))
    return value


def join(rest: Any, stored: Mapping[str, Any]) -> Any:
    """Put what `stored` has of each tensor in the place that `split` took it from.

    Raises:
        CorruptCheckpointError: Where one is missing.
    """
    if isinstance(rest, dict):
        if STORED in rest:
            name = rest[STORED]
            if name not in stored:
                raise CorruptCheckpointError(f"the checkpoint's folder has no tensor {name}")
            return stored[name]
        return type(rest)((key, join(value, stored)) for key, value in rest.items())
    if isinstance(rest, (list, tuple)):
        return type(rest)(join(value, stored) for value in rest)
    return rest
