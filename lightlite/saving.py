"""How checkpoint files are written and read: at once, or while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from lightlite import storage
from lightlite.errors import CheckpointError
from lightlite.interfaces import CheckpointIO


class TorchCheckpointIO(CheckpointIO):
    """One file by `torch.save`, on a local path or a URL that fsspec knows: whole or not at all, see `storage`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file.

        Raises:
            TypeError: For storage options, which it has none of.
            CheckpointError: Naming the entry that is no plain data, or what the file system said.
        """
        if storage_options is not None:
            raise TypeError(
                f"save_checkpoint(storage_options={storage_options!r}): {type(self).__name__} has no options; write a "
                "CheckpointIO that has them, and give Trainer(plugins=[…])"
            )
        storage.write(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; see `storage.read`."""
        return storage.read(path, "cpu" if map_location is None else map_location)

    def open_checkpoint(self, path: Any) -> dict[str, Any]:
        """Read the file; of a folder, leave what is in the shards there; see `storage.open_folder`."""
        is_folder = not storage.is_url(path) and storage.local_path(path).is_dir()
        return storage.open_folder(path) if is_folder else storage.read(path)

    def save_shards(self, checkpoint: dict[str, Any], path: Any, write: Callable[[dict[str, Any], str], None]) -> None:
        """Write a folder; see `storage.write_folder`."""
        storage.write_folder(checkpoint, path, write)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file, or the folder."""
        storage.remove(path)

    def damage(self, path: Any) -> str | None:
        """See `storage.damage`."""
        return storage.damage(path)

    def origin(self, path: Any) -> tuple[str, int]:
        """See `storage.origin`."""
        return storage.origin(path)


class AsyncCheckpointIO(CheckpointIO):
    """Lets training go on while another thread writes.

    What is saved is copied to the host's memory first, into buffers that are kept for the next time. One checkpoint is
    in flight at most: a second waits for the first. What keeps one from being written is raised soon after in the
    loop, at the latest by the next save or at the end of the call; and no program ends before all is on disk.

    Args:
        checkpoint_io: What writes; by default `TorchCheckpointIO`.
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self.checkpoint_io = TorchCheckpointIO() if checkpoint_io is None else checkpoint_io
        self._reset()

    def _reset(self) -> None:
        self._buffers = HostBuffers()
        self._executor: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []
        self._path: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"checkpoint_io": self.checkpoint_io}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def expect(self, tensors: Iterable[torch.Tensor]) -> None:
        """Get the memory for copies of these, in the other thread: it takes longer than the copying."""
        plain = (tensor for tensor in tensors if type(tensor) in (torch.Tensor, torch.nn.Parameter))
        storages = {whole.data_ptr(): whole.nbytes() for whole in map(torch.Tensor.untyped_storage, plain)}
        self.then(partial(self._buffers.reserve, list(storages.values())))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Copy what is saved, and have it written; wait first for what is in flight."""
        content = storage.plain(checkpoint)
        self.wait()
        copied = self._buffers.copy(content)
        self._path = path
        self.then(partial(self.checkpoint_io.save_checkpoint, copied, path, storage_options))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what was saved, when all is written."""
        self.wait()
        return self.checkpoint_io.load_checkpoint(path, map_location, weights_only)

    def open_checkpoint(self, path: Any) -> dict[str, Any]:
        """Read what was saved, when all is written."""
        self.wait()
        return self.checkpoint_io.open_checkpoint(path)

    def save_shards(self, checkpoint: dict[str, Any], path: Any, write: Callable[[dict[str, Any], str], None]) -> None:
        """Write shards at once: training waits for them."""
        self.wait()
        self.checkpoint_io.save_shards(checkpoint, path, write)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, after what was saved before is written."""
        self.then(partial(self.checkpoint_io.remove_checkpoint, path))

    def then(self, action: Callable[[], None]) -> None:
        """Do something after what was saved before is written; not if that fails."""
        if self._executor is None:
            # Its threads are waited for when the program ends.
            self._executor = ThreadPoolExecutor(1, "lightlite-checkpoints")
        self._pending.append(self._executor.submit(_in_turn, self._pending[-1] if self._pending else None, action))
        self._pending[-1].add_done_callback(self._tell)

    def _tell(self, done: Future[None]) -> None:
        if done.exception() is not None and self.on_failure is not None:
            self.on_failure()

    def damage(self, path: Any) -> str | None:
        """What is wrong with a checkpoint, when all is written."""
        self.wait()
        return self.checkpoint_io.damage(path)

    def origin(self, path: Any) -> tuple[str, int]:
        """Which run a checkpoint belongs to, and of which step it is, when all is written."""
        self.wait()
        return self.checkpoint_io.origin(path)

    def is_pending(self, path: Any) -> bool:
        """Whether a file of that name is being written."""
        return str(path) == str(self._path) and not all(future.done() for future in self._pending)

    def wait(self, seconds: float | None = None) -> None:
        """See `CheckpointIO.wait`.

        Raises:
            CheckpointError: Of the first thing that failed; what was to follow it is left undone.
        """
        futures.wait(self._pending, seconds)
        while self._pending and self._pending[0].done():
            failure = self._pending.pop(0).exception()
            if failure is not None:
                self._pending.clear()
                raise failure

    def teardown(self) -> None:
        """Finish, and release the buffers and the thread."""
        try:
            self.wait()
            self.checkpoint_io.teardown()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
            self._reset()


def _in_turn(before: Future[None] | None, action: Callable[[], None]) -> None:
    if before is not None and before.exception() is not None:
        raise CheckpointError("what was saved before could not be written") from before.exception()
    action()


class HostBuffers:
    """Host memory for copies of tensors, used again by the next copy of the same size."""

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def copy(self, content: Any) -> Any:
        """The same nest with copies of its tensors, which share memory where the originals do.

        What was returned before must not be in use any more.
        """
        for buffer in self._used:
            self._free.setdefault(buffer.numel(), []).append(buffer)
        self._used = []
        copied = _copied(content, {}, self._take)
        self._free.clear()
        return copied

    def reserve(self, sizes: Iterable[int]) -> None:
        """Have buffers of these sizes, in bytes, at hand for the next copy."""
        for size in sizes:
            self._free.setdefault(size, []).append(torch.empty(size, dtype=torch.uint8).zero_())

    def _take(self, size: int) -> torch.Tensor:
        kept = self._free.get(size)
        buffer = kept.pop() if kept else torch.empty(size, dtype=torch.uint8)
        self._used.append(buffer)
        return buffer


def _copied(value: Any, seen: dict[int, torch.Tensor], take: Callable[[int], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return _copied_tensor(value, seen, take)
    if isinstance(value, dict):
        return type(value)((key, _copied(item, seen, take)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, seen, take) for item in value)
    return value


def _copied_tensor(tensor: torch.Tensor, seen: dict[int, torch.Tensor], take: Callable[[int], torch.Tensor]) -> Any:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return tensor.detach().cpu().clone()
    whole = tensor.untyped_storage()
    key = whole.data_ptr()
    if key not in seen or not key:
        buffer = take(whole.nbytes())
        original = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(whole)
        buffer.copy_(original)
        seen[key] = buffer
    copy = torch.empty(0, dtype=tensor.dtype)
    copy.set_(seen[key].untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    return copy
