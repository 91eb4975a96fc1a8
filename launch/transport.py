"""How objects get from one process to another: small things as a pickle, big ones through shared files.

Whatever can be sent by cloudpickle can be sent here: lambdas, local classes and the classes of a script travel
by value. The bytes of tensors and arrays do not go into the pickle. They lie in a file that has no name, which the
receiver maps copy-on-write: any number of receivers share one copy, and nothing is left behind, however they end.
"""

from __future__ import annotations

import copyreg
import importlib
import io
import mmap
import os
import pickle
import sys
import tempfile
import threading
import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import cloudpickle
import numpy as np
import torch
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from lightlite.launch import modules

ALIGNMENT = 64
"""Bytes; what the widest vector instructions and torch's own allocator ask for."""

FILE_TYPES = (io.TextIOWrapper, io.BufferedReader, io.BufferedWriter, io.BufferedRandom, io.FileIO)
LOCKS = {type(make()): make for make in (threading.Lock, threading.RLock)}


@dataclass(frozen=True)
class Packed:
    """An object taken apart.

    Attributes:
        skeleton: The pickle, without the bytes of tensors and arrays.
        places: `(offset, length)` in the file of each of those, in bytes, in the order in which they are asked for.
        reloads: Modules that the sender has loaded again, so that a receiver that knows them does so too.
    """

    skeleton: bytes
    places: tuple[tuple[int, int], ...]
    reloads: tuple[tuple[str, int], ...] = ()


def anonymous_file() -> BinaryIO:
    """A file without a name, in memory where the system offers that: it ends with the last process that holds it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("lightlite"), "w+b", buffering=0)
    return cast("BinaryIO", tempfile.TemporaryFile(buffering=0))


def pack(value: Any, file: BinaryIO, *, outputs: bool = False) -> Packed:
    """Take `value` apart, appending the bytes of its tensors and arrays to `file`, which is unbuffered.

    What belongs to one process arrives as its like: a lock arrives unlocked, a DataLoader without its running workers,
    an open file opened again where it was, a tensor that was computed without the history of its computation.

    Args:
        value: Anything that cloudpickle can pickle. Tensors on a device are packed as tensors on the CPU.
        file: Where the bytes go.
        outputs: Whether these are results that ranks show each other. Views of bigger tensors are then packed
            without the rest, and classes that the receiver has already are left as they are there.

    Raises:
        Exception: Whatever the object that cannot be pickled raises; see `unsendable.explain`.
    """
    buffers: list[pickle.PickleBuffer] = []
    skeleton = io.BytesIO()
    _Pickler(skeleton, buffers, outputs).dump(value)
    places = tuple(_append(file, buffer.raw()) for buffer in buffers)
    return Packed(skeleton.getvalue(), places, () if outputs else modules.count_reloads())


def pack_small(result: Any) -> bytes:
    """One byte string for a small result that goes back to the caller; `pickle.loads` reads it.

    Raises:
        Exception: Where it cannot be pickled.
    """
    file = io.BytesIO()
    _Pickler(file, None, outputs=True).dump(result)
    return file.getvalue()


def pack_for_child(value: Any, file: BinaryIO, reducers: Mapping[type, Callable[[Any], Any]]) -> None:
    """Write what a child process of this one is to have, for `pickle.load`.

    Args:
        value: Anything that can be sent.
        file: Where it is written.
        reducers: By type, how what these processes share is pickled, such as tensors in shared memory.
    """
    _ChildPickler(file, reducers).dump(value)


def unpack(packed: Packed, mapped: memoryview) -> Any:
    """Put an object together again, over the bytes of the file that `pack` filled.

    Args:
        packed: What `pack` returned.
        mapped: The file, as from `map_private`. Tensors and arrays are views of it, and keep it alive.
    """
    modules.catch_up(packed.reloads)
    return pickle.loads(packed.skeleton, buffers=[mapped[start : start + size] for start, size in packed.places])


def map_private(file: BinaryIO | int) -> memoryview:
    """The file's bytes: read from the file, written to a copy of the page that nobody else sees."""
    descriptor = file if isinstance(file, int) else file.fileno()
    size = os.fstat(descriptor).st_size
    return memoryview(mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) if size else bytearray())


def _append(file: BinaryIO, data: memoryview) -> tuple[int, int]:
    start = -(-file.seek(0, os.SEEK_END) // ALIGNMENT) * ALIGNMENT
    if len(data):
        file.seek(start)
    written = 0
    while written < len(data):
        written += file.write(data[written:])
    return start, len(data)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: BinaryIO, buffers: list[pickle.PickleBuffer] | None, outputs: bool) -> None:
        def keep(buffer: pickle.PickleBuffer) -> None:
            assert buffers is not None
            buffers.append(buffer)

        super().__init__(file, protocol=5, buffer_callback=None if buffers is None else keep)
        self._outputs = outputs
        self._on_cpu: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._by_value: list[types.ModuleType] = []

    def dump(self, obj: Any) -> None:
        try:
            super().dump(obj)
        finally:
            for module in self._by_value:
                cloudpickle.unregister_pickle_by_value(module)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return _typed_storage, (self._shareable(obj._untyped_storage), obj.dtype)
        if isinstance(obj, torch.UntypedStorage) and obj.device.type == "cpu":
            as_bytes = torch.empty(0, dtype=torch.uint8).set_(obj).numpy()
            # Of the array, not of a memoryview: Python 3.11 crashes on those that end as garbage while they are in use.
            return _storage, (pickle.PickleBuffer(cast("Any", as_bytes)),)
        if self._outputs and type(obj) is torch.Tensor and _is_part(obj):
            whole = obj.detach().clone(memory_format=torch.contiguous_format)
            return whole.requires_grad_(obj.requires_grad).__reduce_ex__(5)
        if self._outputs and type(obj) is np.ndarray and not obj.flags.forc and not obj.dtype.hasobject:
            return np.ascontiguousarray(obj).__reduce_ex__(5)  # by itself it would go into the pickle
        if isinstance(obj, np.ndarray) and (mapped := _mapped_from_disk(obj)) is not None:
            return _reduced_map(obj, mapped)
        if isinstance(obj, DataLoader) and getattr(obj, "_iterator", None) is not None:
            return _without_workers(obj)
        if isinstance(obj, FILE_TYPES) and _is_on_disk(obj):
            return _reduced_file(obj)
        if isinstance(obj, torch.nn.Module) and parametrize.is_parametrized(obj):
            return _reduced_parametrized(obj)
        if type(obj) in LOCKS and not self._outputs:
            return LOCKS[type(obj)], ()
        if isinstance(obj, types.ModuleType) and sys.modules.get(obj.__name__) is obj:
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, types.FunctionType) and (compiler := _compiler_of(obj)) is not None:
            return _compiled, (compiler, obj._torchdynamo_orig_callable)  # type: ignore[attr-defined]
        if isinstance(obj, (type, types.FunctionType)):
            self._look_for_module_of(obj)
        reduced = super().reducer_override(obj)
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            _complete.add(obj)
            return (*reduced[:5], _ClassSetter(reduced[5], overwrite=not self._outputs))
        return reduced

    def _look_for_module_of(self, obj: Any) -> None:
        """Have the functions and classes of a module that cannot be imported elsewhere travel by value."""
        module = sys.modules.get(obj.__module__ or "")
        if module is None or modules.can_be_imported(obj.__module__) or module in self._by_value:
            return
        if obj.__module__ not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
            self._by_value.append(module)

    def _shareable(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The storage itself, or its copy on the CPU: one and the same for all tensors that share it."""
        if storage.device.type in ("cpu", "meta"):
            return storage
        if storage._cdata not in self._on_cpu:
            self._on_cpu[storage._cdata] = (storage, storage.cpu())
        return self._on_cpu[storage._cdata][1]


class _ChildPickler(_Pickler):
    def __init__(self, file: BinaryIO, reducers: Mapping[type, Callable[[Any], Any]]) -> None:
        super().__init__(file, None, outputs=False)
        self._reducers = reducers

    def reducer_override(self, obj: Any) -> Any:
        reduce = self._reducers.get(type(obj))
        return super().reducer_override(obj) if reduce is None else reduce(obj)


def _is_part(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return False
    return tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()


def _storage(data: memoryview) -> torch.UntypedStorage:
    if not len(data):
        return torch.UntypedStorage(0)
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.storage.TypedStorage:
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


_complete: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes sent by value that this process has in full: its own that it sent, and those it received."""


@dataclass(frozen=True)
class _ClassSetter:
    """Fills a class that came by value, and makes it known as a class of the script where it was one.

    A result that comes back must not overwrite the script's own classes with copies, whose methods would no longer
    see the script's global variables; work that is sent out must, so that changes to a class reach the helpers.
    """

    fill: Callable[[type, Any], Any]
    overwrite: bool

    def __call__(self, cls: type, state: Any) -> None:
        if not self.overwrite and cls in _complete:
            return
        self.fill(cls, state)
        _complete.add(cls)
        if self.overwrite and cls.__module__ == "__main__" and "." not in cls.__qualname__:
            # Loader workers pickle what they return by reference, so the name has to lead to the class.
            setattr(sys.modules["__main__"], cls.__qualname__, cls)


def _mapped_from_disk(array: np.ndarray[Any, Any]) -> np.memmap[Any, Any] | None:
    """The mapped file that an array is a view of, if it is."""
    base: Any = array
    while isinstance(base, np.ndarray) and not isinstance(base.base, mmap.mmap):
        base = base.base
    return base if isinstance(base, np.memmap) and base.filename else None


def _reduced_map(array: np.ndarray[Any, Any], mapped: np.memmap[Any, Any]) -> Any:
    if array is mapped:
        order = "F" if np.isfortran(array) else "C"
        mode = "r+" if mapped.mode == "w+" else mapped.mode
        return np.memmap, (str(mapped.filename), mapped.dtype, mode, mapped.offset, mapped.shape, order)
    offset = array.ctypes.data - mapped.ctypes.data
    return _part_of_map, (type(array), mapped, array.shape, array.dtype, offset, array.strides)


def _part_of_map(kind: type, mapped: Any, shape: Any, dtype: Any, offset: int, strides: Any) -> Any:
    return np.ndarray(shape, dtype, mapped, offset, strides).view(kind)


def _reduced_parametrized(module: torch.nn.Module) -> Any:
    """Torch refuses to pickle the class that it makes for a parametrized module, but can make it again."""
    names = tuple(cast("torch.nn.ModuleDict", module.parametrizations))
    cls = parametrize.type_before_parametrizations(module)
    return _parametrized, (cls, names), getattr(cls, "__getstate__", vars)(module)


def _parametrized(cls: type[torch.nn.Module], names: tuple[str, ...]) -> torch.nn.Module:
    module = cls.__new__(cls)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _compiler_of(function: types.FunctionType) -> Any:
    """What `torch.compile` made `function` with; None for a function that it did not make."""
    if not hasattr(function, "_torchdynamo_orig_callable"):
        return None
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["self"].cell_contents if "self" in cells else None


def _compiled(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    return compiler(function)


def _without_workers(loader: DataLoader[Any]) -> Any:
    """Persistent workers stay with the process whose children they are."""
    reduced = loader.__reduce_ex__(5)
    if isinstance(reduced, tuple) and len(reduced) > 2 and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (*reduced[:2], {**reduced[2], "_iterator": None}, *reduced[3:])
    return reduced


def _is_on_disk(file: Any) -> bool:
    return not file.closed and isinstance(file.name, (str, os.PathLike)) and os.path.isfile(file.name)


def _reduced_file(file: Any) -> Any:
    if file.writable():
        file.flush()
    mode = file.mode.replace("w", "a").replace("x", "a")
    text = {"encoding": file.encoding, "errors": file.errors} if isinstance(file, io.TextIOWrapper) else {}
    buffering = 0 if isinstance(file, io.FileIO) else -1
    return _reopen, (os.path.abspath(file.name), mode, buffering, text, None if "a" in mode else file.tell())


def _reopen(path: str, mode: str, buffering: int, text: dict[str, str], position: int | None) -> Any:
    file = open(path, mode, buffering, **text)  # type: ignore[call-overload]  # noqa: SIM115
    if position is not None:
        file.seek(position)
    return file


def can_be_sent(value: Any) -> Exception | None:
    """The error that sending `value` runs into, or None."""
    try:
        _Pickler(io.BytesIO(), [], outputs=False).dump(value)
    except Exception as error:
        return error
    return None
